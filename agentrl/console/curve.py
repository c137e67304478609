"""A line chart in braille: two dots across and four down in every character cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row of 4][column of 2]
_BLANK = 0x2800


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) with 0 <= y <= 1 in increasing x. `dash`: draw one dot in so many (1 = a solid line);
    `joined` False draws the points alone. `mark` stands for the series in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = ""
    dash: int = 1
    joined: bool = True
    mark: str = "━"


class Grid:
    """Dots on `columns` x `rows` cells; a cell takes the style of what was drawn on it last."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._bits = [[0] * columns for _ in range(rows)]
        self._styles = [[""] * columns for _ in range(rows)]

    def dot(self, x: int, y: int, style: str) -> None:
        """A dot at column x of 2 * columns, row y of 4 * rows, counted from the lower left."""
        row, column = self.rows - 1 - y // 4, x // 2
        if 0 <= row < self.rows and 0 <= column < self.columns:
            self._bits[row][column] |= _DOTS[3 - y % 4][x % 2]
            self._styles[row][column] = style

    def draw(self, series: Series, low: float, high: float) -> None:
        """Draw a series whose x runs over [low, high]."""
        wide, tall = 2 * self.columns - 1, 4 * self.rows - 1
        span = (high - low) or 1.0
        dots = [(round((x - low) / span * wide), round(min(max(y, 0.0), 1.0) * tall)) for x, y in series.points]
        for x, y in dots:
            self.dot(x, y, series.style)
        drawn = 0
        for (x0, y0), (x1, y1) in pairwise(dots) if series.joined else ():
            reach = max(abs(x1 - x0), abs(y1 - y0), 1)
            for k in range(reach):
                drawn += 1
                if drawn % series.dash == 0:
                    self.dot(x0 + round((x1 - x0) * k / reach), y0 + round((y1 - y0) * k / reach), series.style)

    def line(self, row: int) -> Text:
        """One row of cells, from the top."""
        text = Text()
        for bits, style in zip(self._bits[row], self._styles[row], strict=True):
            text.append(chr(_BLANK + bits) if bits else " ", style)
        return text


def chart(series: Sequence[Series], *, width: int, height: int, low: float, high: float, label: str) -> Text:
    """All of `series` over one axis from `low` to `high`, `width` columns wide, with axes and a legend."""
    grid = Grid(max(width - 8, 10), height)
    for each in series:
        grid.draw(each, low, high)
    out = Text(no_wrap=True, overflow="crop")
    for row in range(height):
        share = 1 - row / (height - 1) if height > 1 else 1.0
        tick = f"{share:4.0%}" if row in (0, height // 2, height - 1) else "    "
        out.append(f" {tick} ", "dim").append("┤" if tick.strip() else "│", "dim")
        out.append_text(grid.line(row)).append("\n")
    ends = f"{label} {low:g}"
    out.append(f"       {ends}{f'{high:g}':>{max(grid.columns - len(ends), 1)}}\n", "dim")
    out.append("       ")
    for each in series:
        if each.points:
            out.append(f"{each.mark} ", each.style).append(f"{each.name}   ")
    return out
