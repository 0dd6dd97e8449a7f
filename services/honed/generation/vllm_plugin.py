"""The entry point `honed.generation.vllm_plugin:register` of installations made before the module moved. To be removed."""

from honed.generation.vllm.plugin import register

__all__ = ["register"]
