"""Data movement that moves nothing goes. Graph in, graph out.

Identities go; a view of a view is one view; elementwise ops come before the views of what they take, so that a chain of
them is not cut by a change of shape (a linear layer flattens its input and shapes its output back).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from math import prod

import torch

from dag_hesse.ir import CurvatureGraph, Kind, Node, Ref
from dag_hesse.ir.rebuilt import rebuilt
from dag_hesse.rules.base import NOTHING, Moves
from dag_hesse.rules.table import RULES


def _moves(node: Node) -> Moves:
    rule = RULES.get(node.op)
    return NOTHING if rule is None else rule.moves


def _is_copy(node: Node) -> bool:
    """All elements in their order, in the same shape, whatever the arguments."""
    return Moves.VIEW not in (moves := _moves(node)) and Moves.SAME | Moves.ORDERED in moves


def _is_reshape(node: Node) -> bool:
    return Moves.ORDERED | Moves.VIEW in _moves(node)


def simplify(graph: CurvatureGraph) -> CurvatureGraph:
    """The same function with fewer nodes that move data."""
    return _without_unused_views(_Simplifier(graph).run())


def seeded_or_read(graph: CurvatureGraph) -> set[int]:
    """Nodes that must stay nodes of their own: points, ``out``, the loss, and values that Python looked at."""
    looked_at = (guard.node for guard in graph.guards)
    return {graph.loss, *graph.out, *looked_at, *(k for point in graph.points for k in point.sites)}


class _Simplifier:
    """Emits the nodes anew, in order; ``places`` says where the old ones are."""

    def __init__(self, graph: CurvatureGraph) -> None:
        self.graph, self.kept = graph, seeded_or_read(graph)
        self.nodes, self.origins, self.places = list[Node](), list[int](), dict[int, int]()
        self.pinned: set[int] = set()  # new places of what is seeded or read: nothing may be looked up behind them

    def run(self) -> CurvatureGraph:
        for old in self.graph.nodes:
            self.places[old.index] = place = self._place(old)
            self.nodes[place].taps += [name for name in old.taps if name not in self.nodes[place].taps]
            if old.index in self.kept:
                self.pinned.add(place)
        return rebuilt(self.graph, self.nodes, self.places, self.origins)

    def _emit(self, node: Node, inputs: Sequence[int], origin: int) -> int:
        node = replace(node, index=len(self.nodes), inputs=tuple(inputs), taps=[])
        self.nodes.append(node)
        self.origins.append(origin)
        return node.index

    def _place(self, old: Node) -> int:
        """Where the old node's value is, or is put."""
        inputs = [self.places[k] for k in old.inputs]
        if old.kind is Kind.CONST or old.target is None:  # a constant's copy may be written to
            return self._emit(old, inputs, old.index)
        same = self._identical(old)
        if same is not None and self._may_stand_for(old, old.inputs[same]):
            return inputs[same]
        if _is_reshape(old):
            return self._view(old, self._base(inputs[0]))
        bases = self._common_bases(old, inputs)
        if bases is None:
            return self._emit(old, inputs, old.index)
        first = next(base for base, k in zip(bases, inputs, strict=True) if base != k)
        return self._view(old, self._emit(replace(old, shape=self.nodes[first].shape), bases, self.origins[first]))

    def _identical(self, old: Node) -> int | None:
        """The slot of the input that the node's value is, if it is one."""
        if _is_copy(old):
            full = [0]
        elif Moves.SAME in _moves(old):
            full = [slot for slot, k in enumerate(old.inputs) if self.graph.nodes[k].numel]
        else:
            return None
        given = self.graph.nodes[old.inputs[full[0]]] if len(full) == 1 else None
        same = given is not None and (given.shape, given.dtype) == (old.shape, old.dtype)
        return full[0] if same else None

    def _may_stand_for(self, old: Node, k: int) -> bool:
        """Whether what is done to ``old`` can be done to its input ``k``: nobody else uses or means that."""
        if old.index not in self.kept:
            return True
        alone = self.graph.children[k] == [old.index] and self.graph.nodes[k].target is not None
        return alone and self.places[k] not in self.pinned and k not in self.kept

    def _base(self, place: int) -> int:
        """What a view shows."""
        node = self.nodes[place]
        shown = _is_reshape(node) and node.kind is not Kind.CONST and place not in self.pinned
        return node.inputs[0] if shown else place

    def _view(self, old: Node, base: int) -> int:
        """A view of ``base`` in the shape of ``old``."""
        if self.nodes[base].shape == old.shape and old.index not in self.kept:
            return base
        reshape = torch.ops.aten.reshape.default
        node = replace(
            old, op=str(reshape), target=reshape, args=(Ref(0), list(old.shape)), kwargs={}, kind=Kind.STRUCTURAL
        )
        return self._emit(node, [base], old.index)

    def _common_bases(self, old: Node, inputs: list[int]) -> list[int] | None:
        """What an elementwise op may be applied to before it is shaped as it is now; None where it cannot be."""
        rule = RULES.get(old.op)
        if rule is None or rule.partials is None or rule.align is not None:
            return None
        bases = {k: self._base(k) for k in inputs if self.nodes[k].shape == old.shape and self._base(k) != k}
        shapes = {self.nodes[b].shape for b in bases.values()}
        if len(shapes) != 1 or old.output is not None:
            return None
        shape = shapes.pop()
        for own in (self.nodes[k].shape for k in inputs if k not in bases):
            # a number, or one for each place of the last axis, which views as well may leave as it is
            spreads = prod(own) == 1 or (prod(own) == own[-1] == shape[-1])
            if not spreads or len(own) > len(shape):
                return None
        return [bases.get(k, k) for k in inputs]


def _without_unused_views(graph: CurvatureGraph) -> CurvatureGraph:
    """Views are left behind where ops now use what they show."""
    kept, uses = seeded_or_read(graph), [len(children) for children in graph.children]
    gone: set[int] = set()
    for node in reversed(graph.nodes):
        if _is_reshape(node) and uses[node.index] == 0 and node.index not in kept:
            gone.add(node.index)
            uses[node.inputs[0]] -= 1
    return without(graph, gone)


def without(graph: CurvatureGraph, gone: Set[int], changed: Mapping[int, Node] | None = None) -> CurvatureGraph:
    """The graph with nodes left out and nodes ``changed``, numbered anew."""
    if not gone and not changed:
        return graph
    origins = [node.index for node in graph.nodes if node.index not in gone]
    places = {old: new for new, old in enumerate(origins)}
    chosen = [(changed or {}).get(k, graph.nodes[k]) for k in origins]
    nodes = [
        replace(node, index=k, inputs=tuple(places[i] for i in node.inputs), taps=list(node.taps))
        for k, node in enumerate(chosen)
    ]
    return rebuilt(graph, nodes, places, origins)
