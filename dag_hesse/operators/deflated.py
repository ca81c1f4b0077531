"""Trace and diagonal by random signs after deflation: a sketch of the range is exact, signs see what is left of it.

Hutch++ (Meyer, Musco, Musco, Woodruff, 2021) takes other signs for the rest than for the sketch. XTrace and XDiag
(Epperly, Tropp, Webber, 2024) use each vector for both: it is left out of the sketch as it is tried. All are unbiased.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dag_hesse.operators.estimates import Estimate, Square, computed_in, signs

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST = {"hutch++": 12, "xtrace": 12, "xdiag": 12}  # products that a standard error needs: 4, 6 and 6 samples
_FLAT = 1e-8  # the least squared sine between two directions of a sketch
_TRIED = 128  # vectors that are left out to find XTrace's error
_COPIES = 12  # of the sketch, while its terms are put together


def sketch_bytes(operator: Square, count: int) -> int:
    """What a sketch by ``count`` products takes."""
    return _COPIES * operator.shape[0] * (count // 2) * operator.dtype.itemsize


def _images(operator: Square, columns: Tensor) -> Tensor:
    """H times columns (n, k), a chunk at a time."""
    found = []
    for piece in columns.T.split(operator.chunk):
        segments = list(piece.to(operator.dtype).contiguous().split(operator.form.sizes, dim=1))
        found.append(torch.cat(operator._products(segments), dim=1).to(columns.dtype))
    return torch.cat(found).T


def _signs(operator: Square, count: int, seed: int) -> Tensor:
    rows = [torch.cat(each, dim=1) for each in signs(operator, count, seed)]
    return torch.cat(rows).T.to(computed_in(operator.dtype))


def _answer(values: Tensor) -> Estimate:
    """Mean and standard error of samples, the last axis."""
    return Estimate(values.mean(-1), values.std(-1) / sqrt(values.shape[-1]))


def hutch_pp(operator: Square, count: int, seed: int) -> Estimate:
    """tr(QᵀHQ) + the mean of gᵀ(I − QQᵀ)H(I − QQᵀ)g, with a third of the products for the sketch and a third for Q."""
    k = count // 3
    drawn = _signs(operator, count - k, seed)
    q, _ = torch.linalg.qr(_images(operator, drawn[:, :k]))
    rest = drawn[:, k:] - q @ (q.T @ drawn[:, k:])
    kept = (q * _images(operator, q)).sum()
    found = _answer((rest * _images(operator, rest)).sum(0))
    return Estimate(kept + found.value, found.stderr)


class _LeftOut:
    """A sketch Y = HΩ = QR and Z = HQ. Without its i-th vector its basis is Q − Q s_i s_iᵀ: s_i is a column of ``s``.

    Without the j-th as well it lacks t_ij too, what is left of s_j beside s_i. ``cosines``: s_iᵀs_j. ``scale``:
    s_iᵀR e_i, what the i-th vector adds to the sketch. Small matrices are float64.
    """

    def __init__(self, operator: Square, count: int, seed: int) -> None:
        self.omega = _signs(operator, count // 2, seed)
        self.y = _images(operator, self.omega)
        self.q, r = torch.linalg.qr(self.y)
        self.z = _images(operator, self.q)
        self.r = r.double()
        wide, least = self.r.clone(), torch.finfo(r.dtype).eps * self.r.norm() + torch.finfo(torch.float64).tiny ** 0.5
        wide.diagonal().copy_(torch.where(wide.diagonal().abs() < least, least, wide.diagonal()))  # of a lower rank
        eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        inverse = torch.linalg.solve_triangular(wide.T, eye, upper=False)
        self.s = inverse / inverse.norm(dim=0)
        self.scale = (self.s * self.r).sum(0)
        self.cosines = self.s.T @ self.s

    @property
    def sines(self) -> Tensor:
        """1 − (s_iᵀs_j)², ‖s_j − (s_iᵀs_j) s_i‖², and not less than what rounding leaves of it."""
        return (1 - self.cosines.square()).clamp_min(_FLAT)


def _jackknifed(mean: Tensor, without: Tensor) -> Estimate:
    """An estimate, and its error by what it is without each vector (last axis).

    On average that is not too small (Efron, Stein, 1981), but up to three times too large where eigenvalues decay fast,
    as one vector less is worse then. The spread of the terms would be too small: they share their sketch.
    """
    k = without.shape[-1]
    spread = (without - without.mean(-1, keepdim=True)).square().mean(-1)
    return Estimate(mean, ((k - 1) * spread).sqrt().to(mean.dtype))


def xtrace(operator: Square, count: int, seed: int) -> Estimate:
    """The mean over i of tr(Q_iᵀHQ_i) + ω_iᵀ(I − Q_iQ_iᵀ)H(I − Q_iQ_iᵀ)ω_i."""
    found = _LeftOut(operator, count, seed)
    small, w, s = (found.q.T @ found.z).double(), (found.q.T @ found.omega).double(), found.s
    u = w - s * (s * w).sum(0)  # coordinates of ω_i in Q_i
    rest, image = (each - q @ u.to(q.dtype) for each, q in ((found.omega, found.q), (found.y, found.z)))
    kept = small.trace() - (s * (small @ s)).sum(0)
    value = (kept + (rest * image).sum(0).double()).mean().to(found.q.dtype)
    own = (found.omega * found.y).sum(0).double()
    return _jackknifed(value, torch.stack([_without(i, found, small, w, own) for i in range(min(len(s), _TRIED))]))


def _without(i: int, found: _LeftOut, small: Tensor, w: Tensor, own: Tensor) -> Tensor:
    """XTrace's value of all vectors but the i-th; ``own``: ω_jᵀHω_j."""
    first = found.s[:, i : i + 1]
    t = (found.s - first * found.cosines[i]) / found.sines[i].sqrt()
    u = w - first * (first.T @ w) - t * (t * w).sum(0)
    kept = small.trace() - (first.T @ small @ first)[0, 0] - (t * (small @ t)).sum(0)
    terms = kept + own - 2 * (u * found.r).sum(0) + (u * (small @ u)).sum(0)
    return (terms.sum() - terms[i]) / (len(w) - 1)


def xdiag(operator: Square, count: int, seed: int) -> Estimate:
    """The mean over i of diag(Q_iQ_iᵀH) + ω_i ∘ (I − Q_iQ_iᵀ)Hω_i."""
    found = _LeftOut(operator, count, seed)
    dtype, k = found.q.dtype, len(found.s)
    out, image = found.q @ found.s.to(dtype), found.z @ found.s.to(dtype)
    drawn = found.omega * found.scale.to(dtype)
    kept = (found.q * found.z).sum(1, keepdim=True)
    value = (kept - out * image + drawn * out).mean(-1)
    # Sums over j ≠ i of what t_ij takes away, and of what the j-th vector sees of it.
    weights = (1 - torch.eye(k, dtype=torch.float64, device=found.s.device)) / found.sines
    plain, crossed = weights.to(dtype), (weights * found.cosines).to(dtype)
    twice = (weights * found.cosines.square()).sum(0).to(dtype)
    lost = (out * image) @ plain - out * (image @ crossed) - image * (out @ crossed) + out * image * twice
    seen = (drawn * out) @ plain - out * (drawn @ crossed)
    return _jackknifed(value, kept - out * image + (seen - lost) / (k - 1))


OF_TRACE: dict[str, Callable[[Square, int, int], Estimate]] = {"hutch++": hutch_pp, "xtrace": xtrace}
OF_DIAGONAL: dict[str, Callable[[Square, int, int], Estimate]] = {"xdiag": xdiag}
