"""What every lowering is tested at: the op, its arguments, and what to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rules.lowered import Function
from tests.rules.samples import apart, index, inside, normal, positive

aten = torch.ops.aten


@dataclass(frozen=True)
class Row:
    """``truth``: what the Hessian is compared with. ``formula``: the op in plain torch, where it has no derivative."""

    op: Any
    make: Callable[[], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    truth: str = "double differences"
    active: tuple[int, ...] | None = None
    output: int = 0
    formula: Function | None = None


def probability(*shape: int) -> Tensor:
    return inside(*shape) / 2 + 0.5


def lstm(x: Sequence[Tensor]) -> Tensor:
    i, f, g, o = (x[0] + x[1] + (x[3] + x[4] if len(x) > 3 else 0)).chunk(4, 1)
    cell = f.sigmoid() * x[2] + i.sigmoid() * g.tanh()
    return torch.cat([o.sigmoid() * cell.tanh(), cell], 1)


def gru(x: Sequence[Tensor]) -> Tensor:
    (ir, iz, new), (hr, hz, hn) = x[0].chunk(3, 1), x[1].chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (new + r * hn).tanh()
    return (1 - z) * n + z * x[2]


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """By the chain rule through formulas, as autograd does not differentiate these backward passes."""
    if function is F.silu:
        return x.sigmoid() * (1 + x * (1 - x.sigmoid()))
    t = F.softplus(x).tanh()
    return t + x * (1 - t * t) * x.sigmoid()


_ENDS = torch.tensor([1.0, -1.0, 0.0, -2.0]).double()
_TARGETS = torch.tensor([0, 2, 1])
_BAG = torch.tensor([0, 2, 2, 4, 1, 3])

SPLITS = aten.split.Tensor, aten.unsafe_split.Tensor
UNEVEN_SPLITS = aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default


def _standard(x: Tensor, dims: list[int]) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * (centered.square().mean(dims, keepdim=True) + 0.3).rsqrt()


def _by(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (x - mean[:, None]) * (var[:, None] + 0.3).rsqrt()


def _scaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Of channels along axis 1."""
    lined = [-1, *(1,) * (x.ndim - 2)]
    return x * w.reshape(lined) + b.reshape(lined)


def _channels() -> tuple[Tensor, Tensor, Tensor]:
    return normal(5, 3, 2), normal(3), normal(3)


def _tracked() -> tuple[Tensor, Tensor]:
    return normal(3), positive(3)


TRAINED_NORMS: dict[Any, Callable[[], tuple[Any, ...]]] = {
    aten.native_batch_norm.default: lambda: (*_channels(), *_tracked(), True, 0.1, 0.3),
    aten._native_batch_norm_legit.default: lambda: (*_channels(), *_tracked(), True, 0.1, 0.3),
    aten._native_batch_norm_legit.no_stats: lambda: (*_channels(), True, 0.1, 0.3),
    aten._batch_norm_with_update.default: lambda: (*_channels(), *_tracked(), 0.1, 0.3),
}
FIXED_NORMS: dict[Any, Callable[[], tuple[Any, ...]]] = {
    aten._native_batch_norm_legit_no_training.default: lambda: (*_channels(), *_tracked(), 0.1, 0.3),
    aten._batch_norm_no_update.default: lambda: (*_channels(), *_tracked(), 0.1, 0.3),
    aten.cudnn_batch_norm.default: lambda: (*_channels(), *_tracked(), False, 0.1, 0.3),
}

ROWS = [
    Row(aten.logcumsumexp.default, lambda: (normal(3, 5), 1)),
    Row(aten.logcumsumexp.default, lambda: (normal(3, 2), -2)),
    Row(aten.logcumsumexp.default, lambda: (normal(3, 1), 1)),
    Row(aten.cumprod.default, lambda: (normal(3, 5), 1)),
    Row(aten.cumprod.default, lambda: (normal(), 0)),
    Row(aten.cumprod.default, lambda: (normal(4).round(), -1), truth="double"),
    Row(aten.huber_loss.default, lambda: (normal(3, 4), normal(3, 4), 1, 0.7)),
    Row(aten.huber_loss.default, lambda: (normal(3, 4), normal(4), 0)),
    Row(aten.huber_loss.default, lambda: (_ENDS, torch.zeros(4).double(), 1, 1.0), truth="double", active=(0,)),
    Row(aten.smooth_l1_loss.default, lambda: (_ENDS, torch.zeros(4).double(), 0, 2.0), truth="double", active=(0,)),
    Row(aten.smooth_l1_loss.default, lambda: (normal(3, 4), normal(3, 4), 2, 0.5)),
    Row(aten.smooth_l1_loss.default, lambda: (apart(3, 4), torch.zeros(3, 4), 1, 0.0), active=(0,)),
    Row(aten.binary_cross_entropy.default, lambda: (probability(3, 4), probability(3, 4)), truth="double"),
    Row(aten.binary_cross_entropy.default, lambda: (probability(3), index(2, 3).double(), positive(3), 2), active=(0,)),
    Row(aten.soft_margin_loss.default, lambda: (normal(3, 4) * 3, normal(3, 4).sign()), active=(0,)),
    Row(aten.multi_margin_loss.default, lambda: (apart(3, 4), _TARGETS, 2), active=(0,), truth="differences"),
    Row(
        aten.multi_margin_loss.default,
        lambda: (apart(3, 4), _TARGETS, 1, 0.52, positive(4)),
        active=(0,),
        truth="differences",
    ),
    Row(aten.multi_margin_loss.default, lambda: (apart(4), torch.tensor(2), 2, 0.52), truth="differences"),
    Row(
        aten.multilabel_margin_loss_forward.default,
        lambda: (apart(2, 4), torch.tensor([[1, 3, -1, 0], [-1] * 4]), 1),
        truth="differences",
    ),
    # norms and distances
    *(Row(aten.linalg_vector_norm.default, lambda p=p: (apart(3, 4), p, [1])) for p in (0, 1, 2, 3, 1.5, torch.inf)),
    Row(aten.dist.default, lambda: (normal(3), normal(3), 3)),
    Row(aten.std.correction, lambda: (normal(3, 4), [1])),
    *(
        Row(
            aten._cdist_forward.default,
            lambda p=p: (apart(2, 3, 4), apart(2, 2, 4) + 0.03, p, None),
            truth="differences",
        )
        for p in (1.0, 2.0, 2.5)
    ),
    Row(aten._cdist_forward.default, lambda: (normal(3, 4), normal(2, 4), torch.inf, None), truth="differences"),
    Row(aten._euclidean_dist.default, lambda: (normal(3, 4), normal(2, 4))),
    *(Row(aten._pdist_forward.default, lambda p=p: (apart(4, 3), p), truth="differences") for p in (1.0, 2.0, 3.0)),
    Row(aten._weight_norm_interface.default, lambda: (normal(3, 4), positive(3, 1), 0), truth="differences"),
    # integers that matter
    *(
        Row(
            aten._ctc_loss.default,
            lambda targets=targets, lengths=lengths, inputs=inputs: (
                normal(5, 2, 4),
                targets,
                inputs,
                lengths,
                0,
                True,
            ),
            truth="differences",
            formula=lambda x, targets=targets, lengths=lengths, inputs=inputs: F.ctc_loss(
                torch.log_softmax(x[0], -1), targets, inputs, lengths, reduction="none", zero_infinity=True
            ),
        )
        for targets, lengths, inputs in (
            (torch.tensor([[1, 1, 2], [3, 2, 0]]), [3, 2], [5, 4]),
            (torch.tensor([1, 2, 3]), [3, 0], [5, 5]),
            (torch.tensor([[1, 1, 2], [3, 3, 0]]), [3, 2], [5, 2]),  # no alignment of the second
        )
    ),
    *(
        Row(aten._embedding_bag.default, lambda mode=mode: (normal(5, 3), _BAG, torch.tensor([0, 3, 3]), False, mode))
        for mode in (0, 1, 2)
    ),
    Row(
        aten._embedding_bag.default,
        lambda: (normal(5, 3), _BAG, torch.tensor([0, 3, 6]), False, 0, False, normal(6), True, 2),
        truth="differences",
    ),
    Row(
        aten._embedding_bag_forward_only.default,
        lambda: (normal(5, 3), _BAG, torch.tensor([0, 2]), False, 1),
        formula=lambda x: aten._embedding_bag(x[0], _BAG, torch.tensor([0, 2]), False, 1)[0],
    ),
    *(
        Row(
            aten.segment_reduce.default,
            lambda how=how: (apart(5, 2), how),
            {"lengths": torch.tensor([2, 3])},
            "differences",
        )
        for how in ("sum", "mean", "max", "min")
    ),
    Row(
        aten.segment_reduce.default,
        lambda: (positive(5, 2), "prod"),
        {"lengths": torch.tensor([2, 3]), "initial": 2.0},
        "differences",
    ),
    Row(aten._pack_padded_sequence.default, lambda: (normal(3, 2, 2), torch.tensor([3, 1]), False)),
    Row(aten._pack_padded_sequence.default, lambda: (normal(2, 3, 2), torch.tensor([3, 2]), True)),
    # cells
    *(
        Row(
            aten._thnn_fused_lstm_cell.default,
            lambda biases=biases: (normal(2, 12), normal(2, 12), normal(2, 3), *(normal(12) for _ in range(biases))),
            formula=lambda x: lstm(x)[:, :3],
        )
        for biases in (0, 2)
    ),
    Row(
        aten._thnn_fused_lstm_cell.default,
        lambda: (normal(2, 12), normal(2, 12), normal(2, 3)),
        output=1,
        formula=lambda x: lstm(x)[:, 3:],
    ),
    Row(aten._thnn_fused_gru_cell.default, lambda: (normal(2, 9), normal(2, 9), normal(2, 3)), formula=gru),
    Row(
        aten._thnn_fused_gru_cell.default,
        lambda: (normal(2, 9), normal(2, 9), normal(2, 3), normal(9), normal(9)),
        formula=lambda x: gru([x[0] + x[3], x[1] + x[4], x[2]]),
    ),
    # backward passes that a forward may hold
    Row(aten.tanh_backward.default, lambda: (normal(3), inside(3))),
    Row(aten.sigmoid_backward.default, lambda: (normal(3), inside(3))),
    Row(aten.threshold_backward.default, lambda: (normal(3), apart(3), 0.0)),
    Row(aten.gelu_backward.default, lambda: (normal(3), normal(3))),
    Row(aten.gelu_backward.default, lambda: (normal(3), normal(3)), {"approximate": "tanh"}),
    Row(aten.softplus_backward.default, lambda: (normal(3), normal(3), 1.5, 1.0)),
    Row(aten.elu_backward.default, lambda: (normal(3), 0.7, 1.3, 1.1, False, apart(3))),
    Row(aten.elu_backward.default, lambda: (normal(3), 0.7, 1.3, 1.1, True, apart(3))),
    Row(aten.hardtanh_backward.default, lambda: (normal(3), apart(3), -0.05, 0.05)),
    Row(aten.leaky_relu_backward.default, lambda: (normal(3), apart(3), 0.1, False)),
    Row(aten.hardswish_backward.default, lambda: (normal(3), normal(3))),
    Row(
        aten.rrelu_with_noise_backward.default,
        lambda: (normal(3), apart(3), positive(3), 0.1, 0.3, True, False),
        active=(0,),
    ),
    Row(
        aten.rrelu_with_noise_backward.default,
        lambda: (normal(3), apart(3), positive(3), 0.1, 0.3, False, False),
        active=(0,),
    ),
    Row(
        aten.hardsigmoid_backward.default,
        lambda: (normal(4), torch.tensor([-4.0, -1.0, 2.0, 3.5]).double()),
        formula=lambda x: x[0] * (x[1].abs() < 3) / 6,
    ),
    Row(aten.silu_backward.default, lambda: (normal(3), normal(3)), formula=lambda x: x[0] * _slope(F.silu, x[1])),
    Row(aten.mish_backward.default, lambda: (normal(3), normal(3)), formula=lambda x: x[0] * _slope(F.mish, x[1])),
    Row(aten.softshrink_backward.default, lambda: (normal(3), apart(3), 0.1)),
    Row(aten.hardshrink_backward.default, lambda: (normal(3), apart(3), 0.1)),
    Row(aten.glu_backward.default, lambda: (normal(3, 2), normal(3, 4), 1)),
    Row(
        aten.log_sigmoid_backward.default,
        lambda: (normal(3), (x := normal(3)), (-x.abs()).exp()),
        active=(0, 1),
        truth="double",
    ),
    Row(aten.mse_loss_backward.default, lambda: (normal(), normal(3), normal(3), 1)),
    Row(aten.huber_loss_backward.default, lambda: (normal(), normal(4), normal(4), 1, 0.8)),
    Row(aten.smooth_l1_loss_backward.default, lambda: (normal(4), normal(4), normal(4), 0, 0.8)),
    Row(
        aten.binary_cross_entropy_backward.default,
        lambda: (normal(), probability(3), probability(3), None, 1),
        truth="double",
    ),
    Row(aten._softmax_backward_data.default, lambda: (normal(3, 4), torch.softmax(normal(3, 4), 1), 1, torch.float64)),
    Row(
        aten._log_softmax_backward_data.default,
        lambda: (normal(3, 4), torch.log_softmax(normal(3, 4), 1), 1, torch.float64),
    ),
    Row(aten.embedding_dense_backward.default, lambda: (normal(4, 2), torch.tensor([0, 2, 2, 1]), 5, -1, False)),
    Row(
        aten.nll_loss_backward.default,
        lambda: (normal(), normal(3, 4), _TARGETS, None, 1, -100, torch.tensor(3.0).double()),
        active=(0,),
    ),
    Row(aten.slice_backward.default, lambda: (normal(2), [5], 0, 1, 5, 2)),
    Row(aten.select_backward.default, lambda: (normal(2), [5, 2], 0, 1)),
    Row(aten.diagonal_backward.default, lambda: (normal(3), [3, 4], 0, 0, 1)),
    Row(aten.unfold_backward.default, lambda: (normal(3, 3), [5], 0, 3, 1)),
    Row(aten._prelu_kernel_backward.default, lambda: (normal(3), apart(3), normal(3)), output=0),
    Row(aten._prelu_kernel_backward.default, lambda: (normal(3), apart(3), normal(3)), output=1),
    # further compositions
    Row(
        aten.as_strided_scatter.default,
        lambda: (normal(3, 4), normal(2, 2), [2, 2], [5, 2], 1),
        formula=lambda x: torch.cat([x[0].reshape(-1), x[1].reshape(-1)])[
            [0, 12, 2, 13, 4, 5, 14, 7, 15, 9, 10, 11]
        ].reshape(3, 4),
    ),
    Row(aten._prelu_kernel.default, lambda: (apart(3, 2), normal(3, 2))),
    Row(aten.lerp.Tensor, lambda: (normal(3), normal(3), inside(3))),
    Row(aten.lerp.Scalar, lambda: (normal(3), normal(3), 0.7)),
    Row(aten.addcdiv.default, lambda: (normal(3), normal(3), positive(3))),
    Row(aten.addcmul.default, lambda: (normal(3), normal(3), normal(3))),
    Row(aten.glu.default, lambda: (normal(3, 4), 1)),
    Row(aten.square.default, lambda: (normal(3),)),
    Row(aten.frac.default, lambda: (apart(3),)),
    Row(aten.rsub.Tensor, lambda: (normal(3), normal(3))),
    Row(aten.nan_to_num.default, lambda: (torch.tensor([1.0, torch.nan, torch.inf]).double(),), truth="double"),
    Row(aten.renorm.default, lambda: (normal(3, 4) * 2, 2, 0, 1.0)),
    Row(aten.div.Tensor_mode, lambda: (normal(3), positive(3)), {"rounding_mode": None}),
    Row(aten.div.Scalar_mode, lambda: (normal(3), 0.7), {"rounding_mode": None}),
    # products, parts, variances
    Row(aten.addmm.default, lambda: (normal(4), normal(2, 3), normal(3, 4)), {"beta": 0.5, "alpha": 2}),
    Row(aten.baddbmm.default, lambda: (normal(5, 2, 4), normal(5, 2, 3), normal(5, 3, 4)), {"beta": 0.5, "alpha": 2}),
    Row(aten.addbmm.default, lambda: (normal(2, 4), normal(5, 2, 3), normal(5, 3, 4)), {"beta": 0.5, "alpha": 2}),
    Row(aten.addmv.default, lambda: (normal(2), normal(2, 3), normal(3)), {"beta": 0.5, "alpha": 2}),
    Row(aten.mv.default, lambda: (normal(2, 3), normal(3))),
    Row(aten.dot.default, lambda: (normal(3), normal(3))),
    Row(
        aten._trilinear.default,
        lambda: (normal(5, 3), normal(2, 3, 4), normal(5, 4), [1, 3], [0], [1, 2], [2, 3]),
        formula=lambda x: torch.einsum("bi,oij,bj->bo", *x),
    ),
    *(Row(op, lambda: (normal(5, 2), 2), output=k) for op in SPLITS for k in (0, 2)),
    *(Row(op, lambda: (normal(5, 2), [1, 4]), output=1) for op in UNEVEN_SPLITS),
    Row(aten.unbind.int, lambda: (normal(3, 2), 1), output=1),
    Row(aten.var.correction, lambda: (normal(4, 3), [0]), {"correction": 1}),
    *(Row(aten.var_mean.correction, lambda: (normal(4, 3), [0]), {"correction": 0}, output=k) for k in (0, 1)),
    *(Row(aten.std_mean.correction, lambda: (normal(4, 3), [0]), {"correction": 0}, output=k) for k in (0, 1)),
    Row(aten.max_pool1d.default, lambda: (normal(2, 3, 9), [3], [2], [1])),
    # norms, by their formulas
    Row(
        aten.native_layer_norm.default,
        lambda: (normal(3, 4), [4], normal(4), normal(4), 0.3),
        formula=lambda x: _scaled(_standard(x[0], [1]), x[1], x[2]),
    ),
    Row(
        aten.native_group_norm.default,
        lambda: (normal(3, 4, 5), normal(4), normal(4), 3, 4, 5, 2, 0.3),
        formula=lambda x: _scaled(_standard(x[0].unflatten(1, (2, 2)), [2, 3]).flatten(1, 2), x[1], x[2]),
    ),
    Row(
        aten._fused_rms_norm.default,
        lambda: (normal(3, 4), [4], normal(4), 0.3),
        formula=lambda x: x[0] * (x[0].square().mean(1, keepdim=True) + 0.3).rsqrt() * x[1],
    ),
    *(
        Row(op, make, formula=lambda x: _scaled(_standard(x[0], [0, 2]), x[1], x[2]), active=(0, 1, 2))
        for op, make in TRAINED_NORMS.items()
    ),
    *(
        Row(op, make, formula=lambda x: _scaled(_by(x[0], *x[3:5]), x[1], x[2]), active=(0, 1, 2))
        for op, make in FIXED_NORMS.items()
    ),
]


def _layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, [4], w, b, 0.3)


NORMS: list[tuple[Any, Callable[..., Tensor], Callable[..., tuple[Any, ...]]]] = [
    # the backward op, its forward, and the op's arguments from x, γ, β, the output's gradient
    (
        aten.native_layer_norm_backward.default,
        _layer,
        lambda x, w, b, g: (g, x, [4], *torch.native_layer_norm(x, [4], w, b, 0.3)[1:], w, b, [True] * 3),
    ),
    (
        aten.native_group_norm_backward.default,
        lambda x, w, b: F.group_norm(x, 2, w, b, 0.3),
        lambda x, w, b, g: (
            *(g, x, *torch.native_group_norm(x, w, b, 3, 4, 1, 2, 0.3)[1:], w),
            *(3, 4, 1, 2, [True] * 3),
        ),
    ),
    (
        aten.native_batch_norm_backward.default,
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 0.3),
        lambda x, w, b, g: (
            *(g, x, w, None, None, *torch.native_batch_norm(x, w, b, None, None, True, 0.1, 0.3)[1:]),
            *(True, 0.3, [True] * 3),
        ),
    ),
    (
        aten._fused_rms_norm_backward.default,
        lambda x, w, b: x * (x.square().mean(1, keepdim=True) + 0.3).rsqrt() * w + b,
        lambda x, w, b, g: (g, x, [4], (x.square().mean(1, keepdim=True) + 0.3).rsqrt(), w, [True] * 2),
    ),
]
