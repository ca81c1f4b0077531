"""``python -m bench NAME``."""

from __future__ import annotations

import argparse
import sys

from bench import analyze, hvp, memory, scaling

COMMANDS = {"analyze": analyze.main, "hvp": hvp.main, "memory": memory.main, "scaling": scaling.main}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=COMMANDS, help="which benchmark")
    return COMMANDS[parser.parse_args().name]()


if __name__ == "__main__":
    sys.exit(main())
