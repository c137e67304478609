"""Which server a session goes to: its own, else its group's, else the least busy of those that are up.

An episode stays with one server, and a group's episodes with the same one, so that what it has computed of their shared
beginning is used again. A session whose server was lost finds another, and a group with much more to do than its
neighbours' spills over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

S = TypeVar("S")
LEAST_LOADED_BY = 8  # requests more than on another server, at which a new session goes there


class Routes(Generic[S]):
    """Sessions on their way to servers. Its memory is that of the open sessions."""

    def __init__(self, servers: Sequence[S]) -> None:
        self.servers = tuple(servers)
        self.down: dict[S, str] = {}  # and why
        self.running: dict[S, int] = dict.fromkeys(self.servers, 0)
        self._homes: dict[str, S] = {}
        self._group_homes: dict[str, S] = {}
        self._members: dict[str, int] = {}  # how many sessions a group has open
        self._group_of: dict[str, str] = {}

    @property
    def up(self) -> list[S]:
        """The servers that serve now."""
        return [server for server in self.servers if server not in self.down]

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._homes)

    def server_of(self, session: str) -> S | None:
        """Where an open session is at home."""
        return self._homes.get(session)

    def find(self, session: str, group: str) -> S:
        """The server for a session's next request. One must be up."""
        home = self._homes.get(session)
        if home is None or home in self.down:
            home = self._choose(group)
            self._settle(session, group, home)
        return home

    def fork(self, parent: str, child: str) -> None:
        """The branch goes where its trunk is cached."""
        if parent in self._homes:
            self._settle(child, self._group_of.get(parent, ""), self._homes[parent])

    def release(self, session: str) -> None:
        """The session is over; unknown ones are ignored."""
        self._homes.pop(session, None)
        group = self._group_of.pop(session, None)
        if group is not None:
            self._members[group] -= 1
            if not self._members[group]:
                del self._members[group]
                self._group_homes.pop(group, None)

    def _choose(self, group: str) -> S:
        up = self.up
        least = min(up, key=lambda server: self.running[server])
        home = self._group_homes.get(group, least)
        return least if home in self.down or self.running[home] > self.running[least] + LEAST_LOADED_BY else home

    def _settle(self, session: str, group: str, home: S) -> None:
        self._homes[session] = home
        if not group:
            return
        if session not in self._group_of:
            self._group_of[session] = group
            self._members[group] = self._members.get(group, 0) + 1
        if self._group_homes.get(group, home) in self.down:
            del self._group_homes[group]
        self._group_homes.setdefault(group, home)
