"""Trajectories as one HTML file: no script, no server, nothing loaded from anywhere; all content is escaped text."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from agentrl.content import Image

_STYLE = """
:root{color-scheme:light dark;--line:#8886;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;background:var(--soft);padding:.6rem;
margin:.3rem 0;border-radius:.3rem;font:13px/1.45 ui-monospace,monospace}
article{border-top:2px solid var(--line);padding:1rem 0}
section{border-left:3px solid var(--line);padding-left:.8rem;margin:.8rem 0}
h2,h3{font-size:1rem;margin:.4rem 0;unicode-bidi:plaintext;overflow-wrap:anywhere}small,dt{opacity:.75}dd{margin:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1rem}img{max-width:100%}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_FACTS = (
    "stage", "step", "split", "task", "group", "source", "outcome", "reward", "success", "score", "credit",
)  # fmt: skip
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def text(value: object) -> str:
    """Any value as escaped text; control characters get their pictures, lone surrogates the replacement mark."""
    plain = str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    plain = _CONTROLS.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] != "\x7f" else "\u2421", plain)
    return html.escape(plain, quote=True)


def page(records: Iterable[Mapping[str, Any]], image: Callable[[str], Image | None], title: str) -> Iterator[str]:
    """The file in pieces. `records` are lines of the JSON export; `image(sha256)` gives a picture, or None."""
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{text(title)}</h1>\n"
    )
    for record in records:
        yield "".join(_article(record, image))
    yield "</body></html>\n"


def _article(record: Mapping[str, Any], image: Callable[[str], Image | None]) -> Iterator[str]:
    facts = {
        name: record.get(name) for name in ("stage", "step", "split", "task", "group", "source", "outcome", "reward")
    }
    facts |= {"success": record.get("success"), "score": record.get("score"), "credit": record.get("credit")}
    yield f"<article><h2>{text(record['id'])}</h2><dl>"
    for name, value in facts.items():
        if value not in (None, {}, []):
            yield f"<dt>{text(name)}</dt><dd>{text(_short(value))}</dd>"
    yield "</dl>"
    if record.get("prompt"):
        yield f"<details><summary>prompt</summary><pre>{text(record['prompt'])}</pre></details>"
    for index, turn in enumerate(record["turns"]):
        yield f"<section><h3>turn {index} <small>{text(turn['actor'])}, {turn['seconds']:.2f} s</small></h3>"
        yield f"<pre>{text(turn['text'])}</pre>"
        for call in turn["calls"]:
            note = f"{call['seconds']:.3f} s, cost {call['cost']:g}" + (f", {call['error']}" if call["error"] else "")
            arguments = text(json.dumps(call["arguments"], ensure_ascii=False, default=str))
            yield f"<details open><summary>{text(call['name'])} <small>{text(note)}</small></summary>"
            yield f"<pre>{arguments}</pre><pre>{text(call['result'])}</pre>"
            for sha in call["images"]:
                yield _picture(image(sha), sha)
            yield "</details>"
        if turn["observation"] and not turn["calls"]:
            yield f"<pre>{text(turn['observation'])}</pre>"
        for name in ("error", "reward"):
            if turn[name] is not None:
                yield f"<p>{name}: {text(turn[name])}</p>"
        yield "</section>"
    yield "</article>\n"


def _picture(image: Image | None, sha: str) -> str:
    if image is None or image.mime not in ("image/png", "image/jpeg", "image/webp"):
        return f"<p>[image {text(sha[:8])}{' is missing' if image is None else ''}]</p>"
    return f'<img alt="{text(image.alt)}" src="data:{image.mime};base64,{base64.b64encode(image.data).decode()}">'


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
