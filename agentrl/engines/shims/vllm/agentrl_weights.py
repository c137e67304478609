"""Runs inside vLLM's workers (`--worker-extension-cls agentrl_weights.Extension`): weights out of a folder.

vLLM's own ways to take weights want a GPU. Here a worker reads them from a folder, by vLLM's own reloading; on a CPU
that leaves the packed copy of the output head as it was, so the head is packed again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload.inplace import reload_weights


class Extension:
    """Mixed into the worker. Importing this module is what it is for."""


@dataclass
class Nothing(WeightTransferInitInfo):
    """A folder needs no connection."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """`folder` holds all weights under the architecture's own names."""

    folder: str


class FolderEngine(WeightTransferEngine[Nothing, Update]):
    init_info_cls = Nothing
    update_info_cls = Update

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def receive_weights(self, update_info: Update) -> None:
        reload_weights(self.vllm_config, self.model, _tensors(Path(update_info.folder)), None, True)
        words = getattr(self.model, "language_model", self.model)  # of a model that sees
        head = getattr(words, "lm_head", None)
        if self.device.type == "cpu" and head is not None:
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing is held."""


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118 - it is no dictionary
                yield name, held.get_tensor(name)


WeightTransferEngineFactory.register_engine("agentrl", FolderEngine)
