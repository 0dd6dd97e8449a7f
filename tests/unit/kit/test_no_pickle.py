"""P7: no pickle of ours crosses a process boundary (L9 names vLLM's own, between a process and the child that it starts)."""

from __future__ import annotations

import ast
from pathlib import Path

import honed

PICKLES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
CALLS = {"torch.load", "torch.save", *(f"multiprocessing.{name}" for name in ("Process", "Pool", "Queue", "Pipe", "Manager"))}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def called(tree: ast.AST) -> set[str]:
    """Calls of the form `module.function`."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {f"{f.value.id}.{f.attr}" for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)}


def test_no_module_reads_or_writes_a_pickle() -> None:
    guilty = []
    for file in sorted(Path(honed.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        guilty += [f"{file.name} imports {name}" for name in imported(tree) & PICKLES]
        guilty += [f"{file.name} calls {call}" for call in called(tree) & CALLS]
    assert guilty == []
