"""Which cluster a person means: the contexts of kubeconfig files, and the namespace of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from honed.kit.errors import FailedPrecondition

NAMESPACE: Final = "honed"
"""Where honed runs unless a context or a person names another namespace."""


@dataclass(frozen=True)
class Context:
    """A context of a kubeconfig. `namespace` is empty where it names none."""

    name: str
    namespace: str


def find_kubeconfigs(environment: Mapping[str, str]) -> list[Path]:
    """The kubeconfig files that are there: those of KUBECONFIG, or the usual one."""
    named = environment.get("KUBECONFIG") or str(Path(environment.get("HOME", "~")) / ".kube" / "config")
    return [path for part in named.split(os.pathsep) if part and (path := Path(part).expanduser()).is_file()]


def read_contexts(paths: list[Path]) -> tuple[list[Context], str]:
    """The contexts of kubeconfig files, and the name of the current one, empty if there is none.

    Raises:
        FailedPrecondition: a file is no kubeconfig.
    """
    found: dict[str, Context] = {}
    current = ""
    for path in paths:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
            for entry in tree.get("contexts") or ():
                context = Context(entry["name"], (entry.get("context") or {}).get("namespace") or "")
                found.setdefault(context.name, context)
            current = current or tree.get("current-context") or ""
        except OSError as error:
            raise FailedPrecondition(f"kubeconfig {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
            raise FailedPrecondition(f"{path} is no kubeconfig: let your cluster's tool write it again") from error
    return list(found.values()), current


def choose(asked: str, contexts: list[Context], current: str) -> tuple[Context, str]:
    """The context and the namespace that CONTEXT/NAMESPACE means.

    Names of contexts may have slashes of their own: a whole that is a context's name is that context.

    Raises:
        FailedPrecondition: there is no such context.
    """
    by_name = {context.name: context for context in contexts}
    name, namespace = (asked, "") if asked in by_name or "/" not in asked else asked.rpartition("/")[::2]
    name = name or current
    if context := by_name.get(name):
        return context, namespace or context.namespace or NAMESPACE
    known = ", ".join(sorted(by_name)) or "none"
    if not name:
        raise FailedPrecondition(
            f"the kubeconfig has no current context: name one, --cluster CONTEXT/NAMESPACE; it has {known}"
        )
    raise FailedPrecondition(f"the kubeconfig has no context {name!r}: it has {known}; --cluster takes CONTEXT/NAMESPACE")
