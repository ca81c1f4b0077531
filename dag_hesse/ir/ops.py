"""Custom ops that exist only in captured graphs: the tap, a value given to a tensor behind autograd's back, row
standardization, BatchNorm in eval mode, attention, and a matrix product with a bias in the order of operands that
contractions share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("dag_hesse", "DEF")
_LIBRARY.define("tap(Tensor x, str name) -> Tensor")
_LIBRARY.define("assigned(Tensor past, Tensor value) -> Tensor")
_LIBRARY.define("standardize(Tensor x, int[] dims, float eps, bool center) -> Tensor")
_LIBRARY.define("mm_bias(Tensor a, Tensor b, Tensor bias) -> Tensor")
_LIBRARY.define("batch_affine(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) -> Tensor")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? hidden, Tensor? drop, int[] lead, float scale, "
    "float fill, float factor, bool safe) -> Tensor"
)


def _tap(x: Tensor, name: str) -> Tensor:
    return x.clone()


def _assigned(past: Tensor, value: Tensor) -> Tensor:
    return value.to(past.dtype).reshape(past.shape).clone()


def normalized_shape(shape: Sequence[int], dims: Sequence[int], center: bool) -> list[int] | None:
    """Sizes of the trailing axes, if a standardization over them is a LayerNorm (PyTorch has a kernel); else None."""
    last = range(len(shape) - len(dims), len(shape))
    return list(shape[last.start :]) if center and last and sorted(d % len(shape) for d in dims) == list(last) else None


def _standardize(x: Tensor, dims: list[int], eps: float, center: bool) -> Tensor:
    inner = normalized_shape(x.shape, dims, center)
    if inner is not None:
        return torch.native_layer_norm(x, inner, None, None, eps)[0]
    if center:
        x = x - x.mean(dims, keepdim=True)
    return x * (x * x).mean(dims, keepdim=True).add(eps).rsqrt()


def _batch_affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    fixed = not (mean.requires_grad or var.requires_grad)  # all that kernel can differentiate
    if x.is_cuda and fixed:  # the model's own kernel, whose last bit decides what a ReLU behind it does
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    drop: Tensor | None,
    lead: list[int],
    scale: float,
    fill: float,
    factor: float,
    safe: bool,
) -> Tensor:
    scores = (scale * (q @ k)).view(*lead, q.shape[1], k.shape[2])
    scores = scores if bias is None else scores + bias
    scores = scores if hidden is None else scores.masked_fill(hidden, fill)
    weights = torch._safe_softmax(scores, -1) if safe else torch.softmax(scores, -1)
    weights = weights if drop is None else weights * drop
    return (factor * weights).view(-1, q.shape[1], k.shape[2]) @ v


def _mm_bias(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, a, b)


# Op -> what it does, in PyTorch's own.
DEFINITIONS: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {}
for _name, _definition in {
    "tap": _tap,
    "assigned": _assigned,
    "standardize": _standardize,
    "mm_bias": _mm_bias,
    "attention": _attention,
    "batch_affine": _batch_affine,
}.items():
    _LIBRARY.impl(_name, _definition, "CompositeExplicitAutograd")
    DEFINITIONS[getattr(torch.ops.dag_hesse, _name).default] = _definition  # type: ignore[assignment]

TAP = "dag_hesse.tap.default"
tap = torch.ops.dag_hesse.tap.default
assigned = torch.ops.dag_hesse.assigned.default
standardize = torch.ops.dag_hesse.standardize.default
attention = torch.ops.dag_hesse.attention.default
mm_bias = torch.ops.dag_hesse.mm_bias.default
batch_affine = torch.ops.dag_hesse.batch_affine.default
