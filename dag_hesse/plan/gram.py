"""What the Gram route would take, and whether it can be taken (design §3, Gram route)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dag_hesse.ir import CurvatureGraph
from dag_hesse.plan.cost import Cost, path_cost
from dag_hesse.plan.task import Task

_ROWS = 4096  # most rows of a Gram matrix
_CORES = 3  # matrices of ∇²L's size, in float64, while it is factored


@dataclass(frozen=True)
class GramRoute:
    """Over all batches: pullbacks, bytes held, and the cost of all of it."""

    columns: int
    held: int
    cost: Cost
    feasible: bool  # rows few enough for their Gram matrices, or none needed


@dataclass(frozen=True)
class _Rows:
    """Rows of S: all of them, in how many groups, and the most in one."""

    count: int
    groups: int
    height: int


def gram_in_blocks(rows: int, dims: Sequence[int]) -> bool:
    """Whether blocks between points of these sizes take less room than S with so many rows (design §3, Gram route)."""
    return sum(dims[v] * d for v in range(len(dims)) for d in dims[v:]) <= rows * sum(dims)


def can_gram(graphs: Sequence[CurvatureGraph]) -> bool:
    """Whether all points have a Jacobian from ``out``."""
    in_loss = graphs[0].loss_subgraph
    inside = any(in_loss[k] or k in graphs[0].out for p in graphs[0].points for k in p.sites)
    return not inside and not any(_nested_out(graph) for graph in graphs)


def gram_route(task: Task) -> GramRoute:
    """What it takes."""
    graphs, dims = task.graphs, task.dims
    counted = [(n, *columns_of(graph)) for n, graph in zip(task.counts, graphs, strict=True)]
    columns, count = sum(n * c for n, c, _ in counted), sum(n * r for n, _, r in counted)
    alone = task.batch_mode == "per_sample"  # every sample has a Gram matrix of its own
    height = max(r // g.batch_size for (_, _, r), g in zip(counted, graphs, strict=True)) if alone else count
    rows = _Rows(count, count // max(height, 1), height)
    blocks = not alone and gram_in_blocks(count, dims)
    held, flops = _as_blocks(rows, dims) if blocks else _as_rows(rows, dims, task.itemsize)
    cost = Cost(flops, 0.0)
    for (n, c, _), graph in zip(counted, graphs, strict=True):
        cost = cost + path_cost(graph, [k for point in graph.points for k in point.sites]) * (n * c)
    factored = max(_hessian_bytes(graph) for graph in graphs)
    return GramRoute(columns, held + factored, cost, blocks or height <= _ROWS)


def _hessian_bytes(graph: CurvatureGraph) -> int:
    """Of ∇²L over ``out``, while it is factored."""
    size = sum(graph.nodes[k].numel for k in graph.out)
    return _CORES * 8 * size * (size // graph.batch_size if graph.separable_loss else size)


def columns_of(graph: CurvatureGraph) -> tuple[int, int]:
    """(pullbacks, rows of S) that one batch needs."""
    size = sum(graph.nodes[k].numel for k in graph.out)
    if not graph.separable_loss:
        return size, size
    columns = size // graph.batch_size
    unbatched = any(p.kind == "parameter" or any(graph.batch_axes[k] is None for k in p.sites) for p in graph.points)
    alone = graph.separable and not unbatched
    return (columns if alone else size), size


def _nested_out(graph: CurvatureGraph) -> bool:
    return any(graph.descendants([a])[b] for a in graph.out for b in graph.out if a != b)


def _as_blocks(rows: _Rows, dims: Sequence[int]) -> tuple[int, float]:
    """(bytes, FLOPs) where the blocks are held and added up."""
    areas = [dims[v] * dims[w] for v in range(len(dims)) for w in range(v, len(dims))]
    return 8 * sum(areas), sum(2.0 * rows.count * area for area in areas)


def _as_rows(rows: _Rows, dims: Sequence[int], itemsize: int) -> tuple[int, float]:
    """(bytes, FLOPs) where S is held and norms come from its Gram matrices."""
    height, small = rows.height, [min(d, rows.height) for d in dims]
    roots = sum(2.0 * height**2 * d + 9.0 * height**3 for d in dims if d > height)
    cores = sum(2.0 * height * small[v] * small[w] for v in range(len(dims)) for w in range(v, len(dims)))
    return rows.count * sum(dims) * itemsize + 8 * height * height * len(dims), rows.groups * (roots + cores)
