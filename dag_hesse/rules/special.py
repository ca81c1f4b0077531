"""Further elementwise ops: special functions, sums of logarithms, remainders, and a logarithm that losses share."""

from __future__ import annotations

import math
from math import factorial
from typing import Any

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind
from dag_hesse.kernels.elementwise import Coefficient
from dag_hesse.rules.base import Call, Rule, own_pair
from dag_hesse.rules.elementwise import binary, elementwise, piecewise_linear, smooth, smooth_jointly

_LIBRARY = torch.library.Library("dag_hesse", "FRAGMENT")
_LIBRARY.define("clamped_log(Tensor x) -> Tensor")
_LIBRARY.impl("clamped_log", lambda x: x.log().clamp(min=-100.0), "CompositeExplicitAutograd")
clamped_log = torch.ops.dag_hesse.clamped_log.default
_LEAST = 1e-12  # of a probability, where binary cross-entropy divides by it


def _x(c: Call) -> Tensor:
    return c.values[0]


def _clamped_log(c: Call) -> tuple[Tensor, Tensor]:
    """log x, at least −100, with the derivatives of binary cross-entropy: those of log, never over less than 1e-12."""
    inverse = 1 / _x(c).clamp(min=_LEAST)
    return inverse, -inverse * inverse


def _erfinv(c: Call) -> tuple[Tensor, Tensor]:
    first = math.sqrt(math.pi) / 2 * torch.exp(c.value * c.value)
    return first, 2 * c.value * first * first


def _erfc(c: Call) -> tuple[Tensor, Tensor]:
    first = -2 / math.sqrt(math.pi) * torch.exp(-_x(c) * _x(c))
    return first, -2 * _x(c) * first


def _erfcx(c: Call) -> tuple[Tensor, Tensor]:
    first = 2 * _x(c) * c.value - 2 / math.sqrt(math.pi)
    return first, 2 * (c.value + _x(c) * first)


def _ndtr(c: Call) -> tuple[Tensor, Tensor]:
    first = torch.exp(-0.5 * _x(c) * _x(c)) / math.sqrt(2 * math.pi)
    return first, -_x(c) * first


def _log_ndtr(c: Call) -> tuple[Tensor, Tensor]:
    """φ/Φ, where e^{x²/2} cancels between the two."""
    first = math.sqrt(2 / math.pi) / torch.special.erfcx(-_x(c) / math.sqrt(2))
    return first, -first * (_x(c) + first)


def _ndtri(c: Call) -> tuple[Tensor, Tensor]:
    first = math.sqrt(2 * math.pi) * torch.exp(0.5 * c.value * c.value)
    return first, c.value * first * first


def _bessel_over_x(x: Tensor, first: Tensor) -> Tensor:
    """I₁(x)/x, ½ at zero."""
    zero = x == 0
    return torch.where(zero, 0.5, first / torch.where(zero, 1.0, x))


def _i0(c: Call) -> tuple[Tensor, Tensor]:
    first = torch.special.i1(_x(c))
    return first, c.value - _bessel_over_x(_x(c), first)


def _i0e(c: Call) -> tuple[Tensor, Tensor]:
    x, sign, i1e = _x(c), torch.sign(_x(c)), torch.special.i1e(_x(c))
    return i1e - sign * c.value, (1 + sign * sign) * c.value - 2 * sign * i1e - _bessel_over_x(x, i1e)


def _i2_over_x(x: Tensor, zeroth: Tensor, ratio: Tensor) -> Tensor:
    """I₂(x)/x = (I₀ − 2 I₁/x)/x; near zero, where that cancels, by its series (scaled as I₀ is, if that is)."""
    near, safe = x.abs() < 1, torch.where(x == 0, 1.0, x)
    series = torch.zeros_like(x)
    for k in range(9, -1, -1):
        series = series * (0.25 * x * x) + 1 / (factorial(k) * factorial(k + 2))
    return torch.where(near, series * x / 4 * (zeroth / torch.special.i0(x)), (zeroth - 2 * ratio) / safe)


def _i1(c: Call) -> tuple[Tensor, Tensor]:
    x = _x(c)
    zeroth, ratio = torch.special.i0(x), _bessel_over_x(x, c.value)
    return zeroth - ratio, c.value - _i2_over_x(x, zeroth, ratio)


def _i1e(c: Call) -> tuple[Tensor, Tensor]:
    x, sign = _x(c), torch.sign(_x(c))
    zeroth, ratio = torch.special.i0e(x), _bessel_over_x(x, c.value)
    first = zeroth - ratio - sign * c.value
    return first, c.value - sign * (zeroth - ratio + first) - _i2_over_x(x, zeroth, ratio)


def _sinc(c: Call) -> tuple[Tensor, Tensor]:
    """sin(u)/u at u = πx: near zero by its series, which does not cancel."""
    u = math.pi * _x(c)
    near, safe = u.abs() < 1, torch.where(u == 0, 1.0, u)
    first = (torch.cos(u) - c.value) / safe
    second = -c.value - 2 * first / safe
    series = [torch.zeros_like(u), torch.zeros_like(u)]
    for k in range(9, 0, -1):
        scale = (-1) ** k / factorial(2 * k + 1)
        series = [series[0] * u * u + scale * 2 * k, series[1] * u * u + scale * 2 * k * (2 * k - 1)]
    return torch.where(near, series[0] * u, first) * math.pi, torch.where(near, series[1], second) * math.pi**2


def _logit(c: Call) -> tuple[Tensor, Tensor]:
    x, eps = _x(c), c.argument(1, "eps")
    first = 1 / (x * (1 - x))
    second = (2 * x - 1) * first * first
    if eps is None:
        return first, second
    inside = (x >= eps) & (x <= 1 - eps)
    return first.where(inside, 0.0), second.where(inside, 0.0)


def _polygamma_partials(c: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
    n, x = c.argument(0), _x(c)
    return {0: torch.polygamma(n + 1, x)}, {(0, 0): torch.polygamma(n + 2, x)}


def _outside(c: Call) -> Tensor:
    limit = c.argument(1, "lambd", 0.5)
    return (_x(c).abs() > limit).to(c.value.dtype)


UNARY: dict[str, Rule] = {
    "dag_hesse.clamped_log.default": smooth_jointly(_clamped_log),
    "aten.erfinv.default": smooth_jointly(_erfinv),
    "aten.erfc.default": smooth_jointly(_erfc),
    "aten.special_erfcx.default": smooth_jointly(_erfcx),
    "aten.special_ndtr.default": smooth_jointly(_ndtr),
    "aten.special_log_ndtr.default": smooth_jointly(_log_ndtr),
    "aten.special_ndtri.default": smooth_jointly(_ndtri),
    "aten.i0.default": smooth_jointly(_i0),
    "aten.special_i0e.default": smooth_jointly(_i0e),
    "aten.special_i1.default": smooth_jointly(_i1),
    "aten.special_i1e.default": smooth_jointly(_i1e),
    "aten.sinc.default": smooth_jointly(_sinc),
    "aten.logit.default": smooth_jointly(_logit),
    "aten.lgamma.default": smooth(lambda c: torch.digamma(_x(c)), lambda c: torch.polygamma(1, _x(c))),
    "aten.digamma.default": smooth(lambda c: torch.polygamma(1, _x(c)), lambda c: torch.polygamma(2, _x(c))),
    "aten.polygamma.default": elementwise(Kind.SMOOTH, _polygamma_partials, own_pair),
    "aten.asinh.default": smooth(lambda c: (_x(c) ** 2 + 1) ** -0.5, lambda c: -_x(c) * (_x(c) ** 2 + 1) ** -1.5),
    "aten.acosh.default": smooth(lambda c: (_x(c) ** 2 - 1) ** -0.5, lambda c: -_x(c) * (_x(c) ** 2 - 1) ** -1.5),
    "aten.atanh.default": smooth(lambda c: 1 / (1 - _x(c) ** 2), lambda c: 2 * _x(c) / (1 - _x(c) ** 2) ** 2),
    "aten.hardshrink.default": piecewise_linear(_outside),
    "aten.softshrink.default": piecewise_linear(_outside),
    "aten.fmod.Scalar": piecewise_linear(lambda c: 1.0),
    "aten.remainder.Scalar": piecewise_linear(lambda c: 1.0),
    "aten.copysign.Scalar": piecewise_linear(lambda c: _sign_kept(c.argument(0), None, c.value)),
    "aten.sgn.default": piecewise_linear(lambda c: 0.0),
    "aten.angle.default": piecewise_linear(lambda c: 0.0),
}


def _sign_kept(a: Any, b: Any, y: Tensor) -> Tensor:
    """∂ copysign(a, b)/∂a: whether a keeps its sign; 0 at a = 0, as autograd does."""
    return torch.sign(a) * torch.sign(y)


def _zero(a: Any, b: Any, y: Tensor) -> float:
    return 0.0


def _one(a: Any, b: Any, y: Tensor) -> float:
    return 1.0


def _share(a: Any, b: Any, y: Tensor) -> Tensor:
    """Of e^a in e^a + e^b; half where the two are equal, infinite ones too."""
    return torch.sigmoid(torch.where(torch.eq(a, b), 0.0, a - b))


def _share_of_2(a: Any, b: Any, y: Tensor) -> Tensor:
    return torch.sigmoid(math.log(2) * torch.where(torch.eq(a, b), 0.0, a - b))


def _log_sum(share: Any, scale: float) -> Rule:
    def second(a: Any, b: Any, y: Tensor) -> Tensor:
        s = share(a, b, y)
        return scale * s * (1 - s)

    return binary(share, lambda a, b, y: share(b, a, y), second, lambda a, b, y: -second(a, b, y), second)


def _tensor(x: Any, y: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=y.dtype, device=y.device)


def _log_if_used(a: Any, b: Any, y: Tensor) -> Tensor:
    """log b; 0 at 0·log 0, as autograd does."""
    a, b = _tensor(a, y), _tensor(b, y)
    return torch.where((a == 0) & (b <= 0), 0.0, torch.log(b))


def _log1p_if_used(a: Any, b: Any, y: Tensor) -> Tensor:
    a, b = _tensor(a, y), _tensor(b, y)
    return torch.where((a == 0) & (b <= -1), 0.0, torch.log1p(b))


_xlogy = binary(_log_if_used, lambda a, b, y: a / b, dab=lambda a, b, y: 1 / b, dbb=lambda a, b, y: -a / (b * b))
_xlog1py = binary(
    _log1p_if_used,
    lambda a, b, y: a / (1 + b),
    dab=lambda a, b, y: 1 / (1 + b),
    dbb=lambda a, b, y: -a / ((1 + b) * (1 + b)),
)


def _quotient(mode: str) -> Any:
    return lambda a, b, y: -torch.div(_tensor(a, y), b, rounding_mode=mode)


def _hypot(of: str) -> Any:
    """Second partials of √(a² + b²)."""
    terms = {"aa": lambda p, q: q * q, "ab": lambda p, q: -p * q, "bb": lambda p, q: p * p}
    return lambda a, b, y: terms[of](a / y, b / y) / y


def _atan2(of: str) -> Any:
    """Partials of the angle, over powers of a² + b²; 0 at the origin, as PyTorch has them."""
    terms = {
        "a": lambda p, q, r: q / r,
        "b": lambda p, q, r: -p / r,
        "aa": lambda p, q, r: -2 * (p / r) * (q / r),
        "ab": lambda p, q, r: (p - q) / r * ((p + q) / r),
        "bb": lambda p, q, r: 2 * (p / r) * (q / r),
    }

    def partial(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        square = a * a + b * b
        return terms[of](a, b, torch.where(square > 0, square, math.inf))

    return partial


BINARY: dict[str, Rule] = {
    "aten.logaddexp.default": _log_sum(_share, 1.0),
    "aten.logaddexp2.default": _log_sum(_share_of_2, math.log(2)),
    **{f"aten.xlogy.{overload}": _xlogy for overload in ("Tensor", "Scalar_Self", "Scalar_Other")},
    **{f"aten.special_xlog1py.{overload}": _xlog1py for overload in ("default", "self_scalar", "other_scalar")},
    "aten.hypot.default": binary(
        lambda a, b, y: a / y, lambda a, b, y: b / y, _hypot("aa"), _hypot("ab"), _hypot("bb")
    ),
    "aten.atan2.default": binary(_atan2("a"), _atan2("b"), _atan2("aa"), _atan2("ab"), _atan2("bb")),
    "aten.fmod.Tensor": binary(_one, _quotient("trunc"), kind=Kind.PIECEWISE_LINEAR),
    "aten.remainder.Tensor": binary(_one, _quotient("floor"), kind=Kind.PIECEWISE_LINEAR),
    "aten.remainder.Scalar_Tensor": binary(_one, _quotient("floor"), kind=Kind.PIECEWISE_LINEAR),
    # as it is used: with a rounding mode; without one it is written as a plain quotient
    "aten.div.Tensor_mode": binary(_zero, _zero, kind=Kind.PIECEWISE_LINEAR),
    "aten.div.Scalar_mode": binary(_zero, _zero, kind=Kind.PIECEWISE_LINEAR),
    "aten.copysign.Tensor": binary(_sign_kept, _zero, kind=Kind.PIECEWISE_LINEAR),
}

TABLE: dict[str, Rule] = {**UNARY, **BINARY}

__all__ = ["TABLE", "clamped_log"]
