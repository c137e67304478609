"""The engine of a run: in process, or over servers that the run starts for itself or was given the addresses of."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from agentrl.chaos import Chaos, Unreliable
from agentrl.config import Config
from agentrl.engines import Engine
from agentrl.engines.install import python_of
from agentrl.engines.keeper import Gate, Keeper, Post, start
from agentrl.engines.launch import LORA_TARGETS, Device, Launch, ServerProcess, free_port, spread
from agentrl.engines.local import LocalEngine
from agentrl.engines.memory import check_fits, trainer_bytes
from agentrl.engines.options import LaunchOptions, LocalOptions, ServerOptions, SGLangOptions
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.router import Router, RouterLaunch, check_installed
from agentrl.engines.servers import ModelServer
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.engines.weights import Weights
from agentrl.errors import InfraError, UsageError
from agentrl.train.options import HFModel
from agentrl.train.parts import device_of
from agentrl.train.policy import Policy
from agentrl.train.probe import Probe

Tell = Callable[[str], None]
PATIENCE_SECONDS = 60.0
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


async def open_engine(
    config: Config, policy: Policy, folder: Path | None, tell: Tell, chaos: Chaos | None = None
) -> Engine:
    """The engine that the configuration names, serving the policy's weights as its present version.

    `folder` takes servers' logs and what is written for them; None: a temporary one. Raises `UsageError` for servers
    that cannot serve this policy, `InfraError` where they do not start.
    """
    engine = (
        _local(config, policy, config.engine, chaos)
        if isinstance(config.engine, LocalOptions)
        else await _served(config, policy, config.engine, folder, tell, chaos)
    )
    try:
        if policy.pictures is not None and not engine.capabilities.images:
            raise UsageError(
                f"the servers serve a model of text, and that in {policy.path} takes pictures; serve that very folder"
            )
        most = engine.capabilities.max_context
        if most and config.rollout.max_tokens >= most:
            raise UsageError(
                f"rollout.max_tokens {config.rollout.max_tokens} leaves no room for a prompt in a context of {most} "
                "tokens; lower it, or raise engine.max_context"
            )
        await hand_over(config, policy, engine, folder)
        if engine.trouble is not None:
            raise UsageError(
                f"no server lives on after the first weights: {engine.trouble}; SGLang ends where weights have another "
                "shape than its model's: serve the very folder that is trained"
            )
        await probe_of(config, policy, engine).check()
    except BaseException:
        await asyncio.shield(engine.close())
        raise
    return engine


async def hand_over(config: Config, policy: Policy, engine: Engine, folder: Path | None) -> None:
    """Give the engine the policy's present weights as its present version: all of them, or its adapters alone."""
    weights: Weights = policy.weights()
    if isinstance(config.engine, LocalOptions) or config.engine.sync != "adapter":
        return await engine.update_weights(weights, policy.version)
    with tempfile.TemporaryDirectory(prefix="adapter-", dir=folder) as place:
        await asyncio.to_thread(policy.save_hf, place, merge=False)
        await engine.update_weights(place, policy.version)


def probe_of(config: Config, policy: Policy, engine: Engine) -> Probe:
    """The probe of an engine that `open_engine` made."""
    options = config.engine
    if isinstance(options, LocalOptions):
        return Probe(policy, engine, exact=policy.base.dtype == torch.float32)
    theirs = dtype_of(options.launch) if options.launch is not None else "unknown"
    return Probe(
        policy,
        engine,
        exact=theirs == "float32" == str(policy.base.dtype).removeprefix("torch."),
        tolerance=options.tolerance,
    )


def patience_of(config: Config, options: ServerOptions) -> float:
    """Seconds of silence after which a server counts as hung: before its turns end of it, and are scored."""
    return options.patience or min(PATIENCE_SECONDS, config.rollout.deadlines.turn / 2)


def dtype_of(options: LaunchOptions) -> str:
    """What servers are told to compute in."""
    if options.dtype != "auto":
        return options.dtype
    return "float32" if server_device(options) == "cpu" else "bfloat16"


def server_python(kind: Literal["sglang", "vllm"], options: LaunchOptions) -> Path:
    """The Python that servers are started with. Raises `UsageError` where none is installed."""
    found = Path(options.python).expanduser() if options.python else python_of(kind, server_device(options))
    if found is None or not found.is_file():
        what = f"there is no {found}" if found else f"{kind} is not installed for {server_device(options)}"
        raise UsageError(f"{what}; run: agentrl engine install {kind}", where="engine.launch.python" if found else None)
    return found.absolute()


def server_device(options: LaunchOptions) -> Device:
    """What servers that the run starts compute on."""
    if options.device != "auto":
        return options.device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def accelerators(config: Config, options: ServerOptions, launch: LaunchOptions) -> list[tuple[int, ...]]:
    """Those of each server that the run starts on CUDA. Raises `UsageError` for more than there are."""
    trainer = device_of(config)
    its = (trainer.index or 0) if trainer.type == "cuda" else None
    return spread(launch.servers, launch.flags, max(torch.cuda.device_count(), 1), its, beside=options.sleep)


def _local(config: Config, policy: Policy, options: LocalOptions, chaos: Chaos | None) -> Engine:
    """With its own copy of the policy's weights."""
    if policy.pictures is not None:
        raise UsageError(
            f"the local engine serves text only, and the model in {policy.path} takes pictures: set engine.type to "
            "sglang or vllm",
            where="engine.type",
        )
    engine = LocalEngine(
        policy.model_for_engine(),
        rows=options.rows,
        max_context=options.max_context,
        deterministic=config.deterministic,
        device=device_of(config),
    )
    if chaos is None:
        return engine
    chaos.kill = lambda _: engine.crash("chaos: the engine was killed")
    return Unreliable.over(engine, chaos)


async def _served(
    config: Config, policy: Policy, options: ServerOptions, folder: Path | None, tell: Tell, chaos: Chaos | None
) -> RemoteEngine:
    if policy.pictures is not None and options.sync == "adapter":
        raise UsageError(
            "adapters of a model that takes pictures cannot be sent apart: set engine.sync to disk, which merges them",
            where="engine.sync",
        )
    place = _place(folder)
    posts: list[Post] = []
    engine: RemoteEngine | None = None
    try:
        posts = await _posts(config, policy, options, place, tell, chaos)
        if options.launch is None:
            await _recognise(policy, posts)
        engine = await RemoteEngine.connect(
            [post.server for post in posts],
            vocab=policy.vocab_size,
            max_context=options.max_context,
            sync=options.sync,
            in_flight=options.in_flight,
            sync_folder=Path(options.sync_folder) if options.sync_folder else place / "weights",
            entropy=options.top_logprobs > 0,
        )
    except BaseException:
        await asyncio.shield(_end(posts, place, folder))
        raise
    try:
        gate = await _gate(options, posts, engine, place, chaos)
    except BaseException:
        await asyncio.shield(engine.close())
        await asyncio.shield(_end(posts, place, folder))
        raise
    restarts = options.launch.restarts if options.launch is not None else LaunchOptions().restarts  # the router's
    if chaos is not None:
        _arm(chaos, posts)
    keeper = Keeper(engine, posts, tell, patience=patience_of(config, options), restarts=restarts, gate=gate)

    async def end() -> None:
        await keeper.close()
        await _end((), place, folder)

    engine.on_close = end
    return engine


async def _gate(
    options: ServerOptions, posts: Sequence[Post], engine: RemoteEngine, place: Path, chaos: Chaos | None
) -> Gate | None:
    """A router before the servers, where the configuration wants one. Raises `UsageError`, `InfraError`."""
    if not isinstance(options, SGLangOptions) or options.router == "client":
        return None
    python = server_python("sglang", options.launch or LaunchOptions())
    check_installed(python)
    device = server_device(options.launch or LaunchOptions())
    launch = RouterLaunch(python, free_port(), free_port(), options.router, device)
    process = ServerProcess.start(launch, place / "logs" / "router.log")
    servers = [post.server for post in posts if isinstance(post.server, SGLangServer)]
    router = Router(process.launch.url, servers, lambda: engine.up, top_logprobs=options.top_logprobs, chaos=chaos)
    try:
        await process.ready()
        await router.match([server.url for server in servers])
    except BaseException:
        await asyncio.shield(asyncio.gather(process.stop(), router.close()))
        raise
    engine.attach(router)
    return Gate(router, process)


async def _recognise(policy: Policy, posts: Sequence[Post]) -> None:
    """Refuse servers that answer nothing, or whose model has another shape. Raises `UsageError`."""
    for post in posts:
        try:
            info = await post.server.info()
        except InfraError as error:
            raise UsageError(f"{error}; start a server there, or correct this", where="engine.urls") from error
        theirs = await asyncio.to_thread(shape_of, info.model)
        ours = policy.base.config.to_dict()
        for key in SHAPE:
            if theirs and key in theirs and key in ours and theirs[key] != ours[key]:
                raise UsageError(
                    f"{post.server.name} serves {info.model}, whose {key} is {theirs[key]} where the policy's is "
                    f"{ours[key]}: it is another model; serve the folder that is trained",
                    where="engine.urls",
                )


def shape_of(folder: str) -> dict[str, Any]:
    """The configuration of a model folder; nothing where it cannot be seen from here."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


async def _posts(
    config: Config, policy: Policy, options: ServerOptions, place: Path, tell: Tell, chaos: Chaos | None
) -> list[Post]:
    """The servers: those that are named, or new ones of this machine."""
    kind: Literal["sglang", "vllm"] = options.type  # type: ignore[attr-defined]

    key = options.api_key.get_secret_value() if options.api_key is not None else None

    def client(url: str) -> ModelServer:
        made = SGLangServer if kind == "sglang" else VLLMServer
        return made(url, top_logprobs=options.top_logprobs, api_key=key, chaos=chaos)

    if options.launch is None:
        return [Post(client(url)) for url in options.urls]
    launch, device = options.launch, server_device(options.launch)
    model = policy.path
    if model is None:
        model = str(place / "model")
        await asyncio.to_thread(policy.save_hf, model)
    python, cores = server_python(kind, launch), sorted(os.sched_getaffinity(0))
    lora = config.model.lora if isinstance(config.model, HFModel) and options.sync == "adapter" else None
    places: list[tuple[int, ...]] = [()] * launch.servers
    if device == "cuda":
        places = accelerators(config, options, launch)
        trainer = device_of(config)
        if trainer.type == "cuda":
            beside = sum((trainer.index or 0) in place for place in places)
            _check_memory(config, policy, launch, beside, sleeps=options.sleep)
    launches = []
    for number in range(launch.servers):
        own = [cores[(-1 - n) % len(cores)] for n in range(number * launch.cores, (number + 1) * launch.cores)]
        launches.append(
            Launch(
                kind=kind,
                python=python,
                model=Path(model),
                port=free_port(),
                device=device,
                dtype=dtype_of(launch),
                seed=config.seed + number,
                cores=tuple(sorted(set(own))),
                memory_fraction=launch.memory_fraction,
                lora_rank=lora.r if lora is not None else 0,
                lora_targets=LORA_TARGETS if lora is None or isinstance(lora.targets, str) else tuple(lora.targets),
                accelerators=places[number],
                flags=launch.flags,
            )
        )
    tell(f"starting {launch.servers} {kind} server{'s' * (launch.servers > 1)}; logs: {place / 'logs'}")
    processes = await start(launches, place / "logs")
    return [Post(client(process.launch.url), process) for process in processes]


def _check_memory(config: Config, policy: Policy, launch: LaunchOptions, beside: int, *, sleeps: bool) -> None:
    """Whether the trainer and the servers `beside` it fit on its accelerator. Raises `UsageError`."""
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    needs = trainer_bytes(
        policy.base.num_parameters(),
        "bfloat16" if policy.base.dtype == torch.bfloat16 else "float32",
        trained=trained,
        master=False,
    )
    whole = torch.cuda.get_device_properties(device_of(config)).total_memory
    share = launch.memory_fraction * beside
    check_fits(needs, device_bytes=whole, engine_fraction=share, sleeps=sleeps)


def _arm(chaos: Chaos, posts: Sequence[Post]) -> None:
    """Let chaos strike the servers that were started here."""

    def strike(signal_: signal.Signals) -> Callable[[np.random.Generator], None]:
        def struck(rng: np.random.Generator) -> None:
            process = posts[int(rng.integers(len(posts)))].process
            if process is not None:
                process.strike(signal_)

        return struck

    chaos.kill, chaos.hang = strike(signal.SIGKILL), strike(signal.SIGSTOP)


def _place(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="agentrl-engine-"))
    place = folder.absolute() / "engine"
    place.mkdir(exist_ok=True)
    return place


async def _end(posts: Sequence[Post], place: Path, folder: Path | None) -> None:
    """End what was started, and remove what was written for servers but their logs."""
    await asyncio.gather(*(post.process.stop() for post in posts if post.process is not None))
    for unneeded in (place,) if folder is None else (place / "model", place / "weights"):
        await asyncio.to_thread(shutil.rmtree, unneeded, True)
