"""The capture stage: checks, recording, conversion, batch axes, points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import nn

from dag_hesse._capture.advice import fitted
from dag_hesse._capture.batch import Batch, check_devices, check_finite, check_no_transform, check_tensors, one_batch
from dag_hesse._capture.convert import convert
from dag_hesse._capture.defaults import default_points
from dag_hesse._capture.interaction import annotate
from dag_hesse._capture.losses import Loss, check_loss
from dag_hesse._capture.points import Names, points_like, resolve_points
from dag_hesse._capture.record import record
from dag_hesse._capture.stream import Batches
from dag_hesse.errors import BatchError, CaptureError, NonDifferentiableError, OptionError, kind_of, several
from dag_hesse.ir import CurvatureGraph, Node, Point, verify
from dag_hesse.options import checked_options
from dag_hesse.randomness import preserved
from dag_hesse.rules.table import pairs_of

Points = Names | Callable[[CurvatureGraph], Sequence[Point]] | None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` has wrapped, if it has: the capture records by itself."""
    return getattr(model, "_orig_mod", model)


def _check(model: nn.Module, batch: Batch) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {kind_of(model)}; expected a torch.nn.Module.")
    check_no_transform()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{f'submodule {name!r}' if name else 'the model'} is scripted (torch.jit): what runs inside cannot be "
                "seen. Pass the module that it was scripted from."
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise CaptureError(
                f"{f'submodule {name!r}' if name else 'the model'} is spread over {len(module.device_ids)} devices "
                "(DataParallel): pass its .module."
            )
    check_tensors(model, batch)
    check_devices(model, batch)
    check_finite((n for n, _ in model.named_buffers()), model.buffers(), "buffer")
    check_finite(batch.names, batch.tensors, "batch tensor")


def _check_parameters(model: nn.Module) -> None:
    """Where a forward fails or its loss is not finite: whether a parameter is at fault. It takes reading them all."""
    named = dict(model.named_parameters())
    check_finite(named, (p.detach() for p in named.values()), "parameter")


def _check_rules(graph: CurvatureGraph) -> None:
    """Every node between a parameter or input and the loss has a rule, or at least an autograd kernel."""
    on_path = graph.ancestors([graph.loss])
    for node in graph.opaque:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target.name()
        known = any(
            torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
            for key in ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
        )
        if on_path[node.index] and not known:
            raise NonDifferentiableError(f"{node.where} has no derivative, and lies on the path to the loss.")


def captured(model: nn.Module, batch: Any, *, loss: Loss | None = None, output: str | None = None) -> CurvatureGraph:
    """Record, type, verify and annotate; the graph has no points yet."""
    model = unwrapped(model)
    batch = fitted(one_batch(batch), model, loss)
    check_loss(loss)
    if output is not None and not isinstance(output, str):
        raise OptionError(f"output is {kind_of(output)}; expected the name of a module or tap.")
    _check(model, batch)
    try:
        recording = record(model, batch, loss)
    except CaptureError:
        _check_parameters(model)
        raise
    if not isfinite(recording.value):
        _check_parameters(model)
    graph = verify(convert(recording, batch.size, output))
    _check_rules(graph)
    return annotate(graph, batch)


@checked_options()
def capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Points = None,
    space: str = "activation",
) -> CurvatureGraph:
    """Turn model and loss, run on one batch, into a typed graph (design §3, capture).

    Args:
        model: any module; it comes back exactly as it was.
        batch: ``(inputs, targets)`` or a dict of keyword inputs.
        loss: ``callable(output, targets) -> scalar``; None: the model's own, or inferred from the targets' dtype.
        output: name of the module or tap that the loss consumes, where it cannot be inferred.
        points: names, parameter names or globs (``*`` does not cross dots, ``**`` does); None picks at most 16 from
            the module tree, and what is tapped. A mapping of names to names or globs: groups of parameters, each one
            point. A callable takes the captured graph and returns points.
        space: ``"activation"`` or ``"parameter"``: what a module's name stands for.

    Returns:
        The graph; ``print(graph)`` is readable, ``graph.points`` are its points in topological order.

    Raises:
        CaptureError, NonDeterministicError, LossError, BatchError, PointError, OptionError, NonFiniteError: see
            :mod:`dag_hesse.errors`.

    Examples:
        >>> import torch, dag_hesse
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> graph = dag_hesse.capture(model, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])))
        >>> [point.name for point in graph.points]
        ['1']
    """
    graph = captured(model, batch, loss=loss, output=output)
    model = unwrapped(model)
    if callable(points):
        graph.points = _points_by(points, graph)
    elif points is None:
        graph.points = default_points(graph, model, space)
    else:
        graph.points = resolve_points(graph, model, points, space)
    return graph


def _points_by(choose: Callable[[CurvatureGraph], Sequence[Point]], graph: CurvatureGraph) -> tuple[Point, ...]:
    """What a function of the graph chooses.

    Raises:
        OptionError: it is a class or a module, or returns something else than points.
    """
    if isinstance(choose, (type, nn.Module)):
        given = f"the class {choose.__name__}" if isinstance(choose, type) else kind_of(choose)
        raise OptionError(f"points is {given}; expected names or glob patterns.")
    points = tuple(several("points", choose(graph), "a function of the graph that returns points"))
    for point in points:
        if not isinstance(point, Point):
            raise OptionError(f"points returned {kind_of(point)}; expected points of the captured graph.")
    return points


def capture_all(
    model: nn.Module,
    batches: Batches,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Points = None,
    space: str = "activation",
    known: Mapping[Any, CurvatureGraph] | None = None,
) -> list[CurvatureGraph]:
    """One graph per batch; batches of equal shapes share theirs where they can, and all have the first one's points.

    ``known``: graphs of the same model and loss that were captured before, by signature. A batch of that signature
    takes one of them, unless it is batch-bound; all others get the points of these.

    Raises:
        BatchError: the batches give points of different shapes.
    """

    def take(batch: Batch, names: Points) -> CurvatureGraph:
        return capture(model, batch, loss=loss, output=output, points=names, space=space)

    by_signature: dict[Any, CurvatureGraph] = {}
    wanted, first = points, next(iter((known or {}).values()), None)
    if first is not None:
        wanted = partial(points_like, first, unwrapped(model))
    for signature, example in batches.examples.items():
        graph = (known or {}).get(signature)
        if graph is None or graph.batch_bound:
            graph = take(example, wanted)
        else:
            _check(unwrapped(model), example)
        by_signature[signature] = graph
        if first is None:
            first, wanted = graph, partial(points_like, graph, unwrapped(model))
    assert first is not None
    graphs = [by_signature[signature] for signature in batches.signatures]
    if any(graph.batch_bound for graph in by_signature.values()) and len(graphs) > 1:
        graphs = []  # what one batch put in is not another's, and it draws after the one before
        with preserved():
            for batch in batches:
                graphs.append(take(batch, wanted))
                assert graphs[-1].rng_after is not None
                graphs[-1].rng_after.restore()
    for graph in graphs:
        if [p.shape for p in graph.points] != [p.shape for p in first.points]:
            raise BatchError(
                "the batches give points of different shapes, so their blocks cannot be added: "
                f"{[p.shape for p in first.points]} and {[p.shape for p in graph.points]}."
            )
    return graphs


def needs_split(graphs: Sequence[CurvatureGraph]) -> None:
    """Raise :class:`CaptureError` where a Gauss–Newton part is wanted, and there is no telling it from the rest."""
    for graph in {id(graph): graph for graph in graphs}.values():
        if not graph.split:
            raise CaptureError(
                "the model returns its own loss but no logits, and no known loss function was seen, so there is no "
                "telling the Gauss–Newton part from the rest: name what the loss consumes with output=."
            )
        met = _beside_out(graph)
        if met is not None:
            raise CaptureError(
                f"at {met.where} the loss combines the model's output with a point that it uses beside it, so the "
                "Hessian does not part into Gauss–Newton and tensor part by the output alone: take HessianOperator, "
                "leave that point out, or name with output= what the loss should be a function of."
            )


def _beside_out(graph: CurvatureGraph) -> Node | None:
    """The first op of the loss that is curved in something that reaches it from a point, but not through ``out``."""
    in_loss, active = graph.loss_subgraph, graph.descendants(k for point in graph.points for k in point.sites)
    beside = [False] * len(graph.nodes)
    for node in graph.nodes:
        if not in_loss[node.index] or not node.is_differentiable:
            continue
        came = [beside[k] or (active[k] and not in_loss[k] and k not in graph.out) for k in node.inputs]
        beside[node.index] = any(came)
        if any(came[i] and active[node.inputs[j]] for i, j in pairs_of(node)):
            return node
    return None
