"""Which implementation of a kernel runs: the first that does not refuse; a refusal has a reason, and is told once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from dag_hesse.errors import OptionError, out_of_memory
from dag_hesse.kernels.arena import Arena

_LOG = logging.getLogger("dag_hesse")
_FORCED = "DAG_HESSE_KERNELS"  # "contraction.product=reference,layout=torch"
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


KERNELS: dict[str, Kernel[..., Any]] = {}  # by name, as they are made
_DEFINED = ContextVar("as it is defined", default=False)


def _never(*args: Any, **options: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run a kernel: ``run(arena, *args)``, unless ``refuse(*args)`` says why it cannot.

    ``compiled``: it is compiled as it is called, and that may fail. ``traced``: ops of torch that a compiler takes
    over as they are, so that compiled programs hold it rather than the reference.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = _never
    compiled: bool = False
    traced: bool = False


@dataclass
class Kernel(Generic[Arguments, Result]):
    """A function with a definition in plain torch, ``reference(arena, *args)``, and faster implementations of it.

    Called with an arena and its arguments, it runs the first implementation that does not refuse them, or the
    reference. ``DAG_HESSE_KERNELS=name=implementation,…`` forces one.

    Examples:
        >>> import torch
        >>> from dag_hesse.kernels.arena import SYSTEM
        >>> def double(arena, x): return x + x
        >>> def refuse(x): return None if x.numel() < 4 else "it is large"
        >>> kernel = Kernel("double", double, (Implementation("small", lambda arena, x: 2 * x, refuse),))
        >>> kernel(SYSTEM, torch.ones(5)).sum(), kernel.refusals
        (tensor(10.), {'small': {'it is large': 1}})
        >>> _ = KERNELS.pop("double")
    """

    name: str
    reference: Callable[Concatenate[Arena, Arguments], Result]
    implementations: tuple[Implementation, ...] = ()
    writes: int = 0  # arguments that it may write to and return: a buffer that is added to
    refusals: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # implementations that failed once, and are left out since

    def __post_init__(self) -> None:
        KERNELS[self.name] = self
        self._chosen = self._ordered(forced().get(self.name))

    def __call__(self, arena: Arena, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
        traced = _DEFINED.get()
        for one in self._chosen:
            if traced and not one.traced:
                continue
            reason = self._reason(one, *args, **options)
            if reason is not None:
                self._refused(one.name, reason)
                continue
            try:
                found: Result = one.run(arena, *args, **options)
            except Exception as error:
                if not one.compiled or out_of_memory(error):
                    raise
                self._failed(one.name, error)
                continue
            return found
        return self.reference(arena, *args, **options)

    def refusal(self, *args: Any, **options: Any) -> str | None:
        """Why none of the implementations runs with these arguments; None if one does."""
        reasons = [self._reason(one, *args, **options) for one in self._chosen]
        if None in reasons:
            return None
        return (
            "; ".join(f"{one.name}: {why}" for one, why in zip(self._chosen, reasons, strict=True)) or "none is chosen"
        )

    def _reason(self, one: Implementation, *args: Any, **options: Any) -> str | None:
        return self.failures.get(one.name) or one.refuse(*args, **options)

    def _failed(self, name: str, error: Exception) -> None:
        text = f"it failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        self.failures[name] = text
        _LOG.warning("kernel %s: %s is left out from now on, as %s", self.name, name, text)

    def _ordered(self, name: str | None) -> tuple[Implementation, ...]:
        if name is None:
            return self.implementations
        found = tuple(one for one in self.implementations if one.name == name)
        if not found and name != "reference":
            have = ", ".join(["reference", *(one.name for one in self.implementations)])
            raise OptionError(f"{_FORCED}: the kernel '{self.name}' has no implementation '{name}'; it has {have}.")
        return found

    def _refused(self, name: str, reason: str) -> None:
        counts = self.refusals.setdefault(name, {})
        if reason not in counts:
            _LOG.info("kernel %s: %s refuses: %s", self.name, name, reason)
        counts[reason] = counts.get(reason, 0) + 1


@contextmanager
def as_defined() -> Iterator[None]:
    """Every kernel runs by its reference, or what may be traced in its place: what is traced is plain torch."""
    token = _DEFINED.set(True)
    try:
        yield
    finally:
        _DEFINED.reset(token)


def forced() -> Mapping[str, str]:
    """Kernels whose implementation the environment names.

    Raises:
        OptionError: the variable is no list of ``kernel=implementation``.
    """
    pairs = [entry.strip().split("=") for entry in os.environ.get(_FORCED, "").split(",") if entry.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise OptionError(f"{_FORCED}={os.environ[_FORCED]!r}; expected kernel=implementation, separated by commas.")
    return dict(pairs)  # type: ignore[arg-type]


def check_forced() -> None:
    """See that the environment names kernels that there are.

    Raises:
        OptionError: one of them is none.
    """
    unknown = sorted(set(forced()) - set(KERNELS))
    if unknown:
        raise OptionError(f"{_FORCED}: there is no kernel {unknown[0]!r}; there are {', '.join(sorted(KERNELS))}.")


def refusals() -> Iterator[tuple[str, str, str, int]]:
    """(kernel, implementation, reason, how often) of all refusals so far."""
    for name, kernel in sorted(KERNELS.items()):
        for implementation, reasons in kernel.refusals.items():
            for reason, count in reasons.items():
                yield name, implementation, reason, count


def failures() -> list[str]:
    """Implementations that failed to compile or to launch so far, and why."""
    return [f"{name}, {one}: {why}" for name, kernel in sorted(KERNELS.items()) for one, why in kernel.failures.items()]


__all__ = ["KERNELS", "Implementation", "Kernel", "as_defined", "check_forced", "failures", "forced", "refusals"]
