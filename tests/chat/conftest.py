"""Lets the chat tests import their shared modules (chat_cases, chat_dialects): importlib mode adds no path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
