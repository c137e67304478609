"""Branches: an episode is acted out up to a turn and goes on live, with another policy or a person's words.

The branch is recorded in a run folder of its own, together with the episode that it left, so that it can refer to
that one's spans; its `fork` says where it left. It has the id of a branch of that episode, and so the same seed of
the environment: a branch can be replayed, and branched, like any other episode.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from agentrl.chat import ChatFormat
from agentrl.config import SCHEMA_VERSION, Config, EvalSection
from agentrl.console import Message, Reporter, make_reporter
from agentrl.content import text_of
from agentrl.context import AppendOnly, ContextPolicy
from agentrl.engines.options import LocalOptions
from agentrl.env import Say
from agentrl.errors import RunFailed, UsageError
from agentrl.loader import load
from agentrl.play import read_calls
from agentrl.replay.acting import CannotReplay, host_of
from agentrl.replay.difference import differing_turn, spelt
from agentrl.replay.recorded import RESOLVED, Recorded
from agentrl.replay.retelling import PERSON, Retellable, Retelling, Silent
from agentrl.rollout.actors import Actor
from agentrl.rollout.endpoint import Endpoint, EndpointActor
from agentrl.rollout.episode import Hooks, Limits, LiveEpisode
from agentrl.store import DamagedFrame, Entry, EpisodeKey, RunFolder, StoreWriter
from agentrl.store.reader import StoreReader
from agentrl.store.run import LOCK
from agentrl.store.segments import held
from agentrl.task import Task
from agentrl.train.checkpoint import chosen
from agentrl.train.judge import restored_policy
from agentrl.train.options import HFModel, ScratchModel
from agentrl.train.parts import make_chat, pictures_of, policy_actor
from agentrl.train.serving import open_engine
from agentrl.train.stages import RLStage
from agentrl.train.trainer import stage_labels
from agentrl.trajectory import Fork, Outcome, Source, Trajectory, Turn, ids_of


@dataclass(frozen=True, slots=True)
class Speaking:
    """Who speaks from the turn on: `say`, a person's words for one turn; and a policy, where one is named or nothing
    is said (see `agentrl.replay.verbs.fork`)."""

    say: str | None = None
    checkpoint: str | None = None
    model: str | Path | None = None
    endpoint: str | None = None
    endpoint_model: str | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        named = {"--checkpoint": self.checkpoint, "--model": self.model, "--endpoint": self.endpoint}
        given = [name for name, value in named.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} name different speakers; give one of them")
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise UsageError("--endpoint URL and --endpoint-model NAME belong together; give both")
        if self.temperature is not None and (self.temperature < 0 or not self.goes_on):
            raise UsageError("--temperature takes a number from 0, and belongs to a policy that goes on; name one")
        if self.say is not None and not self.say.strip():
            raise UsageError("--say is empty; write a message, or a call such as name(argument=value)")

    @property
    def goes_on(self) -> bool:
        """Whether a policy speaks."""
        return self.say is None or any(given is not None for given in (self.checkpoint, self.model, self.endpoint))


@dataclass(frozen=True, slots=True)
class _Voice:
    """A conversation's maker, and what the record says of its speaker."""

    name: str
    source: Source
    max_context: int | None
    what: str
    actor: Actor | None
    chat: ChatFormat | None
    pieces: Any = None

    def open(self, key: EpisodeKey, group: str, tools: Sequence[dict[str, Any]]) -> Retellable:
        """The conversation of the branch."""
        if self.actor is not None:
            return self.actor.open(key.id, group, tools, None)  # type: ignore[return-value]  # policies and endpoints
        assert self.chat is not None
        return Silent(self.chat, tools)


async def forked(
    source: Recorded, turn: int, speaking: Speaking, out: Path, reporter: Reporter | None = None
) -> Trajectory:
    """Play and record the branch. Raises `UsageError` where it cannot begin, `RunFailed` where the recorded turns do
    not come out as they did."""
    if len(source.entries) != 1:
        raise UsageError(
            f"{source.entries[0].group_id} is a group of {len(source.entries)}; name one of its trajectories"
        )
    (entry,) = source.entries
    try:
        record, task = source.load(entry), source.task(entry)
    except CannotReplay as error:
        raise UsageError(f"{entry.id} cannot be forked: {error}") from error
    if not 0 <= turn <= len(record.turns):
        raise UsageError(f"{entry.id} has {len(record.turns)} turns; --from-turn is from 0 to {len(record.turns)}")
    reporter = reporter or make_reporter()
    loaded = source.loaded
    if speaking.model is not None:
        loaded = loaded.with_section("model", HFModel(path=str(speaking.model)))
    config = loaded.config
    at = chosen(source.folder, speaking.checkpoint) if _needs_checkpoint(speaking) else None
    if speaking.endpoint is None and any(not kept.output for kept in record.turns[:turn]):
        raise UsageError(f"{entry.id} has no token ids (an endpoint spoke, or they were not kept); give --endpoint")
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(
            RunFolder.create(out, loaded.yaml, config_version=SCHEMA_VERSION, command=sys.argv)
        )
        if (source.folder / "tokenizer").is_dir():
            shutil.copytree(source.folder / "tokenizer", out / "tokenizer")
        stack.push(partial(_remove_refused, out))
        voice = await _voice(source, config, speaking, at, folder.path, reporter, stack)
        _check_vocabulary(source.reader, record, turn, voice)
        writer = stack.enter_context(StoreWriter(out, pieces=voice.pieces))
        _copy_images(source.reader, record, writer, reporter.warn)
        branch = await _branch(source, entry, record, task, turn, speaking, voice, writer)
        step = {"step": entry.step, "stage": entry.stage, "split": entry.split}
        writer.add([record, branch], **step)  # type: ignore[arg-type]
    reporter.example(f"{branch.id}: turn {turn} on, {voice.what}", _messages(task, branch), branch.reward)
    return branch


def _remove_refused(out: Path, kind: type[BaseException] | None, *_: object) -> None:
    """Where a branch could not begin, its new folder goes again, so that the same command can be given again."""
    if kind is not None and issubclass(kind, UsageError | RunFailed):
        shutil.rmtree(out, ignore_errors=True)


def _needs_checkpoint(speaking: Speaking) -> bool:
    return speaking.goes_on and speaking.model is None and speaking.endpoint is None


async def _voice(
    source: Recorded,
    config: Config,
    speaking: Speaking,
    at: Path | None,
    out: Path,
    reporter: Reporter,
    stack: AsyncExitStack,
) -> _Voice:
    temperature = speaking.temperature
    if temperature is None:
        temperature = (config.eval or EvalSection()).temperature
    if speaking.endpoint is not None:
        there = EndpointActor(Endpoint(speaking.endpoint, speaking.endpoint_model or "", temperature=temperature))
        stack.push_async_callback(there.close)
        what = f"{speaking.endpoint_model} at {speaking.endpoint}"
        return _Voice(there.name, there.source, None, what, there, None)
    if not speaking.goes_on:
        tokenizer = _tokenizer(source.folder, config)
        chat = make_chat(config, tokenizer, pictures_of(config, tokenizer))
        return _Voice(PERSON, "teacher", None, "in a person's words", None, chat, _pieces(chat))
    _check_servers(source, config, reporter)
    run = source.folder if speaking.model is None else None
    policy = await restored_policy(config, run, at)
    chat = make_chat(config, policy.tokenizer, policy.pictures)
    engine = await open_engine(config, policy, out, reporter.note)
    stack.push_async_callback(engine.close)
    actor = policy_actor(config, engine, chat, temperature=temperature)
    what = f"with {at}" if at is not None else f"with {speaking.model}"
    return _Voice(actor.name, actor.source, actor.max_context, what, actor, chat, policy.pieces)


def _check_servers(source: Recorded, config: Config, reporter: Reporter) -> None:
    """Servers that the configuration names get the policy's weights: not while the run trains with them."""
    if isinstance(config.engine, LocalOptions) or not config.engine.urls:
        return
    theirs: Config = load([source.folder / RESOLVED], []).config
    shared = set(config.engine.urls) & set(getattr(theirs.engine, "urls", ()))
    if shared and held(source.folder / LOCK):
        raise UsageError(
            f"{', '.join(sorted(shared))} serves this run, which is still at work, and would get other weights: name "
            "other servers with engine.urls=[URL], compute here with engine.type=local, or ask one with --endpoint"
        )
    reporter.note(f"{', '.join(config.engine.urls)} gets the weights of the policy that goes on")


def _tokenizer(run: Path, config: Config) -> Any:
    folder = run / "tokenizer" if isinstance(config.model, ScratchModel) else Path(config.model.path).expanduser()
    if not folder.is_dir():
        raise UsageError(f"there is no tokenizer in {folder}; name the policy's folder with --model, or an --endpoint")
    return AutoTokenizer.from_pretrained(str(folder))


def _pieces(chat: ChatFormat) -> Any:
    return lambda ids: [str(chat.tokenizer.decode([int(i)], skip_special_tokens=False)) for i in ids]


def _check_vocabulary(reader: StoreReader, record: Trajectory, turn: int, voice: _Voice) -> None:
    """A policy goes on from the record's ids only where they mean the same to it."""
    if voice.pieces is None:
        return
    ids = sorted({int(i) for each in record.turns[: turn + 1] for i in ids_of(each.context)})
    recorded = reader.pieces(ids)
    size = voice.chat.vocab_size if voice.chat is not None else 0
    now = dict(zip(ids, voice.pieces(ids), strict=True))
    for token in ids:
        if token >= size or recorded.get(token, now[token]) != now[token]:
            what = "is beyond its vocabulary" if token >= size else f"is {now[token]!r} to it"
            raise UsageError(
                f"the policy that is to go on has another tokenizer than the record: token {token} "
                f"({recorded.get(token, '?')!r}) {what}; name a policy of the same vocabulary, or an --endpoint"
            )


async def _branch(
    source: Recorded,
    entry: Entry,
    record: Trajectory,
    task: Task,
    turn: int,
    speaking: Speaking,
    voice: _Voice,
    writer: StoreWriter,
) -> Trajectory:
    config, env = source.config, source.env
    key = _key(source.reader, entry)
    deadlines, rollout = config.rollout.deadlines, config.rollout
    tools = env.tool_schemas()
    retelling = Retelling(record, turn, voice.open(key, record.group_id, tools), _said(speaking, source))
    episode = LiveEpisode(
        key=key,
        group=record.group_id,
        task=task,
        host=host_of(env, task, record.id, config.seed, deadlines),
        conversation=retelling,
        context=_context(config, entry.stage),
        limits=Limits(
            max_turns=env.max_turns,
            max_tokens=rollout.max_tokens,
            max_episode_tokens=rollout.max_episode_tokens,
            max_context=voice.max_context,
            turn_seconds=deadlines.turn,
            episode_seconds=deadlines.episode,
            retries=rollout.retries,
        ),
        hooks=Hooks(lambda live, index, done: writer.turn(live.key, index, done), writer.image, lambda *_: None),
        stream=(config.seed, key.id),
        actor=voice.name,
        source=voice.source,
    )
    try:
        await episode.open()
        for number, recorded in enumerate(record.turns[:turn]):
            _compare(episode, number, recorded, await episode.step())
        if episode.over:
            raise UsageError(f"{record.id} is over ({episode.outcome}) after {turn} turns; fork it from an earlier one")
        spoken = await episode.step()
        while speaking.goes_on and spoken is not None:
            spoken = await episode.step()
        if not episode.over:
            episode.outcome = Outcome("truncated", "turns", "nobody was named to go on after a person's turn")
        trajectory = await episode.finish()
        if trajectory.outcome.why in ("infra", "env"):
            raise RunFailed(
                f"{record.id} cannot go on from turn {turn}, {trajectory.outcome}: {trajectory.outcome.detail}"
            )
    finally:
        await episode.close()
    turns = [*record.turns[:turn], *trajectory.turns[turn:]]
    if speaking.say is not None and len(turns) > turn:
        turns[turn] = replace(turns[turn], actor=PERSON)
    return replace(
        trajectory,
        turns=tuple(turns),
        fork=Fork(record.id, turn, retelling.n_shared),
        extra={**trajectory.extra, "forked": {"run": str(source.folder), "attempt": entry.attempt, "by": voice.what}},
    )


def _context(config: Config, stage: str) -> ContextPolicy:
    """The context policy that a stage's episodes were played with: its own, or that of the stage it prepares."""
    labels = stage_labels(config.stages)
    at = next((i for i, label in enumerate(labels) if stage == label or stage.startswith(f"{label}-")), 0)
    return next((each.context for each in config.stages[at:] if isinstance(each, RLStage)), AppendOnly())


def _compare(episode: LiveEpisode, number: int, recorded: Turn, now: Turn | None) -> None:
    if now is None:
        raise RunFailed(f"the episode is over before turn {number}: {episode.outcome}; it cannot be forked there")
    different = differing_turn(number, recorded, now)
    if different is not None:
        mine, yours = different.shown
        raise RunFailed(
            f"the recorded turns come out otherwise, so there is no state to go on from: {different.place}, "
            f"{different.what}: recorded {mine}, now {yours}"
        )


def _said(speaking: Speaking, source: Recorded) -> Say | None:
    """A typed line as `agentrl env play` reads it: calls, or a message."""
    if speaking.say is None:
        return None
    line = speaking.say.strip()
    tools = {name: tool for name, (_, tool) in source.env.toolbox().items()}
    calls = [] if line.startswith("/say ") else read_calls(line, tools)
    return Say(calls=tuple(calls)) if calls else Say(line.removeprefix("/say "))


def _key(reader: StoreReader, entry: Entry) -> EpisodeKey:
    """The key of a branch of `entry` that the run does not have yet."""
    sample, *branches = entry.id.rpartition("/")[2].split(".")
    try:
        numbers = tuple(int(number) for number in branches)
        key = EpisodeKey(entry.stage, entry.step, entry.split, entry.task_id, int(sample), numbers)
    except ValueError as error:
        raise UsageError(f"{entry.id} was not recorded by a rollout, so that it cannot be forked") from error
    number = 1
    while reader.attempt(replace(key, branch=(*numbers, number)).id) >= 0:
        number += 1
    return replace(key, branch=(*numbers, number))


def _copy_images(reader: StoreReader, record: Trajectory, writer: StoreWriter, tell: Callable[[str], None]) -> None:
    """The record's pictures into the branch's folder. What is missing is said: a policy sees words in its place."""
    shown = {image for span in record.spans() for image in span.images}
    for sha256 in sorted(shown | {image for turn in record.turns for use in turn.tools for image in use.result.images}):
        try:
            writer.image(reader.picture(sha256))
        except (KeyError, DamagedFrame) as error:
            tell(str(error.args[0]))


def _messages(task: Task, branch: Trajectory) -> list[Message]:
    messages: list[Message] = [("user", text_of(task.prompt))]
    for turn in branch.turns:
        if turn.actor == PERSON:
            messages.append(("person", "; ".join(spelt(use.call) for use in turn.tools) or turn.text))
        else:
            messages.append(("assistant", turn.text))
        if turn.observation:
            messages.append(("tool" if turn.tools else "user", turn.observation))
    return messages
