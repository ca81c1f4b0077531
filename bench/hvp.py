"""``python -m bench hvp``: Hessian products in parameter space against every peer, in gradients of the same model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dag_hesse as dh
from bench.timing import RESULTS, interleaved, machine, median, spread, write_json
from dag_hesse.experiments.models import mlp, resnet18, resnet50
from dag_hesse.report.files import write_text

TOLERANCE = 1e-4
PROBES = 8


@dataclass(frozen=True)
class Workload:
    """A model with its batch; ``loss(output, targets)``."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def value(self) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.model(self.x), self.y)

    def functional(self, params: dict[str, Tensor]) -> Tensor:
        """The loss as a function of the parameters."""
        return F.cross_entropy(torch.func.functional_call(self.model, params, (self.x,)), self.y)


class VisionTransformer(nn.Module):
    """ViT-Tiny's shape: width 192, 12 blocks of 3 heads, patches of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 196, 192) * 0.02)
        block = partial(nn.TransformerEncoderLayer, 192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(12))
        self.head = nn.Linear(192, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class LanguageModel(nn.Module):
    """GPT-2's shape with 4 layers of width 256, from ``transformers``; logits of the next token only."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=5000, n_positions=128)
        self.body = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids).logits.transpose(1, 2)


def _images(model: nn.Module, batch: int, side: int, classes: int) -> Workload:
    return Workload(model.eval(), torch.randn(batch, 3, side, side), torch.arange(batch) % classes)


def _mlp() -> Workload:
    return Workload(mlp([3072, *[1024] * 16, 10], nn.SiLU), torch.randn(256, 3072), torch.arange(256) % 10)


def _gpt() -> Workload:
    ids = torch.randint(0, 5000, (4, 128))
    return Workload(LanguageModel().eval(), ids, ids.roll(-1, 1))


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MLP 3072-1024×16-10, B=256": _mlp,
    "ResNet-18 SiLU, B=32, 32²": lambda: _images(resnet18(activation=nn.SiLU), 32, 32, 10),
    "ResNet-18 ReLU, B=32, 32²": lambda: _images(resnet18(), 32, 32, 10),
    "ResNet-50, B=8, 64²": lambda: _images(resnet50(), 8, 64, 1000),
    "ResNet-50, B=8, 224²": lambda: _images(resnet50(), 8, 224, 1000),
    "ViT-Tiny, B=16, 224²": lambda: _images(VisionTransformer(), 16, 224, 1000),
    "GPT-2 4×256, B=4, S=128": _gpt,
}


Products = dict[str, Callable[[], dict[str, Tensor]]]


def peers(work: Workload, v: dict[str, Tensor]) -> Products:
    """Everybody's H·v, fresh unless it says otherwise; attention is decomposed, as double derivatives need it."""
    params = {name: p.detach() for name, p in work.model.named_parameters()}
    own = dict(work.model.named_parameters())
    names, vectors = list(own), [v[name] for name in own]
    gradient = torch.func.grad(work.functional)

    def named(values: Any) -> dict[str, Tensor]:
        return dict(zip(names, values, strict=True))

    def double_backward() -> dict[str, Tensor]:
        first = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)
        return named(torch.autograd.grad(first, list(own.values()), vectors))

    def forward_over_reverse(params: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.jvp(gradient, (params,), (v,))[1]

    kept = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)
    _, push = torch.func.linearize(gradient, params)
    compiled = torch.compile(forward_over_reverse, dynamic=False)
    return {
        "functorch jvp∘grad": lambda: forward_over_reverse(params, v),
        "functorch jvp∘grad, torch.compile": lambda: compiled(params, v),
        "functorch vjp∘grad": lambda: torch.func.vjp(gradient, params)[1](v)[0],
        "functorch linearize, amortized": lambda: push(v),
        "double-backward": double_backward,
        "double-backward, retained graph": lambda: named(
            torch.autograd.grad(kept, list(own.values()), vectors, retain_graph=True)
        ),
        **libraries(work, v),
    }


def libraries(work: Workload, v: dict[str, Tensor]) -> Products:
    """curvlinops' and hessian-eigenthings' Hessian products; ``make peers`` installs them."""
    import curvlinops
    import hessian_eigenthings

    own = dict(work.model.named_parameters())
    names, vectors, data = list(own), [v[name] for name in own], [(work.x, work.y)]
    hessian = curvlinops.HessianLinearOperator(
        work.model, nn.CrossEntropyLoss(), list(own.values()), data, check_deterministic=False
    )
    loss = hessian_eigenthings.supervised_loss(nn.CrossEntropyLoss())
    eigenthings, flat = (
        hessian_eigenthings.HessianOperator(work.model, data, loss),
        torch.cat([x.flatten() for x in vectors]),
    )

    def cut(flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([p.numel() for p in own.values()])
        return {name: x.reshape(own[name].shape) for name, x in zip(names, pieces, strict=True)}

    return {
        "curvlinops": lambda: dict(zip(names, hessian @ vectors, strict=True)),
        "hessian-eigenthings": lambda: cut(eigenthings.matvec(flat)),
    }


def jax_peers(work: Workload, v: dict[str, Tensor]) -> Products:
    """JAX under jit, for chains of Linear and SiLU; empty where JAX is not installed."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}
    own = dict(work.model.named_parameters())

    def turned(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: jnp.asarray(t.detach().numpy()) for name, t in tensors.items()}

    layers = [name.removesuffix(".weight") for name in own if name.endswith(".weight")]
    x, y = jnp.asarray(work.x.numpy()), jnp.asarray(work.y.numpy())

    def loss(params: dict[str, Any]) -> Any:
        h = x
        for k, layer in enumerate(layers):
            h = h @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]
            h = jax.nn.silu(h) if k + 1 < len(layers) else h
        return -jnp.take_along_axis(jax.nn.log_softmax(h), y[:, None], 1).mean()

    params, tangent = turned(own), turned(v)
    product = jax.jit(lambda p, t: jax.jvp(jax.grad(loss), (p,), (t,))[1])
    push = jax.jit(jax.linearize(jax.grad(loss), params)[1])

    def back(found: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.from_dlpack(t) for name, t in jax.block_until_ready(found).items()}

    return {
        "JAX jvp∘grad, jit": lambda: back(product(params, tangent)),
        "JAX linearize, jit, amortized": lambda: back(push(tangent)),
    }


def measure(name: str, rounds: int = 5) -> dict[str, Any]:
    """Medians of one workload, in gradients; None where somebody disagrees."""
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    own = dict(work.model.named_parameters())
    v = {key: torch.randn_like(p) for key, p in own.items()}
    batch = (work.x, work.y)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        H = dh.HessianOperator(work.model, batch, loss=F.cross_entropy)
        many = {key: torch.randn(PROBES, *p.shape).movedim(0, -1) for key, p in own.items()}

        def fresh() -> dict[str, Tensor]:
            H.refresh()
            return H @ v

        runs: dict[str, Callable[[], Any]] = {
            "ours, amortized": lambda: H @ v,
            "ours, fresh": fresh,
            **peers(work, v),
            **(jax_peers(work, v) if name.startswith("MLP") else {}),
        }
        results, unable = _tried(runs)
        runs = {key: run for key, run in runs.items() if key in results}
        truth = results["double-backward"]
        size = sum(float(x.norm()) ** 2 for x in truth.values()) ** 0.5
        differences = {
            key: sum(float((found[n] - truth[n]).norm()) ** 2 for n in truth) ** 0.5 / size
            for key, found in results.items()
        }
        wrong = {key: d for key, d in differences.items() if not d <= TOLERANCE}
        if any(key.startswith("ours") for key in wrong):
            return {"workload": name, "disagree": differences}
        unable |= {key: f"its product is off by {d:.1e}" for key, d in wrong.items()}
        runs = {key: run for key, run in runs.items() if key not in wrong}
        runs["gradient"] = lambda: torch.autograd.grad(work.value(), list(own.values()))
        runs["ours, GN and T apart"] = lambda: H.parts(v)
        runs[f"ours, {PROBES} at once"] = lambda: H @ many
        A = dh.HessianOperator(work.model, batch, loss=F.cross_entropy, space="activation")
        probes = torch.randn(PROBES, A.shape[0]).T
        runs[f"ours, activations, {PROBES} at once"] = lambda: A @ probes
        runs[f"ours, activations, GN and T apart, {PROBES} at once"] = lambda: A.parts(probes)
        started = time.perf_counter()
        runs["gradient"]()
        seconds = interleaved(runs, rounds if time.perf_counter() - started < 1 else 3)
    unit = median(seconds["gradient"])
    return {
        "workload": name,
        "gradient s": unit,
        "products agree to": max(d for key, d in differences.items() if key not in wrong),
        "gradients": {key: median(s) / unit / (PROBES if "at once" in key else 1) for key, s in seconds.items()},
        "spread": {key: spread(s) for key, s in seconds.items()},
        "unable": unable,
    }


def _tried(runs: Products) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Everybody's product, and why a peer has none."""
    results, unable = {}, {}
    for key, run in runs.items():
        try:
            results[key] = run()
        except Exception as error:  # whatever a peer raises is what the table says of it
            if key.startswith("ours"):
                raise
            unable[key] = f"{type(error).__name__}: {error}".splitlines()[0]
    return results, unable


def _written() -> dict[str, dict[str, Any]]:
    """Rows of the last run on this machine."""
    try:
        data = json.loads((RESULTS / "hvp.json").read_text())
    except FileNotFoundError:
        return {}
    return {row["workload"]: row for row in data["workloads"]} if data["machine"] == machine() else {}


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


def _draw(rows: list[dict[str, Any]]) -> None:
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
    figure.savefig(RESULTS / "hvp.png", dpi=130)
    plt.close(figure)


def main(names: list[str] | None = None) -> int:
    """Measure all workloads, or those whose name contains a given word; print and write. Other rows stay."""
    console = Console(width=120)
    rows = _written() if names else {}
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
        write_json("hvp", {"workloads": ordered})
        write_text(RESULTS / "hvp.md", _markdown(ordered))
        _draw(ordered)
    return 0
