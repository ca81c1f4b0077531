"""Bad input: a typed error before heavy work, and everything as it was."""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse._cli.spec import load_spec
from dag_hesse.experiments.digits import load_digits
from dag_hesse.experiments.models import mlp


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))


def _batch(size: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3), torch.arange(size) % 3


def _with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


class Detaching(nn.Module):
    """Passes through an op that has no derivative."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.op, self.head = nn.Linear(3, 4), op, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(self.first(x)))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x * 2 if x.sum() > 0 else x


class Noisy(nn.Module):
    """Draws a gain anew in every forward, from a generator of its own or from Python's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(3, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.draw()


def _poisoned(where: str) -> nn.Module:
    model = _net()
    with torch.no_grad():
        {"weight": model[0].weight, "buffer": model[1].running_mean}[where].view(-1)[0] = float("nan")
    return model


Case = tuple[Callable[[], Any], type[errors.DagHesseError], str]
CASES: dict[str, Case] = {
    "NaN weight": (lambda: dh.analyze(_poisoned("weight"), _batch()), errors.NonFiniteError, r"parameter '0\.weight' holds 1 NaN"),
    "NaN buffer": (lambda: dh.analyze(_poisoned("buffer"), _batch()), errors.NonFiniteError, r"buffer '1\.running_mean'"),
    "NaN batch": (lambda: dh.analyze(_net(), (_with_nan(_batch()[0]), _batch()[1])), errors.NonFiniteError, "inputs"),
    "NaN targets": (lambda: dh.analyze(_net(), (_batch()[0], _with_nan(torch.zeros(5, 3)))), errors.NonFiniteError, "targets"),
    "unknown point": (lambda: dh.analyze(_net(), _batch(), points=["0", "22"]), errors.PointError, "'22'.*'2'"),
    "glob without match": (lambda: dh.analyze(_net(), _batch(), points=["layer*"]), errors.PointError, r"layer\*"),
    "unused parameter": (lambda: dh.analyze(Detaching(torch.detach), _batch(), points=["first.weight"]), errors.PointError, "first.weight"),
    "unused module": (lambda: dh.analyze(Detaching(torch.detach), _batch(), points=["first", "head"]), errors.PointError, "first"),
    "integer op": (lambda: dh.analyze(Detaching(lambda x: F.one_hot(x.argmax(1), 4).float()), _batch(), points=["first"]), errors.PointError, "first"),
    "per_sample with BatchNorm": (lambda: dh.analyze(_net(), _batch(), batch_mode="per_sample"), errors.BatchCouplingError, "module '1'"),
    "empty batch": (lambda: dh.analyze(_net(), (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))), errors.BatchError, "empty"),
    "empty iterable": (lambda: dh.analyze(_net(), []), errors.BatchError, "empty"),
    "used-up iterator": (lambda: dh.analyze(_net(), iter(())), errors.BatchError, "used up"),
    "a tensor alone": (lambda: dh.analyze(_net(), torch.zeros(5, 3)), errors.BatchError, r"\(inputs, None\)"),
    "a string": (lambda: dh.analyze(_net(), "batch"), errors.BatchError, "str"),
    "a triple": (lambda: dh.analyze(_net(), (torch.zeros(5, 3),) * 3), errors.BatchError, r"\(inputs, targets\)"),
    "no tensors": (lambda: dh.analyze(_net(), (3, 4)), errors.BatchError, "no tensor"),
    "not a module": (lambda: dh.analyze(F.relu, _batch()), errors.OptionError, "Module"),
    "other device": (lambda: dh.analyze(_net().to("meta"), _batch()), errors.BatchError, "meta"),
    "wrong input shape": (lambda: dh.analyze(_net(), (torch.zeros(5, 7), _batch()[1])), errors.CaptureError, "Sequential"),
    "label out of range": (lambda: dh.analyze(_net().eval(), (_batch()[0], torch.full((5,), 9))), errors.LossError, "labels from 9 to 9.*3 classes"),
    "mode": (lambda: dh.analyze(_net(), _batch(), mode="exakt"), errors.OptionError, "'exact'"),
    "batch mode": (lambda: dh.analyze(_net(), _batch(), batch_mode="persample"), errors.OptionError, "per_sample"),
    "space": (lambda: dh.analyze(_net(), _batch(), space="weights"), errors.OptionError, "parameter"),
    "a reduction of nothing": (lambda: dh.HessianOperator(_net(), [_batch()], reduction=lambda: 1), errors.OptionError, "does not take"),
    "probes": (lambda: dh.analyze(_net(), _batch(), probes=1), errors.OptionError, "at least 2"),
    "rtol": (lambda: dh.analyze(_net(), _batch(), rtol=2.0), errors.OptionError, "between 0 and 1"),
    "memory": (lambda: dh.analyze(_net(), _batch(), memory=0), errors.OptionError, "positive"),
    "exact beyond memory": (
        lambda: dh.analyze(mlp([3, 400, 400, 3], nn.SiLU), _batch(), mode="exact", memory=100_000), errors.MemoryBudgetError, "4.9 MiB.*blocks.*about",
    ),
    "joint stream": (lambda: dh.analyze(_net(), [_batch(), _batch()], batch_mode="joint"), errors.BatchError, "concatenate"),
    "joint stream of an operator": (lambda: dh.GGNOperator(_net(), [_batch(), _batch()], space="activation", batch_mode="joint"), errors.BatchError, "concatenate"),
    "output": (lambda: dh.analyze(_net(), _batch(), output="nowhere"), errors.PointError, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_a_reason(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


FAULTS: dict[str, tuple[type[errors.DagHesseError], list[Callable[[], Any]]]] = {
    "a point that there is not": (errors.PointError, [
        lambda: dh.analyze(_net(), _batch(), points=["nowhere"]),
        lambda: dh.analyze(_net(), _batch()).block("nowhere", "0"),
        lambda: dh.analyze(_net(), _batch()).block(99, 0),
        lambda: dh.structure(_net(), _batch(), points=["nowhere"]),
        lambda: dh.profile(_net(), _batch(), points=["nowhere"]),
        lambda: dh.capture(_net(), _batch(), output="nowhere"),
        lambda: dh.HessianOperator(_net(), _batch(), points=["nowhere"]),
        lambda: dh.HessianOperator(_net(), _batch(), params=["nowhere"]),
        lambda: dh.HessianOperator(_net(), _batch(), params=[torch.zeros(3)]),
        lambda: dh.HessianOperator(_net(), _batch()).block("nowhere", "0.weight"),
        lambda: dh.HessianOperator(_net(), _batch()).block("0.weight", 99),
    ]),
    "no point at all": (errors.PointError, [
        lambda: dh.analyze(_net(), _batch(), points=[]),
        lambda: dh.HessianOperator(_net(), _batch(), params=[]),
        lambda: dh.HessianOperator(_net(), _batch(), param_filter="nowhere*"),
    ]),
    "a point of another type than a name": (errors.OptionError, [
        lambda: dh.analyze(_net(), _batch(), points=3),
        lambda: dh.analyze(_net(), _batch(), points=[3]),
        lambda: dh.capture(_net(), _batch(), output=3),
        lambda: dh.HessianOperator(_net(), _batch(), params=3),
        lambda: dh.HessianOperator(_net(), _batch(), params=[3]),
    ]),
    "no model": (errors.OptionError, [
        lambda: dh.analyze(3, _batch()),
        lambda: dh.capture(3, _batch()),
        lambda: dh.structure(3, _batch()),
        lambda: dh.profile(3, _batch()),
        lambda: dh.HessianOperator(3, _batch()),
    ]),
    "what it was made from is gone": (errors.StaleError, [
        lambda: copy.copy(dh.analyze(_net(), _batch())).block(0, 0),
        lambda: _trained(dh.analyze).block(0, 0),
        lambda: _trained(dh.HessianOperator).trace(),
    ]),
}  # fmt: skip


def _trained(make: Callable[..., Any]) -> Any:
    """What is made of a model that changes afterwards."""
    model = _net()
    made = make(model, _batch())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    return made


@pytest.mark.parametrize("fault, number", [(name, k) for name, (_, calls) in FAULTS.items() for k in range(len(calls))])
def test_a_fault_has_one_type_wherever_it_is_met(fault: str, number: int) -> None:
    kind, calls = FAULTS[fault]
    with pytest.raises(errors.DagHesseError) as raised:
        calls[number]()
    assert type(raised.value) is kind


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_integers(number: type[np.integer]) -> None:
    report = dh.analyze(_net(), _batch(), mode="probes", probes=number(4), seed=number(3), memory=np.int64(1 << 30))
    plain = dh.analyze(_net(), _batch(), mode="probes", probes=4, seed=3, memory=1 << 30)
    assert np.array_equal(report.resonance, plain.resonance)
    assert json.loads(json.dumps(report.to_dict()))["facts"]["seed"] == 3
    assert torch.equal(report.block(number(0), number(0)), plain.block(0, 0))
    H = dh.HessianOperator(_net(), [_batch()], memory=np.int64(1 << 30))
    assert torch.equal(H.trace(number(5), seed=number(3)), H.trace(5, seed=3))
    assert torch.equal(H.diagonal(number(5), seed=number(3)), H.diagonal(5, seed=3))
    assert len(H.eigsh(number(2))[0]) == 2
    assert len(H.spectral_density(number(5), seed=number(3))[0]) == len(H.spectral_density(5, seed=3)[0])
    assert dh.profile(_net(), _batch(), probes=number(4)).plan.chunk <= 4


@pytest.mark.parametrize("wrong", [True, 2.0, "2", np.float64(2.0), np.bool_(True), torch.tensor(2)])
@pytest.mark.parametrize("option", ["probes", "seed", "memory", "k", "ncv", "matvecs", "plan"])
def test_what_is_no_integer_is_refused_by_name(option: str, wrong: Any) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "k": lambda: dh.HessianOperator(_net(), _batch()).eigsh(wrong),
        "ncv": lambda: dh.HessianOperator(_net(), _batch()).spectral_density(wrong),
        "matvecs": lambda: dh.HessianOperator(_net(), _batch()).trace(wrong),
        "plan": lambda: dh.profile(_net(), _batch(), probes=wrong),
    }
    name = option if option != "plan" else "probes"
    if option == "memory" and wrong == "2":  # a text of bytes is one
        wrong = b"2"
    with pytest.raises(errors.OptionError, match=f"{name}=.* is a {type(wrong).__name__}; expected an integer"):
        calls.get(option, lambda: dh.analyze(_net(), _batch(), **{option: wrong}))()


@pytest.mark.parametrize("library", ["matplotlib.figure", "pandas", "transformers", "sklearn.datasets"])
def test_an_optional_library_that_is_not_there_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = dh.analyze(_net(), _batch())
    use: dict[str, Callable[[], Any]] = {
        "matplotlib.figure": report.plot,
        "pandas": report.to_dataframe,
        "transformers": lambda: load_spec("gpt2", 2, 8, 0),
        "sklearn.datasets": load_digits,
    }
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(errors.DependencyError, match="pip install"):
        use[library]()


def test_a_non_differentiable_op_is_named_with_module_and_line() -> None:
    with pytest.raises(errors.NonDifferentiableError, match=r"(?s)argmax.*test_errors\.py:\d+"):
        dh.analyze(Detaching(lambda x: F.one_hot(x.argmax(1), 4).float()), _batch(), points=["first"])


def _state(model: nn.Module) -> tuple[Any, ...]:
    return (
        {
            name: (id(p), p.detach().clone(), p.requires_grad, p.grad, p._version)
            for name, p in model.named_parameters()
        },
        {name: (id(b), b.clone()) for name, b in model.named_buffers()},
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def _fails(output: Tensor, targets: Tensor) -> Tensor:
    raise RuntimeError("user's bug")


@pytest.mark.parametrize(
    "options, fails",
    [
        ({}, False),
        ({"mode": "exact"}, False),
        ({"mode": "probes", "probes": 4}, False),
        ({"space": "parameter"}, False),
        ({"batch_mode": "per_sample"}, True),
        ({"points": ["nowhere"]}, True),
        ({"loss": _fails}, True),
        ({"loss": lambda y, t: (y - y - 1).sum().log()}, True),
    ],
    ids=["default", "exact", "probes", "parameter", "interacting", "no point", "user bug", "infinite loss"],
)
@pytest.mark.parametrize("training", [True, False])
def test_model_and_rng_come_out_as_they_went_in(options: dict[str, Any], fails: bool, training: bool) -> None:
    model, batch = _net().train(training), _batch()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].bias.requires_grad_(False)
    if not training and "batch_mode" in options:
        return  # nothing interacts: no failure
    before, data = _state(model), copy.deepcopy(batch)
    torch.randn(1)
    before = _state(model)
    if fails:
        with pytest.raises(errors.DagHesseError):
            dh.analyze(model, batch, **options)
    else:
        dh.analyze(model, batch, **options)
    assert _same(before, _state(model))
    assert _same(data, batch)


def test_running_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from dag_hesse.sweep import runner

    model, batch = mlp([3, 20, 20, 3], nn.SiLU), _batch()
    expected = dh.analyze(model, batch, mode="exact").resonance
    sweep, chunks = runner.sweep, []

    def short_of_memory(lin: Any, seeds: dict[int, Tensor], *args: Any, **options: Any) -> Any:
        size = next(iter(seeds.values())).shape[0]
        if size > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        chunks.append(size)
        return sweep(lin, seeds, *args, **options)

    monkeypatch.setattr(runner, "sweep", short_of_memory)
    found = dh.analyze(model, batch, mode="exact").resonance
    assert max(chunks) <= 3
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-6)


def test_parameters_that_changed_are_noticed_by_a_report() -> None:
    model = mlp([3, 4, 4, 3], nn.SiLU)
    report = dh.analyze(model, _batch())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(errors.StaleError, match="analyze it again"):
        report.block(report.names[0], report.names[0])


def test_modules_that_keep_what_they_computed_keep_no_fakes() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
            self.last = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = torch.tanh(self.layer(x))
            return self.last

    model, batch = Keeps(), _batch()
    before = _state(model)
    dh.analyze(model, batch)
    assert model.last is None
    assert _same(before, _state(model))


def test_a_model_that_does_not_repeat_itself_is_named() -> None:
    with pytest.raises(errors.NonDeterministicError, match=r"Noisy gives other losses .* \(\d"):
        dh.HessianOperator(Noisy(lambda: time.perf_counter() * 1e6 % 7), _batch())


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, np.random.default_rng(0).random, random.Random(0).random]
)
def test_draws_of_the_global_generators_are_frozen_and_given_back(draw: Callable[[], float]) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    dh.HessianOperator(Noisy(draw), _batch()) @ torch.ones(12)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_loss_that_fails_is_blamed() -> None:
    def mine(output: torch.Tensor) -> torch.Tensor:
        return output.sum()

    batch = torch.randn(3, 4), torch.tensor([0, 1, 1])
    with pytest.raises(dh.errors.CaptureError, match=r"^loss=mine fails: TypeError: .*1 positional"):
        dh.analyze(torch.nn.Linear(4, 2), batch, loss=mine)
    with pytest.raises(dh.errors.CaptureError, match=r"^loss=MSELoss fails"):
        dh.analyze(torch.nn.Linear(4, 2), (batch[0], torch.randn(7, 5)), loss=torch.nn.MSELoss())
    with pytest.raises(dh.errors.CaptureError, match=r"^Linear fails"):
        dh.analyze(torch.nn.Linear(5, 2), batch)
