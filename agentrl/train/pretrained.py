"""Models and tokenizers from folders and from nothing, with one clear sentence for everything that can be wrong."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as _logging

from agentrl.errors import UsageError
from agentrl.pictures import sees
from agentrl.train.options import Dtype

logging: Any = _logging

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_BAD_ARCH = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, StrictDataclassError)
_FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, which must have a chat template."""
    _check_folder(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UsageError(f"the tokenizer in {folder} cannot be loaded ({_first_line(error)}); copy it anew") from error
    if not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer in {folder} has no chat template; add a chat_template.jinja, or name a chat model's folder"
        )
    return tokenizer


def load_model(folder: Path, *, dtype: Dtype, ids: int) -> PreTrainedModel:
    """The folder's causal LM on the CPU, one that sees too, whose vocabulary must hold the tokenizer's `ids` ids."""
    _check_folder(folder)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UsageError(f"{folder}/config.json cannot be read: {_first_line(error)}") from error
    named = list(config.architectures or [])
    kind: Any = AutoModelForImageTextToText if sees(folder) else AutoModelForCausalLM
    if kind is AutoModelForCausalLM and (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or (named and not set(named) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    ):
        what = named[0] if named else config.model_type
        raise UsageError(f"{folder} holds {what}, which is no causal language model; name a folder that holds one")
    try:
        with quiet():
            loaded: Any = kind.from_pretrained(
                str(folder), config=config, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UsageError(
            f"the weights in {folder} cannot be loaded ({_first_line(error)}); copy the whole model folder anew"
        ) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:
        raise UsageError(
            f"the weights in {folder} lack {min(report['missing_keys'])}; copy the whole model folder anew"
        )
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if ids > rows:
        raise UsageError(f"the tokenizer in {folder} has {ids} ids, its model only {rows}; they are not a pair")
    return model


def random_model(arch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A float32 model of `arch` with random weights, its vocabulary and special ids from the tokenizer."""
    keys = dict(arch)
    kind = str(keys.pop("model_type", ""))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        close = difflib.get_close_matches(kind, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), n=1)
        hint = f"did you mean {close[0]}?" if close else "use one such as qwen3, qwen2 or llama"
        raise UsageError(f"model.arch.model_type {kind!r} is no causal language model; {hint}")
    _check_keys(keys, CONFIG_MAPPING[kind], kind)
    special = {name: getattr(tokenizer, name) for name in _FROM_TOKENIZER[1:]}
    try:
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **special, **keys)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed % 2**63)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32
            )
    except _BAD_ARCH as error:
        raise UsageError(f"model.arch is no {kind} that can be built: {_first_line(error)}") from error
    return model


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; name a Hugging Face model folder (nothing is downloaded)")
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder} holds adapters only; name a merged model's folder (agentrl export hf merges)")
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{folder} is not a Hugging Face model folder: it has no config.json; name one that has")
    try:
        json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{config} is not JSON ({error}); copy the model folder anew") from error


def _check_keys(keys: Mapping[str, Any], kind: type, name: str) -> None:
    """Refuse keys that the configuration would swallow unread."""
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    known |= set(inspect.signature(kind).parameters) | set(getattr(kind, "attribute_map", {}))
    known |= {"rope_theta", "rope_scaling"} if "rope_parameters" in known else set()  # older spellings, still read
    for key in keys:
        if key in _FROM_TOKENIZER:
            raise UsageError(f"model.arch.{key} comes from the tokenizer; remove it")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"model.arch.{key} is no key of {name}{hint or '; remove it'}")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load reports: what matters is raised."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
    text = str(cause or error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
