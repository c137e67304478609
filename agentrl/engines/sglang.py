"""One SGLang server over its native HTTP routes (`/generate`, not the OpenAI ones).

Log-probs are of the softmax at the request's temperature before top-k and top-p, the sampled end token included. An id
outside the vocabulary would end the whole server, so `remote` checks ids before anything is sent.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentrl.chaos import Chaos
from agentrl.engines import Generation, InFlight, Request
from agentrl.engines.http import Http, Refused, unlike
from agentrl.engines.servers import Adapters, Bucket, ServerInfo, check_seen, entropy_of, labelled, logprobs_of, runs_of
from agentrl.errors import InfraError, UsageError
from agentrl.trajectory import FinishReason, Floats, Ids, Sampling, as_floats, as_ids

OLDEST = (0, 5, 20)  # /pause_generation with modes, spans of weight versions
UPDATE_SECONDS = 600.0
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class SGLangServer:
    """The `ModelServer` protocol for SGLang, and `TakesTensors` and `TakesAdapters`.

    Args:
        top_logprobs: how many of the likeliest tokens each reply names; their entropy stands in for the exact one
            (0: no entropies).
    """

    def __init__(
        self, url: str, *, top_logprobs: int = 0, api_key: str | None = None, chaos: Chaos | None = None
    ) -> None:
        self._http = Http(url, "the SGLang server", api_key, chaos)
        self._top = top_logprobs
        self._adapters = Adapters()
        self._keeps = False  # paused in place: running requests keep their keys and values
        self._cache = ""  # tells what is cached now from what older weights left there
        self.sooner = 0  # the sign of a larger priority's number; 0: it was not started to heed any

    @property
    def url(self) -> str:
        return self._http.url

    @property
    def name(self) -> str:
        return f"SGLang at {self.url}"

    async def alive(self, seconds: float) -> None:
        await self._http.get("/server_info", seconds=seconds)  # asks the scheduler; /model_info does not

    async def info(self) -> ServerInfo:
        try:
            about, models = await self._http.get("/server_info"), await self._http.get("/v1/models")
            version, served = str(about["version"]), models["data"][0]
            # A prompt may be some tokens shorter than the context only; what fits both is what we may use.
            longest = min(int(served["max_model_len"]), int(about["max_req_input_len"]) + 1)
            heeds = bool(about.get("enable_priority_scheduling"))
            folder = str(about["model_path"])
            found = ServerInfo("sglang", version, folder, longest, images=await self._sees(), priorities=heeds)
            self.sooner = (-1 if about.get("schedule_low_priority_values_first") else 1) if heeds else 0
        except (Refused, KeyError, IndexError, TypeError, ValueError) as error:
            sentence = (
                f"what answers at {self.url} is no SGLang server, or one without /server_info; this needs "
                f"{'.'.join(map(str, OLDEST))} or newer"
            )
            raise unlike(error, self.url, sentence) from error
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
        if numbers < OLDEST:
            raise UsageError(
                f"SGLang {version} at {self.url} is too old: /pause_generation and weight versions need "
                f"{'.'.join(map(str, OLDEST))} or newer"
            )
        return found

    async def _sees(self) -> bool:
        """Whether the model takes pictures. A server that does not tell counts as one of text."""
        try:
            return (await self._http.get("/model_info"))["has_image_understanding"] is True
        except (Refused, KeyError, TypeError):
            return False

    async def generate(self, request: Request, rid: str, max_tokens: int) -> Generation:
        body: dict[str, Any] = {
            "input_ids": request.ids.tolist(),
            "rid": rid,
            "return_logprob": True,
            "logprob_start_len": -1,  # 0 would recompute the prompt every time
            "sampling_params": _sampling(request.sampling, max_tokens),
        }
        if self._top:
            body["top_logprobs_num"] = self._top
        if self.sooner:  # elsewhere it would be ignored, or refused (--abort-on-priority-when-disabled)
            body["priority"] = self.sooner * request.priority
        if request.images:
            body["input_ids"] = request.folded
            body["image_data"] = [image.data_url for image in request.images]
            body["return_prompt_token_ids"] = True  # where it cannot place a picture it tokenises the text anew
        with self._adapters.held() as adapter:
            asked = self._for(body, adapter)
            reply = await self._http.post("/generate", asked, seconds=None, headers=self._headers(request))
        made = self._generation(reply)
        if request.images and made.finish != "abort":  # one that waited when it ended was never read
            check_seen(request, reply.get("prompt_token_ids"), self.name)
        return labelled(made, adapter)

    async def score(self, ids: Ids, start: int) -> Floats:
        body: dict[str, Any] = {
            "input_ids": ids.tolist(),
            "return_logprob": True,
            "logprob_start_len": start - 1,
            "sampling_params": {"max_new_tokens": 0},
        }
        with self._adapters.held() as adapter:
            reply = await self._http.post("/generate", self._for(body, adapter), seconds=None)
        try:
            values = [entry[0] for entry in reply["meta_info"]["input_token_logprobs"]][-(ids.size - start) :]
            return as_floats(values if ids.size > start else [])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._odd(reply) from error

    async def abort(self, rid: str) -> None:
        await self._http.post("/abort_request", {"rid": rid})

    async def pause(self, in_flight: InFlight = "retract") -> None:
        self._keeps = in_flight == "in_place"
        await self._http.post("/pause_generation", {"mode": in_flight})

    async def resume(self) -> None:
        await self._http.post("/continue_generation", {})

    async def load(self, folder: Path, version: int) -> None:
        body = {"model_path": str(folder)} | self._last(version)
        try:
            reply = await self._http.post("/update_weights_from_disk", body, seconds=UPDATE_SECONDS)
        except Refused as refused:
            if "cache was not flushed" not in refused.said:
                raise UsageError(
                    f"the SGLang server at {self.url} did not take the weights: {refused.said}; it must serve the very "
                    "architecture that is trained, and see the folder they are written to (engine.sync_folder)"
                ) from refused
            await self._http.post("/flush_cache?timeout=30")
            return
        if not (isinstance(reply, dict) and reply.get("success")):
            raise UsageError(f"the SGLang server at {self.url} did not take the weights: {str(reply)[:300]}")

    # -- weights in pieces -----------------------------------------------------------------------------------------

    async def ranks(self) -> int:
        about = await self._http.get("/server_info")
        for name in ("dp_size", "pp_size"):
            if int(about.get(name) or 1) > 1:
                raise UsageError(
                    f"the SGLang server at {self.url} runs with {name} {about[name]}: set engine.sync to disk, "
                    "or start several servers instead"
                )
        return int(about["tp_size"])

    async def open_update(self) -> None:
        try:
            await self._http.post("/begin_weight_update", {})
        except Refused as refused:
            if refused.status == 404:
                raise UsageError(
                    f"the SGLang server at {self.url} is too old: it has no /begin_weight_update; use engine.sync=disk"
                ) from refused
            if "already open" not in refused.said:  # left so by an update that failed: all weights come again
                raise self._failed(refused) from refused

    async def take(self, pickles: Sequence[bytes], version: int | None) -> None:
        body = {"serialized_named_tensors": [base64.b64encode(pickle).decode() for pickle in pickles]}
        await self._update("/update_weights_from_tensor", body | self._last(version))

    async def receive(self, bucket: Bucket, group: str, version: int | None) -> None:
        body: dict[str, Any] = {
            "names": list(bucket.names),
            "dtypes": [bucket.dtype] * len(bucket.names),
            "shapes": [list(shape) for shape in bucket.shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
        }
        await self._update("/update_weights_from_distributed", body | self._last(version))

    async def close_update(self) -> None:
        await self._update("/end_weight_update", {})

    async def join(self, host: str, port: int, rank: int, world: int, group: str, backend: str) -> None:
        body = {"master_address": host, "master_port": port, "rank_offset": rank, "world_size": world}
        await self._update("/init_weights_update_group", body | {"group_name": group, "backend": backend})

    async def leave(self, group: str) -> None:
        await self._update("/destroy_weights_update_group", {"group_name": group})

    async def _update(self, path: str, body: dict[str, Any]) -> None:
        try:
            await self._http.post(path, body, seconds=UPDATE_SECONDS)
        except Refused as refused:
            raise self._failed(refused) from refused

    def _failed(self, refused: Refused) -> InfraError:
        return InfraError(f"the SGLang server at {self.url} did not take the weights: {refused.said}")

    def _last(self, version: int | None) -> dict[str, Any]:
        """What ends an update: its version, and that nothing cached may be used again.

        Paused in place the cache cannot be flushed, for running requests hold parts of it. Later requests get a part
        of their own instead, and the older one is evicted as it falls out of use.
        """
        if version is None:
            return {"flush_cache": False}
        self._cache = secrets.token_hex(8) if self._keeps else ""
        return {"flush_cache": not self._keeps, "weight_version": str(version)}

    # -- adapters --------------------------------------------------------------------------------------------------

    async def load_adapter(self, name: str, folder: Path) -> None:
        try:
            await self._http.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Refused as refused:
            raise UsageError(
                f"the SGLang server at {self.url} did not take the adapter: {refused.said}; it must run with "
                "--enable-lora, a --max-lora-rank and --lora-target-modules that hold the adapter's, and see its folder"
            ) from refused

    async def unload_adapter(self, name: str) -> None:
        await self._update("/unload_lora_adapter", {"lora_name": name})

    def use(self, name: str, version: int) -> None:
        self._adapters.use(name, version)

    def using(self, name: str) -> int:
        return self._adapters.using(name)

    def _for(self, body: dict[str, Any], adapter: tuple[str, int] | None) -> dict[str, Any]:
        """The request under the present weights."""
        return (
            body | ({"lora_path": adapter[0]} if adapter else {}) | ({"extra_key": self._cache} if self._cache else {})
        )

    def _headers(self, request: Request) -> dict[str, str] | None:
        """For one who stands before the server."""
        return None

    async def sleep(self) -> None:
        await self.pause()  # retracted: a request that still holds memory would end the whole server
        await self._http.post("/release_memory_occupation", {})

    async def wake(self) -> None:
        await self._http.post("/resume_memory_occupation", {})

    async def health(self) -> dict[str, Any]:
        loads = (await self._http.get("/v1/loads", seconds=10))["loads"]
        about = await self._http.get("/model_info", seconds=10)
        return {
            "running": sum(int(load["num_running_reqs"]) for load in loads),
            "waiting": sum(int(load["num_waiting_reqs"]) for load in loads),
            "version": about["weight_version"],
        }

    async def close(self) -> None:
        await self._http.close()

    def _generation(self, reply: Any) -> Generation:
        """Raises `InfraError` for what is no reply to /generate."""
        try:
            about = reply["meta_info"]
            reason = about["finish_reason"]
            if reason["type"] == "abort" and reason.get("status_code") not in (None, 200):
                raise InfraError(f"the SGLang server at {self.url} gave a request up: {reason.get('message')}")
            found = about.get("output_token_logprobs") or []
            ids = as_ids([int(entry[1]) for entry in found])
            logprobs = logprobs_of(entry[0] for entry in found)
            if reply["output_ids"] != ids.tolist():
                raise ValueError("ids and log-probs differ")
            entropies = _entropies(about["output_top_logprobs"]) if self._top and ids.size else None
            return Generation(
                ids,
                logprobs,
                _FINISH[reason["type"]],
                runs_of(about.get("weight_versions") or (), ids.size),
                entropies,
                "none" if entropies is None else "topk",
                int(about.get("cached_tokens") or 0),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._odd(reply) from error

    def _odd(self, reply: object) -> InfraError:
        return InfraError(f"the SGLang server at {self.url} answered /generate with something else: {str(reply)[:200]}")


def _sampling(sampling: Sampling, max_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop_token_ids": list(sampling.stop_ids),
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "sampling_seed": sampling.seed % 2**31,
    }


def _entropies(tops: Sequence[Sequence[Sequence[Any]]]) -> Floats:
    return as_floats([entropy_of([float(entry[0]) for entry in top]) for top in tops])
