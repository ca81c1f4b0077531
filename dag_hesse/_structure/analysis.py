"""Static analysis of a captured graph for its points, by graph algorithms in C++ or, without a compiler, in Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dag_hesse import native
from dag_hesse._structure import reachability
from dag_hesse._structure.distance import distances
from dag_hesse.ir import CurvatureGraph, Interaction, Kind
from dag_hesse.rules.table import pairs_of, rule_for

_GRAPHS = native.core or reachability


@dataclass(frozen=True)
class Structure:
    """What the graph alone says about the n points' blocks. All arrays are n×n, in the order of ``graph.points``.

    Attributes:
        gn_alive, tensor_alive: False where H_GN (H_T) is identically zero (design §3).
        rank_bound: per-sample bound on rank H_GN[v,w]: least node-capacity cut to ``out``, and rank ∇²L.
        shared_rank_bound: the same for the batch average, min(B·bound, d_v, d_w) (sharpens Proposition 31).
        distance: points passed on the way from v to w, or of both to where they meet; -1 if they never do. A parameter
            lies at its layer's op.
        coupled: where samples first interact on the way to ``out``; empty if nowhere.
    """

    graph: CurvatureGraph
    gn_alive: NDArray[np.bool_]
    tensor_alive: NDArray[np.bool_]
    rank_bound: NDArray[np.int64]
    shared_rank_bound: NDArray[np.int64]
    distance: NDArray[np.int64]
    coupled: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the points."""
        return tuple(point.name for point in self.graph.points)

    @property
    def alive(self) -> NDArray[np.bool_]:
        """False where the whole block is identically zero."""
        return self.gn_alive | self.tensor_alive

    def __str__(self) -> str:
        from dag_hesse._structure.text import render

        return render(self)


def _edges(graph: CurvatureGraph) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edges a derivative can pass, between nodes that reach the loss."""
    reaching = graph.ancestors([graph.loss])
    found = [
        (parent, node.index)
        for node in graph.nodes
        if node.is_differentiable and reaching[node.index]
        for parent in dict.fromkeys(node.inputs)
        if graph.nodes[parent].is_float
    ]
    table = np.array(found, dtype=np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def _meeting_pairs(graph: CurvatureGraph, *, loss_side: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of nodes that meet in a second derivative of an op of the loss (or of the model)."""
    reaching, in_loss = graph.ancestors([graph.loss]), graph.loss_subgraph
    found = [
        (node.inputs[i], node.inputs[j])
        for node in graph.nodes
        if reaching[node.index] and in_loss[node.index] == loss_side
        for i, j in pairs_of(node)
        if graph.nodes[node.inputs[i]].is_float and graph.nodes[node.inputs[j]].is_float
    ]
    table = np.array(found, dtype=np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def curved_ops(graph: CurvatureGraph) -> dict[str, int]:
    """Ops of the model in which points meet in a second derivative, and how many of each: all that H_T comes of."""
    reached = graph.descendants(site for point in graph.points for site in point.sites)
    reaching, in_loss = graph.ancestors([graph.loss]), graph.loss_subgraph
    ops = [
        node.op.split(".")[1] if node.op.count(".") > 1 else node.op
        for node in graph.nodes
        if reaching[node.index]
        and not in_loss[node.index]
        and any(reached[node.inputs[i]] and reached[node.inputs[j]] for i, j in pairs_of(node))
    ]
    return dict(Counter(ops))


def _loss_rank(graph: CurvatureGraph) -> int:
    """Bound on rank ∇²L of one sample: K−1 a row where a softmax over K classes follows, else the size of out."""
    size = sum(graph.per_sample_numel(index) for index in graph.out)
    if len(graph.out) != 1:
        return size
    reaching = graph.ancestors([graph.loss])
    index = graph.out[0]
    while True:
        children = [k for k in graph.children[index] if reaching[k]]
        if len(children) != 1:
            return size
        node = graph.nodes[children[0]]
        shifted = rule_for(node).shifted if node.is_differentiable else None
        if shifted is not None:
            classes = node.shape[node.args[shifted]]
            return graph.per_sample_numel(node.index) // classes * (classes - 1)
        if node.kind is not Kind.STRUCTURAL:
            return size
        index = node.index


def analyze_structure(graph: CurvatureGraph) -> Structure:
    """Analyze a graph that has points. No numerics: works on any size."""
    inputs, children = _edges(graph)
    sites = np.array([site for point in graph.points for site in point.sites], dtype=np.int64)
    points = np.array([k for k, point in enumerate(graph.points) for _ in point.sites], dtype=np.int64)
    count = len(graph.points)
    reached = _GRAPHS.reach(len(graph.nodes), inputs, children, sites, points, count)
    alive = [_GRAPHS.meetings(reached, *_meeting_pairs(graph, loss_side=side)).astype(bool) for side in (True, False)]
    capacity = np.array([graph.per_sample_numel(k) for k in range(len(graph.nodes))], dtype=np.int64)
    sinks = np.array(graph.out, dtype=np.int64)
    cuts = np.array(
        [_GRAPHS.min_cut(inputs, children, capacity, np.array(p.sites, dtype=np.int64), sinks) for p in graph.points],
        dtype=np.int64,
    )
    dims = np.array([point.dim for point in graph.points], dtype=np.int64)
    rank = np.minimum(np.minimum(cuts[:, None], cuts[None, :]), _loss_rank(graph))
    rank = np.where(alive[0], rank, 0)
    shared = np.minimum(rank * graph.batch_size, np.minimum(dims[:, None], dims[None, :]))
    return Structure(graph, alive[0], alive[1], rank, shared, distances(graph), _first_interaction(graph))


def _first_interaction(graph: CurvatureGraph) -> str:
    """Where samples first interact on the way to ``out``, for messages; empty if nowhere."""
    on_path = graph.ancestors(graph.out)
    for node in graph.nodes:
        if on_path[node.index] and node.kind is not Kind.CONST and graph.interactions[node.index] is Interaction.MIXED:
            return node.where
    return ""
