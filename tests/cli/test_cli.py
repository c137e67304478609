"""The command line: what each verb hands on, and the exit code and the one line for whatever goes wrong."""

# ruff: noqa: E501 - the lines a user reads are quoted whole

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentrl import cli
from agentrl.errors import RunFailed, UsageError

CONFIG = """\
name: test
env: calculator
model:
  type: scratch
  arch: {model_type: qwen3}
stages:
- type: rl
  steps: 2
  optimizer: {lr: 1e-3}
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in an empty folder with a sound run.yaml: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Path("run.yaml").write_text(CONFIG)

    def call(*words: str) -> tuple[int, str, str]:
        code = cli.run(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`agentrl.api` with verbs that note how they were called."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def verb(name: str) -> Callable[..., None]:
        return lambda *args, **named: calls.append((name, args, named))

    fake = SimpleNamespace(calls=calls, **{name: verb(name) for name in ("train", "evaluate", "rollout", "export")})
    monkeypatch.setitem(sys.modules, "agentrl.api", fake)
    monkeypatch.setattr("agentrl.api", fake, raising=False)
    monkeypatch.setattr("agentrl.tuning.tune", dict)
    return fake


# -- bad input: exit 2 and one line --------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("trian run.yaml", "there is no command 'trian'; did you mean 'train'?"),
        (
            "zzz",
            "there is no command 'zzz'; the commands are train, eval, rollout, replay, env, sandbox, engine, config, export, index, doctor",
        ),
        ("train", "name a configuration: agentrl train run.yaml [key=value …]"),
        ("train seed=1", "name a configuration: agentrl train run.yaml [key=value …]"),
        ("train run.yaml --resum", "Unknown option: --resum. Did you mean --resume? See agentrl train --help"),
        (
            "train run.yaml --seed=1",
            "Unknown option: --seed=1. A key of the configuration is set without dashes: seed=1 See agentrl train --help",
        ),
        ("train rnu.yaml", "rnu.yaml: no such file; did you mean 'run.yaml'?"),
        (
            "train run.yaml dry_run",
            "dry_run: no such file; a configuration file ends in .yaml, an override is written dry_run=value",
        ),
        ("train .", ".: is a directory; give a YAML file"),
        ("train run.yaml sede=1", "sede=1: sede: unknown key; did you mean 'seed'?"),
        ("train run.yaml seed=one", "seed=one: seed: should be a whole number, not 'one'"),
        ("train run.yaml +seed=1", "+seed=1: write seed=1 without '+': it sets the key whether or not a file has it"),
        ("train run.yaml ~sed", "~sed: the configuration sets no key 'sed', so nothing is taken out"),
        (
            "train run.yaml stages.1.lr=1",
            "stages.1.lr=1: stages is a list and has no entry '1': its entries are 0 to 0",
        ),
        (
            "train run.yaml stages.0.estimator=gppo",
            "stages.0.estimator=gppo: stages.0.estimator: there is no 'gppo'; did you mean 'grpo'?",
        ),
        (
            "train run.yaml env.options.hard=1",
            "env.options.hard=1: env.options.hard: unknown key; the keys here are corruption, held_out, kind, lazy",
        ),
        (
            "train run.yaml env=nosuch.py:Env",
            "env=nosuch.py:Env: env: there is no file nosuch.py here; a path counts from the folder in which the command runs",
        ),
        (
            "train run.yaml env=no.such:Env",
            "env=no.such:Env: env: there is no module 'no.such'; a file is written as path/to/file.py:Class",
        ),
        (
            "train run.yaml imports=[nosuch]",
            "imports=[nosuch]: imports: 'nosuch' cannot be imported: No module named 'nosuch'",
        ),
        (
            "train run.yaml rollout.deadlines.tool=999",
            "rollout.deadlines.tool=999: rollout.deadlines: deadlines must satisfy tool < turn < episode, but 999 s, 300 s, 1800 s do not: a shorter outer deadline would cut the inner one off",
        ),
        (
            "config shw run.yaml",
            'Unknown command "shw". Did you mean "show"? Available commands: show, schema, diff. See agentrl config --help',
        ),
        ("config diff run.yaml", 'Command "config diff" parameter B requires an argument. See agentrl config --help'),
        ("eval", "name a configuration: agentrl eval run.yaml [key=value …]"),
        ("eval run.yaml", "say what to evaluate: a run folder, --checkpoint, --model FOLDER, or --endpoint URL"),
        ("eval run.yaml --endpoint http://x", "--endpoint URL and --endpoint-model NAME belong together; give both"),
        (
            "eval run.yaml --model a --checkpoint b",
            "--checkpoint and --model name different policies; give one of them",
        ),
        ("eval run.yaml --model a -n 0", "--tasks must be at least 1, not 0"),
        (
            "eval run.yaml --model a -n x",
            'Invalid value for -n: unable to convert "x" into int. See agentrl eval --help',
        ),
        (
            "eval run.yaml --model a --decode greed",
            'Invalid value "greed" for --decode. Choose from: "sampled", "greedy", "both". Did you mean "greedy"? See agentrl eval --help',
        ),
        ("rollout run.yaml", 'Command "rollout" parameter --out requires an argument. See agentrl rollout --help'),
        ("rollout run.yaml --out x -n -3", "--tasks must be at least 1, not -3"),
        ("export hf run", 'Command "export hf" parameter OUT requires an argument. See agentrl export --help'),
        ("export onnx a b", 'Unknown command "onnx". Available commands: hf. See agentrl export --help'),
        ("doctor --config rnu.yaml", "rnu.yaml: no such file; did you mean 'run.yaml'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run: Run, words: str, line: str) -> None:
    code, out, err = run(*words.split())
    assert (code, err) == (2, f"error: {line}\n")
    assert "Traceback" not in out + err


def test_a_mistake_in_a_file_has_its_line_and_all_come_at_once(run: Run) -> None:
    Path("bad.yaml").write_text(CONFIG + "  promtps: 3\n  samples: many\nengine:\n\trows: 1\n")
    assert run("train", "bad.yaml")[2] == "error: bad.yaml:13: a tab cannot indent YAML; use spaces\n"
    Path("bad.yaml").write_text(CONFIG + "  promtps: 3\n  samples: many\n")
    code, _, err = run("train", "bad.yaml", "nmae=x")
    assert code == 2
    assert err.splitlines() == [
        "error: bad.yaml:11: stages.0.samples: should be a whole number, not 'many'",
        "error: bad.yaml:10: stages.0.promtps: unknown key; did you mean 'prompts'?",
        "error: nmae=x: nmae: unknown key; did you mean 'name'?",
    ]


def test_an_error_that_names_a_key_is_shown_where_the_key_was_set(run: Run, api: SimpleNamespace) -> None:
    def fails(*args: object, **named: object) -> None:
        raise UsageError("there is no folder /nowhere; give a Hugging Face folder", where="model.path")

    api.train = fails
    code, _, err = run("train", "run.yaml", "model=/nowhere")
    assert code == 2
    assert err == "error: model=/nowhere: model.path: there is no folder /nowhere; give a Hugging Face folder\n"

    def elsewhere(*args: object, **named: object) -> None:
        raise UsageError("the checkpoint is damaged", where="runs/x/checkpoints/best")

    api.train = elsewhere
    assert run("train", "run.yaml")[2] == "error: runs/x/checkpoints/best: the checkpoint is damaged\n"


# -- runs that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            RunFailed("the loss is not finite; lower the learning rate"),
            1,
            "failed: the run failed: the loss is not finite; lower the learning rate",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "seg/1.bin"),
            1,
            "failed: the disk is full (seg/1.bin): free some space and go on with --resume",
        ),
        (
            KeyboardInterrupt(),
            130,
            "stopped: interrupted; what was recorded is kept, go on with: agentrl train run.yaml 'out=a b' --resume",
        ),
    ],
)
def test_a_run_that_cannot_go_on_says_why(
    run: Run, api: SimpleNamespace, error: BaseException, code: int, line: str
) -> None:
    def fails(*args: object, **named: object) -> None:
        raise error

    api.train = fails
    assert run("train", "run.yaml", "out=a b")[0::2] == (code, f"{line}\n")


def test_a_bug_is_one_line_and_its_traceback_is_kept(run: Run, api: SimpleNamespace) -> None:
    def fails(*args: object, **named: object) -> None:
        raise KeyError("lost")

    api.train = fails
    code, _, err = run("train", "run.yaml")
    assert code == 1 and err.count("\n") == 1 and err.startswith("failed: unexpected KeyError: 'lost' (this is a bug")
    kept = Path(err.split("the traceback is in ")[1].rstrip(")\n"))
    assert "raise KeyError" in kept.read_text()
    kept.unlink()
    code, _, err = run("train", "run.yaml", "--debug")
    assert code == 1 and "Traceback (most recent call last)" in err
    Path(err.split("the traceback is in ")[1].rstrip(")\n")).unlink()


def test_ctrl_c_ends_with_130_and_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    script = (
        # A shell that starts jobs in the background lets them ignore the interrupt; this one shall not.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, types, time, asyncio\n"
        "fake = types.ModuleType('agentrl.api')\n"
        "async def wait():\n"
        "    print('READY', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "fake.train = lambda *a, **k: asyncio.run(wait())\n"
        "sys.modules['agentrl.api'] = fake\n"
        "import agentrl; agentrl.api = fake\n"
        "from agentrl.cli import run\n"
        "sys.exit(run(['train', 'run.yaml']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "READY\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "stopped: interrupted; what was recorded is kept, go on with: agentrl train run.yaml --resume\n"


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    command = f"{sys.executable} -c 'from agentrl.cli import main; main()' config schema | head -c 10"
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == "" and done.stdout == '{\n  "$defs'[:10]


# -- what the verbs hand on ----------------------------------------------------------------------


def test_train_hands_the_configuration_on(run: Run, api: SimpleNamespace) -> None:
    assert run("train", "run.yaml", "seed=7", "--out", "my runs", "--dry-run")[0] == 0
    [(name, (loaded,), named)] = api.calls
    config = loaded.config
    assert name == "train" and config.seed == 7 and config.out == "my runs"
    assert (named["dry_run"], named["resume"]) == (True, False)


def test_a_run_folder_stands_for_its_configuration(run: Run, api: SimpleNamespace) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/config.resolved.yaml").write_text(CONFIG + "seed: 5\n")
    code, _, err = run("train", "runs/x")
    assert code == 2 and err == "error: runs/x is a run that exists; go on with it: agentrl train runs/x --resume\n"
    assert run("train", "runs/x", "--resume")[0] == 0
    config = api.calls[-1][1][0].config
    assert (config.out, config.name) == (str(Path("runs").absolute()), "x"), "wherever it was made"
    assert config.seed == 5 and api.calls[-1][2]["resume"] is True


def test_flags_may_stand_anywhere(run: Run, api: SimpleNamespace) -> None:
    assert run("train", "--no-color", "--resume", "run.yaml", "--debug", "seed=3")[0] == 0
    assert api.calls[0][1][0].config.seed == 3 and os.environ.pop("NO_COLOR") == "1"


def test_eval_hands_the_run_and_what_is_changed_on(run: Run, api: SimpleNamespace) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/config.resolved.yaml").write_text(CONFIG)
    assert run("eval", "runs/x", "env.options.kind=mixed", "--decode", "greedy", "-n", "64")[0] == 0
    [(name, (source,), named)] = api.calls
    assert name == "evaluate" and source == Path("runs/x") and named["overrides"] == ("env.options.kind=mixed",)
    assert named["decode"] == ("greedy",) and named["n"] == 64
    assert run("eval", "run.yaml", "--endpoint", "http://x/v1", "--endpoint-model", "m", "seed=2")[0] == 0
    assert api.calls[1][1][0].config.seed == 2 and api.calls[1][2]["endpoint_model"] == "m"
    assert api.calls[1][2]["overrides"] == (), "they are in the configuration already"


def test_rollout(run: Run, api: SimpleNamespace) -> None:
    assert run("rollout", "run.yaml", "--out", "new", "-n", "3")[0] == 0
    assert api.calls[0][2]["n"] == 3 and api.calls[0][2]["out"] == Path("new")


def test_export(run: Run, api: SimpleNamespace) -> None:
    code, out, _ = run("export", "hf", "runs/x", "out", "--no-merge")
    assert code == 0 and out == "wrote out\n"
    assert api.calls == [("export", (Path("runs/x"), Path("out")), {"merge": False})]


# -- config --------------------------------------------------------------------------------------


def test_config_show_prints_yaml_that_loads_again(run: Run) -> None:
    code, out, _ = run("config", "show", "run.yaml", "seed=4")
    assert code == 0
    Path("again.yaml").write_text(out)
    assert run("config", "show", "again.yaml")[1] == out
    assert run("config", "diff", "run.yaml", "again.yaml")[1] == "seed: 0 → 4\n"
    assert run("config", "diff", "again.yaml", "again.yaml")[:2] == (0, "")


def test_config_show_origin_names_files_overrides_and_defaults(run: Run) -> None:
    lines = run("config", "show", "run.yaml", "seed=4", "--origin")[1].splitlines()
    found = {line.split(":")[0]: line.rsplit("# ", 1)[1] for line in lines}
    assert found["seed"] == "seed=4" and found["env.id"] == "run.yaml:2" and found["device"] == "default"
    assert found["stages.0.optimizer.lr"] == "run.yaml:9"


def test_config_schema_is_json_schema_with_the_components(run: Run) -> None:
    schema = json.loads(run("config", "schema")[1])
    assert {"env", "model", "stages"} <= set(schema["required"])
    assert schema["properties"]["stages"]["items"]["discriminator"]["mapping"].keys() >= {"sft", "rl"}


def test_the_configurations_that_ship_are_sound(run: Run) -> None:
    root = Path(cli.__file__).parents[2] / "configs"
    shipped = sorted(root.glob("*.yaml"))
    assert shipped
    for path in shipped:
        code, _, err = run("config", "show", str(path))
        assert (code, err) == (0, ""), path


# -- doctor --------------------------------------------------------------------------------------


def test_doctor_describes_the_machine_and_checks_a_configuration(run: Run) -> None:
    code, out, _ = run("doctor", "--config", "run.yaml")
    assert code == 0 and "run.yaml is sound" in out and "torch" in out and "GiB free" in out


@pytest.mark.parametrize("broken", [False, True])
def test_doctor_shows_what_the_cases_found(run: Run, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    from agentrl.chat import doctor

    asked: dict[str, Any] = {}

    def diagnose(folder: Path, **options: Any) -> list[doctor.Finding]:
        asked.update(options, folder=folder)
        return [
            doctor.Finding("unicode", True, "kept"),
            doctor.Finding("thinking", None, "the template drops it in later turns"),
            doctor.Finding("cut turn", not broken, "the end token is added as forced"),
        ]

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    Path("hf.yaml").write_text("model: some/folder\nbase: run.yaml\nchat: {tool_format: hermes}\n")
    code, out, _ = run("doctor", "--config", "hf.yaml")
    assert asked == {"folder": Path("some/folder"), "tool_format": "hermes", "template_options": {}}
    assert "note" in out and "drops it in later turns" in out
    assert (code, "1 broken" in out, "fit for training" in out) == ((1, True, False) if broken else (0, False, True))


def test_doctor_names_a_folder_without_a_tokenizer(run: Run) -> None:
    Path("empty").mkdir()
    code, _, err = run("doctor", "--model", "empty")
    assert code == 2 and err.startswith("error: ") and "empty" in err and err.count("\n") == 1
