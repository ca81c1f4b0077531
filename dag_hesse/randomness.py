"""States of the global random generators: PyTorch's, Python's and NumPy's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """What all global generators had drawn at one time."""

    torch: Tensor
    cuda: list[Tensor]
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=False))  # type: ignore[arg-type]

    def drew_outside(self, later: RandomState) -> bool:
        """Whether Python's or NumPy's generator was drawn from until ``later``."""
        mine, other = self.numpy["state"], later.numpy["state"]
        same = mine["pos"] == other["pos"] and np.array_equal(mine["key"], other["key"])
        return not same or self.numpy["has_gauss"] != later.numpy["has_gauss"] or self.python != later.python

    def restore(self) -> None:
        """Set the generators to it."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def preserved() -> Iterator[None]:
    """Give the generators back as they were.

    Examples:
        >>> import torch
        >>> from dag_hesse.randomness import preserved
        >>> with preserved():
        ...     first = torch.rand(1)
        >>> bool(torch.rand(1) == first)
        True
    """
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()
