"""What a run leaves behind: nothing, to the bit, whatever the forward changes and whether it fails."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from tests.capture.common import X, Y


class Fails(nn.Module):
    """Changes everything that it can, then fails if it is told to."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fail, self.seen, self.cache = fail, [0], {"k": [1]}
        self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(4, 3), nn.BatchNorm1d(4)
        self.register_buffer("k", torch.tensor(0.0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        self.k += 1
        self.seen.append(self.k)
        self.cache["k"].append(2)
        self.cache["new"] = x
        self.a.weight.data = self.a.weight.data * 2
        with torch.no_grad():
            self.b.bias.add_(1.0)
        self.extra = x
        np.random.rand()
        torch.rand(1)
        self.a(x).sum().backward(retain_graph=True)
        if self.fail:
            raise ValueError("as told")
        return self.b(self.norm(self.a(x)).sin())


def _picture(model: Fails) -> Any:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {n: (id(t), t.data_ptr(), t._version, t.requires_grad, t.detach().clone()) for n, t in tensors.items()}
    return kept, list(model.seen), copy.deepcopy(model.cache), sorted(vars(model)), [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ], [p.grad for p in model.parameters()]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "capture": lambda m, b: dh.capture(m, b),
    "structure": lambda m, b: dh.structure(m, b),
    "analyze": lambda m, b: dh.analyze(m, b, points=["a", "norm"]),
    "per sample": lambda m, b: dh.analyze(m, b, batch_mode="per_sample"),
    "operator": lambda m, b: dh.HessianOperator(m, b).dense(),
    "hvp": lambda m, b: dh.hvp(m, b, torch.ones(39).double()),
    "GGN": lambda m, b: dh.GGNOperator(m, b) @ torch.ones(39).double(),
    "no proof": lambda m, b: dh.HessianOperator(m, b, verify="none").dense(),
    "profile": lambda m, b: dh.profile(m, b),
    "unknown point": lambda m, b: dh.analyze(m, b, points=["nowhere"]),
    "unknown output": lambda m, b: dh.analyze(m, b, output="nowhere"),
    "wrong vector": lambda m, b: dh.hvp(m, b, torch.ones(3).double()),
    "bad loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: o),
    "failing loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: o.nowhere),
    "constant loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: torch.ones(()).double()),
}


@pytest.mark.parametrize("fail", [False, True], ids=["", "failing"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_of_a_run_stays_behind(call: str, training: bool, fail: bool) -> None:
    model, x = Fails(fail).train(training), X.clone()
    before, states = _picture(model), (torch.get_rng_state(), np.random.get_state()[1].copy())
    try:
        CALLS[call](model, (x, Y))
        assert not fail
    except errors.DagHesseError:
        pass
    assert _same(_picture(model), before)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


class _Counted:
    """What classes of containers may have besides their items."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.hits, self.log = 0, [0]


class _Mapping(_Counted, dict):
    pass


class _Items(_Counted, list):
    pass


class _Members(_Counted, set):
    pass


class _Queue(_Counted, deque):
    pass


class _Slotted(dict):
    __slots__ = ("__own", "hits", "new")

    def __init__(self) -> None:
        self.hits, self.__own = 0, 0

    def hit(self) -> None:
        self.hits, self.new = self.hits + 1, 1
        self.__own += 1

    @property
    def picture(self) -> Any:
        return self.hits, self.__own, hasattr(self, "new")


class _Equal:
    """Equal to all of its kind."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Equal)

    def __hash__(self) -> int:
        return 1


class _Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        self.counted = [_Mapping({1: 2}), _Items([1]), _Members([1]), _Queue([1]), OrderedDict(a=1)]
        self.counted[-1].hits, self.counted[-1].log = 0, [0]
        self.slotted, self.plain = _Slotted(), OrderedDict(a=1)
        self.made = defaultdict(list)
        self.queue, self.members = deque([_Equal(), torch.zeros(2)]), {_Equal()}

    def forward(self, x: Tensor) -> Tensor:
        for each in self.counted:
            each.hits += 1
            each.log.append(each.hits)
        self.slotted.hit()
        self.plain.hits = 1
        self.made.default_factory = int
        self.queue.popleft()
        self.queue.appendleft(_Equal())
        self.members.clear()
        self.members.add(_Equal())
        return self.layer(x)

    def picture(self) -> Any:
        counted = [(dict(vars(each)), list(each.log)) for each in self.counted]
        items = [id(each) for kept in (self.queue, self.members) for each in kept]
        return counted, items, self.slotted.picture, dict(vars(self.plain)), self.made.default_factory


@pytest.mark.parametrize("call", ["capture", "analyze", "operator"])
def test_containers_come_out_with_their_own_attributes_and_items(call: str) -> None:
    model = _Keeps()
    before = model.picture()
    run = {"capture": dh.capture, "analyze": dh.analyze, "operator": dh.HessianOperator}[call]
    run(model, (X, Y))
    assert model.picture() == before
