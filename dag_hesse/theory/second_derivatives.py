"""E[σ″(z)²] of the activations as they run: what H_T of a network is made of (paper, Exp. 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse._capture import Batches, capture, unwrapped
from dag_hesse._capture.losses import Loss
from dag_hesse.errors import BatchError
from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.kernels.arena import SYSTEM
from dag_hesse.randomness import preserved
from dag_hesse.rules import Call, rule_for
from dag_hesse.rules.table import evaluate, pairs_of
from dag_hesse.sweep.linearize import leaf_values
from dag_hesse.theory.text import table


@dataclass(frozen=True)
class ActivationCurvature:
    """Second derivatives of k activations, in the order in which they run.

    Attributes:
        names: the module's name, or where the op stands; a call of its own each.
        ops: what runs there.
        mean_square: E[σ″(z)²] over samples and units, (k,); exactly 0 where σ is piecewise linear.
    """

    names: tuple[str, ...]
    ops: tuple[str, ...]
    mean_square: NDArray[np.float64]

    def __str__(self) -> str:
        rows = zip(self.names, self.ops, self.mean_square.tolist(), strict=True)
        return table(["activation", "op", "E[σ″²]"], rows)


def activation_curvature(
    model: nn.Module, batch: Any, *, loss: Loss | None = None, output: str | None = None
) -> ActivationCurvature:
    """E[σ″(z)²] of every activation between the inputs and out (paper, Exp. 3, Tables 4 and 5).

    Counted are elementwise ops of one tensor that are no linear functions. Products of two tensors (a gate x·σ(z)) have
    second derivatives too, and are not among them.

    Args:
        model, loss, output: as for :func:`dag_hesse.analyze`.
        batch: one batch.

    Returns:
        :class:`ActivationCurvature`.

    Raises:
        BatchError: there are several batches.
        DagHesseError: as :func:`dag_hesse.capture`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> layers = torch.nn.Linear(3, 4), torch.nn.Softplus(), torch.nn.Linear(4, 4), torch.nn.ReLU()
        >>> net = torch.nn.Sequential(*layers, torch.nn.Linear(4, 2))
        >>> for p in net.parameters():
        ...     _ = p.data.zero_()
        >>> found = dh.theory.activation_curvature(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])))
        >>> found.names, found.mean_square  # σ″(0) of Softplus is 1/4
        (('1', '3'), array([0.0625, 0.    ]))
    """
    model = unwrapped(model)
    batches = Batches(batch, None, model, loss)
    if len(batches) != 1:
        raise BatchError(f"activation_curvature() takes one batch, not {len(batches)}: concatenate them, or take each.")
    graph = capture(model, batch, loss=loss, output=output)
    found = list(_measured(graph, leaf_values(graph, model, next(iter(batches)).tensors)))
    names, ops, squares = zip(*found, strict=True) if found else ((), (), ())
    return ActivationCurvature(names, ops, np.array(squares, dtype=np.float64))


def _measured(graph: CurvatureGraph, values: dict[int, Tensor]) -> Iterator[tuple[str, str, float]]:
    """(name, op, mean of σ″²) per activation; ``values`` are the leaves', and are added to."""
    to_out, in_loss = graph.ancestors(graph.out), graph.loss_subgraph
    uses = [len(children) for children in graph.children]
    with torch.no_grad(), preserved():
        for node in graph.nodes[: max(graph.out) + 1]:  # all of them, in order: some draw random numbers
            if node.target is None:
                continue
            known, value = evaluate(node, tuple(values[k] for k in node.inputs))
            values[node.index] = value
            if to_out[node.index] and not in_loss[node.index] and _is_activation(graph, node):
                yield _name(node), node.op, _mean_square(node, known, value)
            for k in set(node.inputs):
                uses[k] -= 1
                if uses[k] == 0:
                    del values[k]


def _is_activation(graph: CurvatureGraph, node: Node) -> bool:
    tensors = [k for k in node.inputs if graph.nodes[k].is_float and graph.nodes[k].kind is not Kind.CONST]
    if len(tensors) != 1 or node.kind not in (Kind.SMOOTH, Kind.PIECEWISE_LINEAR):
        return False
    rule = rule_for(node)
    return rule.partials is not None and not rule.linear and pairs_of(node) <= {(0, 0)}


def _mean_square(node: Node, known: tuple[Tensor, ...], value: Tensor) -> float:
    partials = rule_for(node).partials
    assert partials is not None
    second = partials(Call(node, known, value, (True,) * len(node.inputs), True, SYSTEM))[1].get((0, 0))
    if second is None:
        return 0.0
    return float(torch.as_tensor(second).double().pow(2).mean())


def _name(node: Node) -> str:
    return node.taps[0] if node.taps else node.where
