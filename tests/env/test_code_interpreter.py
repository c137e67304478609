"""The code interpreter: tasks from a seed, experts that succeed, and a judge that programs cannot talk to."""

# ruff: noqa: E501 - programs and sentences are quoted whole

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from agentrl.env import Episode, Score
from agentrl.envs.code_interpreter import FAMILIES, CodeInterpreter, Question
from agentrl.errors import UsageError
from agentrl.sandboxes import backend
from agentrl.sandboxes.images import rootfs
from agentrl.task import Task
from agentrl.textual import TextEpisode
from agentrl.trajectory import ToolCall


def _wall() -> str | None:
    async def first() -> str | None:
        for name in ("bubblewrap", "docker"):
            made = backend(name)
            why = await made.missing()
            await made.close()
            if why is None:
                return name
        return None

    return asyncio.run(first())


WALL = _wall()
walled = pytest.mark.skipif(WALL is None, reason="neither bubblewrap nor Docker works here (agentrl sandbox doctor)")


def make(**options: Any) -> CodeInterpreter:
    sandbox = {"backend": WALL, "warm": 1, "limits": {"seconds": 3}} | options.pop("sandbox", {})
    return CodeInterpreter({"sandbox": sandbox, **options})


def play(env: CodeInterpreter, task: Task, *said: str | tuple[str, dict[str, Any]]) -> tuple[list[str], Any]:
    """Play messages and calls; what was heard, and the score."""

    async def episode() -> tuple[list[str], Any]:
        played = TextEpisode(env, task, (0,))
        heard = []
        try:
            await played.open()
            for word in said:
                if isinstance(word, str):
                    await played.say(word, ())
                else:
                    heard.append((await played.say("", (ToolCall(*word),))).observation)
            return heard, await played.score()
        finally:
            await played.close()
            await env.retire()

    return asyncio.run(episode())


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind in FAMILIES for family in FAMILIES[kind]])
@walled
def test_experts_succeed_in_every_family(kind: str, family: str) -> None:
    async def all_of_them() -> None:
        for level in (1, 3):
            env = make(kind=kind, families=(family,), level=level)
            for task in itertools.islice(env.tasks("train", 0), 4):
                episode = TextEpisode(env, task, (1,))
                await episode.open()
                await episode.demonstrate((2,))
                assert await episode.score() == ({"checks": 1.0}, 1.0, True), (task, episode.turns)
                await episode.close()
            await env.retire()

    asyncio.run(all_of_them())


def test_tasks_follow_from_the_seed_and_the_splits_are_apart() -> None:
    for kind in FAMILIES:
        env = make(kind=kind)
        first = [task.id for task in itertools.islice(env.tasks("train", 3), 50)]
        assert first == [task.id for task in itertools.islice(make(kind=kind).tasks("train", 3), 50)]
        assert first != [task.id for task in itertools.islice(env.tasks("train", 4), 50)]
        held_out = list(env.tasks("test", 0))
        assert len(held_out) > 20 and len({task.id for task in held_out}) == len(held_out)
        key = (lambda task: task.prompt) if kind == "code" else (lambda task: task.id)
        trained = {key(task) for task in itertools.islice(env.tasks("train", 5), 2000)}
        assert not trained & {key(task) for task in held_out}


def question(**more: Any) -> Task:
    """Write `double(n)`."""
    made = Question("Write double(n).", ("def double(n): return 2 * n",), 0, name="double",
                    inputs=((1,), (5,), (0,), (-3,)), outputs=(2, 10, 0, -6), **more)  # fmt: skip
    return Task("double", made.text, data={"question": made})


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```"


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("def double(n): return 2 * n", 1.0),
        ("def double(n): return 2 * abs(n)", 0.75),
        ("def double(n): return 2.0 * n", 0.0),  # of the wrong type
        (
            "def double(n):\n    if n == 5: import os; os._exit(0)\n    return 2 * n",
            0.75,
        ),  # the session dies in one test
        ("def double(n):\n    if n == 5:\n        while True: pass\n    return 2 * n", 0.75),
        ("def other(n): return 2 * n", 0.0),
        ("def double(n:", 0.0),
        # A liar knows no expected value: it cannot say it.
        (
            "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef double(n): return Any(0)",
            0.25,
        ),
        ("class Any:\n    def __repr__(self): return 'expected'\ndef double(n): return Any()", 0.0),
        ("import sys\ndef double(n):\n    print('status ok'); sys.exit(0)", 0.0),
        ("def double(n):\n    import json; json.dumps = lambda *a, **k: '{}'\n    return 'x'", 0.0),
    ],
)
@walled
def test_submitted_functions_are_judged_apart(code: str, share: float) -> None:
    _, (parts, total, success) = play(make(kind="code"), question(), block(code))
    assert (parts["checks"], total, success) == (share, share, share == 1.0)


@walled
def test_the_judge_is_a_sandbox_that_the_policy_never_touched() -> None:
    plant = "open('/workspace/double.py', 'w').write('x'); open('/tmp/planted', 'w').close(); import builtins; builtins.int = 5"
    code = "import os\ndef double(n): return 2 * n if not os.path.exists('/tmp/planted') and int == type(1) else 0"
    _, (_, total, _) = play(make(kind="code"), question(), ("python", {"code": plant}), block(code))
    assert total == 1.0


@walled
def test_variables_and_files_stay_and_errors_are_told() -> None:
    env = make(tools=("python", "shell", "files"))
    task = next(iter(env.tasks("train", 0)))
    heard, (_, total, _) = play(
        env,
        task,
        ("python", {"code": "x = 5"}),
        ("python", {"code": "x + 1"}),
        ("python", {"code": "1 / 0"}),
        ("write_file", {"path": "a.txt", "text": "one two\n"}),
        ("edit_file", {"path": "a.txt", "old": "two", "new": "three"}),
        ("shell", {"command": "cat a.txt"}),
        ("read_file", {"path": "../../etc/passwd"}),
        f"The answer is {task.answer}.",
    )
    assert heard[0] == "[no output]" and heard[1] == "6"
    assert "ZeroDivisionError" in heard[2] and "[the program failed]" in heard[2]
    assert heard[3:6] == ["wrote 8 bytes to a.txt", "edited a.txt", "one three"]
    assert "must stay in" in heard[6] and total == 1.0


@walled
def test_a_policy_that_takes_its_sandbox_down_is_told_and_goes_on() -> None:
    env = make(sandbox={"limits": {"seconds": 1, "memory_mb": 128}})
    task = next(iter(env.tasks("train", 0)))
    heard, (_, total, _) = play(
        env,
        task,
        ("python", {"code": "x = 5"}),
        ("python", {"code": "import os; os._exit(0)"}),
        ("python", {"code": "x"}),
        ("python", {"code": "bytearray(500 << 20)"}),
        ("python", {"code": "import time; time.sleep(9)"}),
        ("python", {"code": "40 + 2"}),
        f"It is {task.answer}",
    )
    assert "the session ended" in heard[1] and "variables are lost" in heard[1]
    assert "NameError" in heard[2] and "memory" in heard[3].lower()
    assert "ran longer than 1 s; variables are kept" in heard[4] and heard[5] == "42" and total == 1.0


@walled
def test_pictures_of_a_jupyter_session_reach_the_policy() -> None:
    if rootfs() is None:
        pytest.skip("no root file system with ipykernel; agentrl sandbox build makes it")
    env = make(sandbox={"session": "jupyter", "warm": 0})
    task = next(iter(env.tasks("train", 0)))
    png = "89504e470d0a1a0a0000000d49484452000000040000000308000000000000000000000000"
    show = f"from IPython.display import Image, display\ndisplay(Image(bytes.fromhex('{png}')))\nx = 5"
    heard, _ = play(env, task, ("python", {"code": show}), ("python", {"code": "x"}), "No.")
    assert "[image 4x3" in heard[0] and heard[1] == "5"


def test_bad_options_are_refused() -> None:
    for options, sentence in (
        ({"families": ["nope"]}, "no family 'nope'"),
        ({"tools": ["files"]}, "nothing else runs a program"),
        ({"sandbox": {"limits": {"seconds": 60}}}, "leaves no time"),
        ({"sandbox": {"image": "x"}}, "image belongs to backend: docker"),
        ({"sandbox": {"backend": "nope"}}, "docker"),
        ({"sandbox": {"warm": 9, "most": 3}}, "more than most"),
        ({"sandbox": {"limits": {"seconds": 5, "life": 4}}}, "must be longer"),
    ):
        with pytest.raises(ValidationError, match=sentence):
            CodeInterpreter(options)


def test_without_any_sandbox_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentrl.sandboxes import bubblewrap, docker

    async def no_docker(self: Any) -> str:
        return "no Docker daemon answers: start it"

    monkeypatch.setattr(docker.DockerBackend, "missing", no_docker)
    monkeypatch.setattr(
        bubblewrap, "_missing", lambda: "bubblewrap is not installed; on Debian: apt-get install bubblewrap"
    )
    env = CodeInterpreter()
    with pytest.raises(UsageError, match=r"apt-get install bubblewrap.*agentrl sandbox doctor"):
        asyncio.run(env.prepare())


def test_scores_are_shares_of_checks() -> None:
    env = make()
    task = next(iter(env.tasks("train", 0)))
    verdict = asyncio.run(env.spawn().score(Episode(task)))
    assert verdict == Score({"checks": 0.0}, False)
