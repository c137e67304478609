"""One vLLM server over its token-in, token-out route (`/inference/v1/generate`).

It must run with `--enable-scale-out`, `--logprobs-mode processed_logprobs` (or log-probs ignore the temperature),
`VLLM_SERVER_DEV_MODE=1` (the routes for training) and the worker extension in `shims/vllm`: `agentrl engine serve`.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

from agentrl.chaos import Chaos
from agentrl.engines import Generation, InFlight, Request
from agentrl.engines.http import Http, Refused, unlike
from agentrl.engines.servers import Adapters, ServerInfo, check_seen, entropy_of, labelled, logprobs_of, runs_of
from agentrl.errors import InfraError, UsageError
from agentrl.trajectory import FinishReason, Floats, Ids, Sampling, as_floats, as_ids

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class VLLMServer:
    """The `ModelServer` protocol for vLLM, and `TakesAdapters`.

    Args:
        top_logprobs: how many of the likeliest tokens each reply names; their entropy stands in for the exact one
            (0: no entropies).
    """

    def __init__(
        self, url: str, *, top_logprobs: int = 0, api_key: str | None = None, chaos: Chaos | None = None
    ) -> None:
        self._http = Http(url, "the vLLM server", api_key, chaos)
        self._top = top_logprobs
        self._model = ""
        self._eyes = False
        self._adapters = Adapters()
        self._keeps = False  # paused in place: running requests keep their keys and values
        self._cache = ""  # tells what is cached now from what older weights left there
        self._heeds = False  # it was started to heed priorities

    @property
    def url(self) -> str:
        return self._http.url

    @property
    def name(self) -> str:
        return f"vLLM at {self.url}"

    async def alive(self, seconds: float) -> None:
        await self._http.get("/is_paused", seconds=seconds)  # asks the engine's own process; /health does not

    async def info(self) -> ServerInfo:
        try:
            version = str((await self._http.get("/version"))["version"])
            served = (await self._http.get("/v1/models"))["data"][0]
            self._model = str(served["id"])
            longest = int(served["max_model_len"])
        except (Refused, KeyError, IndexError, TypeError, ValueError) as error:
            raise unlike(error, self.url, f"what answers at {self.url} is no vLLM server") from error
        routes = {
            "/is_paused": "VLLM_SERVER_DEV_MODE=1",
            "/weight_info": "a newer vLLM (0.30 or newer), started with VLLM_SERVER_DEV_MODE=1",
        }
        for path, needs in routes.items():
            try:
                await self._http.get(path)
            except Refused as refused:
                sentence = f"the vLLM server at {self.url} ({version}) has no {path}: it needs {needs}"
                raise unlike(refused, self.url, sentence) from refused
        self._eyes, self._heeds = await self._about()
        block = re.search(r'vllm:cache_config_info\{.*?\bblock_size="(\d+)"', await self._http.text("/metrics"))
        return ServerInfo(
            "vllm",
            version,
            str(served.get("root") or self._model),
            longest,
            truncation=False,
            cache_block=int(block[1]) if block else 16,
            images=self._eyes,
            priorities=self._heeds,
        )

    async def _about(self) -> tuple[bool, bool]:
        """Whether the model takes pictures, and whether the server heeds priorities. One that does not tell counts as
        one of text, and is sent none: it might refuse them."""
        try:
            about = (await self._http.get("/server_info?config_format=json"))["vllm_config"]
        except (Refused, KeyError, TypeError):
            return False, False
        sees = about.get("model_config", {}).get("multimodal_config") is not None
        return sees, about.get("scheduler_config", {}).get("policy") == "priority"

    async def generate(self, request: Request, rid: str, max_tokens: int) -> Generation:
        if request.sampling.top_p < 1 or request.sampling.top_k:
            raise UsageError(
                "vLLM gives log-probs after top-k and top-p, not those of the whole softmax: set top_p: 1 and top_k: 0 "
                "or use the sglang engine"
            )
        body: dict[str, Any] = {
            "request_id": rid,
            "token_ids": request.ids.tolist(),
            "sampling_params": _sampling(request.sampling, max_tokens, self._top),
        }
        if request.images:
            body["token_ids"] = request.folded
            body["content_parts"] = [{"type": "image_url", "url": image.data_url} for image in request.images]
            body["return_token_ids"] = True
        if self._heeds:
            body["priority"] = -request.priority  # smaller is sooner there
        if self._cache:
            body["cache_salt"] = self._cache
        with self._adapters.held() as adapter:
            body["model"] = adapter[0] if adapter else self._model
            reply = await self._http.post("/inference/v1/generate", body, seconds=None)
        made = self._generation(reply)
        if request.images and made.finish != "abort":  # one that waited when it ended was never read
            check_seen(request, reply.get("prompt_token_ids"), self.name)
        return labelled(made, adapter)

    async def score(self, ids: Ids, start: int) -> Floats:
        if ids.size == start:
            return as_floats([])
        body = {"prompt": ids.tolist(), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        with self._adapters.held() as adapter:
            name = adapter[0] if adapter else self._model
            reply = await self._http.post("/v1/completions", body | {"model": name}, seconds=None)
        try:
            table = reply["choices"][0]["prompt_logprobs"]
            return as_floats([table[at][str(int(ids[at]))]["logprob"] for at in range(start, ids.size)])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._odd(reply) from error

    async def abort(self, rid: str) -> None:
        await self._http.post("/abort_requests", {"request_ids": [f"generate-tokens-{rid}"]})

    async def pause(self, in_flight: InFlight = "retract") -> None:
        self._keeps = in_flight == "in_place"
        await self._http.post(f"/pause?mode=keep&clear_cache={'false' if self._keeps else 'true'}")

    async def resume(self) -> None:
        await self._http.post("/resume")

    async def load(self, folder: Path, version: int) -> None:
        steps: tuple[tuple[str, dict[str, Any]], ...] = (
            ("/start_weight_update", {}),
            ("/update_weights", {"update_info": {"folder": str(folder)}}),
            ("/finish_weight_update", {"weight_version": str(version)}),
        )
        try:
            for path, body in steps:
                await self._http.post(path, body, seconds=600)
        except Refused as refused:
            raise UsageError(
                f"the vLLM server at {self.url} did not take the weights: {refused.said}; it must serve the very "
                "architecture that is trained, see the folder they are written to (engine.sync_folder), and run with "
                "the worker extension, as agentrl engine serve starts it"
            ) from refused
        # Running requests hold parts of the cache, so that nothing of it is reset: later ones get a part of their own.
        self._cache = secrets.token_hex(8) if self._keeps else ""
        if not self._keeps:
            await self._http.post("/reset_prefix_cache")
        if self._eyes:
            await self._http.post("/reset_encoder_cache")  # what older weights saw in pictures

    async def load_adapter(self, name: str, folder: Path) -> None:
        try:
            await self._http.tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Refused as refused:
            raise UsageError(
                f"the vLLM server at {self.url} did not take the adapter: {refused.said}; it must run with "
                "--enable-lora, a --max-lora-rank no less than the adapter's and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
                "and see the adapter's folder"
            ) from refused

    async def unload_adapter(self, name: str) -> None:
        try:
            await self._http.tell("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as refused:
            raise InfraError(f"the vLLM server at {self.url} does not unload {name}: {refused.said}") from refused

    def use(self, name: str, version: int) -> None:
        self._adapters.use(name, version)

    def using(self, name: str) -> int:
        return self._adapters.using(name)

    async def sleep(self) -> None:
        try:
            await self._http.post("/sleep?level=1&mode=keep")
        except Refused as refused:
            raise UsageError(
                f"the vLLM server at {self.url} does not sleep: {refused.said}; start it with "
                "--enable-sleep-mode, or give the trainer another accelerator"
            ) from refused

    async def wake(self) -> None:
        await self._http.post("/wake_up")
        await self.pause()  # waking sets it going again

    async def health(self) -> dict[str, Any]:
        text = await self._http.text("/metrics", seconds=10)
        counts = {"running": 0.0, "waiting": 0.0}
        for line in text.splitlines():
            for name in counts:
                if line.startswith(f"vllm:num_requests_{name}{{"):
                    counts[name] += float(line.rsplit(" ", 1)[1])
        about = await self._http.get("/weight_info", seconds=10)
        return {name: int(count) for name, count in counts.items()} | {"version": about["weight_version"]}

    async def close(self) -> None:
        await self._http.close()

    def _generation(self, reply: Any) -> Generation:
        """Raises `InfraError` for what is no reply."""
        try:
            choice = reply["choices"][0]
            ids = as_ids(choice["token_ids"] or [])
            entries = (choice["logprobs"] or {"content": []})["content"]
            logprobs = logprobs_of(entry["logprob"] for entry in entries)
            if logprobs.size != ids.size:
                raise ValueError("ids and log-probs differ")
            entropies = _entropies(entries) if self._top and ids.size else None
            usage = reply.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            return Generation(
                ids,
                logprobs,
                _FINISH[choice["finish_reason"]],
                runs_of(choice.get("weight_versions") or (), ids.size),
                entropies,
                "none" if entropies is None else "topk",
                int(cached),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._odd(reply) from error

    def _odd(self, reply: object) -> InfraError:
        return InfraError(f"the vLLM server at {self.url} answered with something else: {str(reply)[:200]}")


def _sampling(sampling: Sampling, max_tokens: int, top: int) -> dict[str, Any]:
    return {
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # the chat's stop ids are all that end a turn
        "logprobs": top,
        "skip_special_tokens": False,
        # No seed: on a CPU the whole server ends where a request with one has its prompt computed in parts ("CPU
        # Generator does not use offset"). `Capabilities.seeds` promises none.
    }


def _entropies(entries: list[Any]) -> Floats:
    return as_floats([entropy_of([float(other["logprob"]) for other in entry["top_logprobs"]]) for entry in entries])
