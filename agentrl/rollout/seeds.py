"""Random streams keyed by what they are for, never by when they are used."""

from __future__ import annotations

import hashlib


def seed_of(*keys: str | int) -> int:
    """A 63-bit seed for the stream named by `keys` (run, step, task, sample, branch, turn, …)."""
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
