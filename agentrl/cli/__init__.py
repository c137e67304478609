"""The `agentrl` command: verbs, exit codes, and one sentence for whatever goes wrong.

Each verb lives in a module of its own that is imported when the verb is called, and imports the heavy
parts inside its function: `agentrl --help` loads no torch. Exit codes: 0 done, 1 the run failed,
2 bad input, 130 interrupted. `--debug` shows the traceback, wherever it stands on the line.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cyclopts import App, CycloptsError, UnknownCommandError, UnknownOptionError
from rich.console import Console
from rich.text import Text

import agentrl
from agentrl.errors import AgentRLError, RunFailed, UsageError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

VERBS = {
    "train": ("agentrl.cli.train:train", "Train a policy as a configuration says."),
    "eval": ("agentrl.cli.evaluate:evaluate", "Evaluate a run, a model folder or an endpoint on held-out tasks."),
    "rollout": ("agentrl.cli.rollout:rollout", "Play episodes and record them, without training."),
    "replay": ("agentrl.cli.replay:replay", "Act recorded episodes out again: check, score anew, go on from a turn."),
    "view": ("agentrl.cli.view:view", "Look at runs and their trajectories in the browser."),
    "env": ("agentrl.cli.env:app", "Scaffold, list, check and play environments."),
    "sandbox": ("agentrl.cli.sandbox:app", "Build, examine and try the sandboxes that programs run in."),
    "engine": ("agentrl.cli.engine:app", "Install and serve model servers; check and measure engines."),
    "config": ("agentrl.cli.config:app", "Show, compare and describe configurations."),
    "export": ("agentrl.cli.export:app", "Write trajectories, or a trained policy, in another format."),
    "index": ("agentrl.cli.index:index", "Look after the index of a run's trajectories."),
    "doctor": ("agentrl.cli.doctor:doctor", "Check this machine, a model's tokenizer, a configuration."),
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence that says how to go on."""


@contextmanager
def steps(console: Console) -> Iterator[Callable[[str], None]]:
    """For what takes minutes: a function that says which step has begun."""
    with console.status("looking at what is there") as status:

        def say(step: str) -> None:
            status.update(step)
            console.print(Text(f"  {step}", "dim"), soft_wrap=True)

        yield say


def build() -> App:
    """The application; the verbs are imported on first use."""
    app = App(
        name="agentrl",
        help="Train LLM agents by reinforcement learning in multi-turn tool environments.",
        help_epilogue="Every command also takes --debug (tracebacks) and --no-color.",
        help_format="plaintext",
        version=agentrl.__version__,
        version_flags=["--version"],
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        verbose=False,
        suppress_keyboard_interrupt=False,
    )
    for name, (target, summary) in VERBS.items():
        app.command(target, name=name, help=summary)
    return app


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error has become a line on stderr."""
    debug = "--debug" in arguments
    if "--no-color" in arguments:
        os.environ["NO_COLOR"] = "1"
    words = [word for word in arguments if word not in ("--debug", "--no-color")]
    try:
        result = build()(words)
        sys.stdout.flush()
        return result if isinstance(result, int) else DONE
    except KeyboardInterrupt as stop:
        return _say(str(stop) or "interrupted; what was recorded is kept", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _say(*_verdict(error, words))


def _verdict(error: Exception, words: Sequence[str]) -> tuple[str, int]:
    """What to say about `error`, and the exit code it means."""
    if isinstance(error, CycloptsError):
        return _cyclopts(error, words), BAD_INPUT
    if isinstance(error, UsageError):
        return "\n".join(map(_one_line, getattr(error, "mistakes", [error]))), BAD_INPUT
    if isinstance(error, RunFailed):
        return f"the run failed: {_one_line(error)}", FAILED
    if isinstance(error, AgentRLError):
        return _one_line(error), FAILED
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full ({error.filename or 'while writing'}): free some space and go on with --resume",
            FAILED,
        )
    with tempfile.NamedTemporaryFile("w", prefix="agentrl-", suffix=".txt", delete=False) as file:
        file.writelines(traceback.format_exception(error))
    kind = type(error).__name__
    return f"unexpected {kind}: {_first_line(str(error))} (this is a bug; the traceback is in {file.name})", FAILED


def _cyclopts(error: CycloptsError, words: Sequence[str]) -> str:
    if isinstance(error, UnknownCommandError) and words and words[0] not in VERBS:
        # cyclopts would import every verb to list them
        meant = did_you_mean(words[0], VERBS) or f"; the commands are {', '.join(VERBS)}"
        return f"there is no command {words[0]!r}{meant}"
    error.verbose = False
    text = _one_line(error)
    if isinstance(error, UnknownOptionError) and "=" in (word := error.token.keyword or error.token.value):
        text += f" A key of the configuration is set without dashes: {word.lstrip('-')}"
    known = next((word for word in words if word in VERBS), None)
    return f"{text} See agentrl {known + ' ' if known else ''}--help"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no message"


def _say(text: str, code: int) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    label = {BAD_INPUT: "error", FAILED: "failed"}.get(code, "stopped")
    for line in text.splitlines():
        console.print(f"[bold red]{label}:[/] ", end="")
        console.print(line, markup=False)
    return code


def shown(path: Path) -> str:
    """A path as the user would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
