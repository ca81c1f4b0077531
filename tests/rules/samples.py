"""One row an op (or several): arguments that exercise its rule. Tensors are drawn afresh for every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dag_hesse.rules import RULES


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 + 0.3


def inside(*shape: int) -> Tensor:
    """In (-0.9, 0.9)."""
    return torch.rand(shape, dtype=torch.float64) * 1.8 - 0.9


def apart(*shape: int) -> Tensor:
    """Distinct values a tenth apart and none near zero: no kink within a difference step."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count).to(torch.float64) - count / 2 + 0.53).reshape(shape) / 10


def index(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


@dataclass(frozen=True)
class Sample:
    """``make()`` returns the op's positional arguments; ``special`` are points where autograd has a convention.

    ``differences``: the op is differentiable there (ties and padding rows are conventions). ``autograd``: torch can
    differentiate the call at all. ``fixed``: input slots that no point reaches.
    """

    make: Callable[[], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    output: int | None = None
    special: tuple[float, ...] = ()
    differences: bool = True
    autograd: bool = True
    fixed: tuple[int, ...] = ()


def s(
    make: Callable[[], tuple[Any, ...]], output: int | None = None, special: tuple[float, ...] = (), **options: Any
) -> Sample:
    return Sample(make, options, output, special)


def unary(
    domain: Callable[..., Tensor] = normal,
    *rest: Any,
    special: tuple[float, ...] = (),
    output: int | None = None,
    **options: Any,
) -> list[Sample]:
    return [
        s(lambda: (domain(3, 2), *rest), output, special, **options),
        s(lambda: (domain(), *rest), output, (), **options),
    ]


def _pads(n: int) -> list[Sample]:
    return [s(lambda: (normal(2, 3, *(4,) * n), [1, 2] * n))]


def _sizes(n: int, *rest: Any) -> list[Sample]:
    return [s(lambda: (normal(1, 2, *(3,) * n), [5] * n, *rest)), s(lambda: (normal(1, 2, *(4,) * n), [3] * n, *rest))]


def _attentions() -> list[Sample]:
    """Plain; causal; with a mask a sample, dropout and a query that meets no key; with scores that are hidden."""

    def of(s: int, t: int, *rest: Any, fixed: tuple[int, ...] = ()) -> Sample:
        return Sample(lambda: (normal(4, s, 3), normal(4, 3, t), normal(4, t, 2), *rest), fixed=fixed)

    causal = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    padded = torch.zeros(2, 1, 4, 6, dtype=torch.float64)
    padded[1, ..., :3], padded[0, :, 2] = -torch.inf, -torch.inf
    drop, hidden = torch.rand(2, 2, 4, 6, dtype=torch.float64).round(), torch.rand(2, 4, 6) < 0.4
    return [
        of(5, 7, None, None, None, [2, 2], 0.5, 0.0, 1.0, False),
        of(5, 5, causal, None, None, [2, 2], 1.0, 0.0, 1.0, True, fixed=(3,)),
        of(4, 6, padded, None, drop, [2, 2], 0.3, 0.0, 1.25, True, fixed=(3, 4)),
        of(4, 6, None, hidden, None, [2, 2], 0.3, -2.0, 1.0, False),
        of(4, 6, None, hidden, None, [2, 2], 0.3, -torch.inf, 1.0, True),
        of(3, 3, normal(4, 1, 3), None, None, [4], 1.0, 0.0, 1.0, False, fixed=(3,)),
    ]


def _convolutions() -> list[Sample]:
    def one(x: tuple[int, ...], w: tuple[int, ...], bias: bool, *rest: Any) -> Sample:
        return s(
            lambda: (normal(*x), normal(*w), normal((rest[3] and w[1] * rest[5]) or w[0]) if bias else None, *rest)
        )

    return [
        one((2, 3, 6), (4, 3, 3), True, [1], [1], [1], False, [0], 1),
        one((2, 3, 5, 5), (4, 3, 3, 3), True, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
        one((2, 4, 5, 4), (6, 2, 3, 2), False, [1, 2], [2, 0], [2, 1], False, [0, 0], 2),
        one((1, 2, 3, 4, 3), (2, 2, 2, 2, 2), True, [1, 1, 1], [0, 1, 0], [1, 1, 1], False, [0, 0, 0], 1),
        one((2, 4, 3, 3), (4, 3, 3, 3), True, [2, 2], [1, 1], [1, 1], True, [1, 1], 2),
        one((2, 3, 4), (3, 2, 2), False, [2], [0], [1], True, [0], 1),
        # kernel taps that only read padding: 3 × 3 on one pixel (a matrix product), the same with few image channels, a stride of 2
        one((2, 3, 1, 1), (5, 3, 3, 3), True, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        one((3, 3, 1, 1), (2, 3, 3, 3), True, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        one((2, 3, 2, 2), (5, 3, 3, 3), False, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
        one((2, 4, 1, 2), (6, 2, 3, 3), True, [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
        one((2, 3, 2), (4, 3, 5), True, [1], [4], [2], False, [0], 1),
        # few outputs, wide weights: patches laid out for a matrix product, a stride of 2 among them
        one((1, 2, 4, 3), (40, 2, 3, 2), True, [2, 1], [1, 0], [1, 1], False, [0, 0], 1),
        one((1, 2, 5, 5), (40, 2, 2, 2), False, [2, 2], [0, 0], [3, 3], False, [0, 0], 1),
        one((1, 4, 3, 3), (9, 4, 1, 1), True, [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
        one((1, 3, 3, 2, 3), (9, 3, 1, 1, 1), False, [2, 1, 2], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1),
        # an activation much larger than the weight (channels last)
        one((2, 2, 5, 5), (2, 2, 1, 1), True, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ]


_KINKS = (0.0,)
POWERS = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)

SAMPLES: dict[str, list[Sample]] = {
    # data movement
    **{f"aten.{n}.default": [s(lambda: (normal(2, 3, 4), [6, 4]))] for n in ("view", "reshape", "_unsafe_view")},
    "aten._reshape_alias.default": [s(lambda: (normal(2, 3), [3, 2], [2, 1]))],
    "aten.clone.default": unary(),
    "aten.alias.default": unary(),
    "aten.lift_fresh_copy.default": unary(),
    "aten.squeeze.default": [s(lambda: (normal(1, 3, 1),))],
    "aten.squeeze.dim": [s(lambda: (normal(2, 1, 3), 1)), s(lambda: (normal(2, 3), 0))],
    "aten.squeeze.dims": [s(lambda: (normal(2, 1, 1, 3), [1, -2]))],
    "aten.unsqueeze.default": [s(lambda: (normal(2, 3), -1)), s(lambda: (normal(2, 3), 0))],
    "aten.permute.default": [s(lambda: (normal(2, 3, 4), [2, 0, 1])), s(lambda: (normal(2, 3, 4), [0, -1, 1]))],
    "aten.transpose.int": [s(lambda: (normal(2, 3, 4), 0, -1))],
    "aten.t.default": [s(lambda: (normal(2, 3),))],
    "aten.expand.default": [s(lambda: (normal(3, 1), [2, 3, 4])), s(lambda: (normal(1, 3), [4, -1]))],
    "aten.repeat.default": [s(lambda: (normal(2, 3), [2, 1, 3]))],
    "aten.slice.Tensor": [
        s(lambda: (normal(5, 3), 0, 1, 5, 2)),
        s(lambda: (normal(2, 5), -1, -3, 9223372036854775807)),
        s(lambda: (normal(4, 2),)),
    ],
    "aten.select.int": [s(lambda: (normal(3, 4), 1, -2))],
    "aten.cat.default": [
        s(lambda: ([normal(2, 3), normal(4, 3)],)),
        s(lambda: ([normal(2, 1), normal(2, 2), normal(2, 3)], -1)),
    ],
    "aten.stack.default": [s(lambda: ([normal(2, 3), normal(2, 3)], 1))],
    "aten.flip.default": [s(lambda: (normal(2, 3, 2), [0, -1]))],
    "aten.roll.default": [s(lambda: (normal(3, 4), [1, -2], [0, 1])), s(lambda: (normal(3, 4), [5]))],
    "aten.constant_pad_nd.default": [s(lambda: (normal(2, 3), [1, 2, 0, 1], 1.5)), s(lambda: (normal(4), [-1, 2]))],
    **{f"aten.{mode}_pad{n}d.default": _pads(n) for mode in ("reflection", "replication") for n in (1, 2, 3)},
    "aten._to_copy.default": [s(lambda: (normal(2, 3),), dtype=torch.float64)],
    "aten.diagonal.default": [s(lambda: (normal(3, 4), 1)), s(lambda: (normal(2, 3, 3), 0, -2, -1))],
    "aten.diagonal_scatter.default": [
        s(lambda: (normal(3, 4), normal(3), 1)),
        s(lambda: (normal(2, 3, 3), normal(2, 3), 0, -2, -1)),
    ],
    "aten.unfold.default": [s(lambda: (normal(2, 7), 1, 3, 2))],
    "aten.tril.default": [s(lambda: (normal(3, 4), 1))],
    "aten.triu.default": [s(lambda: (normal(2, 3, 3),))],
    "aten.im2col.default": [s(lambda: (normal(1, 2, 4, 5), [2, 3], [1, 1], [1, 0], [2, 1]))],
    "aten.col2im.default": [s(lambda: (normal(1, 8, 6), [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]))],
    "dag_hesse.tap.default": [s(lambda: (normal(2, 3), "name"))],
    "dag_hesse.assigned.default": [
        Sample(lambda: (normal(2, 3), normal(3, 2)), differences=False, autograd=False, fixed=(1,))
    ],
    # sums and pooling
    "aten.sum.default": unary(),
    "aten.sum.dim_IntList": [
        s(lambda: (normal(2, 3, 4), [0, -1])),
        s(lambda: (normal(2, 3), [1], True)),
        s(lambda: (normal(2, 3), None)),
    ],
    "aten.mean.default": unary(),
    "aten.mean.dim": [s(lambda: (normal(2, 3, 4), [1])), s(lambda: (normal(2, 3), [-1], True))],
    "aten.cumsum.default": [s(lambda: (normal(2, 4), 1)), s(lambda: (normal(3, 2), 0))],
    "aten.avg_pool2d.default": [
        s(lambda: (normal(1, 2, 4, 4), [2, 2])),
        s(lambda: (normal(1, 2, 5, 5), [3, 2], [2, 1], [1, 0], True, False)),
        s(lambda: (normal(1, 1, 4, 4), [2, 2], [1, 1], [0, 0], False, True, 3)),
    ],
    "aten.avg_pool3d.default": [s(lambda: (normal(1, 2, 4, 3, 4), [2, 2, 2], [1, 1, 2]))],
    "aten._adaptive_avg_pool2d.default": [s(lambda: (normal(1, 2, 5, 4), [3, 2]))],
    "aten._adaptive_avg_pool3d.default": [s(lambda: (normal(1, 1, 4, 3, 3), [2, 2, 1]))],
    **{f"aten.upsample_nearest{n}d.default": _sizes(n) for n in (1, 2, 3)},
    **{f"aten._upsample_nearest_exact{n}d.default": _sizes(n) for n in (1, 2, 3)},
    "aten.upsample_linear1d.default": _sizes(1, False) + _sizes(1, True),
    "aten.upsample_bilinear2d.default": _sizes(2, True) + _sizes(2, False),
    "aten.upsample_bicubic2d.default": _sizes(2, False),
    "aten.upsample_trilinear3d.default": _sizes(3, True),
    # elementwise
    **{
        f"aten.{n}.default": unary()
        for n in ["neg", "exp", "exp2", "expm1", "sin", "cos", "tanh", "sinh", "cosh", "sigmoid", "erf", "silu", "mish"]
    },
    **{f"aten.{n}.default": unary(positive) for n in ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal"]},
    **{f"aten.{n}.default": unary(inside) for n in ["asin", "acos", "atan", "tan"]},
    **{f"aten.{n}.default": unary(apart) for n in ["floor", "ceil", "round", "trunc", "sign"]},
    **{f"aten.{n}.default": unary(apart, special=_KINKS) for n in ["abs", "relu"]},
    "aten.relu6.default": unary(apart, special=(0.0, 6.0, 7.0)),
    "aten.hardswish.default": unary(apart, special=(-4.0, -3.0, 3.0, 4.0)),
    "aten.hardsigmoid.default": unary(apart, special=(-4.0, -3.0, 3.0, 4.0)),
    "aten.hardtanh.default": unary(apart, -0.25, 0.25, special=(-0.25, 0.25)),
    "aten.leaky_relu.default": unary(apart, 0.2, special=_KINKS) + unary(apart),
    "aten.threshold.default": unary(apart, 0.05, -1.0, special=(0.05,)),
    "aten.gelu.default": unary() + unary(approximate="tanh"),
    "aten.softplus.default": unary() + unary(normal, 2.0, 1.0, special=(0.5,)),
    "aten.elu.default": unary(apart, special=_KINKS) + unary(apart, 0.7),
    "aten.selu.default": unary(apart, special=_KINKS),
    "aten.celu.default": unary(apart, 0.75, special=_KINKS),
    "aten.log_sigmoid_forward.default": unary(output=0),
    "aten.clamp.default": unary(apart, -0.2, 0.2, special=(-0.2, 0.2)) + unary(apart, None, 0.1),
    "aten.clamp_min.default": unary(apart, 0.1),
    "aten.clamp_max.default": unary(apart, 0.1),
    "aten.clamp.Tensor": [
        s(lambda: (apart(3, 4), inside(3, 4) / 100 - 0.23, inside(4) / 100 + 0.28)),
        s(lambda: (apart(3, 4), None, inside(3, 1) / 100)),
    ],
    "aten.add.Tensor": [s(lambda: (normal(2, 3), normal(3))), s(lambda: (normal(2, 1), normal(2, 3)), alpha=2)],
    "aten.sub.Tensor": [s(lambda: (normal(2, 3), normal(1, 3)), alpha=3), s(lambda: (normal(3), normal()))],
    "aten.mul.Tensor": [s(lambda: (normal(2, 3), normal(3))), s(lambda: (normal(2, 3), 2.5))],
    "aten.div.Tensor": [s(lambda: (normal(2, 3), positive(3))), s(lambda: (normal(2, 3), 2.5))],
    "aten.add.Scalar": unary(normal, 1.5),
    "aten.sub.Scalar": unary(normal, 1.5),
    "aten.mul.Scalar": unary(normal, 1.5),
    "aten.div.Scalar": unary(normal, 1.5),
    "aten.pow.Tensor_Scalar": unary(positive, 2.5)
    + unary(normal, 3)
    + unary(normal, 1)
    + unary(normal, 0)
    + unary(normal, 2, special=_KINKS),
    "aten.pow.Scalar": [
        s(lambda: (2.5, normal(3))),
        Sample(lambda: (0.0, positive(3)), special=(0.0, 1.0), autograd=False),
    ],
    "aten.pow.Tensor_Tensor": [
        s(lambda: (positive(2, 3), normal(3))),
        replace(s(lambda: (positive(2, 4), POWERS), special=(0.0,)), fixed=(1,)),
        s(lambda: (positive(2, 3), positive(3) + 2), special=(0.0,)),
    ],
    "aten.maximum.default": [s(lambda: (apart(3, 2), apart(3, 2) + 0.03)), s(lambda: (apart(3, 2), normal() / 100))],
    "aten.minimum.default": [s(lambda: (apart(3, 2), apart(2) + 0.03))],
    "aten.where.self": [
        s(lambda: (index(2, 3, 4).bool(), normal(3, 4), normal(4))),
        s(lambda: (index(2, 4).bool(), normal(3, 1), normal())),
    ],
    "aten.masked_fill.Scalar": [s(lambda: (normal(3, 4), index(2, 4).bool(), -2.0))],
    "aten.masked_fill.Tensor": [s(lambda: (normal(3, 4), index(2, 3, 4).bool(), normal()))],
    # special functions
    **{f"aten.{n}.default": unary() for n in ("erfc", "asinh", "special_erfcx", "special_ndtr", "special_log_ndtr")},
    **{f"aten.{n}.default": unary(inside) for n in ("erfinv", "atanh")},
    **{f"aten.{n}.default": unary(positive) for n in ("lgamma", "digamma")},
    "aten.polygamma.default": [s(lambda: (1, positive(3, 2))), s(lambda: (2, positive()))],
    "aten.acosh.default": unary(lambda *shape: positive(*shape) + 1),
    "aten.special_ndtri.default": unary(lambda *shape: inside(*shape) / 2 + 0.5),
    "aten.i0.default": unary(special=_KINKS),
    "aten.special_i0e.default": unary(apart, special=_KINKS),
    "aten.special_i1.default": unary(apart),
    "aten.special_i1e.default": unary(apart),
    "aten.sinc.default": unary(),
    "aten.logit.default": unary(lambda *shape: inside(*shape) / 2 + 0.5)
    + unary(lambda *shape: inside(*shape) / 2 + 0.5, 0.2, special=(0.1, 0.2, 0.8, 0.95)),
    "dag_hesse.clamped_log.default": unary(positive),
    "aten.hardshrink.default": unary(apart, 0.25, special=(-0.25, 0.25)),
    "aten.softshrink.default": unary(apart, 0.25, special=(-0.25, 0.25)),
    "aten.sgn.default": unary(apart),
    "aten.angle.default": unary(apart),
    "aten.fmod.Scalar": unary(apart, 0.17),
    "aten.remainder.Scalar": unary(apart, -0.17),
    "aten.fmod.Tensor": [s(lambda: (apart(3, 4), inside(3, 4) / 100 + 0.2))],
    "aten.remainder.Tensor": [s(lambda: (apart(3, 4), inside(4) / 100 - 0.2))],
    "aten.remainder.Scalar_Tensor": [Sample(lambda: (1.03, inside(3, 4) / 100 + 0.2), autograd=False)],
    **{
        f"aten.div.{n}_mode": unary(apart, 0.17, rounding_mode="floor") + unary(apart, -0.17, rounding_mode="trunc")
        for n in ("Tensor", "Scalar")
    },
    "aten.copysign.Scalar": unary(apart, -1.0, special=_KINKS),
    "aten.copysign.Tensor": [s(lambda: (apart(3, 4), apart(4)), special=_KINKS)],
    "aten.logaddexp.default": [
        s(lambda: (normal(3, 4), normal(4))),
        s(lambda: (normal(2), normal(2)), special=(30.0,)),
    ],
    "aten.logaddexp2.default": [s(lambda: (normal(3, 4), normal(3, 1)))],
    "aten.xlogy.Tensor": [
        s(lambda: (normal(3, 4), positive(4))),
        s(lambda: (normal(3, 4), positive(3, 4)), special=_KINKS),
    ],
    "aten.xlogy.Scalar_Self": [s(lambda: (2.5, positive(3, 4)))],
    "aten.xlogy.Scalar_Other": [s(lambda: (normal(3, 4), 2.5))],
    "aten.special_xlog1py.default": [s(lambda: (normal(3, 4), positive(4)), special=_KINKS)],
    "aten.special_xlog1py.self_scalar": [s(lambda: (2.5, positive(3, 4)))],
    "aten.special_xlog1py.other_scalar": [s(lambda: (normal(3, 4), 2.5))],
    "aten.hypot.default": [s(lambda: (apart(3, 4), apart(4)))],
    "aten.atan2.default": [
        s(lambda: (normal(3, 4), positive(3, 1))),
        s(lambda: (normal(3), positive(3)), special=_KINKS),
    ],
    # contractions
    "aten.mm.default": [s(lambda: (normal(2, 3), normal(3, 4)))],
    "dag_hesse.mm_bias.default": [s(lambda: (normal(2, 3), normal(3, 4), normal(4)))],
    "aten.bmm.default": [s(lambda: (normal(2, 3, 4), normal(2, 4, 2)))],
    "aten.convolution.default": _convolutions(),
    # gathers
    "aten.index.Tensor": [
        s(lambda: (normal(4, 3), [index(4, 5)])),
        s(lambda: (normal(4, 3, 2), [None, index(3, 2, 2), index(2, 2, 1)])),
        s(lambda: (normal(4, 3, 2), [normal(4, 3) > 0, index(2, 1)])),
    ],
    "aten._unsafe_index.Tensor": [s(lambda: (normal(4, 3), [None, index(3, 5)]))],
    "aten.index_select.default": [
        s(lambda: (normal(4, 3), 1, index(3, 5))),
        s(lambda: (normal(4, 3), 0, torch.tensor(2))),
    ],
    "aten.gather.default": [s(lambda: (normal(4, 3), 1, index(3, 2, 4)))],
    "aten.embedding.default": [
        s(lambda: (normal(5, 3), index(5, 2, 4))),
        Sample(lambda: (normal(5, 3), torch.tensor([1, 2, 1, 4]), 2), differences=False),
    ],
    "aten.scatter.src": [
        s(lambda: (normal(3, 4), 1, torch.tensor([[0, 2], [3, 1]]), normal(2, 2))),
        Sample(lambda: (normal(3, 4), 1, torch.tensor([[0, 2], [3, 1]]), normal(3, 3)), autograd=False),
    ],
    "aten.scatter.value": [s(lambda: (normal(3, 4), 1, torch.tensor([[0, 2], [3, 1]]), 1.5))],
    "aten.scatter_add.default": [
        s(lambda: (normal(3, 4), 1, index(4, 2, 3), normal(2, 3))),
        Sample(lambda: (normal(3, 4), 1, index(4, 2, 3), normal(3, 3)), autograd=False),
    ],
    "aten.index_add.default": [s(lambda: (normal(4, 3), 0, index(4, 5), normal(5, 3)), alpha=2)],
    "aten.index_put.default": [
        s(lambda: (normal(4, 3), [torch.tensor([0, 2])], normal(2, 3))),
        s(lambda: (normal(4, 3), [index(4, 6)], normal(6, 3), True)),
        s(lambda: (normal(4, 3), [None, torch.tensor([1])], normal())),
        s(lambda: (normal(4, 3, 2), [normal(4, 3) > 0], normal(2))),
    ],
    "aten._unsafe_index_put.default": [s(lambda: (normal(4, 3), [index(4, 6)], normal(6, 3), True))],
    "aten.slice_scatter.default": [s(lambda: (normal(5, 2), normal(2, 2), 0, 1, 5, 2))],
    "aten.select_scatter.default": [s(lambda: (normal(3, 4), normal(3), 1, 2))],
    **{
        f"aten.{n}.dim": [s(lambda: (apart(3, 4), 1), 0), s(lambda: (apart(3, 4), 0, True), 0)]
        for n in ("max", "min", "median")
    },
    "aten.sort.default": [s(lambda: (apart(3, 4), 0, True), 0)],
    "aten.topk.default": [s(lambda: (apart(3, 4), 2), 0), s(lambda: (apart(4, 3), 2, 0, False), 0)],
    "aten.kthvalue.default": [s(lambda: (apart(3, 4), 2), 0)],
    "aten.mode.default": [s(lambda: (apart(3, 4),), 0)],
    "aten.amax.default": [
        s(lambda: (apart(3, 4), [1])),
        s(lambda: (apart(3, 4), [0, 1], True)),
        Sample(lambda: (torch.ones(3, 4, dtype=torch.float64), [1]), differences=False),
    ],
    "aten.amin.default": [s(lambda: (apart(3, 4), [-2]))],
    "aten.max.default": [s(lambda: (apart(3, 4),))],
    "aten.min.default": [s(lambda: (apart(3, 4),))],
    "aten.max_pool2d_with_indices.default": [
        s(lambda: (apart(1, 2, 4, 5), [2, 2]), 0),
        s(lambda: (apart(1, 1, 6, 6), [3, 3], [2, 2], [1, 1]), 0),
        s(lambda: (apart(1, 1, 7, 7), [2, 2], [2, 2], [0, 0], [2, 2], True), 0),
    ],
    "aten.max_pool3d_with_indices.default": [s(lambda: (apart(1, 1, 4, 4, 4), [2, 2, 2]), 0)],
    "aten.adaptive_max_pool2d.default": [s(lambda: (apart(1, 2, 5, 4), [2, 3]), 0)],
    "aten.adaptive_max_pool3d.default": [s(lambda: (apart(1, 1, 4, 3, 4), [2, 2, 2]), 0)],
    # rows
    **{
        f"aten.{n}.default": [s(lambda: (normal(3, 4), -1, False)), s(lambda: (normal(3, 4), 0, False))]
        for n in ("_softmax", "_log_softmax")
    },
    "aten._safe_softmax.default": [s(lambda: (normal(3, 4), -1))],
    "aten.logsumexp.default": [s(lambda: (normal(3, 4), [1])), s(lambda: (normal(2, 3, 4), [0, -1], True))],
    "aten._linalg_det.default": [
        s(lambda: (normal(3, 3),), 0),
        s(lambda: (normal(2, 4, 4),), 0),
        s(lambda: (normal(2, 1, 1),), 0),
    ],
    "aten._linalg_slogdet.default": [
        s(lambda: (normal(3, 3),), 1),
        s(lambda: (normal(2, 4, 4),), 1),
        s(lambda: (normal(3, 3),), 0),
    ],
    "dag_hesse.attention.default": _attentions(),
    "dag_hesse.batch_affine.default": [
        s(lambda: (normal(2, 3, 4), normal(3), normal(3), normal(3), positive(3), 1e-3)),
        s(lambda: (normal(4, 3), None, None, normal(3), positive(3), 1e-3)),
        s(lambda: (normal(2, 3, 2, 2), normal(3), None, normal(3), positive(3), 1e-3)),
        replace(s(lambda: (normal(2, 3, 2, 4), normal(3), normal(3), normal(3), positive(3), 1e-3)), fixed=(3, 4)),
        replace(s(lambda: (normal(4, 3), normal(3), None, normal(3), positive(3), 1e-3)), fixed=(2, 3)),
    ],
    "dag_hesse.standardize.default": [
        s(lambda: (normal(3, 5), [1], 1e-5, True)),
        s(lambda: (normal(4, 2, 3), [0, 2], 1e-3, True)),
        s(lambda: (normal(3, 5), [-1], 1e-6, False)),
    ],
}

if unknown := SAMPLES.keys() - RULES.keys():
    raise KeyError(f"SAMPLES has {sorted(unknown)}, which are no rows of RULES: how is the op spelt there?")
