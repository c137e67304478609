"""Runs *inside* a sandbox, in its Python session: an IPython kernel, spoken to over unix sockets (zmq `ipc`).

`Kernel.run` executes one cell there. What it prints goes to this session's stdout and stderr, so the server's limits
hold for it; its result and error come back as JSON, its pictures as files that the host fetches. An interrupt is an OS
signal to the kernel: the protocol's own interrupt request waits in a queue behind the very program that it is to stop.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

PICTURES = Path(".agentrl-pictures")
MOST_PICTURES = 8
MIMES = {"image/png": "png", "image/jpeg": "jpg"}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Kernel:
    """One IPython kernel and its client."""

    def __init__(self, tmp: str) -> None:
        # What Jupyter writes for itself stays out of the workspace.
        home = Path(tmp, ".agentrl-jupyter")
        home.mkdir(exist_ok=True)
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            os.environ[name] = str(home / name.lower())
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(transport="ipc", ip=str(home / "k"))
        self.manager.start_kernel(extra_arguments=["--HistoryManager.enabled=False"])
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=20)

    def run(self, code: str, longest: int) -> str:
        """Execute a cell; {"value", "error", "pictures"} as JSON, texts cut to `longest` characters."""
        shutil.rmtree(PICTURES, ignore_errors=True)
        out: dict[str, Any] = {"value": None, "error": None, "pictures": []}
        asked = self.client.execute(code, allow_stdin=False)
        try:
            self._listen(asked, out, longest)
        except KeyboardInterrupt:
            os.kill(self.manager.provisioner.pid, 2)
            self._listen(asked, out, longest)  # a kernel that does not mind is killed with this session
        return json.dumps(out)

    def _listen(self, asked: str, out: dict[str, Any], longest: int) -> None:
        """Take messages until the cell is over."""
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except Exception as nothing:
                if type(nothing).__name__ != "Empty":
                    raise
                if not self.manager.provisioner.has_process or self.manager.provisioner.process.poll() is not None:
                    out["error"] = "the kernel ended"
                    os._exit(1)  # the session is lost, and the server says so
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                stream = sys.stderr if content["name"] == "stderr" else sys.stdout
                stream.write(content["text"])
                stream.flush()
            elif kind in ("execute_result", "display_data"):
                self._show(content["data"], kind, out, longest)
            elif kind == "error":
                out["error"] = _cut(COLOURS.sub("", "\n".join(content["traceback"])), longest)
            elif kind == "status" and content["execution_state"] == "idle":
                return

    def _show(self, data: dict[str, str], kind: str, out: dict[str, Any], longest: int) -> None:
        picture = next((mime for mime in MIMES if mime in data), None)
        if picture is not None and len(out["pictures"]) < MOST_PICTURES:
            PICTURES.mkdir(exist_ok=True)
            path = PICTURES / f"{len(out['pictures'])}.{MIMES[picture]}"
            path.write_bytes(base64.b64decode(data[picture]))
            out["pictures"].append({"path": str(path), "mime": picture})
        elif kind == "execute_result":
            out["value"] = _cut(data.get("text/plain", ""), longest)
        else:
            sys.stdout.write(data.get("text/plain", "") + "\n")


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}\n… {len(text) - longest} characters left out …\n{text[-(longest // 2) :]}"


def ready(tmp: str) -> str:
    """Start the kernel; how long it took in seconds."""
    begun = time.perf_counter()
    globals()["kernel"] = Kernel(tmp)
    return f"{time.perf_counter() - begun:.2f}"
