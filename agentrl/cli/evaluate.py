"""`agentrl eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from agentrl.cli import inputs
from agentrl.console import make_reporter
from agentrl.errors import UsageError
from agentrl.tuning import tune


def evaluate(
    *words: inputs.Inputs,
    checkpoint: str | None = None,
    model: Path | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    n: Annotated[int | None, Parameter(name=("--tasks", "-n"))] = None,
    samples: int = 1,
    decode: Literal["sampled", "greedy", "both"] = "both",
    split: str | None = None,
    json: inputs.Flag = False,
) -> None:
    """Evaluate a run, a model folder or an endpoint on held-out tasks.

    Examples: agentrl eval runs/quickstart · agentrl eval run.yaml --model ./Qwen3-0.6B ·
    agentrl eval run.yaml --endpoint http://127.0.0.1:8000/v1 --endpoint-model NAME

    Args:
        words: the configuration, or a run folder.
        checkpoint: which checkpoint of the run: best, last, or a checkpoint's folder. Default: best.
        model: a Hugging Face folder to evaluate in place of the run's policy.
        endpoint: the URL of an OpenAI-compatible server to evaluate in place of a policy.
        endpoint_model: the name of the model at the endpoint.
        n: how many tasks. Default: eval.tasks of the configuration.
        samples: episodes per task, for pass@k of the sampled evaluation.
        decode: how to decode.
        split: the split to draw tasks from. Default: eval.split of the configuration.
        json: print the records as JSON, one a line.
    """
    chosen = [
        name for name, value in (("--checkpoint", checkpoint), ("--model", model), ("--endpoint", endpoint)) if value
    ]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} name different policies; give one of them")
    if (endpoint is None) != (endpoint_model is None):
        raise UsageError("--endpoint URL and --endpoint-model NAME belong together; give both")
    for name, count in (("--tasks", n), ("--samples", samples)):
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")
    loaded = inputs.load(words, verb="eval")
    folder = inputs.Given.of(words).run_folder
    if folder is None and not (model or endpoint or checkpoint):
        raise UsageError("say what to evaluate: a run folder, --checkpoint, --model FOLDER, or --endpoint URL")
    tune()
    from agentrl import api

    reporter = make_reporter(as_json=json)
    try:
        with inputs.located(loaded):
            api.evaluate(
                folder or loaded,
                overrides=inputs.Given.of(words).overrides if folder else (),
                checkpoint=checkpoint,
                model=model,
                endpoint=endpoint,
                endpoint_model=endpoint_model,
                n=n,
                samples=samples,
                decode=("sampled", "greedy") if decode == "both" else (decode,),
                split=split,
                reporter=reporter,
            )
    finally:
        reporter.close()
