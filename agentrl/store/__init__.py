"""The trajectory store: a crash loses nothing acknowledged, and a list of 100 000 opens at once.

A SQLite index over append-only segments of frames. `StoreWriter` appends, `StoreReader` lists and
loads, `rebuild` makes the index again from the segments, `RunFolder` is the folder around them. Where several
processes write, a `Collector` makes the index of what they append.
"""

from agentrl.store.canonical import canonical, canonical_trajectory, differences, fingerprint
from agentrl.store.codec import TokensNotKept
from agentrl.store.collector import Collector
from agentrl.store.credit import Credit
from agentrl.store.entries import Cursor, Entry, Page, Sibling
from agentrl.store.export import as_json, export_jsonl
from agentrl.store.frames import DamagedFrame
from agentrl.store.journal import Flight
from agentrl.store.key import EpisodeKey
from agentrl.store.query import SORTS, Filter, Sort
from agentrl.store.reader import StoreReader
from agentrl.store.rebuild import rebuild
from agentrl.store.run import RunFolder, RunInfo
from agentrl.store.runs import Run, runs
from agentrl.store.tokens import Tokens
from agentrl.store.writer import StoreWriter

__all__ = [
    "SORTS",
    "Collector",
    "Credit",
    "Cursor",
    "DamagedFrame",
    "Entry",
    "EpisodeKey",
    "Filter",
    "Flight",
    "Page",
    "Run",
    "RunFolder",
    "RunInfo",
    "Sibling",
    "Sort",
    "StoreReader",
    "StoreWriter",
    "Tokens",
    "TokensNotKept",
    "as_json",
    "canonical",
    "canonical_trajectory",
    "differences",
    "export_jsonl",
    "fingerprint",
    "rebuild",
    "runs",
]
