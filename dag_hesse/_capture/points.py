"""Which points: chosen from the module tree, or named by the user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import prod

from torch import nn

from dag_hesse.errors import NonDifferentiableError, OptionError, PointError, choose, suggest
from dag_hesse.ir import CurvatureGraph, Interaction, Kind, Node, Point
from dag_hesse.names import innermost, matches, wider

MOST = 16
SPACES = ("activation", "parameter")


def _activation(graph: CurvatureGraph, name: str, sites: Sequence[int]) -> Point:
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


def _parameter(graph: CurvatureGraph, name: str, members: Sequence[str]) -> Point:
    sites = tuple(graph.parameters[member] for member in members)
    sizes = [graph.nodes[site].numel for site in sites]
    shape = graph.nodes[sites[0]].shape if len(sites) == 1 else (sum(sizes),)
    return Point(name, shape, sum(sizes), "parameter", sites)


def _reach_loss(graph: CurvatureGraph) -> list[bool]:
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


def _in_order(graph: CurvatureGraph, points: list[Point]) -> tuple[Point, ...]:
    reaching = _reach_loss(graph)
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


def _members(graph: CurvatureGraph, model: nn.Module, prefix: str) -> list[str]:
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
        members = _members(graph, model, name)
        if members:
            return _parameter(graph, name, members)
        if name in all_parameters:
            raise PointError(f"the loss does not depend on parameter '{name}': leave it out.")
        return None
    name = _first_name(model, name)
    if name in graph.taps:
        return _activation(graph, name, graph.taps[name])
    call = _call(graph, name)
    return _activation(graph, name, [graph.taps[call[0]][call[1]]]) if call else None


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
    graph: CurvatureGraph, model: nn.Module, names: Sequence[str] | str, space: str = "activation"
) -> tuple[Point, ...]:
    """Points for the user's names and glob patterns, in topological order.

    ``*`` stands for a part of a name between dots, ``**`` for any number of parts. In parameter space a glob stands for
    the parameters that match it, and for modules that do and that hold none of those: ``layer*`` is every stage as a
    whole, ``**.weight`` every weight.

    Raises:
        PointError: a name that matches nothing (near names are suggested), or that the loss does not depend on.
        OptionError: what is no name.
    """
    choose("space", space, SPACES)
    if not isinstance(names, Iterable):
        raise OptionError(f"points is a {type(names).__name__}; expected names or glob patterns.")
    reaching, points = _reach_loss(graph), []
    for name in [names] if isinstance(names, str) else list(names):
        if not isinstance(name, str):
            raise OptionError(f"points holds a {type(name).__name__}; expected names or glob patterns.")
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
    return _in_order(graph, points)


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
    return graph.parameters[name]


def parameter_points(names: Sequence[str], model: nn.Module, graph: CurvatureGraph) -> tuple[Point, ...]:
    """A point a parameter, used or not, those that are used first, in topological order."""
    reaching = _reach_loss(graph)
    used = [_parameter(graph, n, [n]) for n in names if n in graph.parameters and reaching[graph.parameters[n]]]
    known = {point.name for point in used}
    rest = [n for n in names if n not in known]
    for name in rest:
        _leaf(graph, model, name)
    return (*(_in_order(graph, used) if used else ()), *(_parameter(graph, n, [n]) for n in rest))


def points_like(first: CurvatureGraph, model: nn.Module, graph: CurvatureGraph) -> tuple[Point, ...]:
    """The points of another batch's graph, in its order; a parameter that this batch does not use is one all the same.

    Raises:
        PointError: this batch does not run a module that is a point.
    """
    by_site = {k: name for name, k in first.parameters.items()}
    found = []
    for point in first.points:
        if point.kind == "parameter":
            members = [by_site[k] for k in point.sites]
            for name in members:
                _leaf(graph, model, name)
            found.append(_parameter(graph, point.name, members))
            continue
        own = _named(graph, model, point.name, "activation")
        if own is None:
            raise PointError(f"a batch does not run point '{point.name}', which an earlier one runs: leave it out.")
        found.append(own)
    return tuple(found)


# --- default choice -------------------------------------------------------------------------------------------------


class _Chooser:
    """Walks the module tree for the places a reader would name: blocks, stages, or activations."""

    def __init__(self, graph: CurvatureGraph, model: nn.Module) -> None:
        self.graph, self.modules = graph, dict(model.named_modules())
        self.own = {id(module): name for name, module in self.modules.items()}  # of several names, the first
        reaching, from_out = _reach_loss(graph), graph.descendants(graph.out)
        self.sites = {
            name: sites
            for name, sites in graph.taps.items()
            if name in self.modules and any(reaching[s] and not from_out[s] for s in sites)
        }

    def children(self, name: str) -> list[tuple[str, bool]]:
        """Called children, containers that are never called being opened; the flag says: element of a list."""
        found: dict[str, bool] = {}
        for _, module in self.modules[name].named_children():
            path = self.own[id(module)]
            if path in self.sites:
                listed = isinstance(self.modules[name], (nn.ModuleList, nn.ModuleDict))
                found[path] = found.get(path, False) or listed
            else:
                listed = path not in self.graph.modules
                found.update((p, listed) for p, _ in self.children(path))
        return list(found.items())

    def wrapped(self, name: str) -> str | None:
        """The one child with stages inside, where it makes the model's output: what is around it is a container."""
        paths = dict.fromkeys(self.own[id(module)] for _, module in self.modules[name].named_children())
        deep = [path for path in paths if path in self.graph.modules and self.composite(path)]
        inside = [path for path, _ in self.children(deep[0])] if len(deep) == 1 else []
        stages = deep and deep[0] not in self.sites and any(self.composite(path) for path in inside)
        return deep[0] if stages else None

    def composite(self, name: str) -> bool:
        return any(path in self.sites for path, _ in self.children(name))

    def choose(self, name: str = "", *, tail: bool = False) -> list[str]:
        """Names from the module tree below ``name``; ``tail``: with the leaves behind the last stage (a head)."""
        if (inner := self.wrapped(name)) is not None:
            return self.choose(inner, tail=tail) + (self.behind(name, inner) if tail else [])
        children = self.children(name)
        composites = [(path, listed) for path, listed in children if self.composite(path)]
        if not composites:
            return self.leaves([path for path, _ in children])
        behind = self.behind(name, composites[-1][0]) if tail else []
        if len(composites) == 1:
            return self.choose(composites[0][0], tail=tail) + behind
        chosen: list[str] = []
        if not composites[0][1]:
            order = [path for path, _ in children]
            before = order[: order.index(composites[0][0])]
            chosen += [p for p in before[-1:] if not isinstance(self.modules[p], nn.Embedding)]
        for path, _ in composites:
            listed = [p for p, in_list in self.children(path) if in_list and self.composite(p)]
            chosen += self.choose(path) if len(listed) > 1 else [path]
        return chosen + behind

    def behind(self, name: str, last: str) -> list[str]:
        """Children of ``name`` that run after its last stage."""
        order = list(self.graph.modules)  # in order of completion
        paths = [self.own[id(module)] for _, module in self.modules[name].named_children()]
        after = [path for path in paths if path in order and order.index(path) > order.index(last)]
        return [path for path in after if not last.startswith(path + ".")]  # a container ends after its stages

    def leaves(self, names: list[str]) -> list[str]:
        active = [
            name
            for name in names
            if type(self.modules[name]).__module__ == "torch.nn.modules.activation"
            and not isinstance(self.modules[name], nn.MultiheadAttention)
        ]
        return active or [n for n in names if any(True for _ in self.modules[n].parameters())] or names


def _spread(names: list[str], most: int) -> list[str]:
    """At most ``most`` of the names, evenly spaced, ends kept."""
    if len(names) <= most:
        return names
    return [names[round(k * (len(names) - 1) / (most - 1))] for k in range(most)]


def _default_parameters(graph: CurvatureGraph, model: nn.Module) -> list[Point]:
    chosen = _Chooser(graph, model).choose(tail=True)
    names = [name for name in chosen if _members(graph, model, name)]
    if len(names) < 2:
        names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
        names = [name for name in names if _members(graph, model, name)] or list(graph.parameters)  # of a bare module
    return [_parameter(graph, name, _members(graph, model, name)) for name in _spread(names, MOST)]


def default_points(graph: CurvatureGraph, model: nn.Module, space: str = "activation") -> tuple[Point, ...]:
    """At most 16 informative points: stem and stages of a ResNet, blocks of a Transformer, activations of an MLP.

    Raises:
        PointError: the model has no differentiable module output (or parameter) on a path to the loss.
    """
    choose("space", space, SPACES)
    if space == "parameter":
        points = _default_parameters(graph, model)
    else:
        chooser = _Chooser(graph, model)
        outputs = [name for name in graph.taps if name.split(".")[0] == "output"]
        names = [name for name in chooser.choose() if name in chooser.sites] or list(chooser.sites) or outputs
        reaching = _reach_loss(graph)
        calls = [
            (name if len(graph.taps[name]) == 1 else f"{name}[{k}]", site)
            for name in names
            for k, site in enumerate(graph.taps[name])
            if reaching[site]
        ]
        calls = list({site: (name, site) for name, site in calls}.values())
        kept = _spread([name for name, _ in calls], MOST)
        points = [_activation(graph, name, [site]) for name, site in calls if name in kept]
    if not points:
        raise PointError("no module output lies on a path to the loss: name points=, or tap() tensors.")
    return _in_order(graph, points)
