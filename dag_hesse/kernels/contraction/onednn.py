"""float32 products by oneDNN, which PyTorch has beside MKL: on AMD's processors with AVX-512 it is twice as fast.

MKL takes its AVX-512 kernels on Intel's processors alone. On two cores of an EPYC, products of 10⁷ multiply-adds and
more run at 180 to 215 GFLOP/s by MKL, at 400 to 480 by oneDNN; where a first operand's rows are not whole, it is copied
first, and 260 to 430 are reached.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dag_hesse.kernels.arena import Arena, added
from dag_hesse.kernels.contraction.by_product import outer_by, refuse_outer_by
from dag_hesse.kernels.machine import machine

# Inductor compiles oneDNN's own op for constant weights alone; this one it calls as it is.
_LIBRARY = torch.library.Library("dag_hesse", "FRAGMENT")
_LIBRARY.define("times_transpose(Tensor x, Tensor y) -> Tensor")


@torch.library.impl(_LIBRARY, "times_transpose", "CPU")
def _times_transpose(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ of (n, k) and (m, k)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return found


@torch.library.impl(_LIBRARY, "times_transpose", "Meta")
def _shape(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(len(x), len(y))


def refuse_product(a: Tensor, b: Tensor, into: Tensor | None) -> str | None:
    if a.device.type != "cpu":
        return "operands are not in main memory"
    if any(x.dtype is not torch.float32 for x in (a, b)):
        return "operands are not float32"
    if a.ndim != 3 or b.ndim != 3:
        return "operands have other axes than one of rows and two of a matrix"
    shared = len(a) if len(b) == 1 else 1
    if shared * a.shape[1] * a.shape[2] * b.shape[2] < machine(a.device).onednn:
        return "MKL is as fast on this processor, or products are small"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN is switched off, or PyTorch was built without it"
    return None


def product(arena: Arena, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    if len(b) == 1:
        found = _mm(a.reshape(-1, a.shape[-1]), b[0], None if into is None else into[0])
        return added(found.view(*a.shape[:-1], b.shape[-1]), into)
    to = arena.empty(a, len(b), a.shape[1], b.shape[2]) if into is None else into
    for k, row in enumerate(to):
        found = _mm(a[min(k, len(a) - 1)], b[k], row)
        row.copy_(found) if into is None else row.add_(found)
    return to


def _mm(a: Tensor, b: Tensor, to: Tensor | None) -> Tensor:
    """a @ b of (n, k) and (k, m), laid out like ``to`` if that is no slower."""
    turned = _copied(b.mT, a.mT, None if to is None else to.mT, turned=True) < _copied(a, b, to, turned=False)
    x, y = (b.mT, a) if turned else (a, b.mT)
    found: Tensor = torch.ops.dag_hesse.times_transpose(x, y)
    return found.mT if turned else found


def _copied(x: Tensor, y: Tensor, to: Tensor | None, turned: bool) -> int:
    """Elements that are copied into another layout for x @ y: x if its rows are not whole, and the result for ``to``.

    Without ``to``, the result is to have whole rows, or whole columns where it is ``turned``.
    """
    wrong = turned if to is None else to.stride(-1) != 1
    return (x.numel() if x.stride(-1) != 1 else 0) + (len(x) * y.shape[1] if wrong else 0)


def substituted(part: fx.GraphModule) -> fx.GraphModule:
    """A program with its products by oneDNN, where they are not refused; the given one is changed."""
    aten = torch.ops.aten
    for node in part.graph.nodes:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        if refuse_product(a.meta["val"][None], b.meta["val"][None], None) is not None:
            continue
        with part.graph.inserting_before(node):
            turned = part.graph.call_function(aten.t.default, (b,))
            made = part.graph.call_function(torch.ops.dag_hesse.times_transpose.default, (a, turned))
            if bias:
                made = part.graph.call_function(aten.add.Tensor, (made, *bias))
        node.replace_all_uses_with(made)
        part.graph.erase_node(node)
    part.recompile()
    return part


outer = outer_by(product)
refuse_outer = refuse_outer_by(refuse_product)

__all__ = ["outer", "product", "refuse_outer", "refuse_product", "substituted"]
