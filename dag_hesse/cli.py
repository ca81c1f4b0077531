"""The command line: ``dag-hesse analyze``, profile, blocks, hvp, spectrum, compare, experiment, completion and more."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dag_hesse import __version__
from dag_hesse._analyze import analyze
from dag_hesse._cli import compare, completion, products
from dag_hesse._cli.output import add_json, check, give
from dag_hesse._cli.ranks import add_ranks, working
from dag_hesse._cli.spec import BUILT_IN, add_model, built, positive
from dag_hesse._profile import profile
from dag_hesse.budget import bytes_of
from dag_hesse.errors import DagHesseError, OptionError
from dag_hesse.experiments import command
from dag_hesse.files import show
from dag_hesse.monitor import demo
from dag_hesse.plan import render_edges
from dag_hesse.plan.planner import BATCH_MODES, MODES
from dag_hesse.progress import watched
from dag_hesse.storage import BlockMatrix
from dag_hesse.storage.options import PARTS

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def _bytes(text: str) -> int:
    """What may be used: a number with its unit, since a number alone could be taken for GiB."""
    try:
        float(text)
    except ValueError:
        try:
            return bytes_of(text)
        except OptionError as error:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a number with a unit, as 4GiB or 500MB") from error
    raise argparse.ArgumentTypeError(f"{text!r} has no unit; expected {text}GiB or {text}MB, say")


def _band(text: str) -> int | str:
    return text if text == "error" else positive(text) if text != "0" else 0


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
    a.add_argument(
        "--rtol", type=float, metavar="X", help="probe until relative standard errors are below X, from eight probes on"
    )
    a.add_argument(
        "--no-stable-rank", action="store_false", dest="stable_rank", help="leave out what takes half of the sweeps"
    )
    a.add_argument(
        "--pair",
        nargs=2,
        action="append",
        dest="pairs",
        metavar=("V", "W"),
        help="this pair of points alone; repeatable",
    )
    add_ranks(a)
    add_json(a)
    a.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page that needs no network")
    a.add_argument("--out", type=Path, metavar="DIR", help="write report.json, .safetensors, .html and .png there")
    a.add_argument("--quiet", action="store_true", help="print nothing but errors")
    a.set_defaults(run=_analyze, files=[f"report.{kind}" for kind in ("json", "safetensors", "html", "png")])
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
    add_json(p)
    p.set_defaults(run=_profile)
    b = commands.add_parser(
        "blocks",
        help="store the Hessian's blocks, low-rank and within a band",
        description="Store the Hessian by blocks: exact, or low-rank to a relative error; read it by "
        "dag_hesse.BlockMatrix.load(FILE).",
    )
    add_model(b)
    b.add_argument("--part", choices=PARTS, default="full", help="of the Hessian (default: full)")
    b.add_argument("--error", type=float, metavar="X", help="relative error that is allowed (default: 0.01)")
    b.add_argument("--rank", type=positive, metavar="N", help="most directions of a point")
    b.add_argument("--band", type=_band, metavar="N", help="largest distance that is stored, or 'error'")
    b.add_argument("--eps", type=float, metavar="X", help="instead of a band: the interaction radius at X, as measured")
    b.add_argument("--size", metavar="SIZE", help="what the stored blocks may take: bytes, or 4GiB, 500MB …")
    add_ranks(b)
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
    m.add_argument("--every", type=positive, default=20, metavar="N", help="steps between measurements (default: 20)")
    m.add_argument("--budget", metavar="SHARE", help="of the time that measurements may take, as 20%% (default: any)")
    m.add_argument("--out", type=Path, default=Path("monitor.png"), metavar="FILE", help="(default: monitor.png)")
    m.set_defaults(run=_monitor_demo)
    e = commands.add_parser(
        "experiment",
        help="run experiments of the paper, held against its figures, and some beyond it",
        description="Run experiments of the paper: tables and figures of ours beside the published ones.",
    )
    command.add(e)
    products.add(commands)
    compare.add(commands)
    completion.add(commands, top)
    return top


def _add_spec(command: argparse.ArgumentParser) -> None:
    """Options that say what to look at, and how."""
    add_model(command)
    command.add_argument("--mode", choices=MODES, default="auto", help="how norms are obtained")
    command.add_argument(
        "--probes", type=int, default=32, metavar="N", help="Rademacher probes per source (default: 32)"
    )
    command.add_argument("--batch-mode", choices=BATCH_MODES, default="shared", help="meaning of the batch axis")
    command.add_argument("--compile", action="store_true", help="compile the sweeps by TorchInductor first (minutes)")
    command.add_argument(
        "--memory", type=_bytes, metavar="SIZE", help="what may be used: 4GiB, 500MB … (default: what is free)"
    )


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """What analyze() and profile() are given alike."""
    names = ("output", "points", "space", "batch_mode", "mode", "probes", "memory", "compile")
    return {name: getattr(options, name) for name in names}


def _profile(options: argparse.Namespace) -> None:
    model, batch, loss = built(options)
    trace = str(options.trace) if options.trace else None
    found = profile(model, batch, loss=loss, trace=trace, whole=options.map, **_common(options))
    edges = f"\n\nevery edge\n{render_edges(found.edges)}" if options.edges else ""
    give(options.json, found.to_dict(), f"{found}{edges}")


def _analyze(options: argparse.Namespace) -> None:
    with working(options.ranks, options.device) as group:
        model, batch, loss = built(options)
        report = analyze(
            model,
            group.shard(batch),
            loss=loss,
            pairs=options.pairs,
            rtol=options.rtol,
            stable_rank=options.stable_rank,
            seed=options.seed,
            progress=watched() and group.writes,
            mesh=group.mesh,
            **_common(options),
        )
        if not group.writes:
            return
    if options.html:
        report.to_html(options.html)
    if options.out:
        report.to_json(options.out / "report.json")
        report.save(options.out / "report.safetensors")
        report.to_html(options.out / "report.html")
        report.plot(path=options.out / "report.png")
    written = f"\n\nwritten to {options.out.resolve()}" if options.out else ""
    give(options.json, report.to_dict(), "" if options.quiet else f"{report}{written}")


def _blocks(options: argparse.Namespace) -> None:
    with working(options.ranks, options.device) as group:
        model, batch, loss = built(options)
        matrix = BlockMatrix.from_model(
            model,
            group.shard(batch),
            loss=loss,
            memory=options.size,
            progress=watched() and group.writes,
            mesh=group.mesh,
            **{name: getattr(options, name) for name in ("output", "points", "space", "part", "error", "rank", "seed")},
            **{name: getattr(options, name) for name in ("band", "eps")},
        )
        if not group.writes:
            return
    if options.out:
        matrix.save(options.out)
    show(f"{matrix}\n\nwritten to {options.out.resolve()}" if options.out else str(matrix))


def _monitor_demo(options: argparse.Namespace) -> None:
    demo.run(options.model, options.optimizer, options.seconds, options.every, options.budget, options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ‖ shows something else there
    try:
        check(options)
        options.run(options)
        if sys.stdout is not None:
            show("", end="")  # what a SPEC has printed may still wait
    except DagHesseError as error:
        _tell(f"{type(error).__name__}: {error}")
        return FAILED
    except BrokenPipeError:  # the reader has seen enough; files are written before anything is printed
        return OK
    except KeyboardInterrupt:
        _tell(f"interrupted; {getattr(options, 'interrupted', 'nothing was written')}")
        return INTERRUPTED
    finally:
        _let_go()
    return OK


def _tell(message: str) -> None:
    if sys.stderr is not None:  # print() takes None for standard output
        print(f"dag-hesse: {message}", file=sys.stderr)


def _let_go() -> None:
    """What standard output does not take is dropped: Python would try again at its end, and fail with a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
