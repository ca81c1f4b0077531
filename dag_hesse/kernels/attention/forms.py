"""What attention's Triton kernels are generated from: their forms, their tiles, and the operands that each is given."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """What a kernel is generated from.

    Attributes:
        kind: ``"rows"`` (log-sum-exp of the scores), ``"tangent"``, ``"queries"`` (adjoint of q) or ``"keys"``.
        scale, factor: numbers before and after the softmax.
        sides: which of bias, hidden and drop there are.
        spans: whether tiles know which others they meet.
        tangents: slots of the tangents.
        first, second: whether there is an adjoint, and a residual.
        wants, into: slots of the results, and those that are added to what lies there.
        dtype: what is computed in.
        widened: whether operands are made ``dtype`` before their products, as the interpreter needs.
    """

    kind: str
    scale: float
    factor: float
    sides: tuple[str, ...]
    spans: bool
    tangents: tuple[int, ...]
    first: bool
    second: bool
    wants: tuple[int, ...]
    into: tuple[int, ...]
    dtype: str
    widened: bool


class Tile(NamedTuple):
    """Queries and keys of a tile, and warps."""

    queries: int
    keys: int
    warps: int


# By compute capability and the wider of q and v; within registers for bf16, without pipelined loads. From 9.0 on,
# products of 64 rows and more run asynchronously.
TILES: dict[int, dict[int, dict[str, Tile]]] = {
    8: {
        64: {"rows": Tile(64, 64, 4), "tangent": Tile(64, 32, 4), "queries": Tile(32, 32, 4), "keys": Tile(32, 32, 4)},
        128: {"rows": Tile(64, 64, 4), "tangent": Tile(32, 32, 4), "queries": Tile(32, 32, 8), "keys": Tile(16, 32, 4)},
    },
    9: {
        64: {
            "rows": Tile(128, 64, 8), "tangent": Tile(128, 32, 8), "queries": Tile(64, 32, 4), "keys": Tile(32, 64, 4),
        },
        128: {
            "rows": Tile(64, 64, 4), "tangent": Tile(128, 32, 8), "queries": Tile(32, 32, 8), "keys": Tile(16, 32, 4),
        },
    },
}  # fmt: skip
WIDEST = 128
# Name -> axes of its strides (p: probes, n: matrices, i: rows, j: columns; b, h: samples and heads), rows, columns.
MATRICES = {
    "q": ("nij", "i", "d"), "k": ("nij", "j", "d"), "v": ("nij", "j", "e"), "out": ("nij", "i", "e"),
    "lam": ("nij", "i", "e"), "abar": ("pnij", "i", "e"), "q_dot": ("pnij", "i", "d"), "k_dot": ("pnij", "j", "d"),
    "v_dot": ("pnij", "j", "e"), "moved": ("pnij", "i", "e"), "to_q": ("pnij", "i", "d"), "to_k": ("pnij", "j", "d"),
    "to_v": ("pnij", "j", "e"),
}  # fmt: skip
VECTORS = {"lse": False, "delta": False, "mu": True, "delta_dot": True}  # a number a query; whether with probes
DOTS, RESULTS = ("q_dot", "k_dot", "v_dot"), ("to_q", "to_k", "to_v")


def operands(form: Form) -> tuple[list[str], list[str]]:
    """Matrices and vectors that a kernel is given, its result among them."""
    matrices, vectors = ["q", "k"], ["lse"]
    if form.kind == "rows":
        return matrices, vectors
    moving = [DOTS[slot] for slot in form.tangents] if form.second or form.kind == "tangent" else []
    matrices += ["v", *moving]
    if form.kind == "tangent":
        return [*matrices, "out", "moved"], ["lse", "mu"]
    matrices += ["abar", "out"] if form.first else []
    matrices += ["lam"] if form.second else []
    vectors += ["delta", "mu", "delta_dot"] if form.second else []
    return matrices + [RESULTS[slot] for slot in form.wants], vectors


def arguments(form: Form) -> list[str]:
    """Names of a kernel's arguments in order, but for its constants."""
    matrices, vectors = operands(form)
    pointers = [f"p_{n}" for n in (*matrices, *vectors, *form.sides)] + (["p_from", "p_to"] if form.spans else [])
    strides = [f"{n}_{axis}" for n in matrices for axis in MATRICES[n][0]]
    strides += [f"{n}_{axis}" for n in form.sides for axis in "bhij"]
    return [*pointers, *strides, "matrices", "heads", "queries", "keys", "width", "values"]


__all__ = ["DOTS", "MATRICES", "RESULTS", "TILES", "VECTORS", "WIDEST", "Form", "Tile", "arguments", "operands"]
