"""The forms a batch may have, checked before any heavy work."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from dag_hesse.errors import BatchError, CaptureError, NonFiniteError, kind_of
from dag_hesse.randomness import preserved

NO_BATCHES = "the iterable of batches is empty or used up: give at least one batch."
_FORMS = "(inputs, targets), (input, input, …, targets), a dict of keyword inputs, or an iterable of these"


@dataclass(frozen=True)
class Batch:
    """One batch: positional and keyword inputs of the model, targets (None if the model makes its own loss).

    ``tensors`` are all tensors of the three, flattened; ``size`` is the number of samples. ``flat``: given as
    ``(input, input, …, targets)``; ``labelled``: as ``(ids, ids)``, of which the latter are labels for
    the model's own loss.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    size: int
    flat: bool = False
    labelled: bool = False

    @property
    def tree(self) -> tuple[Any, ...]:
        """The batch as one pytree."""
        return (self.args, self.kwargs, self.targets)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, in pytree order."""
        return [leaf for leaf in pytree.tree_leaves(self.tree) if isinstance(leaf, Tensor)]

    @property
    def names(self) -> list[str]:
        """A name for each of ``tensors``."""
        leaves, _ = pytree.tree_flatten_with_path(self.tree)
        roots = ("inputs", "inputs", "targets")
        return [
            roots[path[0].idx] + pytree.keystr(path[1:])  # type: ignore[attr-defined]
            for path, leaf in leaves
            if isinstance(leaf, Tensor)
        ]

    @property
    def signature(self) -> tuple[Any, ...]:
        """Shapes and dtypes: batches of equal signature share one captured graph."""
        leaves, spec = pytree.tree_flatten(self.tree)
        described = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
        return described, str(spec)


def _plain(value: Any) -> Any:
    """Any mapping (a tokenizer's output, say) as a dict, and NumPy's arrays as tensors over the same memory."""
    value = dict(value) if isinstance(value, Mapping) else value
    return pytree.tree_map(lambda x: _tensor(x) if isinstance(x, np.ndarray) else x, value)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biufc":
        raise BatchError(f"the batch holds an array of {array.dtype}; expected numbers.")
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    try:
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    except TypeError as error:
        raise BatchError(f"the batch holds an array of {array.dtype}, which PyTorch does not have: {error}.") from error


def _size(inputs: list[Tensor], targets: list[Tensor]) -> int:
    """The targets' leading axis, if some input has an axis of that size; else the first input's leading axis."""
    for target in targets:
        if target.ndim and any(target.shape[0] in x.shape for x in inputs):
            return int(target.shape[0])
    for tensor in inputs:
        if tensor.ndim:
            return int(tensor.shape[0])
    raise BatchError(f"no tensor of the batch has a batch axis; expected {_FORMS}.")


def one_batch(batch: Any) -> Batch:
    """Parse one batch: ``(inputs, targets)``, or a longer tuple, whose last entry is the targets and whose others are
    positional inputs (lengths, masks), or a dict of keyword inputs. NumPy's arrays are taken as tensors.

    Raises:
        BatchError: unknown form, no tensors, or no samples.
    """
    if isinstance(batch, Batch):
        return batch
    flat, kind, batch = False, type(batch).__name__, _plain(batch)
    if isinstance(batch, Mapping):
        args, kwargs, targets = (), dict(batch), None
    elif isinstance(batch, (tuple, list)) and len(batch) > 2 and any(isinstance(x, Tensor) for x in batch[:-1]):
        flat, args, kwargs, targets = True, tuple(batch[:-1]), {}, _plain(batch[-1])
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = _plain(batch[0]), _plain(batch[1])
        kwargs = inputs if isinstance(inputs, dict) else {}
        args = () if isinstance(inputs, dict) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    else:
        hint = " For inputs without targets pass (inputs, None)." if isinstance(batch, Tensor) else ""
        if hasattr(batch, "__getitem__") and not isinstance(batch, (tuple, list, str, Tensor)):
            hint = " Of a dataset make a loader: torch.utils.data.DataLoader(dataset, batch_size=…)."
        raise BatchError(f"a batch of type {kind} cannot be used; expected {_FORMS}.{hint}")
    inputs_found = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    targets_found = [t for t in pytree.tree_leaves(targets) if isinstance(t, Tensor)]
    if not inputs_found:
        raise BatchError(f"the batch's inputs hold no tensor (found {type(args[0] if args else kwargs).__name__}).")
    size = _size(inputs_found, targets_found)
    if size == 0 or any(t.numel() == 0 for t in inputs_found):
        raise BatchError("the batch is empty: give at least one sample.")
    return Batch(args, kwargs, targets, size, flat)


def is_one(batch: Any) -> bool:
    """Whether this is one batch, and not an iterable of batches."""
    if isinstance(batch, (Mapping, Tensor, np.ndarray, Batch)) or type(batch).__module__.startswith("datasets."):
        return True
    if isinstance(batch, tuple):
        return True
    return isinstance(batch, list) and len(batch) > 1 and isinstance(batch[0], (Tensor, np.ndarray))


def first_batch(batches: Any) -> Batch:
    """A batch, or the first one of an iterable, of which no more is taken.

    Raises:
        BatchError: as :func:`one_batch`, or there is none.
    """
    if is_one(batches) or not isinstance(batches, Iterable):
        return one_batch(batches)
    with preserved():
        for item in batches:
            return one_batch(item)
    raise BatchError(NO_BATCHES)


def check_finite(names: Iterable[str], tensors: Iterable[Tensor], what: str) -> None:
    """Raise :class:`NonFiniteError` naming the first tensor that holds NaN, or infinity where it has no place.

    Buffers and inputs may be infinite: additive attention masks are. Parameters and targets may not.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach().sum())):  # one pass, mostly enough
            continue
        free = what == "buffer" or name.startswith("inputs")
        bad = int((torch.isnan(tensor) if free else ~torch.isfinite(tensor)).sum())
        if bad:
            kind = "NaN" if free else "NaN or infinite"
            raise NonFiniteError(f"{what} '{name}' holds {bad} {kind} values; curvature there is undefined.")


def _check_arguments(model: torch.nn.Module, batch: Batch) -> None:
    """A tuple of three or more is spread over the forward's arguments: they must be as many."""
    if not batch.flat:
        return
    try:
        inspect.signature(model.forward).bind(*batch.args)
    except TypeError as error:
        raise BatchError(
            f"a batch of {len(batch.args) + 1} entries is {len(batch.args)} inputs and targets, which the forward of "
            f"{type(model).__name__} does not take ({error}); expected {_FORMS}."
        ) from error
    except ValueError:
        return  # no signature to be had


def check_no_transform() -> None:
    """Raise :class:`CaptureError` where tensors have no values to be looked at."""
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        raise CaptureError(
            "a transform of torch.func or a dispatch mode (FakeTensorMode, say) is active, under which tensors have no "
            "values to be looked at: call this outside of it."
        )


def check_tensors(model: torch.nn.Module, batch: Batch) -> None:
    """Raise :class:`BatchError` for tensors without dense values: of lazy modules, sharded, sparse, or on no device."""
    own = [*model.named_parameters(), *model.named_buffers()]
    for name, x in own:
        if isinstance(x, UninitializedTensorMixin):
            raise BatchError(f"'{name}' has no size yet (a lazy module): run the model once on a batch first.")
    given = list(zip(batch.names, batch.tensors, strict=True))
    for name, x in [*own, *given]:
        if hasattr(x, "placements"):
            raise BatchError(
                f"'{name}' is {kind_of(x)}, of which this rank has a part (FSDP, tensor parallelism): give "
                "mesh= on all ranks, which gathers what fully_shard divides, or a model with whole parameters, with "
                ".full_tensor() of each, say."
            )
        if x.is_meta:
            raise BatchError(
                f"'{name}' is on the meta device, where tensors have no values: give it some (.to_empty())."
            )
        if x.layout is not torch.strided:
            raise BatchError(f"'{name}' is sparse ({x.layout}); expected a dense tensor: .to_dense().")


def check_devices(model: torch.nn.Module, batch: Batch) -> None:
    """Raise :class:`BatchError` if model and batch lie on different devices, or the batch has too many inputs."""
    _check_arguments(model, batch)
    places = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    for name, tensor in zip(batch.names, batch.tensors, strict=True):
        if places and tensor.device not in places and tensor.ndim:
            raise BatchError(
                f"'{name}' is on {tensor.device} but the model is on {sorted(map(str, places))}: move one."
            )
