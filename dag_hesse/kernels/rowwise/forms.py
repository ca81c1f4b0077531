"""What the generated kernels compute, as operands, sums along a row, and expressions of both; and their Triton code.

A row that fits is held on chip, and its sums and results take one read of every operand. A longer one is gone through
in pieces, twice: for its sums, then for its results.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from dag_hesse.kernels.generated import HEAD, load, loop


class Term(NamedTuple):
    """A product of one tensor with rows, or of those that a residual has; linear in them.

    Attributes:
        shared, numbers: operands that all rows share: whole ones, (*x), and numbers a row of x.
        moving, moving_numbers: operands with rows: (rows, *x), and (rows, numbers).
        sums: by name, what is summed (or averaged) along a row of x.
        results, number_results: expressions of operands and sums: whole ones, and numbers a row of x.
    """

    shared: tuple[str, ...]
    moving: tuple[str, ...]
    results: tuple[str, ...]
    sums: Mapping[str, str] = {}
    numbers: tuple[str, ...] = ()
    moving_numbers: tuple[str, ...] = ()
    number_results: tuple[str, ...] = ()


class Form(NamedTuple):
    """What a kernel is generated from.

    Attributes:
        first, second: names of ``TERMS``, of all rows and of a channel's alone; their results are added.
        into: whether they are added to what lies there.
        looped: whether a row is gone through in pieces.
        dtype: what is computed in.
    """

    first: str | None
    second: str | None
    into: bool
    looped: bool
    dtype: str


TERMS: dict[str, Term] = {
    "softmax tangent": Term(("y",), ("x",), ("y * (x - yx)", "x - yx"), {"yx": "y * x"}),
    "softmax": Term(("y",), ("g",), ("y * (g - yg)",), {"yg": "y * g"}),
    "softmax second": Term(("y", "mu"), ("w",), ("w * mu - y * wm",), {"wm": "w * mu"}),
    "log_softmax tangent": Term(("p",), ("x",), ("x - px",), {"px": "p * x"}),
    "log_softmax": Term(("p",), ("g",), ("g - p * sum_g",), {"sum_g": "g"}),
    "log_softmax second": Term(("p",), ("w",), ("-(total * p * w)",), numbers=("total",)),
    "standardize": Term(("y",), ("g",), ("r * (g - y * yg)",), {"yg": "y * g"}, ("r",)),
    "standardize centered": Term(
        ("y",), ("g",), ("r * (g - mean_g - y * yg)",), {"mean_g": "g", "yg": "y * g"}, ("r",)
    ),
    "standardize second": Term(
        ("y", "mu"), ("w",), ("a * mu + c * w + b * y",), numbers=("c",), moving_numbers=("a", "b")
    ),
}  # fmt: skip
for _name in ("standardize", "standardize centered"):
    _term = TERMS[_name]
    TERMS[f"{_name} tangent"] = _term._replace(
        shared=("y", "mu"), sums={**_term.sums, "mg": "mu * g"}, number_results=("-(r * yg)", "-(r * mg)")
    )

TILE = {"tl.float32": 2048, "tl.float64": 1024}  # elements of an instance
ON_CHIP = {"tl.float32": 8192, "tl.float64": 4096}  # elements of the longest row that is held on chip


class Shape(NamedTuple):
    """Rows of x and elements of a row that an instance holds at a time, its warps, and whether there are more."""

    rows: int
    columns: int
    warps: int
    looped: bool


def shape(length: int, dtype: str) -> Shape:
    """How rows of so many elements are gone through, computed in ``dtype``."""
    columns, tile = 1 << (length - 1).bit_length(), TILE[dtype]
    if columns > ON_CHIP[dtype]:
        return Shape(1, tile, 4, True)
    return Shape(max(1, tile // columns), columns, max(4, 4 * columns // tile), False)


def names(form: Form) -> tuple[list[str], list[str], list[str]]:
    """Operands in order: shared ones, moving ones, and results; numbers come behind whole ones."""
    first, second = _terms(form)
    both = [t for t in (first, second) if t is not None]
    shared = list(dict.fromkeys([n for t in both for n in t.shared] + [n for t in both for n in t.numbers]))
    moving = [n for t in both for n in (*t.moving, *t.moving_numbers)]
    results = [f"out{k}" for k in range(len(both[0].results) + len(both[0].number_results))]
    return shared, moving, results


def _terms(form: Form) -> tuple[Term | None, Term | None]:
    return tuple(None if name is None else TERMS[name] for name in (form.first, form.second))  # type: ignore[return-value]


@cache
def compiled(form: Form) -> Any:
    """The kernel of a form.

    ``kernel[grid](*shared, *moving, *results, length, count, first, stop, *row strides, ROWS=…, M=…, N=…)``, where
    ``length`` is of a row of x and ``count`` the number of these; operands and results with rows have a row stride.
    """
    return load(source(form), "kernel")


def source(form: Form) -> str:
    """Triton code of a form."""
    shared, moving, results = names(form)
    arguments = [f"p_{n}" for n in (*shared, *moving, *results)] + ["length", "count", "first", "stop"]
    arguments += [f"s_{n}" for n in (*moving, *results)] + [f"{n}: tl.constexpr" for n in ("ROWS", "M", "N")]
    lines = [f"def kernel({', '.join(arguments)}):", f"    T: tl.constexpr = {form.dtype}"]
    lines += ["    " + line for line in (_looped(form) if form.looped else _whole(form))]
    return HEAD + '\n@triton.jit(do_not_specialize=["first", "stop"])\n' + "\n".join(lines) + "\n"


def _whole(form: Form) -> list[str]:
    """Rows on chip: what the probes share is loaded once."""
    first, second = _terms(form)
    shared = [_load(n, "p_{0} + at", "mask") for n in _all(form, "shared")]
    lines = [
        "x_row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)[:, None]",
        "column = tl.arange(0, N)[None, :]",
        "here = x_row < count",
        "mask = here & (column < length)",
        "at = x_row * length + column",
        *shared,
        *_numbers(form),
        "for probe in range(ROWS):",
    ]
    body = _probe(form)
    body += [_load(n, *_place(n, form, "at", "mask")) for n in _all(form, "moving")]
    for term in (first, second):
        body += [] if term is None else [f"{n} = tl.sum({x}, 1)[:, None]{_over(form)}" for n, x in term.sums.items()]
    return lines + ["    " + line for line in body + _results(form) + _number_results(form)]


def _looped(form: Form) -> list[str]:
    """A row in pieces, an instance a row and probe: instances beside each other share what is shared."""
    first, second = _terms(form)
    sums = {n: x for t in (first, second) if t is not None for n, x in t.sums.items()}
    loads = [_load(n, "p_{0} + at", "mask") for n in _all(form, "shared")]
    loads += [_load(n, *_place(n, form, "at", "mask")) for n in _all(form, "moving")]
    piece = [
        loop("start", "0", "length", "N"),
        "    column = start + tl.arange(0, N)[None, :]",
        "    mask = here & (column < length)",
        "    at = x_row * length + column",
    ]
    lines = [
        "x_row = (tl.program_id(0) // ROWS).to(tl.int64) + tl.arange(0, M)[:, None]",
        "probe = tl.program_id(0) % ROWS",
        "here = x_row < count",
        *_probe(form),
        *_numbers(form),
    ]
    if sums:
        lines += [f"{n} = tl.zeros([M, N], T)" for n in sums] + piece
        lines += ["    " + line for line in loads] + [f"    {n} += {x}" for n, x in sums.items()]
        lines += [f"{n} = tl.sum({n}, 1)[:, None]{_over(form)}" for n in sums]
    return [*lines, *piece, *("    " + line for line in loads + _results(form)), *_number_results(form)]


def _probe(form: Form) -> list[str]:
    """Where a probe's rows begin, and its numbers."""
    of_channel = ["inside = (probe >= first) & (probe < stop)"] if form.second else []
    moving = [_load(n, *_place(n, form, "x_row", "here")) for n in _all(form, "moving_numbers")]
    return ["probe_64 = tl.cast(probe, tl.int64)", *of_channel, *moving]


def _place(name: str, form: Form, at: str, mask: str) -> tuple[str, str]:
    """Where an operand with rows is loaded, and which of it: a channel's rows are counted from its first."""
    second = _terms(form)[1]
    if second is not None and name in (*second.moving, *second.moving_numbers):
        return f"p_{{0}} + (probe_64 - first) * s_{{0}} + {at}", f"{mask} & inside"
    return f"p_{{0}} + probe_64 * s_{{0}} + {at}", mask


def _load(name: str, place: str, mask: str) -> str:
    return f"{name} = tl.load({place.format(name)}, mask={mask}, other=0.0).to(T)"


def _numbers(form: Form) -> list[str]:
    return [_load(n, "p_{0} + x_row", "here") for n in _all(form, "numbers")]


def _all(form: Form, what: str) -> list[str]:
    return list(dict.fromkeys(n for t in _terms(form) if t is not None for n in getattr(t, what)))


def _over(form: Form) -> str:
    """Sums are means in standardizations."""
    return " / length" if any(name is not None and name.startswith("standardize") for name in form[:2]) else ""


def _results(form: Form) -> list[str]:
    first, second = _terms(form)
    both = [t.results for t in (first, second) if t is not None]
    lines = []
    for k, terms in enumerate(zip(*both, strict=True)):
        lines.append(f"to = p_out{k} + probe_64 * s_out{k} + at")
        lines.append(f"found = {' + '.join(f'({x})' for x in terms)}")
        lines += ["found += tl.load(to, mask=mask, other=0.0).to(T)"] if form.into else []
        lines.append("tl.store(to, found, mask=mask)")
    return lines


def _number_results(form: Form) -> list[str]:
    term = _terms(form)[0]
    return [
        f"tl.store(p_out{k} + probe_64 * s_out{k} + x_row, {x}, mask=here)"
        for k, x in enumerate(() if term is None else term.number_results, 0 if term is None else len(term.results))
    ]


__all__ = ["ON_CHIP", "TERMS", "TILE", "Form", "Shape", "Term", "compiled", "names", "shape", "source"]
