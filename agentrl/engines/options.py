"""What a configuration may say of the engine. Torch-free: the schema imports it.

`engine: {type: local}` is the default; `engine.type=sglang` alone starts a server of one's own. Where servers run is
said by one of `launch` and `urls`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from agentrl.engines import InFlight
from agentrl.errors import UsageError

Sync: TypeAlias = Literal["disk", "tensor", "distributed", "adapter"]


class Options(BaseModel):
    """Base: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LocalOptions(Options):
    """The in-process engine. `rows`: episodes that keep their keys and values at once."""

    type: Literal["local"] = "local"
    rows: int = Field(default=256, ge=1)
    max_context: int | None = Field(default=None, ge=8, description="tokens; default: what the model allows")


class LaunchOptions(Options):
    """Servers that the run starts on this machine, keeps alive, and ends."""

    servers: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str = Field(default="auto", description="auto: float32 on a CPU, bfloat16 on CUDA")
    cores: int = Field(default=1, ge=1, description="cores of each server on a CPU, the last ones of this process")
    memory_fraction: float = Field(default=0.85, gt=0, lt=1, description="of the accelerator's memory")
    python: str | None = Field(default=None, description="of the servers' environment; default: what was installed")
    flags: tuple[str, ...] = Field(default=(), description="more words for the server's command line")
    restarts: int = Field(default=10, ge=0, description="how often a server that died is started again")

    @model_validator(mode="after")
    def _no_key_ignored(self) -> LaunchOptions:
        for device, key in (("cpu", "memory_fraction"), ("cuda", "cores")):
            if self.device == device and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} does nothing with device: {device}; remove it")
        return self


def server_url(url: str) -> str:
    """`url`, where it can be a server's. Raises `UsageError`."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    except ValueError:  # its port is none
        pass
    raise UsageError(f"{url!r} is no server's address; write it as http://host:port")


def _auto(value: object) -> object:
    """`launch: auto` is short for its defaults."""
    return {} if value == "auto" else value


class ServerOptions(Options):
    """What SGLang and vLLM have in common. `patience`: seconds without a sign of life after which a server counts as
    hung. `tolerance`: nats by which its log-probs may differ from the trainer's after new weights."""

    launch: Annotated[LaunchOptions, BeforeValidator(_auto)] | None = None
    urls: tuple[str, ...] = Field(default=(), description="servers that run already")
    api_key: SecretStr | None = Field(default=None, description="of servers in urls; write ${env:NAME}")
    max_context: int | None = Field(default=None, ge=8, description="tokens; default: what the servers allow")
    top_logprobs: int = Field(default=0, ge=0, le=64, description="entropies from so many likeliest tokens; 0: none")
    sync: Sync = "disk"
    sync_folder: str | None = Field(default=None, description="where weights are written; servers must see it too")
    in_flight: InFlight | None = Field(
        default=None, description="requests that an update meets: their cache is computed anew (retract), or kept"
    )
    sleep: bool = Field(default=False, description="give the accelerator to the trainer during its updates")
    patience: float | None = Field(default=None, gt=0, description="default: 60, or half of a turn's deadline")
    tolerance: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _somewhere(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("launch") is None and not values.get("urls"):
            return {**values, "launch": {}}
        return values

    @model_validator(mode="after")
    def _fits(self) -> ServerOptions:
        if self.urls and self.launch is not None:
            raise ValueError("launch and urls exclude each other: name servers that run, or let the run start its own")
        for url in self.urls:
            server_url(url)
        if self.api_key is not None:
            if self.launch is not None:
                raise ValueError("api_key is for servers in urls: those that the run starts ask for none; remove it")
            if not re.fullmatch(r"[!-~]+", self.api_key.get_secret_value()):
                raise ValueError("api_key is empty or holds what no HTTP header takes, perhaps the end of a line")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("urls names a server twice; name each once")
        if self.sync == "adapter" and self.in_flight is not None:
            raise ValueError(
                "with sync: adapter running requests end under the adapter they began with; remove in_flight"
            )
        if self.sync_folder is not None and self.sync not in ("disk", "adapter"):
            raise ValueError(f"sync_folder does nothing with sync: {self.sync}; remove it, or choose sync: disk")
        return self


class SGLangOptions(ServerOptions):
    """SGLang servers, over HTTP."""

    type: Literal["sglang"] = "sglang"
    router: Literal["client", "cache_aware", "manual"] = Field(
        default="client",
        description="who sends requests to several servers: this client, or sglang-router by that policy of its",
    )

    @model_validator(mode="after")
    def _routed(self) -> SGLangOptions:
        if self.router == "client":
            return self
        if (self.launch.servers if self.launch is not None else len(self.urls)) < 2:
            raise ValueError(f"router: {self.router} does nothing with one server; remove it")
        if self.sync == "adapter" or self.in_flight == "in_place":
            what = "sync: adapter" if self.sync == "adapter" else "in_flight: in_place"
            raise ValueError(f"with {what} each server has names of its own for what it caches: use router: client")
        if self.api_key is not None:
            raise ValueError("sglang-router is not given the servers' api_key: use router: client")
        return self


class VLLMOptions(ServerOptions):
    """vLLM servers, over HTTP."""

    type: Literal["vllm"] = "vllm"

    @model_validator(mode="after")
    def _has_it(self) -> VLLMOptions:
        if self.sync in ("tensor", "distributed"):
            raise ValueError(f"vLLM takes weights from a folder, not by sync: {self.sync}; use disk")
        return self


def _local(value: object) -> object:
    """`engine: sglang` is short for its defaults; a mapping without a type is the local engine's."""
    if isinstance(value, str):
        return {"type": value}
    return {"type": "local", **value} if isinstance(value, Mapping) else value


EngineOptions: TypeAlias = Annotated[
    Annotated[LocalOptions | SGLangOptions | VLLMOptions, Field(discriminator="type")], BeforeValidator(_local)
]
