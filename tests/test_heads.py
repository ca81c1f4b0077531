"""Heads of projections as points, against double-backward with leaves added to slices of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors


class Attention(nn.Module):
    """Queries of four heads, keys and values of two, which are shared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4)
        self.o_proj, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, 4, 2).transpose(1, 2)
        k, v = (p(x).view(b, t, 2, 2).transpose(1, 2).repeat_interleave(2, 1) for p in (self.k_proj, self.v_proj))
        weights = (q @ k.transpose(-1, -2) / 2**0.5).softmax(-1)
        return self.head(self.o_proj((weights @ v).transpose(1, 2).reshape(b, t, 8)).tanh().mean(1))


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 2, 1])
# A head by its module, and the columns that it has there.
HEADS = {
    "q_proj[head 1]": ("q_proj", slice(2, 4)),
    "q_proj[head 3]": ("q_proj", slice(6, 8)),
    "k_proj[head 0]": ("k_proj", slice(0, 2)),
    "v_proj[head 1]": ("v_proj", slice(2, 4)),
    "o_proj": ("o_proj", slice(0, 6)),
}


def _blocks(model: nn.Module, heads: dict[str, tuple[str, slice]], batch: int = 1) -> dict[tuple[str, str], Tensor]:
    """Blocks by leaves of zeros (batch, 5, columns), added to slices of modules' outputs by hooks."""
    leaves = {
        name: torch.zeros(batch, 5, cols.stop - cols.start).double().requires_grad_()
        for name, (_, cols) in heads.items()
    }

    def added(path: str, output: Tensor) -> Tensor:
        columns = list(output.unbind(-1))
        for name, (module, cols) in heads.items():
            for k in range(cols.start, cols.stop) if module == path else ():
                columns[k] = columns[k] + leaves[name][..., k - cols.start]
        return torch.stack(columns, -1)

    hooks = [
        model.get_submodule(path).register_forward_hook(lambda m, args, output, path=path: added(path, output))
        for path in {module for module, _ in heads.values()}
    ]
    first = torch.autograd.grad(F.cross_entropy(model(X), Y), list(leaves.values()), create_graph=True)
    for hook in hooks:
        hook.remove()
    found = {}
    for v, g in zip(leaves, first, strict=True):
        rows = [torch.autograd.grad(x, list(leaves.values()), retain_graph=True) for x in g.flatten()]
        for k, w in enumerate(leaves):
            found[v, w] = torch.stack([row[k].flatten() for row in rows])
    return found


def test_blocks_between_heads() -> None:
    model = Attention()
    expected = _blocks(model, HEADS)
    report = dh.analyze(model, (X, Y), points=list(HEADS), mode="exact")
    assert set(report.names) == set(HEADS)
    for v in HEADS:
        for w in HEADS:
            assert torch.allclose(report.block(v, w), expected[v, w], atol=1e-12)
            assert float(report[v, w].resonance) == pytest.approx(float(expected[v, w].norm()), rel=1e-9, abs=1e-14)
    assert report.block("v_proj[head 1]", "v_proj[head 1]", "tensor").norm() > 0  # tanh
    joint = dh.analyze(model, (X, Y), points=list(HEADS), batch_mode="joint")
    whole = _blocks(model, HEADS, batch=3)
    assert torch.allclose(
        joint.block("q_proj[head 1]", "k_proj[head 0]"), whole["q_proj[head 1]", "k_proj[head 0]"], atol=1e-12
    )


def test_heads_make_up_their_projection() -> None:
    model = Attention()
    whole = dh.analyze(model, (X, Y), points=["q_proj", "o_proj"], mode="exact")
    heads = dh.analyze(model, (X, Y), points=["q_proj[head *]", "q_proj", "o_proj"], mode="exact")
    names = [f"q_proj[head {k}]" for k in range(4)]
    assert list(heads.names) == ["q_proj", *names, "o_proj"]
    for part in ("gn_norm", "tensor_norm", "resonance"):
        squares = heads.values[part] ** 2
        places = [heads.index(name) for name in names]
        q, o = whole.index("q_proj"), whole.index("o_proj")
        assert squares[np.ix_(places, places)].sum() == pytest.approx(whole.values[part][q, q] ** 2, rel=1e-10)
        assert squares[places, heads.index("o_proj")].sum() == pytest.approx(whole.values[part][q, o] ** 2, rel=1e-10)
        assert heads.values[part][0, 0] == pytest.approx(whole.values[part][q, q], rel=1e-10)
    explicit = dh.analyze(model, (X, Y), points=["o_proj[head 1 of 3]", "q_proj[head 1]"])
    expected = _blocks(model, {"o": ("o_proj", slice(2, 4)), "q": HEADS["q_proj[head 1]"]})
    assert torch.allclose(explicit.block("o_proj[head 1 of 3]", "q_proj[head 1]"), expected["o", "q"], atol=1e-12)


def test_operators_batches_and_stored_blocks_take_heads() -> None:
    model, names = Attention(), ["q_proj[head 1]", "k_proj[head 0]"]
    expected = _blocks(model, {name: HEADS[name] for name in names})
    H = dh.HessianOperator(model, (X, Y), space="activation", points=names)
    assert torch.allclose(H[names[0], names[1]].dense(), expected[names[0], names[1]], atol=1e-12)
    batches = [(X[:1], Y[:1]), (X[1:], Y[1:])]  # another graph for each
    several = dh.HessianOperator(model, batches, space="activation", points=names)
    assert torch.allclose(several.dense(), H.dense(), atol=1e-12)
    assert torch.allclose(H.with_batch(batches).dense(), H.dense(), atol=1e-12)
    B = dh.BlockMatrix.from_model(model, (X, Y), points=names, error=0)
    assert torch.allclose(B[names[0], names[1]].dense(), H[names[0], names[1]].dense(), atol=1e-12)


def test_heads_of_a_fused_projection() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.randint(0, 11, (2, 5))

    def loss(output: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    path = "transformer.h.0.attn.c_attn"
    points = [f"{path}[head {k}]" for k in range(6)]  # queries, keys and values of two heads
    report = dh.analyze(model, (ids, ids), loss=loss, points=f"{path}[head *]", mode="exact")
    assert list(report.names) == points
    leaf = torch.zeros(1, 5, 24, dtype=torch.float64, requires_grad=True)
    hook = model.get_submodule(path).register_forward_hook(lambda m, args, output: output + leaf)
    (first,) = torch.autograd.grad(loss(model(ids), ids), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in first.flatten()]
    hook.remove()
    dense = torch.stack(rows).reshape(5, 24, 5, 24)
    for i, v in enumerate(points):
        for j, w in enumerate(points):
            expected = dense[:, 4 * i : 4 * i + 4, :, 4 * j : 4 * j + 4].reshape(20, 20)
            assert torch.allclose(report.block(v, w), expected, atol=1e-12)


@pytest.mark.parametrize(
    "points, message",
    [
        (["q_proj[head 4]"], r"columns and 4 heads: expected \[head 0\] to \[head 3\]"),
        (["q_proj[head 1 of 3]"], "8 columns and 3 heads.*equally wide"),
        (["q_proj[head 0 of 0]"], "equally wide"),
        (["nowhere[head 0]"], "no output of that name"),
        (["o_proj[head 0]"], r"say how many, as 'o_proj\[head 0 of 4\]' of its 6 columns"),
        (["head[head 0]"], "what the loss consumes"),
        (["q_proj[hed 0]"], "Near names: 'q_proj'"),
    ],
)
def test_what_is_no_head(points: Sequence[str], message: str) -> None:
    with pytest.raises(errors.PointError, match=message):
        dh.analyze(Attention(), (X, Y), points=points)
