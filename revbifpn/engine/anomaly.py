"""In anomaly mode (``torch.autograd.set_detect_anomaly``): which module computed values that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revbifpn.engine.traced import is_traced


class NotFiniteError(RuntimeError):
    """The first module whose result has NaN or infinity in it.

    Attributes:
        module: that module.
        name: its name in the model that was called, or that of its class.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.module, self.name = module, label(module)

    def __str__(self) -> str:
        return f"{self.name} computed values that are not finite in the forward pass"


def label(module: nn.Module) -> str:
    """What a module is called where nothing has a name for it: its ``label`` if it has one, else its class."""
    return getattr(module, "label", None) or type(module).__name__


def check_finite(module: nn.Module, *results: Tensor | None) -> None:
    """In anomaly mode, refuse results that are not finite.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    if not is_traced() and torch.is_anomaly_enabled() and not all(t is None or t.isfinite().all() for t in results):
        raise NotFiniteError(module)


@contextmanager
def names_of(root: nn.Module) -> Iterator[None]:
    """Let a :class:`NotFiniteError` from within call the module by its name in ``root``."""
    try:
        yield
    except NotFiniteError as error:
        names = {id(m): name for name, m in root.named_modules()}
        error.name = names.get(id(error.module)) or error.name
        raise
