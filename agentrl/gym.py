"""An environment as a `gymnasium.Env`, and the registration of all known ones.

One action is one assistant message: text, with tool calls as `<tool_call>{"name": …, "arguments": …}</tool_call>`.
The episode is *terminated* when the environment ends it or the message was the final answer, and *truncated*
after `max_turns` messages. The reward is the sum of the step's turn rewards, plus the score at the end.

Importing this module registers built-in and installed environments: `import agentrl.gym` and then
`gymnasium.make("agentrl/Calculator-v0")`, or in one step `gymnasium.make("agentrl.gym:agentrl/Calculator-v0")`.
"""

from __future__ import annotations

import asyncio
import string
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import gymnasium
from gymnasium import spaces

from agentrl.chat.calls.base import Malformed
from agentrl.chat.calls.jsonlike import HermesCalls
from agentrl.env import Env
from agentrl.errors import EnvError, UsageError
from agentrl.registry import find_env, list_envs
from agentrl.task import Task
from agentrl.textual import TextEpisode
from agentrl.trajectory import ToolCall

T = TypeVar("T")
LONGEST = 1 << 24  # characters of an observation or an action
_METADATA: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}
_SAMPLE = 80  # characters of a sampled one, at most


class Words(spaces.Text):
    """Any Unicode text of at most `LONGEST` characters; samples are short and printable."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(LONGEST, min_length=0, charset=string.digits + string.ascii_letters + " .,?!-\n", seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(_SAMPLE + 1)), None)
        return super().sample(mask, probability)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def __repr__(self) -> str:
        return f"Words({self.max_length})"


class GymEnv(gymnasium.Env[str, str]):
    """`env` (an environment, its class, or a spec such as "calculator" or "my_envs.py:Orders") for Gymnasium.

    A `reset` with a seed starts the split's task stream over from that seed; one without goes on with the
    next task. `reset(options={"task": task})` plays the given `Task`. `info` names the task and holds the
    tools' schemas (at reset), the results of the step's calls, and at the end outcome, score parts and success.

    Raises `EnvError` when the environment breaks and `InfraError` when what it leans on does.
    """

    metadata = _METADATA

    def __init__(
        self,
        env: Env | type[Env] | str,
        split: str = "train",
        seed: int = 0,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = Words()
        self.action_space = Words()
        if isinstance(env, Env):
            if options:
                raise UsageError(f"options {sorted(options)} come with a class or a spec, not with a made environment")
            self.env = env.template
        else:
            self.env = (find_env(env) if isinstance(env, str) else env)(options)
        self.split = split
        self._seed: int | None = seed
        self._tasks: Iterator[Task] = iter(())
        self._stream = seed
        self._episode: TextEpisode | None = None
        self._lines: list[str] = []
        self._format = HermesCalls()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an episode: (prompt and first observation, info)."""
        unknown = sorted(set(options or ()) - {"task"})
        if unknown:
            raise UsageError(f"reset takes the option 'task', not {unknown}")
        seed, self._seed = (self._seed if seed is None else seed), None
        super().reset(seed=seed)
        if seed is not None:
            self._tasks, self._stream = iter(self.env.tasks(self.split, seed)), seed
        task = (options or {}).get("task") or self._next_task()
        _run(self._drop())
        self._episode = TextEpisode(self.env, task, (int(self.np_random.integers(2**63)),))
        observation = _run(self._open(self._episode))
        self._lines = [observation]
        return observation, {"task_id": task.id, "tools": self.env.tool_schemas()}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Say one message: (observation, reward, terminated, truncated, info)."""
        if self._episode is None or self._episode.outcome is not None:
            raise EnvError("the episode is over: call reset() before step()")
        return _run(self._step(self._episode, action))

    def render(self) -> str | None:
        """The transcript so far, in mode "ansi"."""
        return "\n".join(self._lines) if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Release the running episode, and what the environment shares among episodes. Idempotent."""
        _run(self._drop())
        _run(self.env.retire())

    def _next_task(self) -> Task:
        for _ in range(2):
            for task in self._tasks:
                return task
            self._tasks = iter(self.env.tasks(self.split, self._stream))  # a finite split starts over
        raise UsageError(f"{type(self.env).__name__} has no tasks in split {self.split!r}")

    async def _open(self, episode: TextEpisode) -> str:
        await self.env.prepare()
        return await episode.open()

    async def _drop(self) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            await episode.close()

    async def _step(self, episode: TextEpisode, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        calls: tuple[ToolCall, ...] = ()
        text, malformed = action, ""
        try:
            found = self._format.find(action, False, {})
            calls, text = found.calls, found.rest
        except Malformed as error:
            malformed = f"Error: {error}"
        heard = await episode.say(text.strip(), calls, raw=action, malformed=malformed)
        self._lines += [f"> {action}", heard.observation]
        results = [answer.result for answer in heard.answers]
        info: dict[str, Any] = {
            "task_id": episode.task.id,
            "calls": [
                {"name": call.name, "ok": result.ok, "error": result.error, "cost": result.cost}
                for call, result in zip(calls, results, strict=True)
            ],
            "images": [image.data for image in heard.images],
        }
        reward, outcome = heard.reward or 0.0, episode.outcome
        if outcome is not None:
            parts, total, success = await episode.score()
            info |= {"outcome": str(outcome), "score": parts, "success": success, "missing": total is None}
            reward += total or 0.0
            await episode.close()
        truncated = outcome is not None and outcome.kind == "truncated"
        return heard.observation, reward, outcome is not None and not truncated, truncated, info


def register(spec: str) -> str:
    """Register the environment `spec` with Gymnasium; its id, "agentrl/<Class>-v0"."""
    name = find_env(spec).__name__
    return _register(name, spec)


def _register(name: str, spec: str) -> str:
    id = f"agentrl/{name}-v0"
    if id not in gymnasium.registry:
        gymnasium.register(id=id, entry_point="agentrl.gym:GymEnv", kwargs={"env": spec})
    return id


_loops: list[asyncio.AbstractEventLoop] = []
_starting = threading.Lock()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on this module's own loop, in a thread: a notebook's loop may be running in this one."""
    with _starting:
        if not _loops:
            _loops.append(asyncio.new_event_loop())
            threading.Thread(target=_loops[0].run_forever, name="agentrl-gym", daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(work, _loops[0])
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


for _entry in list_envs():
    _register(_entry.target.rpartition(":")[2], _entry.id)
