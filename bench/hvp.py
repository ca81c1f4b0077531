"""``python -m bench hvp``: curvature products against every peer's, in gradients of the same model.

Every peer is made and timed in a process of its own, by turns with the gradient, which is the unit; what it finds is
compared with one oracle first.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dag_hesse as dh
from bench.pairwise import gauss_newton, with_leaves
from bench.peers import GAUSS_NEWTONS, HESSIANS, Maker, Named
from bench.timing import RESULTS, interleaved, machine, median, spread, write_json
from bench.workloads import WORKLOADS, Workload
from dag_hesse.files import write_text

TOLERANCE = 1e-4
PROBES = 8
MATH = torch.nn.attention.SDPBackend.MATH  # fused attention has no second derivatives
Vectors = dict[str, Tensor]  # of products: "H", "GN" in parameter space, "H′", "GN′" in activation space


@dataclass(frozen=True)
class Run:
    """A product to time, and what its result says of the products that an oracle knows."""

    call: Callable[[], Any]
    says: Callable[[Any], Vectors]

    def off(self, result: Any, truth: Vectors) -> float:
        """Largest relative error."""
        return max(float((x - truth[key]).norm() / truth[key].norm()) for key, x in self.says(result).items())


def flat(named: Mapping[str, Tensor]) -> Tensor:
    """One vector, in the alphabetical order of names."""
    return torch.cat([named[name].flatten() for name in sorted(named)])


def truth(work: Workload, v: Named, z: Named) -> Vectors:
    """The oracle: double-backward, at the parameters and at zero leaves added to the activations."""
    found: Vectors = {}
    leaves, output = with_leaves(work.model, list(z), work.x)
    own = dict(work.model.named_parameters())
    for mark, places, along in (("", own, v), ("′", leaves, z)):
        if not along:
            continue
        at = [places[name] for name in along]
        vectors = [x.reshape(leaf.shape) for x, leaf in zip(along.values(), at, strict=True)]
        first = torch.autograd.grad(work.loss(output), at, create_graph=True)
        second = torch.autograd.grad(first, at, vectors, retain_graph=True)
        for key, products in (("H", second), ("GN", gauss_newton(output, work.loss, at, vectors, at))):
            found[key + mark] = flat(dict(zip(along, products, strict=True))).detach()
    return found


def _addends(total: Named) -> Named:
    """Probes (…, PROBES) that add up to ``total``: what a product makes of them adds up to its product with that."""
    found = {}
    for name, x in total.items():
        probes = torch.randn(PROBES, *x.shape)
        probes[-1] += x - probes.sum(0)
        found[name] = probes.movedim(0, -1)
    return found


def agreed(runs: dict[str, Run], truth: Vectors) -> tuple[dict[str, float], dict[str, str]]:
    """Everybody's error, and why a peer has no product or a wrong one."""
    errors, unable = {}, {}
    for name, run in runs.items():
        try:
            errors[name] = run.off(run.call(), truth)
        except Exception as error:  # whatever a peer raises is what the table says of it
            if name.startswith("ours"):
                raise
            unable[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    unable |= {name: f"its product is off by {off:.1e}" for name, off in errors.items() if not off <= TOLERANCE}
    return errors, unable


def fresh(H: dh.HessianOperator, v: Named) -> Named:
    """A product of an operator that linearizes first."""
    H.refresh()
    return H @ v


def _total(found: Named) -> Tensor:
    return flat({name: x.sum(-1) for name, x in found.items()})


def says(found: Named) -> Vectors:
    """A product with the Hessian."""
    return {"H": flat(found)}


def operator_of(work: Workload, **options: Any) -> dh.HessianOperator:
    """A workload's Hessian."""
    return dh.HessianOperator(work.model, (work.x, work.y), loss=F.cross_entropy, **options)


def _products(work: Workload, v: Named, z: Named) -> dict[str, Run]:
    H, many = operator_of(work), _addends(v)
    return {
        "ours, amortized": Run(lambda: H @ v, says),
        "ours, fresh": Run(lambda: fresh(H, v), says),
        "ours, GN and T apart": Run(lambda: H.parts(v), lambda x: {"GN": flat(x[0]), "H": flat(x[0]) + flat(x[1])}),
        f"ours, {PROBES} at once": Run(lambda: H @ many, lambda x: {"H": _total(x)}),
    }


def _compiled_products(work: Workload, v: Named, z: Named) -> dict[str, Run]:
    C = operator_of(work, compile=True)
    return {
        "ours, compiled, amortized": Run(lambda: C @ v, says),
        "ours, compiled, fresh": Run(lambda: fresh(C, v), says),
    }


def _gauss_newton(work: Workload, v: Named, z: Named) -> dict[str, Run]:
    G = dh.GGNOperator(work.model, (work.x, work.y), loss=F.cross_entropy)
    return {"ours, GGN, amortized": Run(lambda: G @ v, lambda x: {"GN": flat(x)})}


def _activations(work: Workload, v: Named, z: Named) -> dict[str, Run]:
    A, probes = operator_of(work, space="activation"), _addends(z)
    return {
        f"ours, activations, {PROBES} at once": Run(lambda: A @ probes, lambda x: {"H′": _total(x)}),
        f"ours, activations, GN and T apart, {PROBES} at once": Run(
            lambda: A.parts(probes), lambda x: {"GN′": _total(x[0]), "H′": _total(x[0]) + _total(x[1])}
        ),
    }


Group = Callable[[Workload, Named, Named], dict[str, Run]]


def _of_peer(name: str, maker: Maker, key: str) -> Group:
    return lambda work, v, z: {name: Run(maker(work, v), lambda found: {key: flat(found)})}


# What is made and timed together, in a process of its own: some hold gigabytes between products.
GROUPS: dict[str, Group] = {
    "ours": _products,
    "ours, compiled": _compiled_products,
    "ours, GGN": _gauss_newton,
    "ours, activations": _activations,
    **{name: _of_peer(name, maker, "H") for name, maker in HESSIANS.items()},
    **{name: _of_peer(name, maker, "GN") for name, maker in GAUSS_NEWTONS.items()},
}


def _posed(name: str) -> tuple[Workload, Named, Named]:
    """A workload, and vectors of its parameters and of its points; the same in every process."""
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    A = operator_of(work, space="activation", verify="none")
    torch.manual_seed(1)
    v = {key: torch.randn_like(p) for key, p in work.model.named_parameters()}
    return work, v, {key: torch.randn(shape) for key, shape in zip(A.names, A.form.shapes, strict=True)}


def _in_a_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of this module returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def find_truth(name: str, file: str) -> None:
    """Write a workload's products to a file."""
    with torch.nn.attention.sdpa_kernel(MATH):
        torch.save(truth(*_posed(name)), file)


def measure_group(name: str, group: str, file: str) -> dict[str, Any]:
    """Errors of a group's products, and its times and the gradient's, by turns."""
    expected, ours = torch.load(file), group.startswith("ours")
    with torch.nn.attention.sdpa_kernel(MATH):
        work, v, z = _posed(name)
        try:
            runs = GROUPS[group](work, v, z)
        except Exception as error:  # as of products
            if ours:
                raise
            return {"errors": {}, "unable": {group: f"{type(error).__name__}: {error}".splitlines()[0]}, "seconds": {}}
        errors, unable = agreed(runs, expected)
        found: dict[str, Any] = {"errors": errors, "unable": unable, "seconds": {}}
        calls = {key: run.call for key, run in runs.items() if key not in unable}
        if not calls or (ours and unable):
            return found
        started = time.perf_counter()
        work.gradient()
        once = time.perf_counter() - started
        rounds = 11 if once < 0.25 else 5 if once < 1 else 3
        return {**found, "seconds": interleaved({"gradient": work.gradient, **calls}, rounds)}


def measure(name: str) -> dict[str, Any]:
    """Medians of one workload, in gradients; only the errors where one of ours is wrong."""
    row: dict[str, Any] = {"workload": name, "gradients": {}, "spread": {}, "unable": {}}
    errors, units = dict[str, float](), list[float]()
    with TemporaryDirectory() as folder:
        file = f"{folder}/truth"
        _in_a_process(find_truth, name, file)
        for group in GROUPS:
            try:
                found = _in_a_process(measure_group, name, group, file)
            except BrokenProcessPool:
                row["unable"][group] = "the system ended its process: memory was short"
                continue
            if group.startswith("ours") and found["unable"]:
                return {"workload": name, "disagree": found["errors"]}
            errors |= {key: off for key, off in found["errors"].items() if key not in found["unable"]}
            row["unable"] |= found["unable"]
            if found["seconds"]:
                units.append(median(found["seconds"].pop("gradient")))
            for key, seconds in found["seconds"].items():
                row["gradients"][key] = median(seconds) / units[-1] / (PROBES if "at once" in key else 1)
                row["spread"][key] = spread(seconds)
    return {**row, "gradient s": median(units), "products agree to": max(errors.values())}


def _written(names: list[str] | None) -> tuple[str, dict[str, dict[str, Any]]]:
    """The results' file, and its rows. Some workloads alone do not replace those of another machine."""
    here = machine()
    own = "-".join(re.findall(r"\w+", f"hvp {here['cpu']} {here['instructions']}"))
    for stem in ("hvp", own) if names else ():
        file = RESULTS / f"{stem}.json"
        empty: dict[str, Any] = {"machine": here, "workloads": []}
        data = json.loads(file.read_text()) if file.exists() else empty
        if data["machine"] == here:
            return stem, {row["workload"]: row for row in data["workloads"]}
    return (own if names else "hvp"), {}


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The table, a row a product and a column a workload."""
    products = list(dict.fromkeys(key for row in rows for key in row["gradients"]))
    head = ["in gradients", *(row["workload"] for row in rows)]
    lines = [head, ["---", *("---:" for _ in rows)]]
    for key in products:
        cells = [f"{row['gradients'][key]:.2f}" if key in row["gradients"] else "–" for row in rows]
        lines.append([key, *cells])
    lines.append(["*one gradient*", *(f"{row['gradient s'] * 1e3:.0f} ms" for row in rows)])
    notes = sorted(
        {f"- {row['workload']}: {key} left out: {why}" for row in rows for key, why in row["unable"].items()}
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *notes]) + "\n"


def _draw(rows: list[dict[str, Any]], stem: str) -> None:
    """Bars a workload: ours against everybody."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rows), figsize=(3.2 * len(rows), 3.6), layout="constrained", squeeze=False)
    for row, one in zip(rows, axes[0], strict=True):
        items = [(k, v) for k, v in row["gradients"].items() if "at once" not in k and "apart" not in k]
        items.sort(key=lambda item: -item[1])
        colors = [
            "tab:green" if k == "gradient" else "tab:orange" if k.startswith("ours") else "tab:gray" for k, _ in items
        ]
        one.barh([k for k, _ in items], [v for _, v in items], color=colors)
        one.tick_params(labelsize=6)
        one.set_title(row["workload"], fontsize=7)
        one.set_xlabel("gradients", fontsize=7)
    figure.savefig(RESULTS / f"{stem}.png", dpi=130)
    plt.close(figure)


def main(names: list[str] | None = None) -> int:
    """Measure all workloads, or those whose name contains a given word; print and write. Other rows stay.

    Results of some workloads on another machine than that of ``hvp.json`` go to a file of that machine.
    """
    console = Console(width=120)
    stem, rows = _written(names)
    for name in WORKLOADS:
        if names and not any(word in name for word in names):
            continue
        row = measure(name)
        if "disagree" in row:
            print(f"{name}: products disagree, so no speed is printed: {row['disagree']}", file=sys.stderr)
            return 1
        rows[name] = row
        table = Table(title=f"{name}: one gradient is {row['gradient s'] * 1e3:.0f} ms", title_justify="left")
        table.add_column("H·v")
        table.add_column("gradients", justify="right")
        table.add_column("spread", justify="right")
        for key, value in sorted(row["gradients"].items(), key=lambda item: item[1]):
            table.add_row(key, f"{value:.2f}", f"{row['spread'][key]:.0%}")
        console.print(table)
        for key, reason in row["unable"].items():
            console.print(f"{key} fails: {reason}", soft_wrap=True)
        ordered = [rows[key] for key in WORKLOADS if key in rows]
        write_json(stem, {"workloads": ordered})
        write_text(RESULTS / f"{stem}.md", _markdown(ordered))
        _draw(ordered, stem)
    return 0
