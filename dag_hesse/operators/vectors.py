"""The forms a vector may come in: flat, a matrix of columns, a list or a dict like the points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dag_hesse.errors import VectorError
from dag_hesse.kernels.pool import empty

_BLOCK = 1 << 16  # elements
Unpack = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Layout:
    """How a flat vector of length ``size`` is cut into named blocks of given shapes."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of every block."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        """Elements of the whole vector."""
        return sum(self.sizes)

    def pack(self, v: Any) -> tuple[list[Tensor], Unpack]:
        """Cut any accepted form into blocks of rows (k, size), and say how to turn such blocks back into that form.

        Nothing is copied but columns that do not lie one behind the other in memory.

        Raises:
            VectorError: wrong size, dtype, device or keys.
        """
        if isinstance(v, Tensor):
            self._check("the vector", v)
            if v.ndim not in (1, 2) or v.shape[0] != self.size:
                raise VectorError(
                    f"the vector has shape {tuple(v.shape)}; expected ({self.size},) or ({self.size}, k)."
                )
            rows = v.unsqueeze(0) if v.ndim == 1 else _rows(v)
            return list(rows.split(self.sizes, dim=1)), lambda out: _flat(out, v.ndim == 1)
        if isinstance(v, Mapping):
            if set(v) != set(self.names):
                missing, extra = sorted(set(self.names) - set(v)), sorted(set(v) - set(self.names))
                raise VectorError(f"the vector's keys do not match: missing {missing[:4]}, unknown {extra[:4]}.")
            blocks, unpack = self._shaped([v[name] for name in self.names])
            return blocks, lambda out: dict(zip(self.names, unpack(out), strict=True))
        if isinstance(v, (list, tuple)) and all(isinstance(x, Tensor) for x in v):
            if len(v) != len(self.names):
                raise VectorError(f"the vector has {len(v)} tensors; expected {len(self.names)}, one per block.")
            blocks, unpack = self._shaped(list(v))
            return blocks, lambda out: type(v)(unpack(out))
        raise VectorError(f"a {type(v).__name__} is no vector; expected a tensor, a list of tensors or a dict of them.")

    def _shaped(self, parts: list[Tensor]) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
        """Blocks of their own shapes, all with one more axis of k columns or none with."""
        several = len(parts) > 0 and parts[0].ndim == len(self.shapes[0]) + 1
        columns = parts[0].shape[-1:] if several else torch.Size()
        for name, shape, part in zip(self.names, self.shapes, parts, strict=True):
            self._check(f"'{name}'", part)
            if part.shape != torch.Size(shape) + columns:
                raise VectorError(f"'{name}' has shape {tuple(part.shape)}; expected {(*shape, *columns)}.")
        sizes = self.sizes
        rows = [_rows(p) if several else p.reshape(1, n) for p, n in zip(parts, sizes, strict=True)]

        def unpack(out: list[Tensor]) -> list[Tensor]:
            pairs = zip(out, self.shapes, strict=True)
            return [p.reshape(*columns, *s).movedim(0, -1) if several else p.reshape(s) for p, s in pairs]

        return rows, unpack

    def _check(self, what: str, x: Tensor) -> None:
        if x.dtype != self.dtype or x.device != self.device:
            raise VectorError(f"{what} is {x.dtype} on {x.device}; expected {self.dtype} on {self.device}: use .to().")


def _rows(columns: Tensor) -> Tensor:
    """(…, k) -> (k, n): no copy where rows lie in memory one behind the other, as those of our own results do."""
    turned = columns.movedim(-1, 0)
    if turned.is_contiguous():
        return turned.reshape(len(turned), -1)
    columns = columns.reshape(-1, len(turned))
    # Blocks that stay in a core's cache: one strided copy would read everything once a row.
    rows = columns.new_empty(columns.shape[::-1])
    step = max(1, _BLOCK // max(1, len(rows)))
    for target, block in zip(rows.split(step, dim=1), columns.split(step), strict=True):
        target.copy_(block.T)
    return rows


def _flat(blocks: list[Tensor], single: bool) -> Tensor:
    count, size = len(blocks[0]), sum(block.shape[1] for block in blocks)
    rows = torch.cat(blocks, dim=1, out=empty(blocks[0], count, size)) if len(blocks) > 1 else blocks[0]
    return rows[0] if single else rows.T
