"""Compile the generated kernels ahead of time for two architectures, and print what they use, as JSON."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.kernels import activation
from dag_hesse.kernels import elementwise, program
from dag_hesse.kernels.elementwise.triton import Form, Term

ARCHITECTURES = (80, 90)
TYPES = {"fp32": "tl.float32", "fp64": "tl.float64", "bf16": "tl.float32"}
ACTIVATIONS = ("gelu", "silu", "tanh", "sigmoid")
# Products of a node of one input, of a sum of two, and of a product of two: coefficients, results, operands.
SUMS: dict[str, tuple[Any, Any, int]] = {
    "tangent": (("tensor",), ((Term(0, 0, False),),), 1),
    "tangent of a gate": (("gate",), ((Term(0, 0, False),),), 1),
    "both channels": (("tensor", "tensor"), ((Term(0, 0, False), Term(1, 1, True)),), 2),
    "both channels of a product": (
        ("tensor",) * 3,
        ((Term(0, 0, False), Term(2, 2, True)), (Term(1, 0, False), Term(2, 1, True))),
        3,
    ),
}
NAMES = [f"{name} {kind} sm_{arch}" for name in (*ACTIVATIONS, *SUMS) for kind in TYPES for arch in ARCHITECTURES]


def _kernel(name: str, kind: str) -> Any:
    if name in SUMS:
        return elementwise.triton.compiled(Form(*SUMS[name], TYPES[kind]))
    x = torch.linspace(-1, 1, 8)
    recorded = activation(name, x, x)
    return program.triton.compiled(recorded, (True,) * recorded.operands, 1, TYPES[kind])


def _compile(kernel: Any, kind: str, arch: int) -> dict[str, int]:
    import triton as theirs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, constants = kernel.arg_names, {"BLOCK": 1024, "ROWS": 8}
    pointers = [n for n in names if n[0] in "pcxy" and n[1:].isdigit()]
    signature = {n: f"*{kind}" if n in pointers else "constexpr" if n in constants else "i64" for n in names}
    aligned = {*pointers, "count", "size", *(n for n in names if n[0] == "s")}
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    given = {(names.index(n),): value for n, value in constants.items() if n in names}
    code = ASTSource(kernel, signature, constexprs=given, attrs=whole)
    binary = theirs.compile(code, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4}).asm["cubin"]
    tool = Path(theirs.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        texts = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    use = dict(part.split(":") for part in texts[0].split() if part.startswith(("REG:", "STACK:")))
    return {
        "registers": int(use["REG"]),
        "stack": int(use["STACK"]),
        "spills": texts[1].count("LDL") + texts[1].count("STL"),
        "loads": texts[1].count("LDG"),
        "wide loads": texts[1].count("LDG.E.128"),
    }


def usages() -> Iterator[tuple[str, dict[str, int]]]:
    """(name, what it uses) of every declared configuration."""
    for name in (*ACTIVATIONS, *SUMS):
        for kind in TYPES:
            for arch in ARCHITECTURES:
                yield f"{name} {kind} sm_{arch}", _compile(_kernel(name, kind), kind, arch)


if __name__ == "__main__":
    print(json.dumps(dict(usages())))
