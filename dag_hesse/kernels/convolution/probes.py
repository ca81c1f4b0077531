"""How probes go through the products of one convolution: side by side, or one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, added
from dag_hesse.kernels.convolution.sizes import Geometry, crop

Single = Callable[[Arena, Geometry, Tensor, Tensor], Tensor]


def fold(x: Tensor) -> Tensor:
    """(probes, batch, …) -> (probes·batch, …)."""
    return x.reshape(-1, *x.shape[2:])


def beside(x: Tensor) -> Tensor:
    """(probes, n, c, …) -> (n, probes·c, …): probes side by side along the channels; channels last where they were."""
    if len(x) == 1:
        return x[0]
    last = x.movedim(2, -1)
    if last.is_contiguous():
        return last.movedim(0, -2).flatten(-2).movedim(-1, 1)
    return x.transpose(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def apart(x: Tensor, probes: int) -> Tensor:
    """(n, probes·c, …) -> (probes, n, c, …): the inverse of :func:`beside`."""
    return x.unflatten(1, (probes, -1)).transpose(0, 1)


def uncrop(arena: Arena, geo: Geometry, w: Tensor) -> Tensor:
    if geo.kernel == geo.weight[2:]:
        return w
    full = arena.empty(w, *w.shape[: -len(geo.kernel_taps)], *geo.weight[2:]).zero_()
    full[geo.reached_taps] = w
    return full


def with_weight(
    arena: Arena,
    geo: Geometry,
    x: Tensor,
    w: Tensor,
    into: Tensor | None,
    run: Single,
    aside: Callable[[Tensor], Tensor],
) -> Tensor:
    """``run(arena, geometry, activation, weight)`` for all rows; ``aside`` lays their weights along what it returns."""
    probes, w = max(len(x), len(w)), crop(geo, w)
    if len(w) == 1:
        y = run(arena, geo, fold(x), w[0])
        return added(y.reshape(probes, -1, *y.shape[1:]), into)
    if geo.folds and len(x) == 1:
        return added(apart(run(arena, geo, x[0], aside(w)), probes), into)
    return added(torch.stack([run(arena, geo, x[min(k, len(x) - 1)], w[k]) for k in range(probes)]), into)


def add(arena: Arena, geo: Geometry, w: Tensor, into: Tensor | None) -> Tensor:
    if into is None:
        return uncrop(arena, geo, w)
    crop(geo, into).add_(w)
    return into


__all__ = ["Single", "add", "apart", "beside", "fold", "with_weight"]
