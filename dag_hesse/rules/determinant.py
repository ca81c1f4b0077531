"""Determinants and their logarithms, exact at any matrix (a singular one has a determinant with two derivatives)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node
from dag_hesse.kernels.arena import added
from dag_hesse.rules.base import Call, Linearized, Pairs, Residual, Rule, Samples, no_pairs, own_pair
from dag_hesse.rules.single import Constant, Single


def _products_of_others(s: Tensor) -> Tensor:
    """Π_{k≠i} s_k along the last axis, without a division."""
    one = torch.ones_like(s[..., :1])
    before = torch.cat([one, s[..., :-1]], -1).cumprod(-1)
    after = torch.cat([one, s[..., 1:].flip(-1)], -1).cumprod(-1).flip(-1)
    return before * after


@final
class _Determinant(Single):
    """det(U S Vᵀ) = δ Π s with δ = det(U) det(V). In the axes of U and V, X = Uᵀ Ȧ V, its derivatives are

    δ Σ_i g_i X_ii with g_i = Π_{k≠i} s_k, and δ Σ_ij P_ij (X_ii Y_jj − X_ij Y_ji) with P_ij = Π_{k≠i,j} s_k.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        u, s, vh = torch.linalg.svd(call.values[0])
        sign = torch.linalg.det(u) * torch.linalg.det(vh)
        self.u, self.vh, self.sign, self.s = u * sign[..., None, None], vh, sign, s
        self.first = (self.u * _products_of_others(s).unsqueeze(-2)) @ vh

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        return (self.first * x).sum((-2, -1)), x

    def transpose(self, g: Tensor) -> Tensor:
        return self.first * g[..., None, None]

    def keep(self, lam: Tensor, mu: Tensor | None) -> None:
        size = self.s.shape[-1]
        eye = torch.eye(size, dtype=torch.bool, device=self.s.device)
        others = _products_of_others(torch.where(eye, 1.0, self.s.unsqueeze(-2)))  # row i: s_i taken for 1
        self.pairs = others.masked_fill(eye, 0.0) * (self.sign * lam)[..., None, None]

    def second(self, residual: Residual, into: Tensor | None) -> Tensor:
        turned = self.u.mT @ residual @ self.vh.mT
        own = (self.pairs @ turned.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).squeeze(-1)
        return added(self.u @ (torch.diag_embed(own) - self.pairs * turned.mT) @ self.vh, into)


@final
class _LogDeterminant(Single):
    """log |det A|: ⟨A⁻ᵀ, Ȧ⟩, and −⟨A⁻ᵀ Ḃᵀ A⁻ᵀ, Ȧ⟩."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.turned = torch.linalg.inv_ex(call.values[0])[0].mT

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        return (self.turned * x).sum((-2, -1)), x

    def transpose(self, g: Tensor) -> Tensor:
        return self.turned * g[..., None, None]

    def keep(self, lam: Tensor, mu: Tensor | None) -> None:
        self.lam = lam

    def second(self, residual: Residual, into: Tensor | None) -> Tensor:
        return added((self.turned @ residual.mT @ self.turned).mul_(-self.lam[..., None, None]), into)


def _slogdet(call: Call) -> Linearized:
    return _LogDeterminant(call) if call.node.output == 1 else Constant(call)


def _slogdet_pairs(node: Node) -> Pairs:
    return own_pair(node) if node.output == 1 else no_pairs(node)


TABLE: dict[str, Rule] = {
    "aten._linalg_det.default": Rule(Kind.ROWWISE, _Determinant, own_pair, Samples.UNKNOWN),
    "aten._linalg_slogdet.default": Rule(Kind.ROWWISE, _slogdet, _slogdet_pairs, Samples.UNKNOWN),
}

__all__ = ["TABLE"]
