"""Says in one sentence what is wrong with an installation, before a traceback has to."""

from __future__ import annotations

import sys


def main() -> int:
    """Imports what the rest stands on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        print(
            f"torch does not load ({error}). The lock installs packages without their dependencies, so it needs the CPU build "
            "of torch: point pip at an index that has it (PIP_EXTRA_INDEX_URL; PyTorch publishes one for CPUs), remove .venv, "
            "and run make again.",
            file=sys.stderr,
        )
        return 1
    try:
        import transformers
        import vllm
        from vllm.platforms import current_platform

        import honed.generation.vllm.plugin  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        print(f"the installation is not complete: {error}; remove .venv and run make again", file=sys.stderr)
        return 1
    # vLLM has one library for each kind of processor (AVX2, AVX-512, bfloat16), and the wrong one ends the process: it chooses.
    # It only logs what does not load, so the question is whether its operators are there.
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "rms_norm"):
        print(
            "vLLM's part for CPUs does not load (the reason is above): install the library that it names (Debian, Ubuntu: "
            "apt-get install libnuma1) and run make again",
            file=sys.stderr,
        )
        return 1
    print(f"installed: torch {torch.__version__}, vllm {vllm.__version__}, transformers {transformers.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
