"""Which server a session goes to."""

from __future__ import annotations

from agentrl.engines.routes import LEAST_LOADED_BY, Routes


def test_a_session_stays_and_siblings_stay_together() -> None:
    routes = Routes(["a", "b", "c"])
    home = routes.find("g/0", "g")
    routes.running[home] += 3
    assert all(routes.find(f"g/{n}", "g") == home for n in range(4))
    other = routes.find("h/0", "h")
    assert other != home, "a new group goes where least runs"
    routes.fork("h/0", "h/0.1")
    assert routes.server_of("h/0.1") == other


def test_a_group_spills_over_and_its_sessions_stay() -> None:
    routes = Routes(["a", "b"])
    home = routes.find("g/0", "g")
    routes.running[home] = LEAST_LOADED_BY + 1
    assert routes.find("g/0", "g") == home
    assert routes.find("g/1", "g") != home


def test_groups_spread_over_the_servers() -> None:
    routes = Routes(["a", "b"])
    for group in "wxyz":
        for n in range(4):
            routes.running[routes.find(f"{group}{n}", group)] += 1
    assert routes.running == {"a": 8, "b": 8}
    homes = {group: {routes.server_of(f"{group}{n}") for n in range(4)} for group in "wxyz"}
    assert all(len(servers) == 1 for servers in homes.values())


def test_a_lost_server_is_left_and_not_gone_back_to_in_the_middle() -> None:
    routes = Routes(["a", "b"])
    home = routes.find("g/0", "g")
    routes.down[home] = "gone"
    (other,) = routes.up
    assert routes.find("g/0", "g") == other and routes.find("g/1", "g") == other
    del routes.down[home]
    assert routes.find("g/0", "g") == other, "what is cached of it is there"
    assert routes.find("g/2", "g") == other, "and its siblings follow"


def test_memory_is_that_of_open_sessions() -> None:
    routes = Routes(["a", "b"])
    for n in range(1000):
        routes.find(f"g{n}/0", f"g{n}")
        routes.fork(f"g{n}/0", f"g{n}/0.1")
        routes.release(f"g{n}/0")
        routes.release(f"g{n}/0.1")
        routes.release(f"g{n}/0")
    routes.release("never seen")
    routes.fork("never seen", "nobody")
    assert routes.sessions == 0
    assert not (routes._group_homes or routes._members or routes._group_of)
