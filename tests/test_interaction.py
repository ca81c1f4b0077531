"""Batch axes and interactions against the truth: what changes in a module's output when one sample does?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse._capture import labels
from dag_hesse.ir import BatchAxis, CurvatureGraph, Interaction

B = 3


class Fn(nn.Module):
    """A linear layer and a function of its output (and of further inputs)."""

    def __init__(self, function: Callable[..., Tensor], features: int = 4) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(features, features), function

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.function(self.inner(x), *more)


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode=mode)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


class Shifted(nn.Module):
    """Decoder inputs are the labels, shifted right by a write."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, labels: Tensor) -> Tensor:
        ids = labels.new_zeros(labels.shape)
        ids[:, 1:] = labels[:, :-1].clone()
        ids[:, 0] = 2
        return self.table(ids.masked_fill(ids == -100, 0))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).unsqueeze(0).expand(ids.shape)
        return self.words(ids) + self.places(places)


class Windows(nn.Module):
    """Swin's windows: the batch goes into an axis of B · windows, and out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        folded = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        done = torch.roll(self.inner(folded), 1, 1)
        return done.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 7, shape)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _last(y: Tensor, lengths: Tensor) -> Tensor:
    return y[torch.arange(len(y)), lengths]


def _one_hot(y: Tensor, t: Tensor) -> Tensor:
    return y * F.one_hot(t, 4)


def _heads(y: Tensor) -> Tensor:
    b, s, _ = y.shape
    h = y.view(b, s, 2, 2).transpose(1, 2).reshape(b * 2, s, 2)
    scores = torch.baddbmm(torch.zeros(b * 2, s, s, dtype=y.dtype), h, h.transpose(1, 2), alpha=0.5)
    return torch.bmm(scores.softmax(-1), h).view(b, 2, s, 2).transpose(1, 2).reshape(b, s, 4)


def _put(y: Tensor) -> Tensor:
    out = torch.zeros(B, 5, dtype=y.dtype)
    return out.index_put((torch.arange(B)[:, None], torch.tensor([[4, 0, 2, 1]])), y)


def _loop(y: Tensor) -> Tensor:
    return torch.stack([y[k].tanh() for k in range(B)])


def _chunks(y: Tensor) -> Tensor:
    return torch.cat([y[:1].exp(), y[1:].tanh()])


def _scatter_rows(y: Tensor, groups: Tensor) -> Tensor:
    return torch.zeros(B, 4, dtype=y.dtype).scatter_add(0, groups[:, None].expand(B, 4), y)


MASK = torch.ones(5, 5).tril().bool()
Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
CASES: dict[str, Make] = {
    "linear": lambda: (nn.Linear(4, 5), (_x(B, 4),)),
    "sequence first": lambda: (Fn(lambda y: y.tanh()), (_x(5, B, 4),)),
    "view": lambda: (Fn(lambda y: y.view(B, 2, 2).flatten(1)), (_x(B, 4),)),
    "fold heads": lambda: (Fn(_heads), (_x(B, 5, 4),)),
    "windows": lambda: (Windows(), (_x(B, 4, 4, 4),)),
    "flip roll pad": lambda: (Fn(lambda y: F.pad(y.flip(1).roll(1, 1), (1, 2))), (_x(B, 4),)),
    "pad the batch": lambda: (Fn(lambda y: F.pad(y, (0, 0, 0, 3))[:B]), (_x(B, 4),)),
    "repeat unfold": lambda: (Fn(lambda y: y.repeat(1, 2).unfold(1, 3, 2)), (_x(B, 4),)),
    "twice and half": lambda: (Fn(lambda y: torch.cat([y, y.tanh()])[B:]), (_x(B, 4),)),
    "interleaved": lambda: (Fn(lambda y: y.repeat_interleave(2, 0).view(B, 2, 4).sum(1)), (_x(B, 4),)),
    "expand": lambda: (Fn(lambda y: y.unsqueeze(1).expand(B, 2, 4).squeeze(0)), (_x(B, 4),)),
    "transpose": lambda: (Fn(lambda y: y.t().exp().transpose(0, 1)), (_x(B, 4),)),
    "split": lambda: (Fn(lambda y: torch.cat(y.split(2, 1)[::-1], 1)), (_x(B, 4),)),
    "stack": lambda: (Fn(lambda y: torch.stack([y, y.sin()], 0)), (_x(B, 4),)),
    "loop over samples": lambda: (Fn(_loop), (_x(B, 4),)),
    "chunks of the batch": lambda: (Fn(_chunks), (_x(B, 4),)),
    "labels shifted": lambda: (Shifted(), (_ids(B, 5),)),
    "positions": lambda: (Positions(), (_ids(B, 5),)),
    "last of lengths": lambda: (Fn(_last), (_x(B, 5, 4), torch.tensor([4, 0, 2]))),
    "one hot": lambda: (Fn(_one_hot), (_x(B, 4), torch.tensor([3, 0, 1]))),
    "gather": lambda: (Fn(lambda y, t: y.gather(1, t)), (_x(B, 4), torch.tensor([[3, 3], [0, 1], [2, 0]]))),
    "own maximum": lambda: (Fn(lambda y: y.gather(1, y.argmax(1, keepdim=True))), (_x(B, 4),)),
    "index put": lambda: (Fn(_put), (_x(B, 4),)),
    "scatter reduce": lambda: (
        Fn(lambda y: torch.zeros(B, 2, dtype=y.dtype).scatter_reduce(1, torch.tensor([[0, 1, 1, 0]] * B), y, "sum")),
        (_x(B, 4),),
    ),
    "scatter to own row": lambda: (Fn(lambda y: _scatter_rows(y, torch.arange(B))), (_x(B, 4),)),
    "scatter to one row": lambda: (Fn(lambda y: _scatter_rows(y, torch.tensor([0, 0, 1]))), (_x(B, 4),)),
    "permuted samples": lambda: (Fn(lambda y: y + y[torch.tensor([1, 2, 0])]), (_x(B, 4),)),
    "conv": lambda: (nn.Conv2d(2, 4, 3, padding=1), (_x(B, 2, 5, 5),)),
    "transposed conv": lambda: (nn.ConvTranspose2d(2, 4, 3, stride=2), (_x(B, 2, 5, 5),)),
    "conv over folded channels": lambda: (
        Fn(lambda y: F.conv1d(y.reshape(1, B * 2, 5), torch.ones(B * 2, 1, 3, dtype=y.dtype), groups=B * 2), 5),
        (_x(B, 2, 5),),
    ),
    "adaptive pooling": lambda: (nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(1)), (_x(B, 2, 5, 5),)),
    "max pooling": lambda: (nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2)), (_x(B, 2, 6, 6),)),
    "upsample": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear")),
        (_x(B, 2, 4, 4),),
    ),
    "unfold and fold": lambda: (
        Fn(lambda y: F.fold(F.unfold(y, 2, stride=2), (4, 4), 2, stride=2)),
        (_x(B, 2, 4, 4),),
    ),
    "grid sample": lambda: (
        Fn(lambda y: F.grid_sample(y.view(B, 1, 2, 2), y.view(B, 1, 2, 2).tanh(), align_corners=False)),
        (_x(B, 4),),
    ),
    "embedding bag": lambda: (Bag("mean"), (_ids(B, 4),)),
    "bag of sums": lambda: (Bag("sum"), (_ids(B, 4),)),
    "instance norm": lambda: (nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), (_x(B, 2, 5, 5),)),
    "group norm": lambda: (nn.GroupNorm(2, 4), (_x(B, 4, 5),)),
    "layer norm": lambda: (nn.LayerNorm(4), (_x(B, 5, 4),)),
    "batch norm": lambda: (nn.BatchNorm1d(4), (_x(B, 4),)),
    "batch norm eval": lambda: (nn.BatchNorm1d(4).eval(), (_x(B, 4),)),
    "cumsum": lambda: (Fn(lambda y: y.cumsum(1)), (_x(B, 4),)),
    "cumsum over samples": lambda: (Fn(lambda y: y.cumsum(0)), (_x(B, 4),)),
    "sort and topk": lambda: (Fn(lambda y: y.sort(1)[0] + y.topk(4, 1)[0]), (_x(B, 4),)),
    "sort samples": lambda: (Fn(lambda y: y.sort(0)[0]), (_x(B, 4),)),
    "masked scores": lambda: (
        Fn(lambda y: (y @ y.transpose(1, 2)).masked_fill(~MASK, -1e9).softmax(-1) @ y),
        (_x(B, 5, 4),),
    ),
    "where": lambda: (Fn(lambda y: torch.where(MASK[0, :4], y, 0.5)), (_x(B, 4),)),
    "attention": lambda: (nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), (_x(B, 5, 4),)),
    "lstm": lambda: (nn.LSTM(4, 3, batch_first=True), (_x(B, 5, 4),)),
    "contrast": lambda: (Fn(lambda y: y @ y.t()), (_x(B, 4),)),
    "centred": lambda: (Fn(lambda y: y - y.mean(0)), (_x(B, 4),)),
    "softmax over samples": lambda: (Fn(lambda y: y.softmax(0)), (_x(B, 4),)),
    "opaque elementwise": lambda: (Fn(lambda y: torch.special.i0e(y) + torch.lgamma(y * y + 1)), (_x(B, 4),)),
    "opaque by matrix": lambda: (Fn(lambda y: torch.linalg.inv(y @ y.mT + torch.eye(4))), (_x(B, 4, 4),)),
    "opaque across": lambda: (Fn(lambda y: torch.linalg.matrix_exp(y[:, :B])), (_x(B, 4),)),
    "distances": lambda: (Fn(lambda y: torch.cdist(y, y)), (_x(B, 5, 4),)),
}


# Samples change places or meet there, in no order that an axis could have.
LOST = {"scatter to one row", "permuted samples", "opaque across"}


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Every module's output (the first tensor of it); "" is the model's."""
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            made[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return made


def _with_other_sample(inputs: tuple[Tensor, ...], b: int) -> tuple[Tensor, ...]:
    changed = []
    for x in inputs:
        x = x.clone()
        rows = x.select(x.shape.index(B), b)
        rows.copy_(_x(*rows.shape) if x.is_floating_point() else (rows + 1) % 4)
        changed.append(x)
    return tuple(changed)


def _numbers(batch_axis: BatchAxis, shape: torch.Size) -> Tensor:
    line = torch.arange(shape[batch_axis.axis]) // batch_axis.inner % batch_axis.batch
    return line.reshape([-1 if k == batch_axis.axis else 1 for k in range(len(shape))]).expand(shape)


def _true_batch_axes(changes: list[Tensor]) -> list[BatchAxis]:
    """All batch axes with which what sample b changes lies in slice b."""
    shape, found = changes[0].shape, []
    for axis, size in enumerate(shape):
        for inner in range(1, size // B + 1):
            if size % (B * inner) == 0:
                batch_axis = BatchAxis(axis, size // (B * inner), B, inner)
                if all(not bool((hit & (_numbers(batch_axis, shape) != b)).any()) for b, hit in enumerate(changes)):
                    found.append(batch_axis)
    return found


def _captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> CurvatureGraph:
    def loss(output: Any, _: Any) -> Tensor:
        return (output[0] if isinstance(output, tuple) else output).pow(2).sum()

    batch = (inputs, torch.zeros(B)) if len(inputs) > 1 else (inputs[0], torch.zeros(B))
    return dh.capture(model, batch, loss=loss)


@pytest.mark.parametrize("name", CASES)
def test_batch_axes_and_interactions_are_what_a_changed_sample_changes(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model = model.double()
    graph = _captured(model, inputs)
    base = _outputs(model, inputs)
    turned = [_outputs(model, _with_other_sample(inputs, b)) for b in range(B)]
    seen = 0
    if any(node.op.startswith("dag_hesse.literal") for node in graph.nodes):
        assert len(graph.lost) == 1  # integers of the batch were looked at
        return
    for module, sites in graph.taps.items():
        key = "" if module.startswith("output") else module
        if key not in base or len(sites) > 1 or graph.nodes[sites[0]].shape != base[key].shape:
            continue
        seen += 1
        changes = [one[key] != base[key] for one in turned]
        batch_axes = _true_batch_axes(changes)
        batch_axis, interaction = graph.batch_axes[sites[0]], graph.interactions[sites[0]]
        if not any(bool(hit.any()) for hit in changes):
            assert interaction is Interaction.NONE and batch_axis is None
            continue
        assert interaction is (Interaction.SEPARATE if batch_axes else Interaction.MIXED), module
        assert not batch_axes or batch_axis in batch_axes, module
    assert seen
    assert bool(graph.lost) == (name in LOST)


def test_where_the_axis_is_lost_is_said() -> None:
    torch.manual_seed(0)
    model, inputs = CASES["opaque across"]()
    batch = (inputs[0].float(), torch.randn(B, B))
    found = dh.structure(model, batch, points=["inner"])
    assert "batch axis lost at aten.linalg_matrix_exp" in str(found)
    assert "batch axis lost at aten.linalg_matrix_exp" in str(dh.analyze(model, batch, points=["inner"]))


KERNEL = torch.randn(B, B, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ENDS: dict[str, tuple[Any, str]] = {  # what is between the points: why the second has no batch axis
    "transposed": (lambda h: h.T**2, "samples are mixed at aten.mm.default in module 'b'"),
    "rotated": (lambda h: h.rot90() ** 2, "samples are mixed at aten.mm.default in module 'b'"),
    "contracted": (lambda h: KERNEL @ h**2, "samples are mixed at aten.mm.default at "),
    "outer": (lambda h: (h[:, None] * h[None]).sum(0), "samples are mixed at aten.sum.dim_IntList at "),
    "summed": (lambda h: h.sum(0, keepdim=True).expand(B, B), "samples are mixed at aten.sum.dim_IntList at "),
    "permuted": (lambda h: h[torch.randperm(B)] * 2, "the batch axis is lost at aten.index.Tensor at "),
    "matrix function": (torch.linalg.matrix_exp, "the batch axis is lost at aten.linalg_matrix_exp.default at "),
    "mixed along an axis": (lambda h: h - h.mean(0), ""),
    "one sample": (lambda h: h[:1].expand(B, B), ""),
    "elementwise": (torch.tanh, ""),
}


class Pair(nn.Module):
    """Two points with something between them, and one that no sample reaches."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, B), nn.Linear(B, 3), between
        self.own = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x))) + self.own(torch.ones(2, dtype=x.dtype))


@pytest.mark.parametrize("name", ENDS)
def test_points_that_are_perturbed_as_a_whole_are_named_with_the_reason(name: str) -> None:
    torch.manual_seed(0)
    between, why = ENDS[name]
    model, batch = Pair(between).double(), (torch.randn(B, 4).double(), torch.randn(B, 3).double())
    points = ["a", "b", "own"]
    texts = [str(dh.structure(model, batch, points=points)), str(dh.analyze(model, batch, points=points))]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        H = dh.HessianOperator(model, batch, space="activation", points=points)
        dh.HessianOperator(model, batch)  # parameters have no batch axis to lose
        dh.HessianOperator(model, batch, space="activation", points=["a", "b"], batch_mode="joint")
    texts += [str(one.message) for one in told]
    assert H.shape[0] == B + (3 * B if why else 3) + 3 or name == "one sample"
    assert len(texts) == (3 if why else 2)
    for text in texts:
        assert (": 'b' behind it is perturbed as a whole" in text) == bool(why) and why in text, text
        assert "'a' behind" not in text and "'own'" not in text


def test_a_batch_of_one_moves_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("labels were moved")

    monkeypatch.setattr(labels, "moved", refuse)
    monkeypatch.setattr(labels, "tried", refuse)
    model, x = Fn(lambda y: y[:, torch.tensor([1, 0])] + y.view(-1)[:2]), torch.randn(1, 4)
    graph = dh.capture(model, (x, torch.randn(1, 2)), points=["inner"])
    assert graph.points[0].shape == (4,)
    assert all(c in (Interaction.NONE, Interaction.SEPARATE) for c in graph.interactions)
    assert graph.separable


class Scores(nn.Module):
    """Attention under a mask that is given, by sequences as long as the batch is large."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.q(x) @ x.transpose(1, 2) + mask).softmax(-1) @ x


def test_axes_of_one_length_are_told_apart_by_what_keeps_samples_apart() -> None:
    x, mask, y = torch.randn(B, B, 4), torch.zeros(B, B), torch.randn(B, B, 4)
    graph = dh.capture(Scores(), (x, mask, y), points=["q"])
    assert graph.separable and not graph.lost
    by_position = {position: graph.batch_axes[k] for k, position in graph.inputs.items()}
    assert by_position == {0: BatchAxis(0, 1, B, 1), 1: None, 2: BatchAxis(0, 1, B, 1)}

    class Last(nn.Module):
        """Time first."""

        def __init__(self) -> None:
            super().__init__()
            self.r, self.o = nn.GRU(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.r(x)[0][-1])

    graph = dh.capture(Last(), (x, torch.tensor([0, 1, 1])), points=["r"])
    assert graph.separable
    assert graph.batch_axes[graph.points[0].sites[0]] == BatchAxis(1, 1, B, 1)
