"""Typed errors: each says what was received, what was expected and what to do."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch


class DagHesseError(Exception):
    """Base class of every error raised by this package."""


class CaptureError(DagHesseError):
    """The model and loss could not be turned into one graph."""


class UnfaithfulCaptureError(CaptureError):
    """The captured graph's loss or gradient is not the model's own."""


class NonDeterministicError(DagHesseError, RuntimeError):
    """The model gives other values when it is run again from the same state."""


class LossError(DagHesseError, ValueError):
    """The loss is missing, not a scalar, or not finite."""


class BatchError(DagHesseError, ValueError):
    """The batch has a form, a size or a device that cannot be used."""


class UnstableLoaderError(BatchError):
    """A loader that is iterated in every pass gives other batches than it gave in the first."""


class ReductionError(BatchError):
    """How the losses of several batches add up to one loss cannot be told from the loss."""


class NonFiniteError(DagHesseError, ValueError):
    """A parameter, a buffer, the batch or the right-hand side of ``solve()`` holds NaN or infinity."""


class PointError(DagHesseError, ValueError):
    """A point, block or parameter that was asked for does not exist, or is not on a differentiable path to the loss."""


class NonDifferentiableError(PointError):
    """The only paths from a point to the loss run through an op that has no derivative."""


class BatchCouplingError(DagHesseError, ValueError):
    """``batch_mode="per_sample"`` was asked of a model whose samples interact."""


class OptionError(DagHesseError, ValueError):
    """An argument has another type than it may have, or a value that is not among its choices."""


class UnknownOptionError(OptionError, TypeError):
    """A function was given an option that it does not have; the message names the nearest that it has."""


class VectorError(DagHesseError, ValueError):
    """A vector's size, type, device or keys do not fit the operator."""


class StaleError(DagHesseError, RuntimeError):
    """What an operator or a report was made from has changed, or is not with it any more (a loaded report)."""


class ConvergenceError(DagHesseError, RuntimeError):
    """Eigenvalues were not found to the accuracy that was asked for, in as many products as were allowed."""


class CompileError(DagHesseError, RuntimeError):
    """``compile=True`` was asked of a model whose products cannot be one compiled program."""


class RankError(DagHesseError, RuntimeError):
    """Another rank of ``torch.distributed`` failed, or does not answer."""


class MissingFileError(DagHesseError, FileNotFoundError):
    """There is no such file."""


class WriteError(DagHesseError, OSError):
    """A file cannot be written."""


class ReportFileError(DagHesseError, ValueError):
    """A file is not a report of this package."""


class BlockFileError(DagHesseError, ValueError):
    """A file is not a block matrix of this package, is cut short, or has a newer format."""


class DatasetError(DagHesseError, ValueError):
    """A file of a data set has another size or content than it must have."""


class ExperimentError(DagHesseError, ValueError):
    """Results that are there belong to another run than the one asked for."""


class DependencyError(DagHesseError, ImportError):
    """An optional library that a feature runs on is not installed."""


class MemoryBudgetError(DagHesseError, MemoryError):
    """An exact result would not fit into the memory allowed."""


class GraphError(DagHesseError, AssertionError):
    """A stage produced a graph that breaks the IR's rules (a bug in this package: please report it)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device has run out of memory."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "not enough memory" in str(error)


def suggest(name: str, known: Iterable[str], limit: int = 4) -> str:
    """Return a sentence naming the known names nearest to ``name``.

    >>> suggest("layre1", ["layer1", "layer2", "head"])
    "Near names: 'layer1', 'layer2'."
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    names = near or known[:limit]
    head = "Near names" if near else "Known names begin with"
    return f"{head}: {', '.join(repr(n) for n in names)}." if names else "There are no names to choose from."


def is_integer(value: object) -> bool:
    """Whether this is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def integer(option: str, value: Any, least: int | None = None, why: str = "") -> int:
    """``value`` as Python's int.

    Raises:
        OptionError: it is no integer, beyond 64 bits, or less than ``least``; ``why`` that is too little.

    >>> import numpy as np
    >>> integer("probes", np.int64(32), least=2)
    32
    """
    if not is_integer(value) or (least is not None and value < least) or abs(int(value)) >= 2**63:
        received = f"{option}={value!r}" + ("" if is_integer(value) else f" is {kind_of(value)}")
        bound = " of 64 bits" if is_integer(value) and abs(int(value)) >= 2**63 else ""
        bound += "" if least is None else f" of at least {least}"
        raise OptionError(f"{received}; expected an integer{bound}{f' ({why})' if why else ''}.")
    return int(value)


def kind_of(value: object) -> str:
    """The type of a value, with its article.

    >>> kind_of(3), kind_of("3")
    ('an int', 'a str')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def flag(option: str, value: Any) -> bool:
    """``value``, which is True or False.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{option}={value!r} is {kind_of(value)}; expected True or False.")
    return value


def several(option: str, value: Any, expected: str) -> list[Any]:
    """What ``value`` holds.

    Raises:
        OptionError: it holds nothing: a class, a number, a tensor without axes.

    >>> several("points", ("a", "b"), "names")
    ['a', 'b']
    """
    try:
        return list(value)
    except TypeError as error:
        raise OptionError(f"{option} is {kind_of(value)}; expected {expected}.") from error


def takes(option: str, function: Any, arguments: str) -> None:
    """Raise :class:`OptionError` for a callable that does not take so many arguments, as ``"name, parameter"``.

    >>> takes("progress", print, "stage, done, total")
    """
    try:
        inspect.signature(function).bind(*arguments.split(", "))
    except TypeError as error:
        raise OptionError(f"{option}={function!r} does not take ({arguments}): {error}.") from error
    except ValueError:  # builtins without a signature
        return


def position(name: Any, names: Sequence[str], where: str) -> int:
    """The place of a point that is given by its name or by its place (negative: from the end).

    Raises:
        PointError: there is no such point in ``where``.

    >>> position("head", ["stem", "head"], "this report"), position(-2, ["stem", "head"], "this report")
    (1, 0)
    """
    if is_integer(name) and -len(names) <= int(name) < len(names):
        return int(name) % len(names)
    if isinstance(name, str) and name in names:
        return names.index(name)
    raise PointError(f"point {name!r} is not in {where}. {suggest(str(name), names)}")


def choose(option: str, value: object, choices: Iterable[str]) -> None:
    """Raise :class:`OptionError` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        hint = suggest(str(value), choices)
        raise OptionError(f"{option}={value!r} is not one of {', '.join(map(repr, choices))}. {hint}")
