"""What a user can do about a model that fails on the batch: said from what was given, once it has failed."""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor, nn

from dag_hesse._capture.batch import Batch

TARGETS = ("targets", "target", "labels", "label", "y")  # keys of dict batches, where the forward does not take them


def taken(model: nn.Module) -> list[str] | None:
    """Names of the forward's arguments; None where it takes any, or does not say (or is no module)."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def takes_labels(model: nn.Module) -> bool:
    """Whether the forward has an argument ``labels``; of wrappers, that of the model inside."""
    inner = getattr(model, "module", None)
    base = getattr(model, "get_base_model", None)
    model = inner if isinstance(inner, nn.Module) else base() if callable(base) else model
    try:
        return "labels" in inspect.signature(model.forward).parameters
    except (AttributeError, TypeError, ValueError):
        return False


def own_labels(batch: Batch, model: nn.Module) -> bool:
    """Whether the targets are the token ids that are the input: ``(ids, ids)`` means what the model makes of labels."""
    targets, ids = batch.targets, batch.args[0] if len(batch.args) == 1 else batch.kwargs.get("input_ids")
    if not isinstance(targets, Tensor) or not isinstance(ids, Tensor) or targets.shape != ids.shape or ids.ndim < 2:
        return False
    if ids.dtype not in (torch.int32, torch.int64) or ids.is_meta or targets.device != ids.device:
        return False
    return ids.layout is torch.strided and torch.equal(targets, ids) and takes_labels(model)


def fitted(batch: Batch, model: nn.Module | None, loss: object = None) -> Batch:
    """A batch as the model takes it.

    Of a dict, what the forward does not take and is called as targets are, is the targets; inputs under one key that is
    no argument of the forward are its one input. Without a ``loss``, targets that are the input's token ids are the
    labels of a model that makes its own loss of them. Anything else stays as it is.
    """
    if model is not None and loss is None and own_labels(batch, model):
        kwargs = {**batch.kwargs, "labels": batch.targets}
        return Batch(batch.args, kwargs, None, batch.size, labelled=True)
    names = None if model is None else taken(model)
    if names is None or batch.args or batch.targets is not None:
        return batch
    foreign = [key for key in batch.kwargs if key not in names]
    own = [key for key in foreign if key in TARGETS]
    if len(own) != 1:
        return batch
    inputs = {key: value for key, value in batch.kwargs.items() if key != own[0]}
    if len(foreign) == 1:
        return Batch((), inputs, batch.kwargs[own[0]], batch.size)
    if len(inputs) == 1 and len(foreign) == 2 and names:
        return Batch(tuple(inputs.values()), {}, batch.kwargs[own[0]], batch.size)
    return batch


def advice(model: nn.Module, batch: Batch, error: Exception) -> str:
    """A sentence to end the error with; empty where nothing is known."""
    text = str(error)
    found = re.search(r"unexpected keyword argument '(\w+)'", text)
    if found and found[1] in batch.kwargs:
        names = ", ".join(taken(model) or ()) or "other names"
        return (
            f" The forward takes {names}, and the batch's keys are {', '.join(map(str, batch.kwargs))}: give (inputs, "
            "targets), or a dict of what the forward takes."
        )
    if "index out of range" in text or "out of bounds" in text:
        return _of_indices(model, batch)
    if "dtype" in text or "expected scalar type" in text or "type " in text:
        return _of_types(model, batch)
    return ""


def _of_types(model: nn.Module, batch: Batch) -> str:
    """Inputs of another floating-point type than the parameters, or integers before a layer of products."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(types) != 1:
        return ""
    (own,) = types
    for name, x in zip(batch.names, batch.tensors, strict=True):
        if name.startswith("inputs") and x.dtype != own and (x.is_floating_point() or not _embeds(model)):
            return f" '{name}' is {x.dtype}, and the model's parameters are {own}: give {name.split('[')[0]}.to({own})."
    return ""


def _embeds(model: nn.Module) -> bool:
    return any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in model.modules())


def _of_indices(model: nn.Module, batch: Batch) -> str:
    """Integer inputs beyond the tables of a model."""
    sizes = {n: m.num_embeddings for n, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    for name, x in zip(batch.names, batch.tensors, strict=True):
        if not sizes or x.is_floating_point() or x.dtype is torch.bool or not x.numel():
            continue
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= min(sizes.values()):
            tables = ", ".join(f"'{n}' has {size} rows" for n, size in list(sizes.items())[:3])
            return f" '{name}' holds indices from {low} to {high}, and {tables}."
    return ""
