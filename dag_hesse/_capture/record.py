"""Running the user's model to record it; the model comes out as it went in."""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dag_hesse._capture.advice import advice
from dag_hesse._capture.batch import Batch
from dag_hesse._capture.forward import ONE_AT_A_TIME, Forward, eager, hooked, plain_attention, with_gradients
from dag_hesse._capture.functions import custom_functions
from dag_hesse._capture.losses import Loss, LossTaps
from dag_hesse._capture.recorder import Recorder
from dag_hesse._capture.state import restored
from dag_hesse._capture.taps import Tapper, tapping
from dag_hesse._capture.trail import Trail, is_internal
from dag_hesse.errors import CaptureError, DagHesseError, PointError
from dag_hesse.randomness import RandomState

LOSS_INPUT = "<loss input>"


@dataclass
class Recording:
    """A model's forward as it ran: nodes, the node of the loss, its value, and what was written to on the way.

    ``rng_before`` and ``rng_after`` are the random states before and after it.
    """

    trail: Trail
    loss: int
    value: float
    written: list[Tensor]
    rng_before: RandomState
    rng_after: RandomState


class _Taps:
    """What :func:`~dag_hesse.tap` is given: a name that a module or a parameter has would stand for two tensors."""

    def __init__(self, tapper: Tapper, model: nn.Module) -> None:
        self.tapper = tapper
        self.kinds = dict.fromkeys(dict(model.named_parameters()), "parameter")
        self.kinds |= {name: "module" for name, _ in model.named_modules() if name}

    def tap(self, x: Tensor, name: str) -> Tensor:
        """Tap ``x``, unless the name is taken."""
        if name in self.kinds:
            raise PointError(f"tap '{name}' has the name of a {self.kinds[name]}: give it another one.")
        return self.tapper.tap(x, name)


def record(model: nn.Module, batch: Batch, loss: Loss | None) -> Recording:
    """Run model and loss on the batch, and record what happens.

    Raises:
        CaptureError: the forward fails, or does what cannot be recorded; the message says what and where.
        LossError: the loss is missing or not a scalar.
    """
    # Where derivatives start at tapped constants and at frozen parameters too, a model may stumble over them.
    try:
        return _record(model, batch, loss, everything=True)
    except DagHesseError:
        raise
    except Exception:
        return _record(model, batch, loss, everything=False)


def _where(error: Exception) -> str:
    """The innermost line of the user's own code that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{f.filename}:{f.lineno}" for f in frames if not is_internal(f.filename)]
    return f" at {own[-1]}" if own else ""


def _record(model: nn.Module, batch: Batch, loss: Loss | None, *, everything: bool) -> Recording:
    with ONE_AT_A_TIME, ExitStack() as stack:
        rng_before = RandomState.now()
        before = stack.enter_context(restored(model, loss))
        recorder = Recorder(dict(model.named_parameters()), dict(model.named_buffers()), before)
        recorder.anchors = everything
        if everything:
            with_gradients(model)
        forward = Forward(model, batch, loss, recorder)
        for position, x in enumerate(forward.tensors):
            recorder.input(x, position)
        owners: list[str] = []

        def enter(name: str) -> None:
            owners.append(name)
            recorder.trail.owner = name

        def leave(name: str, module: nn.Module) -> None:
            owners.pop()
            recorder.trail.owner = owners[-1] if owners else ""
            recorder.trail.modules.setdefault(name, type(module).__name__)

        def tapped(x: Tensor) -> Tensor:
            return recorder.tap(x, LOSS_INPUT) if isinstance(x, Tensor) else x

        for context in (
            hooked(model, recorder, enter, leave),
            tapping(_Taps(recorder, model)),
            torch.enable_grad(),
            plain_attention(),
            eager(),
            custom_functions(recorder),
            loss_taps := LossTaps(tapped, recorder.looked_at),
            recorder,
        ):
            stack.enter_context(context)  # type: ignore[arg-type]
        try:
            value = forward.loss()
        except DagHesseError:
            raise
        except Exception as error:
            if everything:
                raise
            text, op = str(error).strip().split("\n")[0], f" ({recorder.running})" if recorder.running else ""
            raise CaptureError(
                f"{forward.running} fails{_where(error)}{op}: {type(error).__name__}: {text.removesuffix('.')}."
                + advice(model, batch, error)
            ) from error
        rng_after = RandomState.now()
        recorder.trail.batch_bound |= (recorder.numbers and loss_taps.left_torch) or rng_before.drew_outside(rng_after)
        node = recorder.use(value)
        with recorder.pause():
            number = float(value.detach())
        return Recording(recorder.trail, node, number, [w.tensor for w in before.written], rng_before, rng_after)
