"""Nodes: one tensor each, with the op that makes it and the kind of that op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch


class Kind(str, Enum):
    """What is known of an op's derivatives before any number is seen (design §3, IR)."""

    STRUCTURAL = "structural"  # linear data movement and sums
    CONTRACTION = "contraction"  # bilinear: mm, bmm, conv
    SMOOTH = "smooth"  # elementwise with a second derivative
    PIECEWISE_LINEAR = "piecewise"  # second derivative 0 almost everywhere
    ROWWISE = "rowwise"  # softmax, norms, logsumexp
    GATHER = "gather"  # rows picked by integer indices
    OPAQUE = "opaque"  # differentiated by autograd on the op alone
    INPUT = "input"
    PARAM = "param"
    CONST = "const"  # anything no derivative passes through

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands in a node's arguments for its ``slot``-th input."""

    slot: int


@dataclass(slots=True)
class Node:
    """One tensor-valued node of a :class:`~dag_hesse.ir.CurvatureGraph`.

    ``args``/``kwargs`` are the op's arguments with every tensor replaced by a :class:`Ref` into ``inputs``
    (indices of earlier nodes). ``output`` selects one result of an op that returns several.
    """

    index: int
    op: str
    target: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    output: int | None = None
    name: str = ""  # parameter, buffer or input name
    owner: str = ""  # module that ran the op
    line: str = ""  # file:line in the user's code
    taps: list[str] = field(default_factory=list)
    draws: bool = False  # whether it draws random numbers: it runs once, in its turn, whoever uses it

    @property
    def numel(self) -> int:
        """Number of elements of the node's tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Size of the node's tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def is_differentiable(self) -> bool:
        """Whether derivatives pass an op here: it is neither a leaf nor a constant."""
        return self.kind not in (Kind.INPUT, Kind.PARAM, Kind.CONST)

    @property
    def is_float(self) -> bool:
        """Whether a derivative can pass through this node's tensor."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def where(self) -> str:
        """Op, module and line, for messages."""
        words = [self.op, f"in module '{self.owner}'" if self.owner else "", f"at {self.line}" if self.line else ""]
        return " ".join(word for word in words if word)


@dataclass(frozen=True, slots=True)
class Guard:
    """Python looked at a node's value, at all of its values, or at its shape: the graph holds as long as it is that."""

    node: int
    seen: bool | int | float | complex | torch.Tensor | torch.Size

    def holds(self, value: torch.Tensor) -> bool:
        """Whether the node's value is the one seen; floating-point numbers may be rounded otherwise, or be NaN now."""
        if isinstance(self.seen, torch.Size):
            return value.shape == self.seen
        seen = torch.as_tensor(self.seen, dtype=value.dtype, device=value.device)
        if isinstance(self.seen, torch.Tensor) and seen.shape != value.shape:
            return False
        if not (value.is_floating_point() or value.is_complex()):
            return bool((value == seen).all())
        rounding = 1e-11 if torch.finfo(value.dtype).bits == 64 else 1e-5
        near = (value == seen) | ((value - seen).abs() <= rounding * seen.abs()) | (value != value)
        return bool(near.all())

    def saw(self, other: Guard) -> bool:
        """Whether Python saw the same in another recording."""
        if isinstance(self.seen, torch.Size) or isinstance(other.seen, torch.Size):
            return self.seen == other.seen
        return self.holds(torch.as_tensor(other.seen))

    def told(self, value: torch.Tensor) -> str:
        """How a value differs from the one seen."""
        if isinstance(self.seen, torch.Size):
            return f"gives {tuple(value.shape)} now; it gave {tuple(self.seen)}"
        if isinstance(self.seen, torch.Tensor):
            return "has other values now than"
        return f"is {value.item()} now; it was {self.seen}"


def refill(tree: Any, fn: Callable[[Ref], Any]) -> Any:
    """Replace every :class:`Ref` in an argument tree by ``fn(ref)``."""
    if isinstance(tree, Ref):
        return fn(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(refill(item, fn) for item in tree)
    return tree


def fill(node: Node, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` of ``node`` with its inputs' ``values`` (one per slot) put in."""
    args = tuple(refill(arg, lambda ref: values[ref.slot]) for arg in node.args)
    return args, {key: refill(arg, lambda ref: values[ref.slot]) for key, arg in node.kwargs.items()}


def execute(node: Node, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run the node's op on the values of its inputs (one per slot)."""
    assert node.target is not None, f"{node.op} is a leaf and has no op to run"
    args, kwargs = fill(node, values)
    result = node.target(*args, **kwargs)
    return result if node.output is None else result[node.output]
