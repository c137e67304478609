"""Toolkits that share a toolkit: spawned, forked, reset, set up and closed once, and never across episodes."""

from __future__ import annotations

import asyncio
from typing import Any

from agentrl import Env, tool
from agentrl.tool import Toolkit


class Drawer(Toolkit):
    """Something that two toolkits hold together."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.held: list[str] = []

    async def setup(self) -> None:
        self.log.append("setup")

    def reset(self, rng: Any) -> None:
        self.held = []

    async def close(self) -> None:
        self.log.append("close")


class Put(Toolkit):
    def __init__(self, drawer: Drawer) -> None:
        self.drawer = drawer

    @tool
    def put(self, thing: str) -> str:
        """Put a thing into the drawer."""
        self.drawer.held.append(thing)
        return "done"


class Look(Toolkit):
    def __init__(self, drawer: Drawer) -> None:
        self.drawer = drawer

    @tool
    def look(self) -> str:
        """Look into the drawer."""
        return ",".join(self.drawer.held)


class Desk(Env):
    def __init__(self) -> None:
        super().__init__()
        self.drawer = Drawer()
        self.tools = (Put(self.drawer), Look(self.drawer))


def drawers(env: Any) -> set[int]:
    return {id(env.drawer), id(env.tools[0].drawer), id(env.tools[1].drawer)}


def test_a_shared_toolkit_is_one_object_in_each_episode_and_another_in_the_next() -> None:
    desk = Desk()
    one, two = desk.spawn(), desk.spawn()
    assert len(drawers(one)) == len(drawers(two)) == len(drawers(desk)) == 1
    assert len(drawers(one) | drawers(two) | drawers(desk)) == 3


def test_it_is_found_though_the_environment_lists_only_its_holders() -> None:
    desk = Desk()
    assert [type(kit).__name__ for kit in desk.kits] == ["Put", "Look", "Drawer"]
    assert list(desk.toolbox()) == ["put", "look"]


def test_a_fork_copies_it_once_and_parts_with_its_origin() -> None:
    one = Desk().spawn()
    one.drawer.reset(None)
    one.tools[0].put("pen")
    two = one.fork()
    assert len(drawers(two)) == 1 and drawers(one).isdisjoint(drawers(two))
    two.tools[0].put("cup")
    assert (one.tools[1].look(), two.tools[1].look()) == ("pen", "pen,cup")


def test_it_is_set_up_and_closed_once() -> None:
    desk = Desk()

    async def life() -> None:
        await desk.prepare()
        await desk.prepare()
        await desk.retire()

    asyncio.run(life())
    assert desk.drawer.log == ["setup", "close"]
