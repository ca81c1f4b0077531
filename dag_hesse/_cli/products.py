"""Commands that need products alone: ``dag-hesse hvp SPEC`` and ``dag-hesse spectrum SPEC``."""

from __future__ import annotations

import argparse
from math import log10
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dag_hesse._cli.output import add_json, give
from dag_hesse._cli.spec import add_model, built, positive
from dag_hesse.errors import MissingFileError, VectorError
from dag_hesse.files import write_whole
from dag_hesse.operators import CurvatureOperator, GGNOperator, HessianOperator, TensorOperator
from dag_hesse.theory.text import table

PARTS: dict[str, type[CurvatureOperator]] = {"full": HessianOperator, "gn": GGNOperator, "tensor": TensorOperator}
_DENSE = 64  # rows up to which all eigenvalues are found
_ROWS, _BAR = 20, 30  # of the density as text
_FAINT = -4.0  # decades: the least share that has a bar
_HVP = """examples:
  dag-hesse hvp mlp
  dag-hesse hvp mymodel:build --points 'layer*' --part gn --seed 1 --out product.safetensors
  dag-hesse hvp mymodel:build --vector direction.safetensors --json -"""
_SPECTRUM = """examples:
  dag-hesse spectrum mlp
  dag-hesse spectrum resnet18 --top 10 --bottom 2 --tol 1e-2 --steps 40 --json spectrum.json
  dag-hesse spectrum mymodel:build --part tensor --points head.weight"""


def add(commands: Any) -> None:
    """Both commands."""
    h = _command(commands, "hvp", "one product of the Hessian with a vector", _HVP)
    h.add_argument("--vector", type=Path, metavar="FILE", help="safetensors by parameters' names (default: random)")
    h.add_argument("--out", type=Path, metavar="FILE", help="write the product as safetensors, by names")
    h.set_defaults(run=hvp)
    s = _command(commands, "spectrum", "the Hessian's outermost eigenvalues and spectral density", _SPECTRUM)
    s.add_argument("--top", type=positive, default=5, metavar="N", help="largest eigenvalues (default: 5)")
    s.add_argument("--bottom", type=positive, default=5, metavar="N", help="smallest eigenvalues (default: 5)")
    s.add_argument("--tol", type=float, default=1e-3, metavar="X", help="their relative residual (default: 0.001)")
    s.add_argument("--steps", type=positive, metavar="N", help="Lanczos steps of the density (default: at most 64)")
    s.add_argument("--repeats", type=positive, default=1, metavar="N", help="starts it is averaged over (default: 1)")
    s.set_defaults(run=spectrum)


def _command(commands: Any, name: str, does: str, examples: str) -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        name, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=examples, formatter_class=plain
    )
    add_model(command, space="parameter")
    command.add_argument("--part", choices=PARTS, default="full", help="of the Hessian (default: full)")
    add_json(command)
    return command


def _operator(options: argparse.Namespace) -> CurvatureOperator:
    model, batch, loss = built(options)
    return PARTS[options.part](
        model, batch, loss=loss, space=options.space, points=options.points, output=options.output
    )


def hvp(options: argparse.Namespace) -> None:
    """Multiply, write the product, and say how long it is in every parameter."""
    given = None if options.vector is None else _read(options.vector)
    operator = _operator(options)
    if given is None:
        generator = torch.Generator().manual_seed(options.seed)
        drawn = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64, device="cpu")
        given = operator.by_name(drawn.to(operator.dtype).to(operator.device))
    vector = {name: x.to(operator.device) for name, x in given.items()}
    product = operator @ vector
    if options.out:
        solid = {name: x.contiguous().cpu() for name, x in product.items()}
        write_whole(options.out, lambda place: save_file(solid, place, {"format": "pt"}))
    rows = [_segment(name, vector[name], product[name]) for name in operator.names]
    whole = [_total(rows, key) for key in ("vector", "product")]
    inner = sum(row["inner"] for row in rows)
    data = {
        "loss": operator.loss,
        "part": options.part,
        "segments": rows,
        "vector": whole[0],
        "product": whole[1],
        "inner": inner,
    }
    lines = [(r["name"], "×".join(map(str, r["shape"])), r["vector"], r["product"], r["inner"]) for r in rows]
    shown = table(["point", "shape", "‖v‖", "‖Hv‖", "v·Hv"], [*lines, ("all", "", *whole, inner)])
    give(options.json, data, f"{shown}\n\nwritten to {options.out.resolve()}" if options.out else shown)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise MissingFileError(f"there is no vector at '{path}': expected a safetensors file, a tensor per parameter.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise VectorError(
            f"'{path}' is no vector: expected a safetensors file, a tensor per parameter ({error})."
        ) from error


def _segment(name: str, v: Tensor, product: Tensor) -> dict[str, Any]:
    v, product = v.double(), product.double()
    norms = {"vector": float(v.norm()), "product": float(product.norm()), "inner": float((v * product).sum())}
    return {"name": name, "shape": list(v.shape), **norms}


def _total(rows: list[dict[str, Any]], key: str) -> float:
    return float(sum(row[key] ** 2 for row in rows) ** 0.5)


def spectrum(options: argparse.Namespace) -> None:
    """Find both ends of the spectrum and its density."""
    operator = _operator(options)
    n = operator.shape[0]
    top, bottom = _ends(operator, options)
    grid, density = [], []
    if n > 3:
        steps = None if options.steps is None else min(options.steps, n - 1)
        found = operator.spectral_density(steps, options.seed, num_repeats=options.repeats)
        grid, density = (x.double().tolist() for x in found)
    data = {"size": n, "part": options.part, "top": top, "bottom": bottom, "grid": grid, "density": density}
    lines = [f"{n} eigenvalues", "largest:  " + _row(top), "smallest: " + _row(bottom)]
    give(options.json, data, "\n".join([*lines, *(["", *_density(grid, density)] if grid else [])]))


def _ends(operator: CurvatureOperator, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The largest eigenvalues, descending, and the smallest, ascending."""
    n = operator.shape[0]
    if n <= _DENSE:
        dense = operator.dense().double()
        values = torch.linalg.eigvalsh((dense + dense.T) / 2).tolist()
        return values[::-1][: options.top], values[: options.bottom]
    found = [
        operator.eigsh(min(k, n - 1), which=which, tol=options.tol, seed=options.seed)[0].tolist()
        for k, which in ((options.top, "LA"), (options.bottom, "SA"))
    ]
    return sorted(found[0], reverse=True), sorted(found[1])


def _row(values: list[float]) -> str:
    return "  ".join(f"{value:.4g}" for value in values)


def _density(grid: list[float], density: list[float]) -> list[str]:
    """Shares of eigenvalues over pieces of the axis, with bars in proportion to their logarithms."""
    x, share = torch.tensor(grid), torch.tensor(density)
    pieces = zip(x.tensor_split(_ROWS), (share / share.sum()).tensor_split(_ROWS), strict=True)
    rows = [(f"{float(part[0]):.3g}", float(shares.sum())) for part, shares in pieces]
    wide = max(len(start) for start, _ in rows)
    lines = [f"{start:>{wide}}  {part:9.4%}  {_bar(part)}".rstrip() for start, part in rows]
    return ["from λ, share of eigenvalues (bars: its logarithm)", *lines]


def _bar(share: float) -> str:
    return "█" * round(_BAR * max(0.0, 1 - log10(share) / _FAINT)) if share > 0 else ""
