"""Sub-batches: sliced outputs and targets put into the loss, or slices of its tensors put through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dag_hesse._capture.batch import Batch
from dag_hesse._capture.evidence import as_it_is
from dag_hesse._capture.losses import Loss, evaluate
from dag_hesse._capture.taps import map_tensors
from dag_hesse.ir import BatchAxis, CurvatureGraph


def _batch_axis(x: Tensor, batch: int) -> BatchAxis | None:
    """The first axis of the batch's size; else a leading one that holds several rows a sample."""
    axis = next((k for k, n in enumerate(x.shape) if n == batch), None)
    if axis is not None:
        return BatchAxis(axis, 1, batch, 1)
    folded = x.ndim > 0 and x.shape[0] % batch == 0 and x.shape[0] > 0
    return BatchAxis(0, 1, batch, x.shape[0] // batch) if folded else None


def _take(x: Tensor, batch_axis: BatchAxis | None, samples: Tensor) -> Tensor:
    if batch_axis is None:
        return x
    split = x.unflatten(batch_axis.axis, (batch_axis.outer, batch_axis.batch, batch_axis.inner))
    picked = split.index_select(batch_axis.axis + 1, samples.to(x.device))
    return picked.flatten(batch_axis.axis, batch_axis.axis + 2)


def _join(pieces: Sequence[Tensor], batch_axis: BatchAxis | None) -> Tensor:
    if batch_axis is None or len(pieces) == 1:
        return pieces[0]
    split = [x.unflatten(batch_axis.axis, (batch_axis.outer, -1, batch_axis.inner)) for x in pieces]
    return torch.cat(split, batch_axis.axis + 1).flatten(batch_axis.axis, batch_axis.axis + 2)


@dataclass(frozen=True)
class Piece:
    """Some samples: tensors of the model's output, and of targets and keyword inputs."""

    outputs: list[Tensor]
    others: list[Tensor]


@dataclass(frozen=True)
class Derived:
    """A loss; its gradient and one product of its Hessian, at the outputs of each piece and by parameters."""

    value: float
    outputs: list[tuple[Tensor, Tensor]]
    parameters: tuple[Tensor, Tensor]


class OnOutputs:
    """A loss as a function of outputs and targets, for pieces of batches like one example."""

    def __init__(self, model: nn.Module, graph: CurvatureGraph, batch: Batch, loss: Loss | None) -> None:
        self.batch, self.loss = batch, loss
        with as_it_is(model, batch, loss, graph.written) as forward:
            self.output = map_tensors(forward.output(), lambda x, path: x.detach())
        outputs: list[Tensor] = []
        self.batch_axes: list[BatchAxis | None] = []

        def keep(x: Tensor, path: str) -> Tensor:
            outputs.append(x.detach())
            self.batch_axes.append(_output_batch_axis(graph, path, x, batch.size))
            return x

        map_tensors(self.output, keep)
        self.all = Piece(outputs, self.others(batch))
        batch_axes = input_batch_axes(graph, batch)
        self.other_batch_axes = batch_axes[len(batch_axes) - len(self.all.others) :]  # positional inputs come first

    def others(self, batch: Batch) -> list[Tensor]:
        """Targets and keyword inputs of a batch like the example."""
        return [x for x in pytree.tree_leaves((batch.kwargs, batch.targets)) if isinstance(x, Tensor)]

    def like(self, batch: Batch) -> Piece:
        """A batch like the example: with the outputs of that."""
        return Piece(self.all.outputs, self.others(batch))

    def piece(self, samples: Tensor, of: Piece) -> Piece:
        """Some samples of a piece that holds as many as the example."""
        return Piece(
            [_take(x, p, samples) for x, p in zip(of.outputs, self.batch_axes, strict=True)],
            [_take(x, p, samples) for x, p in zip(of.others, self.other_batch_axes, strict=True)],
        )

    def gradients(self, *pieces: Piece) -> tuple[float, list[Tensor]]:
        """The loss of the pieces put together, and its gradient at the outputs of each."""
        found = self.derivatives(pieces, ())
        return found.value, [first for first, _ in found.outputs]

    def derivatives(self, pieces: Sequence[Piece], parameters: Sequence[Tensor], seeds: Sequence[int] = ()) -> Derived:
        """The loss of the pieces put together, with its derivatives at the outputs of each and by ``parameters``.

        Second ones are products with random directions, of each piece from its seed (none: first derivatives alone).
        """
        floating = [[x.detach().clone().requires_grad_(x.is_floating_point()) for x in p.outputs] for p in pieces]
        outputs = [
            _join(each, batch_axis)
            for each, batch_axis in zip(zip(*floating, strict=True), self.batch_axes, strict=True)
        ]
        others = [
            _join(each, batch_axis)
            for each, batch_axis in zip(
                zip(*(p.others for p in pieces), strict=True), self.other_batch_axes, strict=True
            )
        ]
        groups = [[x for x in piece if x.requires_grad] for piece in floating] + [list(parameters)]
        leaves = [x for group in groups for x in group]
        with torch.enable_grad():
            value = self._value(outputs, others)
            first = torch.autograd.grad(value, leaves, allow_unused=True, create_graph=bool(seeds))
            second = _products(first, leaves, groups, (*seeds, -1)) if seeds else [None] * len(leaves)
        flat = [
            _flat(group, f, h)
            for group, f, h in zip(groups, _split(first, groups), _split(second, groups), strict=True)
        ]
        return Derived(float(value.detach()), flat[:-1], flat[-1])

    def _value(self, outputs: list[Tensor], others: list[Tensor]) -> Tensor:
        mine = iter(outputs)
        output = map_tensors(self.output, lambda x, path: next(mine))
        leaves, spec = pytree.tree_flatten((self.batch.kwargs, self.batch.targets))
        rest = iter(others)
        kwargs, targets = pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)
        return evaluate(output, self.batch, targets, kwargs, self.loss)


def _output_batch_axis(graph: CurvatureGraph, path: str, x: Tensor, batch: int) -> BatchAxis | None:
    sites = graph.taps.get(f"output.{path}" if path else "output", ())
    batch_axis = graph.batch_axes[sites[0]] if sites and graph.nodes[sites[0]].shape == x.shape else None
    return _batch_axis(x, batch) if batch_axis is None else batch_axis


def _products(
    first: Sequence[Tensor | None], leaves: list[Tensor], groups: list[list[Tensor]], seeds: Sequence[int]
) -> Sequence[Tensor | None]:
    """Second derivatives times random directions; none where there are none to be had."""
    directions = []
    for group, seed in zip(groups, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed + 1)
        directions += [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in group]
    terms = [(g * r).sum() for g, r in zip(first, directions, strict=True) if g is not None and g.requires_grad]
    try:
        return torch.autograd.grad(sum(terms), leaves, allow_unused=True) if terms else [None] * len(leaves)  # type: ignore[arg-type]
    except RuntimeError:  # an op without a second derivative
        return [None] * len(leaves)


def _split(found: Sequence[Tensor | None], groups: list[list[Tensor]]) -> list[list[Tensor | None]]:
    rest = iter(found)
    return [[next(rest) for _ in group] for group in groups]


def _flat(leaves: list[Tensor], first: list[Tensor | None], second: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    def line(found: list[Tensor | None]) -> Tensor:
        pairs = zip(leaves, found, strict=True)
        rows = [(torch.zeros_like(x) if g is None else g.detach()).reshape(-1).double() for x, g in pairs]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)

    return line(first), line(second)


def input_batch_axes(graph: CurvatureGraph, batch: Batch) -> list[BatchAxis | None]:
    """Where the samples lie in each of the batch's tensors; what the graph does not use goes by its sizes."""
    known = {position: graph.batch_axes[k] for k, position in graph.inputs.items()}
    found: list[BatchAxis | None] = []
    for position, x in enumerate(batch.tensors):
        batch_axis = known.get(position)
        if batch_axis is not None:
            found.append(batch_axis)
        else:  # an axis of the batch's size that the graph uses is not the batch's
            found.append(None if position in known and batch.size in x.shape else _batch_axis(x, batch.size))
    return found


def sub_batch(graph: CurvatureGraph, batch: Batch, samples: Tensor) -> Batch:
    """Some samples of a batch."""
    batch_axes = iter(input_batch_axes(graph, batch))

    def take(x: Any) -> Any:
        return _take(x, next(batch_axes), samples) if isinstance(x, Tensor) else x

    args, kwargs, targets = pytree.tree_map(take, batch.tree)
    return Batch(args, kwargs, targets, len(samples))


def put_together(graph: CurvatureGraph, batches: Sequence[Batch]) -> Batch | None:
    """All samples of several batches as one; None where their tensors do not fit."""
    columns = list(zip(*(batch.tensors for batch in batches), strict=True))
    batch_axes, found = input_batch_axes(graph, batches[0]), list[Tensor]()
    for column, batch_axis in zip(columns, batch_axes, strict=True):
        axis = None if batch_axis is None else batch_axis.axis
        rests = {tuple(n for k, n in enumerate(x.shape) if k != axis) for x in column}
        if len(rests) > 1 or (batch_axis is None and not all(torch.equal(x, column[0]) for x in column)):
            return None
        found.append(_join(column, batch_axis))
    given = iter(found)
    args, kwargs, targets = pytree.tree_map(lambda x: next(given) if isinstance(x, Tensor) else x, batches[0].tree)
    return Batch(args, kwargs, targets, sum(batch.size for batch in batches))


def parameter_gradient(model: nn.Module, batch: Batch, loss: Loss | None, written: Sequence[Tensor]) -> Tensor:
    """The loss's gradient by all parameters, frozen ones too, in one vector."""
    with as_it_is(model, batch, loss, written) as forward:
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        found = torch.autograd.grad(forward.loss(), parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1).double() for p, g in pairs])
