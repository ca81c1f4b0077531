"""What users of other curvature tools pass as a model: modules, or callables of (parameters, inputs)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dag_hesse._capture import parameter_points, unwrapped
from dag_hesse.errors import OptionError, PointError, kind_of, several, suggest, takes
from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.names import places_of, wider


class FunctionModule(nn.Module):
    """A callable of (parameters, inputs) as a module; the parameters keep their container's form, and their names.

    Names of a module's attributes are not free (no dots, none that the class has), so :meth:`named_parameters` gives
    the user's. Every entry is a parameter of its own, also where the same tensor stands under two names.
    """

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        super().__init__()
        self.function, self.keyed = function, isinstance(params, Mapping)
        items = params.items() if isinstance(params, Mapping) else ((str(k), p) for k, p in enumerate(params))
        self.user_keys: dict[str, str] = {}  # by attribute
        seen = set[int]()
        for number, (key, value) in enumerate(items):
            if not isinstance(key, str) or not isinstance(value, Tensor) or not value.is_floating_point():
                raise OptionError(
                    f"params[{key!r}] is {kind_of(value)}; expected floating-point tensors under names (a flat "
                    "dict), or a list of them."
                )
            self.user_keys[f"p{number}"] = key
            known = isinstance(value, nn.Parameter) and id(value) not in seen
            seen.add(id(value))
            self.register_parameter(f"p{number}", value if known else nn.Parameter(value.detach()))  # type: ignore[arg-type]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the user's names."""
        for attribute, key in self.user_keys.items():
            yield (f"{prefix}.{key}" if prefix else key), getattr(self, attribute)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        values = {key: getattr(self, name) for name, key in self.user_keys.items()}
        return self.function(values if self.keyed else list(values.values()), *inputs, **options)


def as_module(model: Any, params: Any) -> tuple[nn.Module, Any]:
    """The module to capture, and what is left of ``params``.

    Raises:
        OptionError: the model is neither a module nor a callable with ``params``.
    """
    if isinstance(model, nn.Module):
        return unwrapped(model), params
    if not callable(model) or params is None:
        raise OptionError(
            f"model is {kind_of(model)}; expected a torch.nn.Module, or a callable of (params, inputs) with "
            "params= given."
        )
    if isinstance(params, (Tensor, str)) or not isinstance(params, (Mapping, Sequence)):
        raise OptionError(f"params is {kind_of(params)}; expected a dict or a list of tensors.")
    return FunctionModule(model, params), None


def chosen_parameters(model: nn.Module, params: Any, param_filter: Any) -> list[str]:
    """Names of ``params``, or of all that require gradients; thinned by ``param_filter``.

    Raises:
        OptionError: ``params`` or ``param_filter`` have another type than they may have.
        PointError: ``params`` names or holds a stranger, or nothing is left.
    """
    named = dict(model.named_parameters())
    first = {id(p): name for name, p in named.items()}
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}  # a tied one has several
    if params is not None:
        chosen = _own(named, names, params)
    else:
        chosen = [name for name, p in named.items() if p.requires_grad]
    if param_filter is not None:
        chosen = _passing(param_filter, chosen, named, names)
    if not chosen:
        raise PointError(f"no parameter is left to differentiate by. {suggest(str(param_filter or ''), named)}")
    return chosen


def read_parameters(chosen: Sequence[str], model: nn.Module, graph: CurvatureGraph) -> tuple[Point, ...]:
    """The chosen parameters as points; the blocks of those that the loss does not depend on are zero.

    Raises:
        PointError: it depends on none.
    """
    reaching = graph.ancestors([graph.loss])
    if not any(name in graph.parameters and reaching[graph.parameters[name]] for name in chosen):
        raise PointError(f"no parameter is left to differentiate by: the loss depends on none of {list(chosen)[:4]}.")
    return parameter_points(chosen, model, graph)


def _own(named: Mapping[str, nn.Parameter], names: Mapping[str, str], params: Any) -> list[str]:
    first = {id(p): name for name, p in named.items()}
    found: list[str] = []
    expected = "a list of the model's parameters or names"
    if isinstance(params, (Tensor, str)):
        raise OptionError(f"params is {kind_of(params)}; expected {expected}.")
    for p in several("params", params, expected):
        if not isinstance(p, (str, Tensor)):
            raise OptionError(f"params holds {kind_of(p)}; expected the model's parameters or their names.")
        name = names.get(p, p) if isinstance(p, str) else first.get(id(p), "")
        if name not in named:
            what = repr(p) if isinstance(p, str) else f"a tensor of shape {tuple(p.shape)}"
            raise PointError(f"params holds {what}, which is not a parameter of the model. {suggest(name, named)}")
        if name in found:
            raise OptionError(f"params holds '{name}' twice; expected each parameter once.")
        found.append(name)
    return found


def _passing(
    wanted: Any, chosen: Sequence[str], named: Mapping[str, nn.Parameter], names: Mapping[str, str]
) -> list[str]:
    """The names that a filter leaves, in their order.

    Raises:
        PointError: a glob matches nothing.
    """
    if callable(wanted):
        takes("param_filter", wanted, "name, parameter")
        return [name for name in chosen if wanted(name, named[name])]
    expected = "a glob, globs, or a callable of (name, parameter)"
    globs = [wanted] if isinstance(wanted, str) else several("param_filter", wanted, expected)
    if not all(isinstance(glob, str) for glob in globs):
        raise OptionError(f"param_filter={wanted!r}; expected {expected}.")
    own = [name for name, first in names.items() if first in chosen]
    found = set[str]()
    for glob in globs:
        places = places_of(own, glob)
        if not places:
            wide = wider(glob, own)
            hint = suggest(glob, own) if wide is None else f"* does not cross dots: '{wide}' does."
            raise PointError(f"no parameter is left by param_filter={glob!r}, which matches none. {hint}")
        found.update(names[own[k]] for k in places)
    return [name for name in chosen if name in found]
