"""A run folder with one of everything that the pages show: made by the store's own writer, without a model.

`make` writes it. Its episodes answer questions about orders: a group of siblings with forks, an episode of many
thousands of tokens, one on screens, and one whose every text is hostile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentrl.algo.advantage import GRPO
from agentrl.content import Image
from agentrl.store import RunFolder, StoreReader, StoreWriter
from agentrl.trajectory import (
    Context,
    Floats,
    Fork,
    Group,
    Ids,
    Member,
    Outcome,
    Sampling,
    Span,
    ToolCall,
    ToolResult,
    ToolUse,
    Trajectory,
    Turn,
    VersionRun,
    as_floats,
    as_ids,
)

_PIECE = re.compile(r"<\|im_start\|>|<\|im_end\|>| ?[A-Za-z]{1,7}|\d{1,3}|\n+| +|.", re.DOTALL)
HOSTILE = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned=2'></script>"
    "<svg onload='window.pwned=3'><style>*{display:none}</style></svg>{@html 1}"
    " \x1b[31mred\x1b[0m \u202eevil\u202c nul:\x00 bell:\x07 lone:\ud800 end"
)
CONFIG = """\
name: desk
env: orders
model: {type: scratch}
stages:
- type: rl
  steps: 60
  prompts: 8
  samples: 8
  estimator: {type: grpo}
  shapers: [{type: tool_cost, weight: 0.02}]
  transforms: []
  behaviour: {type: rollout}
  surrogate: {type: ppo_clip}
  aggregator: {type: token_mean}
  aux: []
"""


@dataclass
class Words:
    """A vocabulary that grows with what is said; ids are numbers in order of first use."""

    ids: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    def encode(self, text: str) -> Ids:
        found = []
        for piece in _PIECE.findall(text):
            if piece not in self.ids:
                self.ids[piece] = len(self.texts)
                self.texts.append(piece)
            found.append(self.ids[piece])
        return as_ids(found)

    def pieces(self, ids: Ids) -> list[str]:
        return [self.texts[i] for i in ids.tolist()]


@dataclass
class Step:
    """One turn of a script."""

    think: str = ""
    say: str = ""
    calls: Sequence[tuple[str, dict[str, Any], ToolResult]] = ()
    seconds: float = 1.0
    cut: bool = False


class Desk:
    """Plays scripts into records."""

    def __init__(self, seed: int = 7) -> None:
        self.words = Words()
        self.rng = np.random.default_rng(seed)

    def span(self, text: str, role: Any, origin: Any) -> Span:
        return Span(self.words.encode(text), role, origin, actor=role)

    def sampled(self, text: str, version: int) -> Span:
        ids = self.words.encode(text)
        n = int(ids.size)
        # Most tokens are nearly sure; beginnings of words and numbers are where a policy wavers.
        wild = self.rng.random(n) < 0.16
        surprise = np.where(wild, self.rng.exponential(1.6, n), self.rng.exponential(0.06, n))
        entropy = np.where(wild, self.rng.gamma(3.0, 0.55, n), self.rng.exponential(0.05, n))
        half = max(1, n // 2)
        runs = (
            (VersionRun(version, 0, half), VersionRun(version + 1, half, n)) if n > 1 else (VersionRun(version, 0, n),)
        )
        return Span(
            ids,
            "assistant",
            "sampled",
            logprobs=as_floats(-surprise),
            entropies=as_floats(entropy),
            entropy="exact",
            versions=runs,
        )

    def prompt(self, question: str) -> Context:
        spans = [
            self.span(
                "<|im_start|>system\nYou answer questions about an order book. Tools: search_orders, refunds, python."
                "\nThink before you call.<|im_end|>\n",
                "system",
                "template",
            ),
            self.span(f"<|im_start|>user\n{question}<|im_end|>\n", "user", "template"),
            self.span("<|im_start|>assistant\n", "assistant", "template"),
        ]
        return tuple(span[:] for span in spans)

    def turn(self, context: Context, step: Step, version: int) -> tuple[Turn, Context]:
        """The turn, and the context of the next."""
        text = f"<think>\n{step.think}\n</think>\n" if step.think else ""
        text += step.say
        for name, arguments, _ in step.calls:
            text += f"\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        safe = text.encode("utf-8", "replace").decode()
        output = self.sampled(safe + ("" if step.cut else "<|im_end|>"), version)
        tools = tuple(
            ToolUse(ToolCall(name, arguments, f"call-{i}"), result)
            for i, (name, arguments, result) in enumerate(step.calls)
        )
        observation = "\n".join(use.result.text for use in tools)
        turn = Turn(
            context,
            (output,),
            text,
            step.say,
            Sampling(max_tokens=4096),
            "length" if step.cut else "stop",
            tools=tools,
            observation=observation,
            seconds=step.seconds,
            cost=0.0,
        )
        after = [*context, output[:]]
        if tools:
            short = observation[:20_000].encode("utf-8", "replace").decode()
            after += [
                self.span("\n<|im_start|>user\n<tool_response>\n", "tool", "template")[:],
                self.span(short, "tool", "tool")[:],
                self.span("\n</tool_response><|im_end|>\n<|im_start|>assistant\n", "assistant", "template")[:],
            ]
        return turn, tuple(after)

    def play(
        self,
        group: str,
        sample: str,
        question: str,
        script: Sequence[Step],
        *,
        score: Mapping[str, float | None],
        success: bool | None,
        outcome: Outcome | None = None,
        parent: Trajectory | None = None,
        at: int = 0,
        version: int = 12,
    ) -> Trajectory:
        turns: list[Turn] = list(parent.turns[:at]) if parent else []
        context = parent.turns[at].context if parent else self.prompt(question)
        fork = Fork(parent.id, at, sum(len(piece) for piece in context)) if parent else None
        for step in script:
            turn, context = self.turn(context, step, version)
            turns.append(turn)
        values = [value for value in score.values()]
        reward = None if any(v is None for v in values) else float(sum(v or 0.0 for v in values))
        return Trajectory(
            f"{group}/{sample}",
            group,
            group.split("/", 1)[1],
            tuple(turns),
            outcome or Outcome("completed"),
            4711,
            env="a3f19c2e77d1",
            fork=fork,
            score=dict(score),
            reward=reward,
            success=success,
        )


def ok(text: str, seconds: float = 0.2, cost: float = 1.0, **more: Any) -> ToolResult:
    return ToolResult(text, seconds=seconds, cost=cost, **more)


def bad(error: Any, text: str, seconds: float = 0.1) -> ToolResult:
    return ToolResult(text, ok=False, error=error, seconds=seconds, cost=1.0)


TABLE = (
    "order\tcustomer\tpromised\tdelivered\ttotal\n1042\tMarlow & Sons\t2026-03-04\t2026-03-09\t310.00\n"
    "1047\tHalden Ltd\t2026-03-11\t2026-03-12\t92.50\n1051\tBrightwell\t2026-03-15\t2026-03-22\t1180.00\n"
    "1060\tOkafor GmbH\t2026-03-27\t2026-04-02\t455.75\n"
)
REFUNDS = '{"1042": 31.0, "1047": 0.0, "1051": 236.0, "1060": 45.5}'
THINK = (
    "The question asks for refunds on orders that shipped late in March. I need the late orders first, then the refund"
    " of each. An order promised in March and delivered in April is late, too, so 1060 counts. The refunds are per"
    " order; a sum over four numbers I could do by hand, but a slip there costs the whole reward, so I let Python add"
    " them up."
)
QUESTION = "Which orders of March 2026 came late, and how much did we refund for them in all? Answer with one number."


def siblings(desk: Desk) -> Group:
    """Eight answers to one question: five from the prompt on, three branches of the first."""
    search = ("search_orders", {"month": "2026-03", "status": "late"}, ok(TABLE, 0.42, hint="table"))
    refunds = ("refunds", {"orders": [1042, 1047, 1051, 1060]}, ok(REFUNDS, 0.18, hint="json"))
    add = ("python", {"code": "amounts = [31.0, 0.0, 236.0, 45.5]\nprint(sum(amounts))"}, ok("312.5", 0.9, 2.0))
    three = (
        "refunds",
        {"orders": [1042, 1047, 1051]},
        ok('{"1042": 31.0, "1047": 0.0, "1051": 236.0}', 0.17, hint="json"),
    )
    g = "rl-12/orders-0317"

    def play(sample: str, script: Sequence[Step], right: float, form: float, **more: Any) -> Trajectory:
        return desk.play(
            g, sample, QUESTION, script, score={"answer": right, "format": form}, success=right == 1.0, **more
        )

    first = play(
        "0",
        [
            Step(THINK, "I look the late orders up.", [search], 1.9),
            Step("Four orders. Now their refunds.", "", [refunds], 1.1),
            Step("Add them exactly.", "", [add], 1.6),
            Step("", "The refunds come to 312.5.", seconds=0.4),
        ],
        1.0,
        0.1,
    )
    second = play(
        "1",
        [
            Step(THINK[:150], "I look the late orders up.", [search], 1.4),
            Step("1060 was delivered in April, so it is not a March order. Three orders then.", "", [three], 1.0),
            Step("31 + 236 = 267.", "The refunds come to 267.", seconds=0.6),
        ],
        0.0,
        0.1,
    )
    third = play(
        "2",
        [
            Step(
                "",
                "I guess.",
                [("search_orders", {"month": "March"}, bad("arguments", "month: write it as YYYY-MM"))],
                0.8,
            ),
            Step(
                "", "", [("search_orders", {"month": "2026-03", "status": "late"}, ok(TABLE, 0.4, hint="table"))], 0.9
            ),
            Step("", "", [("python", {"code": "while True: pass"}, bad("timeout", "stopped after 5 s", 5.0))], 5.6),
            Step("", "I cannot tell.", seconds=0.3),
        ],
        0.0,
        0.0,
    )
    fourth = play(
        "3",
        [
            Step(THINK, "I look the late orders up.", [search], 1.8),
            Step("Four orders. Now their refunds.", "", [refunds], 1.2),
            Step("31 + 0 + 236 + 45.5 = 312.5.", "The refunds come to 312.5.", seconds=0.7),
        ],
        1.0,
        0.1,
    )
    fifth = play(
        "4",
        [Step(THINK * 3, "", [], 4.0, cut=True)],
        0.0,
        0.0,
        outcome=Outcome("truncated", "tokens", "the turn's 4096 tokens were used up while thinking"),
    )
    branch = [
        play(
            "0.1",
            [Step("By hand then: 267 + 45.5.", "The refunds come to 312.5.", seconds=0.5)],
            1.0,
            0.1,
            parent=first,
            at=2,
        ),
        play("0.2", [Step("", "The refunds come to 312.", seconds=0.4)], 0.0, 0.1, parent=first, at=3),
        play(
            "0.3",
            [
                Step(
                    "Only the big one matters.",
                    "",
                    [("refunds", {"orders": [1051]}, ok('{"1051": 236.0}', hint="json"))],
                    0.9,
                ),
                Step("", "The refunds come to 236.", seconds=0.3),
            ],
            0.0,
            0.1,
            parent=first,
            at=1,
        ),
    ]
    return credited(desk, g, [first, second, third, fourth, fifth, *branch], 12)


def credited(desk: Desk, id: str, trajectories: Sequence[Trajectory], step: int) -> Group:
    members = [Member(t, parts={"tool_cost": -0.02 * t.tool_cost}) for t in trajectories]
    for member in members:
        if member.reward is not None:
            member.reward += member.parts["tool_cost"]
    group = Group(id, trajectories[0].task_id, members, step)
    GRPO().estimate([group])
    for member in members:
        noise: list[Floats] = []
        for turn in member.trajectory.turns:
            noise.append(as_floats(np.minimum(0.0, turn.logprobs + desk.rng.normal(0, 0.06, turn.n_sampled))))
        member.arrays["old"] = noise
        member.arrays["age"] = member.spread([float(i % 3) for i in range(len(member.trajectory.turns))])
        if member.advantages is not None:
            member.weights = member.spread([1.0 if i else 0.5 for i in range(len(member.trajectory.turns))])
    return group


def long_one(desk: Desk, tokens: int = 32_000) -> Trajectory:
    """An episode of about `tokens` tokens in the row view."""
    vocabulary = [
        "the",
        "order",
        "was",
        "late",
        "because",
        "a",
        "carrier",
        "lost",
        "it",
        "and",
        "nobody",
        "wrote",
        "to",
        "the",
        "customer",
        "until",
        "March",
        "then",
    ]
    lines = [" ".join(desk.rng.choice(vocabulary, 12)) + "." for _ in range(60)]
    script = []
    for i in range(max(1, tokens // 1330)):
        said = "\n".join(lines[(i + k) % 60] for k in range(36))
        got = "\n".join(f"{k}: {lines[(i * 3 + k) % 60]}" for k in range(40))
        script.append(Step(said, f"Page {i + 1}.", [("read", {"page": i + 1}, ok(got, 0.3))], 2.0))
    script.append(Step("", "Nothing else was late.", seconds=0.5))
    return desk.play("rl-12/archive-0002", "0", "Read the archive.", script, score={"answer": 1.0}, success=True)


def hostile_one(desk: Desk, size: int) -> Trajectory:
    huge = ("A" * 79 + "\n") * (size // 80)
    script = [
        Step(HOSTILE, HOSTILE, [("<script>x</script>", {"<b>": HOSTILE, "n": 1}, ok(HOSTILE, hint="markdown"))]),
        Step("", "", [("dump", {}, ok(huge)), ("grid", {}, ok(HOSTILE + "\n" + HOSTILE, hint="table"))]),
        Step("", HOSTILE),
    ]
    group = "rl-12/<script>alert(1)</script>"
    return desk.play(
        group, "0", HOSTILE.encode("utf-8", "replace").decode(), script, score={"<i>x</i>": 0.0}, success=False
    )


def screen_one(desk: Desk, images: Sequence[Image], clicks: Sequence[tuple[int, int]]) -> Trajectory:
    script = [Step("", "I look at the screen.", [("screenshot", {}, ok("", 0.1, 0.0, images=(images[0].sha256,)))])]
    for (x, y), image in zip(clicks, images[1:], strict=True):
        result = ok(f"clicked at {x}, {y}", 0.12, 0.5, images=(image.sha256,))
        script.append(Step("", "", [("click", {"x": x, "y": y}, result)], 0.7))
    script.append(Step("", "The mail is archived.", seconds=0.2))
    return desk.play(
        "rl-12/inbox-0004", "0", "Archive the mail from Brightwell.", script, score={"state": 1.0}, success=True
    )


def board_one(desk: Desk) -> Trajectory:
    board = "# # # # #\n# @ . . #\n# . $ . #\n# . . o #\n# # # # #"
    change = (
        "--- a/pick.py\n+++ b/pick.py\n@@ -1,2 +1,2 @@\n def pick(items):\n"
        "-    return items[0]\n+    return max(items)\n"
    )
    script = [
        Step("", "I push the box.", [("move", {"to": "down"}, ok(board, hint="board"))]),
        Step("", "", [("patch", {"file": "pick.py"}, ok(change, hint="diff"))]),
        Step("", "", [("show", {}, ok("| a | b |\n|---|---|\n| 1 | two |", hint="table"))]),
        Step("", "Done."),
    ]
    return desk.play(
        "rl-12/board-0001",
        "0",
        "Push the box.",
        script,
        score={"answer": None},
        success=None,
        outcome=Outcome("failed", "infra", "the sandbox did not answer within 30 s, three times"),
    )


def metrics(steps: int = 60, seed: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        grown = 1 / (1 + np.exp(-(step - 22) / 7))
        success = float(np.clip(0.12 + 0.78 * grown + rng.normal(0, 0.035), 0, 1))
        lines.append(
            {
                "stage": "rl",
                "step": step,
                "time": 1795258702.0 + 21 * step,
                "reward": success + 0.08 - 0.02 * grown,
                "success": success,
                "reward_std": 0.42 - 0.25 * grown + float(rng.normal(0, 0.02)),
                "tool_calls": 4.1 - 1.3 * grown + float(rng.normal(0, 0.12)),
                "tool_cost": 5.2 - 1.9 * grown + float(rng.normal(0, 0.15)),
                "tokens": 420 + 260 * grown + float(rng.normal(0, 18)),
                "turns": 3.4 + 0.5 * grown + float(rng.normal(0, 0.08)),
                "tool_errors": 0.5 - 0.42 * grown + abs(float(rng.normal(0, 0.02))),
                "parse_errors": 0.2 - 0.18 * grown + abs(float(rng.normal(0, 0.01))),
                "entropy": 0.9 - 0.5 * grown + float(rng.normal(0, 0.02)),
                "approx_kl": 4e-4 + abs(float(rng.normal(0, 2e-4))),
                "clip_fraction": 0.012 + abs(float(rng.normal(0, 0.005))),
                "ratio": 1 + float(rng.normal(0, 6e-4)),
                "grad_norm": 0.6 + abs(float(rng.normal(0, 0.12))),
                "loss": float(rng.normal(0, 0.02)),
                "lr": 1e-6 * min(1, step / 8),
                "gap/mean_abs": 2.1e-3 + abs(float(rng.normal(0, 2e-4))),
                "gap/max_abs": 0.11 + abs(float(rng.normal(0, 0.02))),
                "gap/kl": 3e-5 + abs(float(rng.normal(0, 5e-6))),
                "time/rollout": 13 + float(rng.normal(0, 0.8)),
                "time/update": 6.2 + float(rng.normal(0, 0.2)),
                "time/store": 0.05,
                "speed/episodes_s": 4.6 + float(rng.normal(0, 0.3)),
                "speed/engine_output_tokens": 4e4 + float(rng.normal(0, 2e3)),
                "speed/engine_prompt_tokens": 9e4 + float(rng.normal(0, 4e3)),
                "train_tokens": 3.6e4 + float(rng.normal(0, 1.5e3)),
            }
        )
        if step % 10 == 0:
            for name, more in (("sampled", 0.0), ("greedy", 0.03)):
                lines.append(
                    {
                        "stage": "rl-eval",
                        "step": step,
                        "time": 1795258702.0 + 21 * step,
                        f"eval/{name}/success": min(1.0, success + more),
                        f"eval/{name}/mean_reward": success + more,
                    }
                )
    return lines


def make(out: Path, images: Sequence[Image], clicks: Sequence[tuple[int, int]], *, huge: int = 10_000_000) -> Path:
    """The run folder `out`/desk. `images` are screens, `clicks` what was clicked on each but the last."""
    desk = Desk()
    path = out / "desk"
    group = siblings(desk)
    others = [long_one(desk), hostile_one(desk, huge), screen_one(desk, images, clicks), board_one(desk)]
    with RunFolder.create(path, CONFIG, config_version=1, command=("agentrl", "train", "configs/orders.yaml")):
        lines = metrics()
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with StoreWriter(path, pieces=desk.words.pieces) as writer:
            for image in images:
                writer.image(image)
            for step in range(3):  # a little history, so that lists have something to scroll through
                many = []
                for number in range(60):
                    g = f"rl-{step}/orders-{number // 6:04d}"
                    right = float(desk.rng.random() < 0.3 + 0.2 * step)
                    script = [
                        Step(
                            "",
                            "I look.",
                            [("search_orders", {"month": f"2026-{number % 12 + 1:02d}"}, ok(TABLE, hint="table"))],
                            float(desk.rng.gamma(2, 0.5)),
                        ),
                        Step("", f"It is {number}.", seconds=0.3),
                    ]
                    many.append(
                        desk.play(g, str(number % 6), QUESTION, script, score={"answer": right}, success=right == 1)
                    )
                writer.add(many, step=step, stage="rl")
            writer.add([*(m.trajectory for m in group.members), *others], step=12, stage="rl")
            writer.credit(group, step=12)
            writer.credit(credited(desk, others[0].group_id, others[:1], 12), step=12)
        summary = {
            "status": "completed",
            "wall_s": 1267.0,
            "steps": 60,
            "throughput": {"gen_tok_s": 3050.0, "train_tok_s": 5800.0, "episodes_s": 4.6},
            "eval": [
                {
                    "stage": "rl",
                    "step": s,
                    "decode": d,
                    "n": 512,
                    "success": v,
                    "ci95": [v - 0.026, v + 0.026],
                    "mean_reward": v + 0.06,
                    "tool_calls": c,
                    "tokens": t,
                }
                for s, d, v, c, t in (
                    (30, "sampled", 0.701, 3.1, 602.0),
                    (30, "greedy", 0.744, 3.0, 588.0),
                    (60, "sampled", 0.893, 2.8, 668.0),
                    (60, "greedy", 0.914, 2.7, 655.0),
                )
            ],
            "versions": {"torch": "2.13.0", "agentrl-framework": "0.1.0"},
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_the_gallery_is_a_run_that_the_store_reads(tmp_path: Path) -> None:
    path = make(
        tmp_path, [Image(b"\x89PNG\r\n\x1a\n" + bytes([i]) * 40) for i in range(3)], [(10, 20), (30, 40)], huge=10_000
    )
    with StoreReader(path) as reader:
        assert {e.id for e in reader.trajectories(group="rl-12/orders-0317").entries} >= {
            "rl-12/orders-0317/0",
            "rl-12/orders-0317/0.3",
        }
        assert sum(t.n_sampled for t in [reader.get("rl-12/archive-0002/0")]) > 10_000
        assert len(reader.credits(group="rl-12/orders-0317", step=12)) == 8
