"""Tool-call formats: what is read, what is written, and what the policy is told of its mistakes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.chat.calls import Malformed, call_format
from agentrl.errors import UsageError
from agentrl.trajectory import ToolCall

TEMPLATES = {
    "hermes": "<tool_call>",
    "llama": '{"name": function name, "parameters": dictionary}',
    "mistral": "[TOOL_CALLS]",
    "qwen-xml": "<tool_call>\\n<function=",
    "glm": "<tool_call>{name}\n<arg_key>",
    "gemma": "<|tool_call>call:",
}
REGEX = r"regex:<call name=(?P<name>[\w.-]+)>(?P<arguments>\{.*?\})</call>"
WRITERS = [*TEMPLATES, "mistral-pairs", REGEX]


def format_of(name: str) -> Any:
    return call_format("mistral", "[TOOL_CALLS] [ARGS]") if name == "mistral-pairs" else call_format(name, "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_auto_reads_the_format_off_the_template(name: str) -> None:
    assert call_format("auto", TEMPLATES[name]).name == name


def test_unknown_names_and_broken_patterns_are_refused() -> None:
    with pytest.raises(UsageError, match="use auto, hermes"):
        call_format("herms", "")
    with pytest.raises(UsageError, match="not a regular expression"):
        call_format("regex:(", "")
    with pytest.raises(UsageError, match=r"\(\?P<arguments>"):
        call_format(r"regex:(?P<name>\w+)", "")


@pytest.mark.parametrize("name", WRITERS)
def test_text_around_calls_is_kept(name: str) -> None:
    calls = (ToolCall("look", {"word": "x"}), ToolCall("other.tool-2", {}))
    written = format_of(name).write(calls)
    found = format_of(name).find(f"First.\n{written}", False, {})
    assert [(c.name, dict(c.arguments)) for c in found.calls] == [(c.name, dict(c.arguments)) for c in calls]
    assert found.rest.strip() == "First."


@pytest.mark.parametrize("name", WRITERS)
def test_every_cut_of_a_call_is_an_error_or_leaves_no_call(name: str) -> None:
    """Wherever the limit cuts a call, it is never read as a call, and once its opening is there never as text."""
    made = format_of(name)
    whole = made.write((ToolCall("look", {"word": 'a "quoted" \\ word', "n": 3}),))
    opening = {"llama": '{"name":', "mistral-pairs": "[TOOL_CALLS]"}.get(name) or (made.opener)
    begun = len(opening)
    for stop in range(begun, len(whole)):
        with pytest.raises(Malformed) as mistake:
            made.find(whole[:stop], True, {})
        assert str(mistake.value).endswith((".", "}", ">", "]", "call>"))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("hermes", "<tool_call>\n{'name': 'look'}\n</tool_call>", "not valid JSON: Expecting property name"),
        ("hermes", '<tool_call>\n{"name": "look"}\n</tool_call>', 'has no "arguments"'),
        ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>', 'has no "name"'),
        ("hermes", '<tool_call>\n{"name": "look", "arguments": [1]}\n</tool_call>', "must be a JSON object, not [1]"),
        ("hermes", '<tool_call>\n["look"]\n</tool_call>', "must be a JSON object such as"),
        ("hermes", '<tool_call>\n{"name": "look", "arguments": {"n": NaN}}\n</tool_call>', "NaN is not a JSON value"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}}{"name": "b"}</tool_call>', "more than one JSON object"),
        ("hermes", '<tool_call>\n{"name": "look", "arguments": {}}', "</tool_call> is missing"),
        ("hermes", 'so {"name": "look"} </tool_call>', "stands alone"),
        ("hermes", '{"name": "look", "arguments": {}}', "stands outside"),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"w": "\\ud800"}}</tool_call>', "half of a character"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "nested too deeply"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"n": ' + "9" * 5000 + "}}</tool_call>", "not valid JSON"),
        ("hermes", "<tool_call></tool_call>", "not valid JSON"),
        ("llama", '{"name": "look"}', 'has no "arguments"'),
        ("llama", "<|python_tag|>print(1)", "JSON object is expected"),
        ("llama", '{"name": "look", "parameters": {"a": 1}', "Expecting ',' delimiter"),
        ("mistral", "[TOOL_CALLS] [{]", "not valid JSON"),
        ("mistral", "[TOOL_CALLS] look{}", "Write a call as"),
        ("mistral", 'look[ARGS]{"a": 1}', "stands alone"),
        ("mistral", "[TOOL_CALLS] []", "is empty"),
        ("mistral", "[TOOL_CALLS] [3]", "must be a JSON object"),
        ("qwen-xml", "<tool_call>\n{}\n</tool_call>", "one <function=name>"),
        ("qwen-xml", "<tool_call><function=look>word</function></tool_call>", "<parameter=key>"),
        ("qwen-xml", "<function=look></function>", "stands outside"),
        ("qwen-xml", "<tool_call><function=look></function>", "</tool_call> is missing"),
        ("glm", '<tool_call>{"name": "look"}</tool_call>', "begins with the tool's name"),
        ("glm", "<tool_call>look<arg_key>a</arg_key></tool_call>", "is expected"),
        ("gemma", "<|tool_call>look{}<tool_call|>", "Write a tool call as"),
        ("gemma", "<|tool_call>call:look{a 1}<tool_call|>", "colon"),
        ("gemma", "x<tool_call|>", "stands alone"),
        (REGEX, "<call name=look>{oops}</call>", "not valid JSON"),
        (REGEX, "<call name=look>oops</call>", "malformed"),
    ],
)
def test_mistakes_are_named(name: str, text: str, sentence: str) -> None:
    with pytest.raises(Malformed) as mistake:
        format_of(name).find(text, False, {})
    assert sentence in str(mistake.value)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("text", ["The answer is 5.", "", 'In JSON: {"a": 1}', "if a < b > c: {x}", '{"age": 3}'])
def test_plain_answers_are_left_alone(name: str, text: str) -> None:
    assert format_of(name).find(text, False, {}).calls == ()
    assert format_of(name).find(text, True, {}).rest == text


def test_llama_reads_its_variants() -> None:
    llama = format_of("llama")
    text = '<|python_tag|>{"name": "a", "parameters": {"x": 1}}; {"type": "function", "name": "b", "parameters": {}}'
    assert [c.name for c in llama.find(text, False, {}).calls] == ["a", "b"]
    assert llama.find('{"function": "c", "parameters": {}}', False, {}).calls[0].name == "c"


def test_mistral_reads_ids() -> None:
    found = format_of("mistral").find('[TOOL_CALLS][{"name": "a", "arguments": {}, "id": "abcdefghi"}]', False, {})
    assert found.calls[0].id == "abcdefghi"
    found = format_of("mistral").find('[TOOL_CALLS]a[CALL_ID]abcdefghi[ARGS]{"x": 1}', False, {})
    assert found.calls[0] == ToolCall("a", {"x": 1}, "abcdefghi")


SCHEMA = {
    "f": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "b": {"type": "boolean"},
        "n": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "l": {"type": "array"},
        "o": {"type": "object"},
        "any": {},
    }
}


@pytest.mark.parametrize("name", ["qwen-xml", "glm"])
def test_bare_text_is_typed_by_the_schema(name: str) -> None:
    arguments = {"s": "12", "i": 12, "b": True, "n": None, "l": [1, "2"], "o": {"k": 1.5}, "any": "x"}
    text = format_of(name).write((ToolCall("f", arguments),))
    assert dict(format_of(name).find(text, False, SCHEMA).calls[0].arguments) == arguments
    untyped = dict(format_of(name).find(text, False, {}).calls[0].arguments)
    assert untyped == {**arguments, "i": "12", "b": "true", "n": "null"}
    python = text.replace("true", "True").replace("null", "None")
    assert dict(format_of(name).find(python, False, SCHEMA).calls[0].arguments) == arguments
    wrong = text.replace("12", "twelve")
    assert format_of(name).find(wrong, False, SCHEMA).calls[0].arguments["i"] == "twelve"


names = st.from_regex(r"[A-Za-z_][\w.-]{0,12}", fullmatch=True).filter(str.isascii)
scalars = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
marks = st.sampled_from(["</tool_call>", "<tool_call>", '"}', "\\", "[ARGS]", "<|im_end|>", "</call>", "; {"])
values = st.recursive(
    scalars | texts | marks, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
json_calls = st.builds(ToolCall, names, st.dictionaries(texts, values, max_size=4))


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral", "mistral-pairs"])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(calls=st.lists(json_calls, min_size=1, max_size=3))
def test_json_formats_read_what_they_write(name: str, calls: list[ToolCall]) -> None:
    """Whatever stands in the arguments, the marks of the format itself included."""
    found = format_of(name).find(f"Well.\n{format_of(name).write(calls)}", False, {})
    assert [(c.name, c.arguments) for c in found.calls] == [
        (c.name, json.loads(json.dumps(c.arguments))) for c in calls
    ]
    assert found.rest.strip() == "Well."


keys = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
tame = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>|"), max_size=20)
tag_calls = st.builds(ToolCall, names, st.dictionaries(keys, tame, max_size=4))


@pytest.mark.parametrize("name", ["qwen-xml", "glm", "gemma"])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(calls=st.lists(tag_calls, min_size=1, max_size=3))
def test_tag_formats_read_what_they_write(name: str, calls: list[ToolCall]) -> None:
    schema = {c.name: {key: {"type": "string"} for c in calls for key in c.arguments} for c in calls}
    found = format_of(name).find(f"Well.\n{format_of(name).write(calls)}", False, schema)
    assert [(c.name, dict(c.arguments)) for c in found.calls] == [(c.name, dict(c.arguments)) for c in calls]


gemma_values = st.recursive(
    st.none() | st.booleans() | st.integers() | tame,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(arguments=st.dictionaries(keys, gemma_values, max_size=4))
def test_gemma_keeps_types(arguments: dict[str, Any]) -> None:
    text = format_of("gemma").write((ToolCall("f", arguments),))
    assert format_of("gemma").find(text, False, {}).calls[0].arguments == arguments


PIECES = (
    *"{}[]\"':,<>/= \n1a",
    *("<tool_call>", "</tool_call>", '"name"', "[TOOL_CALLS]", "[ARGS]", "<function=", "<parameter=", "</function>"),
    *("<arg_key>", "<|tool_call>", "call:f", '<|"|>', "<call name=", '{"name": "f", "arguments": {}}'),
)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=25), cut=st.booleans())
def test_no_text_breaks_a_reader(name: str, text: list[str], cut: bool) -> None:
    """Any text gives calls, an answer or a sentence; where the format opens a call, never just an answer."""
    made, written = format_of(name), "".join(text)
    try:
        found = made.find(written, cut, {})
    except Malformed as mistake:
        assert str(mistake)
        return
    opener = getattr(made, "opener", None)
    if opener and opener in written:
        assert found.calls
