"""Tools: the schema from signature and docstring, validation before the call, and what is refused early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

import agentrl
from agentrl import Env, ToolError, Toolkit, tool
from agentrl.errors import UsageError
from agentrl.tool import tools_of


class Point(BaseModel):
    """Somewhere."""

    title: str = "origin"
    x: float = 0.0


class Kit(Toolkit):
    @tool
    def find(
        self,
        query: str,
        schema: Literal["table", "list"] = "list",
        copy: int | None = None,
        where: Point | None = None,
        _limit: Annotated[int, Field(ge=1, le=5)] = 3,
    ) -> str:
        """Find things.

        Slowly.

        Args:
            query: what to find: words,
                several of them.
            copy (int): how many.

        Returns:
            query: not an argument.
        """
        return repr((query, schema, copy, where, _limit))

    @tool(name="other.name")
    async def renamed(self) -> str:
        return ""


def test_the_schema_comes_from_signature_and_docstring() -> None:
    find = tools_of(Kit)["find"]
    function = find.schema["function"]
    assert function["description"] == "Find things.\n\nSlowly."
    parameters = function["parameters"]
    assert parameters["required"] == ["query"]
    assert list(parameters["properties"]) == ["query", "schema", "copy", "where", "_limit"]
    assert parameters["properties"]["query"] == {
        "description": "what to find: words, several of them.",
        "type": "string",
    }
    assert parameters["properties"]["schema"] == {"default": "list", "enum": ["table", "list"], "type": "string"}
    assert parameters["properties"]["copy"]["description"] == "how many."
    assert parameters["properties"]["_limit"]["maximum"] == 5
    assert parameters["$defs"]["Point"]["properties"]["title"] == {"default": "origin", "type": "string"}
    assert "additionalProperties" not in parameters
    assert tools_of(Kit)["other.name"].is_async


def test_arguments_are_validated_and_typed() -> None:
    find = tools_of(Kit)["find"]
    assert find.validate({"query": "a", "copy": "3", "where": {"x": 1}}) == {
        "query": "a",
        "schema": "list",
        "copy": 3,
        "where": Point(x=1.0),
        "_limit": 3,
    }
    with pytest.raises(ToolError, match="query: Field required; _limit: Input should be less than or equal to 5"):
        find.validate({"_limit": 6})
    with pytest.raises(ToolError, match="nope: Extra inputs are not permitted"):
        find.validate({"query": "a", "nope": 1})
    with pytest.raises(ToolError) as caught:
        find.validate({str(n): n for n in range(1000)})
    assert len(str(caught.value)) < 300


def unannotated(self: Any, x) -> str:  # type: ignore[no-untyped-def]
    return ""


def starred(self: Any, *x: int) -> str:
    return ""


def unresolvable(self: Any, x: Nowhere) -> str:  # type: ignore[name-defined]  # noqa: F821
    return ""


def field_default(self: Any, x: int = Field(ge=1)) -> str:
    return ""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unannotated, "annotate parameter 'x'"),
        (starred, "must be an ordinary named parameter"),
        (unresolvable, "annotation 'Nowhere' cannot be resolved"),
        (field_default, "Annotated"),
    ],
)
def test_impossible_signatures_are_refused(function: Callable[..., str], message: str) -> None:
    kit = type("Impossible", (Toolkit,), {"method": tool(function)})
    with pytest.raises(UsageError, match=message):
        _ = tools_of(kit)["unannotated" if False else function.__name__].schema


def test_names_and_timeouts_are_checked() -> None:
    with pytest.raises(UsageError, match="above 0 seconds"):
        tool(timeout=0)
    with pytest.raises(UsageError, match="must start with a letter"):
        tools_of(type("Spaced", (Toolkit,), {"f": tool(name="a b")(unannotated)}))

    class Twins(Env):
        tools = (Kit(), Kit())

    with pytest.raises(UsageError, match="two tools named 'find'"):
        Twins().toolbox()

    class Closing(Env):
        @tool
        def fork(self) -> str:  # type: ignore[override]
            return ""

    with pytest.raises(UsageError, match=r"Closing.fork is a tool but hides Env.fork: .* @tool\(name='fork'\)"):
        Closing().toolbox()

    class Hides(Kit):
        def find(self) -> str:  # type: ignore[override]
            return ""

    with pytest.raises(UsageError, match="overrides a tool without @tool"):
        tools_of(Hides)


def test_the_package_and_the_module_share_a_name() -> None:
    import agentrl.tool as module

    assert callable(module)
    assert callable(agentrl.tool)
    assert module(lambda self: "") is not None


def test_spawn_and_fork_share_the_template_and_copy_the_episode() -> None:
    class Library(Toolkit):
        def __init__(self) -> None:
            self.index = {"big": 1}
            self.read: list[str] = []

        def reset(self, rng: Any) -> None:
            self.read = []

    class Reader(Env):
        def __init__(self) -> None:
            super().__init__()
            self.library = Library()
            self.tools = (self.library,)
            self.shelf = ["shared"]

    template = Reader()
    episode = template.spawn()
    assert episode.library is episode.tools[0] is not template.library
    episode.library.reset(None)
    episode.myself = [episode]  # type: ignore[attr-defined]
    branch = episode.fork()
    assert branch.library is branch.tools[0] is not episode.library
    branch.library.read.append("a page")
    assert episode.library.read == []
    assert branch.library.index is template.library.index
    assert branch.shelf is template.shelf
    assert branch.template is template
    assert branch.myself[0] is branch  # type: ignore[attr-defined]
