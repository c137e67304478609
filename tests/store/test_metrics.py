"""Metrics are valid JSON lines that survive crashes and resumes; a summary holds what it must."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import RunFailed, UsageError
from agentrl.metrics import Metrics, Summary, canonical_metrics, has_wandb_key, read_metrics, wilson


@pytest.fixture
def no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def strict(text: str) -> Any:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_lines_are_strict_json_with_sorted_keys(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.log(1, "rl", {"z": 1.5, "a": math.nan, "b": math.inf, "c": -math.inf, "n": 3, "time/rollout": 0.1})
    (text,) = metrics.path.read_text().splitlines()
    line = strict(text)
    assert list(line) == sorted(line)
    assert (line["a"], line["b"], line["c"], line["n"], line["step"]) == ("NaN", "Infinity", "-Infinity", 3, 1)
    (back,) = read_metrics(metrics.path)
    assert math.isnan(back["a"]) and back["b"] == math.inf and back["c"] == -math.inf and back["stage"] == "rl"
    with Metrics(tmp_path) as metrics, pytest.raises(ValueError, match=r"\['step'\]"):
        metrics.log(1, "rl", {"step": 2})


def test_only_clocks_differ_between_equal_runs(tmp_path: Path) -> None:
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        with Metrics(tmp_path / name) as metrics:
            metrics.log(1, "rl", {"loss": 0.5, "time/step": seconds, "speed/tokens": 1 / seconds})
    one, other = (tmp_path / name / "metrics.jsonl" for name in "ab")
    assert one.read_bytes() != other.read_bytes()
    assert canonical_metrics(one) == canonical_metrics(other) == b'{"loss": 0.5, "stage": "rl", "step": 1}\n'


def test_a_restored_run_takes_back_what_lies_beyond(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for stage in ("sft", "rl", "rl2"):
            for step in (1, 2, 3):
                metrics.log(step, stage, {"x": step})
                metrics.log(step, f"{stage}-eval", {"y": step})
        assert metrics.rewind(["sft", "rl", "rl2"], 1, 2) == 8
        metrics.log(3, "rl", {"x": 33})
        assert metrics.rewind(["sft", "rl", "rl2"], 1, 3) == 0
    places = [(line["stage"], line["step"]) for line in read_metrics(metrics.path)]
    assert places == [
        *((name, step) for step in (1, 2, 3) for name in ("sft", "sft-eval")),
        *((name, step) for step in (1, 2) for name in ("rl", "rl-eval")),
        ("rl", 3),
    ]
    cut = [json.loads(line) for line in (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in cut][:3] == [("rl", 3), ("rl-eval", 3), ("rl2", 1)]
    assert len(cut) == 8


def test_a_line_that_a_crash_tore_is_cut(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.log(1, "rl", {"x": 1})
    with metrics.path.open("a") as file:
        file.write('{"loss": 0.')
    assert len(read_metrics(metrics.path)) == 1
    with Metrics(tmp_path) as metrics:
        metrics.log(2, "rl", {"x": 2})
    assert [line["step"] for line in read_metrics(metrics.path)] == [1, 2]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Metrics(tmp_path) as metrics, monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunFailed, match=r"cannot write .*metrics.jsonl: No space left on device"):
            metrics.log(1, "rl", {"x": 1})


def test_tensorboard_reads_what_was_logged_and_hides_what_was_taken_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, tensorboard=True) as metrics:
        for step in range(1, 6):
            metrics.log(step, "rl", {"loss": float(step)})
        metrics.rewind(["rl"], 0, 3)
        metrics.log(4, "rl", {"loss": 40.0})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rl"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.usefixtures("no_wandb_key")
def test_wandb_is_offline_without_a_key(tmp_path: Path) -> None:
    with Metrics(tmp_path, wandb="auto", config={"seed": 0}) as metrics:
        metrics.log(1, "rl", {"loss": 0.5})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    deadline = time.monotonic() + 60  # wandb's own process may write on after `finish`
    while b"rl/loss" not in log.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not has_wandb_key()
    with pytest.raises(UsageError, match=r"no key is set; set WANDB_API_KEY, or choose wandb offline"):
        Metrics(tmp_path, wandb="online")


def test_a_key_is_found_in_the_environment_or_in_netrc(
    no_wandb_key: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert has_wandb_key()


@pytest.mark.parametrize(("options", "extra"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "auto"}, "wandb")])
def test_a_missing_package_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], extra: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name in ("wandb", "torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=rf'pip install "agentrl-framework\[{extra}\]"'):
        Metrics(tmp_path, **options)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_set_of_proportions_that_the_data_do_not_reject(case: tuple[int, int]) -> None:
    k, n = case
    low, high = wilson(k, n)
    assert 0 <= low <= (k / n if n else 0.5) <= high <= 1
    for p in (low, high):
        if n and 0 < p < 1:
            assert abs(k / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-5, abs=1e-9)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_by_hand_and_impossible_counts() -> None:
    assert wilson(90, 100) == pytest.approx((0.825634, 0.944771), abs=1e-6)
    with pytest.raises(ValueError, match="no proportion"):
        wilson(3, 2)


RECORD = {
    "stage": "rl", "step": 50, "decode": "greedy", "n": 100, "success": 0.9, "ci95": list(wilson(90, 100)),
    "mean_reward": math.nan, "tool_calls": 2.0, "tokens": 60.0, "extra": {"pass": (1, math.inf)},
}  # fmt: skip
THROUGHPUT = {"gen_tok_s": 5800.0, "train_tok_s": None, "episodes_s": 200.0}


def test_a_summary_is_written_whole_and_in_strict_json(tmp_path: Path) -> None:
    summary = Summary("completed", 104.5, 50, [RECORD], THROUGHPUT, {"python": "3.11"})
    summary.write(tmp_path)
    found = strict((tmp_path / "summary.json").read_text())
    assert list(found) == ["status", "wall_s", "steps", "eval", "throughput", "versions"]
    assert found["eval"][0]["mean_reward"] is None and found["eval"][0]["extra"] == {"pass": [1, None]}
    assert found["eval"][0]["ci95"] == list(wilson(90, 100))
    assert Summary.read(tmp_path).throughput == THROUGHPUT
    with pytest.raises(UsageError, match=r"has no summary\.json"):
        Summary.read(tmp_path / "absent")


def test_a_summary_that_lacks_a_field_is_refused() -> None:
    lacking = {name: value for name, value in RECORD.items() if name != "ci95"}
    with pytest.raises(ValueError, match=r"an eval record of a summary lacks \['ci95'\]"):
        Summary("completed", 1.0, 1, [lacking], THROUGHPUT, {})
    with pytest.raises(ValueError, match="throughput of a summary lacks"):
        Summary("failed", 1.0, 1, [], {"gen_tok_s": 1.0}, {})
