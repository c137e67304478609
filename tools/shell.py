"""Shell commands in the episode's sandbox."""

from __future__ import annotations

from agentrl.tool import Toolkit, tool
from agentrl.tools.box import TOOL_SECONDS, Box, told


class Shell(Toolkit):
    """The tool `shell`: one unit of cost a call and a tenth more for every second."""

    def __init__(self, box: Box) -> None:
        self.box = box

    @tool(cost=1.0, cost_per_second=0.1, timeout=TOOL_SECONDS)
    async def shell(self, command: str) -> str:
        """Run a shell command in the workspace. Each command starts anew there; files are kept.

        Args:
            command: what `sh -c` runs.
        """
        return told(await self.box.run(lambda sandbox: sandbox.shell(command)), self.box.options.limits)
