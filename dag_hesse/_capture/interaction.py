"""Where the batch axis of every tensor lies, and whether samples interact: read off shapes and ops, no model is run.

Data movement is followed by arithmetic on the batch axis (``batch_axis.py``), or by moving sample numbers through the
op itself (``labels.py``); everything else has a rule per family (``families.py``). Whatever is not
understood counts as mixing samples, which is always safe: it only refuses ``per_sample`` and takes the general path
elsewhere. Where an axis that was known cannot be followed, the graph says so in ``lost``; why a tensor that depends on
samples has no axis of them, in ``ends``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from dag_hesse._capture import labels
from dag_hesse._capture.batch import Batch
from dag_hesse._capture.batch_axis import FREE
from dag_hesse._capture.dependence import GONE, NONE, State, is_linear, mixed, separate
from dag_hesse._capture.families import ARITHMETIC, FOLLOW, samples_of
from dag_hesse._capture.whole import LOST as LOST_AT
from dag_hesse._capture.whole import MIXED
from dag_hesse.ir import BatchAxis, CurvatureGraph, Interaction, Kind, Node
from dag_hesse.rules.base import Samples

_MOST_CHOICES = 16  # of the inputs' batch axes
_LITERAL = "dag_hesse.literal"


class Walker:
    """Visits the nodes in order.

    ``apart``: nodes declared to be separate, whatever made them. ``axes``: batch axes of inputs, where these are not
    the first of their size.
    """

    def __init__(
        self,
        graph: CurvatureGraph,
        batch: Batch,
        apart: frozenset[int] = frozenset(),
        axes: Mapping[int, int | None] | None = None,
    ) -> None:
        self.graph, self.size, self.apart, self.axes = graph, batch.size, apart, axes or {}
        self.constants = labels.Constants(graph, batch.tensors)
        self.states: list[State] = []
        self.inert: list[bool] = []  # nothing that can be a point is behind it
        self.ends: list[str] = []  # where the batch axis ends before a node, if it does
        self.lost: list[str] = []

    def run(self) -> list[State]:
        for node in self.graph.nodes:
            state = self.leaf(node) if node.target is None else self.visit(node)
            still = node.kind is not Kind.PARAM and not node.taps and all(self.inert[k] for k in node.inputs)
            self.inert.append(still or node.kind is Kind.CONST)
            # No derivative goes from sample to sample through a constant, or a number made of inputs (a mask's sum).
            fixed = node.kind is Kind.CONST or (still and node.numel == 1)
            if fixed and state.interaction in (Interaction.MIXED, Interaction.SUMMED):
                state = State(Interaction.NONE, state.batch_axis, lost=state.lost)
            elif state.lost and not any(self.states[k].lost and not self.inert[k] for k in node.inputs):
                self.lost.append(node.where)
            if node.index in self.apart and state.batch_axis is not None:
                state = replace(state, interaction=Interaction.SEPARATE, lost=False)
            self.states.append(state)
            self.ends.append(self.end(node, state))
        if self.size > 1 and all(self.states[k].free for k in self.graph.out):
            self.lost += [node.where for node in self.graph.nodes if self.uses_numbers(node)][:1]
        return self.states

    def end(self, node: Node, state: State) -> str:
        """Why and where a tensor that depends on samples has come to have no axis of them; empty where it has one."""
        if state.batch_axis is not None or state.free or state.one >= 0:
            return ""
        before = next((self.ends[k] for k in node.inputs if self.ends[k]), "")
        return before or f"{LOST_AT if state.lost else MIXED} {node.where}"

    def uses_numbers(self, node: Node) -> bool:
        """Whether a node that has derivatives goes by integers that the forward looked at in the batch."""
        return not self.constant(node.index) and any(self.graph.nodes[k].op.startswith(_LITERAL) for k in node.inputs)

    def constant(self, k: int) -> bool:
        return self.graph.nodes[k].kind is Kind.CONST

    def shape(self, k: int) -> tuple[int, ...]:
        return self.graph.nodes[k].shape

    def leaf(self, node: Node) -> State:
        if node.kind is not Kind.INPUT:
            return NONE
        first = next((k for k, n in enumerate(node.shape) if n == self.size), None)
        axis = self.axes.get(node.index, first)
        if self.size == 1:
            return self.single(node, 0, None if axis is None else BatchAxis(axis, 1, 1, 1))
        return NONE if axis is None else separate(BatchAxis(axis, 1, self.size, 1))

    def visit(self, node: Node) -> State:
        states = [self.states[k] for k in node.inputs]
        touched = [s for s in states if not s.free]
        samples = samples_of(node)
        if not touched or samples is Samples.CREATED:
            return NONE
        if touched[0].one >= 0 and all(s.one == touched[0].one for s in touched):
            return self.single(node, touched[0].one)
        if all(s.batch_axis is None and s.one < 0 for s in touched):  # sums over the batch, or what was lost before
            return self.after_sum(node, touched)
        state = FOLLOW[samples](self, node)
        if any(s.interaction in (Interaction.MIXED, Interaction.SUMMED) for s in touched):
            added = samples is Samples.ELEMENTWISE and all(s.interaction is not Interaction.MIXED for s in touched)
            return (
                state
                if added and state.interaction is Interaction.SUMMED
                else replace(mixed(state.batch_axis), lost=state.lost)
            )
        return state

    def single(self, node: Node, number: int, batch_axis: BatchAxis | None = None) -> State:
        """A tensor of one sample. In a batch of one its axis is followed where that goes, for the points' shapes."""
        if self.size > 1:
            return State(Interaction.SEPARATE, one=number)
        if node.target is not None:
            batch_axis = self.guess(node)
        if batch_axis is None and node.shape:
            batch_axis = BatchAxis(0, 1, 1, node.shape[0])
        return State(Interaction.SEPARATE, batch_axis, one=number)

    def guess(self, node: Node) -> BatchAxis | None:
        samples = samples_of(node)
        if samples not in ARITHMETIC or all(self.states[k].batch_axis is None for k in node.inputs):
            return None
        batch_axis = FOLLOW[samples](self, node).batch_axis
        if batch_axis is None or batch_axis.axis >= len(node.shape):
            return None
        return batch_axis if node.shape[batch_axis.axis] == batch_axis.size else None

    def after_sum(self, node: Node, states: Sequence[State]) -> State:
        lost = any(s.lost for s in states)
        if any(s.interaction is not Interaction.SUMMED for s in states):
            return replace(GONE, lost=lost)
        linear = is_linear(node) or self.scales(node)
        return State(Interaction.SUMMED) if linear else GONE

    def scales(self, node: Node) -> bool:
        """Whether a product or quotient is one of a tensor that depends on samples by one that does not."""
        if node.op not in ("aten.mul.Tensor", "aten.div.Tensor"):
            return False
        first, others = self.states[node.inputs[0]], [self.states[k] for k in node.inputs[1:]]
        alone = all(s.interaction is Interaction.NONE for s in others)
        return alone or (node.op == "aten.mul.Tensor" and first.interaction is Interaction.NONE)

    def line(self, k: int, axis: int) -> torch.Tensor:
        """Sample numbers along an axis of a tensor whose samples lie along it, if they lie anywhere."""
        state, size = self.states[k], self.shape(k)[axis]
        if state.one >= 0 and self.size > 1:
            return torch.full((size,), state.one, device="cpu")
        return state.batch_axis.line() if state.batch_axis else torch.full((size,), FREE, device="cpu")


def _is_separate(graph: CurvatureGraph, states: Sequence[State]) -> bool:
    """Whether the loss is a sum over samples of what depends on one sample each."""
    outs = [states[k] for k in graph.out]
    apart = all(s.interaction is Interaction.SEPARATE and s.batch_axis is not None for s in outs)
    return apart and states[graph.loss].interaction is Interaction.SUMMED


def _with_other_axes(graph: CurvatureGraph, batch: Batch) -> tuple[Walker, list[State]] | None:
    """Another choice of the inputs' batch axes with which samples do not interact.

    A sequence may be as long as the batch is large, and a mask that all samples share may be so too.
    """
    nodes = [node for node in graph.nodes if node.kind is Kind.INPUT and batch.size in node.shape]
    options = [[*(k for k, n in enumerate(node.shape) if n == batch.size), None] for node in nodes]
    for chosen in itertools.islice(itertools.product(*options), 1, _MOST_CHOICES):
        walk = Walker(graph, batch, axes=dict(zip((node.index for node in nodes), chosen, strict=True)))
        states = walk.run()
        if _is_separate(graph, states):
            return walk, states
    return None


def annotate(graph: CurvatureGraph, batch: Batch) -> CurvatureGraph:
    """Fill in ``graph.batch_axes``, ``interactions``, ``ends``, ``lost`` and what follows for the loss."""
    walk = Walker(graph, batch)
    states = walk.run()
    if batch.size > 1 and not _is_separate(graph, states):
        walk, states = _with_other_axes(graph, batch) or (walk, states)
    axes = walk.axes
    graph.batch_axes = [None if s.batch_axis is None else s.batch_axis.whole(batch.size) for s in states]
    graph.interactions = [state.interaction for state in states]
    graph.ends = walk.ends
    graph.lost = tuple(dict.fromkeys(walk.lost))
    apart = frozenset(k for k in graph.out if states[k].interaction is not Interaction.SEPARATE)
    loss_states = Walker(graph, batch, apart, axes).run() if apart else states
    graph.separable_loss = batch.size == 1 or (
        loss_states[graph.loss].interaction is Interaction.SUMMED
        and all(graph.batch_axes[k] is not None for k in graph.out)
    )
    graph.separable = batch.size == 1 or (
        graph.separable_loss and all(graph.interactions[k] is Interaction.SEPARATE for k in graph.out)
    )
    return graph
