"""The learning curve of a run as a picture: held-out success with its 95 % intervals, and the training reward.

It reads what every run leaves behind, summary.json and metrics.jsonl, and needs the extra `plot`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentrl.errors import UsageError
from agentrl.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT = "#1f2430", "#8a90a0"
_COLOURS = {"greedy": "#0a7d5a", "sampled": "#5b4bd6"}


@dataclass(frozen=True, slots=True)
class Curve:
    """What is drawn. `points`: per way of decoding (x, success, low, high) in order of x; `reward`: (x, reward)
    per RL step; `warm`: where on the x axis (RL steps) the supervised stages end, None where there are none."""

    points: Mapping[str, Sequence[tuple[float, float, float, float]]]
    reward: Sequence[tuple[float, float]]
    warm: float | None


def curve(run_dir: Path, out_png: Path) -> Path:
    """Draw the curve of a run and return `out_png`. Raises `UsageError` where matplotlib is absent, or where
    the folder holds no evaluation to draw."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            'drawing a curve needs matplotlib; install it with: pip install "agentrl-framework[plot]"'
        ) from error
    data = read_curve(run_dir)
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": _FAINT, "text.color": _INK}):
        figure = Figure(figsize=(7.2, 4.0), dpi=200, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, data)
        axes.set_title(f"{run_dir.resolve().name}: success on held-out tasks", loc="left", fontsize=12, pad=12)
        out_png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png)
    return out_png


def read_curve(run_dir: Path) -> Curve:
    """The curve of a run folder. RL stages follow one another on the x axis; supervised stages end at its 0."""
    try:
        records = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["eval"]
        lines = read_metrics(run_dir / "metrics.jsonl")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{run_dir} is no finished run: it has no {Path(error.filename).name}") from error
    except (ValueError, KeyError) as error:
        raise UsageError(f"summary.json or metrics.jsonl of {run_dir} cannot be read: {error}") from error
    records = [record for record in records if record["success"] is not None]
    if not records:
        raise UsageError(f"{run_dir} has no evaluation to draw; set eval: in its configuration")
    reward = [(float(line["step"]), line["reward"]) for line in lines if _is_number(line.get("reward"))]
    return Curve(_points(records), _unwrapped(reward), 0.0 if any(r["stage"] == "sft" for r in records) else None)


def _points(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float, float]]]:
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for decode in dict.fromkeys(record["decode"] for record in records):
        mine = [record for record in records if record["decode"] == decode]
        steps = [(0.0 if record["stage"] == "sft" else float(record["step"]), record) for record in mine]
        for (_, record), (x, _) in zip(steps, _unwrapped(steps), strict=True):
            low, high = record["ci95"]
            found.setdefault(decode, []).append((x, record["success"], low, high))
    return found


def _unwrapped(points: Sequence[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Steps that begin anew with each stage, counted on instead."""
    out: list[tuple[float, Any]] = []
    offset, last = 0.0, 0.0
    for x, value in points:
        if x < last:
            offset += last
        out.append((offset + x, value))
        last = x
    return out


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value


def draw(axes: Axes, data: Curve) -> None:
    """Draw `data` into `axes`."""
    if data.reward and all(0 <= value <= 1 for _, value in data.reward):  # other rewards have no place on this axis
        axes.plot(*zip(*data.reward, strict=True), color=_FAINT, linewidth=0.9, label="training reward", zorder=1)
    heights = _apart({decode: points[-1][1] for decode, points in data.points.items()})
    for decode in sorted(data.points, reverse=True):
        x, y, low, high = (list(column) for column in zip(*data.points[decode], strict=True))
        colour = _COLOURS.get(decode, _INK)
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
        axes.plot(x, y, color=colour, linewidth=2.2, marker="o", markersize=4.5, label=decode, zorder=3)
        axes.annotate(
            f"{100 * y[-1]:.1f} %",
            (x[-1], heights[decode]),
            (9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
    if data.warm is not None:
        axes.axvline(data.warm, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            "after warm start", (data.warm, 1.0), (6, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", color=_FAINT, fontsize=9,
        )  # fmt: skip
    axes.set_ylim(-0.02, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.margins(x=0.04)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("reinforcement-learning steps", color=_INK)
    axes.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.legend(loc="lower right", frameon=False)


def _apart(heights: Mapping[str, float], gap: float = 0.06) -> dict[str, float]:
    """The heights of labels, moved down where two would overlap, then all up where that left the picture."""
    placed: dict[str, float] = {}
    edge = 2.0
    for name, height in sorted(heights.items(), key=lambda item: -item[1]):
        placed[name] = edge = min(height, edge - gap)
    lift = max(0.0, -edge)
    return {name: height + lift for name, height in placed.items()}
