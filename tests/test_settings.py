"""What a forward or a loss goes by besides tensors: after refresh() it is as it is now, wherever it is kept."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.sweep.settings import settings
from tests.capture.test_looked_at import hessian_of
from tests.oracle import error

BETA, HELD = 1.0, [1.0]


@dataclasses.dataclass
class Config:
    scale: float = 1.0


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Shared:
    scale = 1.0


class Net(nn.Module):
    def __init__(self, scale: Callable[[Any], Any], **held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(4, 5), nn.Linear(5, 3), scale
        vars(self).update(held)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.scale(self)).tanh())


X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
Change = Callable[[Any], Any]


def _set(name: str, holder: Callable[[Any], Any] = lambda m: m.c) -> Change:
    return lambda m: setattr(holder(m), name, 2.0)


MODELS: dict[str, tuple[Callable[[], Net], Change]] = {
    "a number": (lambda: Net(lambda m: m.k, k=1.0), _set("k", lambda m: m)),
    "a private number": (lambda: Net(lambda m: m._k, _k=1.0), _set("_k", lambda m: m)),
    "a dataclass": (lambda: Net(lambda m: m.c.scale, c=Config()), _set("scale")),
    "another dataclass": (lambda: Net(lambda m: m.c.scale, c=Config()), lambda m: setattr(m, "c", Config(2.0))),
    "a namespace": (lambda: Net(lambda m: m.c.scale, c=SimpleNamespace(scale=1.0)), _set("scale")),
    "slots": (lambda: Net(lambda m: m.c.scale, c=Slots()), _set("scale")),
    "a class": (lambda: Net(lambda m: m.c.scale, c=Shared()), lambda m: setattr(Shared, "scale", Shared.scale * 2)),
    "inside of objects": (lambda: Net(lambda m: m.c["x"][0].scale, c={"x": [Config()]}), lambda m: setattr(m.c["x"][0], "scale", 2.0)),
    "an array": (lambda: Net(lambda m: float(m.c[0]), c=np.ones(3)), lambda m: m.c.__setitem__(0, 2.0)),
    "a set": (lambda: Net(lambda m: 1.0 + len(m.c), c={1}), lambda m: m.c.add(2)),
    "a deque": (lambda: Net(lambda m: m.c[0], c=deque([1.0])), lambda m: m.c.appendleft(2.0)),
    "bytes": (lambda: Net(lambda m: float(m.c[0]), c=bytearray(b"\x01")), lambda m: m.c.__setitem__(0, 3)),
    "a tensor in a list": (lambda: Net(lambda m: m.c[0], c=[torch.ones(1).double()]), lambda m: m.c.__setitem__(0, torch.full((1,), 2.0).double())),
    "a global": (lambda: Net(lambda m: BETA), lambda m: globals().update(BETA=BETA * 2)),
    "a global list": (lambda: Net(lambda m: HELD[0]), lambda m: HELD.__setitem__(0, HELD[0] * 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_forwards_settings(name: str) -> None:
    make, change = MODELS[name]
    model = make()
    H = dh.HessianOperator(model, (X, Y))
    v = torch.ones(H.shape[0]).double()
    before, seen = H @ v, settings(model, None, set())
    H.refresh()
    assert torch.equal(H @ v, before) and settings(model, None, set()) == seen
    change(model)
    expected = hessian_of(model, X, Y) @ v
    assert error(before, expected) > 1e-3
    assert error(H.with_batch((X, Y)) @ v, expected) < 1e-12
    H.refresh()
    assert error(H @ v, expected) < 1e-12


class Functor:
    def __init__(self) -> None:
        self.k, self.c = 1.0, Config()

    def __call__(self, o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) + self.k * self.c.scale * o.square().mean()


def _by_config(o: Tensor, t: Tensor, c: Config) -> Tensor:
    return F.cross_entropy(o, t) + c.scale * o.square().mean()


def _closure(c: Config) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, t: _by_config(o, t, c)


def _by_default(o: Tensor, t: Tensor, k: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return F.cross_entropy(o, t) + k[0] * o.square().mean()


_CONFIG = Config()


def _by_global(o: Tensor, t: Tensor) -> Tensor:
    return _by_config(o, t, _CONFIG)


_FUNCTORS, _CONFIGS = (Functor(), Functor()), (Config(), Config())
LOSSES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "a functor's number": (_FUNCTORS[0], lambda: setattr(_FUNCTORS[0], "k", 2.0)),
    "a functor's config": (_FUNCTORS[1], lambda: setattr(_FUNCTORS[1].c, "scale", 2.0)),
    "a cell's config": (_closure(_CONFIGS[0]), lambda: setattr(_CONFIGS[0], "scale", 2.0)),
    "a partial's config": (functools.partial(_by_config, c=_CONFIGS[1]), lambda: setattr(_CONFIGS[1], "scale", 2.0)),
    "a global's config": (_by_global, lambda: setattr(_CONFIG, "scale", 2.0)),
    "a default": (_by_default, lambda: _by_default.__defaults__[0].__setitem__(0, 2.0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_settings(name: str) -> None:
    loss, change = LOSSES[name]
    model = Net(lambda m: 1.0)
    H = dh.HessianOperator(model, (X, Y), loss=loss)
    v = torch.ones(H.shape[0]).double()
    before = H @ v
    change()
    expected = hessian_of(model, X, Y, loss) @ v
    assert error(before, expected) > 1e-3
    assert error(H.with_batch((X, Y)) @ v, expected) < 1e-12
    H.refresh()
    assert error(H @ v, expected) < 1e-12
