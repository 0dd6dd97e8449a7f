"""The recipes that the package carries: run files, each of which reproduces a method on data of its own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Final

from honed.kit.errors import NotFound

_FILES: Final = resources.files("honed.recipes")
DEMO: Final = "lm-human-preferences"
"""The recipe that `honed demo` runs."""
_ALSO: Final = {"demo": DEMO}
"""Other names of recipes."""


@dataclass(frozen=True)
class Recipe:
    """A run file.

    Attributes:
        name: Of the file, without `.yaml`.
        text: All of it.
    """

    name: str
    text: str

    @property
    def title(self) -> str:
        """The first line of the comment that it begins with."""
        return self.text.partition("\n")[0].removeprefix("#").strip()


def recipes() -> list[Recipe]:
    """All of them, by name."""
    files = sorted((file for file in _FILES.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [Recipe(file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8")) for file in files]


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; `demo` is another name of the one that `honed demo` runs.

    Raises:
        NotFound: There is none; names those that there are.
    """
    found = {recipe.name: recipe for recipe in recipes()}
    name = _ALSO.get(name, name)
    if name not in found:
        raise NotFound(f"there is no recipe {name!r}; there are {', '.join(found)}")
    return found[name]
