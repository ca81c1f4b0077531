"""Small Transformers whose projections are modules of their own, so that heads are points by name, and their data."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from dag_hesse.experiments.data import Data, Split

VOCABULARY, TOKENS = 16, 16
_TRAIN, _TEST = 16384, 256


class Attention(nn.Module):
    """Self-attention of some heads; ``causal`` hides later tokens."""

    def __init__(self, width: int, heads: int = 1, causal: bool = False, bias: bool = True, out: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(width, width, bias=bias) if out else nn.Identity()
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        scores = q @ k.mT / math.sqrt(shape[-1])
        if self.causal:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        mixed = scores.softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """GPT-2's: attention and a GELU MLP of four times the width, each behind a LayerNorm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal=True)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.proj(nn.functional.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's shape and initialization (Radford et al., 2019), the head untied; returns (batch, vocabulary, tokens)."""

    def __init__(
        self, width: int = 64, heads: int = 4, layers: int = 4, vocabulary: int = VOCABULARY, tokens: int = TOKENS
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_stream = name.endswith("proj") and name.split(".")[-1] in ("proj", "o_proj")
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if into_stream else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x)).mT


def _as_it_is(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return x


def repeats(folder: Path | None = None, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Data:
    """Random tokens whose second half repeats the first; the targets are the next ones. A folder is not needed.

    The first half cannot be foretold, the second can by attention alone.
    """
    g = torch.Generator().manual_seed(0)
    half = torch.randint(0, vocabulary, (_TRAIN + _TEST, (tokens + 2) // 2), generator=g)
    ids = torch.cat([half, half], 1)[:, : tokens + 1]
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    parts = Split(x[:_TRAIN], y[:_TRAIN], _as_it_is), Split(x[_TRAIN:], y[_TRAIN:], _as_it_is)
    return Data("random tokens, repeated", *parts, vocabulary)
