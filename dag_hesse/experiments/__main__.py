"""``python -m dag_hesse.experiments NAME [options]``: the demo, Newton steps, and the paper's experiments."""

import sys

from dag_hesse.cli import main
from dag_hesse.experiments import digits, newton
from dag_hesse.experiments.command import NAMES

OTHERS = {"digits": digits.main, "newton": newton.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in (*OTHERS, *NAMES):
        sys.exit(f"usage: python -m dag_hesse.experiments {{{','.join((*OTHERS, *NAMES))}}} [options]")
    if sys.argv[1] in OTHERS:
        OTHERS[sys.argv[1]](sys.argv[2:])
    else:
        sys.exit(main(["experiment", *sys.argv[1:]]))
