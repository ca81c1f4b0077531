"""Softmax, log-sum-exp and standardization: nonlinear along some axes, independent along the others."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind
from dag_hesse.rules.base import Call, Linearized, Rule, Tangents, own_pair
from dag_hesse.rules.structural import axes


def _trailing(call: Call, dims: object) -> list[int]:
    """Axes counted from the end, so that they hold with a probe axis in front."""
    ndim = len(call.shape())
    return [d - ndim for d in axes(dims, ndim)] if ndim else []


@final
class _Softmax(Linearized):
    """y = softmax(x): ẏ = y(ẋ − ⟨y,ẋ⟩); symmetric, so the transpose is the same map."""

    def __init__(self, call: Call) -> None:
        self.y, self.dim = call.out, _trailing(call, call.argument(1))

    def _center(self, x: Tensor) -> Tensor:
        return x - (self.y * x).sum(self.dim, keepdim=True)

    def jvp(self, tangents: Tangents) -> Tensor:
        return self.y * self._center(tangents[0])

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return self.jvp({0: cotangent})

    def curve(self, lam: Tensor) -> None:
        self.lam, self.centered = lam, self._center(lam)

    def second(self, tangents: Tangents, slot: int) -> Tensor:
        ydot = self.jvp(tangents)
        return ydot * self.centered - self.y * (ydot * self.lam).sum(self.dim, keepdim=True)


@final
class _LogSoftmax(Linearized):
    """y = x − lse(x): ẏ = ẋ − ⟨p,ẋ⟩ with p = softmax(x)."""

    def __init__(self, call: Call) -> None:
        self.p, self.dim = call.out.exp(), _trailing(call, call.argument(1))

    def jvp(self, tangents: Tangents) -> Tensor:
        return tangents[0] - (self.p * tangents[0]).sum(self.dim, keepdim=True)

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return cotangent - self.p * cotangent.sum(self.dim, keepdim=True)

    def curve(self, lam: Tensor) -> None:
        self.weighted = self.p * lam.sum(self.dim, keepdim=True)

    def second(self, tangents: Tangents, slot: int) -> Tensor:
        return -self.weighted * self.jvp(tangents)


@final
class _LogSumExp(Linearized):
    """y = log Σ exp x: ẏ = ⟨p,ẋ⟩."""

    def __init__(self, call: Call) -> None:
        x = call.values[0]
        self.dims = _trailing(call, call.argument(1, "dim"))
        self.p = torch.exp(x - torch.logsumexp(x, self.dims, keepdim=True)) if x.ndim else torch.ones_like(x)
        self.keep = [1 if k - x.ndim in self.dims else n for k, n in enumerate(x.shape)]
        self.out_shape = call.out.shape

    def jvp(self, tangents: Tangents) -> Tensor:
        total = self._inner(tangents[0])
        return total.reshape(total.shape[0], *self.out_shape)

    def _inner(self, x: Tensor) -> Tensor:
        return (self.p * x).sum(self.dims, keepdim=True) if self.dims else self.p * x

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return self.p * cotangent.reshape(cotangent.shape[0], *self.keep)

    def curve(self, lam: Tensor) -> None:
        self.weighted = self.p * lam.reshape(self.keep)

    def second(self, tangents: Tangents, slot: int) -> Tensor:
        return self.weighted * (tangents[0] - self._inner(tangents[0]))


@final
class _Standardize(Linearized):
    """y = (x − m)·r, r = (mean((x − m)²) + eps)^-½ (m = 0 without centering); symmetric Jacobian r(P − y⟨y,·⟩)."""

    def __init__(self, call: Call) -> None:
        x, dims, eps, self.center = call.values[0], call.argument(1), call.argument(2), call.argument(3)
        self.dims, self.y = _trailing(call, dims), call.out
        if self.center:
            x = x - x.mean(dims, keepdim=True)
        self.r = (x * x).mean(dims, keepdim=True).add(eps).rsqrt()

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True)

    def _project(self, x: Tensor) -> Tensor:
        centered = x - self._mean(x) if self.center else x
        return centered - self.y * self._mean(self.y * x)

    def jvp(self, tangents: Tangents) -> Tensor:
        return self.r * self._project(tangents[0])

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return self.jvp({0: cotangent})

    def curve(self, lam: Tensor) -> None:
        self.lam, self.projected, self.overlap = lam, self._project(lam), self._mean(self.y * lam)

    def second(self, tangents: Tangents, slot: int) -> Tensor:
        x = tangents[0]
        ydot = self.jvp(tangents)
        rdot = -self.r * self.r * self._mean(self.y * x)
        turned = ydot * self.overlap + self.y * self._mean(ydot * self.lam)
        return rdot * self.projected - self.r * turned


def _rowwise(linearize: type[Linearized]) -> Rule:
    return Rule(Kind.ROWWISE, linearize, own_pair)  # type: ignore[arg-type]


TABLE: dict[str, Rule] = {
    "aten._softmax.default": _rowwise(_Softmax),
    "aten._safe_softmax.default": _rowwise(_Softmax),
    "aten._log_softmax.default": _rowwise(_LogSoftmax),
    "aten.logsumexp.default": _rowwise(_LogSumExp),
    "dag_hesse.standardize.default": _rowwise(_Standardize),
}

__all__ = ["TABLE"]
