"""What goes out: JSON that any text survives, errors as one sentence, and the files of the front end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, JSONResponse, Response

_TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".woff2": "font/woff2",
    ".json": "application/json", ".webmanifest": "application/manifest+json", ".txt": "text/plain; charset=utf-8",
}  # fmt: skip


class Json(JSONResponse):
    """JSON in ASCII, so that lone surrogates pass; numbers that JSON lacks become null."""

    def render(self, content: Any) -> bytes:
        try:
            return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
        except ValueError:
            return json.dumps(_finite(content), allow_nan=False, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


class Files:
    """The built front end: what stands in the folder is listed, and only what is listed is served."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Path] = {}

    def get(self, path: str) -> Response:
        name = "/index.html" if path == "/" else path
        found = self._known.get(name)
        if found is None or not found.exists():
            files = self._folder.rglob("*") if self._folder.is_dir() else ()
            self._known = {f"/{file.relative_to(self._folder).as_posix()}": file for file in files if file.is_file()}
            found = self._known.get(name)
        if found is None:
            if path == "/":
                return refusal(404, "the pages are not built: run npm ci && npm run build in agentrl/viewer/web")
            return refusal(404, "there is nothing here")
        kind = _TYPES.get(found.suffix, "application/octet-stream")
        hashed = path.startswith("/assets/")
        return FileResponse(
            found, media_type=kind, headers={"cache-control": "max-age=31536000, immutable" if hashed else "no-cache"}
        )
