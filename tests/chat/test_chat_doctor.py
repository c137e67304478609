"""The doctor's findings on healthy, limited and broken tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_dialects import DIALECTS, tokenizer_of

from agentrl.chat.doctor import diagnose
from agentrl.errors import UsageError

NOTES = {
    "qwen3": {"thinking"},
    "qwen3-nothink": {"thinking", "prefix kept"},
    "qwen3.5": {"thinking"},
    "gemma4": {"thinking"},
    "glm4.5": {"thinking", "stop ids"},
    "llama3": {"tools"},
    "llama3.2": {"clock"},
    "gemma": {"system role", "tools", "tool results"},
    "gemma3": {"tools", "tool results"},
    "phi3": {"tools", "tool results"},
}


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_every_dialect_is_sound_and_its_habits_are_told(name: str) -> None:
    findings = diagnose(tokenizer_of(name), template_options=DIALECTS[name].options)
    assert [finding for finding in findings if finding.ok is False] == []
    assert {finding.name for finding in findings if finding.ok is None} == NOTES.get(name, set())
    assert len({finding.name for finding in findings}) == len(findings) >= 18
    assert all(finding.detail for finding in findings)


def test_a_folder_is_loaded(tmp_path: Path) -> None:
    tokenizer_of("chatml").save_pretrained(tmp_path)
    assert all(finding.ok for finding in diagnose(str(tmp_path)))
    with pytest.raises(UsageError, match="is not a folder"):
        diagnose(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no tokenizer that transformers can load"):
        diagnose(tmp_path / "empty")


def made(template: str | None) -> object:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("chatml").backend_tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_no_template_is_a_finding() -> None:
    (finding,) = diagnose(made(None))
    assert finding.ok is False and "chat_template.jinja" in finding.detail


def test_a_template_that_loses_the_user_is_a_finding() -> None:
    (finding,) = diagnose(made("{% for m in messages %}{{ m.role }}{% endfor %}"))
    assert finding.ok is False and "user" in finding.detail


def test_nothing_that_ends_a_turn_is_a_finding() -> None:
    findings = {f.name: f for f in diagnose(made("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"))}
    assert findings["stop ids"].ok is False and "eos_token" in findings["stop ids"].detail


def test_an_unknown_form_of_calls_is_a_finding() -> None:
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.content }}"
        "{% for c in m.tool_calls %}CALL {{ c.function.name }}{% endfor %}<|im_end|>{% endfor %}"
    )
    findings = {f.name: f for f in diagnose(made(template))}
    assert findings["tools"].ok is False and "regex:" in findings["tools"].detail
