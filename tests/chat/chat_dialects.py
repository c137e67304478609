"""Tokenizers of the families, made on the spot: a small byte-level BPE with the family's tokens and template.

Templates that ship inside installed packages are read from there; the others are written here after
the family's documented wire format.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_RESPONSES = ("<tool_response>", "</tool_response>")
_LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
_GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_TAGS = (*_TAGS, *_RESPONSES, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_GEMMA4 = (
    *("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>', "<|channel>", "<channel|>", "<|think|>"),
)
_MISTRAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]"),
)

# ChatML as small models are given it: no thinking, tools in the system turn, results in a user turn.
CHATML = """{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + m.content }}
{%- for c in m.tool_calls %}{{ '\\n' if m.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- (c.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Mistral v3: tools before the last user message, results with the call's nine-character id, strict alternation.
MISTRAL = """{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- set last = namespace(user=-1, n=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{%- if (m.role == 'user') != (last.n % 2 == 0) %}
{{- raise_exception('After the optional system message, roles must alternate user/assistant') }}{% endif %}
{%- set last.n = last.n + 1 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == last.user %}
{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if loop.last and system is defined %}{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}
{%- elif m.role == 'assistant' and m.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
{%- endfor %}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}{% endif %}{% endfor %}"""

# Mistral of 2025 (v11 and later): system and tools first, calls as name and arguments, results without ids.
MISTRAL_V11 = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
{%- set messages = messages[1:] %}{% endif %}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content }}
{%- for c in m.tool_calls %}
{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}{% endfor %}
{{- eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"""

_TEXT = [
    'the answer is 5. {"name": "calc", "arguments": {"a": 1, "op": "+", "b": 22}}',
    "You may call one or more functions to assist with the user query. For each function call, return a json object",
    '{"type": "function", "function": {"name": "lookup", "description": "Look up", "parameters": {"properties": {}}}}',
    "user assistant system tool think what is the weather in Paris? It rains, I think; so let us see\n\nI see.\n",
]


@dataclass(frozen=True)
class Dialect:
    """A family: where its template is (a file of trl, or text), its special and added tokens, its habits."""

    name: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    file: str = ""
    text: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def template(self) -> str:
        return self.text or (_shipped() / f"{self.file}.jinja").read_text("utf-8")


def _shipped() -> Path:
    """The folder of chat templates inside the installed trl package (which is not imported)."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "the chat tests read real templates out of the trl package: pip install --no-deps trl==1.16.0"
        )
    return Path(spec.origin).parent / "chat_templates"


_ALL = (
    Dialect("chatml", (*_QWEN, *_TAGS[:2], *_RESPONSES), "<|im_end|>", text=CHATML),
    Dialect("qwen2.5", _QWEN, "<|im_end|>", added=_TAGS[:2], file="qwen2_5"),
    Dialect("qwen3", _QWEN, "<|im_end|>", added=(*_TAGS, *_RESPONSES), file="qwen3"),
    Dialect(
        "qwen3-nothink",
        _QWEN,
        "<|im_end|>",
        added=(*_TAGS, *_RESPONSES),
        file="qwen3",
        options={"enable_thinking": False},
    ),
    Dialect("qwen3-2507", _QWEN, "<|im_end|>", added=(*_TAGS, *_RESPONSES), file="qwen3_instruct_2507"),
    Dialect("qwen3.5", _QWEN, "<|im_end|>", added=(*_TAGS, *_RESPONSES), file="qwen3_5_think"),
    Dialect("qwen3.8", _QWEN, "<|im_end|>", added=(*_TAGS, *_RESPONSES), file="qwen3_8"),
    Dialect("llama3", _LLAMA, "<|eot_id|>", "<|begin_of_text|>", file="llama3"),
    Dialect("llama3.1", _LLAMA, "<|eot_id|>", "<|begin_of_text|>", file="llama3_1"),
    Dialect(
        "llama3.2", _LLAMA, "<|eot_id|>", "<|begin_of_text|>", file="llama3_2", options={"date_string": "1 May 2026"}
    ),
    Dialect("mistral", _MISTRAL, "</s>", "<s>", text=MISTRAL),
    Dialect("mistral-v11", (*_MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", "<s>", text=MISTRAL_V11),
    Dialect("gemma", _GEMMA, "<eos>", "<bos>", file="gemma"),
    Dialect("gemma3", _GEMMA, "<eos>", "<bos>", file="gemma3"),
    Dialect("gemma4", _GEMMA4, "<eos>", "<bos>", file="gemma4_v5"),
    Dialect("glm4.5", _GLM, "<|endoftext|>", added=_GLM_TAGS, file="glm4moe"),
    Dialect(
        "phi3",
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        file="phi3_5",
    ),
)
DIALECTS = {dialect.name: dialect for dialect in _ALL}


@cache
def tokenizer_of(name: str, vocab: int = 700) -> Any:
    """The dialect's tokenizer: byte-level BPE of about `vocab` tokens."""
    dialect = DIALECTS[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(dialect.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT * 3, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in dialect.added])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=dialect.eos, bos_token=dialect.bos)
    made.chat_template = dialect.template
    return made
