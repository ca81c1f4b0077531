"""What attention is made of, and the chunks that its scores are computed in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from dag_hesse.kernels.arena import Arena

ALL = slice(None)


class Operands(NamedTuple):
    """out = A v with A = factor · drop ∘ softmax(scale · q k + bias), over N = samples · heads matrices.

    Attributes:
        q, k, v: (N, S, D), (N, D, T) and (N, T, E).
        lead: samples and heads.
        scale, factor: numbers before and after the softmax.
        bias: added to the scores, and broadcasts to (samples, heads, S, T); 0 where ``hidden`` puts another value.
        hidden: scores that the bias replaces, as a mask that broadcasts in the same way.
        drop: what dropout multiplies by, likewise.
        spans: first and last key of every query whose bias is not −∞; None: all keys.
        blank: whether there are queries without a key, whose weights are 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lead: tuple[int, int]
    scale: float = 1.0
    factor: float = 1.0
    bias: Tensor | None = None
    hidden: Tensor | None = None
    drop: Tensor | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    blank: bool = False


class Bound(NamedTuple):
    """G = ∂L/∂out, (N, S, E), and δ = rowsum(G ∘ out), (N, S, 1)."""

    lam: Tensor
    delta: Tensor


class Residual(NamedTuple):
    """Tangents by slot, (P, *operand), and per query μ = rowsum(P ∘ Ṡ) and δ̇ = rowsum(G ∘ ȯut), (P, N, S, 1)."""

    tangents: Mapping[int, Tensor]
    mu: Tensor
    delta: Tensor


class Adjoint(NamedTuple):
    """What goes back: the transpose of ``abar``, (R, N, S, E), and in its ``rows`` ``residual``'s second-order term.

    One of the two may be None. Results are wanted for ``slots``; one is added to its buffer in ``into``.
    """

    abar: Tensor | None
    residual: Residual | None
    rows: slice
    slots: Sequence[int]
    into: Mapping[int, Tensor]

    @property
    def height(self) -> int:
        """Rows in all, R."""
        if self.abar is not None:
            return len(self.abar)
        return 0 if self.residual is None else len(self.residual.mu)

    def places(self, arena: Arena, a: Operands) -> dict[int, Tensor]:
        """Per slot, where its result goes: to its buffer, or to new memory, laid out as the operand."""
        operands, found = (a.q, a.k, a.v), dict(self.into)
        for slot in self.slots:
            if slot not in found:
                found[slot] = arena.in_order(a.q, (self.height, *operands[slot].shape), operands[slot])
        return found


@dataclass(frozen=True)
class Chunk:
    """Some samples, heads, queries, and the keys that these queries meet."""

    samples: slice
    heads: slice
    queries: slice
    keys: slice

    @cached_property
    def lead(self) -> tuple[int, int]:
        """How many samples and heads."""
        return self.samples.stop - self.samples.start, self.heads.stop - self.heads.start

    def of(self, x: Tensor, lead: Sequence[int], rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """The chunk's part of (N, rows, columns), as a view."""
        return x.view(*lead, *x.shape[1:])[self.samples, self.heads, rows, columns]

    def matrices(self, x: Tensor, lead: Sequence[int], rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """The same, (n, rows, columns)."""
        return self.of(x, lead, rows, columns).flatten(0, 1)

    def side(self, x: Tensor) -> Tensor:
        """Its part of what broadcasts to the scores, so that it broadcasts to (n, queries, keys)."""
        whole = (self.samples, self.heads, self.queries, self.keys)
        x = x[tuple(part if size > 1 else ALL for part, size in zip(whole, x.shape, strict=True))]
        return x[0] if x.shape[:2] == (1, 1) else x.expand(*self.lead, *x.shape[2:]).flatten(0, 1)


_PIECES, _LEAST = (
    8,
    32,
)  # of queries that do not meet all keys: the finer they are cut, the fewer scores are for nothing


def chunks(a: Operands, largest: int) -> Iterator[Chunk]:
    """Chunks with at most so many scores (or one query): of queries, else of whole heads, else of whole samples."""
    (samples, heads), queries, keys = a.lead, a.q.shape[1], a.k.shape[2]
    whole = queries if a.spans is None else max(_LEAST, -(-queries // _PIECES))
    some_queries = max(1, min(queries, whole, largest // max(1, keys)))
    scores = max(1, some_queries * keys)
    some_heads = max(1, min(heads, largest // scores))
    some_samples = max(1, largest // (heads * scores)) if some_heads == heads else 1
    for b in range(0, samples, some_samples):
        for h in range(0, heads, some_heads):
            for s in range(0, queries, some_queries):
                stop = min(s + some_queries, queries)
                yield Chunk(
                    slice(b, min(b + some_samples, samples)),
                    slice(h, min(h + some_heads, heads)),
                    slice(s, stop),
                    _keys(a.spans, s, stop, keys),
                )


def _keys(spans: Sequence[tuple[int, int]] | None, start: int, stop: int, keys: int) -> slice:
    """The keys that some of these queries meet: one at least."""
    if spans is None:
        return slice(0, keys)
    first, last = min(a for a, _ in spans[start:stop]), max(b for _, b in spans[start:stop])
    return slice(min(first, max(last, 0)), max(last, 0) + 1)


__all__ = ["ALL", "Adjoint", "Bound", "Chunk", "Operands", "Residual", "chunks"]
