"""Policies from folders and from nothing: round trips, weights for the engine, and bad folders' sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rows_for_tests import grouped_rows, plain_logprobs, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from agentrl.errors import UsageError
from agentrl.train.forward import score_rows, token_logprobs
from agentrl.train.options import ScratchTokenizer
from agentrl.train.policy import Policy
from agentrl.train.tokenizer import train_tokenizer

ARCH = {
    "model_type": "qwen3", "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 288, "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([], ScratchTokenizer())


@pytest.fixture
def folder_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    def make(arch: str) -> Path:
        folder = tmp_path / arch
        tiny(arch, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "llama"])
def test_a_folder_loads_trains_and_saves(arch: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(arch)
    policy = Policy.from_folder(folder)
    rows = grouped_rows()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(
        token_logprobs(policy, rows).logprobs, plain_logprobs(loaded, rows)[0], atol=1e-5, rtol=0
    )

    token_logprobs(policy, rows).logprobs.mean().backward()
    with torch.no_grad():
        for p in policy.trainable().values():
            p += 0.5 * p.grad
    policy.save_hf(tmp_path / "saved")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "saved").iterdir())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(plain_logprobs(saved, rows)[0], token_logprobs(policy, rows).logprobs, atol=1e-5, rtol=0)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.chat_template == policy.tokenizer.chat_template
    assert again("Compute 12").input_ids == policy.tokenizer("Compute 12").input_ids


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_weights_carry_the_architectures_own_names_each_once(arch: str, folder_of: Callable[[str], Path]) -> None:
    policy = Policy.from_folder(folder_of(arch))
    names = [name for name, _ in policy.weights()]
    assert len(names) == len(set(names)) and set(names) <= set(policy.base.state_dict())
    assert ("lm_head.weight" in names) == (arch == "llama")  # the others' heads are tied
    other = tiny(arch, seed=1, vocab_size=len(policy.tokenizer))
    own = other.state_dict()
    for name, tensor in policy.weights():
        own[name].copy_(tensor)
    rows = grouped_rows()
    torch.testing.assert_close(plain_logprobs(other, rows)[0], plain_logprobs(policy.base, rows)[0])


def test_the_quickstarts_model_is_small_and_seeded(tokenizer: PreTrainedTokenizerFast) -> None:
    policies = [Policy.scratch(ARCH, tokenizer, seed=seed) for seed in (0, 0, 1)]
    count = sum(p.numel() for p in policies[0].trainable().values())
    assert count + (642 - len(tokenizer)) * 96 == 283_392
    first, second, third = ({n: t.clone() for n, t in p.weights()} for p in policies)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])
    config = policies[0].base.config
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(policies[0].hidden_matrices()) == 14
    assert all(".norm" not in name and "embed" not in name for name in policies[0].hidden_matrices())


def test_scratch_leaves_the_global_generator_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    Policy.scratch(ARCH, tokenizer, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_older_spellings_of_rope_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    old = {key: value for key, value in ARCH.items() if key != "rope_parameters"} | {"rope_theta": 500.0}
    assert Policy.scratch(old, tokenizer, seed=0).base.config.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "qwen33"}, "did you mean qwen3"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"hiden_size": 3}, "did you mean hidden_size"),
        ({"vocab_size": 3}, "comes from the tokenizer"),
        ({"hidden_size": "many"}, "no qwen3 that can be built"),
    ],
)
def test_bad_architectures(change: dict[str, object], says: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match=says):
        Policy.scratch({**ARCH, **change}, tokenizer, seed=0)


def test_state_goes_back_in_and_another_models_does_not(folder_of: Callable[[str], Path]) -> None:
    policy = Policy.from_folder(folder_of("qwen3"))
    state = {name: tensor.clone() for name, tensor in policy.state().items()}
    with torch.no_grad():
        for p in policy.trainable().values():
            p += 1
    policy.load_state(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.state().items())
    with pytest.raises(UsageError, match="not this model's"):
        policy.load_state(dict(list(state.items())[1:]))
    with pytest.raises(UsageError, match="not this model's"):
        policy.load_state(state | {"model.norm.weight": torch.zeros(3)})


def test_a_frozen_copy_stays_and_can_be_restored(folder_of: Callable[[str], Path]) -> None:
    policy, rows = Policy.from_folder(folder_of("llama")), grouped_rows()
    reference = policy.frozen_copy()
    before = torch.cat([p for p, _ in score_rows(policy, rows, token_budget=512)])
    kept = {name: tensor.clone() for name, tensor in reference.state().items()}
    with torch.no_grad():
        for p in policy.trainable().values():
            p *= 1.1
    assert torch.equal(torch.cat([p for p, _ in score_rows(reference, rows, token_budget=512)]), before)
    assert not token_logprobs(reference, rows).logprobs.requires_grad
    restored = policy.frozen_copy(kept)
    assert torch.equal(torch.cat([p for p, _ in score_rows(restored, rows, token_budget=512)]), before)
    assert not torch.equal(torch.cat([p for p, _ in score_rows(policy, rows, token_budget=512)]), before)


def test_pieces_are_single_tokens_text(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy.scratch(ARCH, tokenizer, seed=0)
    ids = tokenizer("<|im_start|>é1").input_ids
    pieces = policy.pieces(ids)
    assert pieces[0] == "<|im_start|>" and pieces[-1] == "1" and len(pieces) == len(ids)


def test_bfloat16_is_an_option(folder_of: Callable[[str], Path]) -> None:
    policy = Policy.from_folder(folder_of("qwen2"), dtype="bfloat16")
    assert {p.dtype for p in policy.trainable().values()} == {torch.bfloat16}


class TestBadFolders:
    """One sentence each, that says what to do."""

    def fails(self, folder: Path, says: str) -> None:
        with pytest.raises(UsageError, match=says) as caught:
            Policy.from_folder(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    def test_no_folder(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "nowhere", "there is no folder")

    def test_no_config(self, tmp_path: Path) -> None:
        self.fails(tmp_path, "has no config.json")

    def test_config_is_not_json(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("qwen3")
        (folder / "config.json").write_text("{")
        self.fails(folder, "is not JSON")

    def test_unknown_model_type(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("qwen3")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen99"}))
        self.fails(folder, "cannot be|config.json")

    def test_not_a_causal_model(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        self.fails(tmp_path, "no causal language model")

    def test_no_weights(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("qwen3")
        (folder / "model.safetensors").unlink()
        self.fails(folder, "weights in .* cannot be loaded")

    def test_damaged_weights(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("qwen3")
        (folder / "model.safetensors").write_bytes(b"not at all")
        self.fails(folder, "weights in .* cannot be loaded")

    def test_weights_of_fewer_layers(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("qwen3")
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        (folder / "config.json").write_text(json.dumps(config))
        self.fails(folder, r"lack model\.layers\.2")

    def test_no_tokenizer(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("llama")
        (folder / "tokenizer.json").unlink()
        self.fails(folder, "has no tokenizer")

    def test_no_chat_template(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("llama")
        (folder / "chat_template.jinja").unlink()
        self.fails(folder, "has no chat template")

    def test_a_tokenizer_of_another_model(self, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
        folder = folder_of("llama")
        small = tmp_path / "small"
        shutil.copytree(folder, small)
        tiny("llama", vocab_size=100).save_pretrained(small)
        self.fails(small, "they are not a pair")

    def test_adapters_alone(self, folder_of: Callable[[str], Path]) -> None:
        folder = folder_of("llama")
        (folder / "adapter_config.json").write_text("{}")
        self.fails(folder, "holds adapters only")
