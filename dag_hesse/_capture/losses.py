"""Which loss is meant, and which tensors it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dag_hesse._capture.batch import Batch
from dag_hesse.errors import LossError, OptionError, kind_of

Loss = Callable[[Any, Any], Tensor]

RECOGNIZED = frozenset(
    {
        F.cross_entropy,
        F.nll_loss,
        F.mse_loss,
        F.l1_loss,
        F.huber_loss,
        F.smooth_l1_loss,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.kl_div,
        F.gaussian_nll_loss,
        F.poisson_nll_loss,
        F.cosine_embedding_loss,
        F.soft_margin_loss,
        F.multilabel_soft_margin_loss,
    }
)


def check_loss(loss: Any) -> None:
    """Raise :class:`OptionError` for what is no loss: a name, or a class of which none was made."""
    if isinstance(loss, type):
        raise OptionError(f"loss is the class {loss.__name__}; expected a callable made of it: {loss.__name__}().")
    if loss is not None and not callable(loss):
        raise OptionError(
            f"loss={loss!r} is {kind_of(loss)}; expected callable(output, targets) -> scalar tensor, as "
            "torch.nn.functional.cross_entropy."
        )


def loss_text(loss: Any, batch: Batch) -> str:
    """Which loss is meant, in words: for reports."""
    if loss is not None:
        return str(getattr(loss, "__name__", None) or type(loss).__name__)
    if batch.labelled:
        return "the model's own: targets that are its inputs are its labels"
    if batch.targets is None:
        return "the model's own"
    floating = isinstance(batch.targets, Tensor) and batch.targets.is_floating_point()
    kind = "mean squared error" if floating else "cross-entropy"
    return f"{kind}, as targets are {'floating-point numbers' if floating else 'integers'}"


def field(output: Any, name: str) -> Any:
    """``output.name`` or ``output[name]``, None where there is neither."""
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None) if not isinstance(output, Tensor) else None


def prediction(output: Any) -> Tensor:
    """The tensor of a model's output that an inferred loss is applied to."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "prediction", "output", "out"):
        if isinstance(found := field(output, name), Tensor):
            return found
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, (tuple, list)) and values and isinstance(values[0], Tensor):
        return values[0]
    raise LossError(f"no loss can be inferred for a model output of type {type(output).__name__}: pass loss=.")


def own_loss(output: Any) -> Tensor | None:
    """The loss that the model computed itself, if it did."""
    if isinstance(found := field(output, "loss"), Tensor):
        return found
    if isinstance(output, Tensor) and output.numel() == 1 and output.is_floating_point():
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor) and output[0].ndim == 0:
        return output[0]
    return None


def inferred(output: Any, targets: Any) -> Tensor:
    """Cross-entropy for integer targets, mean squared error for floating-point ones (design §5)."""
    predicted = prediction(output)
    if not isinstance(targets, Tensor):
        raise LossError(f"no loss can be inferred for targets of type {type(targets).__name__}: pass loss=.")
    if targets.is_floating_point():
        if predicted.shape != targets.shape:
            raise LossError(
                f"mean squared error needs equal shapes, got output {tuple(predicted.shape)} and targets "
                f"{tuple(targets.shape)}: reshape one, or pass loss=."
            )
        return F.mse_loss(predicted, targets)
    if targets.dtype is torch.bool:
        raise LossError("targets are bool: give integers (classes) or floating-point numbers, or pass loss=.")
    targets = targets.long()
    places, channels = predicted.shape[:-1], (*predicted.shape[:1], *predicted.shape[2:])
    if predicted.ndim > 2 and targets.shape == places == channels:
        raise LossError(
            f"output {tuple(predicted.shape)} may have its classes along axis 1, as F.cross_entropy has them, or along "
            f"the last, as language models do; targets {tuple(targets.shape)} fit both: pass loss=."
        )
    if predicted.ndim > 2 and targets.shape == places:  # (batch, positions, classes)
        return F.cross_entropy(predicted.flatten(0, -2), targets.flatten())
    if predicted.ndim < 2 or targets.shape != channels:
        raise LossError(
            f"cross-entropy (integer targets) needs output (batch, classes, …) and targets (batch, …), got "
            f"{tuple(predicted.shape)} and {tuple(targets.shape)}: pass loss=, or floating-point targets."
        )
    return F.cross_entropy(predicted, targets)


def evaluate(output: Any, batch: Batch, targets: Any, kwargs: dict[str, Any], loss: Loss | None) -> Tensor:
    """Apply the user's, the model's or the inferred loss.

    Raises:
        LossError: there is none, or it is not a scalar tensor.
    """
    if loss is not None:
        value: Any = loss(output, kwargs if batch.targets is None and kwargs else targets)
    elif batch.targets is None:
        value = own_loss(output)
        if value is None:
            raise LossError(
                f"the batch has no targets and the model's output ({type(output).__name__}) no loss: pass loss=, "
                "give targets, or include labels in the batch."
            )
    else:
        value = inferred(output, targets)
    if not isinstance(value, Tensor):
        raise LossError(f"the loss is {kind_of(value)}; expected a scalar tensor.")
    if value.numel() != 1:
        raise LossError(f"the loss has shape {tuple(value.shape)}; expected a scalar: reduce it (.mean() or .sum()).")
    if not value.is_floating_point():
        raise LossError(f"the loss has dtype {value.dtype}; expected floating point.")
    return value.reshape(())


_OF_CLASSES = frozenset({F.cross_entropy, F.nll_loss})


def _check_classes(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, *_: Any, **__: Any
) -> None:
    """Raise :class:`LossError` for labels that are no classes: some devices crash on them."""
    plain = all(
        isinstance(x, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (input, target)
    )
    if not plain or target.is_floating_point() or target.is_meta or not target.numel() or not input.ndim:
        return
    classes = input.shape[min(1, input.ndim - 1)]
    with _disable_current_modes():
        labels = target.detach()[target.detach() != ignore_index]
        low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise LossError(
            f"targets hold labels from {low} to {high}, and the output has {classes} classes (along its axis "
            f"{min(1, input.ndim - 1)}): expected 0 to {classes - 1}, or ignore_index={ignore_index}."
        )


# Values leave by these, unseen by a dispatch mode.
_WAYS_OUT = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__reduce_ex__})
_SPLITS = frozenset({torch.tensor_split, Tensor.tensor_split})  # likewise those of the second argument
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


class LossTaps(torch.overrides.TorchFunctionMode):
    """Taps what recognised loss functions are given, and keeps recurrent layers from kernels that hide their ops.

    ``looked_at`` is called with tensors whose values leave PyTorch.
    """

    def __init__(self, tap: Callable[[Tensor], Tensor], looked_at: Callable[[Tensor], None] = lambda x: None) -> None:
        super().__init__()
        self.tap, self.looked_at = tap, looked_at
        self.left_torch = False  # whether the model took values out of PyTorch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RECOGNIZED:
            if func in _OF_CLASSES:
                _check_classes(*args, **kwargs)
            if args:
                args = (self.tap(args[0]), *args[1:])
            elif isinstance(kwargs.get("input"), Tensor):
                kwargs = {**kwargs, "input": self.tap(kwargs["input"])}
        elif func in _WAYS_OUT:
            self.left_torch = True
            self.looked_at(args[0])
        elif func in _SPLITS:
            for x in (*args[1:], *kwargs.values()):
                if isinstance(x, Tensor):
                    self.looked_at(x)
        elif func in _RECURRENT:
            with _plain_recurrences():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _plain_recurrences() -> Iterator[None]:
    """Without oneDNN's and cuDNN's recurrent layers: those are one op each, and cannot be differentiated twice."""
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # mkldnn.flags() would also set TF32, which warns on CPU builds
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
