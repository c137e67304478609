"""`agentrl sandbox`: build the image, say what holds on this machine, run one program."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentrl.cli import shown, steps
from agentrl.console import visible
from agentrl.errors import AgentRLError, UsageError

app = App(name="sandbox", help="Build, examine and try the sandboxes that programs run in.", version_flags=[])
LONGEST = 3600.0  # seconds, as `Limits.seconds`
_STYLES = {"full": "green", "reduced": "yellow", "none": "red"}


@app.command
def build(
    *,
    from_debian: Annotated[bool, Parameter(negative="")] = False,
    browser: Annotated[bool, Parameter(negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make the sandbox's image, and the root file system that bubblewrap uses.

    What was made before from the same recipe is left alone. Without a Docker daemon only the root file system is made.

    Args:
        from_debian: make the base from Debian's packages (debootstrap) instead of pulling an image.
        browser: also make the image with Debian's Chromium, for GUI environments.
        force: make everything again.
    """
    from agentrl.sandboxes import images

    console = Console(highlight=False)
    with steps(console) as say:
        made = images.build(from_debian=from_debian, browser=browser, force=force, say=say)
    if made.image:
        console.print(f"image {made.image}" + (f" and {images.BROWSER}" if browser else ""), markup=False)
    if made.root:
        console.print(f"root file system {shown(made.root)}, {made.megabytes} MB", markup=False, soft_wrap=True)


@app.command
def doctor(*, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Say which sandboxes work here, and which limits each one holds. Exit code 1 where none works.

    Args:
        as_json: one JSON object instead of a table.
    """
    found = asyncio.run(_examine())
    working = [name for name in found if name != "unsafe_local" and found[name]["missing"] is None]
    if as_json:
        print(json.dumps(found, indent=2))  # noqa: T201
        return int(not working)
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("backend", "works", "level", "limits that hold", "limits that do not"):
        table.add_column(title, overflow="fold")
    for name, facts in found.items():
        works = Text("yes", "green") if facts["missing"] is None else Text("no", "red")
        level = facts.get("level", "")
        table.add_row(
            name,
            works,
            Text(level, _STYLES.get(level, "")),
            " ".join(facts.get("enforced", ())),
            " ".join(facts.get("not_enforced", {})) or ("none" if level else ""),
        )
    console.print(table)
    for name, facts in found.items():
        reasons = {facts["missing"]} if facts["missing"] else set(facts.get("not_enforced", {}).values())
        for reason in sorted(reasons):
            console.print(Text.assemble((f"{name}: ", "bold"), reason), soft_wrap=True)
    chosen = f"Programs run in {working[0]} unless a configuration says otherwise." if working else "Nothing is chosen."
    console.print(chosen)
    return int(not working)


async def _examine() -> dict[str, dict[str, Any]]:
    """Of each backend: why it is missing (None where it works), its level and its limits."""
    from agentrl.sandbox import Limits
    from agentrl.sandboxes import NAMES, backend

    limits, found = Limits.model_validate({}), {}
    for name in NAMES:
        facts: dict[str, Any] = {"missing": None}
        try:
            made = backend(name)
            facts["missing"] = await made.missing()
            if facts["missing"] is None:
                enforcement = await made.enforcement(limits)
                facts |= {"level": enforcement.level, "enforced": list(enforcement.enforced)}
                facts |= {"not_enforced": dict(enforcement.missing)}
            await made.close()
        except AgentRLError as error:
            facts["missing"] = str(error)
        found[name] = facts
    return found


@app.command(name="exec")
def execute(
    file: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    backend: str | None = None,
    timeout: float = 10.0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Run one Python program in a fresh sandbox. Exit code 0 where it ran through, 1 where it did not.

    Example: echo 'print(6 * 7)' | agentrl sandbox exec -

    Args:
        file: the program, or - for standard input.
        backend: docker, bubblewrap or unsafe_local; default: the best that works here.
        timeout: seconds that the program may take.
        as_json: one JSON object instead of text.
    """
    if not 0 < timeout <= LONGEST:
        raise UsageError(f"--timeout {timeout:g} must be above 0 and at most {LONGEST:g} seconds")
    try:
        if file == "-" and sys.stdin is None:
            raise UsageError("there is no standard input to read the program from; name a file")
        code = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the program {file}: {reason}") from error
    name, result = asyncio.run(_run(code, backend, timeout))
    if as_json:
        fields = dataclasses.asdict(result) | {"images": len(result.images), "backend": name}
        print(json.dumps(fields))  # noqa: T201
        return int(not result.ok)
    console, errors = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    for out, text in (
        (console, result.stdout),
        (errors, result.stderr),
        (console, result.value),
        (errors, result.error),
    ):
        if text:
            out.print(Text(visible(text.rstrip("\n"))))
    hit = f", ran into the limit on {', '.join(result.hit)}" if result.hit else ""
    style = "green" if result.ok else "red"
    errors.print(Text(f"{result.status} in {name} after {result.seconds:.2f} s{hit}", style))
    return int(not result.ok)


async def _run(code: str, name: str | None, seconds: float) -> tuple[str, Any]:
    from agentrl.sandbox import Limits
    from agentrl.sandboxes import choose

    limits = Limits.model_validate({"seconds": seconds, "life": seconds + 60})
    made = await choose(name)
    try:
        await made.reap()
        box = await made.open(limits)
        return made.name, await box.exec(code)
    finally:
        await made.close()
