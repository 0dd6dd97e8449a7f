"""What honed adds to vLLM's workers: changes of weights out of the safetensors files of a local, verified version directory.

Runs inside vLLM's worker processes, called by `collective_rpc`. Two ways lead to new weights:
`honed_stage` and `honed_exchange` (see `staging`), or `honed_load`, which replaces them in place
and needs no memory for a second set. In place they go through vLLM's layerwise reload, because some
platforms keep weights in another layout than a checkpoint has (on CPUs linear layers are packed
ahead), where a plain `load_weights` fails.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from honed.generation.vllm.staging import SecondSet, Stage

logger = logging.getLogger(__name__)


class WeightsExtension:
    """Mixed into vLLM's worker class. Every method runs between two steps of the engine."""

    vllm_config: Any
    model_runner: Any

    def honed_open(self, staged: bool) -> str:
        """Makes ready for changes of weights.

        Returns:
            Why no second set is possible, and every change happens in place; empty if it is.
        """
        self._honed_stage: Stage | None = None
        # An engine in bfloat16 on versions in float32 is what honed is for; vLLM would warn of each tensor at each push.
        logging.getLogger("vllm.model_executor.models.utils").addFilter(lambda record: "with dtype" not in str(record.msg))
        if not staged:
            return "generation.staged_load is off"
        model_config = self.vllm_config.model_config
        if model_config.quantization is not None or model_config.use_mla:
            return "quantized models and latent attention keep weights in places that cannot be exchanged"
        in_place = not self.vllm_config.model_config.enforce_eager
        try:
            live = self.model_runner.get_model()
            self._honed_stage = Stage(SecondSet(live, _twin(self.vllm_config), _lay_out, in_place=in_place))
        except Exception as error:
            logger.warning("no second instance of the model can be made", exc_info=True)
            return f"no second instance of the model can be made: {type(error).__name__}: {error}"
        return ""

    def honed_stage(self, ticket: int, directory: str, files: Sequence[str]) -> None:
        """Begins to read and lay out weights beside those that serve."""
        assert self._honed_stage is not None
        self._honed_stage.begin(ticket, _read(Path(directory), files))

    def honed_stage_outcome(self, ticket: int) -> str | None:
        """None while it goes on, an empty text when it is ready, otherwise what went wrong."""
        assert self._honed_stage is not None
        return self._honed_stage.outcome(ticket)

    def honed_exchange(self, ticket: int) -> None:
        """Serves the staged weights, and keeps those that served as the staged ones."""
        assert self._honed_stage is not None
        self._honed_stage.exchange(ticket)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def honed_unstage(self) -> None:
        """Frees the second set."""
        if self._honed_stage is not None:
            self._honed_stage.end()

    def honed_load(self, directory: str, files: Sequence[str]) -> None:
        """Replaces all weights in place. Reads every tensor before it loads the first; an unreadable file changes nothing."""
        self.honed_unstage()
        tensors = dict(_read(Path(directory), files))
        model, model_config = self.model_runner.get_model(), self.vllm_config.model_config
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            for layer in model.modules():
                # A failed update leaves what it had loaded; counted again, a layer would seem complete before it is.
                info = get_layerwise_info(layer)
                info.load_numel = 0
                info.loaded_weights.clear()
            model.load_weights(iter(tensors.items()))
            finalize_layerwise_reload(model, model_config)
        if getattr(model_config.hf_text_config, "tie_word_embeddings", False):
            for layer in model.modules():
                if isinstance(layer, ParallelLMHead):
                    # Tied to the embedding, it is never loaded by itself, and on CPUs its packed copy would stay the old one.
                    _lay_out(layer)
        torch.accelerator.synchronize()


def _read(directory: Path, files: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a version, mapped from their files."""
    for name in files:
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                yield key, file.get_tensor(key)


def _twin(vllm_config: Any) -> torch.nn.Module:
    """A second instance of the model, without memory. In the engine's thread: the default dtype is the process's."""
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.static_forward_context = {}  # attention layers enter their names here, once each
    config.compilation_config.static_all_moe_layers = []
    with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
        model: torch.nn.Module = initialize_model(config, model_config=config.model_config)
    return model.eval()


def _lay_out(module: torch.nn.Module) -> None:
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        method.process_weights_after_loading(module)
