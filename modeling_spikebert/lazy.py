"""Names of a package that are imported when first used: torch and transformers take seconds."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str, modules: dict[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package, from names by the module that has them."""
    places = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name in places:
            return getattr(import_module(places[name], package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
