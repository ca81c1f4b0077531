"""What ranks of one problem must have alike, as texts and numbers that they exchange and compare."""

from __future__ import annotations

import functools
import zlib
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PIECE = 1 << 18  # elements that are looked at together
_ODD = 0x5851F42D4C957F2D  # any odd number that mixes well


def content(x: Tensor) -> str:
    """Type, shape and a checksum of a tensor's bits: another order of the same numbers has another one.

    It is a weighted sum of 32-bit words modulo 2^64, so it is the same on all devices.

    >>> x = torch.arange(4.0)
    >>> content(x) == content(x.clone()), content(x) == content(x.flip(0)), content(x) == content(-x)
    (True, False, False)
    """
    x = x.detach().resolve_conj().resolve_neg().contiguous()
    raw = x.reshape(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 4 else raw  # words begin at multiples of their size
    words = raw.view(torch.int32) if raw.numel() % 4 == 0 else raw
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for piece in words.split(_PIECE):
        total = total * _ODD + (piece.long() * _weights(x.device)[: len(piece)]).sum()
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} with bits {int(total) % 2**64:016x}"


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, so that no change of one word is lost."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**62), 2**62, (_PIECE,), generator=generator, dtype=torch.int64, device="cpu")
    return (2 * drawn + 1).to(device)


def described(value: Any) -> str:
    """An option in words that ranks can compare: what it is, what it holds, or what it is called.

    >>> described({"k": 1, "v0": None, "loss": torch.nn.functional.mse_loss})
    "{'k': 1, 'v0': None, 'loss': torch.nn.functional.mse_loss}"
    """
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        return described(torch.from_numpy(np.array(value)))
    if isinstance(value, Tensor):
        return content(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {described(item)}' for key, item in value.items())}}}"
    plain = value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype))
    return repr(value) if plain else named(value)


def named(function: Any) -> str:
    """What a callable is called, what is set in it, and a checksum of its own code; not what it closes over.

    >>> named(functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.1))
    'torch.nn.functional.cross_entropy(label_smoothing=0.1)'
    """
    if isinstance(function, functools.partial):
        options = [described(item) for item in function.args]
        options += [f"{key}={described(item)}" for key, item in sorted(function.keywords.items())]
        return f"{named(function.func)}({', '.join(options)})"
    if isinstance(function, nn.Module):
        held = {**dict(function.named_parameters()), **dict(function.named_buffers())}
        parts = [*of_modules(function).values(), *(f"{name} {content(x)}" for name, x in held.items())]
        return "; ".join(parts)
    kind = function if hasattr(function, "__qualname__") else type(function)
    code: Any = getattr(getattr(function, "__func__", function), "__code__", None)
    own = isinstance(code, CodeType) and not _is_torchs(kind)
    return f"{kind.__module__}.{kind.__qualname__}" + (f" with code {_checksum(code):08x}" if own else "")


def of_modules(model: nn.Module) -> dict[str, str]:
    """Per module: class, settings (of PyTorch's own classes) or code of its forward, and training flag."""
    return {f"module '{name}'" if name else "the model": _of_module(each) for name, each in model.named_modules()}


def _of_module(module: nn.Module) -> str:
    kind = type(module)
    code = getattr(kind.forward, "__code__", None)
    detail = module.extra_repr() if _is_torchs(kind) else "" if code is None else f"code {_checksum(code):08x}"
    return f"{kind.__qualname__}({detail}) in {'training' if module.training else 'evaluation'} mode"


def _is_torchs(kind: Any) -> bool:
    return str(kind.__module__).split(".")[0] == "torch"


def _checksum(code: CodeType) -> int:
    """Of what a function does: its instructions, names and constants, and those of functions inside it."""
    found = zlib.crc32(repr((code.co_names, code.co_varnames)).encode(), zlib.crc32(code.co_code))
    for item in code.co_consts:
        if isinstance(item, CodeType):
            found = zlib.crc32(_checksum(item).to_bytes(4, "little"), found)
        else:  # sets have no order of their own
            found = zlib.crc32(repr(sorted(map(repr, item)) if isinstance(item, frozenset) else item).encode(), found)
    return found
