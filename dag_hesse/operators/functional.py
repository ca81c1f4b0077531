"""What users of other curvature tools pass as a model: modules, or callables of (parameters, inputs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dag_hesse.capture import parameter_points, unwrapped
from dag_hesse.errors import OptionError, suggest
from dag_hesse.ir import CurvatureGraph, Point


class FunctionModule(nn.Module):
    """A callable of (parameters, inputs) as a module; the parameters keep their container's form."""

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        super().__init__()
        self.function, self.keyed = function, isinstance(params, Mapping)
        items = params.items() if isinstance(params, Mapping) else ((str(k), p) for k, p in enumerate(params))
        self.table: dict[str, str] = {}
        for key, value in items:
            name = key.replace(".", "__")
            self.table[key] = name
            own = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            self.register_parameter(name, own)

    @property
    def keys(self) -> dict[str, str]:
        """The user's key of every parameter name."""
        return {name: key for key, name in self.table.items()}

    def forward(self, *inputs: Any, **options: Any) -> Any:
        values = {key: getattr(self, name) for key, name in self.table.items()}
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
            f"model is a {type(model).__name__}; expected a torch.nn.Module, or a callable of (params, inputs) with "
            "params= given."
        )
    return FunctionModule(model, params), None


def chosen_parameters(model: nn.Module, params: Any, param_filter: Any) -> list[str]:
    """Names of ``params``, or of all that require gradients; thinned by ``param_filter``.

    Raises:
        OptionError: ``params`` names or holds a stranger, or nothing is left.
    """
    named = dict(model.named_parameters())
    if params is not None:
        chosen = _own(named, params)
    else:
        chosen = [name for name in named if named[name].requires_grad and named[name].is_floating_point()]
    if param_filter is not None:
        chosen = [name for name in chosen if _passes(param_filter, name, named[name])]
    if not chosen:
        raise OptionError(f"no parameter is left to differentiate by. {suggest(str(param_filter or ''), named)}")
    return chosen


def read_parameters(chosen: Sequence[str], model: nn.Module, graph: CurvatureGraph) -> tuple[Point, ...]:
    """The chosen parameters as points; the blocks of those that the loss does not read are zero.

    Raises:
        OptionError: it reads none.
    """
    alive = graph.ancestors([graph.loss])
    if not any(name in graph.parameters and alive[graph.parameters[name]] for name in chosen):
        raise OptionError(f"no parameter is left to differentiate by: the loss reads none of {list(chosen)[:4]}.")
    return parameter_points(chosen, model, graph)


def _own(named: Mapping[str, nn.Parameter], params: Any) -> list[str]:
    names = {id(p): name for name, p in named.items()}
    found = []
    for p in params:
        name = p if isinstance(p, str) else names.get(id(p), "")
        if name not in named:
            what = repr(p) if isinstance(p, str) else f"a tensor of shape {tuple(p.shape)}"
            raise OptionError(f"params holds {what}, which is not a parameter of the model. {suggest(name, named)}")
        found.append(name)
    return found


def _passes(wanted: Any, name: str, parameter: nn.Parameter) -> bool:
    if callable(wanted):
        return bool(wanted(name, parameter))
    return any(fnmatchcase(name, glob) for glob in ([wanted] if isinstance(wanted, str) else wanted))
