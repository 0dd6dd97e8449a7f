"""kubectl, as the tests on a real cluster use it: every call has a deadline, and a failure says what kubectl said."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from honed._client.errors import RequestError
from honed.kit.errors import HonedError

CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Kubectl:
    """kubectl with one context and one namespace.

    Attributes:
        program: the command.
        context: of the kubeconfig.
        namespace: where the run is.
    """

    program: str
    context: str
    namespace: str

    @property
    def cluster(self) -> str:
        """What `honed --cluster` takes."""
        return f"{self.context}/{self.namespace}"

    def __call__(
        self, *arguments: str, namespace: str | None = None, stdin: str = "", timeout_s: float = CALL_TIMEOUT_S
    ) -> str:
        """What the command prints.

        Raises:
            RuntimeError: it failed, or took longer than `timeout_s`.
        """
        command = [self.program, "--context", self.context, "-n", namespace or self.namespace, *arguments]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"kubectl {' '.join(arguments)} took longer than {timeout_s:g} s") from None
        if done.returncode != 0:
            raise RuntimeError(f"kubectl {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout

    def json(self, *arguments: str, namespace: str | None = None) -> Any:
        """What the command prints as JSON; raises as a call does."""
        return json.loads(self(*arguments, "-o", "json", namespace=namespace))

    def there(self, kind: str, name: str) -> bool:
        """Whether an object exists; raises as a call does."""
        return bool(self("get", kind, name, "--ignore-not-found", "-o", "name").strip())

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Applies objects; raises as a call does."""
        self("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    def apply_overlay(self, overlay: Path) -> None:
        """Applies an overlay; raises as a call does."""
        self("apply", "-k", str(overlay), timeout_s=300)


def until(claim: Callable[[], bool], timeout_s: float, what: str, every_s: float = 2.0) -> None:
    """Waits until a claim holds; what fails to answer meanwhile, or answers half a line, is asked again.

    Raises:
        TimeoutError: it does not within the time; says `what`, and the last error.
    """
    end, last = time.monotonic() + timeout_s, ""
    while True:
        try:
            if claim():
                return
            last = ""
        except (RuntimeError, ValueError, HonedError, RequestError) as error:
            last = f" ({error})"
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s{last}")
        time.sleep(every_s)
