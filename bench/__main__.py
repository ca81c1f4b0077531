"""``python -m bench NAME``."""

from __future__ import annotations

import argparse
import sys

from bench import against, analyze, blocks, gpu, hvp, kernels, memory, monitor, profile, scaling

PLAIN = {
    "analyze": analyze.main,
    "kernels": kernels.main,
    "memory": memory.main,
    "profile": profile.main,
    "scaling": scaling.main,
}


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, help="which benchmark")
    for name in (*PLAIN, "hvp", "blocks", "monitor"):
        names.add_parser(name)
    names.add_parser("gpu").add_argument("--quick", action="store_true", help="two workloads only")
    names.add_parser("against").add_argument("checkout", help="folder of another checkout, built by `make .venv/test`")
    names.choices["against"].add_argument("--bits", action="store_true", help="compare digests over the tests' models")
    for name in ("hvp", "against", "blocks", "monitor"):
        names.choices[name].add_argument("workloads", nargs="*", help="only those whose names contain one of these")
    options = parser.parse_args()
    if options.name == "hvp":
        return hvp.main(options.workloads)
    if options.name == "blocks":
        return blocks.main(options.workloads)
    if options.name == "monitor":
        return monitor.main(options.workloads)
    if options.name == "against":
        return (
            against.compare_bits(options.checkout)
            if options.bits
            else against.main(options.checkout, options.workloads)
        )
    return gpu.main(options.quick) if options.name == "gpu" else PLAIN[options.name]()


if __name__ == "__main__":
    sys.exit(main())
