"""How blocks of attention grow with the scale of its input, by counting and as measured; the (Q, K) gap of every head.

One layer of self-attention, F = softmax(M) X W_V with M = X W_Q W_Kᵀ Xᵀ/√d, has the loss mean (F − Y)². Give the input
the scale s: X = s X₀. While s is small, softmax and its derivatives are those at M = 0, of order s⁰, the residual
F − Y is of order s⁰, and ∇²L is constant. Powers of s come from derivatives alone:

- F is linear in X W_V: F itself, and ∂F/∂W_V, are of order s.
- M is bilinear in W_Q and W_K, with all its derivatives of order s²: ∂F/∂W_Q, ∂F/∂W_K ∼ s² · s = s³.
- H_GN[v, w] is a product of two first derivatives: 2 for (V, V), 6 for (Q, Q), (K, K) and (Q, K), 4 for (Q, V) and
  (K, V).
- H_T[v, w] is a second derivative times the residual. (Q, V), (K, V): 3. (Q, Q), (K, K): M is linear in each, so that
  softmax must be differentiated twice, s⁴ · s = 5. (Q, K): the mixed derivative of M with softmax differentiated
  once leads, s² · s = 3. (V, V): none, since F is linear in W_V, and the block is exactly 0.

Between Q and K, H_T grows three powers slower than H_GN: where scores are small, it is nearly all there is.

A LayerNorm of the input is linear while the standard deviation of a token is far below √ε, which leaves all exponents
as they are. Far above it, its output does not depend on s: all exponents are 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse.experiments.data import Data, Split
from dag_hesse.experiments.gpt import Attention
from dag_hesse.experiments.measure import Batch, Values, exact_map, pair_gap
from dag_hesse.experiments.training import criterion

NAMES, PARTS = "QKV", ("GN", "T")
BLOCKS = ["".join(pair) for pair in itertools.product(NAMES, NAMES)]
COUNTED = {
    "GN": {"QQ": 6, "KK": 6, "VV": 2, "QK": 6, "QV": 4, "KV": 4},
    "T": {"QQ": 5, "KK": 5, "QK": 3, "QV": 3, "KV": 3},
}
SCALES = tuple(10 ** (k / 2) for k in range(-10, 3))
RANGES = {"small": (1e-5, 1e-4), "large": (1.0, 10.0)}
WIDTH, TOKENS = 8, 6


def counted(part: str, block: str, flat: bool = False) -> float | None:
    """The exponent that counting gives; ``flat``: far above √ε of a LayerNorm. None: the block is zero."""
    own = COUNTED[part].get(block, COUNTED[part].get(block[::-1]))
    return None if own is None else 0.0 if flat else float(own)


class Layer(nn.Module):
    """One head of attention without biases, behind a LayerNorm without parameters or none."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False) if norm else nn.Identity()
        self.attention = Attention(WIDTH, bias=False, out=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x))


def noise() -> Data:
    """Tokens and targets that are standard normal."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, TOKENS, WIDTH, generator=g)
    split = Split(x, y, lambda z, _: z)
    return Data("normal tokens", split, split, 0)


def exponents(model: nn.Module, batch: Batch) -> Values:
    """Norms of all blocks at every scale, ``GN QK @0.001``, and slopes of their logarithms, ``GN QK small``.

    A norm that is 0 has no slope.
    """
    x, y = batch
    points = [f"attention.{letter.lower()}_proj.weight" for letter in NAMES]
    maps = [exact_map(model, (scale * x.double(), y), points, space="parameter") for scale in SCALES]
    order = [maps[0].index(point) for point in points]
    found: Values = {}
    for part, metric in zip(PARTS, ("gn_norm", "tensor_norm"), strict=True):
        norms = np.array([each.values[metric][np.ix_(order, order)].ravel() for each in maps])
        for name, values in zip(BLOCKS, norms.T, strict=True):
            found |= {f"{part} {name} @{s:.3g}": float(v) for s, v in zip(SCALES, values, strict=True)}
            found |= {f"{part} {name} {where}": slope(SCALES, values, limits) for where, limits in RANGES.items()}
    return found


def slope(scales: Sequence[float], values: NDArray[np.float64], limits: tuple[float, float]) -> float:
    """Of the line through the logarithms, between two scales; NaN where a value is 0."""
    inside = [(s, v) for s, v in zip(scales, values, strict=True) if limits[0] * 0.99 < s < limits[1] * 1.01]
    if any(v == 0 for _, v in inside):
        return float("nan")
    x, y = np.log(np.array(inside)).T
    return float(np.polyfit(x, y, 1)[0])


def head_gaps(model: nn.Module, batch: Batch) -> Values:
    """‖H_T‖/‖H_GN‖ of (Q, K), both norms, of each head of each layer: ``gap 2.3`` is layer 2, head 3."""
    count = len(model.h)  # type: ignore[arg-type]
    points = [f"h.{layer}.attn.{letter}_proj[head *]" for layer in range(count) for letter in "qk"]
    report = exact_map(model, batch, points, loss=criterion)
    found: Values = {}
    for layer in range(count):
        for head in range(model.h[layer].attn.heads):  # type: ignore[index, union-attr]
            pair = [f"h.{layer}.attn.{letter}_proj[head {head}]" for letter in "qk"]
            found |= {f"{name} {layer}.{head}": value for name, value in pair_gap(report, *pair).items()}
    return found
