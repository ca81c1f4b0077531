"""Ops whose meaning hangs on integers in tensors (lengths, labels, offsets), written out for the integers they have.

Such a lowering is called with the integer tensors themselves and with stand-ins without values for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_LIBRARY = torch.library.Library("dag_hesse", "FRAGMENT")
_LIBRARY.define("literal(int[] values, int[] shape, *, ScalarType dtype, Device device) -> Tensor")


def _literal(values: list[int], shape: list[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).reshape(shape)


_LIBRARY.impl("literal", _literal, "CompositeExplicitAutograd")


def _constant(values: Any, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Nested lists of integers as a tensor where ``like`` lies, by an op that is noted as others are."""
    found = torch.tensor(values, dtype=torch.int64)
    return torch.ops.dag_hesse.literal(found.flatten().tolist(), list(found.shape), dtype=dtype, device=like.device)


def _integers(x: Tensor | Sequence[int]) -> list[int]:
    return [int(k) for k in (x.tolist() if isinstance(x, Tensor) else x)]


def _labels(targets: Tensor, lengths: list[int]) -> list[list[int]]:
    """Per sample its labels; targets are padded rows, or all in one row."""
    if targets.ndim == 2:
        return [row[:n] for row, n in zip(targets.tolist(), lengths, strict=True)]
    flat, starts = targets.tolist(), [sum(lengths[:k]) for k in range(len(lengths))]
    return [flat[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def _ctc(
    log_probs: Tensor, targets: Tensor, inputs: Any, lengths: Any, blank: int = 0, zero_infinity: bool = False
) -> tuple[Tensor, Tensor]:
    """−log of the sum over alignments, by the forward recursion of the logarithms α.

    Before the first step all weight is on the first blank, which is where α starts.
    """
    steps, sizes = _integers(inputs), _integers(lengths)
    labels = _labels(targets, sizes)
    width, lowest = 2 * max(sizes, default=0) + 1, -torch.inf
    rows = [[blank, *(k for label in row for k in (label, blank))] for row in labels]
    rows = [row + [blank] * (width - len(row)) for row in rows]
    skips = [[int(s > 1 and row[s] != blank and row[s] != row[s - 2]) for s in range(width)] for row in rows]
    places = _constant([rows], log_probs).expand(log_probs.shape[0], -1, -1)
    emitted = log_probs.gather(2, places)  # (steps, samples, width)
    no_skip = _constant([[1 - k for k in row] for row in skips], log_probs, torch.bool)
    start = _constant([[0] + [1] * (width - 1)] * len(rows), log_probs, torch.bool)
    alpha = torch.zeros_like(emitted[0]).masked_fill(start, lowest)
    for t in range(max(steps, default=0)):
        moved = torch.logaddexp(alpha, torch.constant_pad_nd(alpha, [1, -1], lowest))
        if width > 2:
            skipped = torch.constant_pad_nd(alpha, [2, -2], lowest).masked_fill(no_skip, lowest)
            moved = torch.logaddexp(moved, skipped)
        moved = moved + emitted[t]
        if min(steps) <= t:
            going = _constant([[int(t < n)] for n in steps], log_probs, torch.bool)
            moved = torch.where(going, moved, alpha)
        alpha = moved
    last = alpha.gather(1, _constant([[2 * n] for n in sizes], log_probs))
    before = alpha.gather(1, _constant([[max(2 * n - 1, 0)] for n in sizes], log_probs))
    before = before.masked_fill(_constant([[int(n == 0)] for n in sizes], log_probs, torch.bool), lowest)
    loss = -torch.logaddexp(last, before).squeeze(1)
    if zero_infinity:
        loss = loss.masked_fill(loss == torch.inf, 0.0)
    return loss, alpha


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    if scale_grad_by_freq:
        return NotImplemented  # a gradient that is scaled is no derivative
    rows, starts = _integers(indices), _integers(offsets)
    ends = starts[1:] + ([] if include_last_offset else [len(rows)])
    padding = padding_idx + weight.shape[0] if padding_idx < -1 else padding_idx
    bags = [[k for k in range(a, b) if rows[k] != padding] for a, b in zip(starts, ends, strict=False)]
    empty = _constant([0], weight)
    sizes = {len(bag) for bag in bags}
    if len(sizes) == 1 and 0 not in sizes and [k for bag in bags for k in bag] == list(range(len(rows))):
        return _even_bags(weight, indices, len(bags), mode, per_sample_weights), empty, empty, empty
    index = [rows[k] for bag in bags for k in bag]
    picked = weight.index_select(0, _constant(index, weight))
    if mode == 2:
        found = _maxima(picked, [len(bag) for bag in bags])
    else:
        if per_sample_weights is not None:
            kept = _constant([k for bag in bags for k in bag], weight)
            picked = picked * per_sample_weights.index_select(0, kept).unsqueeze(1)
        bag_of = _constant([n for n, bag in enumerate(bags) for _ in bag], weight)
        found = torch.zeros([len(bags), weight.shape[1]], dtype=weight.dtype, device=weight.device).index_add(
            0, bag_of, picked
        )
        if mode == 1:
            counts = _constant([[max(len(bag), 1)] for bag in bags], weight)
            found = found / counts.to(weight.dtype)
    return found, empty, empty, empty


def _even_bags(weight: Tensor, indices: Tensor, bags: int, mode: int, factors: Tensor | None) -> Tensor:
    """Bags of one size that hold all indices in order: an axis of their own."""
    picked = weight.index_select(0, indices.reshape(-1)).reshape(bags, -1, weight.shape[1])
    if mode == 2:
        return picked.max(1)[0]
    if factors is not None:
        picked = picked * factors.reshape(bags, -1, 1)
    return picked.mean(1) if mode == 1 else picked.sum(1)


def _maxima(x: Tensor, sizes: list[int]) -> Tensor:
    """Per run of rows of these sizes, the maximum; 0 of none."""
    most, starts = max([1, *sizes]), [sum(sizes[:k]) for k in range(len(sizes))]
    if x.shape[0] == 0:
        return torch.zeros([len(sizes), *x.shape[1:]], dtype=x.dtype, device=x.device)
    places = [start + k if k < n else 0 for start, n in zip(starts, sizes, strict=True) for k in range(most)]
    spare = _constant([[[int(k >= n)] for k in range(most)] for n in sizes], x, torch.bool)
    wide = x.index_select(0, _constant(places, x)).reshape(len(sizes), most, -1)
    found = wide.masked_fill(spare, -torch.inf).max(1)[0]
    return found.masked_fill(_constant([[int(n == 0)] for n in sizes], x, torch.bool), 0.0)


def _segment_reduce(
    x: Tensor,
    how: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Any:
    known = lengths if lengths is not None else offsets
    if known is None or known.ndim != 1:
        return NotImplemented
    sizes = _integers(known)
    if lengths is None:
        sizes = [b - a for a, b in pairwise(sizes)]
    parts = [x.narrow(axis, sum(sizes[:k]), size) for k, size in enumerate(sizes)]
    return torch.stack([_of_segment(part, how, axis, initial) for part in parts], axis)


def _of_segment(part: Tensor, how: str, axis: int, initial: float | None) -> Tensor:
    rows = list(part.unbind(axis))
    shape = [n for k, n in enumerate(part.shape) if k != axis % part.ndim]
    if how == "mean":
        total = part.sum(axis) if initial is None else part.sum(axis) + initial
        return total / len(rows) if rows else torch.full_like(total, torch.nan if initial is None else initial)
    if how in ("sum", "prod"):
        neutral = 0.0 if how == "sum" else 1.0
        first = torch.full(shape, neutral if initial is None else initial, dtype=part.dtype, device=part.device)
        return part.sum(axis) + first if how == "sum" else reduce(torch.mul, rows, first)
    worst = torch.inf if how == "min" else -torch.inf
    first = torch.full(shape, worst if initial is None else initial, dtype=part.dtype, device=part.device)
    every = torch.cat([first.unsqueeze(axis), part], axis) if initial is not None or not rows else part
    return every.amin(axis) if how == "min" else every.amax(axis)


def _pack_padded_sequence(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Rows of the sequences (longest first), step by step; and how many sequences each step has."""
    sizes = _integers(lengths)
    steps, samples = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    there = [[b for b in range(samples) if sizes[b] > t] for t in range(max(sizes))]
    places = [b * steps + t if batch_first else t * samples + b for t, row in enumerate(there) for b in row]
    rows = x.reshape(steps * samples, *x.shape[2:])
    return rows.index_select(0, _constant(places, x)), torch.tensor([len(row) for row in there], device="cpu")


CONCRETE: Mapping[Any, Callable[..., Any]] = {
    aten._ctc_loss.default: _ctc,
    aten._ctc_loss.Tensor: _ctc,
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten.segment_reduce.default: _segment_reduce,
    aten._pack_padded_sequence.default: _pack_padded_sequence,
}

__all__ = ["CONCRETE"]
