"""LoRA: only adapters train, merged weights equal the adapted model, and both exports load."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from rows_for_tests import grouped_rows, plain_logprobs, tiny
from transformers import AutoModelForCausalLM

from agentrl.errors import UsageError
from agentrl.train.forward import score_rows, token_logprobs
from agentrl.train.optim import build_optimizer
from agentrl.train.options import LoraOptions, OptimizerOptions, ScratchTokenizer
from agentrl.train.policy import Policy
from agentrl.train.tokenizer import train_tokenizer


@pytest.fixture(params=["qwen2", "qwen3", "llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([], ScratchTokenizer())
    where = tmp_path / "base"
    tiny(request.param, vocab_size=len(tokenizer)).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def scores(policy: Policy) -> torch.Tensor:
    return torch.cat([p for p, _ in score_rows(policy, grouped_rows(), token_budget=512)])


def train(policy: Policy, steps: int = 3) -> None:
    optimizer = build_optimizer(policy, OptimizerOptions(lr=0.02), total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-token_logprobs(policy, grouped_rows()).logprobs.mean()).backward()
        optimizer.clip()
        optimizer.step()


def test_adapters_train_merge_and_reload(folder: Path, tmp_path: Path) -> None:
    plain = Policy.from_folder(folder)
    policy = Policy.from_folder(folder, lora=LoraOptions(r=4, alpha=8))
    assert torch.equal(scores(policy), scores(plain)), "fresh adapters change nothing"
    assert policy.network.packed and policy.network.direct
    assert all(".lora_" in name for name in policy.trainable()) and policy.state().keys() == policy.trainable().keys()

    train(policy)
    assert float((scores(policy) - scores(plain)).abs().max()) > 0.1
    before = scores(policy)
    other = tiny(str(plain.base.config.model_type), seed=1, vocab_size=len(plain.tokenizer))
    own = other.state_dict()
    names = dict(policy.weights())
    assert names.keys() == dict(plain.weights()).keys()
    for name, tensor in names.items():
        own[name].copy_(tensor)
    rows = grouped_rows()
    torch.testing.assert_close(plain_logprobs(other, rows)[0], before, atol=1e-4, rtol=0)
    engine = policy.model_for_engine()
    assert engine.state_dict().keys() == plain.base.state_dict().keys()
    torch.testing.assert_close(plain_logprobs(engine, rows)[0], before, atol=1e-4, rtol=0)
    assert torch.equal(scores(policy), before), "merging leaves the policy alone"

    policy.save_hf(tmp_path / "merged")
    torch.testing.assert_close(scores(Policy.from_folder(tmp_path / "merged")), before, atol=1e-4, rtol=0)
    policy.save_hf(tmp_path / "adapter", merge=False)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(plain_logprobs(adapted, rows)[0], before, atol=1e-4, rtol=0)
    assert (tmp_path / "adapter" / "chat_template.jinja").is_file()

    again = Policy.from_folder(folder, lora=LoraOptions(r=4, alpha=8))
    again.load_state(policy.state())
    assert torch.equal(scores(again), before)


def test_a_reference_holds_only_the_adapters_twice(folder: Path) -> None:
    policy = Policy.from_folder(folder, lora=LoraOptions(r=4))
    train(policy, 1)
    before = scores(policy)
    reference = policy.frozen_copy()
    train(policy, 2)
    assert torch.equal(scores(reference), before) and not torch.equal(scores(policy), before)
    mine, theirs = dict(policy.base.named_parameters()), dict(reference.base.named_parameters())
    assert all((mine[name] is theirs[name]) == (".lora_" not in name) for name in mine)
    assert all(mine[name].requires_grad for name in policy.trainable())


def test_dropout_is_where_gradients_are(tmp_path: Path, folder: Path) -> None:
    policy = Policy.from_folder(folder, lora=LoraOptions(r=4, dropout=0.5))
    train(policy)
    rows = grouped_rows()
    assert torch.equal(scores(policy), scores(policy))
    noisy = [token_logprobs(policy, rows).logprobs for _ in range(2)]
    assert not torch.equal(noisy[0], noisy[1])


def test_chosen_targets_and_wrong_ones(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([], ScratchTokenizer())
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.from_folder(tmp_path, lora=LoraOptions(r=2, targets=["q_proj", "v_proj"]))
    assert len(policy.trainable()) == 2 * 2 * 2
    with pytest.raises(UsageError, match=r"no module 'c_attn'; it has .*q_proj"):
        Policy.from_folder(tmp_path, lora=LoraOptions(targets=["q_proj", "c_attn"]))
    with pytest.raises(UsageError, match="no LoRA adapters"):
        Policy.from_folder(tmp_path).save_hf(tmp_path / "out", merge=False)
