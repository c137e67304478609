"""What leaves a run: JSON lines, Parquet, one HTML file, batches for other trainers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from safetensors import safe_open

from agentrl.cli import run as command
from agentrl.store import StoreReader
from agentrl.store.batches import export_batches
from agentrl.trajectory import rows_of

pytestmark = pytest.mark.xdist_group("viewer")


def test_lines_and_parquet_hold_every_trajectory(runs: Path, tmp_path: Path) -> None:
    with StoreReader(runs / "grpo") as reader:
        ids = [entry.id for entry in reader.trajectories(stage="rl", limit=5000).entries]
    for form in ("jsonl", "parquet"):
        out = tmp_path / f"all.{form}"
        assert command(["export", str(runs / "grpo"), str(out), "--format", form, "--stage", "rl"]) == 0
        assert command(["export", str(runs / "grpo"), str(out), "--format", form]) == 2  # it is there already
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    table = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert [line["id"] for line in lines] == [row["id"] for row in table] == ids
    assert "Compute" in lines[0]["prompt"] and lines[0]["credit"]
    assert [json.loads(row["turns"]) for row in table] == [line["turns"] for line in lines]
    assert [row["reward"] for row in table] == [line["reward"] for line in lines]


def test_a_page_of_some(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "some.html"
    assert command(["export", str(runs / "grpo"), str(out), "--format=html", "--stage=rl", "-n", "3"]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.count("<article>") == 3 and "<script" not in text and "default-src 'none'" in text
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ["grpo", "flow"])
@pytest.mark.parametrize("form", ["verl", "trl"])
def test_batches_hold_the_rows_that_trained(runs: Path, tmp_path: Path, name: str, form: str) -> None:
    assert command(["export", str(runs / name), str(tmp_path / "out"), f"--format={form}"]) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["rl-000000.safetensors", "rl-000001.safetensors"]
    with StoreReader(runs / name) as reader, safe_open(files[1], "np") as file:
        got = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
        wanted = [
            (c, row, reader.get(c.id))
            for c in reader.credits(stage="rl", step=1)
            if c.advantages is not None
            for row in rows_of(reader.get(c.id))
        ]
    assert json.loads(about["uid"]) == [c.group_id for c, _, _ in wanted]
    left, right = ("prompts", "responses") if form == "verl" else ("prompt_ids", "completion_ids")
    mask = got["response_mask" if form == "verl" else "tool_mask"]
    logprobs = got["rollout_log_probs" if form == "verl" else "sampling_per_token_logps"]
    assert {array.shape[0] for array in got.values() if array.ndim} == {len(wanted)}
    for i, (credit, row, trajectory) in enumerate(wanted):
        start = int(row.targets[0])
        assert np.array_equal(got[left][i, -start:], row.ids[:start])
        assert np.array_equal(got[right][i, : len(row) - start], row.ids[start:])
        assert np.array_equal(np.flatnonzero(mask[i]), row.targets - start)
        pairs = list(zip(row.turns.tolist(), row.offsets.tolist(), strict=True))
        assert credit.advantages is not None
        assert np.array_equal(got["advantages"][i][mask[i] > 0], [credit.advantages[t][k] for t, k in pairs])
        assert np.array_equal(logprobs[i][mask[i] > 0], [trajectory.turns[t].logprobs[k] for t, k in pairs])
    if form == "verl":
        assert np.array_equal(got["input_ids"], np.concatenate([got[left], got[right]], axis=1))
        assert np.allclose(got["token_level_scores"].sum(axis=1), [c.reward for c, _, _ in wanted])
        assert ("ref_log_prob" in got) == (name == "flow")
    else:
        assert int(got["num_items_in_batch"]) == sum(row.targets.size for _, row, _ in wanted)


@pytest.mark.parametrize("form", ["verl", "trl"])
def test_the_weights_of_shared_tokens_are_in_the_advantages(runs: Path, tmp_path: Path, form: str) -> None:
    assert command(["export", str(runs / "arpo"), str(tmp_path / "out"), f"--format={form}"]) == 0
    fractional, total = 0, 0.0
    for step in range(2):
        with StoreReader(runs / "arpo") as reader:
            credits = [c for c in reader.credits(stage="rl", step=step) if c.advantages is not None]
        wanted = 0.0
        for credit in credits:
            weights = credit.weights or [np.ones_like(a) for a in credit.advantages or ()]
            fractional += sum(int(((w > 0) & (w < 1)).sum()) for w in weights)
            pairs = zip(credit.advantages or (), weights, strict=True)
            wanted += sum(float(np.abs(a * w).sum(dtype=np.float64)) for a, w in pairs)
        with safe_open(tmp_path / f"out/rl-{step:06d}.safetensors", "np") as file:
            mask = file.get_tensor("response_mask" if form == "verl" else "tool_mask")
            got = np.abs(file.get_tensor("advantages") * mask).sum(dtype=np.float64)
            assert file.metadata()["weights"] == "multiplied into advantages"
        assert np.isclose(got, wanted, rtol=1e-5)
        total += wanted
    assert fractional and total


def test_an_export_that_fails_leaves_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for limit in ("-1", "0"):
        assert command(["export", str(runs / "grpo"), str(out), "--format=jsonl", "-n", limit]) == 2
        said = capsys.readouterr().err
        assert "the limit is a number of trajectories from 1 on" in said and "Traceback" not in said
    for form in ("jsonl", "parquet", "html"):
        assert command(["export", str(runs / "grpo"), str(out), f"--format={form}", "--search=!!!"]) == 2
    assert not list(tmp_path.iterdir())


def test_batches_that_fail_leave_nothing(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Path] = []

    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        assert not list((tmp_path / "out").glob("*.safetensors")) or done
        if done:
            raise OSError(28, "No space left on device")
        done.append(Path(path))

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with StoreReader(runs / "grpo") as reader, pytest.raises(OSError, match="No space"):
        export_batches(reader, tmp_path / "out", "trl", stage=None, step=None)
    assert done and done[0].suffix == ".part"
    assert not list((tmp_path / "out").iterdir())


def test_batches_are_whole_steps(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(runs / "grpo"), str(tmp_path / "out"), "--format=trl"]
    assert command([*words, "--split=train", "-n", "3"]) == 2
    assert "--stage and --step, not --split, --limit" in capsys.readouterr().err
    assert command([*words, "--step=1"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rl-000001.safetensors"]
