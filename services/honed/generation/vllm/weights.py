"""The weight transfer backend `honed` of vLLM: weights come from the safetensors files of a local, verified version directory.

Runs inside vLLM's worker processes. Weights go through vLLM's layerwise reload, because some platforms keep them in another
layout than a checkpoint has (on CPUs linear layers are packed ahead), where a plain `load_weights` fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


@dataclass
class DirectoryInit(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is not typed
    """Nothing: there is no peer to meet."""


@dataclass
class DirectoryUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which files hold the complete weights.

    Attributes:
        directory: Absolute path of the version's directory.
        files: Names of its safetensors files.
    """

    directory: str
    files: list[str]


class DirectoryWeightTransfer(WeightTransferEngine[DirectoryInit, DirectoryUpdate]):  # type: ignore[misc]
    """Loads one complete version for each update. An update after a failed one starts from nothing, not from its remains."""

    init_info_cls = DirectoryInit
    update_info_cls = DirectoryUpdate

    def init_transfer_engine(self, init_info: DirectoryInit) -> None:
        """Does nothing."""

    def start_weight_update(self) -> None:
        """Opens the model for loading."""
        initialize_layerwise_reload(self.model)
        for layer in self.model.modules():
            # A failed update leaves what it had loaded; counted again, a layer would seem complete before it is.
            info = get_layerwise_info(layer)
            info.load_numel = 0
            info.loaded_weights.clear()

    def receive_weights(self, update_info: DirectoryUpdate) -> None:
        """Reads every tensor before it loads the first, so that an unreadable file changes nothing."""
        directory = Path(update_info.directory)
        tensors: dict[str, torch.Tensor] = {}
        for name in update_info.files:
            tensors.update(load_file(directory / name))
        self.model.load_weights(iter(tensors.items()))

    def finish_weight_update(self) -> None:
        """Closes the model: weights are in the layout that the kernels want."""
        finalize_layerwise_reload(self.model, self.model_config)
        if not getattr(self.model_config.hf_text_config, "tie_word_embeddings", False):
            return
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                # Tied to the embedding, it is never loaded by itself, and on CPUs its packed copy would stay the old one.
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Does nothing."""
