"""The plan edge by edge: which products a sweep runs and what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dag_hesse.ir import CurvatureGraph
from dag_hesse.plan.cost import product_flops
from dag_hesse.rules.region import Region
from dag_hesse.rules.table import pairs_of


@dataclass(frozen=True, slots=True)
class Edge:
    """One input of one swept node. FLOPs and bytes are those of one probe through all ``products``.

    ``products`` are ``jvp`` (tangent), ``vjp`` (adjoint) and ``second`` (λ-weighted second-order term).
    """

    source: int
    target: int
    op: str
    module: str
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    products: tuple[str, ...]
    flops: float
    bytes: float


def _active(graph: CurvatureGraph) -> list[bool]:
    sites = [k for point in graph.points for k in point.sites]
    return graph.active(sites)


def edges(graph: CurvatureGraph) -> list[Edge]:
    """All edges that a sweep between the graph's points passes, in order of execution of the tangent pass.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> from dag_hesse.plan import edges, fuse
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> graph = fuse(dh.capture(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["1"]))
        >>> [(edge.op, edge.products) for edge in edges(graph)][0]
        ('mm_bias', ('jvp', 'vjp'))
    """
    active, found = _active(graph), []
    for node in graph.nodes:
        if not (active[node.index] and node.is_differentiable):
            continue
        curved = {i for i, j in pairs_of(node) if active[node.inputs[i]] and active[node.inputs[j]]}
        flops = product_flops(graph, node)
        for slot, k in enumerate(node.inputs):
            if not active[k]:
                continue
            products = ("jvp", "vjp", "second") if slot in curved else ("jvp", "vjp")
            moved = sum(graph.nodes[i].numel for i in {k, *node.inputs[:2]}) + node.numel
            name = str(node.target) if isinstance(node.target, Region) else node.op.split(".")[1]
            found.append(
                Edge(
                    k,
                    node.index,
                    name,
                    node.owner,
                    graph.nodes[k].shape,
                    node.shape,
                    products,
                    float(len(products) * flops),
                    float(len(products) * moved * node.dtype.itemsize),
                )
            )
    return found


def costliest(found: Iterable[Edge], count: int = 10) -> list[Edge]:
    """The edges with the most FLOPs."""
    return sorted(found, key=lambda edge: -edge.flops)[:count]


def as_rows(found: Iterable[Edge]) -> list[dict[str, Any]]:
    """Edges as plain data, for JSON."""
    return [asdict(edge) for edge in found]


def render_edges(found: Iterable[Edge]) -> str:
    """A line an edge."""
    lines = [f"{'edge':<12}{'op':<28}{'shapes':<46}{'products':<18}{'MFLOP':>9}{'MiB':>8}"]
    for e in found:
        shapes = f"{list(e.shape)} -> {list(e.out_shape)}"
        lines.append(
            f"{f'%{e.source}->%{e.target}':<12}{e.op[:26]:<28}{shapes:<46}{'+'.join(e.products):<18}"
            f"{e.flops / 1e6:>9.2f}{e.bytes / 2**20:>8.2f}"
        )
    return "\n".join(lines)
