"""Fusion of elementwise ops: connected elementwise ops become one node (design §3, fuse). Graph in, graph out.

A region grows from its last op towards the inputs, as long as every child of what it takes in is inside and a sweep
moves no more tensors than before. What only a region needs of constants is evaluated inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dag_hesse.ir import CurvatureGraph, Kind, Node, Ref, verify
from dag_hesse.plan.attention import fuse_attention
from dag_hesse.plan.biases import fuse_biases
from dag_hesse.plan.simplify import seeded_or_read, simplify, without
from dag_hesse.rules.region import Region
from dag_hesse.rules.table import RULES, pairs_of


def fuse(graph: CurvatureGraph) -> CurvatureGraph:
    """The same function with fewer nodes; points, ``out`` and the loss stay nodes of their own."""
    return verify(_fuse_regions(fuse_attention(fuse_biases(simplify(graph)))))


def fuse_all(graphs: Sequence[CurvatureGraph]) -> list[CurvatureGraph]:
    """Each graph fused; one object for one object."""
    distinct = {id(graph): graph for graph in graphs}
    fused = {key: fuse(graph) for key, graph in distinct.items()}
    return [fused[id(graph)] for graph in graphs]


_LARGEST = 48  # members of a region, beyond which what is saved is little and finding it costly


class _Grower:
    def __init__(self, graph: CurvatureGraph) -> None:
        self.graph, self.kept = graph, seeded_or_read(graph)
        self.active = graph.active(self.kept - {graph.loss})
        self.reached = graph.descendants(self.kept)
        self.in_loss = graph.loss_subgraph
        self.taken: set[int] = set()

    def elementwise(self, k: int) -> bool:
        """Whether a node may be a member that derivatives pass."""
        node = self.graph.nodes[k]
        rule = None if node.kind in (Kind.CONST, Kind.OPAQUE) else RULES.get(node.op)
        if rule is None or rule.partials is None or not self.active[k] or k in self.taken:
            return False
        return rule.align is None or [self.active[i] for i in node.inputs] == [True] + [False] * (len(node.inputs) - 1)

    def is_curved(self, node: Node) -> bool:
        """Whether a node alone is worth a region: its derivatives are to be found in one pass."""
        return len(node.inputs) == 1 and bool(pairs_of(node))

    def constant(self, k: int) -> bool:
        """Whether a node may be evaluated inside: no point reaches it, and it draws nothing.

        What is detached of what a point reaches (or a mask) stays outside, though no derivative passes it: inside, it
        would make that an input of the region, through which the graph lets derivatives pass.
        """
        node = self.graph.nodes[k]
        reached = self.reached[k] or any(self.reached[i] for i in node.inputs)
        if reached or node.target is None or k in self.kept or k in self.taken:
            return False
        return not node.draws

    def region(self, root: int) -> set[int]:
        """The members of the region that ends in ``root``."""
        graph, members, refused = self.graph, {root}, set[int]()
        queue = list(graph.nodes[root].inputs)
        while queue:
            k = queue.pop()
            if k in members or k in self.kept or not set(graph.children[k]) <= members:
                continue
            same = graph.nodes[k].shape == graph.nodes[root].shape and self.in_loss[k] == self.in_loss[root]
            if not (same and self.elementwise(k)):
                continue
            if len(members) >= _LARGEST:
                break
            if self.cost(members | {k}) > self.cost(members) + self.cost({k}):
                refused.add(k)
                continue
            members.add(k)
            queue += [*refused, *graph.nodes[k].inputs]  # what did not pay may do now
            refused.clear()
        return self.with_constants(members)

    def with_constants(self, members: set[int]) -> set[int]:
        queue, members = [i for k in members for i in self.graph.nodes[k].inputs], set(members)
        while queue:
            k = queue.pop()
            if k not in members and set(self.graph.children[k]) <= members and self.constant(k):
                members.add(k)
                queue += self.graph.nodes[k].inputs
        return members

    def cost(self, members: set[int]) -> int:
        """Tensors of partials that a sweep reads."""
        node = self.node(members) if len(members) > 1 else self.graph.nodes[next(iter(members))]
        active = sum(self.active[i] for i in node.inputs)
        found = pairs_of(node)
        curved = [(i, j) for i, j in found if self.active[node.inputs[i]] and self.active[node.inputs[j]]]
        meets = isinstance(node.target, Region) and node.target.meet is not None
        return active + (1 + bool(curved) if meets else len(curved))

    def meeting(self, members: set[int]) -> int | None:
        """The first member that all active inputs have come to linearly, and only through which they go on."""
        graph, order = self.graph, sorted(k for k in members if self.active[k])
        before = {i for k in members for i in graph.nodes[k].inputs if self.active[i] and i not in members}
        if len(before) < 2:
            return None
        for n, k in enumerate(order):
            node = graph.nodes[k]
            if any(self.active[node.inputs[i]] and self.active[node.inputs[j]] for i, j in pairs_of(node)):
                return None
            if not any(i in before for later in order[n + 1 :] for i in graph.nodes[later].inputs):
                return k
            before.add(k)
        return None

    def node(self, members: set[int]) -> Node:
        """The region's node, with indices of the graph as inputs."""
        graph, order = self.graph, sorted(members)
        inputs = tuple(dict.fromkeys(i for k in order for i in graph.nodes[k].inputs if i not in members))
        place = {i: n for n, i in enumerate([*inputs, *order])}
        inner = tuple(
            replace(
                graph.nodes[k],
                index=place[k],
                inputs=tuple(place[i] for i in graph.nodes[k].inputs),
                kind=graph.nodes[k].kind if self.active[k] else Kind.CONST,
            )
            for k in order
        )
        meet, last = self.meeting(members), graph.nodes[order[-1]]
        region = Region(len(inputs), inner, None if meet is None else place[meet] - len(inputs))
        refs = tuple(Ref(n) for n in range(len(inputs)))
        made = replace(last, op="region", target=region, args=refs, kwargs={}, inputs=inputs, output=None)
        return replace(made, kind=Kind.SMOOTH if pairs_of(made) else Kind.PIECEWISE_LINEAR)


def _fuse_regions(graph: CurvatureGraph) -> CurvatureGraph:
    grower, regions, gone = _Grower(graph), dict[int, Node](), set[int]()
    for node in reversed(graph.nodes):
        if grower.elementwise(node.index):
            members = grower.region(node.index)
            if len(members) > 1 or grower.is_curved(node):
                regions[node.index] = grower.node(members)
                gone |= members - {node.index}
                grower.taken |= members
    return without(graph, gone, regions)
