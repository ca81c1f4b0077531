"""``python -m dag_hesse``: the command line."""

import sys

from dag_hesse.cli import main

sys.exit(main())
