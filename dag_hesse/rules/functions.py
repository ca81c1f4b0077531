"""The usual elementwise ops: one row each, first and second derivative side by side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node
from dag_hesse.kernels.elementwise import Coefficient, Gate
from dag_hesse.rules.base import Call, Pairs, Rule
from dag_hesse.rules.elementwise import binary, elementwise, piecewise_linear, smooth, smooth_jointly

_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


def _x(c: Call) -> Tensor:
    return c.values[0]


def _mask(condition: Tensor, like: Tensor) -> Tensor:
    return condition.to(like.dtype)


def _between(x: Tensor, low: Any, high: Any, *, closed: bool) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = inside & ((x >= low) if closed else (x > low))
    if high is not None:
        inside = inside & ((x <= high) if closed else (x < high))
    return _mask(inside, x)


# gelu(x) = x Φ(x); tanh form: x s(u), s = (1 + tanh u)/2, u = k (x + a x³)
_K, _A = math.sqrt(2 / math.pi), 0.044715


def _gelu(c: Call) -> tuple[Tensor, Tensor]:
    x = _x(c)
    if c.argument(1, "approximate", "none") == "tanh":
        t, du = torch.tanh(_K * (x + _A * x**3)), _K * (1 + 3 * _A * x * x)
        dt = (1 - t * t) * du
        return 0.5 * (1 + t) + 0.5 * x * dt, dt + 0.5 * x * (6 * _K * _A * x * (1 - t * t) - 2 * t * dt * du)
    square = x * x
    twice = torch.mul(square, -0.5).exp_().mul_(2 * _INV_SQRT_2PI)  # the normal density
    second = torch.addcmul(twice, square, twice, value=-0.5, out=square)
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x), second


def _softplus_d1(c: Call) -> Tensor:
    x, beta, threshold = _x(c), c.argument(1, "beta", 1), c.argument(2, "threshold", 20)
    return torch.where(x * beta > threshold, torch.ones_like(x), torch.sigmoid(beta * x))


def _softplus_d2(c: Call) -> Tensor:
    x, beta, threshold = _x(c), c.argument(1, "beta", 1), c.argument(2, "threshold", 20)
    s = torch.sigmoid(beta * x)
    return torch.where(x * beta >= threshold, torch.zeros_like(x), beta * s * (1 - s))  # as autograd at the seam


def _elu_scales(c: Call) -> tuple[float, float, float]:
    """(negative coefficient, positive slope, negative rate) of scale·(x if x > 0 else alpha (exp(rate x) - 1))."""
    if c.node.op.startswith("aten.selu"):
        return _SELU_ALPHA * _SELU_SCALE, _SELU_SCALE, 1.0
    if c.node.op.startswith("aten.celu"):
        alpha = c.argument(1, "alpha", 1.0)
        return alpha, 1.0, 1.0 / alpha
    alpha, scale, rate = c.argument(1, "alpha", 1.0), c.argument(2, "scale", 1.0), c.argument(3, "input_scale", 1.0)
    return alpha * scale, scale, rate


def _elu_d1(c: Call) -> Tensor:
    x, (negative, positive, rate) = _x(c), _elu_scales(c)
    return torch.where(x > 0, torch.full_like(x, positive), negative * rate * torch.exp(rate * x.clamp(max=0)))


def _elu_d2(c: Call) -> Tensor:
    x, (negative, _, rate) = _x(c), _elu_scales(c)
    return torch.where(x < 0, negative * rate * rate * torch.exp(rate * x.clamp(max=0)), torch.zeros_like(x))


def _silu(c: Call) -> tuple[Tensor, Tensor]:
    """y = x s: y' = s + y (1 − s), y'' = (1 − s)(2 y' − y)."""
    s, one = torch.sigmoid(_x(c)), torch.ones((), dtype=c.value.dtype, device=c.value.device)
    first = torch.lerp(c.value, one, s)
    return first, torch.sub(c.value, first, alpha=2).mul_(s.sub_(1))


def _mish_d1(c: Call) -> Tensor:
    x = _x(c)
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    return t + x * (1 - t * t) * s


def _mish_d2(c: Call) -> Tensor:
    x = _x(c)
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    dt = (1 - t * t) * s
    return 2 * dt + x * dt * (1 - s - 2 * t * s)


def _hardswish_d1(c: Call) -> Tensor:
    x = _x(c)
    return torch.where(x <= -3, torch.zeros_like(x), torch.where(x < 3, x / 3 + 0.5, torch.ones_like(x)))


def _sigmoid(c: Call) -> tuple[Tensor, Tensor]:
    first = torch.addcmul(c.value, c.value, c.value, value=-1)
    return first, first * (1 - 2 * c.value)


def _tanh(c: Call) -> tuple[Tensor, Tensor]:
    first = 1 - c.value * c.value
    return first, (first * c.value).mul_(-2)


def _power_partials(c: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
    x, p = _x(c), c.argument(1, "exponent")
    if p == 2:  # the common ones need no transcendental function
        return {0: 2 * x}, {(0, 0): torch.full_like(x, 2.0)}
    if p == 3:
        return {0: (x * x).mul_(3)}, {(0, 0): 6 * x}
    first = p * x ** (p - 1) if p != 0 else torch.zeros_like(x)
    return {0: first}, ({(0, 0): p * (p - 1) * x ** (p - 2)} if p not in (0, 1) else {})


def _power_pairs(node: Node) -> Pairs:
    return frozenset() if node.args[1] in (0, 1) else frozenset({(0, 0)})


def _constant(value: float, *, linear: bool = False) -> Rule:
    return piecewise_linear(lambda c: value, linear=linear)


def _scalar_multiple(sign: int) -> Rule:
    """x times (or over) the number in argument 1."""
    return piecewise_linear(lambda c: float(c.argument(1, "other")) ** sign, linear=True)


SMOOTH: dict[str, Rule] = {
    "aten.exp.default": smooth(lambda c: c.value, lambda c: c.value),
    "aten.exp2.default": smooth(lambda c: math.log(2) * c.value, lambda c: math.log(2) ** 2 * c.value),
    "aten.expm1.default": smooth(lambda c: c.value + 1, lambda c: c.value + 1),
    "aten.log.default": smooth(lambda c: 1 / _x(c), lambda c: -1 / _x(c) ** 2),
    "aten.log2.default": smooth(lambda c: 1 / (_x(c) * math.log(2)), lambda c: -1 / (_x(c) ** 2 * math.log(2))),
    "aten.log10.default": smooth(lambda c: 1 / (_x(c) * math.log(10)), lambda c: -1 / (_x(c) ** 2 * math.log(10))),
    "aten.log1p.default": smooth(lambda c: 1 / (1 + _x(c)), lambda c: -1 / (1 + _x(c)) ** 2),
    "aten.sqrt.default": smooth(lambda c: 0.5 / c.value, lambda c: -0.25 / c.value**3),
    "aten.rsqrt.default": smooth(lambda c: -0.5 * c.value**3, lambda c: 0.75 * c.value**5),
    "aten.reciprocal.default": smooth(lambda c: -(c.value**2), lambda c: 2 * c.value**3),
    "aten.sin.default": smooth(lambda c: torch.cos(_x(c)), lambda c: -c.value),
    "aten.cos.default": smooth(lambda c: -torch.sin(_x(c)), lambda c: -c.value),
    "aten.tan.default": smooth(lambda c: 1 + c.value**2, lambda c: 2 * c.value * (1 + c.value**2)),
    "aten.sinh.default": smooth(lambda c: torch.cosh(_x(c)), lambda c: c.value),
    "aten.cosh.default": smooth(lambda c: torch.sinh(_x(c)), lambda c: c.value),
    "aten.tanh.default": smooth_jointly(_tanh),
    "aten.atan.default": smooth(lambda c: 1 / (1 + _x(c) ** 2), lambda c: -2 * _x(c) / (1 + _x(c) ** 2) ** 2),
    "aten.asin.default": smooth(lambda c: (1 - _x(c) ** 2) ** -0.5, lambda c: _x(c) * (1 - _x(c) ** 2) ** -1.5),
    "aten.acos.default": smooth(lambda c: -((1 - _x(c) ** 2) ** -0.5), lambda c: -_x(c) * (1 - _x(c) ** 2) ** -1.5),
    "aten.sigmoid.default": smooth_jointly(_sigmoid),
    "aten.log_sigmoid_forward.default": smooth(
        lambda c: torch.sigmoid(-_x(c)), lambda c: -torch.sigmoid(_x(c)) * torch.sigmoid(-_x(c))
    ),
    "aten.erf.default": smooth(
        lambda c: 2 / math.sqrt(math.pi) * torch.exp(-(_x(c) ** 2)),
        lambda c: -4 / math.sqrt(math.pi) * _x(c) * torch.exp(-(_x(c) ** 2)),
    ),
    "aten.silu.default": smooth_jointly(_silu),
    "aten.gelu.default": smooth_jointly(_gelu),
    "aten.softplus.default": smooth(_softplus_d1, _softplus_d2),
    "aten.elu.default": smooth(_elu_d1, _elu_d2),
    "aten.selu.default": smooth(_elu_d1, _elu_d2),
    "aten.celu.default": smooth(_elu_d1, _elu_d2),
    "aten.mish.default": smooth(_mish_d1, _mish_d2),
    "aten.hardswish.default": smooth(_hardswish_d1, lambda c: _between(_x(c), -3, 3, closed=False) / 3),
    "aten.pow.Tensor_Scalar": elementwise(Kind.SMOOTH, _power_partials, _power_pairs),
}

PIECEWISE: dict[str, Rule] = {
    "aten.relu.default": piecewise_linear(lambda c: Gate(c.value)),
    "aten.relu6.default": piecewise_linear(lambda c: _between(_x(c), 0, 6, closed=False)),
    "aten.leaky_relu.default": piecewise_linear(
        lambda c: torch.where(_x(c) > 0, torch.ones_like(c.value), c.argument(1, "negative_slope", 0.01))
    ),
    "aten.abs.default": piecewise_linear(lambda c: torch.sign(_x(c))),
    "aten.hardtanh.default": piecewise_linear(
        lambda c: _between(_x(c), c.argument(1, "min_val", -1.0), c.argument(2, "max_val", 1.0), closed=False)
    ),
    "aten.hardsigmoid.default": piecewise_linear(lambda c: _between(_x(c), -3, 3, closed=False) / 6),
    "aten.clamp.default": piecewise_linear(
        lambda c: _between(_x(c), c.argument(1, "min"), c.argument(2, "max"), closed=True)
    ),
    "aten.clamp_min.default": piecewise_linear(lambda c: _between(_x(c), c.argument(1, "min"), None, closed=True)),
    "aten.clamp_max.default": piecewise_linear(lambda c: _between(_x(c), None, c.argument(1, "max"), closed=True)),
    "aten.threshold.default": piecewise_linear(lambda c: _mask(_x(c) > c.argument(1, "threshold"), c.value)),
    "aten.neg.default": _constant(-1.0, linear=True),
    "aten.mul.Scalar": _scalar_multiple(1),
    "aten.div.Scalar": _scalar_multiple(-1),
    "aten.add.Scalar": _constant(1.0, linear=True),
    "aten.sub.Scalar": _constant(1.0, linear=True),
    # Constant almost everywhere: autograd gives them a zero derivative, and so do we.
    "aten.sign.default": _constant(0.0),
    "aten.floor.default": _constant(0.0),
    "aten.ceil.default": _constant(0.0),
    "aten.round.default": _constant(0.0),
    "aten.trunc.default": _constant(0.0),
}


def _chosen(choose_first: Any) -> tuple[Any, Any]:
    """Partials of minimum/maximum: 1 where the operand is chosen, ½ at ties (as autograd does)."""

    def share(a: Any, b: Any, y: Tensor) -> Tensor:
        return _mask(choose_first(a, b), y) + 0.5 * _mask(torch.eq(a, b), y)

    return share, lambda a, b, y: 1 - share(a, b, y)


def _one(a: Any, b: Any, y: Tensor) -> float:
    return 1.0


def _scaled_sum(sign: float) -> Rule:
    """a ± alpha·b."""

    def partials(c: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
        slots = (c.slot(0), c.slot(1))
        scales = (1.0, sign * float(c.node.kwargs.get("alpha", 1)))
        return {slot: k for slot, k in zip(slots, scales, strict=True) if slot is not None}, {}

    return elementwise(Kind.PIECEWISE_LINEAR, partials, lambda node: frozenset(), linear=True)


def _where(c: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
    condition, first = c.argument(0), dict[int, Coefficient]()
    for position, picked in ((1, condition), (2, ~condition)):
        slot = c.slot(position)
        if slot is not None and c.active[slot]:
            first[slot] = _mask(picked, c.value)
    return first, {}


def _masked_fill(c: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
    mask, first = c.argument(1), dict[int, Coefficient]()
    slot, value_slot = c.slot(0), c.slot(2)
    if slot is not None:
        first[slot] = _mask(~mask, c.value)
    if value_slot is not None:
        first[value_slot] = _mask(mask, c.value)
    return first, {}


def _tensor_clamp(c: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
    x, low, high = c.argument(0), c.argument(1, "min"), c.argument(2, "max")
    below = x < low if low is not None else torch.zeros_like(x, dtype=torch.bool)
    above = x > high if high is not None else torch.zeros_like(x, dtype=torch.bool)
    if low is not None and high is not None:
        below = below & (low < high)  # where low ≥ high the result is high
        above = above | (low >= high)
    shares = (~(below | above), below & ~above, above)
    return {s: _mask(m, c.value) for p, m in enumerate(shares) if (s := c.slot(p)) is not None}, {}


_maximum_a, _maximum_b = _chosen(torch.gt)
_minimum_a, _minimum_b = _chosen(torch.lt)


def _power(a: Tensor, b: Tensor, order: int) -> Tensor:
    """The derivative of a^b in a of that order: 0 where a factor before the power is, whatever the power."""
    factor = b if order == 1 else b * (b - 1)
    return torch.where(factor == 0, 0.0, factor * a ** (b - order))


def _mixed_power(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return a ** (b - 1) + _power(a, b, 1) * _log(a, b - 1, y)


def _log(a: Any, b: Tensor, y: Tensor) -> Tensor:
    """log a; 0 at a = 0 where a^b log a is taken for 0, as autograd does."""
    a = a if isinstance(a, Tensor) else torch.as_tensor(a, dtype=y.dtype, device=y.device)
    return torch.where((a == 0) & (b >= 0), 0.0, torch.log(a))


def _reciprocal(b: Any) -> Any:
    """1/b; of a number that is 0 infinite, as of a tensor."""
    return 1 / b if isinstance(b, Tensor) or b else math.copysign(math.inf, b)


BINARY: dict[str, Rule] = {
    "aten.add.Tensor": _scaled_sum(1.0),
    "aten.sub.Tensor": _scaled_sum(-1.0),
    "aten.mul.Tensor": binary(lambda a, b, y: b, lambda a, b, y: a, dab=_one),
    "aten.div.Tensor": binary(
        lambda a, b, y: _reciprocal(b),
        lambda a, b, y: -y / b,
        dab=lambda a, b, y: -1 / (b * b),
        dbb=lambda a, b, y: 2 * y / (b * b),
    ),
    "aten.pow.Tensor_Tensor": binary(
        lambda a, b, y: _power(a, b, 1),
        lambda a, b, y: y * _log(a, b, y),
        daa=lambda a, b, y: _power(a, b, 2),
        dab=_mixed_power,
        dbb=lambda a, b, y: y * _log(a, b, y) ** 2,
    ),
    "aten.pow.Scalar": binary(_one, lambda a, b, y: y * _log(a, b, y), dbb=lambda a, b, y: y * _log(a, b, y) ** 2),
    "aten.maximum.default": binary(_maximum_a, _maximum_b, kind=Kind.PIECEWISE_LINEAR),
    "aten.minimum.default": binary(_minimum_a, _minimum_b, kind=Kind.PIECEWISE_LINEAR),
    "aten.where.self": elementwise(Kind.PIECEWISE_LINEAR, _where, lambda node: frozenset()),
    "aten.masked_fill.Scalar": elementwise(Kind.PIECEWISE_LINEAR, _masked_fill, lambda node: frozenset()),
    "aten.masked_fill.Tensor": elementwise(Kind.PIECEWISE_LINEAR, _masked_fill, lambda node: frozenset()),
    "aten.clamp.Tensor": elementwise(Kind.PIECEWISE_LINEAR, _tensor_clamp, lambda node: frozenset()),
}

TABLE: dict[str, Rule] = {**SMOOTH, **PIECEWISE, **BINARY}

__all__ = ["TABLE"]
