"""The command line; no thread of gloo's may be left, as it could meet an interpreter that is being taken down."""

import sys
from pathlib import Path

from dag_hesse.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    left = [x for x in (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")) if "gloo" in x]
    sys.exit(f"left: {left}" if left else code)
