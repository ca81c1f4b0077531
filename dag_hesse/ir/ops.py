"""Custom ops that exist only in captured graphs: the tap marker, row standardization, BatchNorm in eval mode."""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("dag_hesse", "DEF")
_LIBRARY.define("tap(Tensor x, str name) -> Tensor")
_LIBRARY.define("standardize(Tensor x, int[] dims, float eps, bool center) -> Tensor")
_LIBRARY.define("batch_affine(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) -> Tensor")


def _tap(x: Tensor, name: str) -> Tensor:
    return x.clone()


def _standardize(x: Tensor, dims: list[int], eps: float, center: bool) -> Tensor:
    if center:
        x = x - x.mean(dims, keepdim=True)
    return x * (x * x).mean(dims, keepdim=True).add(eps).rsqrt()


def _batch_affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    shape = [1, -1, *[1] * (x.ndim - 2)]
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


_LIBRARY.impl("tap", _tap, "CompositeExplicitAutograd")
_LIBRARY.impl("standardize", _standardize, "CompositeExplicitAutograd")

_LIBRARY.impl("batch_affine", _batch_affine, "CompositeExplicitAutograd")

TAP = "dag_hesse.tap.default"
tap = torch.ops.dag_hesse.tap.default
standardize = torch.ops.dag_hesse.standardize.default
batch_affine = torch.ops.dag_hesse.batch_affine.default
