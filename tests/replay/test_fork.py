"""Branches: recorded turns to the letter, then somebody else; recorded, and replayable themselves."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agentrl
from agentrl.errors import UsageError
from agentrl.replay.retelling import Twins
from agentrl.store import StoreReader
from agentrl.trajectory import Span, Trajectory, as_ids, ids_of, rows_of

SPEC = f"{Path(__file__).parent / 'wayward.py'}:Wayward"


@pytest.fixture
def parent(trained: Path) -> Trajectory:
    """An episode of the trained run that called the tool before it answered."""
    with StoreReader(trained) as reader:
        entries = reader.trajectories(stage="rl", limit=1000).entries
        return reader.get(next(e.id for e in entries if e.n_turns >= 2 and e.n_calls and not e.parent))


def test_a_branch_goes_on_with_the_runs_policy(trained: Path, parent: Trajectory, tmp_path: Path, said: Any) -> None:
    out = tmp_path / "branch"
    words = ("--from-turn", 1, "--out", out, "--checkpoint", "last")
    code, text = said("replay", f"{trained}/{parent.id}", *words)
    assert code == 0 and f"recorded in {out}" in text
    with StoreReader(out) as reader:
        (root, entry) = reader.trajectories().entries
        kept, branch = reader.get(root.id), reader.get(entry.id)
    assert root.id == parent.id and branch.id.rpartition(".")[0] == parent.id
    assert branch.fork is not None and (branch.fork.parent, branch.fork.turn) == (parent.id, 1)
    assert branch.fork.tokens == ids_of(parent.turns[1].context).size
    assert branch.extra["forked"]["run"] == str(trained)
    mine, theirs = branch.turns[0], parent.turns[0]
    assert ids_of(mine.context).tolist() == ids_of(theirs.context).tolist()
    assert np.array_equal(mine.logprobs, theirs.logprobs) and mine.seconds == theirs.seconds
    assert ids_of(branch.turns[1].context).tolist() == ids_of(parent.turns[1].context).tolist()
    assert len(rows_of(branch)) == 1, "the context was appended to"
    shared = {id(span) for turn in kept.turns[:2] for span in (*(p.span for p in turn.context), *turn.output)}
    assert shared
    assert agentrl.replay(out).counts["same"] == 2


def test_what_branch_and_parent_share_is_stored_once(trained: Path, parent: Trajectory, tmp_path: Path) -> None:
    branch = agentrl.fork(trained, parent.id, turn=1, out=tmp_path / "a", checkpoint="last")
    known = {id(p.span) for p in branch.turns[0].context} | {id(span) for span in branch.turns[0].output}
    first = [piece for piece in branch.turns[1].context if id(piece.span) in known]
    assert sum(len(piece) for piece in first) == sum(
        len(each) for each in (*branch.turns[0].context, *branch.turns[0].output)
    )
    with StoreReader(tmp_path / "a") as reader:
        sizes = dict(reader._rows("SELECT id, n_tokens FROM trajectories"))
        lengths = dict(reader._rows("SELECT id, tokens_length FROM trajectories"))
    assert sizes[branch.id] > 0
    words = sum(len(span) for span in branch.spans() if id(span) not in known)
    assert words < sum(len(span) for span in branch.spans()) / 2
    assert lengths[branch.id] < lengths[parent.id]


def test_a_branch_can_be_branched(trained: Path, parent: Trajectory, tmp_path: Path) -> None:
    one = agentrl.fork(trained, parent.id, turn=1, out=tmp_path / "one", say='calc(a=2, op="*", b=3)')
    two = agentrl.fork(tmp_path / "one", one.id, turn=2, out=tmp_path / "two", say="The answer is 6.")
    assert two.id == f"{one.id}.1" and two.fork is not None and two.fork.parent == one.id
    assert [turn.actor for turn in two.turns] == ["policy", "person", "person"]
    assert two.outcome.kind == "completed" and two.reward is not None
    assert agentrl.replay(tmp_path / "two").counts["same"] == 2


def test_a_persons_call_is_run_and_the_branch_stops(
    trained: Path, parent: Trajectory, tmp_path: Path, said: Any
) -> None:
    out = tmp_path / "said"
    say = 'calc(a=20, op="+", b=3)'
    code, text = said("replay", f"{trained}/{parent.id}", "--from-turn", 0, "--out", out, "--say", say)
    assert code == 0 and "person" in text and "23" in text
    with StoreReader(out) as reader:
        branch = reader.get(f"{parent.id}.{1 + _branches(trained, parent.id)}")
    (turn,) = branch.turns
    assert turn.tools[0].result.text == "23" and turn.actor == "person"
    assert [span.origin for span in turn.output] == ["teacher"] and turn.n_sampled == 0
    assert branch.source == "teacher" and branch.outcome.why == "turns"
    assert rows_of(branch) == []


def _branches(run: Path, id: str) -> int:
    with StoreReader(run) as reader:
        number = 0
        while reader.attempt(f"{id}.{number + 1}") >= 0:
            number += 1
        return number


def test_a_policy_goes_on_after_a_persons_words(trained: Path, parent: Trajectory, tmp_path: Path) -> None:
    say = 'calc(a=20, op="+", b=3)'
    branch = agentrl.fork(trained, parent.id, turn=1, out=tmp_path / "on", say=say, checkpoint="last", temperature=0.0)
    assert [turn.actor for turn in branch.turns[:3]] == ["policy", "person", "policy"]
    assert branch.source == "policy"
    (row,) = rows_of(branch)
    assert set(row.turns.tolist()) == {0, *range(2, len(branch.turns))}, "what a person said is not trained"


@pytest.fixture
def secretive(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run one of whose settings came from the surroundings, as the loader keeps it."""
    run = tmp_path / "secretive"
    shutil.copytree(trained, run)
    text = (run / "config.resolved.yaml").read_text()
    (run / "config.resolved.yaml").write_text(text.replace("name: small\n", "name: ${env:QUIET}\n"))
    monkeypatch.setenv("QUIET", "hunter2-hunter2")
    return run


@pytest.mark.parametrize("model", [False, True], ids=["the run's own", "a folder"])
def test_what_stood_in_the_surroundings_is_not_written_down(
    secretive: Path, parent: Trajectory, tmp_path: Path, model: bool
) -> None:
    given: dict[str, Any] = {"model": agentrl.export(secretive, tmp_path / "hf")} if model else {"say": "hello"}
    agentrl.fork(secretive, parent.id, turn=1, out=tmp_path / "branch", **given)
    written = (tmp_path / "branch" / "config.resolved.yaml").read_text()
    assert "name: ${env:QUIET}" in written and "hunter2" not in written
    assert (str(tmp_path / "hf") in written) is model
    assert agentrl.replay(tmp_path / "branch").counts["same"] == 2


def test_a_recording_writes_no_secret_either(secretive: Path, tmp_path: Path) -> None:
    agentrl.rollout(secretive, out=tmp_path / "played", checkpoint="last", n=1)
    written = (tmp_path / "played" / "config.resolved.yaml").read_text()
    assert "name: ${env:QUIET}" in written and "hunter2" not in written


def test_a_model_folder_goes_on(trained: Path, parent: Trajectory, tmp_path: Path) -> None:
    folder = agentrl.export(trained, tmp_path / "model")
    branch = agentrl.fork(trained, parent.id, turn=1, out=tmp_path / "b", model=folder)
    assert len(branch.turns) >= 2 and agentrl.replay(tmp_path / "b").counts["same"] == 2


def test_a_model_with_another_tokenizer_is_refused(
    trained: Path, parent: Trajectory, tmp_path: Path, said: Any
) -> None:
    folder = agentrl.export(trained, tmp_path / "model")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    words = spec["model"]["vocab"]
    used = {int(i) for i in ids_of(parent.turns[0].context)}
    text = {number: word for word, number in words.items()}
    one, other = sorted(i for i in used if i in text and len(text[i]) == 1)[:2]
    words[text[one]], words[text[other]] = other, one
    path.write_text(json.dumps(spec))
    code, heard = said("replay", f"{trained}/{parent.id}", "--from-turn", 1, "--out", tmp_path / "b", "--model", folder)
    assert code == 2 and "has another tokenizer than the record" in heard
    assert not (tmp_path / "b").exists(), "the same command can be given again"


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A chat server that answers every message with the same words."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            choice = {"message": {"role": "assistant", "content": "The answer is 7."}, "finish_reason": "stop"}
            data = json.dumps({"choices": [choice], "usage": {}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()
    http.server_close()


def test_an_endpoint_goes_on_and_reads_the_recorded_turns(
    trained: Path, parent: Trajectory, tmp_path: Path, said: Any, endpoint: tuple[str, list[dict[str, Any]]]
) -> None:
    url, asked = endpoint
    out = tmp_path / "there"
    words = ("--from-turn", 1, "--out", out, "--endpoint", url, "--endpoint-model", "some")
    code, text = said("replay", f"{trained}/{parent.id}", *words)
    assert code == 0 and "The answer is 7." in text
    (body,) = asked
    user, assistant, *results = body["messages"]
    use = parent.turns[0].tools[0]
    assert user["role"] == "user" and assistant["tool_calls"][0]["function"]["name"] == use.call.name
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == dict(use.call.arguments)
    assert results[0]["content"] == use.result.text
    assert results[0]["tool_call_id"] == assistant["tool_calls"][0]["id"]
    with StoreReader(out) as reader:
        branch = reader.get(reader.trajectories().entries[1].id)
    assert branch.turns[0].output and not branch.turns[1].output and branch.source == "endpoint"
    assert agentrl.replay(out).counts["same"] == 2
    with pytest.raises(UsageError, match="no token ids"):
        agentrl.fork(out, branch.id, turn=2, out=tmp_path / "no", say="The answer is 1.")


def test_a_prefix_that_comes_out_otherwise_cannot_be_forked(record: Any, said: Any, tmp_path: Path) -> None:
    from agentrl.train.options import ScratchTokenizer
    from agentrl.train.tokenizer import bootstrap_tokenizer

    run = record({"id": SPEC, "options": {"kind": "count"}}, 1)
    bootstrap_tokenizer(ScratchTokenizer()).save_pretrained(str(run / "tokenizer"))
    source, out = f"{run}/sft-0-demo/train0/0", tmp_path / "b"
    code, text = said("replay", source, "--from-turn", 2, "--out", out, "--say", "key")
    assert code == 1 and "turn 1, call 1 (count), result: recorded call 1" in text
    assert not out.exists()
    code, text = said("replay", source, "--from-turn", 1, "--out", out, "--say", "key")
    assert code == 0, text
    with StoreReader(out) as reader:
        branch = reader.get("sft-0-demo/train0/0.1")
    assert branch.success and branch.reward == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--from-turn", 99), "--from-turn is from 0 to"),
        (("--from-turn", 1, "--model", "m", "--checkpoint", "last"), "name different speakers"),
        (("--from-turn", 1, "--endpoint", "http://127.0.0.1:1/v1"), "belong together"),
        (("--from-turn", 1, "--say", " "), "--say is empty"),
        (("--from-turn", 1, "--say", "calc(1, 2, 3, 4)"), "calc takes 3 arguments"),
        (("--from-turn", 1, "--say", "x", "--temperature", 1), "belongs to a policy that goes on"),
        (("--from-turn", 1, "--checkpoint", "no"), "is not a checkpoint"),
        (("--from-turn", 1, "--model", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_begin_is_one_sentence_and_leaves_no_folder(
    words: tuple[Any, ...], sentence: str, trained: Path, parent: Trajectory, tmp_path: Path, said: Any
) -> None:
    code, text = said("replay", f"{trained}/{parent.id}", *words, "--out", tmp_path / "b")
    assert code == 2 and sentence in text, text
    assert not (tmp_path / "b").exists()


def test_the_last_turn_is_the_latest_to_fork_from(trained: Path, parent: Trajectory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is over \(completed\)"):
        agentrl.fork(trained, parent.id, turn=len(parent.turns), out=tmp_path / "b", say="x")


def test_a_context_that_is_rebuilt_every_turn_is_retold(record: Any, tmp_path: Path) -> None:
    from agentrl.train.options import ScratchTokenizer
    from agentrl.train.tokenizer import bootstrap_tokenizer

    optimizer = {"optimizer": {"lr": 1e-3}}
    stages = [{"type": "sft", "steps": 1, **optimizer}, {"type": "rl", "steps": 1, "context": "memory", **optimizer}]
    run = record(SPEC, 1, stages=stages)
    bootstrap_tokenizer(ScratchTokenizer()).save_pretrained(str(run / "tokenizer"))
    branch = agentrl.fork(run, turn=2, out=tmp_path / "b", say="key")
    with StoreReader(run) as reader:
        (kept,) = (reader.get(entry.id) for entry in reader.trajectories().entries)
    assert ids_of(branch.turns[2].context).tolist() == ids_of(kept.turns[2].context).tolist()
    assert branch.success and agentrl.replay(tmp_path / "b").counts["same"] == 2


def test_twins_translate_any_cut_of_the_same_ids() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, 9, size=int(rng.integers(1, 30)))

        def pieces(cuts: list[int]) -> tuple[Any, ...]:
            edges = [0, *cuts, ids.size]  # noqa: B023
            made = []
            for start, stop in itertools.pairwise(edges):
                pad = int(rng.integers(0, 3))
                span = Span(as_ids([0] * pad + ids[start:stop].tolist()), "user", "template")  # noqa: B023
                made.append(span[pad:])
            return tuple(made)

        mine, recorded = (pieces(sorted(rng.integers(0, ids.size, size=3).tolist())) for _ in range(2))
        twins = Twins()
        twins.learn(mine, recorded)
        found = twins.of(mine)
        assert ids_of(found).tolist() == ids.tolist()
        known = {id(piece.span) for piece in recorded}
        assert all(id(piece.span) in known for piece in found if len(piece))


def test_an_endpoint_that_is_away_is_said_and_nothing_is_left(
    trained: Path, parent: Trajectory, tmp_path: Path, said: Any
) -> None:
    there = ("--endpoint", "http://127.0.0.1:9/v1", "--endpoint-model", "nobody")
    code, text = said("replay", f"{trained}/{parent.id}", "--from-turn", 1, "--out", tmp_path / "out", *there)
    assert code == 1 and f"{parent.id} cannot go on from turn 1, failed(infra): the endpoint http://127.0.0.1:9" in text
    assert not (tmp_path / "out").exists()
