"""What a configuration may say about the trained policy and its optimiser. Torch-free: the schema imports it.

Every key here is used by somebody, and a combination in which a key would be ignored is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Dtype: TypeAlias = Literal["float32", "bfloat16"]
Schedule: TypeAlias = Literal["linear", "cosine", "constant"]

DIGITS_AND_LINES = r"\d{1,2}|[^\d\n]*\n|[^\d\n]+"
"""Pre-tokenizer of the scratch recipe: merges may cross spaces and punctuation, never digits or lines."""


class Options(BaseModel):
    """Base of every option model: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraOptions(Options):
    """Low-rank adapters (peft). `targets`: "all-linear", or the ends of module names such as q_proj."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"

    @model_validator(mode="after")
    def _some_targets(self) -> LoraOptions:
        if not self.targets:
            raise ValueError('targets is empty, so nothing would train: name modules such as q_proj, or "all-linear"')
        return self


class ScratchTokenizer(Options):
    """A byte-level BPE trained on the first `texts` demonstrations, up to `vocab_size` tokens."""

    texts: int = Field(default=300, ge=1)
    vocab_size: int = Field(default=1024, ge=300)
    pattern: str = DIGITS_AND_LINES


class HFModel(Options):
    """Any Hugging Face causal LM folder, trained whole or through LoRA adapters."""

    type: Literal["hf"] = "hf"
    path: str = Field(min_length=1)
    dtype: Dtype = "float32"
    lora: LoraOptions | None = None


class ScratchModel(Options):
    """A random model of an architecture that transformers knows, with a tokenizer of its own.

    `arch` holds `model_type` (qwen3, llama, …) and that configuration's own keys; the vocabulary and
    the special ids come from the tokenizer.
    """

    type: Literal["scratch"] = "scratch"
    arch: dict[str, Any]
    tokenizer: ScratchTokenizer = ScratchTokenizer()

    @model_validator(mode="after")
    def _a_model_type(self) -> ScratchModel:
        if not isinstance(self.arch.get("model_type"), str):
            raise ValueError("arch needs model_type, for example model_type: qwen3")
        return self


def _path_is_hf(value: object) -> object:
    """`model: PATH` is short for `model: {type: hf, path: PATH}`; a mapping with a path may leave the type out."""
    if isinstance(value, str):
        return {"type": "hf", "path": value}
    if isinstance(value, Mapping) and "type" not in value:
        for key, kind in (("path", "hf"), ("arch", "scratch")):
            if key in value:
                return {"type": kind, **value}
    return value


ModelOptions: TypeAlias = Annotated[
    Annotated[HFModel | ScratchModel, Field(discriminator="type")], BeforeValidator(_path_is_hf)
]


class OptimizerOptions(Options):
    """How gradients become updates.

    `name`: "adamw", "muon" (Muon on the hidden matrices, AdamW on everything else), or any class of
    `torch.optim`, whose own keyword arguments go into `args`. `warmup` counts optimiser steps; the
    rate then falls to `min_lr_ratio` (.1) of `lr` at the last step, or stays where constant. `clip`
    bounds the global gradient norm (null: no bound). `betas` belong to AdamW and its kin ((.9, .999),
    or (.9, .95) under muon), `momentum` to muon (.95).
    """

    name: str = "adamw"
    lr: float = Field(default=1e-6, gt=0)
    betas: tuple[float, float] | None = None
    momentum: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=0, ge=0)
    schedule: Schedule = "constant"
    min_lr_ratio: float | None = Field(default=None, ge=0, le=1)
    clip: float | None = Field(default=1.0, gt=0)
    args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _no_key_ignored(self) -> OptimizerOptions:
        if self.momentum is not None and self.name != "muon":
            raise ValueError(f"momentum belongs to muon; for {self.name} put it into args, or remove it")
        if self.schedule == "constant" and self.min_lr_ratio is not None:
            raise ValueError("min_lr_ratio does nothing with schedule: constant; choose linear or cosine, or remove it")
        return self
