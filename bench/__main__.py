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
    parser.add_argument("--quick", action="store_true", help="gpu: two workloads only")
    options = parser.parse_args()
    if options.name == "hvp":
        return hvp.main(options.workloads)
    return gpu.main(options.quick) if options.name == "gpu" else COMMANDS[options.name]()


if __name__ == "__main__":
    sys.exit(main())
