"""Every key of the `?` sheet does something on its page: the sheet is read, and each key is pressed.

A page is opened anew for each key, in a state in which the key has something to do; then anything that a person would
see or hear of must change: the address, the page, what is scrolled, focused or pressed, or a dialog.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
Open = Callable[..., Any]

SIBLING = "rl-12/orders-0317/0"
MIDDLE = "rl-12/orders-0317/3"
GROUP = "rl-12/orders-0317"
STATE = """() => [location.hash, document.title, document.documentElement.dataset.theme,
  document.querySelector('main')?.innerHTML, Boolean(document.querySelector('dialog[open]')),
  document.activeElement?.outerHTML.slice(0, 300), history.length,
  [...document.querySelectorAll('input, select, details')].map(n => [n.value, n.checked, n.open]).join(),
  [...document.querySelectorAll('main, main *')].map(n => Math.round(n.scrollTop) + Math.round(n.scrollLeft))
    .filter(Boolean).join(), Math.round(scrollY), getSelection()?.toString()].join('\\u0001')"""


def at(run: str, page: str, **query: Any) -> str:
    asked = "&".join(f"{name}={quote(str(value))}" for name, value in query.items())
    return f"/r/{run}{'/' + page if page else ''}{'?' + asked if asked else ''}"


# The page, and what has to be pressed before a key so that it has something to do.
PAGES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "runs": ("/", {"k": ["j"], "ArrowUp": ["j"], "c": ["x", "j", "x"]}),
    "compare": ("/compare?runs=arpo,grpo", {}),
    "run": (at("grpo", ""), {"S": ["s"]}),
    "rollouts": (
        at("desk", "rollouts", step=1, sort="added"),
        {
            "k": ["j", "j"], "ArrowUp": ["j", "j"], "n": ["j", "j"], "PageUp": ["End"], "Home": ["End"], "d": ["x", "j", "x"],
        },
    ),
    "trajectory": (at("desk", "t", id=MIDDLE, turn=1), {}),
    "tokens": (
        at("desk", "t", id=SIBLING, view="tokens", turn=1, token=3, m="advantage"),
        {"4": ["1"], "p": ["n", "n"]},
    ),
    "screens": (at("desk", "t", id="rl-12/inbox-0004/0", view="screens", screen=1), {}),
    "group": (
        at("desk", "group", id=GROUP, step=12),
        {"h": ["l"], "ArrowLeft": ["l"], "d": ["x", "l", "x"]},
    ),
    "tree": (at("desk", "tree", id=GROUP), {"k": ["j"], "ArrowUp": ["j"], "d": ["j"]}),
    "diff": (
        at("desk", "diff", a=SIBLING, b="rl-12/orders-0317/3"),
        {"p": ["n", "n"], "k": ["n", "n"]},
    ),
    "choice": (at("desk", "diff", a=SIBLING, task="orders-0317"), {"k": ["j"], "ArrowUp": ["j"]}),
    "live": (at("desk", "live"), {"k": ["j"], "ArrowUp": ["j"]}),
}  # fmt: skip
# Keys that are bound everywhere: pressed on one page without a run, one with, and one deep within.
EVERYWHERE = {"?", "g h", "g o", "g r", "g l", "D", "Backspace"}
FULL = {"runs", "run", "trajectory"}
# Keys that have nothing to do on a page, and why.
IDLE: dict[tuple[str, str], str] = {
    ("runs", "g o"): "no run", ("runs", "g r"): "no run", ("runs", "g l"): "no run", ("runs", "g h"): "is there",
    ("run", "g o"): "is there",
    ("trajectory", "i"): "no screens", ("tokens", "i"): "no screens",
    ("trajectory", "a"): "one attempt", ("tokens", "a"): "one attempt", ("screens", "a"): "one attempt",
    ("screens", "ArrowRight"): "no siblings", ("screens", "ArrowLeft"): "no siblings",
    ("tokens", "ArrowLeft"): "the first sibling",
    ("tokens", "j"): "turns are not shown", ("tokens", "ArrowDown"): "turns are not shown",
    ("tokens", "k"): "turns are not shown", ("tokens", "ArrowUp"): "turns are not shown",
    ("tokens", "w"): "thinking is not shown", ("screens", "w"): "thinking is not shown",
    ("screens", "j"): "turns are not shown", ("screens", "ArrowDown"): "turns are not shown",
    ("screens", "k"): "turns are not shown", ("screens", "ArrowUp"): "turns are not shown",
    ("screens", "s"): "no panel",
    ("choice", "n"): "nothing is compared yet", ("choice", "p"): "nothing is compared yet",
    ("choice", "f"): "nothing is compared yet", ("choice", "x"): "nothing is compared yet",
    ("choice", "c"): "already choosing",
}  # fmt: skip


def settled(page: Any) -> None:
    """Wait until nothing on the page changes by itself."""
    before, now = "", page.evaluate(STATE)
    while before != now or page.evaluate("Boolean(document.querySelector('main .state[role=status]'))"):
        page.wait_for_timeout(90)
        before, now = now, page.evaluate(STATE)


def press(page: Any, keys: str) -> None:
    for key in keys.split(" "):
        page.keyboard.press(key)
        page.wait_for_timeout(40)


@pytest.mark.parametrize("name", list(PAGES))
def test_each_key_of_the_sheet_does_something(see: Open, name: str) -> None:
    hash, before = PAGES[name]
    page = see("/compare")  # so that there is somewhere to go back to
    address = page.url.split("#")[0]

    count = iter(range(10_000))

    def open_anew() -> None:
        page.evaluate("document.querySelector('dialog[open]')?.close()")
        page.goto(f"{address}#/compare?x={next(count)}")
        page.goto(f"{address}#{hash}")
        while name != "compare" and page.title().startswith("Compare"):
            page.wait_for_timeout(20)
        page.wait_for_selector("main :is(h1, h2)", state="attached")
        settled(page)

    open_anew()
    page.keyboard.press("?")
    sheet = page.get_by_role("dialog").locator("[data-keys]").evaluate_all("all => all.map(n => n.dataset.keys)")
    page.keyboard.press("Escape")
    assert len(sheet) >= 7
    idle, taken = [], set()
    for keys in [key for entry in sheet for key in entry.split(" / ")]:
        if keys in taken:
            continue  # the page's own meaning stands above, and wins
        taken.add(keys)
        if keys in EVERYWHERE and name not in FULL:
            continue
        open_anew()
        for first in before.get(keys, []):
            press(page, first)
        if keys in before:
            settled(page)
        was = page.evaluate(STATE)
        press(page, keys)
        for _ in range(30):  # the policy of the page forbids that it is asked to wait for an expression
            if page.evaluate(STATE) != was:
                break
            page.wait_for_timeout(40)
        else:
            idle.append(keys)
    expected = {keys for where, keys in IDLE if where == name}
    assert taken >= EVERYWHERE
    assert set(idle) == expected & taken and expected <= taken
