"""``python -m dag_hesse.experiments NAME [options]``: the demo, Newton steps, and the paper's experiments."""

import sys

from dag_hesse.experiments import command, digits, newton

OTHERS = {"digits": digits.main, "newton": newton.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in (*OTHERS, *command.NAMES):
        sys.exit(f"usage: python -m dag_hesse.experiments {{{','.join((*OTHERS, *command.NAMES))}}} [options]")
    OTHERS.get(sys.argv[1], lambda _: command.main(sys.argv[1:]))(sys.argv[2:])
