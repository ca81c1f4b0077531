"""Products in double precision of models that are not, and operators on other batches without a new capture."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse._capture import run
from tests.oracle import error
from tests.test_inputs import dense


def _net(training: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3)
    return nn.Sequential(*layers).train(training)


def _batch(size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def _truth(model: nn.Module, batch: tuple[Tensor, Tensor], loss: Callable[..., Tensor] = F.cross_entropy) -> Tensor:
    wide = copy.deepcopy(model).double()
    return dense(wide, lambda m: loss(m(batch[0].double()), batch[1]))


@pytest.mark.parametrize("training", [False, True])
def test_double_precision_follows_the_model(training: bool) -> None:
    model, batch = _net(training), _batch()
    state = copy.deepcopy(model.state_dict())
    H = dh.HessianOperator(model, batch, float64=True)
    assert H.dtype == torch.float64 and H.gradient.dtype == torch.float64
    assert error(H.dense(), _truth(model, batch)) < 1e-12
    assert error(dh.HessianOperator(model, batch).dense().double(), _truth(model, batch)) > 1e-9  # float32 is not that
    assert all(torch.equal(x, state[n]) and x.dtype == state[n].dtype for n, x in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(errors.StaleError, match=r"parameter '0.weight' changed"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    H.refresh()
    assert error(H.dense(), _truth(model, batch)) < 1e-12
    batch[0].mul_(0.5)
    with pytest.raises(errors.StaleError, match="batch's tensor 0"):
        H.loss  # noqa: B018
    H.refresh(batch)
    assert error(H.dense(), _truth(model, batch)) < 1e-12
    model.train(not training)
    with pytest.raises(errors.StaleError, match="training flags"):
        H.gradient  # noqa: B018
    H.refresh()
    assert error(H.dense(), _truth(model, batch)) < 1e-12
    if training:  # statistics are what it evaluates with now
        model[1].running_var.mul_(2)
        with pytest.raises(errors.StaleError, match="running_var"):
            H.diagonal()
        H.refresh()
        assert error(H.dense(), _truth(model, batch)) < 1e-12


_WEIGHTS = torch.tensor([1.0, 2.0, 0.3])


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(weight=_WEIGHTS), functools.partial(F.cross_entropy, weight=_WEIGHTS)]
)
def test_tensors_of_a_loss_are_widened(loss: Any) -> None:
    model, batch = _net(), _batch()
    found = dh.HessianOperator(model, batch, loss=loss, float64=True).dense()
    assert error(found, _truth(model, batch, functools.partial(F.cross_entropy, weight=_WEIGHTS.double()))) < 1e-12
    assert _WEIGHTS.dtype == torch.float32


def test_double_precision_of_loaders_parts_and_other_operators() -> None:
    model, (x, y) = _net(), _batch(8)
    expected = _truth(model, (x, y))
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for given in (loader, list(loader), iter(loader), (x.numpy(), y.numpy())):
        assert error(dh.HessianOperator(model, given, float64=True).dense(), expected) < 1e-12
    streamed = dh.HessianOperator(model, loader, float64=True, memory=1)
    v = torch.ones(len(expected), dtype=torch.float64)
    assert error(streamed @ v, expected @ v) < 1e-12
    gn, tensor = dh.HessianOperator(model, (x, y), float64=True).parts(v)
    assert error(gn + tensor, expected @ v) < 1e-12
    assert error(dh.GGNOperator(model, (x, y), float64=True) @ v, gn) < 1e-12
    assert error(dh.hvp(model, (x, y), v, float64=True), expected @ v) < 1e-12
    some = dh.HessianOperator(model, (x, y), params=[model[3].bias, model[0].weight], float64=True)
    assert some.names == ("3.bias", "0.weight")
    n = sum(p.numel() for p in model.parameters())
    place = [*range(n - 3, n), *range(20)]
    assert error(some.dense(), expected[place][:, place]) < 1e-12
    act = dh.HessianOperator(model, (x, y), space="activation", points=["0", "2"], float64=True)
    wide = dh.HessianOperator(copy.deepcopy(model).double(), (x.double(), y), space="activation", points=["0", "2"])
    assert error(act.dense(), wide.dense()) < 1e-12
    for kind in ("empirical", "mc"):
        found = dh.FisherOperator(model, (x, y), kind=kind, float64=True).dense()
        near = dh.FisherOperator(model, (x, y), kind=kind).dense().double()
        assert 1e-10 < error(found, near) < 1e-4
    wide_fisher = dh.FisherOperator(copy.deepcopy(model).double(), (x.double(), y)).dense()
    assert error(dh.FisherOperator(model, (x, y), float64=True).dense(), wide_fisher) < 1e-12


def test_a_model_that_cannot_be_copied() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.scale = self.layer.weight.sum() * 0 + 1  # no leaf

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale.detach()

    with pytest.raises(errors.OptionError, match=r"model.double\(\)"):
        dh.HessianOperator(Held(), _batch(), float64=True)
    with pytest.raises(errors.OptionError, match="float64=1"):
        dh.HessianOperator(_net(), _batch(), float64=1)  # type: ignore[arg-type]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often a model was captured."""
    counted, plain = [0], run.captured

    def counting(*args: Any, **options: Any) -> Any:
        counted[0] += 1
        return plain(*args, **options)

    monkeypatch.setattr(run, "captured", counting)
    yield counted


def test_another_batch_takes_no_capture(captures: list[int]) -> None:
    model = _net().double()
    batches = [(x.double(), y) for x, y in (_batch(6, k) for k in range(3))]
    H = dh.HessianOperator(model, batches[0])
    before = H.dense()
    assert captures == [1]
    other = H.with_batch(batches[1])
    assert error(other.dense(), dense(model, lambda m: F.cross_entropy(m(batches[1][0]), batches[1][1]))) < 1e-12
    assert other.loss == pytest.approx(float(F.cross_entropy(model(batches[1][0]), batches[1][1])), rel=1e-12)
    assert type(other) is dh.HessianOperator and torch.equal(H.dense(), before) and captures == [1]
    H.refresh(batch=batches[2])
    assert error(H.dense(), dense(model, lambda m: F.cross_entropy(m(batches[2][0]), batches[2][1]))) < 1e-12
    assert captures == [1]
    larger = (torch.cat([batches[0][0], batches[1][0]]), torch.cat([batches[0][1], batches[1][1]]))
    both = H.with_batch(batches[:2])
    assert captures == [1]
    expected = dense(model, lambda m: F.cross_entropy(m(larger[0]), larger[1]))
    assert error(both.dense(), expected) < 1e-12
    assert error(H.with_batch(larger).dense(), expected) < 1e-12
    assert captures == [2]  # of another size
    with torch.no_grad():
        model[0].weight.mul_(1.2)
    now = H.with_batch(batches[0])
    assert error(now.dense(), dense(model, lambda m: F.cross_entropy(m(batches[0][0]), batches[0][1]))) < 1e-12
    assert captures == [2]
    model.train()
    in_training = H.with_batch(batches[0])
    assert error(in_training.dense(), dense(model, lambda m: F.cross_entropy(m(batches[0][0]), batches[0][1]))) < 1e-11
    assert captures[0] > 2


def test_other_batches_of_every_operator() -> None:
    model = _net()
    one, two = _batch(6, 1), _batch(6, 2)
    for kind, options in (
        (dh.GGNOperator, {}),
        (dh.TensorOperator, {}),
        (dh.FisherOperator, {}),
        (dh.FisherOperator, {"kind": "mc"}),
        (dh.HessianOperator, {"float64": True}),
        (dh.HessianOperator, {"space": "activation"}),
        (dh.HessianOperator, {"params": [model[3].bias, model[0].weight]}),
    ):
        H = kind(model, one, **options)
        v = torch.randn(H.shape[0], dtype=H.dtype)
        first = H @ v
        assert error(H.with_batch(two) @ v, kind(model, two, **options) @ v) < 1e-5
        assert torch.equal(H @ v, first)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(h.tanh() if x.sum() > 0 else h.sigmoid() * h)


def test_a_batch_that_goes_another_way_is_captured_anew() -> None:
    model, y = Branching(), torch.arange(6) % 3
    x = torch.randn(6, 4, dtype=torch.float64).abs()
    H = dh.HessianOperator(model, (x, y))
    with pytest.warns(UserWarning):
        found = H.with_batch((-x, y)).dense()
    assert error(found, dense(model, lambda m: F.cross_entropy(m(-x), y))) < 1e-12


def test_a_bad_batch_leaves_the_operator_as_it_was() -> None:
    model, (x, y) = _net(), _batch()
    H = dh.HessianOperator(model, (x, y))
    before = H.dense()
    bad = torch.where(torch.arange(24).reshape(6, 4) == 3, float("nan"), x)
    for batch, kind in (
        ((bad, y), errors.NonFiniteError),
        ((x.double(), y), errors.CaptureError),
        ((x.to("meta"), y), errors.BatchError),
        (x, errors.BatchError),
    ):
        for call in (H.with_batch, H.refresh):
            with pytest.raises(kind):
                call(batch)
            assert torch.equal(H.dense(), before)
    labels = H.with_batch((x, y + 3))
    with pytest.warns(UserWarning) as told, pytest.raises(errors.LossError, match="labels from 3 to 5"):
        labels.dense()
    assert not any("options.py" in str(one.message) for one in told)  # a line of the user's, or none
    assert torch.equal(H.dense(), before)
