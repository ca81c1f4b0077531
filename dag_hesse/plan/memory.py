"""Bytes that a sweep holds at its peak, found by walking the graph as the sweep does: tangents ahead, adjoints back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.rules.batch_norm import has_fixed_statistics
from dag_hesse.rules.convolution import geometry
from dag_hesse.rules.region import Region
from dag_hesse.rules.table import pairs_of

_CHUNK_BYTES = 64 << 20
_SHARED_BYTES = 8 << 20
_NOT_COMPUTED = (Kind.STRUCTURAL, Kind.PARAM)
_OF_SUMS = {"aten._log_softmax.default"}  # of λ their second-order terms want a sum alone
_CONVOLUTION = "aten.convolution.default"
_VIEWS = {
    "view",
    "reshape",
    "_unsafe_view",
    "transpose",
    "permute",
    "t",
    "expand",
    "squeeze",
    "unsqueeze",
    "slice",
    "select",
}


@dataclass(frozen=True, slots=True)
class Held:
    """What a node's residual holds: tangents of these nodes, and bytes of its own."""

    tangents: frozenset[int] = frozenset()
    own: int = 0


def held(graph: CurvatureGraph, node: Node, active: list[bool]) -> Held:
    """What the rule of ``node`` keeps in a sweep through the ``active`` nodes, as its kind and shapes decide."""
    inputs = [graph.nodes[k] for k in node.inputs]
    pairs = [pair for pair in pairs_of(node) if all(active[node.inputs[slot]] for slot in pair)]
    if not pairs:
        return Held()
    if isinstance(node.target, Region) and node.target.meet is not None:
        return Held(own=node.bytes)
    if node.op == "aten._log_softmax.default":
        return Held(frozenset({node.index}))
    if node.op == "dag_hesse.standardize.default":  # its own tangent, and two numbers a row
        return Held(frozenset({node.index}), 2 * node.bytes // prod(node.shape[k] for k in node.args[1]))  # type: ignore
    if node.kind is Kind.ROWWISE:
        return Held(own=inputs[0].bytes)
    if node.op == "dag_hesse.batch_affine.default" and has_fixed_statistics(node, [active[k] for k in node.inputs]):
        return Held(own=2 * inputs[1].bytes)
    if node.kind is Kind.CONTRACTION:
        a, b = inputs[:2]
        early = b.numel < a.numel
        if node.op == _CONVOLUTION:
            early = not geometry(a.shape, b.shape, node.shape, node.args).joins
        return Held(frozenset({b.index}), b.bytes) if early else Held(frozenset({a.index, b.index}))
    return Held(frozenset(node.inputs[slot] for pair in pairs for slot in pair))


class _Live:
    """Nodes whose tangents, or adjoints, are in memory; a view keeps its base.

    ``bytes`` is of all; what belongs to a leaf is the caller's, or counted apart.
    """

    def __init__(self, graph: CurvatureGraph, copies: list[int] | None = None) -> None:
        self.graph, self.bases, self.counts = graph, list(range(len(graph.nodes))), Counter[int]()
        self.copies, self.bytes = copies or [1] * len(graph.nodes), 0
        for node in graph.nodes:
            if node.op.startswith("aten.") and node.op.split(".")[1] in _VIEWS:
                self.bases[node.index] = self.bases[node.inputs[0]]

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
        return node.bytes * self.copies[base] if node.is_differentiable else 0


def linearization_bytes(graph: CurvatureGraph, starts: Iterable[int]) -> int:
    """Peak bytes of a linearization from ``starts`` on, forward and back; without the parameters."""
    active, values, nodes = graph.active(starts), _Live(graph), graph.nodes
    inner = [node for node in nodes if active[node.index] and node.is_differentiable]
    transposes, bent, extra, peak = (
        set[int](),
        set[int](),
        0,
        0,
    )  # what keeps λ or its transpose, or an h, on the way back
    for node in inner:
        curved, on = held(graph, node, active) != Held(), [active[k] for k in node.inputs]
        if node.kind is Kind.CONTRACTION:
            for slot in (0, 1):
                if on[1 - slot]:
                    values.add(node.inputs[slot])
            extra += _cropped(graph, node) if on[0] else 0
            transposes |= {values.bases[node.index]} if curved else set()
        elif node.kind is Kind.ROWWISE:
            values.add(node.index)
            transposes |= {values.bases[node.inputs[0]]} if curved and node.op not in _OF_SUMS else set()
        elif node.op == "dag_hesse.batch_affine.default" and any(on[1:]):
            values.add(node.inputs[0])
            transposes.add(values.bases[node.inputs[0]])
        elif curved:
            extra += node.bytes  # what c and h come of; they take its place
            bent.add(node.index)
        elif "max_pool" in node.op:
            extra += node.numel * torch.int64.itemsize
        elif "relu" in str(node.target):  # its derivative is read off its value
            values.add(node.index)
        peak = max(peak, values.bytes + extra + _passing(graph, node))
    kept = values.bytes + extra
    for node in reversed(inner):
        peak = max(peak, kept + _passing(graph, node))
        kept += node.bytes * ((node.index in transposes) + (node.index in bent))
    return max(peak, kept)


def _passing(graph: CurvatureGraph, node: Node) -> int:
    """Bytes of a value, or of its λ, and what comes of it; or of the layout that a vendor gives a weight."""
    return max(2 * node.bytes, graph.nodes[node.inputs[1]].bytes if node.op == _CONVOLUTION else 0)


def _cropped(graph: CurvatureGraph, node: Node) -> int:
    """Bytes of a copy of a convolution's weight without its dead taps."""
    if node.op != _CONVOLUTION:
        return 0
    x, w = (graph.nodes[k] for k in node.inputs[:2])
    live, whole = prod(geometry(x.shape, w.shape, node.shape, node.args).kernel), prod(w.shape[2:])
    return w.bytes * live // whole if live < whole else 0


def _workspace(graph: CurvatureGraph, node: Node, copies: int) -> int:
    """Bytes of the layouts of its own that a vendor's convolution copies into, one operand at a time."""
    if node.op != _CONVOLUTION:
        return 0
    x, w = (graph.nodes[k] for k in node.inputs[:2])
    geo = geometry(x.shape, w.shape, node.shape, node.args)
    weight = 0 if geo.is_matrix(geo.batch) else _cropped(graph, node) or w.bytes
    return max(copies * node.bytes, copies * x.bytes, weight)


def sweep_bytes(
    graph: CurvatureGraph,
    starts: Iterable[int],
    reads: Iterable[int],
    channels: int = 1,
    batch_mode: str = "shared",
) -> int:
    """Peak bytes of one probe in so many channels from ``starts`` to ``reads``, with what is read; without the seeds.

    With ``batch_mode="shared"`` an activation's adjoint is summed over the samples as soon as it is read.

    Example:
        >>> import torch, dag_hesse as dh
        >>> from dag_hesse.plan.memory import sweep_bytes
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> graph = dh.capture(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["1"])
        >>> site = graph.points[0].sites[0]
        >>> sweep_bytes(graph, [site], [site]) >= 4 * 5 * 4  # an adjoint, float32
        True
    """
    active = graph.active(starts)
    inner = [n for n in graph.nodes if active[n.index] and n.is_differentiable]
    kept = {n.index: held(graph, n, active) for n in inner}
    tangents = _Live(graph)
    share = graph.batch_size if batch_mode == "shared" else 1
    return max(_ahead(tangents, inner, kept), _back(tangents, inner, kept, set(reads), channels, share))


def _ahead(tangents: _Live, inner: list[Node], kept: dict[int, Held]) -> int:
    """Peak of the tangent pass; what it keeps is left in ``tangents``."""
    graph, noted, peak = tangents.graph, 0, 0
    useful = graph.ancestors(k for n in inner if kept[n.index] != Held() for k in n.inputs)
    readers, alive = [len({c for c in children if c in kept}) for children in graph.children], set[int]()
    for node in inner:
        if useful[node.index]:
            tangents.add(node.index)
            alive.add(node.index)
        noted += kept[node.index].own
        for k in kept[node.index].tangents:
            tangents.add(k)
        peak = max(peak, tangents.bytes + noted)
        for k in set(node.inputs):
            readers[k] -= 1
            if readers[k] == 0 and k in alive:
                tangents.drop(k)
    return peak


def _back(tangents: _Live, inner: list[Node], kept: dict[int, Held], reads: set[int], channels: int, share: int) -> int:
    """Peak of the adjoint pass, which uses up what the tangent pass left; of what is read, one ``share``-th is kept."""
    graph = tangents.graph
    in_loss = graph.loss_subgraph
    bent = [n for n in inner if kept[n.index] != Held() and not in_loss[n.index]]
    both = graph.ancestors(k for n in bent for k in n.inputs)  # where the T channel comes by as well
    copies = [channels if on else 1 for on in both]
    adjoints = _Live(graph, copies)
    needed, met, active = graph.descendants(reads), set[int](), {n.index for n in inner} | reads
    noted, found, peak = sum(one.own for one in kept.values()), 0, 0
    for node in reversed(inner):
        own = kept[node.index]
        if not needed[node.index] or not (node.index in met or own != Held()):
            continue
        working, view = _workspace(graph, node, copies[node.index]), adjoints.bases[node.index] != node.index
        for k in {k for k in node.inputs if k in active and needed[k]}:
            source = graph.nodes[adjoints.bases[k]]
            if k in met:
                working += 0 if view else graph.nodes[k].bytes * copies[k]  # a term that is to be added
            elif source.kind is not Kind.PARAM:
                adjoints.add(k)
            elif source.index == k or source.index not in met:
                found += source.bytes * copies[k]
                met.add(source.index)
            met.add(k)
        peak = max(peak, tangents.bytes + noted + adjoints.bytes + found + working)
        noted -= own.own
        for k in own.tangents:
            tangents.drop(k)
        if node.index in met:
            adjoints.drop(node.index)
            found += node.bytes * copies[node.index] // share if node.index in reads else 0
    return peak


def shared_chunk(graph: CurvatureGraph, starts: Iterable[int]) -> int:
    """Probes that profit from being swept together: as many as keep what an op returns, on average, in the caches.

    Where one probe's tensors are too large for them already, weights are cheap to load beside them.
    """
    active = graph.active(starts)
    computed = [n.bytes for n in graph.nodes if active[n.index] and n.is_differentiable and n.kind not in _NOT_COMPUTED]
    return max(1, _SHARED_BYTES * len(computed) // max(1, sum(computed)))


def probe_chunk(per_probe: int, budget: int) -> int:
    """Probes to sweep together: enough to share the load of every weight, few enough for the caches."""
    return max(1, min(_CHUNK_BYTES, budget) // max(1, per_probe))
