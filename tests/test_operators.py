"""Operators against the dense oracle, in every form of vector, model and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from tests.models.zoo import Case, case
from tests.oracle import Truth, error

CASES = ("mlp-silu", "encoder-eval", "batch-norm-train", "gru-cell-loop", "tied", "densenet", "hf-gpt2")


def _assembled(truth: Truth, names: list[str], part: str) -> Tensor:
    return torch.cat([torch.cat([truth.block(v, w, part, "shared") for w in names], 1) for v in names])


def _problem() -> tuple[Case, list[str], Truth]:
    c = case("mlp-silu")
    names = [name for name, _ in c.model.named_parameters()]
    return c, names, Truth(c.model, c.run, [], names)


@pytest.mark.parametrize("name", CASES)
def test_all_three_parts_agree_with_dense_autograd(name: str) -> None:
    c = case(name)
    names = [n for n, p in c.model.named_parameters() if p.numel() < 70][:6]
    truth = Truth(c.model, c.run, [], names, c.out)
    options: dict[str, Any] = {"loss": c.loss, "param_filter": lambda n, p: n in names}
    for kind, part in ((dh.HessianOperator, "full"), (dh.GGNOperator, "gn"), (dh.TensorOperator, "tensor")):
        operator = kind(c.model, c.batch, **options)
        assert list(operator.names) == names
        expected = _assembled(truth, names, part)
        scale = float(_assembled(truth, names, "full").norm())
        assert operator.shape == tuple(expected.shape)
        assert error(operator.dense(), expected, scale) < 1e-10
        assert (
            error(operator.block(names[0], names[-1]).dense(), truth.block(names[0], names[-1], part, "shared"), scale)
            < 1e-10
        )


def test_activation_space() -> None:
    c = case("mlp-silu")
    points = ["0", "3", "5"]
    truth = Truth(c.model, c.run, points)
    operator = dh.HessianOperator(c.model, c.batch, space="activation", points=points)
    assert error(operator.dense(), _assembled(truth, points, "full")) < 1e-10
    joint = dh.HessianOperator(c.model, c.batch, space="activation", points=["3"], batch_mode="joint")
    assert error(joint.dense(), truth.full["3", "3"]) < 1e-10


def test_every_form_of_vector() -> None:
    c, names, truth = _problem()
    H, dense = dh.HessianOperator(c.model, c.batch), _assembled(truth, names, "full")
    columns = torch.randn(H.shape[0], 3).double()
    assert error(H @ columns, dense @ columns) < 1e-10
    assert error(H @ columns[:, 0], dense @ columns[:, 0]) < 1e-10
    parameters = dict(c.model.named_parameters())
    split = columns.split([p.numel() for p in parameters.values()])
    one = {n: piece[:, 0].reshape(p.shape) for (n, p), piece in zip(parameters.items(), split, strict=True)}
    product = H @ one
    assert list(product) == names
    assert error(torch.cat([x.reshape(-1) for x in product.values()]), dense @ columns[:, 0]) < 1e-10
    several = [piece.reshape(*p.shape, 3) for p, piece in zip(parameters.values(), split, strict=True)]
    found = H @ several
    assert isinstance(found, list)
    assert error(torch.cat([x.reshape(-1, 3) for x in found]), dense @ columns) < 1e-10
    gn, tensor = H.parts(columns)
    assert error(gn + tensor, dense @ columns) < 1e-10
    assert error(gn, _assembled(truth, names, "gn") @ columns) < 1e-10
    assert H.T is H
    block = H.block(names[0], names[2])
    assert (
        error(
            block.T @ columns[: block.shape[0]],
            truth.block(names[2], names[0], "full", "shared") @ columns[: block.shape[0]],
        )
        < 1e-10
    )


def test_against_functorch() -> None:
    c, _, _ = _problem()
    params = {n: p.detach() for n, p in c.model.named_parameters()}
    x, y = c.batch
    v = {n: torch.randn_like(p) for n, p in params.items()}
    gradient = torch.func.grad(lambda p: F.cross_entropy(torch.func.functional_call(c.model, p, (x,)), y))
    expected = torch.func.jvp(gradient, (params,), (v,))[1]
    found = dh.hvp(c.model, c.batch, v)
    assert all(error(found[n], expected[n]) < 1e-10 for n in params)


def test_scipy() -> None:
    c, names, truth = _problem()
    H, dense = dh.HessianOperator(c.model, c.batch), _assembled(truth, names, "full")
    expected = np.sort(np.linalg.eigvalsh(dense.numpy()))[-3:]
    values, vectors = eigsh(H.to_scipy(), k=3, which="LA")
    assert np.allclose(np.sort(values), expected, rtol=1e-8)
    assert np.allclose(np.sort(H.eigsh(3, which="LA", tol=0)[0]), expected, rtol=1e-8)
    assert vectors.shape == (H.shape[0], 3)
    rectangle = H.block(names[0], names[-1]).to_scipy()
    x = np.random.default_rng(0).standard_normal(rectangle.shape[0])
    assert np.allclose(rectangle.rmatvec(x), truth.block(names[-1], names[0], "full", "shared").numpy() @ x)


def test_what_users_of_other_tools_pass() -> None:
    c, names, truth = _problem()
    x, y = c.batch
    dense = _assembled(truth, names, "full")
    own = dict(c.model.named_parameters())
    loss = nn.CrossEntropyLoss()
    v = torch.randn(len(dense)).double()

    def function(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.func.functional_call(c.model, params, (inputs,))

    def positional(params: list[Tensor], inputs: Tensor) -> Tensor:
        return function(dict(zip(own, params, strict=True)), inputs)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    for operator in (
        dh.HessianOperator(c.model, loader, loss=loss),
        dh.HessianOperator(c.model, [(x[:2], y[:2]), (x[2:], y[2:])], loss=loss, params=list(own.values())),
        dh.HessianOperator(function, c.batch, loss=loss, params=own),
        dh.HessianOperator(positional, c.batch, loss=loss, params=list(own.values())),
    ):
        for _ in range(2):  # the second time from what was kept of every batch
            assert error(operator @ v, dense @ v) < 1e-10
    turned = list(own.values())[::-1]
    reversed_names = names[::-1]
    assert (
        error(dh.HessianOperator(c.model, c.batch, params=turned).dense(), _assembled(truth, reversed_names, "full"))
        < 1e-10
    )
    biases = [n for n in names if n.endswith("bias")]
    assert dh.HessianOperator(c.model, c.batch, param_filter="*.bias").names == tuple(biases)
    c.model[0].weight.requires_grad_(False)
    assert "0.weight" not in dh.HessianOperator(c.model, c.batch).names
    c.model[0].weight.requires_grad_(True)


def test_refresh_after_an_optimizer_step() -> None:
    c, names, _ = _problem()
    H = dh.HessianOperator(c.model, c.batch)
    v = torch.randn(H.shape[0]).double()
    before = H @ v
    c.run().backward()
    torch.optim.SGD(c.model.parameters(), lr=0.5).step()
    with pytest.raises(errors.StaleError, match=r"refresh\(\)"):
        H @ v
    H.refresh()
    truth = Truth(c.model, c.run, [], names)
    assert error(H @ v, _assembled(truth, names, "full") @ v) < 1e-10
    assert error(H @ v, before) > 1e-3


def test_parameters_that_became_nan_are_named_as_such_after_a_refresh() -> None:
    model, batch = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(4, 3), torch.arange(4) % 2)
    H = dh.HessianOperator(model, batch)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(errors.StaleError):
        H @ torch.ones(H.shape[1])
    H.refresh()
    with pytest.raises(errors.LossError, match="the loss is nan"):
        H @ torch.ones(H.shape[1])


def test_same_bits_twice_and_with_dropout() -> None:
    c = case("encoder-dropout")
    H = dh.HessianOperator(c.model, [c.batch, c.batch])  # two linearizations a product
    v = torch.randn(H.shape[0]).double()
    first = H @ v
    torch.randn(10)
    assert torch.equal(first, H @ v)


@pytest.mark.parametrize(
    "vector, message",
    [
        (torch.zeros(3).double(), r"shape \(3,\); expected \(\d+,\)"),
        (torch.zeros(71), "float32.*float64"),
        ({"0.weight": torch.zeros(1)}, "missing"),
        ([torch.zeros(1).double()], "1 tensors; expected 8"),
        ("v", "str"),
    ],
)
def test_vectors_that_do_not_fit(vector: Any, message: str) -> None:
    c, _, _ = _problem()
    with pytest.raises(errors.VectorError, match=message):
        dh.HessianOperator(c.model, c.batch) @ vector


def test_bad_operators() -> None:
    c, _, _ = _problem()
    with pytest.raises(errors.PointError, match="no parameter is left"):
        dh.HessianOperator(c.model, c.batch, param_filter="layer*")
    with pytest.raises(errors.PointError, match="not a parameter of the model"):
        dh.HessianOperator(c.model, c.batch, params=[torch.zeros(3)])
    with pytest.raises(errors.OptionError, match="params="):
        dh.HessianOperator(lambda p, x: x, c.batch)
    with pytest.raises(errors.BatchError, match="empty"):
        dh.HessianOperator(c.model, [])
    with pytest.raises(errors.PointError, match=r"'0.weight'"):
        dh.HessianOperator(c.model, c.batch).block("0.weigth", "0.weight")


def test_curvlinops_estimators_run_on_our_operators() -> None:
    c, names, truth = _problem()
    H, dense = dh.HessianOperator(c.model, c.batch, loss=c.loss), _assembled(truth, names, "full")
    n, before = len(dense), torch.get_rng_state()
    wrapped = H.to_curvlinops()
    X = torch.randn(n, 3, dtype=dense.dtype)
    torch.set_rng_state(before)
    assert error(wrapped @ X, dense @ X) < 1e-10
    # Hutchinson's estimators: 200 seeds of 20 products, compared with their own spread.
    traces = torch.stack([H.trace(20, seed=seed) for seed in range(200)])
    assert abs(traces.mean() - dense.trace()) < 3 * traces.std() / 200**0.5
    diagonals = torch.stack([H.diagonal(20, seed=seed) for seed in range(200)])
    off = (diagonals.mean(0) - dense.diagonal()) / (diagonals.std(0) / 200**0.5)
    assert float((off**2).mean()) < 2.0
    grid, density = H.spectral_density(min(n - 1, 30))
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert grid[0] <= eigenvalues[0] and grid[-1] >= eigenvalues[-1]
    assert abs(float(torch.trapezoid(density, grid)) - 1) < 0.05
    assert torch.equal(H.trace(5, seed=3), H.trace(5, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    from curvlinops import CGInverseLinearOperator
    from curvlinops.examples import IdentityLinearOperator

    G = dh.GGNOperator(c.model, c.batch, loss=c.loss)
    damped = _assembled(truth, names, "gn") + torch.eye(n, dtype=dense.dtype)
    identity = IdentityLinearOperator([p.shape for p in c.model.parameters()], H.device, H.dtype)
    sub = CGInverseLinearOperator(G.to_curvlinops() + identity, tolerance=1e-6, max_iter=500)
    assert error(sub @ X[:, 0], torch.linalg.solve(damped, X[:, 0])) < 1e-5


def test_a_missing_curvlinops_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    c, _, _ = _problem()
    monkeypatch.setitem(__import__("sys").modules, "curvlinops", None)
    with pytest.raises(errors.DependencyError, match="pip install"):
        dh.HessianOperator(c.model, c.batch, loss=c.loss).to_curvlinops()


def test_vectors_in_chunks_are_as_vectors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    c, names, truth = _problem()
    assert dh.HessianOperator(c.model, c.batch).chunk > 8
    monkeypatch.setattr("dag_hesse.plan.memory._SHARED_BYTES", 1)
    H = dh.HessianOperator(c.model, c.batch)
    assert H.chunk == 1
    assert error(H.dense(), _assembled(truth, names, "full")) < 1e-10


class Mixed(nn.Module):
    """Parameters of two types, one of them without effect."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.unused = nn.Linear(5, 3).double(), nn.Linear(2, 2).double()
        self.a = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).double())


def _dense_hessian(model: nn.Module, value: Tensor) -> Tensor:
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    rows = []
    for p, g in zip(parameters, gradient, strict=True):
        for element in [None] * p.numel() if g is None else g.reshape(-1):
            found = [None] * len(parameters)
            if element is not None:
                found = list(torch.autograd.grad(element, parameters, retain_graph=True, allow_unused=True))
            pairs = zip(found, parameters, strict=True)
            rows.append(torch.cat([(torch.zeros_like(q) if r is None else r).reshape(-1).double() for r, q in pairs]))
    return torch.stack(rows)


def test_vectors_go_as_parameters_do_whether_read_or_not() -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    dense = _dense_hessian(model, F.cross_entropy(model(x), y))
    v = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for options in ({}, {"params": list(model.parameters())}):
        H = dh.HessianOperator(model, (x, y), **options)
        assert H.names == tuple(name for name, _ in model.named_parameters())
        assert error(H @ v, dense @ v) < 1e-10
        assert error(H.dense(), dense) < 1e-10
    only = dh.HessianOperator(model, (x, y), params=[model.unused.weight, model.a.bias])
    assert only.names == ("unused.weight", "a.bias")
    assert float(only.block("unused.weight", "a.bias").dense().norm()) == 0.0
    assert float(only.block("a.bias", "unused.weight").dense().norm()) == 0.0
    with pytest.raises(errors.PointError, match="depends on none"):
        dh.HessianOperator(model, (x, y), params=[model.unused.weight])


def test_parameters_of_two_types() -> None:
    torch.manual_seed(0)
    model = Mixed()
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    H, dense = dh.HessianOperator(model, (x, y)), _dense_hessian(model, F.cross_entropy(model(x), y))
    assert H.dtype is torch.float64
    assert error(H.dense(), dense) < 1e-5  # as exact as float32
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = H @ v
    assert all(found[name].dtype is p.dtype for name, p in model.named_parameters())
    flat = torch.cat([x.reshape(-1).double() for x in v.values()])
    assert error(torch.cat([x.reshape(-1).double() for x in found.values()]), dense @ flat) < 1e-5
    report = dh.analyze(model, (x, y), space="parameter", points=["a", "b"])
    assert report.resonance[1, 1] == pytest.approx(float(dense[:18, :18].norm()), rel=1e-5)


def test_arrays_numbers_and_the_other_side() -> None:
    c, names, truth = _problem()
    H, dense = dh.HessianOperator(c.model, c.batch), _assembled(truth, names, "full")
    V = torch.randn(len(dense), 3).double()
    for found in (H @ V.numpy(), (V.T.numpy() @ H).T):
        assert isinstance(found, np.ndarray)
        assert error(torch.from_numpy(found), dense @ V) < 1e-10
    assert error(V[:, 0] @ H, dense @ V[:, 0]) < 1e-10
    assert error(V.T @ H, V.T @ dense) < 1e-10
    for scaled in (2 * H, H * np.float64(2.0), H / 0.5, -(H * -2), torch.tensor(2.0) * H, H / torch.tensor(0.5)):
        assert scaled.shape == H.shape
        assert error(scaled @ V, 2 * dense @ V) < 1e-10
    assert error((2 * H).dense(), 2 * dense) < 1e-10
    assert np.allclose((2 * H).eigsh(1)[0], 2 * H.eigsh(1)[0])
    assert error((2 * H).diagonal(20), 2 * H.diagonal(20)) < 1e-12
    for wrong in ("2", 1j, True, V):
        with pytest.raises(errors.OptionError, match="real number"):
            H * wrong
    with pytest.raises(errors.OptionError, match="other than 0"):
        H / 0
    with pytest.raises(errors.VectorError, match="real numbers"):
        H @ np.array(["a"])
    with pytest.warns(UserWarning, match="detached"):
        assert not (H @ V.clone().requires_grad_()).requires_grad


def test_a_hessian_that_is_zero() -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    H = dh.HessianOperator(nn.Linear(4, 2), (x, y), loss=nn.L1Loss())
    assert float(H.dense().norm()) == 0.0
    assert float(H.trace()) == 0.0
    assert float((H @ torch.ones(10)).norm()) == 0.0


def test_trace_and_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    c, names, truth = _problem()
    dense = _assembled(truth, names, "full")
    small = dh.HessianOperator(c.model, c.batch, param_filter=names[-2])
    own = truth.block(names[-2], names[-2], "full", "shared")
    assert error(small.trace(), own.trace()) < 1e-10
    assert error(small.diagonal(), own.diagonal()) < 1e-10
    H = dh.HessianOperator(c.model, c.batch)
    at_once = H.trace(20, seed=3), H.diagonal(20, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(dh.HessianOperator, "chunk", 3)
        assert error(H.trace(20, seed=3), at_once[0]) < 1e-10
        assert error(H.diagonal(20, seed=3), at_once[1]) < 1e-10
    assert error(at_once[1].sum(), at_once[0]) < 1e-10  # of the same vectors
    many = torch.stack([H.trace(20, seed=seed) for seed in range(100)])
    assert abs(many.mean() - dense.trace()) < 3 * many.std() / 10
    exact_spread = (2 * (dense.square().sum() - dense.diagonal().square().sum()) / 20).sqrt()
    assert float(many.std()) == pytest.approx(float(exact_spread), rel=0.25)
    for count, message in ((len(dense), "fewer than"), (1, "at least 2"), (2.5, "float"), (True, "bool")):
        for estimate in (H.trace, H.diagonal, H.spectral_density):
            with pytest.raises(errors.OptionError, match=message):
                estimate(count)


def test_options_that_do_not_go_together_and_other_mistakes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(5, 3).double(), torch.arange(5) % 2)
    H = dh.HessianOperator(model, batch)
    mistakes: list[Callable[[], Any]] = [
        lambda: dh.HessianOperator(model, batch, params=[model[2].bias, model[2].bias]),
        lambda: dh.HessianOperator(model, batch, params=model[2].bias),
        lambda: dh.HessianOperator(model, batch, points=["0.weight"], param_filter="2.*"),
        lambda: dh.HessianOperator(model, batch, param_filter=3),
        lambda: dh.HessianOperator(lambda p, x: x, batch, params={"l": {"w": torch.ones(2)}}),
        lambda: H.eigsh(26),
        lambda: copy.deepcopy(H),
        lambda: H.trace(5, seed="x"),
    ]
    for mistake in mistakes:
        with pytest.raises(errors.OptionError):
            mistake()
    for vector in (torch.zeros(26, 0).double(), torch.eye(26).double().to_sparse()):
        with pytest.raises(errors.VectorError):
            H @ vector
    with pytest.raises(errors.PointError, match="has no parameters"):
        dh.HessianOperator(model, batch, points=["1"])
    for z in (torch.ones(2, 3).double(), np.ones((2, 3))):
        assert (H.block("0.weight", "2.bias") @ z).shape == (12, 3)
    (shaped,) = H.block("0.weight", "2.bias") @ [torch.ones(2, 3).double()]
    assert shaped.shape == (4, 3, 3)


def _callable_hessian(f: Callable[..., Tensor], p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """By all entries of ``p``, each a tensor of its own."""
    rows = torch.autograd.functional.hessian(
        lambda *q: F.mse_loss(f(dict(zip(p, q, strict=True)), x), y), tuple(v.detach() for v in p.values())
    )
    pairs = zip(p.values(), rows, strict=True)
    return torch.cat([torch.cat([b.reshape(r.numel(), -1) for b in row], 1) for r, row in pairs])


def test_names_of_a_callable_models_parameters_are_free() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    keys = ("b", "b.c", "b__c", "training")
    p = {key: torch.randn(2 if key == "training" else (3, 2)).double() for key in keys}
    f = lambda q, x: torch.tanh(x @ q["b.c"]) + (x @ q["b__c"]) ** 2 * q["training"] * (x @ q["b"]).exp()  # noqa: E731
    H, expected = dh.HessianOperator(f, (x, y), params=p), _callable_hessian(f, p, x, y)
    assert H.names == keys
    assert error(H.dense(), expected) < 1e-12
    assert set(H @ dict(p)) == set(keys)
    assert dh.HessianOperator(f, (x, y), params=p, param_filter="b.*").names == ("b.c",)
    named = dh.HessianOperator(f, (x, y), params=p, points=["b", "b__c"])
    assert named.names == ("b", "b__c")
    both = [*range(6), *range(12, 18)]
    assert error(named.dense(), expected[both][:, both]) < 1e-12
    with pytest.raises(errors.NonFiniteError, match=r"'b\.c'"):
        dh.HessianOperator(f, (x, y), params={**p, "b.c": p["b.c"] * float("nan")})


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.detach])
def test_one_tensor_under_two_names_is_two_parameters(kind: Callable[[Tensor], Tensor]) -> None:
    x, y, w = torch.randn(5, 2).double(), torch.randn(5, 2).double(), kind(torch.randn(2, 2).double())
    f = lambda q, x: torch.tanh(x @ q["a"]) @ q["b"]  # noqa: E731
    H = dh.HessianOperator(f, (x, y), params={"a": w, "b": w})
    assert H.names == ("a", "b")
    assert error(H.dense(), _callable_hessian(f, {"a": w, "b": w}, x, y)) < 1e-12


def test_a_tied_parameter_goes_by_all_its_names() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Linear(4, 4, bias=False), "o": nn.Linear(4, 4, bias=False)}).double()
    model["o"].weight = model["e"].weight
    net = nn.Sequential(model["e"], nn.Tanh(), model["o"])
    batch = torch.randn(5, 4).double(), torch.arange(5) % 4
    whole = dh.HessianOperator(net, batch).dense()
    for options in ({"param_filter": "2.weight"}, {"param_filter": "*.weight"}, {"params": ["2.weight"]}):
        H = dh.HessianOperator(net, batch, **options)
        assert list(H.names) == ["0.weight"]
        assert torch.equal(H.dense(), whole)
    with pytest.raises(errors.OptionError, match="twice"):
        dh.HessianOperator(net, batch, params=["0.weight", "2.weight"])
    with pytest.raises(errors.OptionError, match="seed"):
        dh.HessianOperator(net, batch).trace(seed="a")
