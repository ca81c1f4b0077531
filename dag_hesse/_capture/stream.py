"""The batches of one loss: held in memory, or iterated again by their loader in every pass."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dag_hesse._capture.advice import fitted
from dag_hesse._capture.batch import NO_BATCHES, Batch, check_finite, check_no_transform, is_one, one_batch
from dag_hesse.budget import Budget, human
from dag_hesse.errors import BatchError, MemoryBudgetError, UnstableLoaderError
from dag_hesse.randomness import RandomState, preserved

_END = object()
_ADVICE = (
    "Products need the same batches in the same order: use shuffle=False (or shuffle and augment with PyTorch's, "
    "Python's or NumPy's global generator, which is set back before every pass), pass a list of batches, or raise "
    "memory= so that the batches are taken once and held."
)


class Batches:
    """The batches of one loss, in order; iterate to have them.

    One batch, and those of a list, stay where they are. A loader's are held while they take no more than a quarter of
    ``memory`` bytes (None: of what is free). A larger loader is iterated again in every pass, from the state that the
    global random generators had in the first one, and must give what it gave then.

    Args:
        batches: a batch, or an iterable of batches (:func:`~dag_hesse._capture.batch.one_batch` says of what form).
        model, loss: whose forward, or the want of it, say what is an input and what a target
            (:func:`~dag_hesse._capture.advice.fitted`).

    Attributes:
        sizes, signatures: samples, and shapes and dtypes, per batch.
        examples: the first batch of each signature.
        held: the batches in memory; None where the loader is iterated again.

    Raises:
        OptionError: ``memory`` is no positive integer.
        BatchError: a batch of an unknown form, or none at all.
        MemoryBudgetError: an iterator, which can be iterated once only, gives more than may be held.

    Examples:
        >>> import torch
        >>> from dag_hesse._capture import Batches
        >>> data = torch.utils.data.TensorDataset(torch.randn(10, 3), torch.arange(10))
        >>> found = Batches(torch.utils.data.DataLoader(data, batch_size=4), memory=1)
        >>> found.sizes, found.held, len(list(found))
        ([4, 4, 2], None, 3)
    """

    def __init__(
        self, batches: Any, memory: int | str | None = None, model: nn.Module | None = None, loss: Any = None
    ) -> None:
        budget = Budget.of(memory)
        check_no_transform()
        self.sizes: list[int] = []
        self.signatures: list[Any] = []
        self.examples: dict[Any, Batch] = {}
        self.held: list[Batch] | None = []
        self._batches, self._start, self._fit = batches, RandomState.now(), (model, loss)
        self._checksums: list[int] = []
        if is_one(batches) or not isinstance(batches, Iterable):
            self._take(self._one(batches))
        elif isinstance(batches, list):
            for item in batches:
                self._take(self._one(item))
        else:
            self._first_pass(budget.batches)
        if not self.sizes:
            raise BatchError(NO_BATCHES)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        if self.held is not None:
            yield from self.held
            return
        number = 0
        for number, batch in enumerate(self._pass(), 1):
            self._check(number, batch)
            yield batch
        if number < len(self):
            raise UnstableLoaderError(
                f"the loader ended after {number} batches; it gave {len(self)} in its first pass. {_ADVICE}"
            )

    @property
    def total(self) -> int:
        """Samples of all batches."""
        return sum(self.sizes)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        return [t for batch in self.held or () for t in batch.tensors]

    @property
    def device(self) -> torch.device:
        """Where the batches lie."""
        return next(iter(self.examples.values())).tensors[0].device

    def check_batch_mode(self, batch_mode: str) -> None:
        """Raise :class:`BatchError` where the batch mode holds one batch, and there are more."""
        if batch_mode == "joint" and len(self) > 1:
            raise BatchError(
                f"batch_mode='joint' perturbs all samples of one batch together, and there are {len(self)} batches: "
                "concatenate them, or use 'shared' (or analyze()'s 'per_sample')."
            )

    def _one(self, item: Any) -> Batch:
        return fitted(one_batch(item), *self._fit)

    def _take(self, batch: Batch) -> None:
        where = f"batch {len(self.sizes)}: tensor" if self.sizes else "batch tensor"
        if all(x.layout is torch.strided and not x.is_meta for x in batch.tensors):
            check_finite(batch.names, batch.tensors, where)
        self.sizes.append(batch.size)
        self.signatures.append(batch.signature)
        self.examples.setdefault(batch.signature, batch)
        if self.held is not None:
            self.held.append(batch)

    def _first_pass(self, limit: int) -> None:
        used = 0
        for batch in self._pass():
            self._take(batch)
            self._checksums.append(_checksum(batch))
            used += sum(t.numel() * t.itemsize for t in batch.tensors)
            if used > limit and isinstance(self._batches, Iterator):
                raise MemoryBudgetError(
                    f"an iterator can be iterated once only, and {len(self)} of its batches already take "
                    f"{human(used)} of the {human(limit)} allowed (a quarter of memory=, or of "
                    "what is free): pass what can be iterated again (a DataLoader, say), or raise memory=."
                )
            if used > limit:
                self.held = None

    def _pass(self) -> Iterator[Batch]:
        """One pass over the loader. It draws from generators of its own time, whatever else does in between."""
        state, iterator = self._start, None
        while True:
            with preserved():
                state.restore()
                iterator = iter(self._batches) if iterator is None else iterator
                item = next(iterator, _END)
                state = RandomState.now()
            if item is _END:
                return
            yield self._one(item)

    def _check(self, number: int, batch: Batch) -> None:
        """Raise :class:`UnstableLoaderError` unless the batch is the first pass's ``number``-th (from 1)."""
        if number > len(self):
            raise UnstableLoaderError(
                f"the loader gives more than the {len(self)} batches of its first pass. {_ADVICE}"
            )
        mine = (_checksum(batch), batch.signature)
        if mine == (self._checksums[number - 1], self.signatures[number - 1]):
            return
        seen = list(zip(self._checksums, self.signatures, strict=True))
        if mine in seen:
            what = f"its {number}. batch is what the {seen.index(mine) + 1}. was in its first pass"
        else:
            what = f"its {number}. batch has other content than in its first pass"
        raise UnstableLoaderError(f"the loader changes from pass to pass: {what}. {_ADVICE}")


def _checksum(batch: Batch) -> int:
    total = 0
    for tensor in batch.tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total = zlib.crc32(raw.numpy().data, total)
    return total
