"""``python -m dag_hesse``: the command line."""

import sys

from dag_hesse.cli import main

if __name__ == "__main__":
    sys.exit(main())
