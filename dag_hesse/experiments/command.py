"""``dag-hesse experiment NAME …``: run experiments of the paper and beyond, print and write tables, figures, pages."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dag_hesse.errors import DagHesseError
from dag_hesse.experiments.protocol import Experiment
from dag_hesse.files import show
from dag_hesse.progress import watched

PAPER = ("exp1", "exp1b", "exp2", "exp3", "exp3b", "exp4", "exp5", "exp6", "ablation")
BEYOND = ("growth", "phi", "skips")
NAMES = (*PAPER, *BEYOND)
_EPILOG = """examples:
  dag-hesse experiment exp3
  dag-hesse experiment exp3 exp3b --full --data cifar --out results
  dag-hesse experiment exp1 --full --data cifar --out results --resume --cases '8/*' --seeds 42 43"""


def add(command: argparse.ArgumentParser) -> None:
    """Names and options."""
    command.epilog = _EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    protocol = command.add_mutually_exclusive_group()
    protocol.add_argument("--quick", action="store_true", help="minutes: fewer cases, seeds and epochs (default)")
    protocol.add_argument("--full", action="store_true", help="the paper's protocol: hours, or days for exp6")
    command.add_argument(
        "--data", type=Path, metavar="DIR", help="where CIFAR was unpacked to (default: scikit-learn's digits instead)"
    )
    command.add_argument("--seeds", type=int, nargs="+", metavar="N", help="(default: 42 to 46; quick: 42 and 43)")
    command.add_argument("--init", action="store_true", help="measure at initialization only; train nothing")
    command.add_argument("--epochs", type=int, metavar="N", help="train for so many at most; tables say so")
    command.add_argument("--cases", nargs="+", default=["*"], metavar="GLOB", help="only cases of such names, as '8/*'")
    command.add_argument(
        "--out", type=Path, default=Path("experiments-report"), metavar="DIR", help="(default: %(default)s)"
    )
    command.add_argument("--resume", action="store_true", help="go on with what is in --out")
    told = "what was measured is kept: go on with --resume"
    command.set_defaults(run=run, interrupted=told, files=[])  # check_place looks at its folders


def main(arguments: Sequence[str]) -> None:
    """``python -m dag_hesse.experiments``, which knows no other commands."""
    parser = argparse.ArgumentParser(prog="python -m dag_hesse.experiments")
    add(parser)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except DagHesseError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {options.interrupted}")


def load(name: str) -> Experiment:
    """By its name."""
    return cast(Experiment, importlib.import_module(f"dag_hesse.experiments.{name}").EXPERIMENT)


def run(options: argparse.Namespace) -> None:
    """Run one after the other; all are checked before the first begins."""
    from dag_hesse.experiments import page
    from dag_hesse.experiments.runner import Options, check_place, chosen_cases, chosen_seeds
    from dag_hesse.experiments.runner import run as run_one

    asked = Options(
        full=options.full,
        data=options.data,
        seeds=options.seeds,
        out=options.out,
        resume=options.resume,
        init=options.init,
        cases=options.cases,
        epochs=options.epochs,
    )
    chosen_seeds(asked)
    experiments = [load(name) for name in dict.fromkeys(options.names)]
    for experiment in experiments:
        chosen_cases(experiment, asked)
        check_place(asked.out / experiment.name, asked)
    for experiment in experiments:
        results = run_one(experiment, asked, True if watched() else None)
        folder = asked.out / experiment.name
        page.write(experiment, results, folder)
        show(f"{page.as_report(experiment, results)}\n\nwritten to {folder.resolve()}\n")
