"""``python -m bench.predict_ranks``: what 8, 64 and 1,024 ranks would do, from what one costs and what links do.

With R ranks, k vectors of n numbers and N samples, a product takes

    data:   k (N/R · c + f)      +  ring(k n b)                    +  control
    probe:  ⌈p/R⌉ k/p (N c + f)  +  ⌈log₂ R⌉ (k n b / B + p s λ)  +  control

c: seconds of a sample and a vector; f: of a vector, whatever the batch; b: bytes of a number; λ and B: a link's latency
and bandwidth; p: pieces that the vectors are swept in, which go to the ranks in turn, and whose s segments are sent to
all by binary trees. ring(x) = 2 (R − 1)/R · x/B +
2 (R − 1) λ is a ring's all-reduce. Control is what ranks tell each other so that an error on one is one on all: 5 times
a product, two gathers each, 10 (R − 1) λ. A linearization takes N/R · l or, along ``probe``, N l.

Assumed: all ranks and links are alike; nothing is computed while something is sent; R divides N; a rank's time
is linear in its samples (a GPU's is not where they are few).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from bench.timing import RESULTS

RANKS = (8, 64, 1024)
TOLD = 5  # times that ranks exchange how they fare in a product; each is a gather of sizes and one of contents


@dataclass(frozen=True)
class Costs:
    """Of one rank.

    Attributes:
        sample: seconds of a product, a sample and a vector.
        fixed: seconds of a product, a vector, whatever the batch.
        linearize: seconds a sample, once for all products.
        length: numbers of a vector.
        segments: tensors that they lie in.
        bytes: of a number.
    """

    sample: float
    fixed: float
    linearize: float
    length: int
    segments: int = 1
    bytes: int = 4


@dataclass(frozen=True)
class Link:
    """Between two ranks: seconds until a message arrives, and bytes a second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Samples, vectors that are multiplied at once, and how many of them are swept together."""

    samples: int
    vectors: int = 1
    chunk: int = 1

    @property
    def pieces(self) -> int:
        """What the vectors are divided into."""
        return -(-self.vectors // self.chunk)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a product: what one rank takes, and of several what they compute and what they send.

    Attributes:
        linearize: seconds of a linearization by several, once.
    """

    ranks: int
    one: float
    compute: float
    send: float
    linearize: float

    @property
    def speed(self) -> float:
        """How many times as fast as one rank."""
        return self.one / (self.compute + self.send)

    @property
    def efficiency(self) -> float:
        """Of R times as fast."""
        return self.speed / self.ranks


def ring(size: float, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce of so many bytes by a ring."""
    return 2 * (ranks - 1) / ranks * size / link.bandwidth + 2 * (ranks - 1) * link.latency


def predicted(costs: Costs, link: Link, work: Work, ranks: int, axis: str) -> Prediction:
    """What so many ranks along ``"data"`` or ``"probe"`` would do, by the formulas above.

    >>> costs, link = Costs(1e-3, 0.0, 2e-3, 10**6), Link(1e-5, 1e9)
    >>> found = predicted(costs, link, Work(6400), 64, "data")
    >>> round(found.compute, 3), round(found.send, 3), round(found.speed, 1)
    (0.1, 0.015, 55.4)
    """
    one = work.vectors * (work.samples * costs.sample + costs.fixed)
    send = TOLD * 2 * (ranks - 1) * link.latency
    size, piece = work.vectors * costs.length * costs.bytes, work.vectors / work.pieces
    if axis == "data":
        compute = work.vectors * (work.samples / ranks * costs.sample + costs.fixed)
        send += ring(size, ranks, link)
        return Prediction(ranks, one, compute, send, work.samples / ranks * costs.linearize)
    compute = -(-work.pieces // ranks) * piece * (work.samples * costs.sample + costs.fixed)
    hops = math.ceil(math.log2(ranks))
    send += hops * (size / link.bandwidth + work.pieces * costs.segments * link.latency)
    return Prediction(ranks, one, compute, send, work.samples * costs.linearize)


LINKS = {
    "10 Gb/s Ethernet": Link(30e-6, 1.25e9),
    "100 Gb/s": Link(5e-6, 12.5e9),
    "400 Gb/s": Link(5e-6, 50e9),
}


def measured() -> dict[str, tuple[Costs, dict[str, Work], list[str]]]:
    """Costs as they are in ``bench/results``, what is asked of them, and over which links."""
    found = {}
    cpu = json.loads((RESULTS / "scaling.json").read_text())
    batch, length = cpu["axes"]["batch"], 8 * 256 * 257 + 257 * 10
    slope, intercept = batch["slope"] / 1e3, batch["intercept"] / 1e3
    works = {"data": Work(65_536), "probe": Work(65_536, 1024)}
    mlp = Costs(slope, intercept, 0.0, length, 18)
    found[f"MLP of width 256, depth 8, on {cpu['machine']['threads']} cores"] = mlp, works, ["10 Gb/s Ethernet"]
    gpu = json.loads((RESULTS / "gpu" / "NVIDIA-H200.json").read_text())
    sizes = {"ResNet-50, B=64, 224²": (64, 25_557_032, 161), "GPT-2 124M, B=4, S=1024": (4, 124_439_808, 148)}
    for row in gpu["products"]:
        if row["workload"] in sizes:
            count, length, segments = sizes[row["workload"]]
            gradient, times = row["gradient s"] / count, row["gradients"]
            product, fresh = times["ours, amortized"] * gradient, times["ours, fresh"] * gradient
            costs = Costs(product, 0.0, fresh - product, length, segments)
            works = {"data": Work(65_536), "probe": Work(4096, 1024)}
            found[f"{row['workload'].partition(',')[0]} on an H200"] = costs, works, ["100 Gb/s", "400 Gb/s"]
    return found


def lines() -> Iterator[str]:
    """The table, as Markdown."""
    yield "| model | axis | samples × vectors | link | one | " + " | ".join(f"{r:,} ranks" for r in RANKS) + " |"
    yield "| --- " * (5 + len(RANKS)) + "|"
    for name, (costs, works, links) in measured().items():
        for axis, work in works.items():
            for link in links:
                every = [predicted(costs, LINKS[link], work, ranks, axis) for ranks in RANKS]
                cells = [f"{_text(x.compute + x.send)}, {x.speed:.3g} × ({_percent(x.efficiency)})" for x in every]
                what = f"{work.samples:,} × {work.vectors:,}"
                yield f"| {name} | {axis} | {what} | {link} | {_text(every[0].one)} | {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _text(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def main() -> int:
    """Print the table."""
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
