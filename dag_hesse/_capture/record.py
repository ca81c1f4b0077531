"""Running the user's model: once to be recorded, once as it is, for comparison; the model comes out as it went in."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from dag_hesse._capture.advice import advice
from dag_hesse._capture.batch import Batch
from dag_hesse._capture.functions import custom_functions
from dag_hesse._capture.losses import Loss, LossTaps, evaluate
from dag_hesse._capture.recorder import Recorder
from dag_hesse._capture.state import restored
from dag_hesse._capture.taps import Tapper, map_tensors, tapping
from dag_hesse._capture.trail import Trail, is_internal
from dag_hesse._capture.writes import Written
from dag_hesse.errors import CaptureError, DagHesseError, PointError
from dag_hesse.randomness import RandomState

OUTPUT = "<output>"  # tap on the model's output; "<output>.logits" on a part of it
LOSS_INPUT = "<loss input>"
_ONE_AT_A_TIME = threading.RLock()  # runs set hooks and flags that all threads see


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


@dataclass
class Evidence:
    """What PyTorch says of a model: its loss, and the loss's gradient by parameter and by tapped tensor (per call)."""

    loss: float
    parameters: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, list[Tensor | None]] = field(default_factory=dict)
    unable: str = ""  # why autograd cannot differentiate the loss


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled and scripted code runs op by op."""
    with ExitStack() as stack:
        stack.enter_context(_scripts_by_op())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _scripts_by_op() -> Iterator[None]:
    """A scripted function that has run twice is one compiled op to autograd; a new one of the same code is not."""
    script = torch._C.ScriptFunction
    call = script.__call__

    def anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(torch._C._create_function_from_graph(self.name, self.inlined_graph.copy()), *args, **kwargs)

    script.__call__ = anew  # type: ignore[method-assign]
    try:
        yield
    finally:
        script.__call__ = call  # type: ignore[method-assign]


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as products and softmax: fused kernels cannot be differentiated twice."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _hooked(
    model: nn.Module, tapper: Tapper, enter: Callable[[str], None], leave: Callable[..., None]
) -> Iterator[None]:
    """Tap every module's output, and tell which module begins and ends."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, args: enter(name)

    def after(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            leave(name, module)
            return _tap_outputs(output, name, tapper) if name else None

        return hook

    with ExitStack() as handles:
        for name, module in model.named_modules():
            handles.callback(module.register_forward_pre_hook(before(name)).remove)
            handles.callback(module.register_forward_hook(after(name)).remove)
        yield


def _tap_outputs(output: Any, name: str, tapper: Tapper) -> Any:
    """The first floating-point tensor takes the module's name, further ones ``name:path``."""
    seen = 0

    def tapped(x: Tensor, path: str) -> Tensor:
        nonlocal seen
        if not x.is_floating_point():
            return x
        seen += 1
        return tapper.tap(x, name if seen == 1 else f"{name}:{path}")

    return map_tensors(output, tapped)


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


class Forward:
    """Model and loss on copies of the batch's tensors (one for one), in which the model may write as it likes."""

    def __init__(self, model: nn.Module, batch: Batch, loss: Loss | None, tapper: Tapper) -> None:
        leaves, spec = pytree.tree_flatten(batch.tree)
        copies = {id(x): x.detach().clone().requires_grad_(x.requires_grad) for x in leaves if isinstance(x, Tensor)}
        filled = [copies[id(x)] if isinstance(x, Tensor) else x for x in leaves]
        self.tensors = [x for x in filled if isinstance(x, Tensor)]
        self.args, self.kwargs, self.targets = pytree.tree_unflatten(filled, spec)
        self.model, self.batch, self.of, self.tapper = model, batch, loss, tapper
        self.running = type(model).__name__

    def output(self) -> Any:
        """What the model returns."""
        output = self.model(*self.args, **self.kwargs)
        return map_tensors(output, lambda x, path: self.tapper.tap(x, f"{OUTPUT}.{path}" if path else OUTPUT))

    def loss(self) -> Tensor:
        """The loss of that."""
        output = self.output()
        self.running = f"loss={getattr(self.of, '__name__', type(self.of).__name__)}" if self.of else "the loss"
        return evaluate(output, self.batch, self.targets, self.kwargs, self.of)


def _with_gradients(model: nn.Module) -> None:
    """Frozen parameters may be points too; the snapshot gives their flags back."""
    for p in model.parameters():
        if not p.requires_grad and p.is_leaf and (p.is_floating_point() or p.is_complex()):
            p.requires_grad_(True)


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
    with _ONE_AT_A_TIME, ExitStack() as stack:
        rng_before = RandomState.now()
        before = stack.enter_context(restored(model, loss))
        recorder = Recorder(dict(model.named_parameters()), dict(model.named_buffers()), before)
        recorder.anchors = everything
        if everything:
            _with_gradients(model)
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
            _hooked(model, recorder, enter, leave),
            tapping(_Taps(recorder, model)),
            torch.enable_grad(),
            _plain_attention(),
            _eager(),
            custom_functions(recorder),
            loss_taps := LossTaps(tapped),
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
    with _ONE_AT_A_TIME, ExitStack() as stack:
        before = stack.enter_context(restored(model, loss))
        before.written += [Written.of(x) for x in written]
        _with_gradients(model)
        for context in (
            _hooked(model, edges, lambda name: None, lambda name, module: None),
            tapping(edges),
            torch.enable_grad(),
            _plain_attention(),  # fused kernels draw other dropout masks
            _eager(),
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
