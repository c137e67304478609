"""The code interpreter: tasks from a seed, experts that succeed, and a judge that programs cannot talk to."""

# ruff: noqa: E501 - programs and sentences are quoted whole

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from agentrl.env import Episode, Score
from agentrl.envs import code_interpreter
from agentrl.envs.code_interpreter import FAMILIES, CodeInterpreter, Question
from agentrl.errors import InfraError, UsageError
from agentrl.host import Host
from agentrl.sandboxes import backend
from agentrl.sandboxes.images import rootfs
from agentrl.task import Task
from agentrl.textual import TextEpisode
from agentrl.tools import box as boxes
from agentrl.tools.box import Box, BoxOptions
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


def function_task(env: CodeInterpreter) -> tuple[Task, Question]:
    task = next(iter(env.tasks("train", 0)))
    return task, task.data["question"]


@walled
@pytest.mark.parametrize(
    "returned",
    [
        "type('R', (), {'__repr__': lambda s: '{[]}'})()",
        "type('R', (), {'__repr__': lambda s: '[' * 9999})()",
        "type('R', (), {'__repr__': lambda s: 1 / 0})()",
        "__import__('os')._exit(0)",
        "exec('while True:\\n    try:\\n        while True: pass\\n    except BaseException: pass')",
    ],
)
def test_what_a_submission_says_never_breaks_its_judge(returned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_interpreter, "TEST_SECONDS", 0.3)
    monkeypatch.setattr(code_interpreter, "JUDGE_SECONDS", 3.0)
    env = make(kind="code")
    task, question = function_task(env)
    _, score = play(env, task, f"```python\ndef {question.name}(*a):\n    return {returned}\n```")
    assert score == ({"checks": 0.0}, 0.0, False)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\na\n```\nand\n```\nb\n```", "b"),
        ("```python\na\n```\n```", "a"),
        ("```" + "\n" * 32_000, ""),
        ("no block", ""),
        ("```python\na\n  b\n```", "a\n  b"),
    ],
)
def test_the_last_block_counts(text: str, block: str) -> None:
    assert code_interpreter._last_block(text) == block


def hosts(env: CodeInterpreter, count: int, **keys: Any) -> list[Host]:
    task = next(iter(env.tasks("train", 0)))
    return [Host(env, task, (n,), **keys) for n in range(count)]


@walled
def test_waiting_for_a_sandbox_is_not_the_policys_time() -> None:
    async def story() -> None:
        env = make(sandbox={"warm": 0, "most": 1})
        await env.prepare()
        first, second = hosts(env, 2, max_tool_seconds=1.0)
        try:
            for host in (first, second):
                await host.reset()
            code = ToolCall("python", {"code": "1"})
            assert (await first.call(code)).result.ok
            waiting = asyncio.ensure_future(second.call(code))
            await asyncio.sleep(1.5)  # longer than a call may take
            assert not waiting.done()
            await first.close()
            answer = await waiting
            assert answer.result.ok and answer.result.text == "1" and answer.result.seconds < 1.0
        finally:
            await second.close()
            await env.retire()

    asyncio.run(story())


@walled
def test_judges_do_not_wait_for_those_they_judge() -> None:
    async def story() -> None:
        env = make(kind="code", sandbox={"warm": 0, "most": 2})
        await env.prepare()
        task, question = function_task(env)
        played = [TextEpisode(env, task, (n,)) for n in range(2)]
        for episode in played:
            await episode.open()
            await episode.say("", (ToolCall("python", {"code": "1"}),))
            await episode.say(f"```python\n{question.code[0]}\n```", ())
        scores = await asyncio.gather(*(episode.score() for episode in played))
        assert [score[2] for score in scores] == [True, True]
        for episode in played:
            await episode.close()
        await env.retire()

    asyncio.run(story())


@walled
def test_after_a_call_that_ran_out_of_time_there_is_a_fresh_sandbox() -> None:
    async def story() -> None:
        env = make()
        await env.prepare()
        (host,) = hosts(env, 1, max_tool_seconds=1.0)
        await host.reset()
        await host.call(ToolCall("python", {"code": "x = 1"}))
        late = await host.call(ToolCall("python", {"code": "import time; time.sleep(2)"}))
        assert late.result.error == "timeout"
        after = await host.call(ToolCall("python", {"code": "'x' in globals()"}))
        assert after.result.text == "False\n[the variables of earlier calls were lost before this one]"
        again = await host.call(ToolCall("python", {"code": "1"}))
        assert again.result.text == "1", "that is said once"
        await host.close()
        await env.retire()

    asyncio.run(story())


@walled
def test_machinery_that_fails_during_a_run_is_infra_and_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        box = Box(BoxOptions.model_validate({"backend": WALL, "warm": 0}))
        await box.setup()
        here = boxes.choose

        async def away(*names: Any, **options: Any) -> Any:
            raise UsageError("no Docker daemon answers: start it")

        monkeypatch.setattr(boxes, "choose", away)
        episode = box.spawn()
        for _ in range(2):
            with pytest.raises(InfraError, match="no Docker daemon answers"):
                await episode.ready()
        monkeypatch.setattr(boxes, "choose", here)
        assert (await episode.run(lambda sandbox: sandbox.exec("6 * 7"))).value == "42"
        await episode.close()
        await box.close()

    asyncio.run(story())


@walled
def test_a_replaced_sandbox_holds_the_tasks_files_again() -> None:
    env = make(kind="data", families=("table",))
    task, _ = function_task(env)
    name = task.data["question"].files[0][0]
    heard, _ = play(
        env,
        task,
        ("python", {"code": "import os; os._exit(3)"}),
        ("python", {"code": f"import os; open({name!r}).close(); os.path.exists({name!r})"}),
    )
    assert "variables are lost" in heard[0] and heard[1].startswith("True")
