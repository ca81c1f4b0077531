"""``python -m bench NAME``."""

from __future__ import annotations

import argparse
import sys

from bench import analyze, gpu, hvp, memory, profile, scaling

COMMANDS = {
    "analyze": analyze.main,
    "gpu": gpu.main,
    "hvp": hvp.main,
    "memory": memory.main,
    "profile": profile.main,
    "scaling": scaling.main,
}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=COMMANDS, help="which benchmark")
    parser.add_argument("workloads", nargs="*", help="hvp: only workloads whose names contain one of these")
    options = parser.parse_args()
    return hvp.main(options.workloads) if options.name == "hvp" else COMMANDS[options.name]()


if __name__ == "__main__":
    sys.exit(main())
