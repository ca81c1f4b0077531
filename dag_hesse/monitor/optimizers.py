"""What an optimizer makes of curvature: its preconditioner P, and the largest step it is stable at.

On a quadratic loss with Hessian H, the steps of an optimizer with learning rate η and a fixed preconditioner P shrink
where η λ_max(P⁻¹H) is below an edge, and grow above it: 2 for gradient descent, (2 + 2β₁)/(1 − β₁) for Adam (Cohen et
al., 2022, "Adaptive gradient methods at the edge of stability"; 38 at β₁ = 0.9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dag_hesse.errors import OptionError, kind_of

Settings = Mapping[str, Any]  # a group's, or a parameter's state


class Rule(NamedTuple):
    """What is known of an optimizer.

    Attributes:
        edge: from a group's settings, the largest η λ_max(P⁻¹H) at which it is stable.
        scale: from a group's settings and a parameter's state, P's diagonal; None: P is the identity.
    """

    edge: Callable[[Settings], float]
    scale: Callable[[Settings, Settings], Tensor] | None = None


def _sgd(group: Settings) -> float:
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return (2 + 2 * momentum) / (1 + 2 * momentum)
    return (2 + 2 * momentum) / (1 - float(group["dampening"])) if momentum else 2.0


def _adam(group: Settings) -> float:
    beta = float(group["betas"][0])
    return (2 + 2 * beta) / (1 - beta)


def _moments(group: Settings, state: Settings) -> Tensor:
    """(1 − β₁ᵗ) (√(v / (1 − β₂ᵗ)) + ε): both bias corrections are in it."""
    (first, second), count = map(float, group["betas"]), float(state["step"])
    squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    root: Tensor = (squares.double() / (1 - second**count)).sqrt()
    return (root + float(group["eps"])) * (1 - first**count)


RULES: dict[type, Rule] = {
    torch.optim.SGD: Rule(_sgd),
    torch.optim.Adam: Rule(_adam, _moments),
    torch.optim.AdamW: Rule(_adam, _moments),
}


def bare(optimizer: Any) -> Any:
    """The optimizer that others (accelerate's, Lightning's) have wrapped.

    Raises:
        OptionError: it is none.
    """
    while hasattr(inner := getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = inner
    if not hasattr(optimizer, "param_groups") or not isinstance(getattr(optimizer, "state", None), Mapping):
        raise OptionError(f"optimizer is {kind_of(optimizer)}; expected a torch.optim.Optimizer, or None.")
    return optimizer


def rule(optimizer: Any) -> Rule | None:
    """What is known of it: nothing of classes that are not in :data:`RULES`, or where it climbs."""
    if optimizer is None or any(group.get("maximize") for group in optimizer.param_groups):
        return None
    return RULES.get(type(optimizer))


def preconditioner(optimizer: Any, parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Per parameter, P's diagonal in float64; None before the optimizer has made a step with each of them."""
    known, groups = rule(optimizer), _groups(optimizer)
    states = [optimizer.state.get(p) for p in parameters]  # by get(): the state is a defaultdict
    if known is None or known.scale is None or not all(states):
        return None
    return [known.scale(groups[id(p)], state) for p, state in zip(parameters, states, strict=True)]


def rates(optimizer: Any, parameters: Sequence[Tensor]) -> list[float]:
    """Per parameter, its learning rate over the edge: times λ_max(P⁻¹H), 1 is the edge of stability."""
    known, groups = rule(optimizer), _groups(optimizer)
    assert known is not None
    return [float(groups[id(p)]["lr"]) / known.edge(groups[id(p)]) for p in parameters]


def _groups(optimizer: Any) -> dict[int, Settings]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}
