"""What a loss divides its sum over samples by, read off its graph: for batches that cannot be put beside others."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NoReturn

import torch
from torch import Tensor, nn

from dag_hesse._capture.batch import Batch
from dag_hesse._capture.labels import Constants
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.reduction import ADVICE
from dag_hesse._capture.run import captured
from dag_hesse._capture.sub_batches import sub_batch
from dag_hesse.errors import ReductionError
from dag_hesse.ir import CurvatureGraph, Interaction, Kind, Node
from dag_hesse.rules.structural import axes

_DIVISIONS = ("aten.div.Tensor", "aten.div.Scalar")
_SCALINGS = (*_DIVISIONS, "aten.mul.Tensor", "aten.mul.Scalar")
_SUMS = ("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.stack.default", "aten.cat.default")
_REDUCTIONS = ("aten.sum.", "aten.mean.")
_PASSED = ("aten.neg.default", *_SUMS)


def read_weight(model: nn.Module, graph: CurvatureGraph, batch: Batch, loss: Loss | None) -> float:
    """What a batch counts, in a unit of the loss's own. A graph that looked at values is made anew for the batch.

    Raises:
        ReductionError: it cannot be read.
    """
    graph = captured(model, batch, loss=loss) if graph.guards else graph
    return denominator(graph, batch, checked=batch.size > 1)


def check_read(
    model: nn.Module,
    graph: CurvatureGraph,
    batch: Batch,
    loss: Loss | None,
    parts: Sequence[tuple[Tensor, float]],
    tolerance: float,
) -> None:
    """See that parts of a batch, (samples, how much they were found to count in it), count what their graphs say.

    A batch of one sample has no parts.

    Raises:
        ReductionError: they do not.
    """
    if sum(len(samples) for samples, _ in parts) != batch.size:
        return
    whole = read_weight(model, graph, batch, loss)
    for samples, factor in parts:
        part = sub_batch(graph, batch, samples)
        read = denominator(captured(model, part, loss=loss), part, checked=True) / whole
        if abs(read - factor) > tolerance * max(read, abs(factor)):
            raise ReductionError(
                f"the loss seems to divide a part of a batch by {read:.4g} times what it divides the batch by, and "
                f"that part counts {factor:.4g} times in it: how batches of several lengths add up cannot be read "
                f"off the loss, so {ADVICE}"
            )


def denominator(graph: CurvatureGraph, batch: Batch, *, checked: bool) -> float:
    """What the loss divides its sum over samples by, evaluated on the batch.

    ``checked``: it is compared with what parts of the batch count. If not, a number of the code alone is no answer.

    Raises:
        ReductionError: it cannot be read.
    """
    reader = _Reader(graph, batch)
    counted, constant = reader.below(graph.loss)
    if not reader.counted and (constant == 1 or not checked):  # a mean whose weights are inside its sum
        refuse(graph.nodes[graph.loss])
    return counted * constant


class _Reader:
    """Goes from the loss inwards through what scales it, as far as the samples are added up.

    What is divided by comes in two factors: elements of means and numbers made of tensors, and numbers of the code.
    """

    def __init__(self, graph: CurvatureGraph, batch: Batch) -> None:
        self.graph, self.constants = graph, Constants(graph, batch.tensors)
        self.counted = False  # whether something was met that depends on how large the batch is

    def below(self, k: int) -> tuple[float, float]:
        """By how much node ``k`` is smaller than the sum over samples in it."""
        node, counted, constant = self.graph.nodes[k], 1.0, 1.0
        while True:
            inputs = [j for j in node.inputs if self.depends(j)]
            if node.op.startswith("aten.mean."):
                counted *= prod(self.graph.nodes[inputs[0]].shape) / max(prod(node.shape), 1)
            elif node.op in _SCALINGS and len(inputs) == 1:
                number, of_tensors = self.number(node)
                self.counted |= of_tensors
                number = number if node.op in _DIVISIONS else 1 / abs(number or float("nan"))
                counted, constant = (counted * number, constant) if of_tensors else (counted, constant * number)
            elif node.op in _SUMS and len(inputs) > 1:
                among = self.agreed(node, inputs)
                return counted * among[0], constant * among[1]
            elif not (len(inputs) == 1 and (node.kind is Kind.STRUCTURAL or node.op in _PASSED)):
                refuse(node)
            if self.adds_up(node, inputs[0]):
                self.counted |= node.op.startswith("aten.mean.")
                return counted, constant
            node = self.graph.nodes[inputs[0]]

    def depends(self, k: int) -> bool:
        """Whether a loss's term is behind a node, rather than a weight."""
        return self.graph.nodes[k].kind is not Kind.CONST and self.graph.interactions[k] is not Interaction.NONE

    def adds_up(self, node: Node, k: int) -> bool:
        """Whether a node sums its input over samples; where these cannot be told apart, over everything."""
        batch_axis, shape = self.graph.batch_axes[k], self.graph.nodes[k].shape
        if not node.op.startswith(_REDUCTIONS) or self.is_added_up(k):
            return False
        if batch_axis is None:
            return prod(shape) > 1 == prod(node.shape) and self.graph.interactions[k] is not Interaction.SUMMED
        return batch_axis.axis in self.dims(node)

    def dims(self, node: Node) -> list[int]:
        """Axes that a sum or mean goes over."""
        return axes(node.args[1] if len(node.args) > 1 else None, len(self.graph.nodes[node.inputs[0]].shape))

    def is_added_up(self, k: int) -> bool:
        """Whether a node is made of sums of everything: in a batch of one sample, its axis does not tell."""
        node = self.graph.nodes[k]
        if node.op.startswith(_REDUCTIONS):
            return len(self.dims(node)) == len(self.graph.nodes[node.inputs[0]].shape)
        passed = node.kind is Kind.STRUCTURAL or node.op in (*_PASSED, *_SCALINGS)
        return passed and bool(node.inputs) and all(self.is_added_up(j) for j in node.inputs if self.depends(j))

    def number(self, node: Node) -> tuple[float, bool]:
        """The constant that a node multiplies or divides by (there must be one), and whether it is a tensor."""
        weights = [j for j in node.inputs if not self.depends(j)]
        value = self.constants.value(weights[0]) if weights else torch.tensor(node.args[1], dtype=torch.float64)
        if value is None or value.numel() != 1 or (node.op in _DIVISIONS and not self.depends(node.inputs[0])):
            refuse(node)
        return float(value), bool(weights)  # type: ignore[arg-type]  # not None

    def agreed(self, node: Node, inputs: Sequence[int]) -> tuple[float, float]:
        """What all terms are divided by, but for constants."""
        terms = [self.below(k) for k in dict.fromkeys(inputs)]
        whole, counted = [a * b for a, b in terms], [a for a, _ in terms]
        if not any(max(some) - min(some) <= 1e-9 * max(some) for some in (whole, counted)):
            refuse(node)
        return terms[0]


def refuse(node: Node) -> NoReturn:
    """Say at which node it cannot be read."""
    raise ReductionError(f"the weights of the batches cannot be read off a loss that ends in {node.where}, so {ADVICE}")


__all__ = ["check_read", "denominator", "read_weight"]
