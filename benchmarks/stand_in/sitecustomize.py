"""Python imports this at its start: it hides transformers, which needs more of torchvision than the stand-in has."""

from importlib.machinery import PathFinder
from typing import Any

_find_spec = PathFinder.find_spec


def _find_others(name: str, *args: Any) -> Any:
    return None if name == "transformers" else _find_spec(name, *args)


PathFinder.find_spec = _find_others  # type: ignore[assignment]  # a function in place of a class method
