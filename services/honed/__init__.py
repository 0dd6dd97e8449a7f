"""honed keeps a language model sharp on live feedback while it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from honed.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads the client, and gRPC with it, when it is first asked for: the services import this package too."""
    if name == "Client":
        from honed.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
