"""Sums, shifts, products, submatrices and what is asked of operators, against dense autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse.operators.base import SymmetricOperator
from tests.models.zoo import case
from tests.oracle import error

NAMES = [f"{k}.{what}" for k in (0, 2, 4) for what in ("weight", "bias")]


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _batch(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator).double(), torch.arange(count) % 3


def _dense(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), parameters, create_graph=True)
    rows = [
        torch.cat([r.reshape(-1) for r in torch.autograd.grad(x, parameters, retain_graph=True)])
        for g in gradient
        for x in g.reshape(-1)
    ]
    return torch.stack(rows)


def _pair() -> tuple[SymmetricOperator, SymmetricOperator, Tensor, Tensor]:
    """Operators of two batches, and their matrices."""
    model, one, other = _net(), _batch(), _batch(5)
    return dh.HessianOperator(model, one), dh.HessianOperator(model, other), _dense(model, one), _dense(model, other)


def test_sums_shifts_and_products() -> None:
    A, B, a, b = _pair()
    eye, d = torch.eye(len(a)).double(), torch.randn(len(a)).double()
    for found, expected in (
        (A + B, a + b),
        (A - B, a - b),
        (A.shifted(0.3), a + 0.3 * eye),
        (2 * A - B.shifted(-1) / 4, 2 * a - (b - eye) / 4),
        (A.congruent(d), d[:, None] * a * d),
        ((A + B).congruent(A.by_name(d)), d[:, None] * (a + b) * d),
        (A @ B, a @ b),
        ((A @ B).T, b @ a),
        (A @ (B @ A), a @ b @ a),
        ((A @ B) @ (A + B), a @ b @ (a + b)),
    ):
        assert found.shape == tuple(a.shape)
        assert error(found.dense(), expected) < 1e-10
        v = torch.randn(len(a), 2).double()
        assert error(v.T @ found, v.T @ expected) < 1e-10
        assert np.allclose(found.to_scipy().rmatvec(v[:, 0].numpy()), (expected.T @ v[:, 0]).numpy())
        by_name = found @ dict(zip(NAMES, [p.reshape(p.shape) for p in A.by_name(v[:, 0]).values()], strict=True))
        assert error(torch.cat([x.reshape(-1) for x in by_name.values()]), expected @ v[:, 0]) < 1e-10
    assert isinstance(A @ B @ v.numpy(), np.ndarray)
    names = ["2.weight", "4.bias"]
    places = torch.cat([torch.arange(len(a))[slice(*ends)] for ends in ((25, 45), (61, 64))])
    within = (d[:, None] * a * d)[places][:, places]
    assert error(A.congruent(d)[names].dense(), within) < 1e-10
    assert repr(A.congruent(d)) == f"D · {A!r} · D"
    with pytest.raises(errors.VectorError, match="2 columns"):
        A.congruent(v)
    assert "+ 0.3 · I" in repr(A.shifted(0.3)) and " @ " in repr(A @ B)
    gn = dh.GGNOperator(_net(), _batch())
    rest = dh.TensorOperator(_net(), _batch())
    assert error((gn + rest).dense(), a) < 1e-10


def test_operators_over_other_vectors_are_refused() -> None:
    A = dh.HessianOperator(_net(), _batch())
    few = dh.HessianOperator(_net(), _batch(), params=NAMES[:2])
    wider = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = _batch()
    single = dh.HessianOperator(_net().float(), (x.float(), y))
    for other, message in ((few, "6 segments"), (dh.HessianOperator(wider, (x, y)), "shapes"), (single, "float32")):
        for together in (lambda o: A + o, lambda o: A - o, lambda o: A @ o, lambda o: A @ (o @ o)):
            with pytest.raises(errors.OptionError, match=message):
                together(other)
    for wrong in (0.1, "A", torch.eye(3)):
        with pytest.raises(errors.OptionError, match="shifted"):
            A + wrong
        with pytest.raises(errors.OptionError, match="shifted"):
            wrong - A
    with pytest.raises(errors.OptionError, match="real number"):
        A.shifted("much")


def test_submatrices_and_blocks_by_name_and_glob() -> None:
    A, B, a, b = _pair()
    sizes = list(A.form.sizes)
    ends = np.cumsum([0, *sizes])
    span = {name: np.arange(ends[k], ends[k + 1]) for k, name in enumerate(NAMES)}

    def at(*names: str) -> np.ndarray:
        return np.concatenate([span[n] for n in names])

    expressions = ((A, a), (A + B, a + b), (3 * A, 3 * a), (A.shifted(0.5), a + 0.5 * torch.eye(len(a)).double()))
    for H, dense in expressions:
        for key, rows in (
            (["0.weight", "2.bias"], at("0.weight", "2.bias")),
            ("**.bias", at("0.bias", "2.bias", "4.bias")),
            ("2", at("2.weight", "2.bias")),
            (["[02].weight", -1], at("0.weight", "2.weight", "4.bias")),
            ("*", at(*NAMES)),
        ):
            part = H[key]
            assert error(part.dense(), dense[np.ix_(rows, rows)]) < 1e-10
            assert error(part.trace(), dense[np.ix_(rows, rows)].trace()) < 1e-10
            assert error(part[0, -1].dense(), dense[np.ix_(span[part.names[0]], span[part.names[-1]])]) < 1e-10
        for v, w, rows, columns in (
            ("0.weight", "4*", at("0.weight"), at("4.weight", "4.bias")),
            (["0.bias", "4.bias"], "2.**", at("0.bias", "4.bias"), at("2.weight", "2.bias")),
            (2, -1, at("2.weight"), at("4.bias")),
            (["0", "2.bias"], ["2", "4"], at("0.weight", "0.bias", "2.bias"), at(*NAMES[2:])),
        ):
            block = H[v, w]
            expected = dense[np.ix_(rows, columns)]
            assert block.shape == tuple(expected.shape)
            assert error(block.dense(), expected) < 1e-10
            assert error(block.T.dense(), expected.T) < 1e-10
            z = torch.randn(2, len(rows)).double()
            assert error(z @ block, z @ expected) < 1e-10
    named = A["0", "2"] @ {"2.weight": torch.ones(4, 5).double(), "2.bias": torch.ones(4).double()}
    assert list(named) == ["0.weight", "0.bias"] and named["0.weight"].shape == (5, 4)
    ones = torch.ones(sizes[2] + sizes[3]).double()
    assert error(named["0.bias"], a[np.ix_(span["0.bias"], at("2.weight", "2.bias"))] @ ones) < 1e-10
    several = A["0", "2"] @ [torch.ones(4, 5, 3).double(), torch.ones(4, 3).double()]
    assert [x.shape for x in several] == [(5, 4, 3), (5, 3)]
    assert "Block([0.weight, 0.bias | 2.weight, 2.bias], 25 × 24" in repr(A["0", "2"])


def test_trace_and_eigenvalues_of_blocks() -> None:
    A, _, a, _ = _pair()
    block = A["0", "0"]
    own = a[:25, :25]
    assert error(block.trace(), own.trace()) < 1e-10
    values, vectors = block.eigsh(2, tol=0)
    expected = torch.linalg.eigvalsh(own)
    assert np.allclose(sorted(abs(values)), sorted(expected.abs())[-2:], rtol=1e-8)
    assert error(own @ torch.from_numpy(vectors), torch.from_numpy(vectors * values)) < 1e-8
    across = A["2.bias", "0.bias"]
    with pytest.raises(errors.OptionError, match="not square"):
        across.trace()
    with pytest.raises(errors.OptionError, match="svds"):
        across.eigsh(1)
    for key in ("nothing", ("0", "1", "2"), [], ("0", "9.*"), 17, [None]):
        with pytest.raises(errors.PointError):
            A[key]


def test_loss_and_gradient_are_autograds() -> None:
    model, batch = _net(), _batch()
    for given in (batch, [(x[None], y[None]) for x, y in zip(*batch, strict=True)]):
        H = dh.HessianOperator(model, given, loss=nn.CrossEntropyLoss())
        value = F.cross_entropy(model(batch[0]), batch[1])
        expected = torch.autograd.grad(value, list(model.parameters()))
        flat = torch.cat([g.reshape(-1) for g in expected])
        assert H.loss == pytest.approx(float(value.detach()), rel=1e-12)
        assert error(H.gradient, flat) < 1e-12
        by_name = H.by_name(H.gradient)
        assert all(error(x, g) < 1e-12 for x, g in zip(by_name.values(), expected, strict=True))
        for part in (dh.GGNOperator, dh.TensorOperator):
            assert error(part(model, given, loss=nn.CrossEntropyLoss()).gradient, flat) < 1e-12
    some = dh.HessianOperator(model, batch, params=["4.bias", "0.weight"])
    assert error(some.gradient, torch.cat([expected[5], expected[0].reshape(-1)])) < 1e-12
    with torch.no_grad():
        model[0].weight.mul_(2)
    for stale in ("loss", "gradient"):
        with pytest.raises(errors.StaleError):
            getattr(H, stale)
    H.refresh()
    assert H.loss == pytest.approx(F.cross_entropy(model(batch[0]), batch[1]).item(), rel=1e-12)


@pytest.mark.parametrize("mode", ["shared", "joint"])
def test_gradients_at_activations(mode: str) -> None:
    c = case("mlp-silu")
    point = "3"
    H = dh.HessianOperator(c.model, c.batch, space="activation", points=[point], batch_mode=mode)
    kept: list[Tensor] = []
    hook = c.model.get_submodule(point).register_forward_hook(lambda m, a, out: kept.append(out))
    value = c.run()
    hook.remove()
    (expected,) = torch.autograd.grad(value, kept)
    expected = expected.sum(0).reshape(-1) if mode == "shared" else expected.reshape(-1)
    assert error(H.gradient, expected) < 1e-12


def test_what_the_loss_does_not_depend_on_has_no_gradient() -> None:
    model = _net()
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential(*list(model.children())[:5])(x)
    H = dh.HessianOperator(model, _batch())
    assert not H.by_name(H.gradient)["unused.weight"].any()


def test_standard_errors_hold() -> None:
    A, _, a, _ = _pair()
    estimates = [A.trace(20, seed=seed, return_stderr=True) for seed in range(200)]
    z = [float((e.value - a.trace()) / e.stderr) for e in estimates]
    assert np.mean(np.square(z)) == pytest.approx(1.0, abs=0.4)
    diagonals = [A.diagonal(20, seed=seed, return_stderr=True) for seed in range(200)]
    spread = torch.stack([d.value for d in diagonals]).var(0)
    assert error(torch.stack([d.stderr for d in diagonals]).square().mean(0), spread) < 0.25
    assert torch.equal(A.trace(20), A.trace(20, return_stderr=True).value)
    small = dh.HessianOperator(_net(), _batch(), params=["4.bias"])
    assert float(small.trace(return_stderr=True).stderr) == 0.0
    with pytest.raises(errors.OptionError, match="return_stderr"):
        A.trace(return_stderr="yes")


def test_eigenpairs() -> None:
    A, _, a, _ = _pair()
    values = torch.linalg.eigvalsh(a)
    top = values.abs().sort(descending=True)[0]
    counted: list[int] = []
    products = type(A)._products
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(A), "_products", lambda self, z: (counted.append(len(z[0])), products(self, z))[1])
        first = A.eigsh(1, ncv=8)  # a matrix as small as this would be made as a whole
    assert sum(counted) <= 13
    assert abs(first[0][0]) == pytest.approx(float(top[0]), rel=1e-5)
    again, other = A.eigsh(1, ncv=8), A.eigsh(1, ncv=8, seed=1)
    assert np.array_equal(first[1], again[1]) and not np.array_equal(first[1], other[1])
    assert abs(A.eigsh(1, ncv=8, tol=1e-2)[0][0]) == pytest.approx(float(top[0]), rel=1e-3)
    assert A.eigsh(1)[0][0] == pytest.approx(float(values[values.abs().argmax()]), rel=1e-12)
    pairs = A.top_eigenvectors(3, tol=0, ncv=20)
    assert [abs(p.value) for p in pairs] == pytest.approx(top[:3].tolist(), rel=1e-8)
    for pair in pairs:
        flat = torch.cat([x.reshape(-1) for x in pair.vector.values()])
        assert pair.vector["0.weight"].shape == (5, 4)
        assert float((a @ flat - pair.value * flat).norm()) == pytest.approx(pair.residual, abs=1e-10)
        assert pair.residual < 1e-8 and float(flat.norm()) == pytest.approx(1.0)
    with pytest.raises(errors.ConvergenceError, match="of 3 eigenvalues"):
        A.eigsh(3, tol=0, maxiter=1)
    assert np.allclose(A.eigsh(1, v0=torch.ones(len(a)))[0], first[0])
    zero = dh.HessianOperator(nn.Linear(4, 2), (torch.randn(6, 4), torch.randn(6, 2)), loss=nn.L1Loss())
    values, vectors = zero.eigsh(2)
    assert not values.any() and np.array_equal(vectors.T @ vectors, np.eye(2))
    for options in (
        {"k": 0},
        {"which": "largest"},
        {"k": len(a)},
        {"tol": 2},
        {"tol": "fine"},
        {"ncv": 1},
        {"seed": 0.5},
    ):
        with pytest.raises(errors.OptionError):
            A.eigsh(**options)


def test_spectral_density_takes_as_many_products_as_it_has_vectors() -> None:
    A, _, a, _ = _pair()
    values = torch.linalg.eigvalsh(a)
    counted: list[int] = []
    products = type(A)._products
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(A), "_products", lambda self, z: (counted.append(len(z[0])), products(self, z))[1])
        grid, density = A.spectral_density(30, num_repeats=40)
    assert counted == [40] * 30
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=0.02)
    # Moments: the mean is the trace's share, the bumps add their own width to the variance.
    mean = float(torch.trapezoid(density * grid, grid))
    assert mean == pytest.approx(float(values.mean()), abs=0.1 * float(values.std()))
    assert grid[0] < values[0] and grid[-1] > values[-1]
    assert torch.equal(A.spectral_density(20)[1], A.spectral_density(20)[1])
    flat = dh.HessianOperator(nn.Linear(4, 2), (torch.randn(6, 4), torch.randn(6, 2)), loss=nn.L1Loss())
    assert bool(flat.spectral_density()[1].isfinite().all())
    for options in ({"num_points": 1}, {"kappa": "wide"}, {"margin": -1}, {"boundaries": (1.0, 0.0)}):
        with pytest.raises(errors.OptionError):
            A.spectral_density(20, **options)


def test_solve() -> None:
    A, _, a, _ = _pair()
    G = dh.GGNOperator(_net(), _batch())
    g, n = G.dense(), len(a)
    eye, b = torch.eye(n).double(), torch.randn(n, 2).double()
    exact = torch.linalg.solve(g + 0.1 * eye, b)
    for options in ({}, {"method": "cg"}):
        found = G.solve(b, damping=0.1, rtol=1e-12, **options)
        assert error(found.x, exact) < 1e-8 and found.residual < 1e-10
        assert found.method == options.get("method", "minres")
    inverse = torch.linalg.inv(g + 0.1 * eye)
    for preconditioner in (inverse, inverse.numpy(), lambda v: inverse @ v):
        helped = G.solve(b, damping=0.1, method="cg", preconditioner=preconditioner)
        assert helped.iterations <= 4 and error(helped.x, exact) < 1e-6
    by_diagonal = G.solve(b, damping=0.1, method="cg", preconditioner=1 / (g.diagonal() + 0.1))
    assert error(by_diagonal.x, exact) < 1e-4
    indefinite = A.solve(b[:, 0], damping=0.05, rtol=1e-12)
    assert error(indefinite.x, torch.linalg.solve(a + 0.05 * eye, b[:, 0])) < 1e-6
    stopped = G.solve(b, damping=1e-6, maxiter=2)
    assert stopped.residual > 1e-3  # and it says so
    named = G.solve(G.by_name(b[:, 0]), damping=0.1)
    assert list(named.x) == NAMES
    stored = dh.BlockMatrix.from_model(_net(), _batch(), space="parameter", points=NAMES, part="gn", error=0)
    assert G.solve(b, damping=0.1, method="cg", preconditioner=lambda v: stored.solve(v, 0.1).x).iterations <= 4
    for options in ({"damping": -1}, {"method": "lu"}, {"rtol": 0}, {"maxiter": 0}, {"preconditioner": "none"}):
        with pytest.raises(errors.OptionError):
            G.solve(b, **options)
    with pytest.raises(errors.OptionError, match=r"\(3,\)"):
        G.solve(b, preconditioner=torch.ones(3))
    with pytest.raises(errors.VectorError):
        G.solve(torch.ones(3).double())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([float("nan")], "1 NaN"),
        ([float("inf"), float("-inf")], "2 infinite"),
        ([float("nan"), float("inf")], "1 NaN and 1"),
    ],
)
def test_a_right_hand_side_that_is_not_finite(value: list[float], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    G = dh.GGNOperator(_net(), _batch())
    B = dh.BlockMatrix.from_model(_net(), _batch(), space="parameter", points=NAMES, part="gn", error=0)
    monkeypatch.setattr("dag_hesse.operators.solve.by_krylov", pytest.fail)  # no work is begun
    monkeypatch.setattr("dag_hesse.storage.solve._factors", pytest.fail)
    for A in (G, 2 * G, B):
        n = A.shape[0]
        b = torch.ones(n, 2).double()
        b[: len(value), 1] = torch.tensor(value)
        forms = {2 * n: (b, b.numpy()), n: (b[:, 1], A.by_name(b[:, 1].clone()) if A is G else b[:, 1])}
        for count, given in forms.items():
            for form in given:
                with pytest.raises(errors.NonFiniteError, match=f"b holds {told}.* of {count} numbers"):
                    A.solve(form, damping=0.1)
    assert (G @ b[:, 1]).isnan().any() or "NaN" not in told  # products pass it on


def _at_second(first: Callable[[Tensor], Any], then: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The one when it is called first, then the other."""
    steps = iter([first])
    return lambda v: next(steps, then)(v)


@pytest.mark.parametrize("method", ["minres", "cg"])
def test_preconditioners_that_are_none(method: str) -> None:
    G = dh.GGNOperator(_net(), _batch())
    n = G.shape[0]
    b, eye = torch.randn(n).double(), torch.eye(n).double()
    cases: list[tuple[Any, str]] = [
        (nn.Linear, "is the class Linear; expected"),
        (3, "is an int; expected"),
        (1j * torch.ones(n), "complex64; expected real numbers"),
        (nan := torch.full((n,), float("nan")), "gives NaN or infinity"),
        (torch.diag(nan), "gives NaN or infinity"),
        (lambda v: v / 0, "gives NaN or infinity"),
        (_at_second(lambda v: v, lambda v: v * nan), "gives NaN or infinity"),
        (torch.zeros(n), "gives zero for a vector x, so it is not positive definite"),
        (0 * G, "gives zero"),
        (_at_second(lambda v: v, torch.zeros_like), "gives zero"),
        (-eye, "not positive definite"),
        (-eye.numpy(), "not positive definite"),
        (aslinearoperator(-eye.numpy()), "not positive definite"),
        (_at_second(lambda v: v, lambda v: -v), "not positive definite"),
        (lambda v: None, "gives a NoneType for a vector; expected a tensor of"),
        (lambda v: v[:3], r"gives a Tensor \(3,\) of float64 for a vector"),
        (lambda v: v * 1j, r"complex128 for a vector; expected .* real"),
    ]
    for preconditioner, told in cases:
        with pytest.raises(errors.OptionError, match=f"^preconditioner .*{told}"):
            G.solve(b, damping=0.1, method=method, preconditioner=preconditioner)


@pytest.mark.parametrize("method", ["minres", "cg"])
def test_forms_of_a_preconditioner(method: str) -> None:
    G = dh.GGNOperator(_net(), _batch())
    n = G.shape[0]
    b, inverse = torch.randn(n).double(), torch.linalg.inv(G.dense() + 0.1 * torch.eye(G.shape[0]).double())
    exact, layer = inverse @ b, nn.Linear(n, n, bias=False).double()
    layer.weight.data.copy_(inverse)
    array = inverse.numpy()
    forms = (inverse, array, aslinearoperator(array), csr_array(array), lambda v: array @ v.numpy(), layer)
    for form in (*forms, lambda v: (inverse @ v)[:, None]):
        found = G.solve(1e-200 * b, damping=0.1, method=method, preconditioner=form)  # whose squares are no numbers
        assert found.iterations <= 6 and error(1e200 * found.x, exact) < 1e-6


def test_a_stored_matrix_goes_into_expressions() -> None:
    model, batch = _net(), _batch()
    H = dh.HessianOperator(model, batch, points=NAMES)
    B = dh.BlockMatrix.from_model(model, batch, space="parameter", points=NAMES, error=0)
    assert float((H - B).dense().norm()) < 1e-8 * float(H.dense().norm())
    assert error((H @ B).dense(), H.dense() @ H.dense()) < 1e-8
    with pytest.raises(errors.OptionError, match="not copied"):
        copy.deepcopy(H + B)


@pytest.mark.parametrize("name", ["mlp-silu", "encoder-eval", "batch-norm-train", "tied"])
def test_a_factor_of_gauss_newton(name: str) -> None:
    c = case(name)
    names = [n for n, p in c.model.named_parameters() if p.numel() < 70][:6]
    G = dh.GGNOperator(c.model, c.batch, loss=c.loss, params=names)
    factor = G.factor()
    found = (factor.rows.T * factor.signs) @ factor.rows
    assert error(found, G.dense()) < 1e-10
    v = torch.randn(G.shape[0]).double()
    assert error(G @ v, factor.rows.T @ (factor.signs * (factor.rows @ v))) < 1e-10  # the operator is as it was


def test_factors_of_several_batches_and_of_losses_that_are_not_convex() -> None:
    model, (x, y) = _net(), _batch()
    whole = dh.GGNOperator(model, (x, y)).factor()
    assert whole.rows.shape == (14, 64) and bool((whole.signs == 1).all())  # rank of softmax: classes - 1
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    parts = dh.GGNOperator(model, loader).factor()
    assert error(parts.rows.T @ parts.rows, whole.rows.T @ whole.rows) < 1e-10
    bent = dh.GGNOperator(model, (x, y), loss=lambda out, t: torch.sin(3 * out).sum())
    factor = bent.factor()
    assert set(factor.signs.tolist()) == {-1.0, 1.0}
    assert error((factor.rows.T * factor.signs) @ factor.rows, bent.dense()) < 1e-10
    wider = _net()
    wider.unused = nn.Linear(2, 2).double()
    wider.forward = lambda x: nn.Sequential(*list(wider.children())[:5])(x)
    S = dh.GGNOperator(wider, (x, y)).factor().rows
    assert S.shape == (14, 70) and not S[:, 64:].any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dag_hesse.budget.available_memory", lambda device: 1000)
        with pytest.raises(errors.MemoryBudgetError, match="21 × 64"):
            dh.GGNOperator(model, (x, y)).factor()
    joint = dh.GGNOperator(model, (x, y), space="activation", points=["1"], batch_mode="joint")
    with pytest.raises(errors.OptionError, match="joint"):
        joint.factor()
    by_points = dh.GGNOperator(model, (x, y), space="activation", points=["1", "3"])
    S = by_points.factor().rows
    assert error(S.T @ S, by_points.dense()) < 1e-10


@pytest.mark.parametrize("which", ["LM", "SM", "LA", "SA", "BE"])
def test_multiple_eigenvalues_of_small_operators_are_all_found(which: str) -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3).double(), (torch.randn(20, 4).double(), torch.randn(20, 3).double())
    H = dh.HessianOperator(model, batch, loss=nn.MSELoss())  # XᵀX for each of three outputs
    values, vectors = H.eigsh(4, which=which)
    every = torch.linalg.eigvalsh(H.dense()).numpy()
    by_size = np.argsort(np.abs(every))
    kept = {"LM": by_size[-4:], "SM": by_size[:4], "LA": slice(-4, None), "SA": slice(0, 4), "BE": [0, 1, -2, -1]}
    assert np.abs(values - np.sort(every[kept[which]])).max() < 1e-12
    assert np.abs(H.dense().numpy() @ vectors - vectors * values).max() < 1e-12
    assert np.abs(vectors.T @ vectors - np.eye(4)).max() < 1e-12
