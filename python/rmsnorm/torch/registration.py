"""Where torch keeps the operators: defined once in a process, implemented by the latest import.

The package may be imported more than once in a process, anew or by importlib.reload. A definition
stays then, because compiled and exported programs hold on to it; an implementation is replaced.
"""

from __future__ import annotations

import torch
from torch.library import Library

# Kept by torch and not by this module, which another import would begin without them.
_libraries: dict[str, Library] = vars(torch.ops.rmsnorm).setdefault("_libraries", {})


def define(schema: str) -> None:
    """Defines an operator, unless an earlier import did.

    Raises:
        RuntimeError: An earlier import defined another one of the same name.
    """
    if schema not in _libraries:
        library = Library("rmsnorm", "FRAGMENT")
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _libraries[schema] = library


def implementations(module: str) -> Library:
    """A library for what a module registers, in the place of that of an earlier import of it."""
    earlier = _libraries.pop(module, None)
    if earlier is not None:
        earlier._destroy()
    _libraries[module] = Library("rmsnorm", "IMPL")
    return _libraries[module]
