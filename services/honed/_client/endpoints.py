"""Where the services of a run on this machine listen: `endpoints.json` in the run's directory, while the run is up."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from honed.kit.tls import TlsFiles
from honed.kit.tokens import local_token_file

FILE: Final = "endpoints.json"
SERVICES: Final = ("generation", "reward", "preference", "learner", "conductor")
_TLS: Final = ("authority", "certificate", "key")


@dataclass(frozen=True)
class Endpoints:
    """The addresses of a run's services and what it takes to be let in.

    Attributes:
        directory: the run's directory.
        addresses: `host:port` by the service's name.
        token_file: the token of applications; None when authentication is off.
        operator_token_file: the token of whoever operates the run; the same where there is no other.
        tls: certificate files; None for plain text.
    """

    directory: Path
    addresses: dict[str, str] = field(default_factory=dict)
    token_file: Path | None = None
    operator_token_file: Path | None = None
    tls: TlsFiles | None = None

    @classmethod
    def read(cls, directory: Path) -> Endpoints:
        """Reads the file of a run that is up.

        Raises:
            ValueError: there is no such file, so the run is not up, or it is not whole; says what to do.
        """
        path = directory / FILE
        try:
            tree: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist: no run is up in {directory}; start one by `honed up`") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): start the run again, which writes it anew") from error
        if not isinstance(tree, dict):
            raise ValueError(f"{path} must hold a JSON object of addresses: start the run again, which writes it anew")
        token_file = directory / tree["token_file"] if tree.get("token_file") else None
        tls = tree.get("tls")
        return cls(
            directory,
            {name: str(tree[name]) for name in SERVICES if tree.get(name)},
            token_file,
            _operator_token(token_file),
            TlsFiles(**{name: directory / tls[name] for name in _TLS}, server_name=tls.get("server_name") or "")
            if tls
            else None,
        )

    def address(self, service: str) -> str:
        """The address of one service.

        Raises:
            ValueError: the run has none.
        """
        try:
            return self.addresses[service]
        except KeyError:
            raise ValueError(f"{self.directory / FILE} names no address of the {service} service") from None


def _operator_token(token_file: Path | None) -> Path | None:
    """The token with every scope, which a local run keeps beside the others, readable by its owner only."""
    if token_file is None:
        return None
    beside = local_token_file(token_file.parent, "operator")
    return beside if beside.exists() else token_file
