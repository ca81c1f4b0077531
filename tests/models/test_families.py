"""Families of Hugging Face models with their own losses, by parameters and by activations, against double-backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dag_hesse as dh
from tests.models.families import FAMILIES, batch_of, family
from tests.oracle import Leaves, Truth, error

# PyTorch's second derivative of weight norm is wrong; its first one decides, by central differences.
BY_DIFFERENCES = {"wav2vec2"}


# Tables that are computed from parameters alone.
_BIAS = "swinv2.encoder.layers.{}.blocks.0.attention.self.continuous_position_bias_mlp.{}"
WITHOUT_BATCH = {"Swin-v2": [_BIAS.format(layer, k) for layer in range(2) for k in range(3)]}


def gradient(model: nn.Module, batch: dict[str, Tensor], places: Sequence[Tensor], **options: Any) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(**batch).loss
    found = torch.autograd.grad(loss, places, allow_unused=True, **options)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, places, strict=True)]


def turned(first: Sequence[Tensor], places: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    """The derivative of gradients along a direction, by double-backward."""
    pairs = [(g, v) for g, v in zip(first, along, strict=True) if g.requires_grad]
    found = torch.autograd.grad([g for g, _ in pairs], places, [v for _, v in pairs], allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, places, strict=True)]
    return torch.cat([g.flatten() for g in filled])


def by_differences(
    model: nn.Module, batch: dict[str, Tensor], places: Sequence[Tensor], along: Sequence[Tensor], step: float = 1e-5
) -> Tensor:
    def at(offset: float) -> Tensor:
        with torch.no_grad():
            for p, v in zip(places, along, strict=True):
                p.add_(v, alpha=offset)
        found = torch.cat([g.flatten() for g in gradient(model, batch, places)])
        with torch.no_grad():
            for p, v in zip(places, along, strict=True):
                p.sub_(v, alpha=offset)
        return found

    return (at(step) - at(-step)) / (2 * step)


def middle(model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """Two modules in lists of layers, whose outputs are tensors: the first and the last that run."""
    seen: list[str] = []
    wanted = [n for n, m in model.named_modules() if n.split(".")[-1].isdigit() and not isinstance(m, nn.ModuleList)]

    def note(name: str) -> Any:
        return lambda module, args, output: seen.append(name) if _is_plain(output) else None

    handles = [model.get_submodule(n).register_forward_hook(note(n)) for n in wanted]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    once = [n for n in dict.fromkeys(seen) if seen.count(n) == 1 and "dropout" not in n]
    return list(dict.fromkeys((once[0], once[-1])))


def _is_plain(output: Any) -> bool:
    first = output[0] if isinstance(output, tuple) else output
    return isinstance(first, Tensor) and first.is_floating_point()


def grouped(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.xdist_group(name))


@pytest.mark.parametrize("name", map(grouped, FAMILIES))
def test_products_by_parameters(name: str) -> None:
    model, batch = family(name), batch_of(name)
    kept = {key: x.clone() for key, x in model.state_dict().items()}
    state = torch.get_rng_state()
    operator = dh.HessianOperator(model, batch)
    own = [dict(model.named_parameters())[n] for n in operator.names]
    v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = operator @ v
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, kept[key]) for key, x in model.state_dict().items())
    along = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in own]), own, strict=True)]
    if name in BY_DIFFERENCES:
        assert error(found, by_differences(model, batch, own, along)) < 1e-7
    else:
        assert error(found, turned(gradient(model, batch, own, create_graph=True), own, along)) < 1e-10


@pytest.mark.parametrize("name", [grouped(n) for n in FAMILIES if n not in BY_DIFFERENCES])
def test_products_by_activations(name: str) -> None:
    model, batch = family(name), batch_of(name)
    points = middle(model, batch)
    with Leaves(model, points) as leaves, sdpa_kernel(SDPBackend.MATH):
        loss = model(**batch).loss
    flat = [leaves.made[n][0] for n in points]
    first = torch.autograd.grad(loss, flat, create_graph=True)
    operator = dh.HessianOperator(model, batch, points=points, space="activation", batch_mode="joint")
    assert list(operator.names) == points
    v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in flat]), flat, strict=True)]
    assert error(operator @ v, turned(first, flat, along)) < 1e-10


@pytest.mark.parametrize("name", map(grouped, FAMILIES))
def test_default_points(name: str) -> None:
    """The map is finite, and a point's size is that of one sample."""
    model, batch = family(name), batch_of(name)
    shapes: dict[str, torch.Size] = {}

    def note(key: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = next(iter(output.values())) if isinstance(output, dict) else output
            shapes[key] = (first[0] if isinstance(first, tuple) else first).shape

        return hook

    handles = [
        m.register_forward_hook(note(n)) for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    report = dh.analyze(model, batch, probes=2)
    assert np.isfinite(report.resonance).all()
    # An expert takes the tokens that are routed to it, whatever sample they are of; what it gives back is sorted again.
    assert [where for where in report.facts["lost"] if "experts" not in where] == []
    for point in report.points:
        batch_size = 1 if point.name in WITHOUT_BATCH.get(name, ()) else 2
        assert point.dim == shapes[point.name.split("[")[0]].numel() // batch_size, point


@pytest.mark.parametrize("name", [grouped(n) for n in ("Mixtral", "BART", "ConvNeXt")])
def test_blocks(name: str) -> None:
    model, batch = family(name), batch_of(name)
    point = middle(model, batch)[-1]
    head = next(n for n, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear))
    truth = Truth(model, lambda: model(**batch).loss, [point], out=head)
    report = dh.analyze(model, batch, points=[point], mode="exact")
    scale = float(truth.block(point, point, "full", "shared").norm())
    for part in ("full", "gn", "tensor"):
        expected = truth.block(point, point, part, "shared")
        assert error(report.block(point, point, part), expected, scale) < 1e-10, part


def test_grouped_products_of_experts_in_single_precision() -> None:
    torch.manual_seed(0)
    model, batch = FAMILIES["Mixtral"]().eval(), batch_of("Mixtral")
    assert model.config._experts_implementation == "grouped_mm"
    operator = dh.HessianOperator(model, batch)
    own = [dict(model.named_parameters())[n] for n in operator.names]
    v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(1))
    along = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in own]), own, strict=True)]
    assert error(operator @ v, turned(gradient(model, batch, own, create_graph=True), own, along)) < 1e-4
