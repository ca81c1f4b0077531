"""Changes under an operator: each way that weights are changed in practice is noticed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.errors import StaleError
from tests.oracle import error

X, Y = torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 0, 1, 1])


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def _dense(model: nn.Module) -> Tensor:
    p = list(model.parameters())
    first = torch.autograd.grad(F.cross_entropy(model(X), Y), p, create_graph=True)
    flat = torch.cat([g.flatten() for g in first])
    return torch.stack([torch.cat([h.flatten() for h in torch.autograd.grad(g, p, retain_graph=True)]) for g in flat])


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def _other_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


def _one_element(model: nn.Module) -> None:
    with torch.no_grad():
        model[4].weight[1, 2] += 1.0  # type: ignore[index]


def _exchanged(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)  # type: ignore[index]


def _narrowed(model: nn.Module) -> None:
    for layer, part in ((model[5], (slice(2),)), (model[6], (slice(None), slice(2)))):  # type: ignore[index]
        layer.weight.data = layer.weight.data[part].clone()


def _assigned(model: nn.Module) -> None:
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "optimizer": _step,
    ".data.mul_": lambda m: m[0].weight.data.mul_(2.0),
    ".data =": lambda m: setattr(m[4].bias, "data", m[4].bias.data + 1),
    "vector_to_parameters": _other_vector,
    "one element": _one_element,
    "another parameter": _exchanged,
    "running statistics": lambda m: m[1].running_var.mul_(2.0),
    "other running statistics": lambda m: setattr(m[1], "running_var", 2 * m[1].running_var),
    "no bias": lambda m: setattr(m[0], "bias", None),
    "transposed": lambda m: setattr(m[5].weight, "data", m[5].weight.data.T),
    "tied": lambda m: setattr(m[5], "weight", m[6].weight),
    "a layer with parameters": lambda m: m.__setitem__(2, nn.PReLU().double()),
    "no layer": lambda m: m.__setitem__(5, nn.Identity()),
    "other shapes": _narrowed,
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(m[5], "weight", nn.Tanh()),
    "training flags": lambda m: m.train(),
    "flag of one module": lambda m: m[3].train(),
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "load_state_dict, assigned": _assigned,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_taken_up(name: str) -> None:
    model = _net().extend([nn.Linear(3, 3, bias=False).double() for _ in range(2)]).eval()
    operator, report = dh.HessianOperator(model, (X, Y)), dh.analyze(model, (X, Y), points=["0", "4"])
    v = torch.randn(len(operator.dense())).double()
    CHANGES[name](model)
    for read in (lambda: operator @ v, lambda: report.block("0", "4")):
        with pytest.raises(StaleError, match=r"parameter '|buffer '|training flags"):
            read()
    torch.manual_seed(1)
    operator.refresh()
    found = operator.dense()
    torch.manual_seed(1)
    assert error(found, _dense(model)) < 1e-10


def test_refresh_differentiates_by_what_a_new_operator_would() -> None:
    model = _net().eval()
    operator, chosen = dh.HessianOperator(model, (X, Y)), dh.HessianOperator(model, (X, Y), params=["0.weight"])
    whole, part = operator.dense(), chosen.dense()
    model[0].weight.requires_grad_(False)
    assert torch.equal(operator.dense(), whole)
    for each, expected in ((operator, whole[15:, 15:]), (chosen, part)):
        each.refresh()
        assert error(each.dense(), expected) < 1e-12
    model[0].weight.requires_grad_(True)
    operator.refresh()
    assert error(operator.dense(), whole) < 1e-12


def test_a_copy_in_double_precision_takes_other_batches_and_tensors() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 3), torch.tensor(1.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)) * self.scale

    model, x = Scaled(), X.float()
    operator = dh.HessianOperator(model, (x, Y), float64=True)
    operator.dense()
    for change in (lambda: x.mul_(2), lambda: model.scale.mul_(2), lambda: setattr(model, "scale", torch.tensor(0.5))):
        change()
        operator.refresh()
        assert error(operator.dense(), dh.HessianOperator(model, (x, Y), float64=True).dense()) < 1e-12


def test_a_forward_in_training_mode_changes_nothing_that_is_read() -> None:
    model = _net().train()
    model[3].p = 0.0
    operator = dh.HessianOperator(model, (X, Y))
    before = operator.dense()
    model(X)
    assert torch.equal(operator.dense(), before)


def test_a_changed_batch_is_named() -> None:
    model, x = _net().eval(), X.clone()
    operator = dh.HessianOperator(model, (x, Y))
    operator.dense()
    x += 1
    with pytest.raises(StaleError, match="batch's tensor 0"):
        operator.dense()


def test_refresh_takes_other_settings_hooks_and_modules() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.act, self.b, self.beta = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), 1.0
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x))) * self.beta

    model = Scaled()
    operator = dh.HessianOperator(model, (X, Y))

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.sin()

    for change in (
        lambda: setattr(model, "beta", 3.0),
        lambda: setattr(model, "act", nn.Sigmoid()),
        lambda: model.a.register_forward_hook(hook),
    ):
        change()
        operator.refresh()
        assert error(operator.dense(), _dense(model)) < 1e-10
