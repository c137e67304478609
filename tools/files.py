"""Files of the episode's workspace: read, write, edit, list. Paths never leave it."""

from __future__ import annotations

from agentrl.errors import ToolError
from agentrl.tool import Toolkit, tool
from agentrl.tools.box import TOOL_SECONDS, Box

MOST_BYTES = 100_000


class Files(Toolkit):
    """The tools `read_file`, `write_file`, `edit_file` and `list_files`."""

    def __init__(self, box: Box) -> None:
        self.box = box

    @tool(cost=0.2, timeout=TOOL_SECONDS)
    async def read_file(self, path: str) -> str:
        """Read a text file.

        Args:
            path: relative to the workspace.
        """
        return await self._text(path)

    @tool(cost=0.2, timeout=TOOL_SECONDS)
    async def write_file(self, path: str, text: str) -> str:
        """Create or replace a text file, with its folders.

        Args:
            path: relative to the workspace.
            text: the whole new content.
        """
        data = text.encode("utf-8", "replace")
        await self.box.use(lambda sandbox: sandbox.write(path, data))
        return f"wrote {len(data)} bytes to {path}"

    @tool(cost=0.2, timeout=TOOL_SECONDS)
    async def edit_file(self, path: str, old: str, new: str) -> str:
        """Replace a text that stands exactly once in a file.

        Args:
            path: relative to the workspace.
            old: the text to replace.
            new: what stands there afterwards.
        """
        text = await self._text(path)
        count = text.count(old) if old else 0
        if count != 1:
            raise ToolError(f"{path}: the text to replace stands there {count} times, not once; quote more around it")
        data = text.replace(old, new).encode("utf-8", "replace")
        await self.box.use(lambda sandbox: sandbox.write(path, data))
        return f"edited {path}"

    @tool(cost=0.2, timeout=TOOL_SECONDS)
    async def list_files(self) -> str:
        """List the files of the workspace with their sizes in bytes."""
        found = await self.box.use(lambda sandbox: sandbox.files())
        return "\n".join(f"{size:>8} {path}" for path, size in sorted(found.items())) or "[no files]"

    async def _text(self, path: str) -> str:
        data = await self.box.use(lambda sandbox: sandbox.read(path, MOST_BYTES))
        if b"\0" in data:
            raise ToolError(f"{path}: not a text file ({len(data)} bytes)")
        return data.decode("utf-8", "replace")
