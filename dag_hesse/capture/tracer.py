"""Running the user's model once under fake tensors to an ATen-level fx graph, leaving the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from dag_hesse.capture.batch import Batch
from dag_hesse.capture.losses import Loss, LossInputs, evaluate
from dag_hesse.capture.tap import capturing, map_tensors
from dag_hesse.errors import CaptureError, DagHesseError, NonDeterministicError
from dag_hesse.ir import ops
from dag_hesse.randomness import preserved
from dag_hesse.rules import decompositions

OUTPUT = "<output>"  # tap on the model's output; "<output>.logits" on a part of it
LOSS_INPUT = "<loss input>"


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Give buffers, attributes and random states (PyTorch's, Python's, NumPy's) back as they were.

    Tracing may run BatchNorm's counters for real, and modules that keep what they computed would keep fake tensors.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        with preserved():
            yield
    finally:
        for module, attributes, own_buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(own_buffers)
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


@contextmanager
def _plain_backends() -> Iterator[None]:
    """Switch off what would hide ops: fused attention, oneDNN and cuDNN recurrences, MHA's inference path."""
    fast_path, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # mkldnn.flags() would also set TF32, which warns on CPU builds
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_mkldnn_enabled(onednn)


def _refuse_custom_functions(loss: Tensor) -> Tensor:
    """A trace follows the forward of a custom autograd.Function and ignores its backward: better to say no."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise CaptureError(
                f"the forward runs the custom autograd.Function '{type(node).__name__.removesuffix('Backward')}', "
                "whose own backward a trace would ignore: write it with differentiable ops instead (and switch "
                "activation checkpointing off)."
            )
        stack += [parent for parent, _ in node.next_functions]
    return loss


@contextmanager
def _hooked(model: nn.Module, called: dict[str, str]) -> Iterator[None]:
    """Tap every module's output, and note which module runs, while the context is open."""
    stack: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            stack.append(name)
            fx_traceback.current_meta["custom"] = {"module": name}

        return hook

    def leave(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            stack.pop()
            fx_traceback.current_meta["custom"] = {"module": stack[-1] if stack else ""}
            called.setdefault(name, type(module).__name__)
            return _tap_outputs(output, name) if name else None

        return hook

    with ExitStack() as handles:
        for name, module in model.named_modules():
            handles.callback(module.register_forward_pre_hook(enter(name)).remove)
            handles.callback(module.register_forward_hook(leave(name)).remove)
        yield


def _tap_outputs(output: Any, name: str) -> Any:
    """The first floating-point tensor takes the module's name, further ones ``name:path``."""
    seen = 0

    def mark(x: Tensor, path: str) -> Tensor:
        nonlocal seen
        if not x.is_floating_point():
            return x
        seen += 1
        return ops.tap(x, name if seen == 1 else f"{name}:{path}")

    return map_tensors(output, mark)


def _forward(model: nn.Module, batch: Batch, loss: Loss | None) -> Callable[..., Tensor]:
    leaves, spec = pytree.tree_flatten(batch.tree)
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def mark(x: Tensor, path: str) -> Tensor:
        return ops.tap(x, f"{OUTPUT}.{path}" if path else OUTPUT) if x.is_floating_point() else x

    def run(*tensors: Tensor) -> Tensor:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs, targets = pytree.tree_unflatten(filled, spec)
        output = map_tensors(model(*args, **kwargs), mark)
        return _refuse_custom_functions(evaluate(output, batch, targets, kwargs, loss))

    return run


def _mutations(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in gm.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def _drop_buffer_updates(gm: fx.GraphModule) -> None:
    """Remove in-place updates of buffers that nothing in this forward reads (running statistics, counters)."""
    updates = set(_mutations(gm))
    stores: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            stores.setdefault(node.target, []).append(node)
    for same in stores.values():
        users = [user for node in same for user in node.users]
        if users and all(user in updates and not user.users for user in users):
            for user in users:
                gm.graph.erase_node(user)


def _touches_derivatives(gm: fx.GraphModule) -> bool:
    """Whether an in-place op writes to more than a fresh constant that only it reads (a dropout mask being drawn)."""
    derived: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if str(node.target).startswith("aten.empty"):
            continue  # reads a shape, not values
        if node.op in ("placeholder", "get_attr") or any(parent in derived for parent in node.all_input_nodes):
            derived.add(node)
    return any(
        node.args[0] in derived or len(node.args[0].users) > 1 or not node.users  # type: ignore[union-attr]
        for node in _mutations(gm)
        if isinstance(node.args[0], fx.Node)
    )


def _functional(gm: fx.GraphModule, tensors: list[Tensor]) -> fx.GraphModule:
    """Rewrite in-place ops and writes through views into functional ops."""
    _drop_buffer_updates(gm)
    if not _touches_derivatives(gm):
        return gm
    run = fx.Interpreter(gm).run
    with fx_traceback.preserve_node_meta():
        return make_fx(
            torch.func.functionalize(lambda *t: run(*t), remove="mutations"),
            decompositions(),
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*tensors)


def _explain(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if "data-dependent" in str(error) or "data dependent" in str(error):
        return (
            "the forward branches on tensor values (an `if`, `.item()` or `.tolist()` on data), so no one graph holds "
            f"for it: {text}"
        )
    return text


def trace_forward(model: nn.Module, batch: Batch, loss: Loss | None) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace model and loss on the batch.

    Returns:
        The functional fx graph from the batch's tensors to the scalar loss (taps are ``dag_hesse.tap`` nodes), and
        the modules that ran, ``{path: class name}`` in order of completion.

    Raises:
        CaptureError: the forward cannot be traced; the message says why.
        LossError: the loss is missing or not a scalar.
    """
    called: dict[str, str] = {}
    # Tracing reads shapes, not values; views (slices of a data set, say) cannot be made fake, so stand-ins go in.
    tensors = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in batch.tensors]

    def mark(x: Tensor) -> Tensor:
        return ops.tap(x, LOSS_INPUT) if isinstance(x, Tensor) and x.is_floating_point() else x

    try:
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(_preserved(model))
            enter(_hooked(model, called))
            enter(capturing())
            enter(torch.enable_grad())
            enter(_plain_backends())
            enter(fx_traceback.preserve_node_meta())
            enter(LossInputs(mark))
            gm = make_fx(
                _forward(model, batch, loss),
                decompositions(),
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
                record_stack_traces=True,
            )(*tensors)
        with _preserved(model):
            return _functional(gm, tensors), called
    except DagHesseError:
        raise
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} could not be captured: {_explain(error)}") from error


def check_repeatable(model: nn.Module, batch: Batch, loss: Loss | None) -> None:
    """Run the forward twice from one and the same state.

    Raises:
        NonDeterministicError: the losses differ.
    """
    run, losses = _forward(model, batch, loss), list[Tensor]()
    for _ in range(2):
        with _preserved(model), torch.no_grad():
            try:
                losses.append(run(*batch.tensors))
            except (IndexError, RuntimeError):
                return  # a linearization fails on this batch too, and can say where
    first, second = losses
    if not torch.allclose(first, second, rtol=torch.finfo(first.dtype).eps ** 0.5, atol=0.0, equal_nan=True):
        raise NonDeterministicError(
            f"{type(model).__name__} gives other losses when it is run again from the same state ({float(first):.8g}, "
            f"then {float(second):.8g}), so there is no one Hessian: let its forward draw from the generators of "
            "PyTorch, Python or NumPy alone, and read no clock."
        )
