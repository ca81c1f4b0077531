"""What people give as a batch, a model and a loss: all is taken for what it is, or refused before heavy work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dag_hesse as dh
from dag_hesse import errors


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)).double()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(6) % 3


def dense(model: nn.Module, value: Callable[[nn.Module], Tensor]) -> Tensor:
    """The Hessian of a value by all parameters, by plain double-backward."""
    places = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(value(model), places, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in first])
    rows = [torch.autograd.grad(g, places, retain_graph=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])


def _cross_entropy(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


class OfKeys(nn.Module):
    """Takes its input by a key, as models of dict datasets do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)


class Rows(Dataset):
    """A dict dataset."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        return dict(zip(self.names, (X[k], Y[k]), strict=True))


def _read_only() -> np.ndarray:
    array = X.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "batch",
    [
        (X.numpy(), Y.numpy()),
        [X.numpy(), Y.numpy()],
        (_read_only(), Y.numpy().astype(np.int32)),
        (X.numpy()[::-1].copy()[::-1], Y.numpy().astype(np.uint8)),
        (X.numpy().astype(">f8"), Y.to(torch.int16)),
        [(X[:2].numpy(), Y[:2].numpy()), (X[2:].numpy(), Y[2:].numpy())],
        DataLoader(TensorDataset(X, Y), batch_size=4),
    ],
    ids=["tuple", "list", "read-only", "reversed", "big-endian", "batches", "loader"],
)
def test_arrays_and_labels_of_any_integer_type(batch: Any) -> None:
    model = _net()
    found = dh.HessianOperator(model, batch).dense()
    assert torch.allclose(found, dense(model, _cross_entropy), atol=1e-12)


@pytest.mark.parametrize("names", [("pixels", "labels"), ("pixels", "y"), ("image", "label"), ("image", "target")])
def test_dict_datasets(names: tuple[str, str]) -> None:
    model = OfKeys()
    for batch in (DataLoader(Rows(*names), batch_size=3), dict(zip(names, (X, Y), strict=True))):
        for loss in (None, nn.CrossEntropyLoss()):
            found = dh.HessianOperator(model, batch, loss=loss).dense()
            assert torch.allclose(found, dense(model, _cross_entropy), atol=1e-12)


def test_keys_that_nobody_takes_are_no_targets() -> None:
    with pytest.raises(
        errors.CaptureError, match=r"takes pixels, and the batch's keys are pixels, mask: give \(inputs"
    ):
        dh.analyze(OfKeys(), {"pixels": X, "mask": Y})
    with pytest.raises(errors.CaptureError, match="keys are pixels, mask, labels"):
        dh.analyze(OfKeys(), {"pixels": X, "mask": X, "labels": Y})


def test_tokenizers_containers() -> None:
    transformers = pytest.importorskip("transformers")
    model = OfKeys()
    found = dh.HessianOperator(model, transformers.BatchEncoding({"pixels": X.numpy(), "labels": Y})).dense()
    assert torch.allclose(found, dense(model, _cross_entropy), atol=1e-12)


@dataclass(frozen=True)
class Result:
    logits: Tensor
    extra: Tensor
    number: int = field(default=3, init=False)


class Several(nn.Module):
    def __init__(self, made: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.made = nn.Linear(4, 3), nn.Linear(4, 2), made
        self.double()

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        return self.made(h, self.second(x) * h[:, :2].tanh())


@pytest.mark.parametrize(
    "made, read",
    [
        (Result, lambda out: (out.logits, out.extra)),
        (lambda a, b: (a, b), lambda out: out),
        (lambda a, b: {"logits": a, "extra": b}, lambda out: (out["logits"], out["extra"])),
        (lambda a, b: [a, {"b": (b,)}], lambda out: (out[0], out[1]["b"][0])),
    ],
    ids=["dataclass", "tuple", "dict", "nested"],
)
def test_modules_of_several_outputs(made: Any, read: Any) -> None:
    def loss(out: Any, targets: Tensor) -> Tensor:
        a, b = read(out)
        return F.cross_entropy(a, targets) + b.square().mean()

    model = Several(made)
    found = dh.HessianOperator(model, (X, Y), loss=loss).dense()
    assert torch.allclose(found, dense(model, lambda m: loss(m(X), Y)), atol=1e-12)
    assert dh.analyze(model, (X, Y), loss=loss, points=["first", "second"]).names == ("first", "second")


def _parametrized() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        parametrizations.weight_norm(nn.Linear(4, 5)),
        nn.SiLU(),
        parametrizations.spectral_norm(nn.Linear(5, 5)),
        nn.Tanh(),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*layers).double().eval()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.reentrant = nn.Linear(4, 5), reentrant
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return checkpoint(self.rest, h, use_reentrant=self.reentrant) if self.reentrant is not None else self.rest(h)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_nothing_special(reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    found = dh.HessianOperator(model, (X, Y)).dense()
    model.reentrant = None  # type: ignore[assignment]
    assert torch.allclose(found, dense(model, _cross_entropy), atol=1e-12)


def test_parametrizations() -> None:
    model = _parametrized()
    H = dh.HessianOperator(model, (X, Y))
    assert "0.parametrizations.weight.original1" in H.names
    assert torch.allclose(H.dense(), _differences(model), atol=1e-8)  # autograd's own is wrong by 0.3 for weight norm


def _differences(model: nn.Module, step: float = 1e-5) -> Tensor:
    """The Hessian by central differences of autograd's gradient."""
    places, columns = list(model.parameters()), []
    for p in places:
        for k in range(p.numel()):
            pair = []
            for signed in (step, -step):
                p.data.view(-1)[k] += signed
                pair.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(_cross_entropy(model), places)]))
                p.data.view(-1)[k] -= signed
            columns.append((pair[0] - pair[1]) / (2 * step))
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()),
    ],
    ids=["partial", "module"],
)
def test_partial_and_module_losses(loss: Any) -> None:
    model = _net()
    found = dh.HessianOperator(model, (X, Y), loss=loss).dense()
    assert torch.allclose(found, dense(model, lambda m: loss(m(X), Y)), atol=1e-12)


def test_peft_models_have_the_points_of_what_they_adapt() -> None:
    import peft

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_embd=8, n_head=2, vocab_size=11, n_positions=8, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    )
    plain = transformers.GPT2LMHeadModel(config).double()
    ids = torch.arange(10).reshape(2, 5)
    batch = {"input_ids": ids}, ids

    def loss(out: Any, labels: Tensor) -> Tensor:  # the model's own computes in float32
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    before = dh.analyze(plain, batch, loss=loss).names
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.0)).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    assert dh.analyze(model, batch, loss=loss).names == tuple(f"base_model.model.{name}" for name in before)
    H = dh.HessianOperator(model, batch, loss=loss)
    assert H.names and all("lora_" in name for name in H.names)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = dense(model, lambda m: loss(m(ids), ids))
    assert torch.allclose(H.dense(), expected, atol=1e-10)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda m: dh.analyze(m, (X, Y), loss="mse"), errors.OptionError, "'mse' is a str; expected callable"),
        (lambda m: dh.FisherOperator(m, (X, Y), loss="mse"), errors.OptionError, "expected callable"),
        (lambda m: dh.analyze(m, (X, Y), loss=nn.MSELoss), errors.OptionError, r"class MSELoss; .* MSELoss\(\)"),
        (lambda m: dh.analyze(m, (X, Y + 2)), errors.LossError, "labels from 2 to 4, and the output has 3 classes"),
        (lambda m: dh.analyze(m, (X, Y - 1), loss=F.cross_entropy), errors.LossError, "labels from -1 to 1"),
        (lambda m: dh.analyze(m, (X, Y > 1)), errors.LossError, "bool"),
        (lambda m: dh.analyze(m, (X.float(), Y)), errors.CaptureError, r"'inputs\[0\]' is torch.float32.*inputs.to"),
        (lambda m: dh.analyze(m, (X.long(), Y)), errors.CaptureError, "is torch.int64, and the model's parameters"),
        (lambda m: dh.analyze(m, (np.array(["a", "b"]), Y)), errors.BatchError, "array of <U1; expected numbers"),
        (lambda m: dh.analyze(m, (X.numpy().astype(np.longdouble), Y)), errors.BatchError, "does not have"),
        (lambda m: dh.analyze(m, TensorDataset(X, Y)), errors.BatchError, r"DataLoader\(dataset"),
        (lambda m: dh.analyze(m, X.numpy()), errors.BatchError, "ndarray cannot be used"),
        (lambda m: dh.analyze(m, (X, Y), point=["0"]), errors.UnknownOptionError, "no option 'point'.*'points'"),
        (lambda m: dh.hvp(m, (X, Y), X, lose=1), errors.UnknownOptionError, r"hvp\(\) has no option.*'loss'"),
        (lambda m: dh.GGNOperator(m, (X, Y), batchmode=1), errors.UnknownOptionError, "GGNOperator|CurvatureOperator"),
        (lambda m: dh.FisherOperator(m, (X, Y), sample=1), errors.UnknownOptionError, "FisherOperator.*'samples'"),
        (lambda m: dh.HessianOperator(m, (X, Y)).eigsh(2, sed=1), errors.UnknownOptionError, "'seed'"),
        (lambda m: dh.HessianOperator(m, (X, Y)).solve(X, dampign=1), errors.UnknownOptionError, "'damping'"),
        (lambda m: dh.BlockMatrix.from_model(m, (X, Y), eror=1), errors.UnknownOptionError, "'error'"),
        (lambda m: dh.structure(m, (X, Y), point=1), TypeError, "'points'"),
        (lambda m: dh.analyze(m, (X, Y), points=dict), errors.OptionError, "points is the class dict; expected names"),
        (lambda m: dh.HessianOperator(m, (X, Y), points=nn.Linear), errors.OptionError, "points is the class Linear"),
        (lambda m: dh.profile(m, (X, Y), points=str), errors.OptionError, "points is the class str; expected names"),
        (lambda m: dh.analyze(m, (X, Y), points=m[0]), errors.OptionError, "points is a Linear; expected names"),
        (lambda m: dh.capture(m, (X, Y), points=lambda g: None), errors.OptionError, "points is a NoneType; expected"),
        (lambda m: dh.capture(m, (X, Y), points=lambda g: ["0"]), errors.OptionError, "points returned a str"),
        (lambda m: dh.analyze(m, (X, Y), memory="much"), errors.OptionError, "'4GiB'"),
        (lambda m: dh.analyze(m, (X, Y), memory="9" * 400 + "GiB"), errors.OptionError, "more than a number of bytes"),
        (lambda m: dh.analyze(m, (X, Y), rtol=10**400), errors.OptionError, "between 0 and 1"),
        (lambda m: dh.HessianOperator(m, (X, Y), param_filter="*.wieght"), errors.PointError, "'0.weight'"),
        (lambda m: dh.HessianOperator(OfKeys(), (X, Y), param_filter="*.bias"), errors.PointError, r"\*\*.bias' does"),
    ],
)
def test_mistakes_are_told_for_what_they_are(call: Any, kind: type, message: str) -> None:
    model = _net()
    before, rng = {n: p.detach().clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    x, y = X.clone(), Y.clone()
    with pytest.raises(kind, match=message):
        call(model)
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(X, x) and torch.equal(Y, y)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and not p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_indices_beyond_a_table_are_named() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(errors.CaptureError, match=r"'inputs\[0\]' holds indices from 4 to 9, and '0' has 5 rows"):
        dh.analyze(model, (torch.tensor([[4, 9], [5, 5]]), torch.tensor([0, 1])))


def test_ignored_labels_are_no_mistake() -> None:
    model, labels = _net(), torch.where(Y == 2, -100, Y)
    found = dh.HessianOperator(model, (X, labels)).dense()
    assert torch.allclose(found, dense(model, lambda m: F.cross_entropy(m(X), labels)), atol=1e-12)
    loss = functools.partial(F.cross_entropy, ignore_index=7)
    labels = torch.where(Y == 2, 7, Y)
    found = dh.HessianOperator(model, (X, labels), loss=loss).dense()
    assert torch.allclose(found, dense(model, lambda m: loss(m(X), labels)), atol=1e-12)


def test_memory_is_bytes_or_a_text_with_a_unit() -> None:
    model, batch = _net(), (X, Y)
    H = dh.HessianOperator(model, batch, memory="1 MiB")
    assert H._budget.total == 1 << 20
    small = dh.HessianOperator(model, batch, memory="20KB")
    v = torch.ones(small.shape[0], dtype=torch.float64)
    assert torch.allclose(small @ v, H @ v)
    for matrix in (small, small + H, 2 * small, small[["0"]], small["0", "**"], small @ H, small.shifted(1)):
        with pytest.raises(errors.MemoryBudgetError, match=r"dense.*may be used"):
            matrix.dense()
    report = dh.analyze(model, batch, points=["0.weight", "2.weight"], memory="6KB", mode="probes", probes=2)
    with pytest.raises(errors.MemoryBudgetError, match=r"the block of '0.weight' and '2.weight'"):
        report.block(0, 1)


def test_globs_name_the_sides_of_stored_blocks() -> None:
    model = _net()
    B = dh.BlockMatrix.from_model(model, (X, Y), points="**", space="parameter", error=0)
    H = dh.HessianOperator(model, (X, Y))
    order = [B.names.index(name) for name in H.names]
    assert sorted(order) == list(range(4))
    assert torch.allclose(B["*.weight", "2.*"].dense(), H["*.weight", "2.*"].dense(), atol=1e-12)
    assert B["0.w*", "2.bias"].kind == "dense"
    assert torch.allclose(B["0.w*", "2.bias"].dense(), H["0.weight", "2.bias"].dense(), atol=1e-12)
    with pytest.raises(errors.PointError, match=r"'0.weight'"):
        B["0.wieght", "2.bias"]


def _causal() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), torch.randint(0, 11, (2, 5))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["bare", "wrapped"])
def test_ids_and_ids_are_shifted_as_the_model_shifts_labels(wrap: Any) -> None:
    model, ids = _causal()
    own, expected = wrap(model), float(model(ids, labels=ids).loss.detach())
    for batch in (
        (ids, ids),
        ({"input_ids": ids}, ids.clone()),
        {"input_ids": ids, "labels": ids},
        (ids.numpy(), ids.numpy()),
    ):
        H = dh.HessianOperator(own, batch)
        assert H.loss == pytest.approx(expected, rel=1e-6)
    assert dh.HessianOperator(own, (ids, ids), float64=True).loss == pytest.approx(expected, rel=1e-5)
    report = dh.analyze(own, (ids, ids))
    assert report.facts["loss function"] == "the model's own: targets that are its inputs are its labels"
    assert "loss function: the model's own" in str(report)
    others = (ids + 1) % 11
    plain = float(F.cross_entropy(model(ids).logits.flatten(0, 1), others.flatten()).detach())
    report = dh.analyze(own, (ids, others))
    assert report.facts["loss"] == pytest.approx(plain, rel=1e-6)
    assert report.facts["loss function"] == "cross-entropy, as targets are integers"

    def given(output: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())

    report = dh.analyze(own, (ids, ids), loss=given)
    assert report.facts["loss"] == pytest.approx(float(given(model(ids), ids).detach()), rel=1e-6)
    assert report.facts["loss function"] == "given"
    for kind in ("empirical", "mc"):
        with pytest.raises(errors.OptionError, match="pass loss="):
            dh.FisherOperator(own, (ids, ids), kind=kind)


def test_targets_that_are_the_inputs_of_a_model_without_labels_are_targets() -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)).double(), torch.randint(0, 7, (3, 5))
    H = dh.HessianOperator(model, (ids, ids))
    expected = dense(model, lambda m: F.cross_entropy(m(ids).flatten(0, 1), ids.flatten()))
    assert torch.allclose(H.dense(), expected, atol=1e-12)
