"""Which points where none are named: blocks, stages or activations of the module tree, and what is tapped."""

from __future__ import annotations

from torch import nn

from dag_hesse._capture.points import SPACES, activation_point, in_order, members_of, parameter_point, reach_loss
from dag_hesse.errors import PointError, choose
from dag_hesse.ir import CurvatureGraph, Point

MOST = 16


class _Chooser:
    """Walks the module tree for the places a reader would name: blocks, stages, or activations."""

    def __init__(self, graph: CurvatureGraph, model: nn.Module) -> None:
        self.graph, self.modules = graph, dict(model.named_modules())
        self.own = {id(module): name for name, module in self.modules.items()}  # of several names, the first
        reaching, from_out = reach_loss(graph), graph.descendants(graph.out)
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
    names = [name for name in chosen if members_of(graph, model, name)]
    if len(names) < 2:
        names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
        names = [name for name in names if members_of(graph, model, name)] or list(graph.parameters)  # of a bare module
    return [parameter_point(graph, name, members_of(graph, model, name)) for name in _spread(names, MOST)]


def default_points(graph: CurvatureGraph, model: nn.Module, space: str = "activation") -> tuple[Point, ...]:
    """At most 16 informative points: stem and stages of a ResNet, blocks of a Transformer, activations of an MLP.

    What the user has tapped is among them, if need be in place of some of these.

    Raises:
        PointError: the model has no differentiable module output (or parameter) on a path to the loss.
    """
    choose("space", space, SPACES)
    if space == "parameter":
        points = _default_parameters(graph, model)
    else:
        chooser = _Chooser(graph, model)
        outputs = [name for name in graph.taps if name.split(".")[0] == "output"]
        reaching, from_out = reach_loss(graph), graph.descendants(graph.out)
        taken = (*chooser.modules, *graph.modules)
        own = [
            name
            for name, sites in graph.taps.items()
            if name not in outputs and name.split(":")[0] not in taken and not any(from_out[s] for s in sites)
        ]  # the user's taps
        names = [name for name in chooser.choose() if name in chooser.sites] or (list(chooser.sites) if not own else [])
        names = [*names, *own] or outputs
        calls = [
            (name if len(graph.taps[name]) == 1 else f"{name}[{k}]", site)
            for name in names
            for k, site in enumerate(graph.taps[name])
            if reaching[site]
        ]
        calls = list({site: (name, site) for name, site in calls}.values())
        tapped = [name for name, _ in calls if name.partition("[")[0] in own or name in own]
        rest = [name for name, _ in calls if name not in tapped]
        kept = {*_spread(rest, max(2, MOST - len(tapped))), *_spread(tapped, MOST)}
        points = [activation_point(graph, name, [site]) for name, site in calls if name in kept]
    if not points:
        raise PointError("no module output lies on a path to the loss: name points=, or tap() tensors.")
    return in_order(graph, points)
