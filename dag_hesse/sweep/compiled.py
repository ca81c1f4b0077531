"""``compile=True``: linearization and sweep as programs of TorchInductor (design §3, compile).

A program is made for every form of request: which nodes are seeded and read, which parts, how many probes. The values
of leaves are arguments, so another linearization of the same graph runs the same programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dag_hesse.errors import CompileError, out_of_memory
from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.kernels.contraction.onednn import substituted
from dag_hesse.rules.region import Region
from dag_hesse.rules.table import evaluate, rule_for
from dag_hesse.sweep.decisions import origins
from dag_hesse.sweep.emit import split, traced
from dag_hesse.sweep.engine import Adjoint
from dag_hesse.sweep.form import Form, by_engine, disagreement
from dag_hesse.sweep.linearize import Linearization, Looks, check_loss, leaf_values

Run = Callable[..., Sequence[Tensor]]
_CHOICES = {"aten.where.self", "aten.masked_fill.Scalar", "aten.masked_fill.Tensor"}  # by a mask that is given


@dataclass
class Program:
    """A compiled form: ``prepare(*leaves)`` gives the loss and what ``product(*kept, *leaves used, *seeds)`` takes."""

    prepare: Run
    product: Run
    used: Sequence[int]  # places among the leaves
    results: Sequence[tuple[int, bool, bool]]  # per result: node, and the channels it holds


@dataclass
class Programs:
    """The programs of one graph, made as they are asked for."""

    graph: CurvatureGraph
    sites: set[int]
    tensor_part: bool
    made: dict[Form, Program] = field(default_factory=dict)


class Compiled:
    """A graph at one batch, as :class:`~dag_hesse.sweep.Linearization` is one, whose sweeps are compiled programs.

    Args:
        programs: of the graph; shared by all batches that have it.
        model, tensors: as of :func:`~dag_hesse.sweep.linearize.leaf_values`.
        sample: restrict the loss to this sample.
        checked: whether values that Python looked at must be those of the capture.

    Attributes:
        loss: value of the loss; None before the first sweep.

    Raises:
        OtherGraphError: they are not.
        CompileError: the graph has an op that no program can hold.
    """

    arena: Arena = SYSTEM

    def __init__(
        self, programs: Programs, model: nn.Module, tensors: list[Tensor], sample: int | None, checked: bool
    ) -> None:
        self.programs, self.graph = programs, programs.graph
        _check_ops(self.graph)
        given = leaf_values(self.graph, model, tensors)
        with torch.no_grad():
            given |= _drawn(self.graph, given, checked)
        self.nodes = list(given)
        self.leaves = list(given.values())
        self.sample = None if sample is None else torch.tensor(sample, device=self.leaves[0].device)
        self.loss: Tensor | None = None
        self._kept: dict[Form, Sequence[Tensor]] = {}

    @property
    def _inputs(self) -> list[Tensor]:
        return self.leaves if self.sample is None else [*self.leaves, self.sample]

    def run(self, form: Form, seeds: Mapping[int, Tensor]) -> dict[int, Adjoint]:
        """Results of a form's program."""
        given = [seeds[k].contiguous() for k, _ in form.seeds]
        with torch.no_grad():
            if form not in self.programs.made:
                self.programs.made[form] = self._make(form, given)
            program = self.programs.made[form]
            if form not in self._kept:
                loss, *kept = program.prepare(*self._inputs)
                check_loss(loss)
                self.loss, self._kept[form] = loss, kept
            return _run(program, self._kept[form], self._inputs, given)

    def _trace(self, form: Form, results: list[tuple[int, bool, bool]]) -> Callable[..., list[Tensor]]:
        """Linearization and sweep as one function of leaves and seeds; ``results`` is filled as it runs."""

        def program(leaves: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
            sample = None if self.sample is None else leaves[-1]
            values = dict(zip(self.nodes, leaves, strict=False))
            lin = self._linearized(values, sample)
            found = by_engine(lin, form, dict(zip((k for k, _ in form.seeds), seeds, strict=True)))
            results[:] = [(k, x.gn, x.tensor) for k, x in found.items()]
            return [lin.loss, *(x.data for x in found.values())]

        return program

    def _linearized(self, values: Mapping[int, Tensor], sample: Tensor | None) -> Linearization:
        programs = self.programs
        return Linearization(
            self.graph, values, programs.sites, tensor_part=programs.tensor_part, sample=sample, checked=False
        )

    def _make(self, form: Form, seeds: list[Tensor]) -> Program:
        results: list[tuple[int, bool, bool]] = []
        whole = traced(self._trace(form, results), self._inputs, seeds)
        prepare, product, used = split(whole, len(self._inputs))
        loss, *kept = prepare(*self._inputs)
        check_loss(loss)
        # Gates decide bit for bit, and a compiler rounds otherwise: before one, values stay PyTorch's own.
        first = prepare if has_gates(self.graph) else _compiled(substituted(prepare), self._inputs)
        second = _compiled(product, [*kept, *(self._inputs[k] for k in used), *seeds])
        program = Program(first, second, used, tuple(results))
        self._confirm(form, program, seeds)
        return program

    def _confirm(self, form: Form, program: Program, seeds: list[Tensor]) -> None:
        """The first results against those of an ordinary sweep."""
        _, *kept = program.prepare(*self._inputs)
        found = _run(program, kept, self._inputs, seeds)
        lin = self._linearized(dict(zip(self.nodes, self.leaves, strict=True)), self.sample)
        expected = by_engine(lin, form, dict(zip((k for k, _ in form.seeds), seeds, strict=True)))
        wrong = disagreement(found, expected)
        if wrong is not None:
            node = self.graph.nodes[wrong[0]]
            raise CompileError(
                f"the compiled product is off by {wrong[1]:.1e} at {node.name or node.where}, held against the product "
                "without a compiler: leave compile=True out."
            )


def _run(
    program: Program, kept: Sequence[Tensor], leaves: Sequence[Tensor], seeds: Sequence[Tensor]
) -> dict[int, Adjoint]:
    found = program.product(*kept, *(leaves[k] for k in program.used), *seeds)
    return {k: Adjoint(x, gn, tensor) for (k, gn, tensor), x in zip(program.results, found, strict=True)}


def _compiled(part: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Run:
    import torch._inductor

    try:
        made: Run = torch._inductor.compile(part, list(inputs))
    except Exception as error:
        if out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise CompileError(
            f"TorchInductor cannot compile the product ({type(error).__name__}: {text}). It needs a C++ compiler, or "
            "Triton on a GPU; without compile=True neither is needed."
        ) from error
    return made


def _check_ops(graph: CurvatureGraph) -> None:
    """Raise :class:`CompileError` where a node cannot be part of a program."""
    for node in graph.nodes:
        if node.kind is Kind.OPAQUE:
            raise CompileError(
                f"{node.where} has no rule and is differentiated by autograd, which a compiled program cannot hold: "
                "leave compile=True out."
            )
        if node.draws and node.is_differentiable:
            raise CompileError(f"{node.where} draws random numbers and is differentiated: leave compile=True out.")


def has_gates(graph: CurvatureGraph) -> bool:
    """Whether a value of the model decides which way a derivative goes: a ReLU's sign, a maximum, a comparison."""
    moving: set[int] = set()  # what would be rounded otherwise
    for node in graph.nodes:
        on = [k in moving for k in node.inputs]
        if isinstance(node.target, Region):
            for member in node.target.members:
                on.append(any(on[k] for k in member.inputs))
                if on[-1] and _decides(member):
                    return True
        elif any(on) and _decides(node):
            return True
        if any(on) or (node.kind in (Kind.PARAM, Kind.INPUT) and node.is_float):
            moving.add(node.index)
    return False


def _decides(node: Node) -> bool:
    if not node.is_float:
        return True
    return node.kind is Kind.PIECEWISE_LINEAR and node.op not in _CHOICES and not rule_for(node).linear


def _drawn(graph: CurvatureGraph, given: Mapping[int, Tensor], checked: bool) -> dict[int, Tensor]:
    """Values of the nodes that draw random numbers; guards are checked on the way.

    Raises:
        OtherGraphError: a guard does not hold.
    """
    looks = Looks(graph) if checked and graph.guards else None
    draws = {node.index for node in graph.nodes if node.draws}
    looked_at = {guard.node for guard in graph.guards} if checked else set()
    wanted, values = origins(graph, draws | looked_at), dict(given)
    for node in graph.nodes:
        if node.index not in wanted:
            continue
        inputs = () if node.target is None else tuple(values[k] for k in node.inputs)
        if node.index not in values:
            values[node.index] = evaluate(node, inputs)[1]
        if looks is not None:
            looks.check(node, inputs, values[node.index])
    return {k: values[k] for k in sorted(draws)}
