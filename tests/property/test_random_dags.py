"""Random DAGs against the dense oracle: blocks, their parts, and every claim of the structure stage.

Models with state, writes, draws and branches are compared with a copy that runs from the same random state. Where
autograd itself has no second derivative, there is no oracle, and the model is passed over.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

import dag_hesse as dh
from dag_hesse.errors import UnfaithfulCaptureError
from tests import device
from tests.oracle import Rounded, Truth, differentiable_twice, error
from tests.property.dags import BATCH, COUNTED, LOSSES, STATEFUL, WIDTH, WRITING, Dag, Op, Recipe, recipes

SHARDS = 4
EXAMPLES = int(os.environ.get("DAG_HESSE_FUZZ", "400"))  # over all kinds and shards
PARAMETERS = ("pool.0.weight", "scale", "masked.weight", "moved.bias", "inner.weight", "table.weight")
Batch = tuple[Tensor, Tensor]


def require(condition: Any) -> None:
    """Pass over an example without an oracle."""
    if not condition:
        raise UnsatisfiedAssumption


def model_of(recipe: Recipe) -> Dag:
    torch.manual_seed(recipe.seed)
    return Dag(recipe).double().to(device.NAME)


def batch_of(size: int) -> Batch:
    inputs, targets = (torch.randn(size, WIDTH).double().to(device.NAME) for _ in range(2))
    return inputs, targets


def agree(found: Tensor, expected: Tensor, scale: float, again: Callable[[], Tensor], limit: float = 1e-10) -> bool:
    """Whether two results differ by ``limit`` times their scale, or by no more than rounding alone moves the oracle.

    ``again()`` is the oracle once more, under :class:`~tests.oracle.Rounded` (a softmax that is nearly one-hot leaves
    few digits of 1 − p to anybody).
    """
    off = error(found, expected, scale)
    if off < limit:
        return True
    state = device.random_states()
    moved = max(error(again(), expected, scale) for _ in range(5))
    device.set_random_states(state)  # what follows draws as if nobody had looked
    require(moved < 1e-6)  # else there is a kink within rounding (a norm of almost nothing), and no truth to tell
    return off < moved


def run(model: Dag, batch: Batch, loss: Op) -> tuple[Tensor, Tensor]:
    """Output and loss of a model that may write to what it is given."""
    with differentiable_twice():
        output = model(batch[0].clone())
    return output, loss(output, batch[1])


def differentiable(model: Dag, batch: Batch, loss: Op) -> list[str]:
    """Parameters that the loss depends on; a model that PyTorch cannot run or differentiate twice is passed over."""
    model = copy.deepcopy(model)
    own = dict(model.named_parameters())
    try:
        output, value = run(model, batch, loss)
        grads = torch.autograd.grad(value, list(own.values()), create_graph=True, allow_unused=True)
        smooth = [g for g in grads if g is not None and g.requires_grad]
        total = sum((g.sum() for g in smooth), torch.zeros((), device=device.NAME))
        further = torch.autograd.grad(total, list(own.values()), allow_unused=True) if smooth else ()
    except (RuntimeError, IndexError, ValueError):
        require(False)
    require(float(output.detach().abs().max()) < 30)  # beyond, softmax leaves nothing but rounding
    found = [value, *(g for g in (*grads, *further) if g is not None)]
    require(all(bool(g.isfinite().all()) and float(g.detach().abs().max()) < 1e3 for g in found))
    return [name for name, g in zip(own, grads, strict=True) if g is not None and bool(g.any())]


def check_blocks(recipe: Recipe) -> None:
    model, batch, loss = model_of(recipe), batch_of(BATCH), LOSSES[recipe.loss]
    names = [f"nodes.{k}" for k in recipe.reaching()]
    torch.manual_seed(recipe.seed)
    reaching = differentiable(model, batch, loss)
    points = [*names, *[name for name in PARAMETERS if name in reaching][:2]]

    def oracle(twin: Dag, batch: Batch) -> Truth:
        torch.manual_seed(recipe.seed)
        return Truth(twin, lambda: loss(twin(batch[0].clone()), batch[1]), names, points[len(names) :])

    try:
        truth = oracle(copy.deepcopy(model), batch)
    except RuntimeError:
        require(False)
    require(all(bool(block.isfinite().all()) for block in truth.full.values()))  # the norm of a zero row has no second
    torch.manual_seed(recipe.seed)
    operator = dh.HessianOperator(model, batch, loss=loss, points=points, space="activation")
    for name, size in zip(operator.names, operator.form.sizes, strict=True):
        if name in names and size == BATCH * WIDTH:  # where samples mix, the axis of the batch may be lost
            del truth.axes[name]
    size = operator.shape[0]
    found = dict(
        zip(("gn", "tensor"), operator.parts(torch.eye(size, dtype=operator.dtype, device=device.NAME)), strict=True)
    )
    found["full"] = operator.dense()

    def again() -> Truth:
        with Rounded():
            twin = oracle(copy.deepcopy(model), batch)
        twin.axes = truth.axes
        return twin

    compare(operator, found, truth, dh.structure(model, batch, loss=loss, points=points), again)
    report = dh.analyze(model, batch, loss=loss, points=points, mode="exact")
    norms = torch.as_tensor(report.resonance).to(device.NAME)
    assert error(norms, _norms(operator, found["full"], report.names), 1e-2) < 1e-10
    picked = points[recipe.seed % len(points)]
    expected, other = truth.block(picked, picked, "full", "shared"), partial(block, again, picked, picked, "full")
    assert agree(report.block(picked, picked), expected, 1e-2, other)


def _split(operator: dh.HessianOperator, whole: Tensor) -> dict[tuple[str, str], Tensor]:
    sizes = operator.form.sizes
    rows = dict(zip(operator.names, whole.split(sizes), strict=True))
    return {(v, w): x for v in rows for w, x in zip(operator.names, rows[v].split(sizes, 1), strict=True)}


def _norms(operator: dh.HessianOperator, whole: Tensor, names: Sequence[str]) -> Tensor:
    blocks = _split(operator, whole)
    return torch.stack([torch.stack([blocks[v, w].norm() for w in names]) for v in names])


def block(oracle: Callable[[], Truth], v: str, w: str, part: str, mode: str = "shared") -> Tensor:
    return oracle().block(v, w, part, mode)


def compare(
    operator: dh.HessianOperator,
    found: dict[str, Tensor],
    truth: Truth,
    claims: dh.Structure,
    again: Callable[[], Truth],
) -> None:
    """Blocks and their parts; what is claimed to be zero is zero, and no rank is above its bound."""
    blocks = {part: _split(operator, whole) for part, whole in found.items()}
    place = {name: k for k, name in enumerate(claims.names)}
    largest = max(float(x.norm()) for x in truth.full.values())
    for v, w in blocks["full"]:
        expected = {part: truth.block(v, w, part, "shared") for part in blocks}
        scale = float((truth.full[v, v].norm() * truth.full[w, w].norm()).sqrt())
        scale = max(scale, float(truth.gn[v, w].norm()), 1e-2)  # weights and data are of order one
        for part in blocks:
            other = partial(block, again, v, w, part)
            assert agree(blocks[part][v, w], expected[part], scale, other), (v, w, part)
        at, scale = (place[v], place[w]), max(scale, largest)  # the oracle's zeros are sums that cancel
        zero = torch.zeros_like(truth.full[v, w])
        for part, alive in (("gn", claims.gn_alive), ("tensor", claims.tensor_alive)):
            whole = partial(block, again, v, w, part, "joint")
            assert alive[at] or agree(zero, truth.block(v, w, part, "joint"), scale, whole, 1e-12), (v, w, part)
        rank = torch.linalg.matrix_rank(expected["gn"], atol=1e-9 * scale, rtol=1e-9)
        assert int(rank) <= claims.shared_rank_bound[at], (v, w)


def products(model: Dag, batch: Batch, loss: Op, names: Sequence[str], columns: Tensor) -> tuple[Tensor, Tensor]:
    """H V and GGN V by double-backward of a copy of the model."""
    model = copy.deepcopy(model)
    own = [dict(model.named_parameters())[name] for name in names]

    def rows(of: Tensor, **options: Any) -> Tensor:
        found = torch.autograd.grad(of, own, retain_graph=True, allow_unused=True, **options)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, own, strict=True)]
        )

    output, value = run(model, batch, loss)
    slope = rows(value, create_graph=True)
    whole = torch.stack([rows(slope @ v) if slope.requires_grad else torch.zeros_like(v) for v in columns.T], 1)
    jacobian = torch.stack([rows(y) for y in output.flatten()])
    curvature = torch.autograd.functional.hessian(lambda y: loss(y, batch[1]), output.detach())
    size = output.numel()
    return whole, jacobian.T @ (curvature.reshape(size, size) @ (jacobian @ columns))


def columns_of(model: Dag, names: Sequence[str], count: int) -> Tensor:
    """Random vectors of these parameters, as columns."""
    own = dict(model.named_parameters())
    return torch.randn(sum(own[name].numel() for name in names), count).double().to(device.NAME)


def check_products(recipe: Recipe) -> None:
    """Writes that other steps see: by parameters, as a leaf between a tensor and its views would part them."""
    model, batch, loss = model_of(recipe), batch_of(BATCH), LOSSES[recipe.loss]
    torch.manual_seed(recipe.seed)
    state = device.random_states()
    names = differentiable(model, batch, loss)
    require(names)
    columns = columns_of(model, names, 3)
    device.set_random_states(state)
    expected = products(model, batch, loss, names, columns)
    device.set_random_states(state)
    kept = {name: x.clone() for name, x in model.state_dict().items()}

    def again(k: int) -> Tensor:
        device.set_random_states(state)
        with Rounded():
            return products(model, batch, loss, names, columns)[k]

    for k, kind in enumerate((dh.HessianOperator, dh.GGNOperator)):
        scale = max(float(expected[1].norm()), 1e-2)
        found = kind(model, batch, loss=loss, points=names) @ columns
        assert agree(found, expected[k], scale, partial(again, k)), kind
    assert all(map(torch.equal, device.random_states(), state))
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())


REDUCTIONS: dict[str, Callable[[list[Batch], Callable[[Tensor], float] | None], tuple[Any, list[float]]]] = {
    "found": lambda batches, counted: (
        None,
        [1.0] * len(batches) if counted is None else _shares([counted(t) for _, t in batches]),
    ),
    "mean": lambda batches, _: ("mean", _shares([len(t) for _, t in batches])),
    "sum": lambda batches, _: ("sum", [1.0] * len(batches)),
    "weights": lambda batches, _: (
        [k + 0.5 for k in range(len(batches))],
        _shares([k + 0.5 for k in range(len(batches))]),
    ),
    "callable": lambda batches, _: (
        lambda b: float(b[1][:, 0].exp().sum()),
        _shares([float(t[:, 0].exp().sum()) for _, t in batches]),
    ),
}


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def check_batches(recipe: Recipe, name: str, reduction: str, sizes: Sequence[int]) -> None:
    model = model_of(recipe)
    loss, counted = COUNTED[name]
    batches = [batch_of(size) for size in sizes]
    require(counted is None or all(counted(t) for _, t in batches))
    option, shares = REDUCTIONS[reduction](batches, counted)
    torch.manual_seed(recipe.seed)
    state = device.random_states()
    reaching = {n for batch in batches for n in differentiable(model, batch, loss)}
    names = [n for n, _ in model.named_parameters() if n in reaching]
    require(names)
    columns = columns_of(model, names, 2)

    def weighted() -> list[list[Tensor]]:
        """H V and GGN V, their terms batch by batch."""
        device.set_random_states(state)
        terms = [products(model, batch, loss, names, columns) for batch in batches]
        return [[share * term[k] for share, term in zip(shares, terms, strict=True)] for k in range(2)]

    expected = weighted()
    device.set_random_states(state)
    scale = max(*(float(term.norm()) for term in expected[1]), 1e-2)

    def again(k: int) -> Tensor:
        with Rounded():
            return torch.stack(weighted()[k]).sum(0)

    for k, kind in enumerate((dh.HessianOperator, dh.GGNOperator)):
        operator = kind(model, batches, loss=loss, params=names, reduction=option)
        assert agree(operator @ columns, torch.stack(expected[k]).sum(0), scale, partial(again, k)), kind


def unless_autograd_is_wrong(test: Callable[..., None]) -> Callable[..., None]:
    """A test that passes over what is refused for PyTorch's own gradient, where central differences confirm ours.

    ``torch.kron`` is known for it: it goes on with what a later write made of its operands, and says nothing.
    """

    @functools.wraps(test)
    def run(*values: Any, **named: Any) -> None:
        try:
            test(*values, **named)
        except UnfaithfulCaptureError as error:
            require("confirm the graph's" not in str(error))
            raise

    return run


def examples(share: float, *strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Run a test in several processes, each with examples of its own."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def sharded(shard: int) -> None:
            fixed = seed(shard) if "DAG_HESSE_FUZZ" not in os.environ else lambda inner: inner
            limits = settings(
                max_examples=max(1, round(share * EXAMPLES / SHARDS)),
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*captured anew")
                fixed(limits(given(*strategies)(unless_autograd_is_wrong(test))))()

        sharded.__name__ = test.__name__
        return pytest.mark.parametrize("shard", range(SHARDS))(sharded)

    return decorate


@examples(0.3, recipes())
def test_random_dags(recipe: Recipe) -> None:
    check_blocks(recipe)


@examples(0.4, recipes(STATEFUL))
def test_random_dags_with_state_writes_and_draws(recipe: Recipe) -> None:
    check_blocks(recipe)


@examples(0.15, recipes(WRITING))
def test_writes_that_other_steps_see(recipe: Recipe) -> None:
    check_products(recipe)


@examples(
    0.15,
    recipes(STATEFUL),
    st.sampled_from(sorted(COUNTED)),
    st.sampled_from(sorted(REDUCTIONS)),
    st.lists(st.integers(2, 4), min_size=1, max_size=4),
)
def test_batches_of_unequal_size(recipe: Recipe, loss: str, reduction: str, sizes: list[int]) -> None:
    check_batches(recipe, loss, reduction, sizes)
