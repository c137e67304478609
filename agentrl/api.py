"""The verbs of the command line as Python functions: train, evaluate, rollout, replay, export.

torch is loaded when one of them is called, not before.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentrl.config import SCHEMA_VERSION, Config, parse
from agentrl.console import Reporter, make_reporter
from agentrl.errors import UsageError
from agentrl.loader import Loaded, as_text, load
from agentrl.replay.verbs import fork as fork
from agentrl.replay.verbs import replay as replay
from agentrl.replay.verbs import rescore as rescore
from agentrl.store import RunFolder
from agentrl.train.options import HFModel
from agentrl.tuning import tune

if TYPE_CHECKING:
    from agentrl.metrics import Summary

ConfigLike = Config | Loaded[Any] | Mapping[str, Any] | str | Path
Decode = Literal["sampled", "greedy"]


def train(
    config: ConfigLike,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> Summary | None:
    """Train to the end; the run folder is `<out>/<name>`.

    `resume` goes on from the newest checkpoint with the same numbers as a run that was never killed.
    `dry_run` checks everything, reports the plan, trains nothing and returns None.
    """
    resolved, text = _with_text(config, overrides)
    tune()
    reporter = reporter or make_reporter()
    try:
        from agentrl.train.plan import check, plan_rows

        check(resolved)
        reporter.plan(plan_rows(resolved))
        if dry_run:
            return None
        from agentrl.train.trainer import Trainer

        path = Path(resolved.out) / resolved.name
        if resume and (path / "run.json").is_file():
            _check_same(path, resolved)
        with RunFolder.create(path, text, config_version=SCHEMA_VERSION, command=sys.argv, resume=resume) as folder:
            summary = asyncio.run(Trainer(resolved, folder, reporter).run())
        if summary.eval:
            _draw(path, reporter)
        reporter.finished({**asdict(summary), "folder": str(path)}, next_commands(path))
        return summary
    finally:
        reporter.close()


def _check_same(run: Path, config: Config) -> None:
    """Refuse to go on with `run` under settings that would make it another run. Raises `UsageError`."""
    from agentrl.train.checkpoint import latest, progress_of
    from agentrl.train.plan import check_same

    newest = latest(run / "checkpoints")
    finished = 0 if newest is None else progress_of(newest).stage
    check_same(as_config(run / "config.resolved.yaml"), config, finished)


def _draw(run: Path, reporter: Reporter) -> None:
    """curve.png beside the numbers, where matplotlib is installed."""
    try:
        from agentrl.plot import curve

        curve(run, run / "curve.png")
    except UsageError as error:
        reporter.note(f"no curve.png: {error}")
    else:
        reporter.note(f"the learning curve is in {run / 'curve.png'}")


def next_commands(path: Path) -> list[str]:
    """What a person does after a run."""
    return [
        f"agentrl view {path}",
        f"agentrl eval {path}",
        f"agentrl export hf {path} {path}/model",
        "agentrl env new my_env",
    ]


def evaluate(
    source: ConfigLike,
    *,
    overrides: Sequence[str] = (),
    checkpoint: str | None = None,
    model: str | Path | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    n: int | None = None,
    samples: int = 1,
    decode: Sequence[Decode] = ("sampled", "greedy"),
    split: str | None = None,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Evaluate on held-out tasks; one `eval` record per decode mode.

    `source` is a run folder (its `checkpoint`: "best", "last", or a folder) or a configuration, with
    `model` a Hugging Face folder or `endpoint` and `endpoint_model` an OpenAI-compatible server in
    place of the run's policy. `samples` > 1 adds pass@k to the sampled record.
    """
    run = _run_folder(source)
    config = as_config(run / "config.resolved.yaml" if run else source, overrides)
    tune()
    reporter = reporter or make_reporter()
    try:
        from agentrl.train.checkpoint import chosen
        from agentrl.train.judge import Judge

        judge = Judge(config, reporter, n=n, samples=samples, split=split)
        if endpoint is not None:
            return asyncio.run(judge.endpoint(endpoint, endpoint_model or "", decode))
        if model is not None:
            config = config.model_copy(update={"model": HFModel(path=str(model))})
            return asyncio.run(Judge(config, reporter, n=n, samples=samples, split=split).policy(None, None, decode))
        at = chosen(run, checkpoint)
        if at is not None:
            reporter.note(f"the policy of {at}")
        return asyncio.run(judge.policy(run, at, decode))
    finally:
        reporter.close()


def rollout(
    source: ConfigLike,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    checkpoint: str | None = None,
    n: int = 16,
    reporter: Reporter | None = None,
) -> Path:
    """Play `n` training tasks and record them in the new folder `out`: with the policy of a run (`checkpoint` as in
    `evaluate`), or with the one that a configuration begins with."""
    run = _run_folder(source)
    resolved, text = _with_text(run / "config.resolved.yaml" if run else source, overrides)
    tune()
    reporter = reporter or make_reporter()
    try:
        from agentrl.train.checkpoint import chosen
        from agentrl.train.judge import Judge

        path, at = Path(out), chosen(run, checkpoint)
        with RunFolder.create(path, text, config_version=SCHEMA_VERSION, command=sys.argv) as folder:
            if at is not None:
                reporter.note(f"the policy of {at}")
            asyncio.run(Judge(resolved, reporter, n=n, split="train").record(folder.path, run, at))
        reporter.note(f"recorded in {path}")
        return path
    finally:
        reporter.close()


def export(source: str | Path, folder: str | Path, *, merge: bool = True, checkpoint: str | None = None) -> Path:
    """Write a run's policy (or one of its checkpoints) as a Hugging Face folder, LoRA merged or not."""
    run = _run_folder(source)
    if run is None:
        parent = Path(source).parent.parent
        run, checkpoint = _run_folder(parent), str(source)
    if run is None:
        raise UsageError(f"{source} is neither a run folder nor one of its checkpoints; name one of them")
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty; name a new folder")
    tune()
    from agentrl.train.checkpoint import chosen
    from agentrl.train.judge import restored_policy

    policy = asyncio.run(restored_policy(as_config(run / "config.resolved.yaml"), run, chosen(run, checkpoint)))
    policy.save_hf(out, merge=merge)
    return out


def _run_folder(source: object) -> Path | None:
    if isinstance(source, str | Path) and (Path(source) / "run.json").is_file():
        return Path(source)
    return None


def as_config(config: ConfigLike, overrides: Sequence[str] = ()) -> Config:
    """A validated configuration from a file, a dictionary, or one that is already validated."""
    if isinstance(config, Loaded | Config):
        if overrides:
            raise UsageError("overrides go with a file or a dictionary; use config.model_copy(update=…) instead")
        return config if isinstance(config, Config) else config.config
    if isinstance(config, Mapping):
        if overrides:
            raise UsageError("overrides go with a configuration file; put the values into the dictionary instead")
        return parse(config)
    loaded: Any = load([Path(config)], overrides)
    return loaded.config  # type: ignore[no-any-return]


def _with_text(config: ConfigLike, overrides: Sequence[str]) -> tuple[Config, str]:
    """A configuration, and what the run's folder keeps of it: never what a `${env:…}` of its file stands for."""
    if isinstance(config, str | Path):
        config, overrides = load([Path(config)], overrides), ()
    resolved = as_config(config, overrides)
    return resolved, config.yaml if isinstance(config, Loaded) else as_text(resolved)
