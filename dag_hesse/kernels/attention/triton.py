"""By Triton kernels in tiles: nothing of the size of the scores is written, and keys that a mask hides are not visited.

The rows' log-sum-exp is found first, in a pass of its own; then weights are exact in every tile, in whatever order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.attention.forms import DOTS, MATRICES, RESULTS, TILES, WIDEST, Form, Tile, operands
from dag_hesse.kernels.attention.operands import Adjoint, Bound, Operands
from dag_hesse.kernels.attention.tiles import compiled
from dag_hesse.kernels.generated import DTYPES, available, computed, elsewhere, interpreted, launch_grid

ALL = slice(None)
HALF = (torch.float16, torch.bfloat16)
_FAR = 1 << 24  # elements between rows, from which places inside a tile may take more than 32 bits
_LEAST = 16  # what a product of tiles takes, at least


def _refuse(a: Operands, given: Sequence[Tensor]) -> str | None:
    """Why attention of these operands, with tangents and adjoints, is not computed here."""
    if reason := elsewhere(a.q):
        return reason
    if a.q.dtype not in (DTYPES if interpreted() else HALF):
        return f"products of {a.q.dtype} in tiles do not fit into registers"
    if any(x.dtype != a.q.dtype for x in (a.k, a.v, *given)):
        return "operands differ in dtype"
    if not a.q.numel() or not a.k.numel() or not a.v.numel():
        return "there are no queries or no keys"
    sides = [x for x in (a.bias, a.hidden, a.drop) if x is not None]
    if any(max(x.stride()[-2:]) >= _FAR for x in (a.q, a.k, a.v, *given, *sides)):
        return "rows lie too far apart"
    if max(a.q.shape[2], a.v.shape[2]) > WIDEST:
        return f"heads are wider than {WIDEST}"
    return available()


class _Call:
    """Operands with the log-sum-exp of their scores, and what kernels of them have in common."""

    def __init__(self, a: Operands) -> None:
        self.a, self.keys = a, a.k.shape[2]
        self.width = 64 if max(a.q.shape[2], a.v.shape[2]) <= 64 else WIDEST
        self.tiles = TILES[_generation(a.q.device)][self.width]
        self.sides = {n: x for n, x in (("bias", a.bias), ("hidden", a.hidden), ("drop", a.drop)) if x is not None}
        self.vectors: dict[str, Tensor] = {"lse": a.q.new_empty(a.q.shape[:2], dtype=self.accumulated)}
        self.given: dict[str, Tensor] = {"q": a.q, "k": a.k.mT, "v": a.v}
        self.launch(self.form("rows"), 1)

    @property
    def accumulated(self) -> torch.dtype:
        return torch.float64 if self.a.q.dtype is torch.float64 else torch.float32

    def form(self, kind: str, tangents: Sequence[int] = (), first: bool = False, second: bool = False,
             wants: Sequence[int] = (), into: Sequence[int] = ()) -> Form:  # fmt: skip
        """A kernel of this call."""
        a, names = self.a, tuple(n for n in self.sides if n != "drop" or kind != "rows")
        return Form(kind, a.scale, a.factor, names, a.spans is not None, tuple(tangents), first, second, tuple(wants),
                    tuple(into), computed(a.q.dtype), interpreted())  # fmt: skip

    def launch(self, form: Form, probes: int) -> None:
        """Run a kernel on ``probes`` rows of what was ``given``."""
        tile, (count, queries, width), values = self.tiles[form.kind], self.a.q.shape, self.a.v.shape[2]
        matrices, vectors = operands(form)
        bounds = (
            [] if self.a.spans is None else _bounds(self.a.spans, self.keys, tile, form.kind == "keys", self.a.q.device)
        )
        sides = [self.sides[n] for n in form.sides]
        strides = [s for n in matrices for s in _strides(n, self.given[n])]
        strides += [0 if size == 1 else s for x in sides for s, size in zip(x.stride(), x.shape, strict=True)]
        tiles = -(-self.keys // tile.keys) if form.kind == "keys" else -(-queries // tile.queries)
        launch_grid(
            compiled(form), (tiles * count, probes), self.a.q.device,
            *(self.given[n] for n in matrices), *(self.vectors[n] for n in vectors), *sides, *bounds, *strides,
            count, self.a.lead[1], queries, self.keys, width, values,
            M=tile.queries, N=tile.keys, D=_padded(width), E=_padded(values), num_warps=tile.warps, num_stages=1,
        )  # fmt: skip


def _generation(device: torch.device) -> int:
    return 9 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else 8


def _padded(width: int) -> int:
    return max(_LEAST, 1 << (width - 1).bit_length())


def _strides(name: str, x: Tensor) -> tuple[int, ...]:
    assert x.ndim == len(MATRICES[name][0])
    return x.stride()


@lru_cache(maxsize=64)
def _bounds(
    spans: tuple[tuple[int, int], ...], keys: int, tile: Tile, of_keys: bool, device: torch.device
) -> list[Tensor]:
    """First and last of the keys that a tile of queries meets, or of the queries that meet a tile of keys."""
    first, last = np.array(spans).T
    size, step = (tile.keys, tile.queries) if of_keys else (tile.queries, tile.keys)
    found = []
    for start in range(0, keys if of_keys else len(spans), size):
        if of_keys:
            met = np.flatnonzero((first < start + size) & (last >= start) & (last >= first))
            low, high = (met[0], met[-1] + 1) if len(met) else (0, 0)
        else:
            low, high = first[start : start + size].min(), last[start : start + size].max() + 1
        found.append((low // step * step, max(high, 0)))
    return [x.contiguous() for x in torch.tensor(found, dtype=torch.int32, device=device).unbind(1)]


def refuse_tangent(a: Operands, out: Tensor, tangents: Mapping[int, Tensor]) -> str | None:
    return _refuse(a, [out, *tangents.values()])


def tangent(arena: Arena, a: Operands, out: Tensor, tangents: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    call, probes = _Call(a), len(next(iter(tangents.values())))
    moved = arena.in_order(a.q, (probes, *out.shape), out)
    call.given |= {"out": out, "moved": moved, **_moving(tangents)}
    call.vectors["mu"] = mu = arena.empty(a.q, probes, *a.q.shape[:2], 1)
    call.launch(call.form("tangent", sorted(tangents)), probes)
    return moved, mu


def _moving(tangents: Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {DOTS[slot]: x.mT if slot == 1 else x for slot, x in tangents.items()}


def refuse_adjoints(a: Operands, out: Tensor, bound: Bound | None, of: Adjoint) -> str | None:
    given = [x for x in (bound and bound.lam, of.abar) if x is not None]
    return _refuse(a, [out, *given, *(of.residual.tangents.values() if of.residual else ()), *of.into.values()])


def adjoints(arena: Arena, a: Operands, out: Tensor, bound: Bound | None, of: Adjoint) -> dict[int, Tensor]:
    call, count, found = _Call(a), of.height, of.places(arena, a)
    abar, residual, rows, slots, into = of
    call.given["out"] = out
    tangents: Mapping[int, Tensor] = {}
    if residual is not None and bound is not None:
        tangents = residual.tangents
        call.given |= {"lam": bound.lam, **_moving(tangents)}
        numbers = {"delta": bound.delta, "mu": residual.mu, "delta_dot": residual.delta}
        call.vectors |= {name: x.contiguous() for name, x in numbers.items()}
    start, stop, _ = rows.indices(count) if tangents else (count, count, 1)
    for part, second in ((slice(0, start), False), (slice(start, stop), True), (slice(stop, count), False)):
        if part.stop > part.start:
            call.given |= {} if abar is None else {"abar": abar[part]}
            call.given |= {RESULTS[s]: x[part].mT if s == 1 else x[part] for s, x in found.items()}
            _pulled(call, part.stop - part.start, sorted(tangents), abar is not None, second, slots, into)
    return found


def _pulled(
    call: _Call,
    count: int,
    tangents: Sequence[int],
    first: bool,
    second: bool,
    slots: Sequence[int],
    into: Mapping[int, Tensor],
) -> None:
    """Adjoints of some rows: of q by tiles of queries, of k and v by tiles of keys, together where they have room."""
    behind = [slot for slot in (1, 2) if slot in slots]
    groups = [behind] if call.width == 64 else [[slot] for slot in behind]
    for kind, wants in (("queries", [0] if 0 in slots else []), *(("keys", group) for group in groups)):
        if wants:
            own = [slot for slot in wants if slot in into]
            call.launch(call.form(kind, tangents if second else (), first, second, wants, own), count)
