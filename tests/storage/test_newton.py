"""The experiment on preconditioners, in small: what a band of blocks does to a step."""

from __future__ import annotations

import torch
from torch import nn

from dag_hesse.experiments.newton import DAMPINGS, steps, train


def test_steps_get_better_with_the_band() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    batch = torch.randn(9, 6).double(), torch.arange(9) % 3
    before = [p.clone() for p in model.parameters()]
    found = {(step.method, step.damping): step for step in steps(model, batch)}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {name for name, _ in found} == {"band 0", "band 1", "band 2", "band 3", "K-FAC", "whole"}
    assert found["band 2", 1.0].error < found["band 0", 1.0].error

    def outputs(*parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(model, named, (batch[0],))

    p = outputs(*model.parameters()).detach().softmax(1)
    J = torch.cat([j.flatten(2) for j in torch.autograd.functional.jacobian(outputs, tuple(model.parameters()))], 2)
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    G = torch.einsum("bci,bcd,bdj->ij", J, H, J)
    g = torch.einsum("bci,bc->i", J, p - nn.functional.one_hot(batch[1], 3)) / len(p)
    blocks = torch.block_diag(*(G[a:b, a:b] for a, b in ((0, 35), (35, 65), (65, 95), (95, 113))))
    for damping in DAMPINGS:
        whole, step = (torch.linalg.solve(M + damping * torch.eye(len(g)), g) for M in (G, blocks))
        assert abs(found["band 0", damping].error - float((step - whole).norm() / whole.norm())) < 1e-8
        assert found["band 3", damping].error < 1e-8
    train(model, batch)
    assert steps(model, batch)[0].before < found["band 0", 1.0].before
