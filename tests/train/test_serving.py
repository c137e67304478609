"""What a configuration may ask of servers: no key that does nothing, no secret that is kept."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from agentrl.config import Config, parse
from agentrl.console import make_reporter
from agentrl.env import Env
from agentrl.errors import RunFailed, UsageError
from agentrl.loader import ConfigError, as_text, load
from agentrl.store import RunFolder
from agentrl.train.evaluation import check_played, why_missing
from agentrl.train.parts import make_env
from agentrl.train.plan import check, check_engine
from agentrl.train.serving import patience_of
from agentrl.train.trainer import Trainer
from agentrl.trajectory import Group, Member, Outcome, Trajectory

ENV = """
from agentrl import Env, Task

class Silent(Env):
    def tasks(self, split, seed):
        yield Task("t", "Say something.")

    def score(self, episode):
        return 1.0
"""


def config(engine: dict[str, Any], *, staleness: int = 0, turn: float = 300.0, **more: Any) -> Config:
    launch = engine.get("launch", {})
    if "urls" not in engine:
        engine = engine | {"launch": {"python": sys.executable} | launch}
    return parse(
        {
            "env": "maze",
            "model": "m",
            "engine": {"type": "sglang"} | engine,
            "rollout": {"deadlines": {"tool": 1, "turn": turn, "episode": 2000}},
            "stages": [{"type": "rl", "steps": 1, "max_staleness": staleness, "optimizer": {"lr": 1e-3}}],
        }
        | more
    )


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ({"launch": {"device": "cpu"}, "sleep": True}, r"engine\.sleep: servers on a CPU"),
        ({"in_flight": "in_place"}, r"engine\.in_flight: no update meets"),
        ({"patience": 300.0}, r"engine\.patience: a server that hangs is noticed after 300 s"),
        ({"launch": {"device": "cuda", "servers": 2}}, r"memory_fraction: 2 servers .* at most 0\.5$"),
        ({"launch": {"device": "cpu", "memory_fraction": 0.5}}, "memory_fraction does nothing with device: cpu"),
        ({"launch": {"device": "cuda", "cores": 2}}, "cores does nothing with device: cuda"),
        ({"launch": {}, "api_key": "k"}, "api_key is for servers in urls"),
        ({"urls": ["http://h:1"], "api_key": "k\n"}, "perhaps the end of a line"),
        ({"urls": ["http://h:99999"]}, "is no server's address"),
        ({"launch": {"device": "cuda", "flags": ["--tp", "64"]}}, r"engine\.launch\.flags: .* ask for 64 accelerators"),
        ({"router": "manual"}, "router: manual does nothing with one server"),
        ({"router": "manual", "launch": {"servers": 2}, "sync": "adapter"}, "with sync: adapter each server"),
        ({"router": "cache_aware", "launch": {"servers": 2}, "in_flight": "in_place"}, "with in_flight: in_place each"),
        (
            {"router": "manual", "urls": ["http://h:1", "http://h:2"], "api_key": "k"},
            "is not given the servers' api_key",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(engine: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        check_engine(config(engine))
    assert "k\\n" not in str(raised.value)


def test_what_does_something_is_taken() -> None:
    check_engine(config({"in_flight": "in_place"}, staleness=1))
    check_engine(config({"launch": {"device": "cuda", "servers": 2, "memory_fraction": 0.4}, "sleep": True}))
    check_engine(config({"launch": {"device": "cpu", "servers": 2}, "router": "cache_aware"}))


def test_servers_with_accelerators_of_their_own_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_engine(config({"launch": {"device": "cuda", "servers": 2}}))
    with pytest.raises(ValueError, match=r"2 servers that take 0\.85 of one accelerator each"):
        check_engine(config({"launch": {"device": "cuda", "servers": 3}}))


def test_a_hung_server_is_noticed_before_its_turns_are_scored() -> None:
    for turn, expected in ((300.0, 60.0), (60.0, 30.0)):
        made = config({}, turn=turn)
        check_engine(made)
        assert patience_of(made, made.engine) == expected  # type: ignore[arg-type]


def test_chaos_that_strikes_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text(ENV)
    for chaos, sentence in (({"seconds": 2.0}, "seconds does nothing without slow"), ({"tools": 0.5}, "has no tools")):
        with pytest.raises(ValueError, match=sentence):
            check(config({}, env=f"{tmp_path}/silent.py:Silent", chaos=chaos, model={"arch": {"model_type": "qwen3"}}))


def test_a_secret_is_named_and_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "s3cret")
    (tmp_path / "silent.py").write_text(ENV)
    file = tmp_path / "run.yaml"
    text = f"""
env: {tmp_path}/silent.py:Silent
model: m
engine: {{type: sglang, urls: ["http://h:1"], api_key: KEY}}
stages: [{{type: rl, steps: 1, optimizer: {{lr: 0.001}}}}]
"""
    file.write_text(text.replace("KEY", "'${env:A_KEY}'"))
    loaded = load([file])
    assert loaded.config.engine.api_key.get_secret_value() == "s3cret"
    assert "${env:A_KEY}" in loaded.yaml and "s3cret" not in loaded.yaml + repr(loaded.config)
    again = tmp_path / "config.resolved.yaml"
    again.write_text(loaded.yaml)
    assert load([again]).config == loaded.config
    again.write_text(as_text(loaded.config))  # made in Python: it does not say where the secret came from
    assert load([again]).config.engine.api_key is None and "s3cret" not in again.read_text()
    file.write_text(text.replace("KEY", "s3cret"))
    with pytest.raises(ConfigError, match=r"run.yaml:4: engine.api_key is a secret.*\$\{env:API_KEY\}") as raised:
        load([file])
    assert "s3cret" not in str(raised.value)
    with pytest.raises(UsageError, match=r"engine\.api_key is a secret"):
        load([again], ["engine.api_key=s3cret"])


def test_what_was_opened_is_closed_where_a_run_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    async def close(self: Env) -> None:
        closed.append(type(self).__name__)

    (tmp_path / "silent.py").write_text(ENV)
    made = config({"urls": ["http://h:1"]}, env=f"{tmp_path}/silent.py:Silent", out=str(tmp_path), eval=None)
    monkeypatch.setattr(type(make_env(made)), "close", close)
    with RunFolder.create(tmp_path / "run", "{}", config_version=1, command=()) as folder:
        trainer = Trainer(made, folder, make_reporter())
        with pytest.raises(UsageError, match="m"):  # there is no such model
            asyncio.run(trainer.run())
    assert closed == ["Silent"]


def test_a_step_that_infrastructure_failed_altogether_ends_the_run() -> None:
    def group(*outcomes: Outcome) -> Group:
        played = (
            Trajectory(f"rl-0/t/{n}", "rl-0/t", "t", (), outcome, 0, env="e", reward=None if outcome.missing else 1.0)
            for n, outcome in enumerate(outcomes)
        )
        return Group("rl-0/t", "t", [Member(trajectory, "policy") for trajectory in played])

    broken, fine = Outcome("failed", "infra", "the server said 400"), Outcome("completed")
    check_played([group(broken, fine), group(broken)])
    check_played([])
    assert why_missing([group(fine)]) == ("", 0)
    with pytest.raises(RunFailed, match="failed all 3 episodes of a step; 3 of them: the server said 400"):
        check_played([group(broken, broken), group(broken)])
