"""What every layer is."""

from __future__ import annotations

from typing import Any

from torch import nn


class Layer(nn.Module):
    """A torch module that finds its submodules at once.

    An ordinary one looks for a plain attribute first, fails, and only then asks its table of modules. A step of one sequence on CPU makes
    hundreds of such accesses between operations of a few microseconds: together they are a hundredth of it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value
