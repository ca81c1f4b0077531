"""Compile the generated kernels ahead of time for two architectures, and print what they use, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.kernels import activation
from dag_hesse.kernels import attention, batch_affine, contraction, elementwise, probe, program, rowwise
from dag_hesse.kernels.elementwise.triton import Form, Term

ARCHITECTURES = (80, 90)
TYPES: dict[str, str] = {"fp32": "tl.float32", "fp64": "tl.float64", "bf16": "tl.float32"}
ALL = tuple(TYPES)


@dataclass(frozen=True)
class Configuration:
    """A kernel as it is compiled; ``odd`` are integer arguments that are no multiples of 16."""

    kernel: Callable[[str], Any]  # of the type that is computed in
    constants: Callable[[str], Mapping[str, int]]
    odd: tuple[str, ...] = ()
    types: tuple[str, ...] = ALL
    pointers: Mapping[str, str] = field(default_factory=dict)  # those that are of another type
    short: tuple[str, ...] = ()  # integers of 32 bits
    architectures: tuple[int, ...] = ARCHITECTURES


def _activation(name: str) -> Configuration:
    def kernel(dtype: str) -> Any:
        x = torch.linspace(-1, 1, 8)
        recorded = activation(name, x, x)
        return program.triton.compiled(recorded, (True,) * recorded.operands, 1, dtype)

    return Configuration(kernel, lambda dtype: {"BLOCK": 1024}, ("n0",))


def _sums(coefficients: Any, results: Any, *operands: str) -> Configuration:
    """Products of a node of one input, of a sum of two, of a product of two, and of BatchNorm."""

    def kernel(dtype: str) -> Any:
        return elementwise.triton.compiled(Form(coefficients, results, operands, dtype))

    return Configuration(kernel, lambda dtype: {"BLOCK": 1024, "ROWS": 8}, ("first", "stop"))


def _rows(first: str, second: str | None, share: float, *types: str) -> Configuration:
    """Rows that take a share of what is held on chip, the most; more are gone through in pieces."""

    def form(dtype: str) -> tuple[rowwise.forms.Form, rowwise.forms.Shape]:
        how = rowwise.forms.shape(int(rowwise.forms.ON_CHIP[dtype] * share), dtype)
        return rowwise.forms.Form(first, second, second is not None, how.looped, dtype), how

    def constants(dtype: str) -> Mapping[str, int]:
        how = form(dtype)[1]
        return {"ROWS": 8, "M": how.rows, "N": how.columns, "num_warps": how.warps}

    return Configuration(
        lambda dtype: rowwise.forms.compiled(form(dtype)[0]), constants, ("count", "first", "stop"), types or ALL
    )


def _probes(parts: int, *types: str) -> Configuration:
    """Signs (0), and squares of one part or two."""
    constants = {"WORDS": probe.triton.WORDS, "PIECE": probe.triton.PIECE, "PIECES": probe.triton.PIECES}

    def used(dtype: str) -> Mapping[str, int]:
        return {n: value for n, value in constants.items() if n in probe.triton.compiled(parts).arg_names}

    return Configuration(lambda dtype: probe.triton.compiled(parts), used, ("key", "first", "groups"), types)


def _attention(arch: int, kind: str, width: int, wants: tuple[int, ...] = ()) -> Configuration:
    """Causal attention, all of whose operands move: the most that a kernel has to do."""
    met = kind in ("queries", "keys")
    form = attention.forms.Form(
        kind, 0.125, 1.0, ("bias",), True, () if kind == "rows" else (0, 1, 2), met, met, wants, (), "tl.float32", False
    )
    tile, kernel = attention.forms.TILES[arch // 10][width][kind], attention.tiles.compiled(form)
    dense = {n: 1 for n in kernel.arg_names if n.endswith("_j")}  # strides of what lies side by side
    constants = {"M": tile.queries, "N": tile.keys, "D": width, "E": width, "num_warps": tile.warps, "num_stages": 1}
    return Configuration(
        lambda dtype: kernel, lambda dtype: constants | dense, types=("bf16",),
        pointers={"p_lse": "fp32", "p_from": "i32", "p_to": "i32"},
        short=("matrices", "heads", "queries", "keys", "width", "values", *(n for n in kernel.arg_names if n.endswith("_i"))),
        architectures=(arch,),
    )  # fmt: skip


def _product(tile: contraction.triton.Tile, along: str) -> Configuration:
    """A product whose first operand lies ``along`` its rows or its terms."""
    kernel = contraction.triton.compiled()
    constants = {"M": tile.rows, "N": tile.columns, "K": contraction.triton.DEPTH, "ADDS": 1, "num_warps": tile.warps,
                 "num_stages": contraction.triton.STAGES, along: 1, "to_column": 1}  # fmt: skip
    short = tuple(n for n in kernel.arg_names if not n.startswith("p_"))
    return Configuration(
        lambda dtype: kernel, lambda dtype: constants, types=("fp32",), short=short, architectures=(90,)
    )


# Numbers, one a row of x, come in narrow loads, and so does a bias, as the scores of a product lie: the budget counts
# those.
ROWS: dict[str, Any] = {
    "softmax tangent": ("softmax tangent", None, 1 / 8),
    "softmax adjoints": ("softmax", "softmax second", 1 / 8),
    "log_softmax tangent": ("log_softmax tangent", None, 1 / 8, "fp32"),
    "log_softmax adjoints": ("log_softmax", "log_softmax second", 1 / 8, "fp32"),
    "standardize tangent": ("standardize centered tangent", None, 1 / 8),
    "standardize adjoints": ("standardize centered", "standardize second", 1 / 8),
    "softmax adjoints of the longest rows": ("softmax", "softmax second", 1, "fp32", "fp64"),
    "standardize adjoints of the longest rows": ("standardize centered", "standardize second", 1, "fp32", "fp64"),
    "softmax adjoints in pieces": ("softmax", "softmax second", 8, "fp32"),
    "standardize adjoints in pieces": ("standardize centered", "standardize second", 8, "fp32"),
}
CONFIGURATIONS: dict[str, Configuration] = {
    **{name: _activation(name) for name in ("gelu", "silu", "tanh", "sigmoid")},
    "tangent": _sums(("tensor",), ((Term(0, 0, False),),), "tensor"),
    "tangent of a gate": _sums(("gate",), ((Term(0, 0, False),),), "tensor"),
    "both channels": _sums(("tensor", "tensor"), ((Term(0, 0, False), Term(1, 1, True)),), "tensor", "tensor"),
    "tangent of BatchNorm": _sums(
        ("spread", "tensor", 1.0),
        ((Term(0, 0, False), Term(1, 1, False), Term(2, 2, False)),),
        "tensor",
        "spread",
        "spread",
    ),
    "both channels of BatchNorm": _sums(
        ("spread", "tensor"), ((Term(0, 0, False), Term(1, 1, True)),), "tensor", "spread"
    ),
    "sums of BatchNorm": Configuration(
        batch_affine.triton.compiled,
        lambda dtype: {"N": 4, "I": 256, "STEP": 16},
        ("batch", "channels"),
        short=("batch", "channels", "inner"),
    ),
    "both channels of a product": _sums(
        ("tensor",) * 3,
        ((Term(0, 0, False), Term(2, 2, True)), (Term(1, 0, False), Term(2, 1, True))),
        *("tensor",) * 3,
    ),
    "signs": _probes(0, "fp32", "bf16"),
    "squares of two parts": _probes(2, "fp32", "bf16"),
    **{
        f"attention, {name} of {width}, sm_{arch}": _attention(arch, kind, width, wants)
        for arch in ARCHITECTURES
        for width, name, kind, wants in (
            (64, "log-sum-exp", "rows", ()),
            (64, "tangent", "tangent", ()),
            (64, "adjoint of q", "queries", (0,)),
            (64, "adjoints of k and v", "keys", (1, 2)),
            (128, "tangent", "tangent", ()),
            (128, "adjoint of q", "queries", (0,)),
            (128, "adjoint of k", "keys", (1,)),
        )
    },
    **{
        f"product in tiles of {one.rows} by {one.columns}, {along}": _product(one, along)
        for one in contraction.triton.TILES
        for along in ("x_row", "x_term")
    },
    "operands of products": Configuration(
        lambda dtype: contraction.triton.compiled_apart(),
        lambda dtype: {"SIZE": 32, "x_term": 1},
        types=("fp32",),
        short=("rows", "terms", "padded", "inner"),
        architectures=(90,),
    ),
    **{f"rowwise, {name}": _rows(*one) for name, one in ROWS.items()},
}
NAMES = [
    f"{name} {kind} sm_{arch}"
    for name, one in CONFIGURATIONS.items()
    for kind in one.types
    for arch in one.architectures
]


def _compile(one: Configuration, kind: str, arch: int) -> dict[str, int]:
    import triton as theirs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = one.kernel(TYPES[kind])
    names, constants = kernel.arg_names, dict(one.constants(TYPES[kind]))
    options = {n: constants.pop(n, default) for n, default in (("num_warps", 4), ("num_stages", 3))}
    pointers = [n for n in names if n.startswith("p_") or (n[0] in "pcxy" and n[1:].isdigit())]
    numbers = {n: "constexpr" if n in constants else "i32" if n in one.short else "i64" for n in names}
    signature = {n: f"*{one.pointers.get(n, kind)}" if n in pointers else numbers[n] for n in names}
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in (*constants, *one.odd)}
    given = {(names.index(n),): value for n, value in constants.items() if n in names}
    code = ASTSource(kernel, signature, constexprs=given, attrs=whole)
    binary = theirs.compile(code, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    tool = Path(theirs.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = dict(part.split(":") for part in text.split() if part.startswith(("REG:", "STACK:")))
    moved = re.findall(r"\bLDG(?:STS)?\.\S+", text) or re.findall(r"\bSTG\.\S+", text)  # what loads nothing stores
    return {
        "registers": int(use["REG"]),
        "stack": int(use["STACK"]),
        "spills": text.count("LDL") + text.count("STL"),
        "loads": len(moved),
        "wide loads": sum(".128" in name for name in moved),
    }


def usages() -> Iterator[tuple[str, dict[str, int]]]:
    """(name, what it uses) of every declared configuration."""
    for name, one in CONFIGURATIONS.items():
        for kind in one.types:
            for arch in one.architectures:
                yield f"{name} {kind} sm_{arch}", _compile(one, kind, arch)


if __name__ == "__main__":
    print(json.dumps(dict(usages())))
