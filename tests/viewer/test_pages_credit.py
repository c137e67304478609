"""What the token view claims of a token, in the browser: whether its credit was checked, and whether it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from agentrl.store import StoreReader

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def base(runs: Path, serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run as it is, and as it were with an estimator of its own."""
    out = tmp_path_factory.mktemp("credit")
    for name in ("as-it-is", "own-code"):
        shutil.copytree(runs / "grpo", out / name)
    config = out / "own-code/config.resolved.yaml"
    text = config.read_text()
    assert text.count("type: grpo\n") == 1
    config.write_text(text.replace("type: grpo\n", "type: mine\n"))
    with serving(out) as address:
        yield address


def token(run: str, id: str, **query: Any) -> str:
    asked = "".join(f"&{name}={quote(str(value))}" for name, value in query.items())
    return f"/r/{run}/t?id={quote(id, safe='')}&view=tokens{asked}"


@pytest.fixture(scope="module")
def ids(runs: Path) -> tuple[str, str]:
    """(an episode that was trained on, one of the evaluation)."""
    with StoreReader(runs / "grpo") as reader:
        credit = next(c for c in reader.credits(stage="rl") if c.advantages is not None and c.advantages[0].size)
        entry = reader.trajectories(split="test", limit=1).entries[0]
    return credit.id, entry.id


def test_credit_is_called_right_only_where_it_was_made_again(see: Open, ids: tuple[str, str]) -> None:
    for run, said in (("as-it-is", "✓ Made again from the record"), ("own-code", "As recorded, not checked")):
        page = see(token(run, ids[0], turn=0, token=0))
        page.locator("p.adds").wait_for()
        text = page.locator("p.adds").inner_text()
        assert said in text and ("✓" in text) == (run == "as-it-is")
    assert "the estimator 'mine' is not the framework's" in text


def test_tokens_are_called_trained_only_where_that_was_recorded(see: Open, ids: tuple[str, str]) -> None:
    trained, evaluated = ids
    for id, label, other in ((trained, "trained", "sampled"), (evaluated, "sampled", "trained")):
        page = see(token("as-it-is", id))
        page.locator(".tk").first.wait_for()
        page.keyboard.press("7")
        scale = page.get_by_role("radiogroup", name="Colour the tokens by")
        scale.get_by_role("radio", name=label, exact=False, checked=True).wait_for()
        assert scale.get_by_role("radio", name=other, exact=False).count() == 0
        legend = page.locator(".legend").inner_text()
        assert f"not {label}" in legend and other not in legend
