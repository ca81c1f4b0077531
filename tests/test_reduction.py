"""How the losses of batches add up: operators over loaders against the Hessian of the loss over all samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from tests.oracle import error

CLASSES, SAMPLES = 3, 8
WEIGHT = torch.tensor([0.2, 1.0, 3.0]).double()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def _x() -> Tensor:
    return torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _labels() -> Tensor:
    return torch.arange(SAMPLES) % CLASSES


def _ignored() -> Tensor:
    y = _labels()
    y[[0, 1, 6]] = -100
    return y


def _floats() -> Tensor:
    return torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _masked(output: Tensor, targets: dict[str, Tensor]) -> Tensor:
    each = (output - targets["y"]).pow(2).sum(1)
    return (each * targets["mask"]).sum() / targets["mask"].sum()


def _mask() -> dict[str, Tensor]:
    return {"y": _floats(), "mask": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.0, 2.0, 1.0]).double()}


def _each(output: Tensor, targets: Tensor) -> list[Tensor]:
    return [F.cross_entropy(output[k : k + 1], targets[k : k + 1]) for k in range(len(targets))]


def _einsum(output: Tensor, targets: Tensor) -> Tensor:
    return -torch.einsum("bc,bc->", output.log_softmax(1), F.one_hot(targets, CLASSES).double()) / len(targets)


Loss = Callable[[Any, Any], Tensor]
# name: (loss, targets of all samples, what reduction is found)
LOSSES: dict[str, tuple[Loss, Callable[[], Any], str]] = {
    "mean": (F.cross_entropy, _labels, "mean over samples"),
    "sum": (lambda o, t: F.cross_entropy(o, t, reduction="sum"), _labels, "sum over samples"),
    "sum times 1/len": (
        lambda o, t: F.cross_entropy(o, t, reduction="sum") * (1 / len(t)),
        _labels,
        "mean over samples",
    ),
    "sum over a constant": (lambda o, t: F.cross_entropy(o, t, reduction="sum") / 2, _labels, "sum over samples"),
    "sum of squares": (lambda o, t: ((o - t) ** 2).sum() / 2, _floats, "sum over samples"),
    "mean of squares": (F.mse_loss, _floats, "mean over samples"),
    "stack of means": (lambda o, t: torch.stack(_each(o, t)).mean(), _labels, "mean over samples"),
    "loop": (lambda o, t: sum(_each(o, t)), _labels, "sum over samples"),  # type: ignore[arg-type,return-value]
    "einsum over len": (_einsum, _labels, "mean over samples"),
    "ignore_index": (F.cross_entropy, _ignored, "mean, weighted by batch"),
    "class weights": (lambda o, t: F.cross_entropy(o, t, weight=WEIGHT), _labels, "mean, weighted by batch"),
    "mask": (_masked, _mask, "mean, weighted by batch"),
    "batchmean": (
        lambda o, t: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="batchmean"),
        _floats,
        "mean over samples",
    ),
    "smoothed": (lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), _labels, "mean over samples"),
}


def _info_nce(output: Tensor, targets: Tensor) -> Tensor:
    scores = output @ targets.t()
    return F.cross_entropy(scores, torch.arange(len(scores)))


REFUSED: dict[str, tuple[Loss, Callable[[], Tensor]]] = {
    "InfoNCE": (_info_nce, _floats),
    "root of a mean": (lambda o, t: F.mse_loss(o, t).sqrt(), _floats),
    "centred": (lambda o, t: ((o - o.mean(0)) * t).pow(2).sum(), _floats),
    "largest sample": (lambda o, t: (o - t).pow(2).sum(1).max(), _floats),
    "a term beside a sum": (lambda o, t: (o - t).pow(2).sum() + 3.0, _floats),
}


def _rows(tree: Any, start: int, stop: int) -> Any:
    return {k: v[start:stop] for k, v in tree.items()} if isinstance(tree, dict) else tree[start:stop]


def _parted(x: Tensor, y: Any, cuts: tuple[int, ...]) -> list[Any]:
    edges = [0, *cuts, SAMPLES]
    return [(x[a:b], _rows(y, a, b)) for a, b in itertools.pairwise(edges)]


def _hessian(model: nn.Module, x: Tensor, y: Any, loss: Loss) -> Tensor:
    return _second(loss(model(x), y), list(model.parameters()))


def _second(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


@pytest.mark.parametrize("cuts", [(4,), (2, 4, 6), (3, 5), (1,)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loader_is_all_its_samples(name: str, cuts: tuple[int, ...]) -> None:
    loss, targets, kind = LOSSES[name]
    model, x, y = _model(), _x(), targets()
    batches = _parted(x, y, cuts)
    verify = "none" if name == "ignore_index" else "gradient"  # a batch may be ignored as a whole
    found = dh.HessianOperator(model, batches, loss=loss, verify=verify)
    assert error(found.dense(), _hessian(model, x, y, loss)) < 1e-10
    if name != "class weights" or len(cuts) > 1:
        assert str(found.reduction) == kind


@pytest.mark.parametrize(
    "name", ["mean", "sum", "sum over a constant", "stack of means", "einsum over len", "batchmean"]
)
def test_per_sample_blocks_are_those_of_samples(name: str) -> None:
    """One batch, or several: H_b is B times sample b's part of a mean, or its part of a sum."""
    loss, targets, kind = LOSSES[name]
    model, x, y = _model(), _x(), targets()
    for batch in ((x, y), _parted(x, y, (3, 5))):
        report = dh.analyze(model, batch, loss=loss, batch_mode="per_sample", space="parameter", mode="exact")
        norms = [float(_hessian(model, x[b : b + 1], y[b : b + 1], loss)[:16, :16].norm()) for b in range(SAMPLES)]
        assert report.resonance[0, 0] == pytest.approx(np.mean(norms), rel=1e-10)
        assert report.facts["reduction"] == kind
        assert kind in str(report)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_add_up_is_refused_and_can_be_said(name: str) -> None:
    loss, targets = REFUSED[name]
    model, x, y = _model(), _x(), targets()
    batches = _parted(x, y, (3,))
    with pytest.raises(errors.ReductionError, match="reduction='mean'"):
        dh.HessianOperator(model, batches, loss=loss)
    with pytest.raises(errors.BatchError, match="reduction='mean'"):
        dh.analyze(model, batches, loss=loss)
    whole = 3 / 8 * _hessian(model, *batches[0], loss) + 5 / 8 * _hessian(model, *batches[1], loss)
    assert error(dh.HessianOperator(model, batches, loss=loss, reduction="mean").dense(), whole) < 1e-10
    assert error(dh.HessianOperator(model, (x, y), loss=loss).dense(), _hessian(model, x, y, loss)) < 1e-10


def test_options() -> None:
    model, x, y = _model(), _x(), _labels()
    batches = _parted(x, y, (2, 6))
    parts = [_hessian(model, *b, F.cross_entropy) for b in batches]
    for option, weights in (
        ("sum", [1.0, 1.0, 1.0]),
        ("mean", [2 / 8, 4 / 8, 2 / 8]),
        ([1, 2, 5], [1 / 8, 2 / 8, 5 / 8]),
        (lambda batch: len(batch[1]) ** 2, [4 / 24, 16 / 24, 4 / 24]),
    ):
        expected = torch.stack([w * p for w, p in zip(weights, parts, strict=True)]).sum(0)
        assert error(dh.HessianOperator(model, batches, reduction=option).dense(), expected) < 1e-10
        v = torch.randn(len(expected)).double()
        assert error(dh.hvp(model, batches, v, reduction=option), expected @ v) < 1e-10
    for option in ("average", [1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], lambda batch: float("nan"), 3):
        with pytest.raises(errors.OptionError, match="reduction"):
            dh.HessianOperator(model, batches, reduction=option)  # type: ignore[arg-type]


def test_a_batch_that_is_ignored_counts_nothing() -> None:
    model, x, y = _model(), _x(), _labels()
    y[2:4] = -100
    found = dh.HessianOperator(model, _parted(x, y, (2, 4)))
    assert error(found.dense(), _hessian(model, x, y, F.cross_entropy)) < 1e-10


def test_the_model_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, CLASSES)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    found = dh.HessianOperator(model, _parted(_x(), _labels(), (3,)))
    assert str(found.reduction) == "mean over samples"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training


class Tokens(nn.Module):
    """A model that makes its own loss, over the tokens that count."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.table, self.head, self.reduction = nn.Embedding(5, 3), nn.Linear(3, 5), reduction

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.table(ids)))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=self.reduction)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_model_with_a_loss_of_its_own(reduction: str, padded: bool) -> None:
    torch.manual_seed(0)
    model = Tokens(reduction).double()
    ids = torch.randint(0, 5, (5, 4))
    labels = ids.clone()
    if padded:
        labels[0, 1:], labels[3, 2:] = -100, -100
    whole = _hessian_of(model, ids, labels)
    batches = [{"ids": ids[:2], "labels": labels[:2]}, {"ids": ids[2:], "labels": labels[2:]}]
    found = dh.HessianOperator(model, batches)
    assert error(found.dense(), whole) < 1e-10
    ragged = [{"ids": ids[:2], "labels": labels[:2]}, {"ids": ids[2:, :2], "labels": labels[2:, :2]}]
    counts = [int((b["labels"] != -100).sum()) if reduction == "mean" else 1 for b in ragged]
    parts = [_hessian_of(model, b["ids"], b["labels"]) * n for b, n in zip(ragged, counts, strict=True)]
    expected = (parts[0] + parts[1]) / (sum(counts) if reduction == "mean" else 1)
    assert error(dh.HessianOperator(model, ragged).dense(), expected) < 1e-10


def _hessian_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return _second(model(ids, labels)["loss"], list(model.parameters()))


def _by_sum(o: Tensor, t: Tensor) -> Tensor:
    w = (t > 0).double() + 0.5
    return (w * (o - t) ** 2 / w.sum()).sum()


def _kept(o: Tensor, t: Tensor) -> Tensor:
    return ((o[t > 0] - t[t > 0]) ** 2).mean()


# name: (loss, what a batch counts; None: that cannot be read)
OF_LENGTHS: dict[str, tuple[Loss, Callable[[Tensor], float] | None]] = {
    "mean": (F.mse_loss, lambda t: t.numel()),
    "half": (lambda o, t: F.mse_loss(o, t) / 2, lambda t: t.numel()),
    "times": (lambda o, t: 0.3 * F.mse_loss(o, t, reduction="sum") * (1 / t.numel()), lambda t: t.numel()),
    "of means": (lambda o, t: ((o - t) ** 2).mean(1).mean(0).mean(), lambda t: len(t)),
    "of two": (lambda o, t: torch.stack([F.mse_loss(o, t), F.huber_loss(o, t)]).mean(), lambda t: t.numel()),
    "added": (lambda o, t: (F.mse_loss(o, t) - 2 * F.huber_loss(o, t)) / 2, lambda t: t.numel()),
    "kept by index": (_kept, lambda t: float((t > 0).sum())),
    "of samples": (lambda o, t: ((o - t) ** 2).mean((1, 2)).mean(), lambda t: len(t)),
    "sum of two means": (lambda o, t: F.mse_loss(o, t) + ((o - t) ** 4).mean((1, 2)).mean(), None),
    "weights inside": (_by_sum, None),
    "half, weights inside": (lambda o, t: _by_sum(o, t) / 2, None),
}


@pytest.mark.parametrize("name", OF_LENGTHS)
def test_lengths_that_differ(name: str) -> None:
    """Outputs cannot be put together: what each batch's loss divides by is read off its graph, and tried on parts."""
    torch.manual_seed(0)
    loss, counted = OF_LENGTHS[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    shapes = ((2, 5), (3, 2), (4, 5))
    batches = [(torch.randn(*shape, 3).double(), torch.randn(*shape, 2).double()) for shape in shapes]
    if counted is None:
        with pytest.raises(errors.ReductionError, match="reduction='mean'"):
            dh.HessianOperator(model, batches, loss=loss)
        return
    counts = [counted(y) for _, y in batches]
    parts = [_hessian(model, *b, loss) * n for b, n in zip(batches, counts, strict=True)]
    expected = torch.stack(parts).sum(0) / sum(counts)
    assert error(dh.HessianOperator(model, batches, loss=loss).dense(), expected) < 1e-10


def test_what_vanishes_in_the_parts_that_are_tried_is_seen_in_all_of_them() -> None:
    """A term without slope has curvature all the same, and a threshold may lie between batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3).double(), torch.arange(12) % 2
    anchor = [p.detach().clone() for p in model.parameters()]

    def anchored(o: Tensor, t: Tensor) -> Tensor:
        pull = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), anchor, strict=True))
        return F.cross_entropy(o, t, reduction="sum") + pull

    def interacting(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) + (o.mean(0) - o.mean(0).detach()).pow(2).sum()

    def by_positives(o: Tensor, t: Tensor) -> Tensor:
        return (F.cross_entropy(o, t, reduction="none") * (1 + t)).sum() / t.sum().clamp(min=1)

    few = torch.tensor([0] * 5 + [1] * 7)
    for loss, targets in ((anchored, y), (interacting, y), (by_positives, few)):
        with pytest.raises(errors.ReductionError, match="of all batches"):
            dh.HessianOperator(model, list(zip(x.split(4), targets.split(4), strict=True)), loss=loss)
