"""A captured graph is compared with the model itself before any product is given out: its loss and its gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite, isinf, sqrt

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dag_hesse._capture.batch import Batch
from dag_hesse._capture.evidence import Evidence, gradients, product, slope
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.run import capture, captured
from dag_hesse._capture.stream import Batches
from dag_hesse.errors import (
    LossError,
    NonDeterministicError,
    NonDifferentiableError,
    NonFiniteError,
    UnfaithfulCaptureError,
)
from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.plan.fusion import fuse
from dag_hesse.randomness import preserved
from dag_hesse.rules import Call
from dag_hesse.rules.opaque import second_order_fault
from dag_hesse.sweep.engine import pullback, sweep
from dag_hesse.sweep.linearize import Linearization, leaf_values

VERIFY = ("gradient", "product", "none")
_ROUNDINGS = 10  # of adjoints inside of the loss, that may be left of them at its output
_MOST = 0.1  # relative error, that no rounding excuses: a path that is missing or counted twice shows above it
_FLOOR = 1e-2  # of the whole gradient: what cancels within one parameter leaves rounding of this size at most


def _tolerance(dtype: torch.dtype) -> float:
    """Relative rounding of a gradient; a path that is missing or counted twice shows far above it."""
    return min(10 * sqrt(torch.finfo(dtype).eps), _MOST)


def _off(found: Tensor | None, expected: Tensor, floor: float) -> float:
    """Relative error of an adjoint."""
    size = float(expected.norm())
    difference = size if found is None else float(torch.dist(found.to(expected.dtype), expected))
    scale = max(size, floor)
    return difference / scale if scale else difference


def _sites(graph: CurvatureGraph, evidence: Evidence) -> list[tuple[str, int, Tensor]]:
    """(name, node, what autograd says) of all parameters and tapped tensors that both sides know."""
    found = [(name, graph.parameters[name], g) for name, g in evidence.parameters.items() if name in graph.parameters]
    for name, calls in evidence.taps.items():
        found += [
            (name, site, g)
            for site, g in zip(graph.taps.get(name, ()), calls, strict=False)
            if g is not None and g.shape == torch.Size(graph.nodes[site].shape)
        ]
    return found


def _names(graph: CurvatureGraph) -> list[str]:
    """Marks that are points."""
    sites = {k for point in graph.points for k in point.sites}
    return [_tap_name(name) for name, own in graph.taps.items() if sites.intersection(own)]


def _tap_name(name: str) -> str:
    """The tap of a name: the model's output has none of its own."""
    return f"<output>{name.removeprefix('output')}" if name.split(".")[0] == "output" else name


def _differentiated(graph: CurvatureGraph, evidence: Evidence) -> CurvatureGraph:
    """The graph as it is swept, with all parameters among its points."""
    known = {k for point in graph.points for k in point.sites}
    own = [(n, graph.parameters[n]) for n in evidence.parameters if n in graph.parameters]
    more = tuple(
        Point(n, graph.nodes[k].shape, graph.nodes[k].numel, "parameter", (k,)) for n, k in own if k not in known
    )
    return fuse(replace(graph, points=graph.points + more))


def _inspect(call: Call) -> None:
    """An op that autograd differentiates must be right at second order too."""
    fault = second_order_fault(call)
    if fault is not None:
        raise NonDifferentiableError(f"{call.node.where}: {fault}")


def _adjoints(
    graph: CurvatureGraph, model: nn.Module, tensors: list[Tensor], sites: Iterable[int]
) -> tuple[float, dict[int, Tensor]]:
    """The graph's own loss and its adjoints at nodes."""
    wanted = set(sites)
    with preserved():
        given = leaf_values(graph, model, tensors)
        lin = Linearization(graph, given, wanted, tensor_part=False, checked=False, inspect=_inspect)
    one = torch.ones(1, *graph.nodes[graph.loss].shape, dtype=lin.loss.dtype, device=lin.loss.device)
    found = pullback(lin, {graph.loss: one}, wanted)
    return float(lin.loss), {k: x[0] for k, x in found.items()}


def _floor(model: nn.Module, evidence: Evidence) -> float:
    """What an adjoint is measured by at least: where a gradient vanishes, what is left is rounding of the loss."""
    gradient = sqrt(sum(float(g.norm()) ** 2 for g in evidence.parameters.values()))
    size = sqrt(sum(float(p.detach().norm()) ** 2 for p in model.parameters() if p.is_floating_point()))
    return max(_FLOOR * gradient, _FLOOR**2 * abs(evidence.loss) / max(size, 1.0))


def prove(
    graph: CurvatureGraph,
    model: nn.Module,
    batch: Batch,
    loss: Loss | None,
    output: str | None,
    *,
    on_tape: bool = False,
) -> None:
    """Compare the graph's loss and gradient (by all parameters, and at the points) with the model's own.

    It costs one gradient of the model and one of the graph; ``on_tape`` has autograd's be differentiable once more.

    Raises:
        NonDeterministicError: the model gives another loss when it is run again from the same state.
        UnfaithfulCaptureError: naming the module from which on adjoints differ.
    """
    evidence = gradients(model, batch, loss, _names(graph), list(graph.written), on_tape=on_tape)
    dtype = graph.nodes[graph.loss].dtype
    scale, tolerance = max(abs(evidence.loss), 1e-30), _tolerance(dtype)
    if isfinite(evidence.loss) and isfinite(graph.value) and not abs(graph.value - evidence.loss) <= tolerance * scale:
        raise NonDeterministicError(
            f"{type(model).__name__} gives other losses when it is run again from the same state ({graph.value:.8g}, "
            f"then {evidence.loss:.8g}), so there is no one Hessian: let its forward draw from the generators of "
            "PyTorch, Python or NumPy alone, and read no clock."
        )
    if isinf(evidence.loss):
        raise LossError(f"the loss is {evidence.loss}; curvature there is undefined.")
    if evidence.unable:
        _prove_slope(graph, model, batch, loss, evidence)
        return
    evidence.taps = {name.replace("<output>", "output"): calls for name, calls in evidence.taps.items()}
    bad = [name for name, g in evidence.parameters.items() if not bool(g.sum().isfinite())]
    if bad and isfinite(evidence.loss):
        raise NonFiniteError(
            f"the model's own gradient holds NaN or infinity at {', '.join(repr(n) for n in bad[:4])}: there is no "
            "curvature there. (A torch.where() passes the NaN of the branch that it does not take: clamp what goes in.)"
        )
    graph = _differentiated(graph, evidence)
    sites = _sites(graph, evidence)
    value, found = _adjoints(graph, model, batch.tensors, [k for _, k, _ in sites])
    wrong_loss = not abs(value - evidence.loss) <= tolerance * scale
    floor = _floor(model, evidence)
    # Parameters that the graph does not know must not matter to autograd either.
    unknown = [n for n, g in evidence.parameters.items() if n not in graph.parameters and float(g.norm()) > floor]
    wrong = [name for name, k, g in sites if not _off(found.get(k), g, floor) <= tolerance]
    if wrong and not wrong_loss and not on_tape:  # autograd's formulas for derivatives of derivatives may know better
        prove(graph, model, batch, loss, output, on_tape=True)
        return
    if (wrong or unknown) and not wrong_loss and _holds_in_double(model, batch, loss, output, graph):
        return  # units beside their kinks decide otherwise when numbers are rounded otherwise
    if wrong and not (unknown or wrong_loss) and _is_rounding(graph, model, batch, evidence, found):
        return
    if wrong_loss or wrong or unknown:
        said = f"its loss is {value:.8g} and the model's {evidence.loss:.8g}; " if wrong_loss else ""
        bad = [*wrong, *unknown]
        said += f"its gradient differs from autograd's at {', '.join(repr(n) for n in bad[:4])}" if bad else ""
        said += "" if wrong_loss else _decided(graph, model, batch, loss, evidence, found)
        raise UnfaithfulCaptureError(
            f"the captured graph of {type(model).__name__} is not the model: {said.removesuffix('; ')}. "
            f"{_first_difference(model, batch, loss, output, list(graph.written))} A tensor hook, a gradient that is "
            "changed on its way, a custom C++ function, a random state that the forward sets itself, or values that "
            "leave PyTorch in it may be why; please report it otherwise. verify='none' goes on without this check."
        )


def _holds_in_double(
    model: nn.Module, batch: Batch, loss: Loss | None, output: str | None, graph: CurvatureGraph
) -> bool:
    """Whether the same model and batch in double precision pass the proof."""
    hooked = any(p._backward_hooks for p in model.parameters())  # which a copy does not have
    if graph.nodes[graph.loss].dtype == torch.float64 or hooked:
        return False
    try:
        wide = copy.deepcopy(model).double()
        tree = pytree.tree_map(
            lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch.tree
        )
        args, kwargs, targets = tree
        again = Batch(args, kwargs, targets, batch.size)
        names = [point.name for point in graph.points if point.kind == "activation"]
        prove(capture(wide, again, loss=loss, output=output, points=names or None), wide, again, loss, output)
    except Exception:  # what cannot be copied, or does not run in double precision, proves nothing
        return False
    return True


def _is_rounding(
    graph: CurvatureGraph, model: nn.Module, batch: Batch, evidence: Evidence, found: Mapping[int, Tensor]
) -> bool:
    """Whether adjoints differ by no more than what cancels inside of the loss leaves of them.

    Where a classifier is as good as sure, p − 1 is rounding of p: adjoints at the loss's ops are larger than at its
    output by 1/(1 − p), and what they are rounded by goes on from there.
    """
    dtype = graph.nodes[graph.loss].dtype
    if dtype != torch.float64:  # less is known in less: there the same in double precision decides
        return False
    inner = [node.index for node in graph.nodes if graph.loss_subgraph[node.index] and node.is_float]
    own = {k: float(x.norm()) for k, x in _adjoints(graph, model, batch.tensors, [*inner, *graph.out])[1].items()}
    at_output = sqrt(sum(own.get(k, 0.0) ** 2 for k in graph.out))
    if not at_output:
        return False
    allowed = _tolerance(dtype) + _ROUNDINGS * torch.finfo(dtype).eps * max(own.values()) / at_output
    allowed = min(allowed, _MOST)
    return all(_off(found.get(k), g, 0.0) <= allowed for _, k, g in _sites(graph, evidence))


def _direction(model: nn.Module, graph: CurvatureGraph) -> dict[str, Tensor]:
    """A random direction of length one in the parameters that the graph knows."""
    generator = torch.Generator().manual_seed(0)
    own = {name: p for name, p in model.named_parameters() if name in graph.parameters}
    along = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu").to(p.device) for n, p in own.items()
    }
    size = sqrt(sum(float(v.norm()) ** 2 for v in along.values()))
    return {name: v / size for name, v in along.items()}


def _prove_product(graph: CurvatureGraph, model: nn.Module, batch: Batch, loss: Loss | None) -> None:
    """One Hessian product against double-backward."""
    along = _direction(model, graph)
    expected = product(model, batch, loss, along, list(graph.written))
    graph = _differentiated(graph, Evidence(0.0, parameters=along))
    sites = {name: graph.parameters[name] for name in along}
    with preserved():
        lin = Linearization(graph, leaf_values(graph, model, batch.tensors), sites.values(), checked=False)
    found = sweep(lin, {sites[n]: v[None] for n, v in along.items()}, sites.values(), "full")
    size = sqrt(sum(float(h.norm()) ** 2 for h in expected.values()))
    tolerance = _tolerance(graph.nodes[graph.loss].dtype)
    wrong = [
        name
        for name, h in expected.items()
        if not _off(found[sites[name]].data[0] if sites[name] in found else None, h, _FLOOR * size) <= tolerance
    ]
    if wrong:
        raise UnfaithfulCaptureError(
            f"a Hessian product of {type(model).__name__} differs from double-backward's at "
            f"{', '.join(repr(n) for n in wrong[:4])}. Where PyTorch's own second derivative is at fault (differences "
            "of gradients tell), verify='gradient' goes on."
        )


def _prove_slope(graph: CurvatureGraph, model: nn.Module, batch: Batch, loss: Loss | None, evidence: Evidence) -> None:
    """Where autograd cannot differentiate the model, central differences along one direction decide."""
    along = evidence.parameters = _direction(model, graph)
    graph = _differentiated(graph, evidence)
    found = _adjoints(graph, model, batch.tensors, [graph.parameters[name] for name in along])[1]
    step = torch.finfo(graph.nodes[graph.loss].dtype).eps ** (1 / 3)
    expected = slope(model, batch, loss, along, step, list(graph.written))
    mine = sum(float((found[graph.parameters[n]] * v).sum()) for n, v in along.items() if graph.parameters[n] in found)
    steepest = sqrt(sum(float(g.norm()) ** 2 for g in found.values()))
    if abs(mine - expected) > 0.05 * max(
        abs(expected), steepest / sqrt(max(sum(v.numel() for v in along.values()), 1))
    ):
        raise UnfaithfulCaptureError(
            f"the captured graph of {type(model).__name__} is not the model: along a random direction its loss has the "
            f"slope {mine:.6g}, and central differences of the model's own give {expected:.6g} (autograd cannot "
            f"differentiate it: {evidence.unable}). verify='none' goes on without this check."
        )


def _decided(
    graph: CurvatureGraph,
    model: nn.Module,
    batch: Batch,
    loss: Loss | None,
    evidence: Evidence,
    found: Mapping[int, Tensor],
) -> str:
    """Whom central differences of the model's loss confirm, where the graph and autograd differ in its gradient."""
    along, step = _direction(model, graph), torch.finfo(graph.nodes[graph.loss].dtype).eps ** (1 / 3)
    expected = slope(model, batch, loss, along, step, list(graph.written))
    of_graph = {name: found.get(graph.parameters[name]) for name in along}
    slopes = {
        who: sum(float((g * along[name]).sum()) for name, g in gradient.items() if g is not None)
        for who, gradient in (("the graph's", of_graph), ("autograd's", {n: evidence.parameters[n] for n in along}))
    }
    apart = abs(slopes["the graph's"] - slopes["autograd's"])
    near = [who for who, value in slopes.items() if abs(value - expected) < apart / 4]
    return f"; central differences of its loss confirm {near[0]}" if near else ""


def _first_difference(
    model: nn.Module, batch: Batch, loss: Loss | None, output: str | None, written: list[Tensor]
) -> str:
    """Where, coming from the loss, adjoints begin to differ."""
    graph = captured(model, batch, loss=loss, output=output)
    evidence = gradients(model, batch, loss, [_tap_name(name) for name in graph.taps], written)
    evidence.taps = {name.replace("<output>", "output"): calls for name, calls in evidence.taps.items()}
    evidence.parameters = {}
    sites = sorted(_sites(graph, evidence), key=lambda site: -site[1])
    _, found = _adjoints(graph, model, batch.tensors, [k for _, k, _ in sites])
    tolerance, agreed = _tolerance(graph.nodes[graph.loss].dtype), ""
    for name, k, g in sites:
        if not _off(found.get(k), g, 0.0) <= tolerance:
            node = graph.nodes[k]
            behind = f", but agree at '{agreed}'" if agreed else ""
            return f"Adjoints differ from the output of '{name}' ({node.where}) on{behind}: the fault is between."
        agreed = name
    return "Adjoints agree at all module outputs: the fault is in what parameters go through inside a module."


def prove_all(
    graphs: Sequence[CurvatureGraph],
    batches: Batches,
    model: nn.Module,
    loss: Loss | None,
    output: str | None,
    verify: str,
    proved: Sequence[CurvatureGraph] = (),
) -> None:
    """:func:`prove` for every graph, on the first batch that it is of; not again for those that are ``proved``."""
    if verify == "none":
        return
    if any(graph.batch_bound for graph in graphs):
        own: Iterable[Batch] = batches
    else:
        own = [batches.examples[signature] for signature in batches.signatures]
    seen: set[int] = {id(graph) for graph in proved}
    for graph, batch in zip(graphs, own, strict=True):
        if id(graph) not in seen:
            seen.add(id(graph))
            _prove_one(graph, batch, model, loss, output, verify)


def _prove_one(
    graph: CurvatureGraph, batch: Batch, model: nn.Module, loss: Loss | None, output: str | None, verify: str
) -> None:
    if verify == "none" or graph.value != graph.value:  # a batch without a loss counts nothing in a stream
        return
    with preserved():
        if graph.rng_before is not None:
            graph.rng_before.restore()
        prove(graph, model, batch, loss, output)
        if verify == "product":
            _prove_product(graph, model, batch, loss)


def capture_anew(
    model: nn.Module,
    batch: Batch,
    *,
    loss: Loss | None,
    output: str | None,
    points: Callable[[CurvatureGraph], Sequence[Point]],
    space: str,
    verify: str,
    before: CurvatureGraph | None,
) -> CurvatureGraph:
    """The graph of a batch that leads the forward another way than its graph goes, proved as the first ones are.

    Where that is the way of the graph ``before`` after all, it needs no proof. None: that graph failed on the batch.
    """
    graph = capture(model, batch, loss=loss, output=output, points=points, space=space)
    if before is not None and graph.looked_alike(before):
        return graph
    _prove_one(graph, batch, model, loss, output, verify)
    return graph
