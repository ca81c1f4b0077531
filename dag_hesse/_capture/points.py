"""Which points: named by the user, by names, globs, or groups of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from torch import nn

from dag_hesse._capture.heads import split_heads
from dag_hesse.errors import (
    NonDifferentiableError,
    OptionError,
    PointError,
    choose,
    is_integer,
    kind_of,
    several,
    suggest,
)
from dag_hesse.ir import CurvatureGraph, Interaction, Kind, Node, Point
from dag_hesse.names import innermost, matches, wider

SPACES = ("activation", "parameter")
Names = Sequence[str] | str | Mapping[str, Sequence[str] | str]


def activation_point(graph: CurvatureGraph, name: str, sites: Sequence[int]) -> Point:
    shapes = []
    for site in sites:
        node, batch_axis = graph.nodes[site], graph.batch_axes[site]
        shape = list(node.shape)
        if batch_axis is not None:
            shape[batch_axis.axis] = batch_axis.outer * batch_axis.inner
            if shape[batch_axis.axis] == 1:
                del shape[batch_axis.axis]
        shapes.append(tuple(shape))
    if len(set(shapes)) > 1:
        raise PointError(
            f"'{name}' was called with outputs of different shapes {shapes}, so one perturbation cannot be shared: "
            f"name single calls, '{name}[0]' … '{name}[{len(sites) - 1}]'."
        )
    return Point(name, shapes[0], prod(shapes[0]), "activation", tuple(sites))


def parameter_point(graph: CurvatureGraph, name: str, members: Sequence[str]) -> Point:
    for member in members:
        if graph.nodes[graph.parameters[member]].dtype.is_complex:
            raise PointError(
                f"parameter '{member}' is complex, and curvature is by real ones: keep its parts in a real one and "
                "take torch.view_as_complex of that in the forward, or leave it out (param_filter= of an operator)."
            )
    sites = tuple(graph.parameters[member] for member in members)
    sizes = [graph.nodes[site].numel for site in sites]
    shape = graph.nodes[sites[0]].shape if len(sites) == 1 else (sum(sizes),)
    return Point(name, shape, sum(sizes), "parameter", sites)


def reach_loss(graph: CurvatureGraph) -> list[bool]:
    return graph.ancestors([graph.loss])


def _require_path(graph: CurvatureGraph, point: Point, reaching: list[bool]) -> None:
    if any(reaching[site] for site in point.sites):
        return
    reached = graph.descendants(point.sites)
    for node in graph.nodes:
        if node.kind is Kind.CONST and any(reached[parent] for parent in node.inputs):
            raise NonDifferentiableError(
                f"point '{point.name}' reaches the loss only through {node.where}, which has no derivative."
            )
    raise PointError(f"the loss does not depend on point '{point.name}': leave it out.")


def in_order(graph: CurvatureGraph, points: list[Point]) -> tuple[Point, ...]:
    reaching = reach_loss(graph)
    for point in points:
        _require_path(graph, point, reaching)
    unique = {point.name: point for point in points}
    return tuple(sorted(unique.values(), key=lambda point: (min(_depth(graph, point, reaching)), point.name)))


def _depth(graph: CurvatureGraph, point: Point, reaching: list[bool]) -> list[int]:
    """Activations come where they are computed, parameters where they are first used."""
    if point.kind == "activation":
        return list(point.sites)
    return [min((c for c in graph.children[s] if reaching[c]), default=s) for s in point.sites]


def _call(graph: CurvatureGraph, name: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    if match and match.group(1) in graph.taps and int(match.group(2)) < len(graph.taps[match.group(1)]):
        return match.group(1), int(match.group(2))
    return None


def members_of(graph: CurvatureGraph, model: nn.Module, prefix: str) -> list[str]:
    """The used parameters of the module at ``prefix``, or the parameter itself (tied names are resolved)."""
    canonical = {id(p): n for n, p in model.named_parameters()}
    every = list(model.named_parameters(remove_duplicate=False))
    itself = [canonical[id(p)] for n, p in every if n == prefix]
    found = itself or [canonical[id(p)] for n, p in every if n.startswith(prefix + ".")]
    return [name for name in dict.fromkeys(found) if name in graph.parameters]


def _named(graph: CurvatureGraph, model: nn.Module, name: str, space: str) -> Point | None:
    """The point called exactly ``name``, if there is one."""
    all_parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    if name in all_parameters or space == "parameter":
        members = members_of(graph, model, name)
        if members:
            return parameter_point(graph, name, members)
        if name in all_parameters:
            raise PointError(f"the loss does not depend on parameter '{name}': leave it out.")
        return None
    name = _first_name(model, name)
    if name in graph.taps:
        return activation_point(graph, name, graph.taps[name])
    call = _call(graph, name)
    return activation_point(graph, name, [graph.taps[call[0]][call[1]]]) if call else None


def _first_name(model: nn.Module, name: str) -> str:
    """A module of several names goes by its first; a call's number is kept."""
    path, bracket, number = name.partition("[")
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    first = next((n for n, m in model.named_modules() if m is module), path)
    return first + bracket + number


def _missing(graph: CurvatureGraph, model: nn.Module, name: str, space: str) -> PointError:
    if name in graph.unused:
        return PointError(f"the loss does not depend on point '{name}': leave it out.")
    modules = dict(model.named_modules())
    if space == "parameter" and name in modules and not any(True for _ in modules[name].parameters()):
        return PointError(f"module '{name}' has no parameters; in activation space it is its output.")
    if name == "":
        return PointError("the model's own output is called 'output' (or 'output.' and the name of a part).")
    if name in graph.modules:
        return PointError(f"the output of module '{name}' is not a floating-point tensor, so it has no derivative.")
    if name in modules and space == "activation":
        return PointError(f"module '{name}' ({type(modules[name]).__name__}) was not called in the forward pass.")
    if (wide := wider(name, (*graph.taps, *graph.parameters))) is not None:
        return PointError(f"'{name}' matches nothing, as * does not cross dots: '{wide}' does.")
    known = [*graph.taps, *graph.parameters] if space == "activation" else [*graph.parameters, *modules]
    return PointError(f"point '{name}' matches no module, tap or parameter. {suggest(name, known)}")


def resolve_points(
    graph: CurvatureGraph, model: nn.Module, names: Names, space: str = "activation"
) -> tuple[Point, ...]:
    """Points for the user's names and glob patterns, in topological order.

    ``*`` stands for a part of a name between dots, ``**`` for any number of parts. In parameter space a glob stands for
    the parameters that match it, and for modules that do and that hold none of those: ``layer*`` is every stage as a
    whole, ``**.weight`` every weight. A mapping of names to names or globs makes each of its values one point, the
    parameters that they stand for joined.

    Raises:
        PointError: a name that matches nothing (near names are suggested), or that the loss does not depend on.
        OptionError: what is no name.
    """
    choose("space", space, SPACES)
    if not isinstance(names, Iterable):
        raise OptionError(f"points is {kind_of(names)}; expected names or glob patterns.")
    if isinstance(names, Mapping):
        if not names:
            raise PointError("points is an empty mapping: name at least one group, or pass None.")
        return in_order(graph, [_group(graph, model, name, members) for name, members in names.items()])
    names = [names] if isinstance(names, str) else several("points", names, "names or glob patterns")
    if space == "activation":
        names = split_heads(graph, [_first_name(model, n) if isinstance(n, str) else n for n in names])
    reaching, points = reach_loss(graph), []
    for name in names:
        if not isinstance(name, str):
            hint = f" ({str(name)!r} is the module of that name; reports and operators take positions.)"
            raise OptionError(
                f"points holds {kind_of(name)}; expected names or glob patterns." + (hint if is_integer(name) else "")
            )
        exact = _named(graph, model, name, space)
        if exact is not None:
            points.append(exact)
            continue
        if space == "activation":
            found = [n for n in graph.taps if matches(n, name) and any(reaching[s] for s in graph.taps[n])]
            found = found or [n for n in graph.parameters if matches(n, name)]
        else:
            found = innermost(name, list(graph.parameters))
        if not found:
            raise _missing(graph, model, name, space)
        points += [p for n in found if (p := _named(graph, model, n, space)) is not None]
    if not points:
        raise PointError("the list of points is empty: name at least one, or pass None to have them chosen.")
    return in_order(graph, points)


def _group(graph: CurvatureGraph, model: nn.Module, name: str, members: Sequence[str] | str) -> Point:
    """Several modules' parameters as one point, whatever the space.

    Raises:
        OptionError: the name is none, or a member names an activation.
        PointError: a member names nothing.
    """
    if not isinstance(name, str) or not name:
        raise OptionError(f"points has the key {name!r}; expected a name for the group of parameters that it holds.")
    found = dict.fromkeys(site for point in resolve_points(graph, model, members, "parameter") for site in point.sites)
    by_site = {site: member for member, site in graph.parameters.items()}
    return parameter_point(graph, name, [by_site[site] for site in found])


def _leaf(graph: CurvatureGraph, model: nn.Module, name: str) -> int:
    """The node of a parameter; one that has no use is given a node."""
    if name not in graph.parameters:
        p = dict(model.named_parameters())[name]
        graph.parameters[name] = len(graph.nodes)
        leaf = Node(len(graph.nodes), "param", None, (), {}, (), tuple(p.shape), p.dtype, Kind.PARAM, name=name)
        graph.nodes.append(leaf)
        graph.children.append([])
        graph.batch_axes.append(None)
        graph.interactions.append(Interaction.NONE)
        graph.ends.append("")
    return graph.parameters[name]


def parameter_points(names: Sequence[str], model: nn.Module, graph: CurvatureGraph) -> tuple[Point, ...]:
    """A point a parameter, used or not, those that are used first, in topological order."""
    reaching = reach_loss(graph)
    used = [parameter_point(graph, n, [n]) for n in names if n in graph.parameters and reaching[graph.parameters[n]]]
    known = {point.name for point in used}
    rest = [n for n in names if n not in known]
    for name in rest:
        _leaf(graph, model, name)
    return (*(in_order(graph, used) if used else ()), *(parameter_point(graph, n, [n]) for n in rest))


def points_like(first: CurvatureGraph, model: nn.Module, graph: CurvatureGraph) -> tuple[Point, ...]:
    """The points of another batch's graph, in its order; a parameter that this batch does not use is one all the same.

    Raises:
        PointError: this batch does not run a module that is a point.
    """
    by_site = {k: name for name, k in first.parameters.items()}
    split_heads(graph, [point.name for point in first.points])
    found = []
    for point in first.points:
        if point.kind == "parameter":
            members = [by_site[k] for k in point.sites]
            for name in members:
                _leaf(graph, model, name)
            found.append(parameter_point(graph, point.name, members))
            continue
        own = _named(graph, model, point.name, "activation")
        if own is None:
            raise PointError(f"a batch does not run point '{point.name}', which an earlier one runs: leave it out.")
        found.append(own)
    return tuple(found)
