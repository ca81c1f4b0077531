"""The command line: ``dag-hesse analyze SPEC``, ``profile SPEC``, ``blocks SPEC``, and ``monitor-demo``."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dag_hesse import __version__
from dag_hesse._analyze import analyze
from dag_hesse._profile import profile
from dag_hesse.errors import DagHesseError, DependencyError, OptionError, integer, suggest
from dag_hesse.experiments import models
from dag_hesse.monitor import demo
from dag_hesse.plan import render_edges
from dag_hesse.plan.planner import BATCH_MODES, MODES
from dag_hesse.report.files import write_text, write_whole
from dag_hesse.storage import BlockMatrix
from dag_hesse.storage.options import PARTS

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
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
        OptionError: there is no such name, module or callable, or it returns something else.
    """
    torch.manual_seed(seed)
    if spec in BUILT_IN:
        build, usual_batch, usual_side = BUILT_IN[spec]
        return build(usual_batch if batch is None else batch, usual_side if side is None else side)
    module_name, colon, name = spec.partition(":")
    if not colon:
        raise OptionError(
            f"SPEC '{spec}' is neither built in nor of the form module:callable. {suggest(spec, BUILT_IN)}"
        )
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"SPEC '{spec}' cannot be loaded: {error}.") from error
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise OptionError(
            f"SPEC '{spec}' returned {type(made).__name__}; expected (model, batch) or (model, batch, loss)."
        )
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least 1")
    return int(text)


def _gibibytes(text: str) -> int:
    """As bytes."""
    try:
        return integer("memory", int(float(text) * 2**30), 1)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive number of GiB") from error


def _band(text: str) -> int | str:
    return text if text == "error" else _positive(text) if text != "0" else 0


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="dag-hesse", description="Inter-layer Hessian maps for PyTorch models.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    a = commands.add_parser(
        "analyze",
        help="map the Hessian blocks between a model's layers",
        description="Map the Hessian blocks between a model's layers: resonance R, coupling C, stable rank D, GN-gap.",
        epilog=f"Built-in SPECs (random weights and data): {', '.join(BUILT_IN)}. Exit codes: 0 done, 1 refused with a "
        "message, 2 wrong usage, 130 interrupted.",
    )
    _add_spec(a)
    a.add_argument("--batch-mode", choices=BATCH_MODES, default="shared", help="meaning of the batch axis")
    a.add_argument("--rtol", type=float, metavar="X", help="probe until relative standard errors are below X")
    a.add_argument("--compile", action="store_true", help="compile the sweeps by TorchInductor first (minutes)")
    a.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    a.add_argument("--out", type=Path, metavar="DIR", help="write report.json, .safetensors, .html and .png there")
    a.add_argument("--quiet", action="store_true", help="print nothing but errors")
    a.set_defaults(run=_analyze)
    p = commands.add_parser(
        "profile",
        help="say where time and memory go, node by node",
        description="Time, FLOPs, bytes and peak memory of linearization, one probe and the map: predicted, measured.",
    )
    _add_spec(p)
    p.add_argument("--edges", action="store_true", help="print the plan edge by edge, not only the costliest")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of one sweep with node names")
    p.add_argument(
        "--map", action="store_true", help="make the whole map as well, to compare it with what is predicted"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    p.set_defaults(run=_profile)
    b = commands.add_parser(
        "blocks",
        help="store the Hessian's blocks, low-rank and within a band",
        description="Store the Hessian by blocks: exact, or low-rank to a relative error; read it by "
        "dag_hesse.BlockMatrix.load(FILE).",
    )
    _add_model(b)
    b.add_argument("--part", choices=PARTS, default="full", help="of the Hessian (default: full)")
    b.add_argument("--error", type=float, metavar="X", help="relative error that is allowed (default: 0.01)")
    b.add_argument("--rank", type=_positive, metavar="N", help="most directions of a point")
    b.add_argument("--band", type=_band, metavar="N", help="largest distance that is stored, or 'error'")
    b.add_argument("--eps", type=float, metavar="X", help="instead of a band: the interaction radius at X, as measured")
    b.add_argument("--size", metavar="SIZE", help="what the stored blocks may take: bytes, or 4GiB, 500MB …")
    b.add_argument("--out", type=Path, metavar="FILE", help="write the blocks there")
    b.set_defaults(run=_blocks)
    m = commands.add_parser(
        "monitor-demo",
        help="train on handwritten digits and watch the curvature",
        description="Train a small network on scikit-learn's handwritten digits with a Monitor, and draw its curves.",
    )
    m.add_argument("--model", choices=tuple(demo.MODELS), default="cnn", help="(default: cnn)")
    m.add_argument("--optimizer", choices=tuple(demo.OPTIMIZERS), default="sgd", help="(default: sgd)")
    m.add_argument("--seconds", type=float, default=60.0, metavar="X", help="training time (default: 60)")
    m.add_argument("--every", type=_positive, default=20, metavar="N", help="steps between measurements (default: 20)")
    m.add_argument("--budget", metavar="SHARE", help="of the time that measurements may take, as 20%% (default: any)")
    m.add_argument("--out", type=Path, default=Path("monitor.png"), metavar="FILE", help="(default: monitor.png)")
    m.set_defaults(run=_monitor_demo)
    return top


def _add_model(command: argparse.ArgumentParser) -> None:
    """Options that say which model, batch and points."""
    command.add_argument(
        "spec", metavar="SPEC", help="module:callable that returns (model, batch[, loss]), or a built-in name"
    )
    command.add_argument("--points", nargs="+", metavar="NAME", help="modules, taps, globs or parameters")
    command.add_argument(
        "--space", choices=("activation", "parameter"), default="activation", help="what module names stand for"
    )
    command.add_argument("--output", metavar="NAME", help="what the loss consumes, where it cannot be inferred")
    command.add_argument("--batch", type=_positive, metavar="N", help="batch size of a built-in SPEC")
    command.add_argument(
        "--image", type=_positive, metavar="N", help="image side or sequence length of a built-in SPEC"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of probes and built-in models (default: 0)")
    command.add_argument("--device", default="cpu", help="where to run (default: cpu)")


def _add_spec(command: argparse.ArgumentParser) -> None:
    """Options that say what to look at, and how."""
    _add_model(command)
    command.add_argument("--mode", choices=MODES, default="auto", help="how norms are obtained")
    command.add_argument(
        "--probes", type=int, default=32, metavar="N", help="Rademacher probes per source (default: 32)"
    )
    command.add_argument("--memory", type=_gibibytes, metavar="GIB", help="what may be used (default: what is free)")


def _to(device: str, tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)


def _built(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """Model, batch and loss (or None) of the SPEC, on the device."""
    model, batch, *loss = load_spec(options.spec, options.batch, options.image, options.seed)
    if options.device != "cpu":
        try:
            model, batch = model.to(options.device), _to(options.device, batch)
        except (RuntimeError, AssertionError) as error:
            raise OptionError(f"--device {options.device} cannot be used: {error}") from error
    return model, batch, loss[0] if loss else None


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """What analyze() and profile() are given alike."""
    return {name: getattr(options, name) for name in ("output", "points", "space", "mode", "probes", "memory")}


def _profile(options: argparse.Namespace) -> None:
    model, batch, loss = _built(options)
    trace = str(options.trace) if options.trace else None
    found = profile(model, batch, loss=loss, trace=trace, whole=options.map, **_common(options))
    print(found)
    if options.edges:
        print(f"\nevery edge\n{render_edges(found.edges)}")
    if options.json:
        write_text(options.json, json.dumps(found.to_dict(), indent=1) + "\n")


def _analyze(options: argparse.Namespace) -> None:
    model, batch, loss = _built(options)
    report = analyze(
        model,
        batch,
        loss=loss,
        batch_mode=options.batch_mode,
        rtol=options.rtol,
        seed=options.seed,
        compile=options.compile,
        progress=sys.stderr.isatty(),
        **_common(options),
    )
    if options.json:
        report.to_json(options.json)
    if options.out:
        report.to_json(options.out / "report.json")
        report.save(options.out / "report.safetensors")
        report.to_html(options.out / "report.html")
        figure = report.plot()
        write_whole(options.out / "report.png", lambda path: figure.savefig(path, dpi=130))
    if not options.quiet:  # files first: a terminal that goes away takes nothing with it
        print(report)
        if options.out:
            print(f"\nwritten to {options.out.resolve()}")


def _blocks(options: argparse.Namespace) -> None:
    model, batch, loss = _built(options)
    matrix = BlockMatrix.from_model(
        model,
        batch,
        loss=loss,
        memory=options.size,
        progress=sys.stderr.isatty(),
        **{name: getattr(options, name) for name in ("output", "points", "space", "part", "error", "rank", "seed")},
        **{name: getattr(options, name) for name in ("band", "eps")},
    )
    if options.out:
        matrix.save(options.out)
    print(matrix)
    if options.out:
        print(f"\nwritten to {options.out.resolve()}")


def _monitor_demo(options: argparse.Namespace) -> None:
    demo.run(options.model, options.optimizer, options.seconds, options.every, options.budget, options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ‖ shows something else there
    try:
        options.run(options)
        sys.stdout.flush()
    except DagHesseError as error:
        print(f"dag-hesse: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader has seen enough; files are written before anything is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("dag-hesse: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return OK
