"""`agentrl engine bench`: one sentence and exit code 2 for whatever the user got wrong."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentrl import cli
from agentrl.engines.launch import free_port


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Something that speaks HTTP and is no model server."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def bench(model: Path, url: str, *more: str, kind: str = "sglang") -> list[str]:
    return ["engine", "bench", "--kind", kind, "--url", url, "--model", str(model), *more]


def test_bench_says_what_is_wrong_with_what_it_was_given(
    tmp_path: Path, elsewhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    nowhere = f"http://127.0.0.1:{free_port()}"
    empty = tmp_path / "empty"
    (model / "config.json").write_text('{"vocab_size": 97}')
    for words, sentence in (
        (bench(empty, nowhere), "is no Hugging Face model folder"),
        (bench(model, nowhere), "start one: agentrl engine serve sglang MODEL"),
        (bench(model, "127.0.0.1:30000"), "is no server's address"),
        (bench(model, "http://127.0.0.1:99999"), "is no server's address"),
        (bench(model, "http://:30000"), "is no server's address"),
        (bench(model, elsewhere), "is no SGLang server"),
        (bench(model, elsewhere, kind="vllm"), "is no vLLM server"),
        (bench(model, nowhere, "--concurrency", "many"), "is no list of whole numbers above 0"),
        (bench(model, nowhere, "--output", "0"), "whole numbers above 0"),
        (bench(model, nowhere, kind="tgi"), "sglang"),
    ):
        assert cli.run(words) == 2, words
        said = capsys.readouterr()
        assert sentence in said.err and len(said.err.splitlines()) == 1, said.err
        assert not said.out
