"""`agentrl replay`."""

from __future__ import annotations

import json as json_
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentrl.cli import DONE, FAILED, inputs, shown
from agentrl.console import make_reporter, number, percent, visible
from agentrl.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from agentrl.replay.check import Checked, Report
    from agentrl.replay.rescore import Rescored, Rescoring

_LISTED = 20  # changed scores in the terminal; the file and --json hold all
_REASONS = 5


def replay(
    *words: Annotated[str, Parameter(name="RUN", help="RUN or RUN/TRAJECTORY, and [path.to.key=value …].")],
    check: inputs.Flag = False,
    rescore: inputs.Flag = False,
    from_turn: int | None = None,
    tools: Literal["live", "recorded"] | None = None,
    stage: str | None = None,
    step: int | None = None,
    split: str | None = None,
    n: Annotated[int | None, Parameter(name=("--n", "-n"))] = None,
    sample: int | None = None,
    attempt: int | None = None,
    out: Path | None = None,
    say: str | None = None,
    checkpoint: str | None = None,
    model: Path | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    temperature: float | None = None,
    json: inputs.Flag = False,
) -> int:
    """Act recorded episodes out again: check them, score them anew, or go on from a turn.

    Examples: agentrl replay runs/quickstart -n 100 · agentrl replay runs/quickstart/rl-3/17/0 ·
    agentrl replay runs/quickstart --rescore · agentrl replay RUN/TRAJECTORY --from-turn 1 --out runs/fork

    Args:
        words: the run, or one of its trajectories or groups; overrides of its configuration.
        check: act the recorded calls and replies out, compare turn by turn; exit code 1 on divergence. The default.
        rescore: score the episodes with the environment's present score; what was recorded stays as it is.
        from_turn: act one trajectory out up to this turn (the first is 0) and go on live from there.
        tools: live, or recorded: recorded results stand in for the tools, nothing is called.
        stage: only episodes of this stage, such as rl or rl-greedy.
        step: only episodes of this step.
        split: only episodes of this split.
        n: at most so many episodes, spread evenly over those that fit.
        sample: only the episodes with this number among those of their task.
        attempt: this attempt of each trajectory. Default: the latest.
        out: with --from-turn, the new folder to record the branch in.
        say: with --from-turn, your message, or a call such as name(argument=value), for that turn.
        checkpoint: with --from-turn, who goes on: best (the default), last, or a checkpoint's folder.
        model: with --from-turn, a Hugging Face folder that goes on.
        endpoint: with --from-turn, the URL of an OpenAI-compatible server that goes on.
        endpoint_model: the name of the model at the endpoint.
        temperature: with --from-turn, how to sample. Default: eval.temperature of the configuration.
        json: print one JSON object a line.
    """
    given = inputs.Given.of(words)
    if len(given.files) != 1:
        raise UsageError("name one run, or one trajectory of it: agentrl replay RUN[/TRAJECTORY]")
    modes = {"--check": check, "--rescore": rescore, "--from-turn": from_turn is not None}
    chosen = [name for name, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are different things to do; give one of them")
    forking = {
        "--out": out,
        "--say": say,
        "--checkpoint": checkpoint,
        "--model": model,
        "--endpoint": endpoint,
        "--endpoint-model": endpoint_model,
        "--temperature": temperature,
    }
    choosing = {"--stage": stage, "--step": step, "--split": split, "--n": n, "--sample": sample, "--tools": tools}
    for name, value in (forking if from_turn is None else choosing).items():
        if value is not None:
            with_ = "belongs to" if from_turn is None else "does not go with"
            raise UsageError(f"{name} {with_} --from-turn")
    source = next(word for word in words if word not in given.overrides)
    common: dict[str, Any] = {"overrides": given.overrides, "attempt": attempt}
    filters: dict[str, Any] = {"stage": stage, "step": step, "split": split, "sample": sample, "n": n}
    reporter = make_reporter(as_json=json)
    try:
        if from_turn is not None:
            speakers = {name.strip("-").replace("-", "_"): value for name, value in forking.items()}
            return _fork(source, from_turn, reporter, json, **common, **speakers)
        from agentrl.replay import verbs

        if rescore:
            found = verbs.rescore(source, tools=tools or "auto", keep=False, reporter=reporter, **common, **filters)
            reporter.close()
            return _rescored(source, found, json)
        report = verbs.replay(source, tools=tools or "live", reporter=reporter, **common, **filters)
        reporter.close()
        return _checked(report, json)
    finally:
        reporter.close()


# -- the check ---------------------------------------------------------------------------------------------


def _checked(report: Report, as_json: bool) -> int:
    if as_json:
        for each in report.episodes:
            _line("replayed", **each.as_json())
        _line("summary", **report.counts, env=report.env, changed=list(report.changed), tools=report.tools)
    else:
        console = _console()
        console.print(_table(report))
        for why, count in report.reasons[:_REASONS]:
            console.print(Text(f"  {count} × {visible(why)}", "dim"), soft_wrap=True)
        if len(report.reasons) > _REASONS:
            console.print(Text(f"  and {len(report.reasons) - _REASONS} other reasons; --json has them", "dim"))
        if report.first is not None:
            _show_difference(console, report.first)
    counts = report.counts
    if counts["not"] == counts["episodes"]:
        why, count = report.reasons[0]
        raise RunFailed(f"none of {counts['episodes']} episodes could be replayed; {count} of them: {why}")
    return FAILED if counts["diverged"] else DONE


def _table(report: Report) -> Table:
    """Episodes by stage and split: what agreed, what did not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("stage", no_wrap=True)
    acted = ("turns", "calls") if report.tools == "live" else ()
    for title in ("episodes", *acted, "same", "in part", "diverged", "no replay"):
        table.add_column(title, justify="right")
    groups: dict[str, list[Checked]] = {}
    for each in report.episodes:
        groups.setdefault(each.stage if each.split in ("train", "demo") else f"{each.stage} ({each.split})", []).append(
            each
        )
    rows = [*groups.items(), *([("all", list(report.episodes))] if len(groups) > 1 else [])]
    for title, episodes in rows:
        statuses = [each.status for each in episodes]
        sums = [f"{sum(getattr(each, what) for each in episodes)}" for what in acted]
        diverged, failed = statuses.count("diverged"), statuses.count("not")
        table.add_row(
            Text(title, "bold" if title == "all" else ""),
            str(len(episodes)),
            *sums,
            Text(str(statuses.count("same")), "green"),
            str(statuses.count("partly")),
            Text(str(diverged), "bold red" if diverged else ""),
            Text(str(failed), "yellow" if failed else ""),
        )
    return table


def _show_difference(console: Console, each: Checked) -> None:
    different = each.difference
    assert different is not None
    attempt = f" (attempt {each.attempt})" if each.attempt else ""
    console.print(
        Text(f"first divergence: {visible(each.id)}{attempt}, {different.place}: {different.what}", "bold red")
    )
    for title, side in zip(("recorded", "now"), different.shown, strict=True):
        console.print(Text.assemble((f"  {title:<9}", "dim"), visible(side)), soft_wrap=True)


# -- new scores --------------------------------------------------------------------------------------------


def _rescored(source: str, found: Rescoring, as_json: bool) -> int:
    from agentrl.replay.recorded import located
    from agentrl.replay.rescore import keep

    folder, _ = located(source)
    refused = ""
    try:
        path: Path | None = keep(folder, found)
    except (UsageError, RunFailed) as error:  # a folder that may only be read
        path, refused = None, str(error)
    if as_json:
        for each in found.episodes:
            _line("rescored", **_plain(each))
        facts = {"because": dict(found.because), "compared": found.compared, "env": found.env}
        _line("summary", **found.how, **facts, file=path and str(path))
        return DONE
    console = _console()
    changed = [each for each in found.episodes if each.changed]
    if changed:
        console.print(_changes(changed[:_LISTED]))
    if len(changed) > _LISTED:
        console.print(Text(f"  and {len(changed) - _LISTED} more; the file has them all", "dim"))
    console.print(_means(found))
    for line in _said(found):
        console.print(Text(f"  {visible(line)}"), soft_wrap=True)
    kept = f"kept in {shown(path)}; the record stays as it was" if path is not None else f"warning: {refused}"
    console.print(Text(f"  {kept}", "dim"), soft_wrap=True)
    if found.how.get("not") == len(found.episodes):
        raise RunFailed(f"none of {len(found.episodes)} episodes could be scored again: {found.episodes[0].why}")
    return DONE


def _said(found: Rescoring) -> list[str]:
    """Which way the scores came about."""
    lines, how = [], found.how
    if how.get("record"):
        also = "; not compared with a live episode (globals, files and clocks are not seen)"
        if found.compared:
            also = f", which is all that score reads; {found.compared} were acted out besides, with the same scores"
        lines.append(f"{found.name}: {how['record']} scored from the record{also}")
    for why, count in found.because:
        lines.append(f"{found.name}: {count} scored by acting the episode out again ({why})")
    if how.get("kept"):
        lines.append(f"{how['kept']} failed and have no score to change")
    skipped = [each for each in found.episodes if each.how == "not"]
    if skipped:
        lines.append(f"{len(skipped)} could not be scored again, {skipped[0].id} for one: {skipped[0].why}")
    return lines


def _changes(episodes: list[Rescored]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("rescored", "reward", "", "", "success", "", ""):
        table.add_column(title, overflow="fold")
    for each in episodes:
        assert each.new is not None
        success = [{True: "yes", False: "no", None: "–"}[verdict.success] for verdict in (each.old, each.new)]
        table.add_row(
            Text(visible(each.id)), number(each.old.reward), "→", number(each.new.reward), success[0], "→", success[1]
        )
    return table


def _means(found: Rescoring) -> Table:
    """Old and new means of each stage: of the reward, the parts, and success."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("mean of", "n", "old", "", "new"):
        table.add_column(title, justify="left" if title == "mean of" else "right", no_wrap=True)
    groups: dict[str, list[Rescored]] = {}
    for each in found.episodes:
        if each.new is not None:
            groups.setdefault(each.stage, []).append(each)
    for stage, episodes in groups.items():
        verdicts = [(each.old, each.new) for each in episodes if each.new is not None]
        both = [(old.reward, new.reward) for old, new in verdicts]
        table.add_row(f"{stage} reward", str(len(both)), *_arrow([o for o, _ in both], [w for _, w in both]))
        names = sorted({name for pair in verdicts for verdict in pair for name in verdict.parts})
        for name in names if len(names) > 1 else ():
            old, new = ([verdict.parts.get(name) for verdict in side] for side in zip(*verdicts, strict=True))
            table.add_row(Text(f"  {visible(name)}"), "", *_arrow(old, new))
        old, new = (
            [None if v.success is None else float(v.success) for v in side] for side in zip(*verdicts, strict=True)
        )
        table.add_row("  success", "", *_arrow(old, new, show=percent))
    return table


def _arrow(old: list[float | None], new: list[float | None], *, show: Any = number) -> tuple[str, str, str]:
    means = []
    for values in (old, new):
        known = [value for value in values if value is not None]
        means.append(show(sum(known) / len(known) if known else None))
    return means[0], "→", means[1]


# -- branches ----------------------------------------------------------------------------------------------


def _fork(source: str, turn: int, reporter: Any, as_json: bool, **keys: Any) -> int:
    from agentrl.replay import verbs
    from agentrl.replay.recorded import located

    if keys["out"] is None:
        raise UsageError("--from-turn needs --out FOLDER, a new folder to record the branch in")
    if located(source)[1] is None:
        raise UsageError("--from-turn goes on from one trajectory: name RUN/TRAJECTORY")
    trajectory = verbs.fork(source, turn=turn, reporter=reporter, **keys)
    reporter.note(
        f"{trajectory.id}: {trajectory.outcome}, reward {number(trajectory.reward)}; recorded in {shown(keys['out'])}"
    )
    return DONE


def _line(event: str, **fields: Any) -> None:
    sys.stdout.write(json_.dumps({"event": event, **fields}, default=str) + "\n")


def _plain(each: Rescored) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(each)


def _console() -> Console:
    return Console(highlight=False, markup=False)
