"""Makes the model of the training-step benchmark: a 4.2 M-parameter Qwen3 that really calls the tool.

A random model never calls a tool, so a step of it would be one turn of noise. This one is warm-started on scripted
demonstrations of the task (`chain.py`) just long enough to have the format: it makes up to three well-formed calls and
then answers, with some spread in what it says. It is not good at the arithmetic, and need not be. Every side of the
benchmark loads the same folder, so the same policy draws the same distribution of traffic everywhere.

    python tests/benchmarks/peers/make_model.py OUT        # about a minute and a half on two threads
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeAlias

import torch
from chain import SCHEMA, demonstration, opening, problems
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB = 4096
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
DATA_SEED = 20_000
Tokens: TypeAlias = Any  # a PreTrainedTokenizerFast; transformers' classes are not typed
Model: TypeAlias = Any  # a Qwen3ForCausalLM


def make_tokenizer(texts: list[str]) -> Tokens:
    """Byte-level BPE over single digits and words, filled up to exactly `VOCAB` ids with reserved ones.

    The reserved ids are never sampled once trained, but cost what a real vocabulary costs.
    """
    bpe = Tokenizer(BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(split)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 256,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare = texts
    for tag in (END, START, STOP, *TAGS):
        bare = [text.replace(tag, "\n") for text in bare]
    bpe.train_from_iterator(bare, trainer)
    bpe.add_tokens(list(TAGS))
    bpe.add_tokens([f"<|reserved_{i}|>" for i in range(VOCAB - bpe.get_vocab_size())])
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=bpe, eos_token=STOP, pad_token=END, chat_template=template)


def make_model(tokenizer: Tokens, seed: int) -> Model:
    """The random Qwen3: 4.2 M parameters, of which 1.05 M are the tied embedding."""
    torch.manual_seed(seed)
    config: Any = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(STOP),
        pad_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    random_model: Any = Qwen3ForCausalLM
    return random_model(config).float()


def preamble(tokenizer: Tokens) -> list[int]:
    """The ids with which every prompt begins: system turn and tools, up to the question."""
    prompts = [
        tokenizer.apply_chat_template(opening(p), tools=[SCHEMA], return_dict=False) for p in islice(problems(0), 100)
    ]
    columns = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return [ids[0] for ids in columns]


def batches(tokenizer: Tokens, shared: list[int], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids [size, n], labels [size, n]) of what follows the `shared` preamble.

    Labels are -100 outside what the assistant says.
    """
    header = tokenizer.encode(f"{START}assistant\n")
    stop, pad = tokenizer.convert_tokens_to_ids(STOP), tokenizer.convert_tokens_to_ids(END)
    rng, stream = random.Random(DATA_SEED), problems(DATA_SEED)
    while True:
        rows = []
        for _ in range(size):
            messages = demonstration(next(stream), rng)
            ids = tokenizer.apply_chat_template(messages, tools=[SCHEMA], return_dict=False)
            assert ids[: len(shared)] == shared
            rows.append(torch.tensor(ids[len(shared) :]))
        width = max(map(len, rows))
        batch = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=pad) for row in rows])
        labels = torch.full_like(batch, -100)
        for i, row in enumerate(rows):
            spoken = _spoken(row.tolist(), header, stop)
            labels[i, spoken] = batch[i, spoken]
        yield batch, labels


def _spoken(ids: list[int], header: list[int], stop: int) -> list[int]:
    """Positions of the assistant's own tokens, each turn's end token included."""
    found, speaking = [], False
    for i in range(len(ids)):
        speaking = speaking or ids[max(0, i - len(header)) : i] == header
        if speaking:
            found.append(i)
        speaking = speaking and ids[i] != stop
    return found


def warm_start(model: Model, tokenizer: Tokens, given: argparse.Namespace) -> float:
    """Supervised AdamW steps on what the assistant says. Returns the last loss.

    The preamble is half of an episode's tokens and the same in all, so it is computed once a batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.01, betas=(0.9, 0.95))
    shared = preamble(tokenizer)
    prefix = torch.tensor([shared])
    source, loss = batches(tokenizer, shared, given.batch), torch.tensor(float("nan"))
    model.train()
    for step in range(given.steps):
        scale = min(1.0, (step + 1) / 10) * (1.0 - 0.95 * step / given.steps)
        optimizer.param_groups[0]["lr"] = given.lr * scale
        ids, labels = next(source)
        cache = model.model(input_ids=prefix, use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
            layer.values = layer.values.expand(len(ids), -1, -1, -1)
        states = model.model(input_ids=ids, past_key_values=cache).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(model.lm_head(states[wanted != -100]), wanted[wanted != -100])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.perf_counter()
    rng, stream = random.Random(DATA_SEED - 1), problems(DATA_SEED - 1)
    fast: Any = PreTrainedTokenizerFast
    plain = fast(tokenizer_object=Tokenizer(BPE()))
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    texts = [
        plain.apply_chat_template(
            demonstration(next(stream), rng), tools=[SCHEMA], chat_template=template, tokenize=False
        )
        for _ in range(300)
    ]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer, given.seed)
    loss = warm_start(model, tokenizer, given)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(STOP)
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(END)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    said = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab": len(tokenizer),
        "loss": round(loss, 4),
        "seconds": round(time.perf_counter() - started, 1),
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
