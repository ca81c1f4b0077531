"""From torch code to a program: elementwise calls are recorded while the code runs on examples of a few elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dag_hesse.kernels.program.build import Builder, Program, Scalar, Value, narrowed


class Refused(Exception):
    """The code does something that programs have no instruction for."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a name stands for: a number, an operand as it is, or the program's result number ``computed``."""

    number: float | None = None
    operand: int | None = None
    computed: int | None = None


@dataclass(frozen=True)
class NamedProgram:
    """A program, and per name what of it is meant."""

    program: Program
    results: Mapping[Hashable, Result]


_SQRT_HALF, _INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
_K, _A = math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form


def _scaled(b: Builder, x: Scalar, factor: Any) -> Scalar:
    return b.multiply(x, float(factor))


def _power(b: Builder, x: Scalar, exponent: Any) -> Scalar:
    if exponent in (0.5, -0.5):
        root = b.apply("sqrt", x)
        return root if exponent > 0 else b.divide(1.0, root)
    if exponent != int(exponent) or abs(exponent) > 16:
        raise Refused(f"the power {exponent}")
    found: Scalar = 1.0
    for bit in bin(abs(int(exponent)))[2:]:
        found = b.multiply(found, found)
        found = b.multiply(found, x) if bit == "1" else found
    return found if exponent >= 0 else b.divide(1.0, found)


def _normal_cdf(b: Builder, x: Scalar) -> Scalar:
    return b.add(b.multiply(b.apply("erf", b.multiply(x, _SQRT_HALF)), 0.5), 0.5)


def _tanh_of_gelu(b: Builder, x: Scalar) -> tuple[Scalar, Scalar]:
    square = b.multiply(x, x)
    inner = b.multiply(b.multiply(x, b.add(b.multiply(square, _A), 1.0)), _K)
    return b.apply("tanh", inner), b.multiply(b.add(b.multiply(square, 3 * _A), 1.0), _K)


def _gelu(b: Builder, x: Scalar, *, approximate: str = "none") -> Scalar:
    if approximate == "tanh":
        share = b.add(b.multiply(_tanh_of_gelu(b, x)[0], 0.5), 0.5)
    else:
        share = _normal_cdf(b, x)
    return b.multiply(x, share)


def _gelu_backward(b: Builder, g: Scalar, x: Scalar, *, approximate: str = "none") -> Scalar:
    if approximate == "tanh":
        t, inner = _tanh_of_gelu(b, x)
        dt = b.multiply(b.subtract(1.0, b.multiply(t, t)), inner)
        slope = b.add(b.multiply(b.fused(x, dt, t), 0.5), 0.5)
    else:
        density = b.multiply(b.apply("exp", b.multiply(b.multiply(x, x), -0.5)), _INV_SQRT_2PI)
        slope = b.fused(x, density, _normal_cdf(b, x))
    return b.multiply(slope, g)


def _lerp(b: Builder, x: Scalar, end: Scalar, weight: Scalar) -> Scalar:
    return b.fused(b.subtract(end, x), weight, x)


def _where(b: Builder, condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    return b.emit("where", b.dense(condition), b.dense(x), b.dense(y))


def _compare(name: str) -> Callable[..., Scalar]:
    def emit(b: Builder, x: Scalar, y: Scalar) -> Scalar:
        if isinstance(y, Value) or not isinstance(x, Value):
            raise Refused("a comparison of two tensors")
        return b.emit(name, x, number=float(y))

    return emit


def _clamp(b: Builder, x: Scalar, low: Any = None, high: Any = None) -> Scalar:
    for limit, name in ((low, "lt_i"), (high, "gt_i")):
        if isinstance(limit, Value):
            raise Refused("a clamp between tensors")
        if limit is not None:
            x = _where(b, b.emit(name, b.dense(x), number=float(limit)), float(limit), x)
    return x


def _same(b: Builder, x: Scalar, *rest: Any, **options: Any) -> Scalar:
    return x


def _constant(value: float) -> Callable[..., Scalar]:
    return lambda b, *shape, **options: value


def _applied(name: str) -> Callable[..., Scalar]:
    return lambda b, x: b.apply(name, x)


# ATen's name -> instructions. Masks are 0 and 1.
_EMITTERS: Mapping[str, Callable[..., Scalar]] = {
    "add": lambda b, x, y, alpha=1: b.add(x, _scaled(b, y, alpha)),
    "sub": lambda b, x, y, alpha=1: b.subtract(x, _scaled(b, y, alpha)),
    "rsub": lambda b, x, y, alpha=1: b.subtract(y, _scaled(b, x, alpha)),
    "mul": lambda b, x, y: b.multiply(x, y),
    "div": lambda b, x, y: b.divide(x, y),
    "neg": lambda b, x: b.multiply(x, -1.0),
    "reciprocal": lambda b, x: b.divide(1.0, x),
    "rsqrt": lambda b, x: b.divide(1.0, b.apply("sqrt", x)),
    "addcmul": lambda b, x, y, z, value=1: b.fused(_scaled(b, y, value), z, x),
    "lerp": _lerp,
    "pow": _power,
    "exp": _applied("exp"),
    "log": _applied("log"),
    "sqrt": _applied("sqrt"),
    "tanh": _applied("tanh"),
    "sigmoid": _applied("sigmoid"),
    "erf": _applied("erf"),
    "abs": _applied("abs"),
    "silu": lambda b, x: b.multiply(x, b.apply("sigmoid", x)),
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "where": _where,
    "clamp": _clamp,
    "relu": lambda b, x: _clamp(b, x, 0.0),
    "hardtanh": lambda b, x, low=-1.0, high=1.0: _clamp(b, x, low, high),
    "gt": _compare("gt_i"),
    "ge": _compare("ge_i"),
    "lt": _compare("lt_i"),
    "le": _compare("le_i"),
    "bitwise_not": lambda b, x: b.subtract(1.0, x),
    "bitwise_and": lambda b, x, y: b.multiply(x, y),
    "logical_not": lambda b, x: b.subtract(1.0, x),
    "_to_copy": _same,
    "clone": _same,
    "detach": _same,
    "alias": _same,
    "ones": _constant(1.0),
    "zeros": _constant(0.0),
    "full": lambda b, shape, value, **options: float(value),
    "scalar_tensor": lambda b, value, **options: float(value),
    "ones_like": _constant(1.0),
    "zeros_like": _constant(0.0),
    "full_like": lambda b, x, value, **options: float(value),
}

# What makes masks of masks, or of comparisons; anything else that returns truth values means more than 0 and 1.
_MASKS = {"gt", "ge", "lt", "le", "bitwise_not", "bitwise_and", "logical_not", "ones_like", "clone", "detach", "alias"}


class _Recorder(TorchDispatchMode):
    """Follows which value of the program every tensor holds."""

    def __init__(self, examples: Sequence[Tensor], shape: torch.Size, joined: bool) -> None:
        super().__init__()
        self.shape = shape
        self.builder, self.dtype = Builder(len(examples), joined), examples[0].dtype
        self.held: dict[int, tuple[Tensor, Scalar]] = {}  # by identity; the tensor is kept, so that it stays unique
        for k, x in enumerate(examples):
            self.hold(x, self.builder.operand(k))

    def hold(self, x: Tensor, value: Scalar) -> None:
        self.held[id(x)] = (x, value)

    def value(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self.held:
            raise Refused("a tensor that is no operand")
        return self.held[id(x)][1]

    def of_rows(self, name: str, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Scalar:
        """A sum or mean over whole rows, which stays broadcastable."""
        axes = len(dims or range(x.ndim))
        last = sorted(d % x.ndim for d in dims) if dims and x.ndim else []
        if not keepdim or last != list(range(x.ndim - axes, x.ndim)) or x.shape[-axes:] != self.shape[-axes:]:
            raise Refused("a sum that is not over the last axes, or that drops them")
        if self.builder.row_axes not in (0, axes):
            raise Refused("sums over rows of two kinds")
        return self.builder.emit(name, self.builder.dense(self.value(x)), number=float(axes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, targets = func._schema.name.split("::")[1], [kwargs[k] for k in ("out", "grad_input") if k in kwargs]
        if name.endswith("_") and not name.startswith("_"):
            name, targets = name[:-1], [args[0]]
        options = {k: self.value(v) for k, v in kwargs.items() if k not in ("out", "grad_input")}
        try:
            if name in ("sum", "mean"):
                value: Scalar = self.of_rows(f"row_{name}", *args, **options)
            elif name in _EMITTERS:
                value = _EMITTERS[name](self.builder, *(self.value(x) for x in args), **options)
            else:
                raise Refused(f"the op {func}")
        except TypeError as error:
            raise Refused(f"the op {func} with these arguments") from error
        found = func(*args, **kwargs)
        if found.dtype is not self.dtype and not (found.dtype is torch.bool and name in _MASKS):
            raise Refused(f"{func} with values of dtype {found.dtype}")
        self.hold(targets[0] if targets else found, value)
        return found


def _example(x: Tensor) -> Tensor:
    """A tensor that broadcasts as ``x`` does."""
    return torch.full([min(size, 2) for size in x.shape], 0.5, dtype=x.dtype, device=x.device)


def record(
    code: Callable[..., Mapping[Hashable, Any]], operands: Sequence[Tensor], like: Tensor, joined: bool = False
) -> NamedProgram:
    """Record ``code(*operands)``, which returns tensors of the shape of ``like``, operands and numbers by name.

    Where it sums over the last axes, results may be one number a row. ``joined``: as a :class:`Builder` has it.

    Raises:
        Refused: the code is neither elementwise nor a function of rows, or a result has another shape.

    Examples:
        >>> x = torch.linspace(-1, 1, 5)
        >>> found = record(lambda x: {"slope": 1 - torch.tanh(x) ** 2, "same": x}, [x], x)
        >>> [row[0] for row in found.program.rows], found.results["same"].operand
        (['tanh', 'mul', 'rsub_i'], 0)
        >>> found = record(lambda x: {"centered": x - x.mean(-1, keepdim=True)}, [x], x)
        >>> [row[0] for row in found.program.rows]
        ['row_mean', 'sub']
    """
    examples, shape = [_example(x) for x in operands], _example(like).shape
    with torch.no_grad(), _Recorder(examples, shape, joined) as recorder:
        named = dict(code(*examples))
    narrow = narrowed(shape, recorder.builder.row_axes)
    computed: dict[tuple[Value, bool], int] = {}
    results: dict[Hashable, Result] = {}
    for key, x in named.items():
        value = recorder.value(x) if isinstance(x, Tensor) else x
        if not isinstance(value, Value):
            if not isinstance(value, (int, float)):
                raise Refused(f"a result of type {type(value).__name__}")
            results[key] = Result(number=float(value))
        elif value.place < len(examples):
            results[key] = Result(operand=value.place)
        elif x.shape not in (shape, narrow):
            raise Refused(f"a result of shape {tuple(x.shape)}, smaller than {tuple(shape)}")
        else:
            results[key] = Result(computed=computed.setdefault((value, x.shape != shape), len(computed)))
    values = [value for value, _ in computed]
    if len(set(values)) < len(values):
        raise Refused("a result that is wanted whole, and as one number a row")
    return NamedProgram(recorder.builder.program(values, [value for value, per_row in computed if per_row]), results)


__all__ = ["NamedProgram", "Refused", "Result", "record"]
