"""Determinants and their logarithms, exact at any matrix (a singular one has a determinant with two derivatives)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node
from dag_hesse.rules.base import Call, Linearized, Note, Pairs, Rule, Tangents, added, no_pairs, own_pair


def _products_of_others(s: Tensor) -> Tensor:
    """Π_{k≠i} s_k along the last axis, without a division."""
    one = torch.ones_like(s[..., :1])
    before = torch.cat([one, s[..., :-1]], -1).cumprod(-1)
    after = torch.cat([one, s[..., 1:].flip(-1)], -1).cumprod(-1).flip(-1)
    return before * after


@final
class _Determinant(Linearized):
    """det(U S Vᵀ) = δ Π s with δ = det(U) det(V). In the axes of U and V, X = Uᵀ Ȧ V, its derivatives are

    δ Σ_i g_i X_ii with g_i = Π_{k≠i} s_k, and δ Σ_ij P_ij (X_ii Y_jj − X_ij Y_ji) with P_ij = Π_{k≠i,j} s_k.
    """

    def __init__(self, call: Call) -> None:
        u, s, vh = torch.linalg.svd(call.values[0])
        sign = torch.linalg.det(u) * torch.linalg.det(vh)
        self.u, self.vh, self.sign, self.s = u * sign[..., None, None], vh, sign, s
        self.first = (self.u * _products_of_others(s).unsqueeze(-2)) @ vh
        self.lam: Tensor | None = None

    def jvp(self, tangents: Tangents) -> Tensor:
        return (self.first * tangents[0]).sum((-2, -1))

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return self.first * cotangent[..., None, None]

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        size = self.s.shape[-1]
        eye = torch.eye(size, dtype=torch.bool, device=self.s.device)
        others = _products_of_others(torch.where(eye, 1.0, self.s.unsqueeze(-2)))  # row i: s_i taken for 1
        self.pairs = others.masked_fill(eye, 0.0) * (self.sign * lam)[..., None, None]
        self.lam = lam

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        if self.lam is None or not tangents:
            return None
        turned = self.u.mT @ tangents[0] @ self.vh.mT
        own = (self.pairs @ turned.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).squeeze(-1)
        return added(self.u @ (torch.diag_embed(own) - self.pairs * turned.mT) @ self.vh, into)


@final
class _LogDeterminant(Linearized):
    """log |det A|: ⟨A⁻ᵀ, Ȧ⟩, and −⟨A⁻ᵀ Ḃᵀ A⁻ᵀ, Ȧ⟩."""

    def __init__(self, call: Call) -> None:
        self.turned = torch.linalg.inv_ex(call.values[0])[0].mT
        self.lam: Tensor | None = None

    def jvp(self, tangents: Tangents) -> Tensor:
        return (self.turned * tangents[0]).sum((-2, -1))

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return self.turned * cotangent[..., None, None]

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        self.lam = lam

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        if self.lam is None or not tangents:
            return None
        bent = self.turned @ tangents[0].mT @ self.turned
        return added(bent.mul_(-self.lam[..., None, None]), into)


@final
class _Constant(Linearized):
    """A sign: constant wherever it has a derivative."""

    def __init__(self, call: Call) -> None:
        self.shape, self.out_shape = call.shape(), call.out.shape

    def jvp(self, tangents: Tangents) -> Tensor:
        return tangents[0].new_zeros(len(tangents[0]), *self.out_shape)

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return cotangent.new_zeros(len(cotangent), *self.shape)


def _slogdet(call: Call) -> Linearized:
    return _LogDeterminant(call) if call.node.output == 1 else _Constant(call)


def _slogdet_pairs(node: Node) -> Pairs:
    return own_pair(node) if node.output == 1 else no_pairs(node)


TABLE: dict[str, Rule] = {
    "aten._linalg_det.default": Rule(Kind.ROWWISE, _Determinant, own_pair),
    "aten._linalg_slogdet.default": Rule(Kind.ROWWISE, _slogdet, _slogdet_pairs),
}

__all__ = ["TABLE"]
