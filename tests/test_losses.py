"""Losses with their options, against the dense oracle; nothing is special-cased."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.errors import CaptureError, LossError
from tests.oracle import Truth, error

B, K = 5, 4
LABELS = torch.tensor([0, 3, 1, -100, 2])
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.3]).double()
Loss = Callable[[Tensor, Tensor], Tensor]

CLASSIFICATION: dict[str, Loss] = {
    "ignored": lambda y, t: F.cross_entropy(y, t),
    "weighted": lambda y, t: F.cross_entropy(y, t, weight=WEIGHT),
    "smoothed": lambda y, t: F.cross_entropy(y, t, label_smoothing=0.2),
    "weighted, smoothed": lambda y, t: F.cross_entropy(y, t, weight=WEIGHT, label_smoothing=0.2),
    "summed": lambda y, t: F.cross_entropy(y, t, reduction="sum", ignore_index=-100),
    "unreduced, weighted by sample": lambda y, t: (F.cross_entropy(y, t, reduction="none") * torch.arange(B)).mean(),
    "nll": lambda y, t: F.nll_loss(F.log_softmax(y, 1), t, weight=WEIGHT),
    "focal": lambda y, t: ((1 - torch.softmax(y, 1).gather(1, t.clamp_min(0)[:, None])) ** 2).mean(),
}
REGRESSION: dict[str, Loss] = {
    "mse": lambda y, t: F.mse_loss(y, t),
    "mse summed": lambda y, t: F.mse_loss(y, t, reduction="sum"),
    "l1": lambda y, t: F.l1_loss(y, t),
    "huber": lambda y, t: F.huber_loss(y, t, delta=0.5),
    "smooth l1": lambda y, t: F.smooth_l1_loss(y, t, beta=0.5),
    "bce": lambda y, t: F.binary_cross_entropy(torch.sigmoid(y), torch.sigmoid(t)),
    "bce with logits": lambda y, t: F.binary_cross_entropy_with_logits(y, torch.sigmoid(t), pos_weight=WEIGHT),
    "kl": lambda y, t: F.kl_div(F.log_softmax(y, 1), torch.softmax(t, 1), reduction="batchmean"),
    "kl of logs": lambda y, t: F.kl_div(F.log_softmax(y, 1), F.log_softmax(t, 1), reduction="sum", log_target=True),
    "cosine": lambda y, t: 1 - F.cosine_similarity(y, t).mean(),
    "cosine embedding": lambda y, t: F.cosine_embedding_loss(y, t, torch.tensor([1, -1, 1, 1, -1])),
    "soft labels": lambda y, t: F.cross_entropy(y, torch.softmax(t, 1), label_smoothing=0.1),
    "poisson": lambda y, t: F.poisson_nll_loss(y, t.exp()),
    "soft margin": lambda y, t: F.soft_margin_loss(y, t.sign()),
    "hinge": lambda y, t: F.hinge_embedding_loss(y, t.sign()),
    "pairwise ranking": lambda y, t: F.softplus(
        -(y[:, 0, None] - y[None, :, 0]) * (t[:, 0, None] > t[None, :, 0])
    ).mean(),
    "with a penalty": lambda y, t: F.mse_loss(y, t) + 0.1 * y.norm() + 0.01 * torch.linalg.vector_norm(y, 4),
    "masked": lambda y, t: ((y - t) ** 2 * (t > 0)).sum() / 7,
}


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, K)).double()


def _check(loss: Loss, targets: Tensor) -> None:
    model, x = _net(), torch.randn(B, 3, generator=torch.Generator().manual_seed(1)).double()
    report = dh.analyze(model, (x, targets), loss=loss, points=["1", "3", "4"], mode="exact")
    truth = Truth(model, lambda: loss(model(x), targets), ["1", "3", "4"])
    scale = float(truth.full["1", "1"].norm())
    for v in report.names:
        for w in report.names:
            for part in ("full", "gn", "tensor"):
                assert error(report.block(v, w, part), truth.block(v, w, part, "shared"), 1e-3 * scale) < 1e-10
    gram = dh.analyze(model, (x, targets), loss=loss, points=["1", "3", "4"], mode="gram")
    assert torch.allclose(torch.tensor(gram.gn_norm), torch.tensor(report.gn_norm), rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification(name: str) -> None:
    _check(CLASSIFICATION[name], LABELS)


@pytest.mark.parametrize("name", REGRESSION)
def test_regression(name: str) -> None:
    _check(REGRESSION[name], torch.randn(B, K, generator=torch.Generator().manual_seed(2)).double())


def test_the_loss_is_inferred_from_the_targets() -> None:
    model, x = _net(), torch.randn(B, 3).double()
    for targets, loss in ((LABELS, F.cross_entropy), (torch.randn(B, K).double(), F.mse_loss)):
        inferred, given = (dh.analyze(model, (x, targets), loss=one).resonance for one in (None, loss))
        assert (inferred == given).all()


def test_a_loss_that_is_a_module() -> None:
    _check(nn.CrossEntropyLoss(label_smoothing=0.1), LABELS)


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda y, t: F.cross_entropy(y, t, reduction="none"), r"shape \(5,\)"),
        (lambda y, t: 3.0, "float"),
        (lambda y, t: y.mean() * float("inf"), "inf"),
        (lambda y, t: (y - y).sum().log(), "inf"),
        (lambda y, t: (y - y - 1).sum().sqrt(), "nan"),
    ],
)
def test_losses_that_are_no_loss(loss: Loss, message: str) -> None:
    with pytest.raises(LossError, match=message):
        dh.analyze(_net(), (torch.randn(B, 3).double(), LABELS), loss=loss)


def test_shapes_that_fit_no_inferred_loss() -> None:
    with pytest.raises(LossError, match="pass loss="):
        dh.analyze(_net(), (torch.randn(B, 3).double(), torch.zeros(B, 3, dtype=torch.long)))
    with pytest.raises(LossError, match="no loss"):
        dh.analyze(_net(), (torch.randn(B, 3).double(), None))


@pytest.mark.parametrize("shape, rest", [((2, 5, 5), (5,)), ((2, 4, 4, 4), (4, 4))])
def test_an_axis_of_classes_that_could_be_two_is_asked_for(shape: tuple[int, ...], rest: tuple[int, ...]) -> None:
    model, batch = (
        nn.Sequential(nn.Linear(shape[-1], shape[-1])).double(),
        (torch.randn(shape).double(), torch.zeros(2, *rest).long()),
    )
    with pytest.raises(LossError, match="fit both: pass loss="):
        dh.HessianOperator(model, batch)
    first = dh.HessianOperator(model, batch, loss=nn.functional.cross_entropy)
    last = dh.HessianOperator(model, batch, loss=lambda z, y: nn.functional.cross_entropy(z.movedim(-1, 1), y))
    assert abs(first.loss - last.loss) > 1e-6


def test_a_loss_that_is_linear_everywhere_on_the_batch() -> None:
    """∇²L = 0 in numbers, though not by structure: the Gram route has no rows, and H_GN is zero."""
    model, x = _net(), torch.randn(B, 3).double()
    far = torch.full((B, K), 100.0).double()
    for mode in ("gram", "exact", "auto"):
        report = dh.analyze(model, (x, far), loss=lambda y, t: F.huber_loss(y, t), mode=mode)
        assert (report.gn_norm == 0.0).all()
        assert report.tensor_norm[0, 0] > 0.0


def test_a_mean_over_a_count_of_integers_keeps_double_precision() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x, kept = torch.randn(7, 3).double(), torch.tensor([True, True, False, True, True, False, True])
    H = dh.HessianOperator(net, (x, kept), loss=lambda y, t: ((y**2).sum(1) * t).sum() / t.sum() * 0.3, points="0.*")
    shared = [p for n, p in net.named_parameters() if n.startswith("0.")]
    value = ((net(x) ** 2).sum(1) * kept).sum() / kept.sum() * 0.3
    first = torch.cat([g.flatten() for g in torch.autograd.grad(value, shared, create_graph=True)])
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(f, shared, retain_graph=True)]) for f in first]
    assert error(H.dense(), torch.stack(rows)) < 1e-12


@pytest.mark.parametrize(
    "loss", [None, lambda output, y: ((output - y) ** 2).sum(), lambda output, y: (output * output).exp().mean()]
)
def test_an_output_of_one_element_is_no_loss(loss: Loss | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(1, 3).double(), torch.randn(1, 1).double()
    H = dh.HessianOperator(model, (x, y), loss=loss)
    v = torch.randn(H.shape[1]).double()
    gn, tensor = H.parts(v)
    out = model(x).reshape(())
    curvature = torch.autograd.functional.hessian(
        lambda o: loss(o.reshape(1, 1), y) if loss else ((o - y) ** 2).mean(), out.detach()
    )
    jacobian = torch.cat([g.flatten() for g in torch.autograd.grad(out, list(model.parameters()))])
    torch.testing.assert_close(gn, curvature * jacobian * (jacobian @ v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gn + tensor, H @ v, rtol=1e-10, atol=1e-12)


def test_a_sum_of_its_own_losses_is_the_models() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).tanh().pow(2).sum()

    H = dh.HessianOperator(Own(), (torch.randn(4, 3), torch.zeros(4)), loss=lambda output, _: output * 2 / 3)
    with pytest.raises(CaptureError, match="own loss"):
        H.parts(torch.zeros(H.shape[1]))
