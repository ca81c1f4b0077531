"""Wrappers, threads, batches that take other ways, and what is proved of a capture."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dag_hesse as dh
from dag_hesse import errors
from tests import device
from tests.capture.common import Around, X, Y, agree, branch, linear, truth
from tests.oracle import error


def test_compiled_models_are_run_op_by_op() -> None:
    plain = Around(lambda m, z: z.sin())
    v = torch.randn(31).double()
    expected = dh.HessianOperator(plain, (X, Y)) @ v
    whole, part = copy.deepcopy(plain), copy.deepcopy(plain)
    whole.compile(backend="eager")
    part.a = torch.compile(part.a, backend="eager")  # type: ignore[assignment]
    for model in (whole, part, torch.compile(copy.deepcopy(plain), backend="eager"), nn.DataParallel(plain)):
        assert error(dh.HessianOperator(model, (X, Y)) @ v, expected) < 1e-13


def test_backward_hooks_do_not_stand_in_the_way() -> None:
    model = Around(lambda m, z: z)
    seen: list[Any] = []
    model.a.register_full_backward_hook(lambda module, into, out: seen.append(1))
    agree(model)


def test_captures_from_several_threads() -> None:
    models = [Around(lambda m, z: F.dropout(z.sin(), 0.0)) for _ in range(4)]
    v, found = torch.randn(31).double(), [torch.zeros(0)] * 4
    expected = dh.HessianOperator(models[0], (X, Y)) @ v

    def run(k: int) -> None:
        found[k] = dh.HessianOperator(models[k], (X, Y)) @ v

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(error(one, expected) < 1e-13 for one in found)


def test_a_batch_that_takes_another_way_is_captured_anew() -> None:
    model = Around(branch)
    batches = [(X, Y), (-3 * X, Y)]
    parts = [truth(model, batch, ("a.weight", "a.bias", "b.weight", "b.bias")) for batch in batches]
    with pytest.warns(UserWarning, match="captured anew"):
        found = dh.HessianOperator(model, batches).dense()
    assert error(found, sum(parts) / 2) < 1e-10


def test_refresh_takes_the_way_that_new_values_take() -> None:
    model = Around(branch)
    operator = dh.HessianOperator(model, (X, Y))
    operator.dense()
    with torch.no_grad():
        model.a.weight.neg_()
        model.a.bias.neg_()
    operator.refresh()
    with pytest.warns(UserWarning, match="captured anew"):
        found = operator.dense()
    assert error(found, truth(model, (X, Y), operator.names)) < 1e-10


def test_batches_of_values_that_left_torch_do_not_share_a_graph() -> None:
    class Scaled(Around):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.from_numpy(np.abs(x.cpu().numpy()).max(keepdims=True)).to(x.device)
            return self.b(torch.tanh(self.a(x) * scale))

    model = Scaled(lambda m, z: z)
    batches = [(X, Y), (2 * X, Y)]
    parts = [truth(model, batch, ("a.weight", "a.bias", "b.weight", "b.bias")) for batch in batches]
    assert error(dh.HessianOperator(model, batches).dense(), sum(parts) / 2) < 1e-10


def test_dropout_draws_other_masks_for_every_batch() -> None:
    model = Around(lambda m, z: F.dropout(z, 0.5))
    torch.manual_seed(3)
    operator = dh.HessianOperator(model, [(X, Y), (X, Y)])
    found = operator.dense()
    torch.manual_seed(3)
    parts = [truth(model, (X, Y), operator.names) for _ in range(2)]
    assert error(parts[0], parts[1]) > 1e-2
    assert error(found, sum(parts) / 2) < 1e-10


def test_outputs_that_the_loss_does_not_read_change_nothing() -> None:
    class Features(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.more, self.a, self.b, self.c = more, nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.a(x).tanh()
            logits = self.c(self.b(hidden).tanh())
            return {"hidden": hidden, "logits": logits} if self.more else {"logits": logits}

    loss = lambda o, y: F.cross_entropy(o["logits"], y)  # noqa: E731
    few, many = (
        dh.analyze(Features(more), (X, Y), loss=loss, points=["a", "b"], mode="exact") for more in (False, True)
    )
    for part in ("full", "gn", "tensor"):
        assert torch.equal(few.block("a", "a", part), many.block("a", "a", part))


def test_a_model_that_autograd_cannot_differentiate_is_held_against_differences() -> None:
    class Overwritten(Around):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.a(x))
            z[:, 1:] += z[:, :-1].clone()
            return self.b(z)

    class Clean(Around):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.a(x))
            return self.b(torch.cat([z[:, :1], z[:, 1:] + z[:, :-1]], 1))

    found = dh.HessianOperator(Overwritten(lambda m, z: z), (X, Y))
    expected = truth(Clean(lambda m, z: z), (X, Y), found.names)
    assert error(found.dense(), expected) < 1e-10
    columns = torch.randn(31, 3).double()
    assert error(found @ columns, expected @ columns) < 1e-10


def test_a_reentrant_checkpoint_is_nothing_special() -> None:
    inner = lambda m: lambda t: m.c(t).sin()  # noqa: E731
    plain = Around(lambda m, z: inner(m)(z), c=linear())
    saved = Around(lambda m, z: checkpoint(inner(m), z, use_reentrant=True), c=linear())
    found = dh.HessianOperator(saved, (X, Y))
    assert error(found.dense(), truth(plain, (X, Y), found.names)) < 1e-10


@pytest.mark.parametrize("verify", ["gradient", "product", "none"])
def test_what_is_proved(verify: str) -> None:
    agree(Around(lambda m, z: z.sin()), verify=verify)
    with pytest.raises(errors.OptionError, match="verify"):
        dh.HessianOperator(Around(lambda m, z: z), (X, Y), verify="everything")


def test_what_is_written_for_integers_is_of_their_batch_only() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.e, self.b = nn.EmbeddingBag(7, 4, mode="mean", padding_idx=0), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.e(x).sin())

    ids = [torch.randint(0, 7, (4, 3), generator=torch.Generator().manual_seed(k), device="cpu") for k in range(2)]
    batches = [(x.to(device.NAME), Y) for x in ids]
    model = Bags()
    singles = [dh.HessianOperator(model, batch).dense() for batch in batches]
    assert error(dh.HessianOperator(model, batches, reduction="mean").dense(), sum(singles) / 2) < 1e-12
    assert dh.capture(model, (ids[0].to(device.NAME).clamp(min=1), Y), points=["e"]).points[0].shape == (4,)


@pytest.mark.parametrize("loss", ["ctc", "packed"])
def test_lengths_are_of_their_batch_only(loss: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.r, self.o = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, _ = nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True, total_length=3)
            return self.o(out.sum(1)) if loss == "packed" else self.o(out)

    def ctc(o: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(
            o.log_softmax(-1).transpose(0, 1), y.clamp(min=1)[:, None], torch.full((4,), 3), torch.ones(4).long()
        )

    x = torch.randn(4, 3, 3).double()
    batches = [
        ((x, torch.tensor(n)), torch.tensor(y)) for n, y in (([3, 2, 1, 3], [0, 1, 2, 0]), ([1, 2, 3, 1], [2, 2, 1, 1]))
    ]
    model = Recurrent()
    options: Any = {"loss": ctc if loss == "ctc" else None, "reduction": "mean"}
    singles = [dh.HessianOperator(model, batch, **options).dense() for batch in batches]
    assert error(singles[0], singles[1]) > 1e-2
    assert error(dh.HessianOperator(model, batches, **options).dense(), sum(singles) / 2) < 1e-12


def test_constants_of_a_batch_are_those_of_its_own_random_draws() -> None:
    def between(m: Any, z: Tensor) -> Tensor:
        z = F.dropout(z, 0.5)
        return z * torch.tensor(z.detach().mean(0).tolist()).to(z)

    model = Around(between)
    torch.manual_seed(4)
    operator = dh.HessianOperator(model, [(X, Y), (2 * X, Y)])
    found = operator.dense()
    torch.manual_seed(4)
    parts = [truth(model, batch, operator.names) for batch in ((X, Y), (2 * X, Y))]
    assert error(found, sum(parts) / 2) < 1e-10


def test_a_loss_that_uses_a_parameter_beside_the_output_has_no_parts() -> None:
    model = Around(lambda m, z: z.sin(), s=nn.Parameter(torch.tensor(0.3)))
    weighted = lambda o, y: (-model.s).exp() * F.cross_entropy(o, y) + model.s  # noqa: E731
    added = lambda o, y: F.cross_entropy(o, y) + model.s.square() + model.a.weight.square().sum()  # noqa: E731
    with pytest.raises(errors.CaptureError, match=r"mul.*beside it.*HessianOperator"):
        dh.GGNOperator(model, (X, Y), loss=weighted)
    whole = dh.HessianOperator(model, (X, Y), loss=weighted)
    assert whole.shape == (32, 32)
    gn, _ = dh.HessianOperator(model, (X, Y), loss=added).parts(torch.eye(32).double())
    plain = dh.GGNOperator(model, (X, Y), param_filter=["a.*", "b.*"]).dense()
    assert error(gn[1:, 1:] if whole.names[0] == "s" else gn[:-1, :-1], plain) < 1e-12
    assert dh.analyze(model, (X, Y), loss=weighted, points=["a", "b"]).resonance.all()
