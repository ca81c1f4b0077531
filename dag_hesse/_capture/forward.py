"""Running model and loss on copies of a batch: what holds while they run, recorded or not."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from dag_hesse._capture.batch import Batch
from dag_hesse._capture.losses import Loss, evaluate
from dag_hesse._capture.taps import Tapper, map_tensors

OUTPUT = "<output>"  # tap on the model's output; "<output>.logits" on a part of it
ONE_AT_A_TIME = threading.RLock()  # runs set hooks and flags that all threads see


@contextmanager
def eager() -> Iterator[None]:
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
def plain_attention() -> Iterator[None]:
    """Attention as products and softmax: fused kernels cannot be differentiated twice."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def hooked(
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


def with_gradients(model: nn.Module) -> None:
    """Frozen parameters may be points too; the snapshot gives their flags back."""
    for p in model.parameters():
        if not p.requires_grad and p.is_leaf and (p.is_floating_point() or p.is_complex()):
            p.requires_grad_(True)
