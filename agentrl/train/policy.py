"""The trained policy: a causal LM with its tokenizer, from a folder or from nothing, whole or through LoRA.

Three views of one set of weights: what is trained and checkpointed (`trainable`, `state`), what the
engine samples with (`weights`: merged, under the architecture's own names), and what others load
(`save_hf`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentrl.content import Image
from agentrl.errors import UsageError
from agentrl.pictures import Pictures, sees
from agentrl.train.forward import Network
from agentrl.train.lora import add_adapters, deltas, merged
from agentrl.train.options import Dtype, LoraOptions
from agentrl.train.pretrained import load_model, load_tokenizer, quiet, random_model
from agentrl.trajectory import Ids, Place

Album = Callable[[str], Image]
"""Gives a picture by its sha256. Raises `KeyError` for one that it does not hold."""


class Policy:
    """`model` is the plain model, or peft's wrapper around it; `base` always the architecture itself.

    `version` counts weight updates handed to the engine; `path` is the folder it came from, if any; `pictures` is what
    a model that sees makes of pictures, and `album` gives the pictures that rows name.
    The model stays in evaluation mode: nothing is random but LoRA's dropout, where gradients flow.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lora: LoraOptions | None = None,
        path: str | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.path = path
        self.pictures = pictures
        self.version = 0
        self.base = model
        self.model: nn.Module = model if lora is None else add_adapters(model, lora)
        self.model.train(False)
        self.lora = lora is not None
        self._trained = [name for name, p in self.base.named_parameters() if p.requires_grad]
        self.album: Album | None = None
        self.network = self._network()

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "float32",
        lora: LoraOptions | None = None,
        device: torch.device | None = None,
    ) -> Policy:
        """Load a Hugging Face causal LM folder; nothing is ever downloaded.

        Raises `UsageError` where the folder is missing or incomplete, holds no causal LM, or its
        tokenizer has no chat template.
        """
        folder = Path(path).expanduser()
        tokenizer = load_tokenizer(folder)
        model = load_model(folder, dtype=dtype, ids=len(tokenizer))
        pictures = Pictures(folder.resolve(), tokenizer) if sees(folder) else None
        return cls(_on(device, model), tokenizer, lora=lora, path=str(folder.resolve()), pictures=pictures)

    @classmethod
    def scratch(
        cls,
        arch: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        device: torch.device | None = None,
    ) -> Policy:
        """A random model: `arch` is `model_type` and keys of that configuration; the vocabulary and the
        special ids are the tokenizer's. Equal seeds give equal weights. Raises `UsageError` for an
        unknown type or key."""
        return cls(_on(device, random_model(arch, tokenizer, seed=seed)), tokenizer)

    @property
    def vocab_size(self) -> int:
        """Ids below this are the model's."""
        return int(self.base.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """What gradients change, by name."""
        named = dict(self.base.named_parameters())
        return {name: named[name] for name in self._trained}

    def hidden_matrices(self) -> frozenset[str]:
        """Names of the trainable matrices that are neither embedding nor head: Muon's share."""
        apart = {id(module.weight) for module in self.base.modules() if isinstance(module, nn.Embedding)}
        head = self.base.get_output_embeddings()  # type: ignore[no-untyped-call]
        apart |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        return frozenset(name for name, p in self.trainable().items() if p.ndim == 2 and id(p) not in apart)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under the architecture's own names, tied ones once, adapters merged on the way;
        the policy itself is not changed."""
        changes = deltas(self.base) if self.lora else {}
        for name, tensor in self._tensors():
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            change = (
                changes.get(name.removesuffix(".base_layer.weight")) if name.endswith(".base_layer.weight") else None
            )
            yield plain, tensor if change is None else (tensor.float() + change().detach().float()).to(tensor.dtype)

    def model_for_engine(self) -> PreTrainedModel:
        """The plain architecture for an engine to copy: this very model, or a merged copy with LoRA."""
        return merged(self.model) if self.lora else self.base

    def pieces(self, ids: Ids) -> list[str]:
        """The text of each id alone (a part of a character shows as the replacement character)."""
        return [str(self.tokenizer.decode([int(i)], skip_special_tokens=False)) for i in ids]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: all weights, or the adapters alone."""
        kept = set(self._trained)
        return {name: tensor for name, tensor in self._tensors() if not self.lora or name in kept}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of `state()`. Raises `UsageError` for another model's."""
        own = self.state()
        odd = set(own) ^ set(state) or {name for name, tensor in own.items() if tensor.shape != state[name].shape}
        if odd:
            raise UsageError(
                f"the checkpoint's weights are not this model's ({min(odd)} differs); resume with the configuration "
                "they were saved with"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def frozen_copy(self, state: Mapping[str, Tensor] | None = None) -> Policy:
        """A policy that stays as this one is now (or takes `state`): the reference of a stage. What is
        never trained is shared, so with LoRA only the adapters are held twice."""
        trained = set(self._trained)
        shared = [p for name, p in self.base.named_parameters() if name not in trained] if self.lora else []
        other = copy.copy(self)
        memo: dict[int, Any] = {id(p): p for p in shared}
        other.base, other.model = copy.deepcopy((self.base, self.model), memo)
        other.base.requires_grad_(False)
        other.network = other._network()
        if state is not None:
            other.load_state(state)
        return other

    def save_hf(self, folder: str | Path, *, merge: bool = True) -> None:
        """Write a Hugging Face folder with tokenizer and chat template. With LoRA: merged, or (`merge`
        False) peft's adapter folder, which names its base model. Raises `UsageError` where `merge` is
        False and there is nothing to keep apart."""
        if not (merge or self.lora):
            raise UsageError("this policy has no LoRA adapters to write apart; export it merged")
        with quiet():
            if merge:
                self.model_for_engine().save_pretrained(str(folder))
            else:
                self.model.save_pretrained(str(folder))  # type: ignore[operator]
        for weights in Path(folder).glob("*.safetensors"):
            weights.chmod(0o644)  # they come out private, and servers may run as somebody else
        self.tokenizer.save_pretrained(str(folder))
        if self.pictures is not None:
            self.pictures.save(Path(folder))

    def _network(self) -> Network:
        return Network(self.base, self._look if self.pictures is not None else None)

    def _look(self, places: Sequence[Place], n: int) -> dict[str, Tensor]:
        assert self.pictures is not None
        if self.album is None:
            raise UsageError("rows with pictures need to be told where the pictures are: set Policy.album")
        album = self.album
        return self.pictures.inputs([album(p.sha256) for p in places], [(p.start, p.stop) for p in places], n)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers, each once."""
        yield from ((name, p.detach()) for name, p in self.base.named_parameters())
        persistent = self.base.state_dict().keys()
        yield from ((name, buffer) for name, buffer in self.base.named_buffers() if name in persistent)


def _on(device: torch.device | None, model: PreTrainedModel) -> PreTrainedModel:
    if device is not None:
        nn.Module.to(model, device)
    return model
