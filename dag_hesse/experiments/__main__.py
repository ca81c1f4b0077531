"""``python -m dag_hesse.experiments NAME [options]``."""

import sys

from dag_hesse.experiments import attention, digits, newton

EXPERIMENTS = {"attention": lambda arguments: attention.main(), "digits": digits.main, "newton": newton.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
        sys.exit(f"usage: python -m dag_hesse.experiments {{{','.join(EXPERIMENTS)}}} [options]")
    EXPERIMENTS[sys.argv[1]](sys.argv[2:])
