"""Where agentrl keeps what it makes once for all projects: images' parts, servers' environments."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """The cache folder: $AGENTRL_CACHE, else ~/.cache/agentrl. Root's is /var/cache/agentrl: sandboxes that root starts
    have another uid, which cannot look into root's home."""
    own = Path("/var/cache/agentrl") if os.geteuid() == 0 else Path.home() / ".cache" / "agentrl"
    return Path(os.environ.get("AGENTRL_CACHE") or own)
