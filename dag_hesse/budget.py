"""What ``memory=`` means: the bytes that a call may use, and who has which share of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dag_hesse.errors import integer
from dag_hesse.measure import available_memory


@dataclass(frozen=True)
class Budget:
    """The bytes that a call may use beside the model: ``total``, or what is free at the time it is asked.

    A quarter is for a loader's batches, a quarter for linearizations that are kept from one pass over them to the next,
    and half is for sweeps and what they return.

    Example:
        >>> budget = Budget.of(1000)
        >>> budget.batches, budget.sweeps, budget.keeps(200, 50), budget.keeps(200, 51)
        (250, 500, True, False)
    """

    total: int | None = None
    device: torch.device | None = None  # where what is free is asked; None: in main memory

    @staticmethod
    def of(memory: object, device: torch.device | None = None) -> Budget:
        """What the user said.

        Raises:
            OptionError: it is neither None nor a positive integer.
        """
        why = "a positive number of bytes, or None"
        return Budget(None if memory is None else integer("memory", memory, 1, why), device)

    @property
    def _whole(self) -> int:
        return available_memory(self.device) if self.total is None else self.total

    @property
    def batches(self) -> int:
        """Bytes that held batches may take."""
        return self._whole // 4

    @property
    def sweeps(self) -> int:
        """Bytes that sweeps and what they return may take."""
        return self._whole // 2

    def keeps(self, kept: int, size: int) -> bool:
        """Whether a linearization of ``size`` bytes is kept beside others that take ``kept``."""
        taken = 0 if self.total is None else kept  # what is kept is not free any more
        return taken + size <= self._whole // 4
