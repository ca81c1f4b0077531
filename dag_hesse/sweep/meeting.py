"""What ranks tell one another of a problem before they work on it: all but their samples must be alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from dag_hesse._capture import Batches
from dag_hesse._capture.losses import loss_text
from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.rules.region import Region
from dag_hesse.rules.table import pairs_of

Ops = dict[str, str]  # by op and module
_SUMS = re.compile(r"aten\.(add|sub|rsub|neg)\.")  # of a tensor and a number: the tensor's slope is the same everywhere


def of_loss(loss: Any, batches: Batches) -> dict[str, str]:
    """Which loss is meant where none was given: it goes by the batch."""
    return {} if loss is not None else {"the loss": loss_text(None, next(iter(batches.examples.values())))}


def of_points(graph: CurvatureGraph) -> dict[str, str]:
    """What vectors are made of."""
    return {f"the points' {k}.": f"{p.name!r} {p.shape} ({p.kind})" for k, p in enumerate(graph.points, 1)}


def of_ops(graph: CurvatureGraph, batches: Batches) -> Mapping[Any, Ops]:
    """What the first batch ran, by what it may be compared under: ranks compare what both have.

    A batch of the same shapes runs the same ops. One of another size may run others (attention, a single sample), but
    for the nonlinear functions of one argument. Nothing is said where values, or draws outside of PyTorch, decided.
    """
    if graph.guards or graph.batch_bound or _drew_outside(graph):
        return {}
    example = next(iter(batches.examples.values()))
    leaves, structure = example.signature
    any_size = [_without_size(leaf, example.size) for leaf in leaves]
    return {
        ("ops", repr(leaves), structure): _counted(_members(graph), once=False),
        ("functions", repr(any_size), structure): _counted(filter(_is_function, _members(graph)), once=True),
    }


def _without_size(leaf: Any, size: int) -> Any:
    """Shape and type of one of a batch's tensors, but for the number of samples."""
    if isinstance(leaf, str) or not leaf[0] or leaf[0][0] != size:
        return leaf
    return ("samples", *leaf[0][1:]), leaf[1]


def _drew_outside(graph: CurvatureGraph) -> bool:
    before, after = graph.rng_before, graph.rng_after
    return before is not None and after is not None and before.drew_outside(after)


def _members(graph: CurvatureGraph) -> Iterator[Node]:
    """Nodes as they were captured: those of fused regions one by one."""
    for node in graph.nodes:
        yield from node.target.members if isinstance(node.target, Region) else (node,)


def _is_function(node: Node) -> bool:
    """Whether a node is a nonlinear function of each element of one tensor: an activation, say."""
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or len(node.inputs) != 1:
        return False
    return (0, 0) in pairs_of(node) or (node.kind is Kind.PIECEWISE_LINEAR and not _SUMS.match(node.op))


def _counted(nodes: Iterable[Node], *, once: bool) -> Ops:
    """Ops that have derivatives, by name and module: how often each runs, or ``once`` that it does."""
    found = Counter((node.owner, node.op) for node in nodes if node.is_differentiable)
    return {
        f"{op} in {f'module {owner!r}' if owner else 'the model or its loss'}": "run" if once else f"run {n}×"
        for (owner, op), n in sorted(found.items())
    }
