"""Fisher operators against per-sample gradients of autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from tests.oracle import error


def _net(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=generator).double(), torch.arange(8) % 3


def _empirical(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rows = []
    for k in range(len(x)):
        own = torch.autograd.grad(loss(model(x[k : k + 1]), y[k : k + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in own]))
    jacobian = torch.stack(rows)
    return jacobian.T @ jacobian / len(x)


@pytest.mark.parametrize("loss", [None, F.cross_entropy, nn.MultiMarginLoss()])
def test_empirical_fisher(loss: Any) -> None:
    model, (x, y) = _net(), _batch()
    expected = _empirical(model, x, y, loss or F.cross_entropy)
    assert error(dh.FisherOperator(model, (x, y), loss=loss).dense(), expected) < 1e-12
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    for memory in (None, 1):
        found = dh.FisherOperator(model, loader, loss=loss, memory=memory)
        assert error(found @ torch.eye(len(expected)).double(), expected) < 1e-12
    targets = torch.randn(8, 3).double()
    of_squares = dh.FisherOperator(model, (x, targets))
    assert error(of_squares.dense(), _empirical(model, x, targets, F.mse_loss)) < 1e-12
    few = dh.FisherOperator(model, (x, y), loss=loss, params=["2.bias"])
    assert error(few.dense(), expected[-3:, -3:]) < 1e-12


@pytest.mark.parametrize("targets", ["classes", "numbers"])
def test_the_mean_of_drawn_fishers_is_gauss_newton(targets: str) -> None:
    model, (x, y) = _net(), _batch()
    batch = (x, y if targets == "classes" else torch.randn(8, 3).double())
    expected = dh.GGNOperator(model, batch).dense()
    found = [dh.FisherOperator(model, batch, kind="mc", seed=seed).dense() for seed in range(60)]
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0) / 60**0.5
    assert float((((mean - expected) / spread.clamp_min(1e-12)) ** 2).mean()) < 2.0
    many = dh.FisherOperator(model, batch, kind="mc", samples=300).dense()
    assert error(many, expected) < 0.25
    assert torch.equal(found[3], dh.FisherOperator(model, batch, kind="mc", seed=3).dense())


def test_drawing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    dh.FisherOperator(model, _batch(), kind="mc", samples=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_sequences_and_loaders() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    ids = torch.randint(0, 7, (4, 5))
    found = dh.FisherOperator(model, (ids, ids))

    def mean(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    assert error(found.dense(), _empirical(model, ids, ids, mean)) < 1e-12
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, ids), batch_size=2)
    drawn = dh.FisherOperator(model, loader, kind="mc", memory=1)
    v = torch.ones(drawn.shape[0]).double()
    assert torch.equal(drawn @ v, drawn @ v)


def test_what_a_fisher_operator_refuses() -> None:
    model, batch = _net(), _batch()
    refused: list[dict[str, Any]] = [
        {"kind": "exact"},
        {"samples": 0, "kind": "mc"},
        {"samples": 2},
        {"seed": -1},
        {"loss": nn.CrossEntropyLoss(reduction="sum")},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1), "kind": "mc"},
        {"loss": nn.MultiMarginLoss(), "kind": "mc"},
    ]
    for options in refused:
        with pytest.raises(errors.OptionError):
            dh.FisherOperator(model, batch, **options)
    with pytest.raises(errors.LossError, match="does not depend"):
        dh.FisherOperator(model, batch, loss=lambda out, y: torch.zeros((), requires_grad=True).double())
    for kind in ("empirical", "mc"):
        with pytest.raises(errors.LossError, match="targets"):
            dh.FisherOperator(model, {"input": batch[0]}, kind=kind)
    fisher = dh.FisherOperator(model, batch)
    for name in ("loss", "gradient"):
        with pytest.raises(errors.OptionError, match="HessianOperator"):
            getattr(fisher, name)


@pytest.mark.parametrize("ignored", [-100, 0])
def test_samples_without_a_target_do_not_count(ignored: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 6).double(), torch.tensor([0, 1, 1, 2, 2, 1])
    y[[1, 4]] = ignored
    kept, loss = y != ignored, nn.CrossEntropyLoss(ignore_index=ignored)
    expected = dh.FisherOperator(net, (x[kept], y[kept]), loss=loss).dense()
    for batch in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        torch.testing.assert_close(dh.FisherOperator(net, batch, loss=loss).dense(), expected, rtol=1e-10, atol=1e-14)
    drawn = [dh.FisherOperator(net, (x, y), loss=loss, kind="mc", samples=100, seed=s).dense() for s in range(10)]
    gn = dh.GGNOperator(net, (x, y), loss=loss).dense()
    spread = torch.stack(drawn).std(0).norm() / 10**0.5
    assert (sum(drawn) / 10 - gn).norm() < 4 * spread  # a factor of N/N_kept is 20 of these


def test_targets_may_be_probabilities_and_logits_lie_anyhow() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, soft = torch.randn(5, 4).double(), torch.softmax(torch.randn(5, 3).double(), 1)
    loss = nn.CrossEntropyLoss()
    drawn = [dh.FisherOperator(net, (x, soft), loss=loss, kind="mc", samples=100, seed=s).dense() for s in range(10)]
    spread = torch.stack(drawn).std(0).norm() / 10**0.5
    assert (sum(drawn) / 10 - dh.GGNOperator(net, (x, soft), loss=loss).dense()).norm() < 4 * spread

    class Tokens(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mT  # (batch, classes, positions), not contiguous

    tokens = Tokens(4, 3).double()
    x, y = torch.randn(5, 2, 4).double(), torch.randint(0, 3, (5, 2))
    found = dh.FisherOperator(tokens, (x, y), loss=loss).dense()
    rows = []
    for k in range(5):
        gradient = torch.autograd.grad(loss(tokens(x[k : k + 1]), y[k : k + 1]), list(tokens.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradient]))
    torch.testing.assert_close(found, torch.stack(rows).T @ torch.stack(rows) / 5, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(ignore_index=1), nn.MSELoss()], ids=["classes", "numbers"])
def test_drawn_targets_are_targets(loss: nn.Module) -> None:
    # The Fisher of several draws is the mean of those at each draw; they are evaluated as one batch.
    model, (x, y), kept, plain = _net(), _batch(), slice(None), F.mse_loss
    if isinstance(loss, nn.CrossEntropyLoss):
        kept, plain = y != 1, F.cross_entropy
    else:
        y = torch.randn(8, 3).double()
    fisher = dh.FisherOperator(model, (x, y), loss=loss, kind="mc", samples=3, seed=5)
    (batch,) = fisher._problem.batches
    each = [_empirical(model, x[kept], drawn[kept], plain) for drawn in batch.targets]
    torch.testing.assert_close(fisher.dense(), sum(each) / 3, rtol=1e-12, atol=1e-15)
    assert not fisher._problem.entries[0].graph.lost
