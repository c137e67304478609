"""Python in the episode's sandbox: variables, imports and files stay from call to call."""

from __future__ import annotations

from agentrl.content import Content
from agentrl.tool import Toolkit, tool
from agentrl.tools.box import TOOL_SECONDS, Box, told


class Python(Toolkit):
    """The tool `python`: one unit of cost a call and a tenth more for every second."""

    def __init__(self, box: Box) -> None:
        self.box = box

    @tool(cost=1.0, cost_per_second=0.1, timeout=TOOL_SECONDS)
    async def python(self, code: str) -> Content:
        """Run Python code. Variables are kept between calls; the value of the last line is shown.

        Args:
            code: the program.
        """
        result = await self.box.run(lambda sandbox: sandbox.exec(code))
        text = told(result, self.box.options.limits)
        return (text, *result.images) if result.images else text
