"""Softmax, log-sum-exp and standardization: nonlinear along some axes, independent along the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref, execute
from dag_hesse.ir.ops import normalized_shape
from dag_hesse.kernels.arena import Arena, added, has_values
from dag_hesse.kernels.rowwise import (
    Adjoint,
    Means,
    log_softmax_adjoints,
    log_softmax_tangent,
    softmax_adjoints,
    softmax_tangent,
    standardize_adjoints,
    standardize_tangent,
)
from dag_hesse.rules.base import Call, Linearized, Residual, Rule, Run, Samples, as_it_is, own_pair
from dag_hesse.rules.single import Constant, Single
from dag_hesse.rules.structural import axes

aten = torch.ops.aten


def _trailing(call: Call, dims: object) -> list[int]:
    """Axes counted from the end, so that they hold with a probe axis in front."""
    ndim = len(call.shape())
    return [d - ndim for d in axes(dims, ndim)] if ndim else []


@final
class _Softmax(Single):
    """y = softmax(x): ẏ = y w with w = ẋ − ⟨y,ẋ⟩; symmetric, so the transpose μ of λ is the same map of it.

    The second-order term is w μ − y ⟨w,μ⟩.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.y, self.dim = call.value, _trailing(call, call.argument(1))

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        return softmax_tangent(self.arena, self.y, x, self.dim)

    def transpose(self, g: Tensor) -> Tensor:
        return softmax_adjoints(self.arena, self.y, Adjoint(g), self.dim)

    def keep(self, lam: Tensor, mu: Tensor | None) -> None:
        self.mu = self.transpose(lam[None])[0] if mu is None else mu

    def adjoint(self, abar: Tensor | None, residual: Residual, rows: slice, into: Tensor | None) -> Tensor:
        return softmax_adjoints(self.arena, self.y, Adjoint(abar, (self.mu, residual), rows, into), self.dim)


@final
class _LogSoftmax(Single):
    """y = x − lse(x): ẏ = ẋ − ⟨p,ẋ⟩ with p = softmax(x). The second-order term is −Σλ p ẏ."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.p, self.dim = call.value.exp(), _trailing(call, call.argument(1))

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        moved = log_softmax_tangent(self.arena, self.p, x, self.dim)
        return moved, moved

    def transpose(self, g: Tensor) -> Tensor:
        return log_softmax_adjoints(self.arena, self.p, Adjoint(g), self.dim)

    def keep(self, lam: Tensor, mu: Tensor | None) -> None:
        self.total = lam.sum(self.dim, keepdim=True)

    def adjoint(self, abar: Tensor | None, residual: Residual, rows: slice, into: Tensor | None) -> Tensor:
        return log_softmax_adjoints(self.arena, self.p, Adjoint(abar, (self.total, residual), rows, into), self.dim)


@final
class _LogSumExp(Single):
    """y = log Σ exp x: ẏ = ⟨p,ẋ⟩. The second-order term is μ(ẋ − ẏ), where μ = λ p is the transpose of λ."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        x = call.values[0]
        self.dims = _trailing(call, call.argument(1, "dim"))
        total = torch.logsumexp(x, self.dims, keepdim=True) if x.ndim else x
        self.p = torch.exp(x - total).masked_fill_(total == -torch.inf, 0.0)  # autograd passes nothing on to such rows
        self.kept_shape = [1 if k - x.ndim in self.dims else n for k, n in enumerate(x.shape)]
        self.out_shape = call.value.shape

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        moved = (self.p * x).sum(self.dims, keepdim=True) if self.dims else self.p * x
        return moved.reshape(len(x), *self.out_shape), x - moved

    def transpose(self, g: Tensor) -> Tensor:
        return self.p * g.reshape(len(g), *self.kept_shape)

    def keep(self, lam: Tensor, mu: Tensor | None) -> None:
        self.mu = self.transpose(lam[None])[0] if mu is None else mu

    def second(self, residual: Residual, into: Tensor | None) -> Tensor:
        return added(residual * self.mu, into)


@final
class _Standardize(Single):
    """y = (x − m)·r, r = (mean((x − m)²) + eps)^-½ (m = 0 without centering); symmetric Jacobian r(P − y⟨y,·⟩).

    The second-order term is −r(⟨y,ẋ⟩ μ + ⟨y,λ⟩ ẏ + ⟨μ,ẋ⟩ y), where μ is the transpose of λ and ⟨·,·⟩ a mean.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        x, dims, eps, center = call.values[0], call.argument(1), call.argument(2), call.argument(3)
        self.y, inner = call.value, normalized_shape(x.shape, dims, center)
        self.how = Means(_trailing(call, dims), center, inner)
        if inner is not None:
            self.r = aten.native_layer_norm(x, inner, None, None, eps)[2].to(x.dtype)
        else:
            off = x - x.mean(dims, keepdim=True) if center else x
            self.r = (off * off).mean(dims, keepdim=True).add(eps).rsqrt()

    def transpose(self, g: Tensor) -> Tensor:
        return standardize_adjoints(self.arena, self.y, self.r, Adjoint(g), self.how)

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        mu = self.mu if self.bound else None
        found = standardize_tangent(self.arena, self.y, self.r, mu, x, self.how)
        return found[0], found

    def keep(self, lam: Tensor, mu: Tensor | None) -> None:
        self.mu = self.transpose(lam[None])[0] if mu is None else mu
        self.overlap = -self.r * (self.y * lam).mean(self.how.dims, keepdim=True)

    def adjoint(self, abar: Tensor | None, residual: Residual, rows: slice, into: Tensor | None) -> Tensor:
        second = (self.mu, self.overlap, *residual)
        return standardize_adjoints(self.arena, self.y, self.r, Adjoint(abar, second, rows, into), self.how)


def _where_it_lies(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    """A softmax where its input lies: one along an axis that is innermost in memory comes out in that layout."""
    x, dim = inputs[0], node.args[1]
    if x.ndim < 2 or x.stride(dim) != 1 or not isinstance(node.args[0], Ref):
        return execute(node, inputs)
    target: Any = node.target
    return target(x.movedim(dim, -1), -1, *node.args[2:], **node.kwargs).movedim(-1, dim)


def _safely(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    """A softmax, 0 in rows of −∞; the op itself looks at every element three times for such rows."""
    x, dim = inputs[0], node.args[1]
    if x.device.type != "cpu" or not has_values(x) or node.kwargs or len(node.args) > 2 or x.numel() == 0:
        return execute(node, inputs)
    y, masked = torch.softmax(x, dim), x.amax(dim, keepdim=True) == -torch.inf
    return y.masked_fill_(masked, 0.0) if bool(masked.any()) else y


def _softmax(call: Call) -> Linearized:
    return _Softmax(call) if call.shape() else Constant(call)


def _log_softmax(call: Call) -> Linearized:
    return _LogSoftmax(call) if call.shape() else Constant(call)


def _rowwise(
    linearize: Callable[[Call], Linearized], samples: Samples, run: Run = as_it_is, shifted: int | None = None
) -> Rule:
    return Rule(Kind.ROWWISE, linearize, own_pair, samples, run=run, shifted=shifted)


TABLE: dict[str, Rule] = {
    "aten._softmax.default": _rowwise(_softmax, Samples.SEQUENCE, _where_it_lies, shifted=1),
    "aten._safe_softmax.default": _rowwise(_softmax, Samples.SEQUENCE, _safely, shifted=1),
    "aten._log_softmax.default": _rowwise(_log_softmax, Samples.SEQUENCE, _where_it_lies, shifted=1),
    "aten.logsumexp.default": _rowwise(_LogSumExp, Samples.REDUCTION),
    "dag_hesse.standardize.default": _rowwise(_Standardize, Samples.SEQUENCE),
}

__all__ = ["TABLE"]
