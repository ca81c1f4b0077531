"""One forward and one backward: everything nonlinear is evaluated here, and never again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dag_hesse.errors import CaptureError, LossError, NonDifferentiableError, out_of_memory
from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.ir.node import Guard
from dag_hesse.kernels.arena import SYSTEM, Arena, has_values, is_owned
from dag_hesse.rules import Call, Linearized, rule_for
from dag_hesse.rules.table import evaluate, pairs_of
from dag_hesse.sweep.decisions import Decisions

# What a sweep is to return: GN and T apart, their sum, or one alone.
PARTS = ("both", "full", "gn", "tensor")
# Ops whose result has a shape that its values decide.


@contextmanager
def as_recorded(device: torch.device) -> Iterator[None]:
    """No gradients, and no casts but those of the graph: whoever calls may have autocast on."""
    casts = device.type != "meta" and torch.is_autocast_enabled(device.type)
    cast = torch.autocast(device.type, enabled=False) if casts else nullcontext()
    with torch.no_grad(), cast:
        yield


def check_loss(loss: Tensor) -> None:
    """Raise :class:`LossError` unless the loss is finite."""
    if not bool(torch.isfinite(loss)):
        raise LossError(f"the loss is {float(loss)}; curvature there is undefined.")


class OtherGraphError(CaptureError):
    """With these values the forward takes another way than the one that was captured, or may do so."""


class Looks:
    """Sees that values which Python looked at are those of the capture."""

    def __init__(self, graph: CurvatureGraph) -> None:
        self.guards: dict[int, list[Guard]] = {}
        for guard in graph.guards:
            self.guards.setdefault(guard.node, []).append(guard)
        self.decisions = Decisions(graph) if graph.guards else None

    def check(self, node: Node, inputs: Sequence[Tensor], value: Tensor) -> None:
        """Raise :class:`OtherGraphError` where they are not, or are so by less than rounding."""
        if self.decisions is not None and self.decisions.see(node, inputs, value):
            raise OtherGraphError(f"{node.where} is decided by less than rounding.")
        for guard in self.guards.get(node.index, ()):
            if not guard.holds(value):
                raise OtherGraphError(f"{node.where} {guard.told(value)} when the graph was captured.")


def leaf_values(graph: CurvatureGraph, model: nn.Module, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Values of the graph's leaves: the model's parameters, the batch's tensors, constants."""
    parameters = dict(model.named_parameters())
    given: dict[int, Tensor] = {k: parameters[name] for name, k in graph.parameters.items()}
    given |= {k: tensors[place] for k, place in graph.inputs.items()} | graph.constants
    return {node.index: given[node.index].detach() for node in graph.nodes if node.target is None}


class Linearization:
    """A graph linearized at one batch: a :class:`~dag_hesse.rules.Linearized` a node, second-order terms λ-weighted.

    Args:
        graph: captured graph with points.
        given: values of the leaves (:func:`leaf_values`), and of other nodes that are not to be evaluated.
        sites: nodes that will be seeded or read; only nodes between them and the loss are linearized.
        tensor_part: whether second-order terms of model ops will be wanted.
        sample: restrict the loss to this sample (design §2.3); None: the whole batch.
        checked: whether values that Python looked at must be those of the capture.
        inspect: is shown every call that autograd differentiates.
        arena: where values and products are written.

    Raises:
        OtherGraphError: they are not.

    Attributes:
        device: where it lies.
        loss: value of the loss.
        calls: per node index, its linearized call.
        curved: nodes with a second-order term, and the input slots that take part in it.
    """

    def __init__(
        self,
        graph: CurvatureGraph,
        given: Mapping[int, Tensor],
        sites: Iterable[int],
        *,
        tensor_part: bool = True,
        sample: int | Tensor | None = None,
        checked: bool = True,
        inspect: Callable[[Call], None] = lambda call: None,
        arena: Arena = SYSTEM,
    ) -> None:
        self.graph, self.sample, self.tensor_part, self.arena = graph, sample, tensor_part, arena
        self.inspect, self.looks = inspect, Looks(graph) if checked and graph.guards else None
        self.active = graph.active(sites)
        self.in_loss = graph.loss_subgraph
        self.calls: dict[int, Linearized] = {}
        self.curved = self._find_curved()
        self.curved_in = {parts: {c for c in self.curved if self._is_in(c, parts)} for parts in PARTS}
        self.device = next(iter(given.values())).device
        with as_recorded(self.device):
            self.loss = self._forward(given)
            self.feeds = {parts: self._feeds(self.curved_in[parts]) for parts in PARTS}
            if has_values(self.loss):
                check_loss(self.loss)
            self._backward()

    def _is_in(self, node: int, parts: str) -> bool:
        """Whether the node's second-order term belongs to what is asked for."""
        return parts in ("both", "full") or (parts == "gn") == self.in_loss[node]

    def _feeds(self, curved: Iterable[int]) -> list[bool]:
        """Nodes whose tangents the second-order terms of ``curved`` come from."""
        return self.graph.ancestors(k for c in curved for k in self.graph.nodes[c].inputs)

    def _find_curved(self) -> dict[int, set[int]]:
        found = {}
        for node in self.graph.nodes:
            if not self.active[node.index] or not (self.tensor_part or self.in_loss[node.index]):
                continue
            pairs = {pair for pair in pairs_of(node) if all(self.active[node.inputs[slot]] for slot in pair)}
            if pairs:
                found[node.index] = {slot for pair in pairs for slot in pair}
        return found

    def _forward(self, given: Mapping[int, Tensor]) -> Tensor:
        values: dict[int, Tensor] = {}
        uses = [len(children) for children in self.graph.children]
        for node in self.graph.nodes:
            if node.index in given:
                values[node.index] = given[node.index]
                self._check(node, (), given[node.index])
                continue
            inputs = tuple(values[k] for k in node.inputs)
            known, value = self._evaluate(node, inputs)
            values[node.index] = value
            self._check(node, inputs, value)
            if self.active[node.index] and node.is_differentiable:
                on = tuple(self.active[k] for k in node.inputs)
                if any(on):
                    call = Call(node, known, value, on, node.index in self.curved, self.arena)
                    self.calls[node.index] = self._linearize(call)
            for k in set(node.inputs):
                uses[k] -= 1
                if uses[k] == 0 and k != self.graph.loss:
                    del values[k]
            if uses[node.index] == 0 and node.index != self.graph.loss:  # it was looked at, or drawn
                del values[node.index]
        return values[self.graph.loss].reshape(())

    def _check(self, node: Node, inputs: Sequence[Tensor], value: Tensor) -> None:
        if self.looks is not None:
            self.looks.check(node, inputs, value)

    def _evaluate(self, node: Node, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        try:
            return evaluate(node, inputs, self.arena)
        except (IndexError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise CaptureError(f"{node.where} fails on this batch: {error}") from error

    def _linearize(self, call: Call) -> Linearized:
        try:
            if call.node.kind is Kind.OPAQUE:
                self.inspect(call)
            return rule_for(call.node).linearize(call)
        except RuntimeError as error:
            if call.node.kind is Kind.OPAQUE:
                raise NonDifferentiableError(f"{call.node.where} cannot be differentiated: {error}") from error
            raise

    def _backward(self) -> None:
        """Propagate λ, (1, *node), down to the curved nodes; every call takes its own, or hears that none comes."""
        wanted, nodes = self.graph.descendants(self.curved), self.graph.nodes  # no leaves: a gradient is not wanted
        lam = {self.graph.loss: torch.ones_like(self.loss).reshape(1, *nodes[self.graph.loss].shape)}
        owned: set[int] = set()  # of λ: what may be written to
        for node in reversed(nodes):
            mine, call = lam.pop(node.index, None), self.calls.get(node.index)
            if call is None:
                continue
            if mine is None:
                call.bind(None, (), {})
                continue
            if node.index in self.graph.out:
                mine = self.mask(node.index, mine)
            slots = [slot for slot, k in enumerate(node.inputs) if self.active[k] and wanted[k]]
            into = {slot: lam[k] for slot in slots if (k := node.inputs[slot]) in owned}
            pulled = call.bind(mine, slots, into)
            for slot, term in pulled.items():
                k = node.inputs[slot]
                if term is into.get(slot):
                    continue
                if k in owned:
                    lam[k].add_(term)
                    continue
                if k in lam or (len(pulled) == 1 and node.index not in self.curved and is_owned(term, mine)):
                    owned.add(k)
                lam[k] = lam[k] + term if k in lam else term

    def mask(self, index: int, x: Tensor) -> Tensor:
        """Zero all samples but ``self.sample`` in a tensor at node ``index``, probes in front or not."""
        batch_axis = self.graph.batch_axes[index]
        if self.sample is None or batch_axis is None:
            return x
        axis = batch_axis.axis + x.ndim - len(self.graph.nodes[index].shape)
        places = torch.arange(x.shape[axis], device=x.device) // batch_axis.inner % batch_axis.batch
        keep = (places == self.sample).reshape([-1 if k == axis else 1 for k in range(x.ndim)])
        return x * keep
