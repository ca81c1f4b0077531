"""What Python reads of tensors is part of a graph: where it changes, the forward is captured anew, not replayed wrongly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh


def _experts(h: Tensor) -> Tensor:
    """Tokens sorted by expert, and split by counts that are Python's."""
    expert = h.argmax(1)
    order = expert.argsort(stable=True)
    parts = h[order].split(torch.bincount(expert, minlength=4).tolist())
    return torch.cat([p.sin() * (k + 1) for k, p in enumerate(parts)])[order.argsort()]


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "counts of experts": _experts,
    "a number by NumPy": lambda h: h.tanh() / float(np.abs(h.detach().numpy()).max()),
    "an array": lambda h: h.sin() * (1 + np.asarray(h.detach())[0, 0] ** 2),
    "a branch on a list": lambda h: h.sin() if h[:, 0].tolist()[0] > 0 else h.cos(),
    "flags": lambda h: torch.stack([r.sin() if b else r.cos() for r, b in zip(h, (h[:, 0] > 0).tolist(), strict=True)]),
    "how many a mask leaves": lambda h: h.sin() / (1 + len(h[h[:, 0] > 0])),
    "how many are positive": lambda h: h.sin() / (1 + (h > 0).nonzero().shape[0]),
    "how many differ": lambda h: h.sin() * len((h > 0).sum(1).unique()),
    "whether a mask is empty": lambda h: h.sin() if h[h > 1.0].numel() == 0 else h.cos(),
    "the longest count": lambda h: h.sin() * torch.bincount((h > 0).sum(1)).numel(),
    "places to split at": lambda h: torch.cat([p.sin() * (k + 1) for k, p in enumerate(h.tensor_split((h[:, 0] > 0).sum().view(1)))]),
}  # fmt: skip


class _Net(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.read, self.b = nn.Linear(4, 4).double(), read, nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.read(self.a(x)))


def hessian_of(
    net: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Tensor:
    """By double-backward, a parameter after the other."""
    own = list(net.parameters())
    first = torch.autograd.grad(loss(net(x), y), own, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = [torch.autograd.grad(g, own, retain_graph=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 4, generator=generator).double(), torch.tensor([0, 3, 1, 2, 1, 0])) for _ in range(3)]


def _close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("name", READ)
def test_what_was_read_is_not_used_again_for_other_values(name: str) -> None:
    net, batches = _Net(READ[name]), _batches()
    expected = [hessian_of(net, x, y) for x, y in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        H = dh.HessianOperator(net, batches[0])
        _close(H.dense(), expected[0])
        for batch, truth in zip(batches[1:], expected[1:], strict=True):
            _close(H.with_batch(batch).dense(), truth)
        _close(dh.HessianOperator(net, batches).dense(), sum(expected) / 3)
        with torch.no_grad():
            net.a.weight.mul_(-1.7)
            net.a.bias.add_(0.3)
        H.refresh()
        _close(H.dense(), hessian_of(net, *batches[0]))


READ_OF_TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classes as a list": lambda o, y: -torch.stack([o.log_softmax(1)[k, c] for k, c in enumerate(y.tolist())]).mean(),
    "how many are of a class": lambda o, y: F.cross_entropy(o, y) / (1 + (y == 1).nonzero().shape[0]),
    "how many classes": lambda o, y: F.cross_entropy(o, y) * y.unique().numel(),
}


@pytest.mark.parametrize("name", READ_OF_TARGETS)
def test_targets_that_a_loss_reads(name: str) -> None:
    loss, net = READ_OF_TARGETS[name], _Net(torch.tanh)
    (x, y), (z, _), _ = _batches()
    other: Any = (z, torch.tensor([3, 3, 2, 0, 0, 3]))
    H = dh.HessianOperator(net, (x, y), loss=loss)
    _close(H.dense(), hessian_of(net, x, y, loss))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _close(H.with_batch(other).dense(), hessian_of(net, *other, loss))


def test_a_parameter_that_is_read() -> None:
    class Scaled(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * max(self.b.bias.tolist())

    net, (batch, *_) = Scaled(torch.tanh), _batches()
    H = dh.HessianOperator(net, batch, param_filter="**.weight")
    with torch.no_grad():
        net.b.bias.add_(1.0)
    H.refresh()
    with pytest.warns(UserWarning, match="captured anew"):
        H @ torch.ones(H.shape[0]).double()
    fresh = dh.HessianOperator(net, batch, param_filter="**.weight")
    _close(H.dense(), fresh.dense())
    assert float(H.loss) == pytest.approx(float(F.cross_entropy(net(batch[0]), batch[1])), rel=1e-12)


def test_numbers_that_move_by_little_count_in_double_precision() -> None:
    net, (batch, *_) = _Net(lambda h: h.sin() * float(h.detach().max())), _batches()
    H = dh.HessianOperator(net, batch)
    with torch.no_grad():
        net.a.weight.mul_(1 + 1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        H.refresh()
    _close(H.dense(), hessian_of(net, *batch))


@pytest.mark.parametrize("kind", [list, tuple])
def test_lengths_that_become_tensors_out_of_sight(kind: Callable[[list[int]], Any]) -> None:
    net, (x, y) = _Net(torch.tanh), _batches()[0]

    def dense(lengths: Callable[[list[int]], Any]) -> Tensor:
        def loss(output: Tensor, y: Tensor) -> Tensor:
            steps = output.log_softmax(-1)[:, None]  # six steps of one sample
            return F.ctc_loss(steps, y[None, 1:3], lengths([6]), lengths([2]))

        return dh.HessianOperator(net, (x, y), loss=loss).dense()

    _close(dense(kind), dense(torch.tensor))  # which tests of losses hold against central differences


class _Normalized(nn.Module):
    """Python reads normalized values that rounding alone decides: all samples are the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.double()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = self.norm(self.a(x))
        return self.b(h * (1 + len(h.tolist())))


def test_values_that_rounding_decides_are_looked_at_once() -> None:
    net, (_, y) = _Normalized(), _batches()[0]
    batches = [(torch.full((6, 4), 0.3 + k).double(), y) for k in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches:
            _close(dh.HessianOperator(net, batch, verify="product").dense(), hessian_of(net, *batch))
        H = dh.HessianOperator(net, batches[0], memory=1)
        v = torch.ones(H.shape[0]).double()
        once = H @ v
        runs = net.runs
        assert torch.equal(H @ v, once)
    assert net.runs == runs


def test_of_batches_that_share_a_graph_each_is_looked_at_once() -> None:
    net, (_, y) = _Normalized(), _batches()[0]
    batches = [(torch.full((6, 4), 0.3 + k).double(), y) for k in range(3)]
    H = dh.HessianOperator(net, batches, memory=1)
    v = torch.ones(H.shape[0]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        once = H @ v
    runs = net.runs
    assert torch.equal(H @ v, once)
    assert net.runs == runs
    _close(once, sum(hessian_of(net, *batch) for batch in batches) @ v / 3)


class _Branching(nn.Module):
    """Goes one way or the other by the sign of a number."""

    def __init__(self, number: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.number, self.runs = number, 0
        self.a, self.norm, self.b = nn.Linear(4, 4), norm, nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = self.norm(self.a(x))
        return self.b(h.cos() if self.number(h) > 0 else h.sin())


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "a sum": lambda h: h.sum(),
    "a mean, doubled": lambda h: h.mean() * 2,
    "a sum, rounded down": lambda h: h.sum().floor() + 0.5,
    "the larger of two": lambda h: torch.stack([h[:, 0].sum(), h[:, 1].sum()]).argmax(),
    "an order": lambda h: h.sum(0).sort()[1][0],
    "how many are positive": lambda h: (h.sum(0, keepdim=True) > 0).nonzero().shape[0] - 2,
}


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in NUMBERS), ("a sum", True)])
def test_a_branch_that_rounding_decides_is_the_models(name: str, compiled: bool) -> None:
    """Sums of normalized values are rounding of 0."""
    for seed in (2,) if compiled else range(12):  # of 12, four to six go wrong if nobody asks
        torch.manual_seed(seed)
        net = _Branching(NUMBERS[name], nn.BatchNorm1d(4) if seed % 2 else nn.GroupNorm(2, 4))
        (x, y), options = _batches()[0], {"compile": True} if compiled else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            H = dh.HessianOperator(net, (x, y), **options)
            for batch in ((x * -1.3 + 0.2, y), (x * 0.4, y)):
                other = H.with_batch(batch)
                v = torch.ones(H.shape[0]).double()
                _close(other @ v, hessian_of(net, *batch) @ v)


def test_a_branch_that_is_clear_is_not_asked_about() -> None:
    torch.manual_seed(0)
    net, batches = _Branching(lambda h: h.abs().sum() + h.argmax(1).sum(), nn.BatchNorm1d(4)), _batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        H = dh.HessianOperator(net, batches[0])
        v, others = torch.ones(H.shape[0]).double(), [H.with_batch((x, batches[0][1])) for x, _ in batches[1:]]
        runs = net.runs
        for other in others:
            other @ v
    assert net.runs == runs
