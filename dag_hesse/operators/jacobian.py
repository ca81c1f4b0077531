"""Products with the Jacobian of the model's output, sample by sample, over the linearization that an operator has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dag_hesse.errors import OptionError, VectorError, kind_of
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.sweep import Linearization, Problem
from dag_hesse.sweep.embed import joined, seed
from dag_hesse.sweep.meaning import Entry
from dag_hesse.sweep.passes import push
from dag_hesse.sweep.product import pullback

Order = tuple[int | None, ...]


def jacobian_product(problem: Problem, order: Order, segments: list[Tensor]) -> Tensor:
    """J v for segments (k, size) of k vectors: (k, *out), batches one behind the other."""
    found = []
    for entry, lin in _entries(problem):
        seeds: dict[int, Tensor] = {}
        for place, x in zip(order, segments, strict=True):
            if place is None:
                continue
            for site, z in seed(entry.graph, entry.points[place], x.detach()[:, None], "sum").items():
                own = z.to(entry.graph.nodes[site].dtype)
                seeds[site] = seeds[site] + own if site in seeds else own
        out = entry.graph.out[0]
        node = entry.graph.nodes[out]
        moved = push(lin, seeds, (out,)).get(out) if seeds else None
        blank = torch.zeros(len(segments[0]), *node.shape, dtype=node.dtype, device=problem.device)
        found.append(blank if moved is None else moved.clone())
    return torch.cat(found, dim=1 + _axis(problem)) if len(found) > 1 else found[0]


def transposed_product(problem: Problem, order: Order, form: VectorForm, u: Tensor) -> Tensor:
    """Jᵀ u for u (k, *out): (k, n)."""
    sizes = [entry.graph.nodes[entry.graph.out[0]].shape[_axis(problem)] for entry in problem.entries]
    pieces = u.split(sizes, dim=1 + _axis(problem)) if len(sizes) > 1 else [u]
    total = torch.zeros(len(u), form.size, dtype=form.dtype, device=form.device)
    for (entry, lin), piece in zip(_entries(problem), pieces, strict=True):
        out = entry.graph.out[0]
        sites = {k for point in entry.points for k in point.sites}
        adjoints = pullback(lin, {out: piece.contiguous()}, sites, "sum")
        columns = []
        for place, size in zip(order, form.sizes, strict=True):
            if place is None:
                columns.append(total.new_zeros(len(u), size))
                continue
            columns.append(joined(entry.graph, entry.points[place], adjoints, piece, "sum")[:, 0].to(form.dtype))
        total = total + torch.cat(columns, dim=1)
    return total


def output_rows(problem: Problem, u: Tensor) -> tuple[Tensor, bool]:
    """u (*out) or (*out, k) as rows (k, *out), and whether it was several.

    Raises:
        VectorError: it has another shape or type.
    """
    graph, axis = problem.graphs[0], _axis(problem) if len(problem.entries) > 1 else 0
    node = graph.nodes[graph.out[0]]
    shape = list(node.shape)
    if len(problem.entries) > 1:
        shape[axis] = sum(entry.graph.nodes[entry.graph.out[0]].shape[axis] for entry in problem.entries)
    if not isinstance(u, Tensor) or u.dtype != node.dtype or u.device != problem.device:
        raise VectorError(f"u is {_described(u)}; expected a tensor of {node.dtype} on {problem.device}.")
    if list(u.shape) == shape:
        return u.detach()[None], False
    if list(u.shape[:-1]) == shape and u.shape[-1]:
        return u.detach().movedim(-1, 0), True
    raise VectorError(f"u has shape {tuple(u.shape)}; expected that of the outputs, {tuple(shape)}, or with k columns.")


def _described(u: object) -> str:
    return f"{u.dtype} on {u.device}" if isinstance(u, Tensor) else kind_of(u)


def check_output(problem: Problem) -> None:
    """Raise :class:`OptionError` where there is no one output, or vectors are not those of all samples."""
    if problem.batch_mode != "shared" or problem.ranks is not None or problem.compiled:
        raise OptionError("Jacobian products take batch_mode='shared', one process, and compile=False.")
    if any(len(graph.out) != 1 for graph in problem.graphs):
        count = len(problem.graphs[0].out)
        raise OptionError(f"the loss consumes {count} tensors, so there is no one output: name it with output=.")


def _axis(problem: Problem) -> int:
    """Where the samples lie in the output."""
    found = problem.graphs[0].batch_axes[problem.graphs[0].out[0]]
    if found is None and len(problem.entries) > 1:
        raise OptionError("the output of several batches has no axis of samples to be put together along.")
    return 0 if found is None else found.axis


def _entries(problem: Problem) -> Iterator[tuple[Entry, Linearization]]:
    for entry, lin in problem.linearizations():
        assert isinstance(lin, Linearization)  # nothing is compiled
        yield entry, lin
