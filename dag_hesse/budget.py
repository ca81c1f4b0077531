"""What ``memory=`` means: the bytes that a call may use, and who has which share of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from dag_hesse.errors import MemoryBudgetError, OptionError, integer
from dag_hesse.measure import available_memory

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def human(size: float) -> str:
    """Bytes with a unit.

    >>> human(512), human(3 << 20)
    ('512 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""


def bytes_of(memory: Any) -> int:
    """``memory`` in bytes: an integer, or a text of a number with a unit.

    Raises:
        OptionError: it is neither, or not positive.

    >>> bytes_of("4GiB"), bytes_of("1.5 MB"), bytes_of(1000)
    (4294967296, 1500000, 1000)
    """
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", memory)
        if found is None or found[2].upper() not in _UNITS:
            raise OptionError(f"memory={memory!r}; expected bytes, or a text such as '4GiB' or '500 MB'.")
        size = float(found[1]) * _UNITS[found[2].upper()]
        if size == math.inf:
            raise OptionError(f"memory={memory[:40]!r}…: that is more than a number of bytes can be.")
        memory = int(size)
    return integer("memory", memory, 1, "a positive number of bytes, or a text such as '4GiB'")


@dataclass(frozen=True)
class Budget:
    """The bytes that a call may use beside the model: ``total``, or what is free at the time it is asked.

    A quarter is for a loader's batches, a quarter for linearizations that are kept from one pass over them to the next,
    and half is for sweeps and what they return.

    Examples:
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
            OptionError: it is neither None nor a positive number of bytes (:func:`bytes_of`).
        """
        return Budget(None if memory is None else bytes_of(memory), device)

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

    def check(self, need: int, what: str, instead: str) -> None:
        """Raise :class:`MemoryBudgetError` where a result of ``need`` bytes is more than sweeps may return."""
        if need > self.sweeps:
            raise MemoryBudgetError(
                f"{what} takes {human(need)}, and {human(self.sweeps)} may be used (half of memory=, "
                f"or of what is free): {instead}, or raise memory=."
            )

    def keeps(self, kept: int, size: int) -> bool:
        """Whether a linearization of ``size`` bytes is kept beside others that take ``kept``."""
        taken = 0 if self.total is None else kept  # what is kept is not free any more
        return taken + size <= self._whole // 4
