"""Who asks: the user that owns the other end of a connection on this machine.

127.0.0.1 is open to every user of the machine, so that without a token an address says nothing about who asks. Linux
does: it tells the owner of each socket, and on loopback the other end is one of them. It is asked for that one socket
(sock_diag(7), some microseconds); where it does not answer, /proc/net/tcp is read, which lists all of them. Our own
user may come in, and root, who may do all this anyway and whose forwarders bring others in from outside.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_SOCK_DIAG, _BY_FAMILY, _ANY = 4, 20, 0xFFFFFFFF  # NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY
_LISTENING = 10  # a server's socket, which the kernel offers where there is no connection
_REMEMBERED = 4096  # connections
Address = tuple[str, int]


class Peers:
    """Answers for each connection whether its other end is ours. `tables` are the system's lists of sockets."""

    def __init__(self, tables: tuple[Path, ...] = TABLES) -> None:
        self._tables = tables
        self._ours = frozenset((0, os.geteuid())) if hasattr(os, "geteuid") else frozenset[int]()
        self._known: dict[Address, Address] = {}

    def ours(self, client: Address, server: Address) -> bool:
        """Whether root or we own the socket at `client` that talks to `server`; True where the system does not tell.

        A socket that is gone, or that its owner has closed, belongs to nobody, and nobody comes in.
        """
        if self._known.get(client) is client:  # the server makes one such pair a connection: it is still that one
            return True
        if not self._tables[0].exists():
            return True
        # A list of thousands is read in pieces, between which a socket may move: the second look finds it.
        found = owner_asked(client, server) if self._tables is TABLES else None
        for _ in range(2):
            found = owner(client, server, self._tables) if found is None else found
        if found not in self._ours:
            return False
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[client] = client
        return True


def owner(client: Address, server: Address, tables: tuple[Path, ...] = TABLES) -> int | None:
    """The user id that owns the socket at `client` whose other end is `server`, None where there is none.

    A socket of IPv6 may talk to one of IPv4: it is listed with both addresses mapped.
    """
    wanted = [f" {a} {b} ".encode() for a, b in zip(_spelt(client), _spelt(server), strict=True)]
    for table in tables:
        try:
            lines = table.read_bytes()
        except OSError:
            continue
        for pair in wanted:
            at = lines.find(pair)
            if at >= 0:
                _, _, _, _, uid, _, inode, *_ = lines[at + len(pair) : at + len(pair) + 200].split()
                return int(uid) if inode != b"0" else None  # one without an inode says 0 for its user
    return None


def owner_asked(client: Address, server: Address) -> int | None:
    """`owner`, asked of the kernel; None where it knows no such socket, or does not answer at all."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as line:
            line.settimeout(1.0)
            for family, ends in ((socket.AF_INET, 0), (socket.AF_INET6, 1)):
                a, b = (list(_forms(address))[ends] for address in (client, server))
                if len(a) != (4 if family == socket.AF_INET else 16):
                    continue
                pair = struct.pack(">HH16s16s", client[1], server[1], a, b) + struct.pack("=III", 0, _ANY, _ANY)
                asked = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ANY) + pair
                line.send(struct.pack("=IHHII", 16 + len(asked), _BY_FAMILY, 1, 0, 0) + asked)
                answer = line.recv(4096)
                if struct.unpack_from("=IH", answer)[1] == _BY_FAMILY:
                    state, uid, inode = struct.unpack_from("=xB62xII", answer, 16)
                    return int(uid) if inode and state != _LISTENING else None
    except (OSError, AttributeError, struct.error):
        return None
    return None


def is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _spelt(address: Address) -> Iterator[str]:
    """How the tables write an address: of IPv4 and as mapped into IPv6, or of IPv6 twice."""
    for form in _forms(address):
        words = [form[i : i + 4] for i in range(0, len(form), 4)]
        yield "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{address[1]:04X}"


def _forms(address: Address) -> Iterator[bytes]:
    host = ip_address(address[0])
    if isinstance(host, IPv6Address):
        host = host.ipv4_mapped or host
    yield host.packed
    yield b"\0" * 10 + b"\xff\xff" + host.packed if isinstance(host, IPv4Address) else host.packed
