"""The API under requests that nobody meant: schemathesis reads the OpenAPI document and makes them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from agentrl.store import StoreReader
from agentrl.viewer.app import inner_app
from agentrl.viewer.security import Guard

pytestmark = pytest.mark.xdist_group("viewer")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


HOST = {"host": "127.0.0.1:7860"}
OPTIONS = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_the_server(keys: dict[str, str], runs: Path, mode: GenerationMode) -> None:
    """Requests that fit the document, and requests that do not; every other one about a run that is there."""
    with StoreReader(runs / "grpo") as reader:
        entry = reader.trajectories(stage="rl", limit=1).entries[0]
    sound = {"run": keys["grpo"], "id": entry.id, "a": entry.id, "b": entry.id, "group": entry.group_id}
    inner = inner_app([runs])
    inner.state.viewer.replay = lambda *words: ["true"]
    inner.state.viewer.runs.all()
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", Guard(inner), headers=HOST)
    tried: set[str] = set()
    for operation in schema.get_all_operations():
        found = operation.ok()
        if found.path == "/api/live":  # it never ends; test_api.py follows one
            continue

        @OPTIONS
        @given(case=found.as_strategy(generation_mode=mode), there=st.booleans())
        def check(case: Any, there: bool) -> None:
            if there and isinstance(case.query, dict):
                case.query = {**case.query, **{name: sound[name] for name in case.query if name in sound}}
            if there and isinstance(case.body, dict):
                case.body = {**case.body, **{name: sound[name] for name in case.body if name in sound}}
            case.call_and_validate(base_url="http://127.0.0.1:7860", headers=HOST, checks=CHECKS)
            tried.add(case.path)

        try:
            check()
        except Unsatisfiable:  # a route without parameters takes no wrong ones
            continue
    assert len(tried) > 8


WORDS = [
    "", "0", "-1", "1e400", "nan", "inf", "r0", "r9", "../..", "%2e%2e", "\0", "é", "\u202e", "'; DROP TABLE x; --",
    "*", '"', "NEAR(", "a AND", "col:a", "^", "-x", "{", "9" * 30, "added:1", "reward:1:NaN", "reward:1:1e999",
    "step:1:[[[", "all", "latest", "true", "x" * 3000,
]  # fmt: skip


def test_every_parameter_takes_every_word(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    document = client.get("/api/openapi.json").json()
    with StoreReader(runs / "grpo") as reader:
        entry = reader.trajectories(stage="rl", limit=1).entries[0]
    sound = {
        "run": keys["grpo"], "id": entry.id, "a": entry.id, "b": entry.id, "group": entry.group_id, "turn": "0",
        "token": "0", "sha": "0" * 64, "job": "x",
    }  # fmt: skip
    for path, methods in document["paths"].items():
        if "get" not in methods or path == "/api/live":
            continue
        names = [param["name"] for param in methods["get"]["parameters"]]
        base = {name: sound[name] for name in names if name in sound}
        for name in names:
            for word in WORDS:
                found = client.get(path, params={**base, name: word})
                assert found.status_code < 500, (path, name, word, found.text)
                if found.status_code >= 400:
                    assert found.json()["error"]
        assert client.get(path, params={**base, "unheard": "1"}).status_code == 400
