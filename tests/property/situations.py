"""Steps with state, writes, draws, branches, complex numbers, derivatives and ops without a rule, for random models.

A step is called with the model, whose parts it may use, and its inputs. Those of ``WITHIN`` write to nothing that
another step can see but buffers and parameters of their own; those of ``ACROSS`` write to what they are given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.property.steps import across, choices, derivatives, draws, numbers, state
from tests.property.steps.parts import WIDTH, Cube, Pair, Step, Surrogate


def _of(op: Callable[[Tensor], Tensor]) -> Step:
    return lambda m, x: op(x)


WITHIN: dict[str, Step] = {
    "counter": state.counter,
    "counter, copied": state.counter_copied,
    "moving average": state.moving_average,
    "moving average without grad": state.moving_average_no_grad,
    "state with a past": state.kept_with_past,
    "list of states": state.kept_in_list,
    "weight masked": state.weight_masked,
    "weight assigned": state.weight_assigned,
    "scale written": state.scale_written,
    "scale added to": state.scale_added,
    "written behind": state.written_behind,
    "filled behind": state.filled_behind,
    "data exchanged": state.exchanged,
    "through views": state.through_views,
    "pairs of rows": state.pairs_of_rows,
    "diagonal": state.diagonal,
    "chunks": state.chunks,
    "split, written": state.split_written,
    "strided": state.strided,
    "zeros filled": state.zeros_filled,
    "accumulated": state.accumulated,
    "addmm": state.addmm,
    "foreach": state.foreach,
    "out": state.out,
    "activations in place": state.relu_and_co,
    "fill": state.fill,
    "masked write": choices.masked_write,
    "masked scale": choices.masked_scale,
    "index_put": choices.index_put,
    "rows": choices.rows,
    "masked_scatter": choices.masked_scatter,
    "selected sum": choices.selected_sum,
    "branch": choices.branch,
    "item": choices.item,
    "loop": choices.loop,
    "to list": choices.to_list,
    "chosen layer": choices.chosen_layer,
    "experts": choices.experts,
    "looked up": choices.looked_up,
    "one hot": choices.one_hot,
    "straight through": choices.straight_through,
    "hard gate": choices.hard_gate,
    "without grad": choices.without_grad,
    "data": choices.data,
    "max removed": choices.max_removed,
    "fft": numbers.fft,
    "power spectrum": numbers.power_spectrum,
    "rotated": numbers.rotated,
    "modulus": numbers.modulus,
    "complex, written": numbers.complex_written,
    "complex weights": numbers.wirtinger,
    "solve": numbers.solve,
    "inverse": numbers.inverse,
    "matrix_exp": numbers.matrix_exp,
    "cholesky": numbers.cholesky,
    "cell": numbers.cell,
    "multihead": numbers.multihead,
    "attention": numbers.flash,
    "batch norm": lambda m, x: m.norm(x),
    "cube": lambda m, x: Cube.apply(x, 0.3),
    "pair": lambda m, x: torch.mul(*Pair.apply(x, m.scale)) + 0.5 * x,
    "surrogate": lambda m, x: Surrogate.apply(x) * 0.5 + x,
    "derivative": derivatives.derivative,
    "inner step": derivatives.inner_step,
    "first-order step": derivatives.first_order_step,
    "torch.func.grad": derivatives.functional,
    "torch.func.jvp": derivatives.pushed,
    "vmap": derivatives.vmapped,
    "checkpoint": derivatives.checkpointed,
    "noise": draws.noise,
    "bernoulli": draws.bernoulli,
    "reparametrized": draws.reparametrized,
    "shuffled": draws.shuffled,
    "dropout": _of(lambda x: F.dropout(x, 0.4)),
    "dropout unused": draws.dropout_unused,
    "alpha dropout": _of(lambda x: F.alpha_dropout(x, 0.3, training=True)),
    "rrelu": _of(lambda x: F.rrelu(x, training=True)),
    "gumbel": _of(lambda x: F.gumbel_softmax(x, hard=True)),
    "sampled": draws.sampled,
    "logcumsumexp": _of(lambda x: torch.logcumsumexp(x, 1)),
    "cumprod": _of(lambda x: torch.cumprod(x.tanh() + 1.5, 1)),
    "prod": _of(lambda x: x + x.tanh().prod(-1, keepdim=True)),
    "cummax": _of(lambda x: torch.cummax(x, 1)[0]),
    "sort": _of(lambda x: torch.sort(x, 1, descending=True)[0] * torch.arange(1.0, 4.0).to(x)),
    "median": _of(lambda x: x - x.median(-1, keepdim=True)[0]),
    "quantile": _of(lambda x: x - torch.quantile(x, 0.4, -1, keepdim=True)),
    "scatter_reduce": _of(
        lambda x: x.scatter_reduce(1, torch.tensor([[0, 0, 2]], device=x.device).expand(len(x), -1), x.cos(), "prod")
    ),
    "scatter amax": _of(
        lambda x: x.scatter_reduce(1, torch.tensor([[0, 0, 2]], device=x.device).expand(len(x), -1), x.cos(), "amax")
    ),
    "scatter mean": _of(
        lambda x: x.scatter_reduce(1, torch.tensor([[0, 0, 2]], device=x.device).expand(len(x), -1), x.sin(), "mean")
    ),
    "normalize": _of(lambda x: F.normalize(x, p=3.0, dim=-1, eps=1e-2)),
    "cosine": _of(lambda x: x * F.cosine_similarity(x, x.sin() + 0.5, dim=-1)[:, None]),
    "triple product": _of(lambda x: torch.einsum("bi,bj,bk->bk", x, x.sin(), x)),
    "kron": _of(lambda x: torch.kron(x, x.mean(0)[None])[:, ::WIDTH]),
    "conv": lambda m, x: F.conv1d(x[:, None], m.inner.weight[:1, None], padding=1)[:, 0],
    "pool": _of(lambda x: F.max_pool1d(x[:, None], 2, 1, padding=1)[:, 0, :WIDTH]),
    "interpolate": _of(lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode="linear")[:, 0, ::2]),
    "group norm": _of(lambda x: F.group_norm(x[:, :, None].expand(-1, -1, 2) * x[:, :1, None], 1, eps=0.1)[:, :, 0]),
    "trapezoid": _of(lambda x: x + torch.trapezoid(x, dim=1)[:, None]),
    "atan2": _of(lambda x: torch.atan2(x, 2.0 + x.cos())),
    "lgamma": _of(lambda x: torch.lgamma(1.5 + x * x)),
    "bessel": _of(lambda x: torch.special.i1(x.tanh()) + torch.special.bessel_j0(x.detach())),
    "glu": _of(lambda x: F.glu(numbers.four(x).repeat(1, 2)[:, : 2 * WIDTH])),
    "pixel": _of(lambda x: x.unflatten(1, (1, WIDTH)).expand(-1, 2, -1).flatten(1)[:, 1 : WIDTH + 1]),
    "repeat_interleave": _of(lambda x: torch.repeat_interleave(x, 2, 1)[:, 2 : WIDTH + 2]),
    "take_along": _of(lambda x: torch.take_along_dim(x, x.argsort(1), 1)),
    "renorm": _of(lambda x: torch.renorm(x, 2, 0, 0.8)),
    "nan_to_num": _of(lambda x: torch.nan_to_num(torch.where(x > 0, x, torch.nan)) + x),
    "eigenvalues": _of(lambda x: x @ torch.linalg.eigvalsh(x.mT @ x + torch.diag(torch.arange(3.0)).to(x)).diag()),
    "trace": _of(lambda x: x * torch.trace(x @ x.mT)),
    "householder": _of(lambda x: x - x.flip(0) @ x.mT @ x * 0.1),
}


ACROSS: dict[str, Step] = {
    "add_": lambda m, x: x.add_(0.3),
    "mul_": lambda m, x: x.mul_(0.7),
    "rows written": across.rows_written,
    "returns a view": across.returns_a_view,
    "sees itself": across.sees_itself,
    "unseen": across.unseen,
    "stored": across.stored,
    "identity": lambda m, x: x,
    "view": lambda m, x: x.view(-1).view(x.shape),
    "relu_": lambda m, x: F.relu_(x),
    "tanh_": lambda m, x: x.tanh_(),
    "sigmoid_": lambda m, x: x.sigmoid_(),
    "flipped": lambda m, x: x.flip(1),
    "wave": lambda m, x: x.sin(),
    "masked_fill_": lambda m, x: x.masked_fill_(x.detach() > 0.7, 0.2),
    "detached view": lambda m, x: x.detach()[:, :1] + x,
    "copy": lambda m, x: torch.empty_like(x).copy_(x),
    "neg_ of a part": lambda m, x: (x[:1].neg_(), x * 1.0)[1],
    "zero_ of a column": lambda m, x: (x[:, 2].zero_(), x)[1],
}
ACROSS_TWO: dict[str, Step] = {
    "added below": across.added_below,
    "copied over": lambda m, x, y: x.copy_(y),
    "column set": lambda m, x, y: (x[:, 0].copy_(y[:, 1]), x)[1],
    "product": lambda m, x, y: x * y,
    "lerp_": lambda m, x, y: x.lerp_(y, 0.3),
    "larger, scaled": lambda m, x, y: torch.maximum(x, y).mul_(0.9),
}
