"""What PyTorch itself says of a model: losses, gradients and products of runs that are not recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dag_hesse._capture.batch import Batch
from dag_hesse._capture.forward import ONE_AT_A_TIME, Forward, eager, hooked, plain_attention, with_gradients
from dag_hesse._capture.losses import Loss, LossTaps
from dag_hesse._capture.state import restored
from dag_hesse._capture.taps import tapping
from dag_hesse._capture.writes import Written
from dag_hesse.errors import CaptureError


@dataclass
class Evidence:
    """What PyTorch says of a model: its loss, and the loss's gradient by parameter and by tapped tensor (per call)."""

    loss: float
    parameters: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, list[Tensor | None]] = field(default_factory=dict)
    unable: str = ""  # why autograd cannot differentiate the loss


class _Edges:
    """Notes where in autograd's graph tapped tensors are."""

    def __init__(self) -> None:
        self.found: dict[str, list[GradientEdge | None]] = {}

    def tap(self, x: Tensor, name: str) -> Tensor:
        """Note ``x``, and return an alias: a module that returns what it is given has an edge of its own."""
        plain = not torch._C._functorch.is_functorch_wrapped_tensor(x)
        if torch.is_grad_enabled() and (x.is_floating_point() or x.is_complex()):
            known = plain and x.requires_grad and x.grad_fn is not None
            x = torch.ops.aten.alias.default(x) if known else x
            self.found.setdefault(name, []).append(get_gradient_edge(x) if known else None)
        return x


@contextmanager
def as_it_is(
    model: nn.Module,
    batch: Batch,
    loss: Loss | None,
    written: Sequence[Tensor],
    edges: _Edges | None = None,
) -> Iterator[Forward]:
    """Run model and loss without recording them; whatever they change is given back at the end.

    ``written`` are the tensors that a recording saw the forward write to.
    """
    edges = edges or _Edges()
    with ONE_AT_A_TIME, ExitStack() as stack:
        before = stack.enter_context(restored(model, loss))
        before.written += [Written.of(x) for x in written]
        with_gradients(model)
        for context in (
            hooked(model, edges, lambda name: None, lambda name, module: None),
            tapping(edges),
            torch.enable_grad(),
            plain_attention(),  # fused kernels draw other dropout masks
            eager(),
            LossTaps(lambda x: x),
        ):
            stack.enter_context(context)  # type: ignore[arg-type]
        yield Forward(model, batch, loss, edges)


def slope(
    model: nn.Module, batch: Batch, loss: Loss | None, along: dict[str, Tensor], step: float, written: list[Tensor]
) -> float:
    """The derivative of the model's own loss along a direction in its parameters, by central differences."""
    ends = ({name: signed * v for name, v in along.items()} for signed in (step, -step))
    high, low = (loss_at(model, batch, loss, moves, written) for moves in ends)
    return (high - low) / (2 * step)


def loss_at(
    model: nn.Module, batch: Batch, loss: Loss | None, moves: dict[str, Tensor], written: list[Tensor]
) -> float:
    """The model's own loss with its parameters moved; they come back to the bit."""
    own = dict(model.named_parameters())
    with as_it_is(model, batch, loss, [*written, *own.values()]) as forward:
        for name, v in moves.items():
            own[name].data.add_(v)
        return float(forward.loss().detach())


def product(
    model: nn.Module, batch: Batch, loss: Loss | None, along: dict[str, Tensor], written: list[Tensor]
) -> dict[str, Tensor]:
    """The Hessian of the model's own loss by its parameters times a direction, by double-backward.

    Raises:
        CaptureError: autograd has no second derivative of the loss.
    """
    with as_it_is(model, batch, loss, written) as forward:
        places = [dict(model.named_parameters())[name] for name in along]
        try:
            first = torch.autograd.grad(forward.loss(), places, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(first, along.values(), strict=True) if g is not None and g.requires_grad]
            terms = [(g * v).sum() for g, v in pairs]
            found = torch.autograd.grad(sum(terms), places, allow_unused=True) if terms else [None] * len(places)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise CaptureError(
                f"verify='product' needs autograd's second derivatives, and it has none here: {error}"
            ) from error
    filled = (torch.zeros_like(p) if h is None else h for p, h in zip(places, found, strict=True))
    return dict(zip(along, filled, strict=True))


def gradients(
    model: nn.Module,
    batch: Batch,
    loss: Loss | None,
    names: list[str],
    written: list[Tensor],
    *,
    on_tape: bool = False,
) -> Evidence:
    """The model's own loss on the batch, and its gradient by all parameters and by the tapped tensors ``names``.

    ``written`` are the tensors that a recording saw the forward write to.

    ``unable`` of the result says why autograd cannot differentiate the loss, where it cannot.
    """
    edges = _Edges()
    with as_it_is(model, batch, loss, written, edges) as forward:
        value = forward.loss()
        evidence = Evidence(float(value.detach()))
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        places = [(name, k, e) for name in names for k, e in enumerate(edges.found.get(name, ())) if e is not None]
        if not value.requires_grad or not (own or places):
            return evidence
        wanted: Any = [*own.values(), *(e for *_, e in places)]
        try:
            found = torch.autograd.grad(value, wanted, allow_unused=True, create_graph=on_tape)
        except RuntimeError as error:
            evidence.unable = str(error).split("\n")[0]
            return evidence
    for (name, p), g in zip(own.items(), found, strict=False):
        evidence.parameters[name] = torch.zeros_like(p) if g is None else g.detach()
    for (name, k, _), g in zip(places, found[len(own) :], strict=True):
        calls = evidence.taps.setdefault(name, [None] * len(edges.found[name]))
        calls[k] = None if g is None else g.detach()
    return evidence
