"""The forms a vector may come in: flat, a matrix of columns, a list or a dict like the points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dag_hesse.budget import Budget
from dag_hesse.errors import VectorError, kind_of
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.ranks import Ranks, together

_PIECE = 1 << 16  # elements
_DETACHED = (
    "the vector requires gradients, but products are detached from autograd: no gradient goes back to it. Pass "
    "v.detach() where that is meant; differentiate the loss by torch.autograd where it is not."
)
Unpack = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class VectorForm:
    """How a flat vector of length ``size`` is divided into named segments of given shapes."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype  # of flat vectors
    device: torch.device
    dtypes: tuple[torch.dtype, ...] = ()  # of the segments, where they are not all that

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of every segment."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        """Elements of the whole vector."""
        return sum(self.sizes)

    def among(self, places: Sequence[int]) -> VectorForm:
        """The form of vectors that have some of the segments alone."""
        names, shapes = tuple(self.names[k] for k in places), tuple(self.shapes[k] for k in places)
        dtypes = tuple(self.dtypes[k] for k in places) if self.dtypes else ()
        return VectorForm(names, shapes, self.dtype, self.device, dtypes)

    def shaped(self, rows: Sequence[Tensor], several: bool) -> list[Tensor]:
        """Segments of rows (k, size) in their own shapes and types: (*shape, k), or (*shape) unless ``several``."""
        dtypes = self.dtypes or (self.dtype,) * len(self.names)
        own = [p.to(dtype) for p, dtype in zip(rows, dtypes, strict=True)]
        pairs = zip(own, self.shapes, strict=True)
        return [p.reshape(-1, *s).movedim(0, -1) if several else p.reshape(s) for p, s in pairs]

    def pack(self, v: Any, arena: Arena = SYSTEM) -> tuple[list[Tensor], Unpack]:
        """Divide any accepted form into segments of rows (k, size), and say how to turn such back into that form.

        Nothing is copied but columns that do not lie one behind the other in memory; what is put together again lies in
        ``arena``.

        Raises:
            VectorError: wrong size, dtype, device or keys.
        """
        if isinstance(v, np.ndarray):
            segments, unpack = self.pack(self._from_numpy(v), arena)
            return segments, lambda out: to_numpy(unpack(out))
        if isinstance(v, Tensor):
            if v.layout is not torch.strided:
                raise VectorError(f"the vector is sparse ({v.layout}); expected a dense one: .to_dense().")
            self._check("the vector", v, self.dtype)
            if v.ndim not in (1, 2) or v.shape[0] != self.size:
                raise VectorError(
                    f"the vector has shape {tuple(v.shape)}; expected ({self.size},) or ({self.size}, k)."
                )
            if not v.numel():
                raise VectorError(f"the vector has shape {tuple(v.shape)}: there is no column to multiply with.")
            v = v.detach()
            rows = v.unsqueeze(0) if v.ndim == 1 else _rows(v)
            return list(rows.split(self.sizes, dim=1)), lambda out: _flat(arena, out, v.ndim == 1)
        if isinstance(v, Mapping):
            if set(v) != set(self.names):
                missing, extra = sorted(set(self.names) - set(v)), sorted(set(v) - set(self.names))
                raise VectorError(f"the vector's keys do not match: missing {missing[:4]}, unknown {extra[:4]}.")
            segments, unpack = self._shaped([v[name] for name in self.names])
            return segments, lambda out: dict(zip(self.names, unpack(out), strict=True))
        if isinstance(v, (list, tuple)) and all(isinstance(x, Tensor) for x in v):
            if len(v) != len(self.names):
                raise VectorError(f"the vector has {len(v)} tensors; expected {len(self.names)}, one per segment.")
            segments, unpack = self._shaped(list(v))
            return segments, lambda out: type(v)(unpack(out))
        raise VectorError(
            f"{kind_of(v)} is no vector; expected a tensor, an array, a list of tensors or a dict of them."
        )

    def _from_numpy(self, v: np.ndarray) -> Tensor:
        if v.dtype.kind not in "fiu":
            raise VectorError(f"the vector is an array of {v.dtype}; expected real numbers.")
        native = v.astype(np.float64 if v.itemsize > 8 else v.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.ascontiguousarray(native)).to(dtype=self.dtype, device=self.device)

    def _shaped(self, segments: list[Tensor]) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
        """Segments of their own shapes, all with one more axis of k columns or none with."""
        several = len(segments) > 0 and segments[0].ndim == len(self.shapes[0]) + 1
        columns = segments[0].shape[-1:] if several else torch.Size()
        if columns == (0,):
            raise VectorError("the vector has no columns to multiply with.")
        dtypes = self.dtypes or (self.dtype,) * len(self.names)
        for name, shape, segment, dtype in zip(self.names, self.shapes, segments, dtypes, strict=True):
            self._check(f"'{name}'", segment, dtype)
            if segment.shape != torch.Size(shape) + columns:
                raise VectorError(f"'{name}' has shape {tuple(segment.shape)}; expected {(*shape, *columns)}.")
        sizes, segments = self.sizes, [segment.detach() for segment in segments]
        rows = [(_rows(p) if several else p.reshape(1, n)).to(self.dtype) for p, n in zip(segments, sizes, strict=True)]

        return rows, lambda out: self.shaped(out, several)

    def _check(self, what: str, x: Tensor, dtype: torch.dtype) -> None:
        if x.dtype != dtype or x.device != self.device:
            raise VectorError(f"{what} is {x.dtype} on {x.device}; expected {dtype} on {self.device}: use .to().")
        if x.requires_grad:
            warnings.warn(_DETACHED, stacklevel=2)


def to_numpy(x: Tensor) -> np.ndarray:
    """As an array; NumPy has no bfloat16, and SciPy no float16."""
    found: np.ndarray = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).cpu().numpy()
    return found


def _rows(columns: Tensor) -> Tensor:
    """(…, k) -> (k, n): no copy where rows lie in memory one behind the other, as those of our own results do."""
    turned = columns.movedim(-1, 0)
    if turned.is_contiguous():
        return turned.reshape(len(turned), -1)
    columns = columns.reshape(-1, len(turned))
    # Pieces that stay in a core's cache: one strided copy would read everything once a row.
    rows = columns.new_empty(columns.shape[::-1])
    step = max(1, _PIECE // max(1, len(rows)))
    for target, piece in zip(rows.split(step, dim=1), columns.split(step), strict=True):
        target.copy_(piece.T)
    return rows


def _flat(arena: Arena, segments: list[Tensor], single: bool) -> Tensor:
    count, size = len(segments[0]), sum(segment.shape[1] for segment in segments)
    rows = torch.cat(segments, dim=1, out=arena.empty(segments[0], count, size)) if len(segments) > 1 else segments[0]
    return rows[0] if single else rows.T


class OverForm:
    """What is multiplied with vectors of a ``form``."""

    form: VectorForm

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of flat vectors: the widest of the segments'."""
        return self.form.dtype

    @property
    def device(self) -> torch.device:
        """Where vectors lie."""
        return self.form.device

    @property
    def _budget(self) -> Budget:
        """What matrices may take that are made of it."""
        return Budget(None, self.device)

    @property
    def _together(self) -> Ranks | None:
        """The ranks that make its products, if there are several."""
        return None

    def _check_room(self, need: int, what: str, instead: str) -> None:
        """Raise :class:`MemoryBudgetError`, on all ranks, where what takes ``need`` bytes has no room on one."""
        with together(self._together, what):
            self._budget.check(need, what, instead)
