"""What a tokenizer's chat template does in the cases that break agents; run on any tokenizer.

Each case is a small conversation through the same code that training uses. A finding is ok (True),
broken (False), or worth knowing (None): a habit of the template that costs something but is handled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from agentrl.chat.dialogue import Dialogue
from agentrl.chat.format import ChatFormat
from agentrl.chat.messages import Message, Parsed
from agentrl.env import Say
from agentrl.errors import UsageError
from agentrl.trajectory import Ids, Span, ToolCall, as_ids, ids_of

_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["word"],
            },
        },
    }
]
_ASK = (Message("user", "What does it say?"),)
_CALL = ToolCall("look", {"word": 'an "old" one', "n": 3}, "000000000")
_UNICODE = "naïve 中文 😀 שלום ½ \u200d"


@dataclass(frozen=True, slots=True)
class Finding:
    """One case: `ok` True, False (broken), or None (a habit worth knowing); `detail` is one sentence."""

    name: str
    ok: bool | None
    detail: str


def diagnose(
    tokenizer: Any, *, tool_format: str = "auto", template_options: Mapping[str, Any] = MappingProxyType({})
) -> list[Finding]:
    """Run every case on `tokenizer` (a folder, or a tokenizer object). Bad news is a finding, not an exception.

    Raises `UsageError` only for a path that holds no tokenizer.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = _loaded(Path(tokenizer))
    try:
        chat = ChatFormat(tokenizer, tool_format=tool_format, template_options=template_options)
    except UsageError as error:
        return [Finding("template", False, str(error))]
    findings = [Finding("template", True, f"present, {len(chat.template.source)} characters")]
    try:
        chat.toolset(_TOOLS)
    except UsageError as error:
        return [*findings, Finding("tools", False, str(error))]
    examination = _Examination(chat)
    for name, case in examination.cases():
        try:
            ok, detail = case()
        except UsageError as error:
            ok, detail = False, str(error)
        findings.append(Finding(name, ok, detail))
    return findings


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the folder of a Hugging Face model or tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder} holds no tokenizer that transformers can load: {error}") from error


Verdict = tuple[bool | None, str]


class _Examination:
    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat

    def cases(self) -> Iterator[tuple[str, Callable[[], Verdict]]]:
        yield "stop ids", self.stop_ids
        yield "first prompt", self.first_prompt
        yield "system role", self.system_role
        yield "tools", self.tools
        yield "tool results", self.tool_results
        yield "prefix kept", self.prefix_kept
        yield "thinking", self.thinking
        yield "parallel calls", self.parallel_calls
        yield "consecutive results", self.consecutive_results
        yield "cut turn", self.cut_turn
        yield "malformed call", self.malformed_call
        yield "control tokens in a tool's output", self.control_tokens
        yield "empty output", self.empty_output
        yield "unicode", self.unicode
        yield "ids round trip", self.round_trip
        yield "calls round trip", self.calls_round_trip
        yield "clock", self.clock

    # -- small conversations -------------------------------------------------------------------------

    def _open(self) -> Dialogue:
        dialogue = Dialogue(self._chat, _TOOLS)
        dialogue.start(_ASK)
        return dialogue

    def _hear(self, dialogue: Dialogue, ids: Ids) -> Parsed:
        parsed = dialogue.parse(ids)
        dialogue.heard(Span(ids, "assistant", "demo"), parsed)
        return parsed

    def _after_call(self, *results: str, calls: int = 1, thinking: str = "") -> tuple[Ids, Ids]:
        """The context before and after the results of some calls."""
        dialogue = self._open()
        self._hear(dialogue, self._chat.say(dialogue, Say("", (_CALL,) * calls, thinking)))
        before = ids_of(dialogue.context)
        dialogue.extend([Message("tool", text, "look") for text in results])
        return before, ids_of(dialogue.context)

    def _text(self, ids: Ids) -> str:
        return self._chat.codec.decode(ids.tolist())

    # -- cases ---------------------------------------------------------------------------------------

    def stop_ids(self) -> Verdict:
        stops = [f"{self._text(as_ids([index]))!r} ({index})" for index in self._chat.stop_ids]
        if not stops:
            return (
                False,
                "nothing ends a turn: give the tokenizer an eos_token that the template writes",
            )
        if not self._chat.end_ids.size:
            return None, f"no end-of-turn token; turns stop at {', '.join(stops)}"
        return True, f"turns end with {', '.join(stops)}"

    def first_prompt(self) -> Verdict:
        """Our ids against those of `apply_chat_template`."""
        chat = self._chat
        messages = [{"role": "user", "content": "What does it say?"}]
        tools = _TOOLS if chat.template.has_tools else []
        dialogue = Dialogue(chat, tools)
        dialogue.start(_ASK)
        text = chat.template.render(messages, tools, True)
        theirs = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids_of(dialogue.context).tolist() == theirs:
            return True, f"{len(theirs)} ids, as apply_chat_template gives them"
        return False, "the ids differ from those of apply_chat_template"

    def system_role(self) -> Verdict:
        if self._chat.template.has_system:
            return True, "has its own place"
        return None, "the template has no system role: its text stands before the first user message"

    def tools(self) -> Verdict:
        name = self._chat.calls.name
        if self._chat.template.has_tools:
            return True, f"the template takes schemas; calls are read as {name!r}"
        return None, f"the template takes no tools: schemas stand in the system message, calls are read as {name!r}"

    def tool_results(self) -> Verdict:
        _, after = self._after_call("RESULT")
        before, found, behind = self._text(after).rpartition("RESULT")
        if not found:
            return False, "a tool's result does not reach the policy"
        suffix = f"{before[-40:]}RESULT{behind}"
        if "<tool_response>" in suffix and "<tool_response>" not in self._chat.template.source:
            return None, "the template has no tool role: results are user messages in <tool_response> tags"
        return True, f"rendered as …{suffix!r}"

    def prefix_kept(self) -> Verdict:
        before, after = self._after_call("5")
        if after.size >= before.size and np.array_equal(after[: before.size], before):
            return (
                True,
                "a tool result only appends: an episode is one training row, its keys and values are reused",
            )
        return None, (
            "the template shows earlier turns differently after a tool result: each turn becomes a training row of its "
            "own and its context is computed anew"
        )

    def thinking(self) -> Verdict:
        chat = self._chat
        if not chat.template.knows_thinking:
            return True, "the template says nothing of thinking; it stays where it was said"
        opener, closer = chat.template.thinking
        dialogue = self._open()
        self._hear(dialogue, chat.say(dialogue, Say("Well.", (), "PONDER")))
        kept = ids_of(dialogue.context)
        dialogue.extend([Message("user", "And then?")])
        shown = "PONDER" in self._text(ids_of(dialogue.context))
        if "PONDER" not in self._text(kept):
            return False, f"thinking between {opener} and {closer} cannot be written"
        if shown:
            return True, f"{opener}…{closer} of earlier turns stays"
        return (
            None,
            f"{opener}…{closer} of earlier turns is dropped at the next user message, by slicing what was sampled",
        )

    def parallel_calls(self) -> Verdict:
        dialogue = self._open()
        parsed = self._hear(dialogue, self._chat.say(dialogue, Say("", (_CALL, _CALL))))
        if len(parsed.calls) == 2 and parsed.error is None:
            return True, "two calls of one turn are written and read"
        return False, f"two calls of one turn come back as {len(parsed.calls)} ({parsed.error})"

    def consecutive_results(self) -> Verdict:
        _, after = self._after_call("FIRST", "SECOND", calls=2)
        text = self._text(after)
        ok = 0 <= text.find("FIRST") < text.find("SECOND")
        return ok, "both results follow in order" if ok else "results of parallel calls are lost or out of order"

    def cut_turn(self) -> Verdict:
        chat = self._chat
        dialogue = self._open()
        whole = chat.say(dialogue, Say("one two three four"))
        cut = as_ids(whole[: whole.size - max(2, chat.end_ids.size + 1)])
        output = dialogue.heard(Span(cut, "assistant", "demo"), dialogue.parse(cut))
        forced = output[1:]
        if not chat.end_ids.size:
            return (not forced), "no end token to add: the next role's token follows"
        if len(forced) == 1 and forced[0].origin == "forced" and np.array_equal(forced[0].ids, chat.end_ids):
            return True, f"{self._text(chat.end_ids)!r} is added as forced, never trained"
        return False, "a turn cut by the limit gets no end of turn"

    def malformed_call(self) -> Verdict:
        dialogue = self._open()
        ids = self._chat.say(dialogue, Say("", (_CALL,)))
        body = self._text(ids[: ids.size - 1])
        broken = body[: int(len(body) * 0.7)]
        parsed = dialogue.parse(as_ids([*self._chat.codec.encode(broken).tolist(), int(ids[-1])]))
        if parsed.error and not parsed.calls:
            return True, f"the policy reads: {parsed.error}"
        return False, f"the half call {broken!r} passes as an answer"

    def control_tokens(self) -> Verdict:
        chat = self._chat
        plain, controls = self._after_call("x"), self._after_call(" ".join(chat.codec.control))
        ok = chat.codec.controls(plain[1]) == chat.codec.controls(controls[1])
        n = len(chat.codec.control)
        return ok, f"{n} control tokens stay plain text" if ok else "a tool's output can write control tokens"

    def empty_output(self) -> Verdict:
        before, after = self._after_call("")
        return after.size > 0 and not np.array_equal(before, after), "an empty result is rendered"

    def unicode(self) -> Verdict:
        _, after = self._after_call(_UNICODE)
        text = self._text(after)
        if _UNICODE in text or _UNICODE in text.encode("ascii", "ignore").decode("unicode_escape", "ignore"):
            return True, "scripts, emoji and joiners survive"
        return (
            None,
            "some characters are not in the vocabulary or are normalised: the policy reads others instead",
        )

    def round_trip(self) -> Verdict:
        text = f'{_UNICODE} a  b\n\n\tc {{"d": 1}}'
        ids = self._chat.codec.encode(text)
        if self._chat.codec.decode(ids.tolist()) == text:
            return True, "decoded text is the encoded one, byte for byte"
        return None, "decoding does not give back the encoded text (spaces or characters are normalised)"

    def calls_round_trip(self) -> Verdict:
        dialogue = self._open()
        say = Say("I look.", (_CALL, ToolCall("look", {"word": "plain"}, "000000001")))
        parsed = dialogue.parse(self._chat.say(dialogue, say))
        read = [(call.name, dict(call.arguments)) for call in parsed.calls]
        if read == [(call.name, dict(call.arguments)) for call in say.calls] and parsed.final_text == say.text:
            return True, "what an expert says is read back the same"
        return False, f"an expert's calls come back as {read} with {parsed.final_text!r} ({parsed.error})"

    def clock(self) -> Verdict:
        if "strftime_now" in self._chat.template.source:
            return None, "the template may write today's date: fix it in template_options (date_string) for equal runs"
        return True, "the prompt does not depend on the date"
