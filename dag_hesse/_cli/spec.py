"""Which model, batch and loss a command is about: a built-in name, or ``module:callable``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dag_hesse.errors import DependencyError, OptionError, integer, kind_of, suggest
from dag_hesse.experiments import models

Built = tuple[nn.Module, Any]


def _image(model: nn.Module, batch: int, side: int, classes: int) -> Built:
    return model.eval(), (torch.randn(batch, 3, side, side), torch.randint(0, classes, (batch,)))


def _sequence(model: nn.Module, batch: int) -> Built:
    return model.eval(), (torch.randn(batch, 8, 16), torch.randn(batch))


def _gpt2(batch: int, side: int) -> Built:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise DependencyError("SPEC 'gpt2' needs transformers: pip install transformers.") from error

    ids = torch.randint(0, 1000, (batch, side))
    config = GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=1000, n_positions=max(side, 128))
    return GPT2LMHeadModel(config).eval(), {"input_ids": ids, "labels": ids}


# Built-in SPECs: random weights and random data of the model's usual shapes; (batch, image side or length).
BUILT_IN: dict[str, tuple[Callable[[int, int], Built], int, int]] = {
    "resnet18": (lambda b, s: _image(models.resnet18(), b, s, 10), 32, 32),
    "resnet18-silu": (lambda b, s: _image(models.resnet18(activation=nn.SiLU), b, s, 10), 32, 32),
    "plain-resnet18": (lambda b, s: _image(models.resnet18(skip=False), b, s, 10), 32, 32),
    "resnet50": (lambda b, s: _image(models.resnet50(), b, s, 1000), 8, 64),
    "mlp": (
        lambda b, s: (
            models.mlp([3 * s * s, 256, 256, 256, 10]),
            (torch.randn(b, 3 * s * s), torch.randint(0, 10, (b,))),
        ),
        64,
        16,
    ),
    "toy-attention": (lambda b, s: _sequence(models.ToyAttention(), b), 64, 8),
    "gpt2": (_gpt2, 2, 64),
}


def load_spec(spec: str, batch: int | None, side: int | None, seed: int) -> tuple[Any, ...]:
    """Return (model, batch[, loss]) for a built-in name or ``module:callable``.

    Raises:
        OptionError: there is no such name, module or callable, it returns something else, or the seed has more
            than 64 bits.
    """
    torch.manual_seed(integer("seed", seed))
    if spec in BUILT_IN:
        return _random(spec, batch, side)
    module_name, colon, name = spec.partition(":")
    if not colon or not name or not all(module_name.split(".")):
        raise OptionError(
            f"SPEC '{spec}' is neither built in nor of the form module:callable. {suggest(spec, BUILT_IN)}"
        )
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"SPEC '{spec}' cannot be loaded: {error}.") from error
    if not callable(function):
        raise OptionError(f"SPEC '{spec}' is {kind_of(function)}; expected a callable that returns (model, batch).")
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise OptionError(
            f"SPEC '{spec}' returned {type(made).__name__}; expected (model, batch) or (model, batch, loss)."
        )
    return made


def _random(spec: str, batch: int | None, side: int | None) -> tuple[Any, ...]:
    """A built-in model with random data."""
    build, usual_batch, usual_side = BUILT_IN[spec]
    batch, side = usual_batch if batch is None else batch, usual_side if side is None else side
    try:
        return build(batch, side)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise OptionError(
            f"SPEC '{spec}' cannot be made with --batch {batch} and --image {side}: {str(error).splitlines()[0]} "
            "Take smaller ones."
        ) from error


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least 1, of 64 bits")
    return int(text)


def add_model(command: argparse.ArgumentParser, space: str = "activation") -> None:
    """Options that say which model, batch and points."""
    command.add_argument(
        "spec", metavar="SPEC", help="module:callable that returns (model, batch[, loss]), or a built-in name"
    )
    command.add_argument("--points", nargs="+", metavar="NAME", help="modules, taps, globs or parameters")
    command.add_argument(
        "--space",
        choices=("activation", "parameter"),
        default=space,
        help="what module names stand for (default: %(default)s)",
    )
    command.add_argument("--output", metavar="NAME", help="what the loss consumes, where it cannot be inferred")
    command.add_argument("--batch", type=positive, metavar="N", help="batch size of a built-in SPEC")
    command.add_argument("--image", type=positive, metavar="N", help="image side or sequence length of a built-in SPEC")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of probes and built-in models (default: 0)")
    command.add_argument("--device", default="cpu", help="where to run (default: cpu)")


def _to(device: str, tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)


def built(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """Model, batch and loss (or None) of the SPEC, on the device."""
    model, batch, *loss = load_spec(options.spec, options.batch, options.image, options.seed)
    if options.device != "cpu":
        try:
            model, batch = model.to(options.device), _to(options.device, batch)
        except (RuntimeError, AssertionError) as error:
            raise OptionError(f"--device {options.device} cannot be used: {error}") from error
    return model, batch, loss[0] if loss else None
