"""By one generated Triton kernel a node: both channels and all probes, each coefficient loaded once.

What is computed is sums of products Σ c ∘ x, one a result: x has rows, c is shared by them; second-order terms go to
the rows of their channel alone. Both may be :class:`Spread` from a number per image channel; other inputs that are
broadcast are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, is_dense
from dag_hesse.kernels.elementwise.coefficients import Adjoint, Coefficient, Coefficients, Gate
from dag_hesse.kernels.generated import DTYPES, HEAD, available, computed, elsewhere, launch, load, number

_DIVIDED = 31  # bits of what is divided by a multiplication
_PLACE: dict[Any, str] = {"tensor": "at", "gate": "at", "spread": "channel"}


class Spread(NamedTuple):
    """A number per image channel, (channels) or (rows, channels), for each of ``inner`` elements beside each other."""

    value: Tensor
    inner: int


class Term(NamedTuple):
    """c ∘ x: places among the coefficients and among the operands; of all rows, or of a channel's alone."""

    coefficient: int
    operand: int
    channel: bool


class Form(NamedTuple):
    """What a kernel is generated from.

    ``coefficients`` are numbers, "tensor", "gate" or "spread"; ``operands`` "tensor" or "spread"; ``results`` terms.
    """

    coefficients: tuple[float | str, ...]
    results: tuple[tuple[Term, ...], ...]
    operands: tuple[str, ...]
    dtype: str


def _kind(x: Coefficient | Spread) -> float | str:
    return x if isinstance(x, float) else {Gate: "gate", Spread: "spread"}.get(type(x), "tensor")


def _tensor(x: Coefficient | Spread) -> Tensor:
    assert not isinstance(x, float)
    return x if isinstance(x, Tensor) else x.value


class Sums:
    """Collects terms, every coefficient and operand once; results have rows like ``like``."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.coefficients: list[Coefficient | Spread] = []
        self.operands: list[Tensor | Spread] = []
        self.of_channel: list[bool] = []
        self.results: list[tuple[Term, ...]] = []

    def term(self, c: Coefficient | Spread, x: Tensor | Spread, channel: bool = False) -> Term:
        """Of a result that is added to ``results``."""
        known = zip(self.operands, self.of_channel, strict=True)  # one tensor may be met in both ways
        place = next((k for k, (y, of) in enumerate(known) if y is x and of == channel), len(self.operands))
        if place == len(self.operands):
            self.operands.append(x)
            self.of_channel.append(channel)
        return Term(self._coefficient(c), place, channel)

    def _coefficient(self, c: Coefficient | Spread) -> int:
        c = c if isinstance(c, (Gate, Tensor, Spread)) else float(c)
        for k, other in enumerate(self.coefficients):
            if c is other or (isinstance(c, float) and isinstance(other, float) and c == other):
                return k
        self.coefficients.append(c)
        return len(self.coefficients) - 1

    def run(self, count: int, rows: slice) -> list[Tensor]:
        """Results of ``count`` rows each; ``rows`` are those of the channel."""
        like = self.like
        whole = [torch.empty_strided((count, *like.shape), (like.numel(), *like.stride()), dtype=like.dtype,
                                     device=like.device) for _ in self.results]  # fmt: skip
        kinds = tuple("spread" if isinstance(x, Spread) else "tensor" for x in self.operands)
        form = Form(tuple(map(_kind, self.coefficients)), tuple(self.results), kinds, computed(like.dtype))
        first, stop, _ = rows.indices(count)
        operands = [_tensor(x) for x in self.operands]
        tensors = [_tensor(c) for c in self.coefficients if not isinstance(c, float)]
        strides = [x.stride(0) for x in operands]
        given = (*tensors, *operands, *whole, like.numel(), first, stop, *strides, *self._channels())
        launch(compiled(form), like.numel(), like.device, *given, ROWS=count)
        return whole

    def _channels(self) -> list[int]:
        """What an element's channel is found by, where one is asked for."""
        spread = next((x for x in (*self.coefficients, *self.operands) if isinstance(x, Spread)), None)
        if spread is None:
            return []
        channels = spread.value.shape[-1]
        return [*divisor(spread.inner), *divisor(channels), channels]


def divisor(by: int) -> tuple[int, int]:
    """(factor, shift): n // by is n · factor >> shift for all n below 2³¹ (Granlund and Montgomery, 1994).

    Examples:
        >>> factor, shift = divisor(49)
        >>> all(n * factor >> shift == n // 49 for n in (0, 48, 49, 2**31 - 1))
        True
    """
    shift = _DIVIDED + (by - 1).bit_length()
    return -(-(1 << shift) // by), shift


@cache
def compiled(form: Form) -> Any:
    """``kernel[grid](*coefficients, *operands, *results, size, first, stop, *row strides, …, ROWS=…, BLOCK=…)``.

    Where a coefficient or an operand is spread, the divisors of its axes come next, and the number of channels.
    """
    return load(source(form), "kernel")


def source(form: Form) -> str:
    """Triton code of sums of products."""
    tensors = [k for k, kind in enumerate(form.coefficients) if isinstance(kind, str)]
    places, outs = range(len(form.operands)), range(len(form.results))
    spread = "spread" in (*form.coefficients, *form.operands)
    names = [f"c{k}" for k in tensors] + [f"x{k}" for k in places] + [f"y{k}" for k in outs]
    names += ["size", "first", "stop"] + [f"s{k}" for k in places]
    names += ["inner_factor", "inner_shift", "factor", "shift", "channels"] if spread else []
    names += ["ROWS: tl.constexpr", "BLOCK: tl.constexpr"]
    lines = [
        f"def kernel({', '.join(names)}):",
        f"    T: tl.constexpr = {form.dtype}",
        "    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "    mask = at < size",
    ]
    if spread:
        lines.append("    outer = (at * inner_factor) >> inner_shift")
        lines.append("    channel = outer - ((outer * factor) >> shift) * channels")
    for k in tensors:
        loaded = f"tl.load(c{k} + {_PLACE[form.coefficients[k]]}, mask=mask, other=0.0)"
        lines.append(f"    k{k} = ({loaded}{' > 0' if form.coefficients[k] == 'gate' else ''}).to(T)")
    lines += [
        "    for probe in range(ROWS):",
        "        row = tl.cast(probe, tl.int64)",
        "        inside = mask & (row >= first) & (row < stop)",
    ]
    of_channel = {term.operand for terms in form.results for term in terms if term.channel}
    for k in places:
        row, mask = ("(row - first)", "inside") if k in of_channel else ("row", "mask")
        lines.append(
            f"        v{k} = tl.load(x{k} + {row} * s{k} + {_PLACE[form.operands[k]]}, mask={mask}, other=0.0).to(T)"
        )
    for n, terms in enumerate(form.results):
        total = " + ".join(_product(form, term) for term in terms)
        lines.append(f"        tl.store(y{n} + row * size + at, {total}, mask=mask)")
    return HEAD + '\n@triton.jit(do_not_specialize=["first", "stop"])\n' + "\n".join(lines) + "\n"


def _product(form: Form, term: Term) -> str:
    kind, x = form.coefficients[term.coefficient], f"v{term.operand}"
    if isinstance(kind, float):
        return x if kind == 1 else f"{x} * {number(kind)}"
    return f"k{term.coefficient} * {x}"  # gates are 0 and 1: a choice would have loads wait for it, one by one


def _reason(given: Sequence[Tensor], coefficients: Sequence[Coefficient | None], shape: Sequence[int]) -> str | None:
    """Why sums of these operands with rows and these coefficients are not computed here."""
    like = given[0]
    if reason := elsewhere(like):
        return reason
    if like.dtype not in DTYPES:
        return f"there is no arithmetic for {like.dtype}"
    if not like[0].numel() or not is_dense(like[0]):
        return "rows are empty or have gaps"
    if any(
        x.shape[1:] != torch.Size(shape) or x.stride()[1:] != like.stride()[1:] or x.dtype != like.dtype for x in given
    ):
        return "operands are broadcast, or lie otherwise than the first"
    tensors = [c.value if isinstance(c, Gate) else c for c in coefficients if isinstance(c, (Gate, Tensor))]
    if any(c.shape != like.shape[1:] or c.stride() != like.stride()[1:] or c.dtype != like.dtype for c in tensors):
        return "coefficients are broadcast, or lie otherwise than the operands"
    return available()


def refuse_tangent(of: Coefficients, tangents: Mapping[int, Tensor]) -> str | None:
    return _reason(list(tangents.values()), [of.first[slot] for slot in tangents], of.shape)


def tangent(arena: Arena, of: Coefficients, tangents: Mapping[int, Tensor]) -> Tensor:
    lead = next(iter(tangents.values()))
    sums = Sums(lead[0])
    sums.results.append(tuple(sums.term(c, x) for slot, x in tangents.items() if (c := of.first[slot]) is not None))
    return sums.run(len(lead), slice(None))[0]


def refuse_adjoints(of: Coefficients, a: Adjoint) -> str | None:
    if any(torch.Size(shape) != torch.Size(of.shape) for shape in a.wanted.values()):
        return "inputs are broadcast"
    if a.abar is not None and not a.tangents and all(isinstance(of.first[slot], float) for slot in a.wanted):
        return "what is a multiple of the adjoint needs no kernel"
    given = [*([] if a.abar is None else [a.abar]), *a.tangents.values()]
    used = [of.first[slot] for slot in a.wanted] if a.abar is not None else []
    return _reason(given, [*used, *(h for pair, h in of.seconds.items() if pair[1] in a.tangents)], of.shape)


def adjoints(arena: Arena, of: Coefficients, a: Adjoint) -> dict[int, Tensor]:
    lead = a.abar if a.abar is not None else next(iter(a.tangents.values()))
    sums, slots = Sums(lead[0]), list[int]()
    for slot in a.wanted:
        c = of.first[slot]
        terms = [] if a.abar is None or c is None else [sums.term(c, a.abar)]
        terms += [sums.term(of.seconds[slot, j], x, True) for j, x in a.tangents.items() if (slot, j) in of.seconds]
        if terms:
            sums.results.append(tuple(terms))
            slots.append(slot)
    rows = a.rows if a.abar is not None else slice(None)
    return dict(zip(slots, sums.run(len(lead), rows), strict=True)) if slots else {}


__all__ = [
    "Spread",
    "Sums",
    "adjoints",
    "compiled",
    "divisor",
    "refuse_adjoints",
    "refuse_tangent",
    "source",
    "tangent",
]
