"""``python -m bench NAME``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import against, analyze, blocks, gpu, hvp, kernels, memory, monitor, profile, scaling
from bench.timing import RESULTS

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
    of_gpu = names.add_parser("gpu")
    of_gpu.add_argument("--quick", action="store_true", help="one workload of each kind")
    of_gpu.add_argument("--compiled", action="store_true", help="compiled products instead, ours and functorch's")
    of_gpu.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    of_gpu.add_argument("--minutes", type=float, default=6, help="how long: what comes last is left out")
    of_gpu.add_argument("--only", help="with --compiled: one workload, in this process")
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
    if options.name == "gpu":
        if options.compiled:
            return gpu.main_compiled(options.out, options.only)
        return gpu.main(options.quick, options.out, options.minutes)
    return PLAIN[options.name]()


if __name__ == "__main__":
    sys.exit(main())
