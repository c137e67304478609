"""An OpenAI-compatible endpoint over real HTTP, on loopback: calls, costs, retries, refusals."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scripted import Door

from agentrl import api
from agentrl.algo.sampler import TaskDraw
from agentrl.errors import RunFailed, UsageError
from agentrl.rollout.endpoint import Endpoint, EndpointActor
from agentrl.rollout.manager import RolloutLimits, RolloutManager
from agentrl.rollout.strategy import FlatRollouts
from agentrl.trajectory import Trajectory, rows_of


class Server:
    """Answers chat completions with what the test prepared, in order."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, body = outer.answers.pop(0)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def say(self, content: str = "", *calls: tuple[str, str], finish: str = "stop", status: int = 200) -> None:
        tool_calls = [
            {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
        message = {"role": "assistant", "content": content, "tool_calls": tool_calls}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        self.answers.append((status, {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def play(server: Server) -> Trajectory:
    async def main() -> Trajectory:
        env = Door()
        manager = RolloutManager(env, limits=RolloutLimits(max_tokens=64, retries=0), seed=0)
        actor = EndpointActor(Endpoint(server.url, "some-model", price_in=1.0, price_out=10.0))
        try:
            task = next(iter(env.tasks("train", 0)))
            (group,) = await manager.run([TaskDraw(task, 1)], actor, stage="eval", strategy=FlatRollouts())
        finally:
            await actor.close()
        return group.members[0].trajectory

    return asyncio.run(main())


def test_an_endpoint_plays_costs_and_never_trains(server: Server) -> None:
    server.say("", ("look", '{"where": "left"}'), ("look", '{"where": "right"}'))
    server.say("key")
    trajectory = play(server)
    assert trajectory.reward == 0.75 and trajectory.source == "endpoint" and trajectory.n_tool_calls == 2
    assert rows_of(trajectory) == [] and trajectory.n_sampled == 0
    assert sum(turn.cost for turn in trajectory.turns) == pytest.approx(2 * (100 * 1.0 + 10 * 10.0) / 1e6)
    assert {tool["function"]["name"] for tool in server.asked[0]["tools"]} >= {"look", "win"}
    answers = [m for m in server.asked[1]["messages"] if m["role"] == "tool"]
    assert [(m["tool_call_id"], m["content"].split()[1]) for m in answers] == [("c0", "left"), ("c1", "right")]


def test_malformed_arguments_are_an_observation(server: Server) -> None:
    server.say("", ("look", "{not json"))
    server.say("key")
    trajectory = play(server)
    assert trajectory.turns[0].error == "parse" and "not valid JSON" in trajectory.turns[0].observation
    assert "not valid JSON" in server.asked[1]["messages"][-1]["content"]
    assert trajectory.reward == 0.75


def test_a_busy_endpoint_is_asked_again(server: Server) -> None:
    server.say(status=503)
    server.say("key")
    assert play(server).reward == 0.75


def test_an_endpoint_that_stays_away_is_infrastructure(server: Server) -> None:
    for _ in range(3):
        server.say(status=500)
    trajectory = play(server)
    assert str(trajectory.outcome) == "failed(infra)" and trajectory.reward is None


def test_a_refused_request_ends_the_run_with_a_sentence(server: Server) -> None:
    server.say(status=401)
    with pytest.raises(UsageError, match="check model and key"):
        play(server)


def test_an_evaluation_says_why_episodes_are_missing(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    def judge() -> dict[str, Any]:
        config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
        (record,) = api.evaluate(
            config,
            overrides=["rollout.retries=0", "rollout.episodes=1"],
            endpoint=server.url,
            endpoint_model="m",
            n=2,
            decode=("sampled",),
        )
        return record

    for _ in range(6):
        server.say("", status=500)
    with pytest.raises(RunFailed, match=r"none of the 2 episodes could be scored; 2 of them: .*does not answer"):
        judge()
    for _ in range(3):
        server.say("", status=500)
    server.say("I do not know")
    record = judge()
    assert (record["n"], record["missing"], record["tokens"], record["success"]) == (1, 1, None, 0.0)
    assert "1 of 2 episodes are missing; 1 of them" in capsys.readouterr().out
