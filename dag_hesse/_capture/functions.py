"""Custom ``autograd.Function``s during a recording: one opaque node each, differentiated through their own backward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils.checkpoint import CheckpointFunction

from dag_hesse._capture.recorder import Recorder


def _of_library(cls: Any) -> OpOverload | None:
    """The op that PyTorch made an ``autograd.Function`` for (``torch.library.register_autograd``)."""
    if not cls.__name__.startswith("GeneratedBackwardFor_"):
        return None
    cells = [cell.cell_contents for cell in getattr(cls.forward, "__closure__", None) or ()]
    return next((x for x in cells if isinstance(x, OpOverload)), None)


@contextmanager
def custom_functions(recorder: Recorder) -> Iterator[None]:
    """Tell ``recorder`` of the functions that this thread applies; others go their way.

    ``Function.apply`` itself may be in users' hands already, so what it calls is exchanged.
    """
    thread = threading.get_ident()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = super(_SingleLevelFunction, cls).apply
        if threading.get_ident() != thread or recorder.paused or torch._C._are_functorch_transforms_active():
            return run(*args, **kwargs)
        if cls is CheckpointFunction:  # it would run the same without gradients, and again with them when they come
            return args[0](*args[2:])
        if cls is BackwardHookFunction:
            return recorder.copies(run, args)
        op = _of_library(cls)
        if op is not None:  # its last argument is PyTorch's, with the op's keywords in it
            return recorder.function(op, args[:-1], lambda: run(*args, **kwargs), args[-1].keyword_only_args)
        return recorder.function(cls.apply, args, lambda: run(*args, **kwargs))

    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]
