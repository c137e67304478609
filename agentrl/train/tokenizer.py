"""A small tokenizer for a model that is trained from nothing: byte-level BPE over demonstrations.

The vocabulary is the biggest lever on the speed of a tiny model, so a task's boilerplate should be few
tokens: merges may cross spaces and punctuation (a whole line of JSON becomes one token) but neither
digits nor lines. Control tokens stand outside the merges, and the chat template is ChatML-like: tools
as JSON schemas in the system turn, calls as JSON in <tool_call>, results as <tool_response> in a user turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentrl.errors import UsageError
from agentrl.train.options import ScratchTokenizer

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if system or tools -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
{{- '\\n' if system -}}
{{- 'Tools:\\n' -}}
{%- for tool in tools -%}
{{- (tool.function if tool.function is defined else tool) | tojson + '\\n' -}}
{%- endfor -%}
{{- 'Call: <tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
{{- '<|im_start|>user' -}}
{%- endif -%}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- elif message.role != 'system' or not loop.first -%}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function if call.function is defined else call -%}
{{- '\\n' if message.content or not loop.first -}}
{{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' -}}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def bootstrap_tokenizer(options: ScratchTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of bare bytes with the same control tokens and template: what demonstrations are
    rendered with before there is anything to train on."""
    return train_tokenizer([], options)


def train_tokenizer(texts: Iterable[str], options: ScratchTokenizer) -> PreTrainedTokenizerFast:
    """Train on the first `options.texts` of `texts` (rendered episodes; control tokens in them are cut out).

    Equal texts give an equal tokenizer. Raises `UsageError` for a pattern that is no regular expression.
    """
    tokenizer = Tokenizer(models.BPE())
    try:
        split = pre_tokenizers.Split(Regex(options.pattern), behavior="isolated")
    except Exception as error:  # the Rust side raises bare Exception
        raise UsageError(f"model.tokenizer.pattern {options.pattern!r} is no regular expression: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [AddedToken(text, special=True, normalized=False) for text in (END_OF_TEXT, START, END, *MARKS)]
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=2,
        special_tokens=controls,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    cut = re.compile("|".join(re.escape(control.content) for control in controls))
    chosen = [text for text, _ in zip(texts, range(options.texts), strict=False)]
    tokenizer.train_from_iterator((piece for text in chosen for piece in cut.split(text) if piece), trainer)
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made
