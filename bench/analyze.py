"""``python -m bench analyze``: the whole map against the paper's per-pair protocol, on ResNet-18."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dag_hesse as dh
from bench.pairwise import PairwiseBaseline, measure
from bench.timing import interleaved, median, peak_bytes, spread, write_json
from dag_hesse._capture import Batches
from dag_hesse._structure import analyze_structure
from dag_hesse.estimate import assemble, estimate
from dag_hesse.experiments.digits import load_digits
from dag_hesse.experiments.models import resnet18
from dag_hesse.ir import CurvatureGraph
from dag_hesse.plan import fuse, plan
from dag_hesse.sweep import Problem, Request

BATCH, SIDE, CLASSES = 32, 32, 10
ACTIVATIONS = {"ReLU": nn.ReLU, "SiLU": nn.SiLU, "SiLU, trained": nn.SiLU}
STEPS, FEW = 100, 8
PEAK = """
import torch, torch.nn.functional as F
import dag_hesse as dh
from dag_hesse.experiments.models import resnet18
torch.manual_seed(0)
model = resnet18().eval()
x, y = torch.randn({batch}, 3, {side}, {side}), torch.arange({batch}) % 10
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
def step():
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
small = (x[:1], y[:1])
dh.analyze(model, small)
F.cross_entropy(model(x[:1]), y[:1])
run = {run}
"""


class Disagreement(Exception):
    """The gate is red: nothing is printed."""


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-18 in eval mode, with a batch of random images; trained, with one of digits that it has not seen."""
    torch.manual_seed(0)
    model = resnet18(classes=CLASSES, activation=ACTIVATIONS[name])
    if "trained" in name:
        return trained(model)
    return model.eval(), torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % CLASSES


def trained(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """The model after some epochs on scikit-learn's digits, with the last of these."""
    images, labels = load_digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        index = torch.randint(len(images) - BATCH, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    return model.eval(), images[-BATCH:], labels[-BATCH:]


def gate(model: nn.Module, x: Tensor, y: Tensor, report: dh.CurvatureReport, graph: CurvatureGraph) -> float:
    """Products of both sides on the same probes agree; the report's norms agree with the baseline's estimates."""
    ours = Problem(model, [graph], Batches((x, y)), "shared")
    worst, generator = 0.0, torch.Generator().manual_seed(1)
    names = report.names
    for i, j in itertools.combinations_with_replacement(range(len(names)), 2):
        theirs = PairwiseBaseline(model, x, y, F.cross_entropy, names[i], names[j])
        z = torch.randint(0, 2, theirs.w.shape, generator=generator).float() * 2 - 1
        mine = ours.run([Request({j: z.reshape(1, 1, -1)}, (i,))])[0][i].full
        expected = theirs.product(z, theirs.v, theirs.w).reshape(-1)
        assert mine is not None
        worst = max(worst, float((mine.reshape(-1) - expected).norm() / expected.norm()))
    if worst > 1e-4:
        raise Disagreement(f"products differ by {worst:.1e} (allowed: 1e-4)")
    return worst


def from_captured(model: nn.Module, graph: CurvatureGraph, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Structure, plan and estimates on a captured graph: what a second batch of equal shapes costs."""

    batch = Batches((x, y))

    def run() -> Any:
        fused = fuse(graph)
        chosen = plan([replace(analyze_structure(graph), graph=fused)])
        alive = bool(chosen.structure.tensor_alive.any())
        ready = Problem(
            model,
            [fused],
            batch,
            "shared",
            tensor_part=alive,
            with_out=chosen.gram_columns > 0,
            chunk=chosen.chunk,
        )
        return assemble(estimate(ready, chosen), chosen)

    return run


def map_row(name: str, console: Console) -> dict[str, Any]:
    """Our map and the baseline's on one network."""
    model, x, y = problem(name)
    report, looser = dh.analyze(model, (x, y)), dh.analyze(model, (x, y), probes=FEW)
    graph = dh.capture(model, (x, y))
    worst = gate(model, x, y, report, graph)
    pairs = list(itertools.combinations_with_replacement(report.names, 2))
    console.print(
        f"{name}: {len(pairs)} pairs agree (worst {worst:.0e}); timing the baseline takes minutes", highlight=False
    )
    runs = {
        "whole": lambda: dh.analyze(model, (x, y)),
        "few": lambda: dh.analyze(model, (x, y), probes=FEW),
        "captured": from_captured(model, graph, x, y),
    }
    generator = torch.Generator().manual_seed(0)
    ours: dict[str, list[float]] = {key: [] for key in runs}
    baseline, relative, off = 0.0, [], 0.0
    for k, (v, w) in enumerate(pairs):  # our runs take turns with the baseline's pairs
        start = time.perf_counter()
        found = measure(model, x, y, F.cross_entropy, v, w, generator=generator)
        baseline += time.perf_counter() - start
        relative.append(found.stderr / found.resonance)
        i, j = report.index(v), report.index(w)
        noise = math.hypot(found.stderr, report.stderr["resonance"][i, j])
        off = max(off, abs(found.resonance - report.resonance[i, j]) / noise)
        if k % 3 == 0:
            for key, seconds in interleaved(runs, rounds=1, warmup=int(k == 0)).items():
                ours[key] += seconds
    if off > 5:
        raise Disagreement(f"a norm differs by {off:.1f} standard errors")
    upper = np.triu_indices(len(report.names))
    own, loose = ((r.stderr["resonance"] / r.resonance)[upper] for r in (report, looser))
    return {
        "activation": name,
        "products agree to": worst,
        "largest difference of norms in s.e.": off,
        "baseline s": baseline,
        "whole s": median(ours["whole"]),
        "whole spread": spread(ours["whole"]),
        "captured s": median(ours["captured"]),
        "whole ratio": baseline / median(ours["whole"]),
        "captured ratio": baseline / median(ours["captured"]),
        "few ratio": baseline / median(ours["few"]),
        "baseline relative s.e. (mean)": float(np.mean(relative)),
        "own relative s.e. (mean)": float(own.mean()),
        "pairs with a larger s.e. than the baseline's": int((own > np.array(relative)).sum()),
        "the same, few": int((loose > np.array(relative)).sum()),
        "own relative s.e. (mean), few": float(loose.mean()),
        "sweeps": report.facts["sweeps"],
        "sweeps, few": looser.facts["sweeps"],
    }


def probe_row() -> dict[str, Any]:
    """One activation-space probe, both channels, from each point, over a gradient; the plan's own reads."""
    model, x, y = problem("SiLU")
    graph = dh.capture(model, (x, y))
    chosen = plan([analyze_structure(graph)], mode="probes")

    ready = Problem(model, [graph], Batches((x, y)), "shared", chunk=chosen.chunk, with_out=False)
    generator = torch.Generator().manual_seed(0)
    requests = []
    for source in chosen.sources:
        z = torch.randint(0, 2, (32, 1, ready.dim(source.point)), generator=generator).float() * 2 - 1
        requests.append(Request({source.point: z}, source.reads))
    ready.run(requests[:1])

    def gradient() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    widest = max(requests, key=lambda r: len(r.reads))
    runs = {"gradient": gradient, "all": lambda: ready.run(requests), "widest": lambda: ready.run([widest])}
    seconds = interleaved(runs, rounds=7, warmup=2)
    unit = median(seconds["gradient"])
    return {
        "gradient s": unit,
        "probe of the plan, mean over sources, in gradients": median(seconds["all"]) / 32 / len(requests) / unit,
        "probe from the stem, read at all points, in gradients": median(seconds["widest"]) / 32 / unit,
    }


class Recurrent(nn.Module):
    """A classifier of sequences by an LSTM's last state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def capture_rows() -> dict[str, float]:
    """Seconds for capture + structure + plan (the best of five, after one warm-up: imports are paid once)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model, x, y = problem("SiLU")
    config = GPT2Config(n_layer=12, n_embd=256, n_head=4, vocab_size=1000)
    gpt = GPT2LMHeadModel(config)
    ids = torch.randint(0, 1000, (2, 64))
    batch = {"input_ids": ids, "labels": ids}
    recurrent, sequences = Recurrent(), (torch.randn(8, 512, 16), torch.arange(8) % 5)
    runs = {
        "ResNet-18": lambda: plan([analyze_structure(dh.capture(model, (x, y)))]),
        "GPT-2, 12 layers": lambda: plan([analyze_structure(dh.capture(gpt.eval(), batch))]),
        "GPT-2, 12 layers, dropout on": lambda: plan([analyze_structure(dh.capture(gpt.train(), batch))]),
        "LSTM, 512 steps": lambda: plan([analyze_structure(dh.capture(recurrent, sequences))]),
    }
    return {name: median(values) for name, values in interleaved(runs, rounds=5).items()}


def construction_row() -> dict[str, float]:
    """An operator over GPT-2 124M (B = 1, S = 256), made with and without the proof, in gradients of the same model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model, ids = GPT2LMHeadModel(GPT2Config()).eval(), torch.randint(0, 50257, (1, 256))
    batch, parameters = {"input_ids": ids, "labels": ids}, list(model.parameters())
    runs = {
        "gradient": lambda: torch.autograd.grad(model(**batch).loss, parameters),
        "without proof": lambda: dh.HessianOperator(model, batch, verify="none"),
        "with proof": lambda: dh.HessianOperator(model, batch),
    }
    found = {name: median(values) for name, values in interleaved(runs, rounds=3).items()}
    return {"gradient s": found["gradient"]} | {
        name: seconds / found["gradient"] for name, seconds in found.items() if name != "gradient"
    }


def memory_row() -> dict[str, float]:
    """Peak memory of the ReLU map over that of a training step, each in a process of its own."""
    sizes = {"batch": BATCH, "side": SIDE}
    step = peak_bytes(PEAK.format(run="step", **sizes))
    whole = peak_bytes(PEAK.format(run="lambda: dh.analyze(model, (x, y))", **sizes))
    return {"training step MiB": step / 2**20, "map MiB": whole / 2**20, "ratio": whole / step}


BARS = {
    "ReLU map from the captured graph": ("≥ 150×", lambda r: r["maps"][0]["captured ratio"], 150, 1),
    "ReLU map, whole call": ("≥ 100×", lambda r: r["maps"][0]["whole ratio"], 100, 1),
    "SiLU map, whole call": ("≥ 40×", lambda r: r["maps"][1]["whole ratio"], 40, 1),
    f"the same, probes={FEW}": ("≥ 40×", lambda r: r["maps"][1]["few ratio"], 40, 1),
    "trained SiLU map, whole call": ("≥ 60×", lambda r: r["maps"][2]["whole ratio"], 60, 1),
    f"the same, probes={FEW} ": ("≥ 60×", lambda r: r["maps"][2]["few ratio"], 60, 1),
    "probe, both channels (gradients)": (
        "≤ 0.45",
        lambda r: r["probe"]["probe of the plan, mean over sources, in gradients"],
        0.45,
        -1,
    ),
    "capture + structure + plan, ResNet-18 (s)": ("≤ 0.25", lambda r: r["capture"]["ResNet-18"], 0.25, -1),
    "the same, 12-layer GPT-2 (s)": ("≤ 0.9", lambda r: r["capture"]["GPT-2, 12 layers"], 0.9, -1),
    "operator of GPT-2 124M, proof apart (gradients)": ("≤ 0.5", lambda r: r["construction"]["without proof"], 0.5, -1),
    "peak memory of the ReLU map over a training step": ("≤ 3×", lambda r: r["memory"]["ratio"], 3, -1),
}


def table(result: dict[str, Any]) -> Table:
    """The bars of the project and what was measured."""
    shown = Table(title=f"ResNet-18, B = {BATCH}, {SIDE}×{SIDE}, 5 points, 15 pairs", title_justify="left")
    for column in ("what", "bar", "measured", ""):
        shown.add_column(column)
    for what, (bar, read, limit, sign) in BARS.items():
        value = read(result)
        shown.add_row(what, bar, f"{value:.3g}", "met" if (value - limit) * sign >= 0 else "NOT met")
    return shown


def main() -> int:
    """Measure, gate, print, write ``bench/results/analyze.json``."""
    console = Console(width=100)
    try:
        result: dict[str, Any] = {"maps": [map_row(name, console) for name in ACTIVATIONS]}
    except Disagreement as error:
        print(f"results disagree, so no speed is printed: {error}", file=sys.stderr)
        return 1
    write_json("analyze", result)  # what took minutes is kept, whatever happens to the rest
    result.update(
        probe=probe_row(),
        capture=capture_rows(),
        construction=construction_row(),
        memory=memory_row(),
    )
    console.print(table(result))
    write_json("analyze", result)
    return 0
