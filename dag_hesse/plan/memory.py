"""Bytes that a sweep holds at its peak, found by walking the graph as the sweep does: tangents ahead, adjoints back.

What each call keeps is its rule's footprint; the walk adds what passes by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.ir.node import execute
from dag_hesse.rules.base import Moves
from dag_hesse.rules.footprint import EMPTY, NOTHING, OWN, Footprint, footprint
from dag_hesse.rules.region import Region
from dag_hesse.rules.table import pairs_of, rule_for

_CHUNK_BYTES = 64 << 20
_SHARED_BYTES = 8 << 20
_NOT_COMPUTED = (Kind.STRUCTURAL, Kind.PARAM)


def footprints(graph: CurvatureGraph, active: list[bool]) -> dict[int, Footprint]:
    """Per node that has derivatives, what its call keeps in sweeps through the ``active`` nodes."""
    found = {}
    for node in graph.nodes:
        if active[node.index] and node.is_differentiable:
            on = [active[k] for k in node.inputs]
            curved = any(on[i] and on[j] for i, j in pairs_of(node))
            found[node.index] = footprint(node, [graph.nodes[k] for k in node.inputs], on, curved)
    return found


def _nodes(node: Node, slots: Iterable[int]) -> list[int]:
    """The nodes that a call's slots stand for."""
    return [node.index if slot == OWN else node.inputs[slot] for slot in slots]


def _workspace(graph: CurvatureGraph, node: Node, rows: int) -> int:
    return rule_for(node).workspace(node, [graph.nodes[k].shape for k in node.inputs], rows)


def _unpooled(graph: CurvatureGraph, node: Node, rows: int) -> int:
    return rule_for(node).unpooled(node, [graph.nodes[k].shape for k in node.inputs], rows)


def _views(graph: CurvatureGraph) -> Iterator[int]:
    """Nodes that lie in their first input's memory; a reshape of a transposed tensor is none, as it copies.

    Found by running them on shapes, where what is computed lies in order.
    """
    shown: dict[int, Tensor] = {}
    for node in graph.nodes:
        if not node.is_differentiable or Moves.VIEW not in rule_for(node).moves:
            continue
        given = [shown.get(k, _shape(graph.nodes[k])) for k in node.inputs]
        try:
            shown[node.index] = found = execute(node, given)
        except RuntimeError:  # a view of what lies in another order than here
            yield node.index
            continue
        if found.untyped_storage()._cdata == given[0].untyped_storage()._cdata:
            yield node.index


def _shape(node: Node) -> Tensor:
    return torch.empty(node.shape, dtype=node.dtype, device="meta")


class _InMemory:
    """Nodes whose tangents, or adjoints, are in memory; a view keeps its base.

    ``bytes`` is of all; what belongs to a leaf is the caller's, or counted apart.
    """

    def __init__(self, graph: CurvatureGraph, copies: list[int] | None = None) -> None:
        self.graph, self.bases, self.counts = graph, list(range(len(graph.nodes))), Counter[int]()
        self.copies, self.bytes = copies or [1] * len(graph.nodes), 0
        for index in _views(graph):
            self.bases[index] = self.bases[graph.nodes[index].inputs[0]]

    def add(self, k: int) -> None:
        base = self.bases[k]
        if not self.counts[base]:
            self.bytes += self._size(base)
        self.counts[base] += 1

    def drop(self, k: int) -> None:
        base = self.bases[k]
        self.counts[base] -= 1
        if not self.counts[base]:
            self.bytes -= self._size(base)
            del self.counts[base]

    def _size(self, base: int) -> int:
        node = self.graph.nodes[base]
        return node.bytes * self.copies[base] if node.target is not None else 0


def linearization_bytes(graph: CurvatureGraph, sites: Iterable[int]) -> int:
    """Peak bytes of a linearization from ``sites`` on, forward and back; without the parameters."""
    return max(_linearized(graph, sites))


def kept_bytes(graph: CurvatureGraph, sites: Iterable[int]) -> int:
    """Bytes that a linearization from ``sites`` on holds for its sweeps; without parameters, batch and constants."""
    return _linearized(graph, sites)[-1]


def _linearized(graph: CurvatureGraph, sites: Iterable[int]) -> tuple[int, int, int]:
    """Peak of the forward pass, peak of the backward pass, and what is kept in the end."""
    prints, values = footprints(graph, graph.active(sites)), _InMemory(graph)
    return _evaluated(values, prints), *_bound(values, prints)


def _evaluated(values: _InMemory, prints: dict[int, Footprint]) -> int:
    """Peak of the forward pass, in which calls are linearized; what they keep is left in ``values``."""
    graph, own, peak = values.graph, 0, 0
    uses = [len(children) for children in graph.children]
    for node in graph.nodes:
        if node.target is None:
            continue
        values.add(node.index)
        kept = prints.get(node.index, EMPTY).values
        for k in _nodes(node, kept.slots):
            values.add(k)
        own += kept.bytes
        peak = max(peak, values.bytes + own + _passing(graph, node))
        for k in set(node.inputs):
            uses[k] -= 1
            if uses[k] == 0 and graph.nodes[k].target is not None:
                values.drop(k)
        if uses[node.index] == 0 and node.index != graph.loss:
            values.drop(node.index)
    return peak


def _bound(values: _InMemory, prints: dict[int, Footprint]) -> tuple[int, int]:
    """Peak of the backward pass, in which calls take λ, and then hold more or less than before; and the end."""
    graph, adjoints, peak = values.graph, _InMemory(values.graph), 0
    for index in reversed(prints):  # a λ that is handed on, to one that only this op uses, is one tensor
        for k in _nodes(graph.nodes[index], prints[index].passed):
            if graph.children[k] == [index]:
                adjoints.bases[k] = adjoints.bases[index]
    own = sum(one.values.bytes for one in prints.values())
    for index in reversed(prints):
        node, one = graph.nodes[index], prints[index]
        for k in _nodes(node, one.bound.slots - one.values.slots):
            values.add(k)
        for k in _nodes(node, one.values.slots - one.bound.slots):
            values.drop(k)
        for k in _nodes(node, one.adjoints):
            adjoints.add(k)
        own += one.bound.bytes - one.values.bytes
        peak = max(peak, values.bytes + adjoints.bytes + own + 2 * node.bytes)  # λ, and what comes of it
    return peak, values.bytes + adjoints.bytes + own


def _passing(graph: CurvatureGraph, node: Node) -> int:
    """Bytes that the evaluation of an op takes beside its operands and its value."""
    inner = len(node.target.members) - 1 if isinstance(node.target, Region) else 0
    return max(inner * node.bytes, _workspace(graph, node, 0) if node.is_differentiable else 0)


def sweep_bytes(
    graph: CurvatureGraph,
    sites: Iterable[int],
    reads: Iterable[int],
    channels: int = 1,
    batch_mode: str = "shared",
) -> int:
    """Peak bytes of one probe in so many channels from ``sites`` to ``reads``, with what is read; without the seeds.

    With ``batch_mode="shared"`` an activation's adjoint is summed over the samples as soon as it is read.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> from dag_hesse.plan.memory import sweep_bytes
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> graph = dh.capture(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["1"])
        >>> site = graph.points[0].sites[0]
        >>> sweep_bytes(graph, [site], [site]) >= 4 * 5 * 4  # an adjoint, float32
        True
    """
    prints, tangents = footprints(graph, graph.active(sites)), _InMemory(graph)
    share = graph.batch_size if batch_mode == "shared" else 1
    pooled = max(_ahead(tangents, prints), _back(tangents, prints, set(reads), channels, share))
    return pooled + max((_unpooled(graph, graph.nodes[k], channels) for k in prints), default=0)


def _ahead(tangents: _InMemory, prints: dict[int, Footprint]) -> int:
    """Peak of the tangent pass; what it saves is left in ``tangents``."""
    graph, residuals, peak = tangents.graph, 0, 0
    inner = [graph.nodes[k] for k in prints]
    useful = graph.ancestors(k for n in inner if prints[n.index].residual != NOTHING for k in n.inputs)
    uses, held = [len({c for c in children if c in prints}) for children in graph.children], set[int]()
    for node in inner:
        residual = prints[node.index].residual
        if useful[node.index]:
            tangents.add(node.index)
            held.add(node.index)
        residuals += residual.bytes
        for k in _nodes(node, residual.slots):
            tangents.add(k)
        peak = max(peak, tangents.bytes + residuals)
        for k in set(node.inputs):
            uses[k] -= 1
            if uses[k] == 0 and k in held:
                tangents.drop(k)
    return peak


def _back(tangents: _InMemory, prints: dict[int, Footprint], reads: set[int], channels: int, share: int) -> int:
    """Peak of the adjoint pass, which uses up the residuals; of what is read, one ``share``-th is kept."""
    graph = tangents.graph
    in_loss, inner = graph.loss_subgraph, [graph.nodes[k] for k in prints]
    curved = [n for n in inner if prints[n.index].residual != NOTHING and not in_loss[n.index]]
    both = graph.ancestors(k for n in curved for k in n.inputs)  # where the T channel comes by as well
    copies = [channels if on else 1 for on in both]
    adjoints = _InMemory(graph, copies)
    needed, met, active = graph.descendants(reads), set[int](), {n.index for n in inner} | reads
    residuals, found, peak = sum(one.residual.bytes for one in prints.values()), 0, 0
    for node in reversed(inner):
        residual = prints[node.index].residual
        if not needed[node.index] or not (node.index in met or residual != NOTHING):
            continue
        working, view = _workspace(graph, node, copies[node.index]), adjoints.bases[node.index] != node.index
        for k in {k for k in node.inputs if k in active and needed[k]}:
            base = graph.nodes[adjoints.bases[k]]
            if k in met:
                working += 0 if view else graph.nodes[k].bytes * copies[k]  # a term that is to be added
            elif base.kind is not Kind.PARAM:
                adjoints.add(k)
            elif base.index == k or base.index not in met:
                found += base.bytes * copies[k]
                met.add(base.index)
            met.add(k)
        peak = max(peak, tangents.bytes + residuals + adjoints.bytes + found + working)
        residuals -= residual.bytes
        for k in _nodes(node, residual.slots):
            tangents.drop(k)
        if node.index in met:
            adjoints.drop(node.index)
            found += node.bytes * copies[node.index] // share if node.index in reads else 0
    return peak


def shared_chunk(graph: CurvatureGraph, sites: Iterable[int]) -> int:
    """Probes that profit from being swept together: as many as keep what an op returns, on average, in the caches.

    Where one probe's tensors are too large for them already, weights are cheap to load beside them.
    """
    active = graph.active(sites)
    computed = [n.bytes for n in graph.nodes if active[n.index] and n.is_differentiable and n.kind not in _NOT_COMPUTED]
    return max(1, _SHARED_BYTES * len(computed) // max(1, sum(computed)))


def probe_chunk(per_probe: int, budget: int) -> int:
    """Probes to sweep together: enough to share the load of every weight, few enough for the caches."""
    return max(1, min(_CHUNK_BYTES, budget) // max(1, per_probe))
