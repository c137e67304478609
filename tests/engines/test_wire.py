"""What servers may answer, and what the clients make of it: the wire formats, good and bad, over real HTTP."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from agentrl.chaos import Chaos, ChaosOptions
from agentrl.content import Image
from agentrl.engines import Request
from agentrl.engines.http import Refused
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.errors import InfraError, UsageError
from agentrl.trajectory import Sampling, VersionRun, as_ids

Answers = dict[str, tuple[int, str]]
REQUEST = Request(as_ids([1, 2]), Sampling(max_tokens=4), "s")
GOOD: dict[str, Any] = {
    "output_ids": [7, 8],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 8},
        "output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        "cached_tokens": 1,
    },
}


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """Starts a server with the given (status, body) by path, and returns its URL. `heard` gets the bodies."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answers: Answers, heard: list[Any] | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if heard is not None and asked:
                    heard.append(json.loads(asked))
                status, body = answers.get(self.path.partition("?")[0], (404, '{"detail": "Not Found"}'))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(made: Any, call: Callable[[Any], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await call(made)
        finally:
            await made.close()

    return asyncio.run(main())


def sglang(**about: Any) -> Answers:
    models = {"data": [{"max_model_len": 512}]}
    facts = {"version": "0.5.23", "model_path": "/m", "max_req_input_len": 506} | about
    return {"/server_info": (200, json.dumps(facts)), "/v1/models": (200, json.dumps(models))}


def test_a_reply_with_two_versions(answering: Any) -> None:
    url = answering({"/generate": (200, json.dumps(GOOD))})
    reply = ask(SGLangServer(url), lambda server: server.generate(REQUEST, "r", 4))
    assert reply.ids.tolist() == [7, 8] and reply.logprobs.tolist() == [-0.5, -0.25]
    assert reply.versions == (VersionRun(3, 0, 1), VersionRun(4, 1, 2)) and reply.cached_tokens == 1


LOW_FIRST = {"enable_priority_scheduling": True, "schedule_low_priority_values_first": True}


@pytest.mark.parametrize(("facts", "said"), [({}, None), ({"enable_priority_scheduling": True}, 7), (LOW_FIRST, -7)])
def test_sglang_is_told_a_priority_where_it_heeds_any(facts: dict[str, Any], said: int | None, answering: Any) -> None:
    heard: list[Any] = []
    url = answering(sglang(**facts) | {"/generate": (200, json.dumps(GOOD))}, heard)

    async def call(server: SGLangServer) -> bool:
        found = await server.info()
        await server.generate(replace(REQUEST, priority=7), "r", 4)
        return found.priorities

    assert ask(SGLangServer(url), call) == bool(facts)
    assert [body.get("priority") for body in heard] == [said]


@pytest.mark.parametrize(("policy", "said"), [("priority", -7), ("fcfs", None), (None, None)])
def test_vllm_is_told_a_priority_where_it_heeds_any(policy: str | None, said: int | None, answering: Any) -> None:
    heard: list[Any] = []
    choice = {"token_ids": [7], "logprobs": {"content": [{"logprob": -0.5}]}, "finish_reason": "stop"}
    answers: Answers = {
        "/version": (200, '{"version": "0.32.0"}'),
        "/v1/models": (200, '{"data": [{"id": "m", "max_model_len": 512}]}'),
        "/inference/v1/generate": (200, json.dumps({"choices": [choice]})),
        **{path: (200, "{}") for path in ("/is_paused", "/weight_info", "/metrics")},
    }
    if policy is not None:
        about = {"vllm_config": {"scheduler_config": {"policy": policy}}}
        answers["/server_info"] = (200, json.dumps(about))

    async def call(server: VLLMServer) -> bool:
        found = await server.info()
        await server.generate(replace(REQUEST, priority=7), "r", 4)
        return found.priorities

    assert ask(VLLMServer(answering(answers, heard)), call) == (policy == "priority")
    assert [body.get("priority") for body in heard] == [said]


@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"message": "no such thing"}}',
        '{"error": "no such thing"}',
        '{"object": "error", "message": "no such thing", "code": 400}',
        '{"detail": "no such thing"}',
        "no such thing",
    ],
)
def test_errors_in_every_shape_keep_their_sentence(body: str, answering: Any) -> None:
    url = answering({"/generate": (400, body)})
    with pytest.raises(Refused) as caught:
        ask(SGLangServer(url), lambda server: server.generate(REQUEST, "r", 4))
    assert caught.value.said == "no such thing" and caught.value.status == 400


PICTURED = Request(as_ids([1, 9, 9, 9, 2]), Sampling(max_tokens=4), "s", images=(Image(b"x"),), places=((1, 4),))
SAID = {
    "finish_reason": "stop",
    "token_ids": [7],
    "logprobs": {"content": [{"logprob": -0.5}]},
    "weight_versions": [{"version": "3", "start": 0, "end": 1}],
}


@pytest.mark.parametrize(
    ("made", "path", "good"),
    [
        (SGLangServer, "/generate", GOOD),
        (VLLMServer, "/inference/v1/generate", {"choices": [SAID]}),
    ],
)
def test_a_server_must_read_the_ids_of_the_record(made: Any, path: str, good: Any, answering: Any) -> None:
    assert PICTURED.folded == [1, 9, 2]

    def reply(**more: Any) -> Any:
        url = answering({path: (200, json.dumps(good | more))})
        return ask(made(url), lambda server: server.generate(PICTURED, "r", 4))

    assert reply(prompt_token_ids=[1, 9, 9, 9, 2]).ids.size
    with pytest.raises(UsageError, match="read 4 ids where the record has 5, or others, for a context with 1"):
        reply(prompt_token_ids=[1, 9, 9, 2])
    with pytest.raises(UsageError, match="too old for vision models"):
        reply()


def test_pictures_and_their_places_belong_together() -> None:
    with pytest.raises(ValueError, match="a request with 1 pictures names 0 places"):
        Request(as_ids([1, 2]), Sampling(), "s", images=(Image(b"x"),))


@pytest.mark.parametrize(("sees", "said"), [(True, True), (False, False), (None, False)])
def test_whether_a_model_takes_pictures(sees: bool | None, said: bool, answering: Any) -> None:
    told = {} if sees is None else {"/model_info": (200, json.dumps({"has_image_understanding": sees}))}
    url = answering(sglang() | told)
    assert ask(SGLangServer(url), lambda server: server.info()).images is said


def test_a_model_of_text_is_sent_no_picture(answering: Any) -> None:
    async def main() -> None:
        engine = await RemoteEngine.connect([SGLangServer(answering(sglang()))], vocab=10)
        try:
            await engine.generate(PICTURED)
        finally:
            await engine.close()

    with pytest.raises(UsageError, match="serves a model of text, which would ignore the request's pictures"):
        asyncio.run(main())


@pytest.mark.parametrize(
    "change",
    [
        {"output_ids": [7]},
        {"output_ids": [7, 9]},
        {"meta_info": GOOD["meta_info"] | {"finish_reason": None}},
        {"meta_info": GOOD["meta_info"] | {"weight_versions": [{"version": "3", "start": 1, "end": 2}]}},
        {"meta_info": {}},
    ],
)
def test_what_is_no_reply_is_the_machinery_s_fault(change: dict[str, Any], answering: Any) -> None:
    url = answering({"/generate": (200, json.dumps(GOOD | change))})
    with pytest.raises(InfraError, match="answered /generate with something else"):
        ask(SGLangServer(url), lambda server: server.generate(REQUEST, "r", 4))


def test_servers_that_will_not_do(answering: Any) -> None:
    old = answering(sglang(version="0.4.9"))
    with pytest.raises(UsageError, match=r"SGLang 0\.4\.9 at .* is too old: /pause_generation .* 0\.5\.20 or newer"):
        ask(SGLangServer(old), lambda server: server.info())
    with pytest.raises(UsageError, match="is no SGLang server"):
        ask(SGLangServer(answering({})), lambda server: server.info())
    vllm: Answers = {
        "/version": (200, '{"version": "0.20.0"}'),
        "/v1/models": (200, '{"data": [{"id": "m", "max_model_len": 512}]}'),
        "/is_paused": (200, "false"),
    }
    with pytest.raises(UsageError, match=r"\(0\.20\.0\) has no /weight_info: it needs a newer vLLM"):
        ask(VLLMServer(answering(vllm)), lambda server: server.info())
    del vllm["/is_paused"]
    with pytest.raises(UsageError, match="has no /is_paused: it needs VLLM_SERVER_DEV_MODE=1"):
        ask(VLLMServer(answering(vllm)), lambda server: server.info())


def test_the_context_is_what_a_prompt_may_really_have(answering: Any) -> None:
    info = ask(SGLangServer(answering(sglang())), lambda server: server.info())
    assert info.max_context == 507 and info.kind == "sglang"


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("errors", Refused, "HTTP 500"),
        ("garbage", InfraError, "with no JSON: '<html>"),
        ("halves", InfraError, "does not answer: ReadError: chaos"),
    ],
)
def test_chaos_on_the_wire(fault: str, error: type[Exception], said: str, answering: Any) -> None:
    url = answering({"/generate": (200, json.dumps(GOOD))} | sglang())
    chaos = Chaos(ChaosOptions(**{fault: 1.0}))
    with pytest.raises(error, match=said):
        ask(SGLangServer(url, chaos=chaos), lambda server: server.generate(REQUEST, "r", 4))
    assert chaos.counts[fault] == 1
    assert ask(SGLangServer(url, chaos=chaos), lambda server: server.info()).version == "0.5.23", "generation alone"
