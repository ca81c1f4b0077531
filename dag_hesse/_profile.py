"""profile(): where the time and memory of a model's curvature go, node by node, predicted and measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dag_hesse._analyze import analyze
from dag_hesse._capture import Batches, capture_all, first_batch, unwrapped
from dag_hesse._capture.additivity import find_reduction
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.points import Names
from dag_hesse._capture.reduction import Option
from dag_hesse._structure import analyze_structure
from dag_hesse.errors import choose, flag
from dag_hesse.files import check_output, write_whole
from dag_hesse.ir import CurvatureGraph
from dag_hesse.kernels.dispatch import refusals
from dag_hesse.kernels.generated import ELSEWHERE
from dag_hesse.measure import Phase, measured
from dag_hesse.options import checked_options
from dag_hesse.plan import Plan, fuse_all, path_cost, plan
from dag_hesse.plan.edge_table import Edge, as_rows, costliest, edges, render_edges
from dag_hesse.plan.memory import linearization_bytes, sweep_bytes
from dag_hesse.plan.planner import BATCH_MODES
from dag_hesse.plan.sources import sweep_cost
from dag_hesse.rules import Linearized
from dag_hesse.sweep import VERIFY, Linearization, Problem, Request, prove_all


@dataclass(frozen=True)
class NodeProfile:
    """One swept node: predicted FLOPs and bytes of one probe, measured seconds of its tangent and adjoint products."""

    index: int
    op: str
    module: str
    shape: tuple[int, ...]
    flops: float
    bytes: float
    seconds: float


@dataclass
class Profile:
    """What :func:`profile` found.

    Attributes:
        phases: measured: ``capture``, ``proof``, ``linearize``, ``sweep`` (one probe), and ``compile`` and ``map``
            where they were asked for.
        predicted: what the plan says of ``linearize``, ``sweep`` and ``map``; seconds at the measured rate of a sweep.
        nodes, edges, plan: in detail.
        refusals: (kernel, implementation, reason, how often): what did not run as fast as it may, and why.
    """

    phases: dict[str, Phase]
    predicted: dict[str, Phase]
    nodes: list[NodeProfile]
    edges: list[Edge]
    plan: Plan
    refusals: list[tuple[str, str, str, int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """FLOPs a second of the measured sweep."""
        flops = sum(each.flops for each in self.nodes or self.edges)
        return flops / max(self.phases["sweep"].seconds, 1e-9)

    def modules(self) -> list[tuple[str, float, float, float]]:
        """(module, FLOPs, bytes, seconds) summed over its nodes, costliest first."""
        total: dict[str, list[float]] = {}
        for node in self.nodes:
            row = total.setdefault(node.module or "loss", [0.0, 0.0, 0.0])
            for k, value in enumerate((node.flops, node.bytes, node.seconds)):
                row[k] += value
        return sorted(((name, *row) for name, row in total.items()), key=lambda row: -row[3])  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "phases": {name: asdict(phase) for name, phase in self.phases.items()},
            "predicted": {name: asdict(phase) for name, phase in self.predicted.items()},
            "nodes": [asdict(node) for node in self.nodes],
            "edges": as_rows(self.edges),
            "plan": self.plan.to_dict(),
            "refusals": self.refusals,
        }

    def __str__(self) -> str:
        lines = [f"{'phase':<12}{'seconds':>10}{'predicted':>10}{'peak MiB':>10}{'predicted':>10}"]
        for name in dict.fromkeys([*self.phases, *self.predicted]):
            cells = [name.ljust(12)]
            for read in (lambda phase: f"{phase.seconds:.3f}", lambda phase: f"{phase.peak_bytes / 2**20:.0f}"):
                cells += [f"{read(kind[name]) if name in kind else '–':>10}" for kind in (self.phases, self.predicted)]
            lines.append("".join(cells))
        lines.append(
            f"\nwhole map: {self.plan.flops / 1e9:.1f} GFLOP planned, {self.plan.chunk} probes a sweep; "
            f"one probe runs at {self.rate / 1e9:.0f} GFLOP/s; peaks are of resident memory, allocator's slack included"
        )
        lines.append(f"\n{'module':<36}{'MFLOP':>10}{'MiB':>9}{'ms':>9}{'predicted ms':>14}")
        for name, flops, moved, seconds in self.modules()[:20]:
            lines.append(
                f"{name[:34]:<36}{flops / 1e6:>10.1f}{moved / 2**20:>9.1f}{seconds * 1e3:>9.2f}"
                f"{flops / self.rate * 1e3:>14.2f}"
            )
        shown = [row for row in self.refusals if not row[2].startswith(ELSEWHERE)]
        if shown:
            lines.append(f"\nkernels that refused\n{'kernel':<30}{'implementation':<16}{'times':>8}  why")
        lines += [f"{kernel:<30}{name:<16}{count:>8}  {reason}" for kernel, name, reason, count in shown]
        lines.append("\nthe ten costliest edges\n" + render_edges(costliest(self.edges)))
        return "\n".join(lines)


class _Timed(Linearized):
    """A bound call that counts the seconds of its products and names them in a profiler's trace."""

    def __init__(self, inner: Linearized, name: str) -> None:
        self.inner, self.name, self.seconds = inner, name, 0.0

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        with torch.profiler.record_function(f"{what} {self.name}"):
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start

    def push(self, *given: Any) -> Any:
        with self._clock("tangent"):
            return self.inner.push(*given)

    def pull(self, *given: Any) -> Any:
        with self._clock("adjoint"):
            return self.inner.pull(*given)


def _node_profiles(graph: CurvatureGraph, lin: Linearization, found: list[Edge]) -> list[NodeProfile]:
    nodes = []
    for index, call in lin.calls.items():
        own = [edge for edge in found if edge.target == index]
        if own and isinstance(call, _Timed):
            moved, flops = sum(edge.bytes for edge in own), sum(edge.flops for edge in own)
            node = graph.nodes[index]
            nodes.append(NodeProfile(index, own[0].op, node.owner, node.shape, flops, moved, call.seconds))
    return nodes


@checked_options()
def profile(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names | None = None,
    space: str = "activation",
    batch_mode: str = "shared",
    mode: str = "auto",
    probes: int = 32,
    reduction: Option = None,
    memory: int | str | None = None,
    verify: str = "gradient",
    compile: bool = False,
    trace: str | None = None,
    whole: bool = False,
) -> Profile:
    """Linearize once, sweep one probe from the first point to all, and say where time and memory went.

    Args:
        model, batch, loss, output, points, space, batch_mode, mode, probes, reduction, memory, verify: as for
            :func:`~dag_hesse.analyze`; a stream's first batch is taken.
        compile: time the sweep as a program of TorchInductor, and compiling it as a phase of its own; there are no
            nodes to time in it.
        trace: file for a Chrome trace of the sweep with node names (``chrome://tracing``, Perfetto).
        whole: make the whole map as well, to compare it with what is predicted.

    Returns:
        A :class:`Profile`; ``print`` it. Bytes above the start of each phase, seconds of the wall clock.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> found = dh.profile(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])))
        >>> sorted(found.phases), found.nodes[0].op
        (['capture', 'linearize', 'proof', 'sweep'], 'mm_bias')
    """
    choose("batch_mode", batch_mode, BATCH_MODES)
    choose("verify", verify, VERIFY)
    flag("compile", compile)
    one, model = first_batch(batch), unwrapped(model)
    flag("whole", whole)
    if trace is not None:
        check_output(trace)
    batches = Batches(one, memory, model, loss)
    batches.check_batch_mode(batch_mode)
    phases: dict[str, Phase] = {}
    device = batches.device
    with measured(device) as phases["capture"]:
        captured = capture_all(model, batches, loss=loss, output=output, points=points, space=space)
        graphs = fuse_all(captured)
        structure = replace(analyze_structure(captured[0]), graph=graphs[0])
        chosen = plan([structure], mode=mode, batch_mode=batch_mode, probes=probes, memory=memory, device=device)
    if verify != "none":
        with measured(device) as phases["proof"]:
            prove_all(captured, batches, model, loss, output, verify)
    every = tuple(range(len(graphs[0].points)))
    problem = Problem(
        model,
        graphs,
        batches,
        batch_mode,
        reduction=find_reduction(model, captured, batches, loss, reduction, per_sample=batch_mode == "per_sample"),
        with_out=False,
        chunk=chosen.chunk,
        memory=memory,
        compiled=compile,
    )
    with measured(device) as phases["linearize"]:
        _, lin = next(iter(problem.linearizations()))

    def request(count: int) -> list[Request]:
        z = torch.randn(count, problem.groups, problem.dim(0), generator=torch.Generator().manual_seed(0), device="cpu")
        return [Request({0: z.to(device, problem.dtype)}, every)]

    single, chunk = request(1), request(chosen.chunk)
    with measured(device) as warm:
        problem.run(chunk)
        problem.run(single)
    if compile:
        phases["compile"] = warm
    with measured(device) as together:
        problem.run(chunk)
    if isinstance(lin, Linearization):
        lin.calls = {k: _Timed(call, f"%{k} {graphs[0].nodes[k].where}") for k, call in lin.calls.items()}
    problem.arena.retire()  # what it has lent has pages already
    with measured(device) as phases["sweep"]:
        problem.run(single)
    found = edges(graphs[0])
    nodes = _node_profiles(graphs[0], lin, found) if isinstance(lin, Linearization) else []
    if trace is not None:
        with torch.profiler.profile() as recorded:
            problem.run(single)
        write_whole(trace, lambda place: recorded.export_chrome_trace(str(place)))
    if whole:
        with measured(device) as phases["map"]:
            analyze(
                model,
                one,
                loss=loss,
                output=output,
                points=points,
                space=space,
                batch_mode=batch_mode,
                mode=mode,
                probes=probes,
                reduction=reduction,
                memory=memory,
                verify=verify,
                compile=compile,
            )
    rate = chosen.chunk * sweep_cost(chosen.structure, 0, every).flops / together.seconds
    return Profile(phases, _predicted(chosen, rate, phases, batch_mode), nodes, found, chosen, list(refusals()))


def _predicted(chosen: Plan, rate: float, phases: dict[str, Phase], batch_mode: str) -> dict[str, Phase]:
    """What the plan says of each phase at ``rate`` FLOPs a second."""
    structure = chosen.structure
    sites = [site for point in structure.graph.points for site in point.sites]
    every, channels = range(len(structure.names)), 2 if structure.tensor_alive.any() else 1
    forward = path_cost(structure.graph, range(len(structure.graph.nodes)))
    back, sweep = path_cost(structure.graph, sites), sweep_cost(structure, 0, every)
    kept = linearization_bytes(structure.graph, sites)
    before = [phases[name].seconds for name in ("capture", "proof", "compile", "linearize") if name in phases]
    seconds = chosen.flops / rate + sum(before)
    return {
        "linearize": Phase((forward.flops + back.flops) / rate, kept),
        "sweep": Phase(
            sweep.flops / rate,
            sweep_bytes(structure.graph, structure.graph.points[0].sites, sites, channels, batch_mode),
        ),
        "map": Phase(seconds, kept + chosen.peak_bytes),
    }
