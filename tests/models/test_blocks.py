"""Every block (full, GN, T) of every model, in every batch mode, against dense autograd."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import pytest
import torch

import dag_hesse as dh
from dag_hesse.errors import BatchCouplingError
from tests.models.zoo import CASES, Case, case
from tests.oracle import Truth, error

PARTS = ("full", "gn", "tensor")


@functools.cache
def truth_of(name: str) -> Truth:
    c = case(name)
    torch.manual_seed(99)  # dropout masks
    return Truth(c.model, c.run, c.names, c.parameters, c.out, c.axes)


def report_of(c: Case, batch_mode: str, parameters: bool = True, **options: object) -> dh.CurvatureReport:
    torch.manual_seed(99)
    points = [*c.names, *(c.parameters if parameters else ())]
    return dh.analyze(c.model, c.batch, loss=c.loss, points=points, batch_mode=batch_mode, **options)


def by_name(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize by case; tests of one case run in one process, which keeps its oracle."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names])


def samples(c: Case) -> int:
    return len(c.batch["labels"] if isinstance(c.batch, dict) else c.batch[1])


def check(c: Case, truth: Truth, batch_mode: str, tolerance: float, **options: object) -> None:
    """Blocks and the norms in the report, both against the oracle."""
    report = report_of(c, batch_mode, parameters=batch_mode == "shared", **options)
    norms = {"full": report.resonance, "gn": report.gn_norm, "tensor": report.tensor_norm}
    exact = np.isin(report.method["resonance"], ("exact", "gram", "zero"))
    assert exact.all()
    for part in PARTS:
        for i, v in enumerate(report.names):
            for j, w in enumerate(report.names):
                whole = truth.block(v, w, "full", batch_mode, samples(c))
                # What cancels in the sum over samples (a shift before BatchNorm, say) leaves rounding of its terms.
                scale = max(float(whole.norm()), 1e-3 * float(truth.full[v, w].norm()))
                expected = truth.block(v, w, part, batch_mode, samples(c))
                assert error(report.block(v, w, part), expected, scale) < tolerance, (v, w, part)
                wanted = expected.norm(dim=(1, 2)).mean() if batch_mode == "per_sample" else expected.norm()
                assert abs(norms[part][i, j] - float(wanted)) <= tolerance * max(scale, float(wanted)), (v, w, part)


@by_name(CASES)
def test_blocks_agree_with_dense_autograd(name: str) -> None:
    c = case(name)
    truth = truth_of(name)
    check(c, truth, "shared", 1e-10, mode="exact")
    check(c, truth, "joint", 1e-10, mode="exact")
    if c.interact:
        with pytest.raises(BatchCouplingError, match="interact"):
            report_of(c, "per_sample")
    else:
        check(c, truth, "per_sample", 1e-10, mode="exact")


@by_name(["mlp-relu", "resnet18-relu", "mlp-silu", "encoder-eval", "batch-norm-train", "hf-gpt2"])
def test_single_precision(name: str) -> None:
    truth = truth_of(name)
    check(case(name, torch.float32), truth, "shared", 1e-4, mode="exact")


@by_name(["mlp-relu", "mlp-silu", "diamond-cat", "gru-cell-loop", "batch-norm-train", "hf-resnet"])
@pytest.mark.parametrize("batch_mode", ["shared", "per_sample", "joint"])
def test_gram_and_auto_agree_with_dense_autograd(name: str, batch_mode: str) -> None:
    c = case(name)
    if c.interact and batch_mode == "per_sample":
        return
    truth = truth_of(name)
    for mode in ("gram", "auto"):
        check(c, truth, batch_mode, 1e-9, mode=mode, probes=10_000)


@by_name([name for name in CASES if case(name).piecewise_linear])
def test_tensor_part_of_piecewise_linear_models_is_exactly_zero(name: str) -> None:
    c = case(name, torch.float32)
    report = report_of(c, "shared", parameters=False)
    assert (report.tensor_norm == 0.0).all()
    assert (report.gn_gap == 0.0).all()
    assert (report.method["tensor_norm"] == "zero").all()
    assert (report.gn_norm > 0.0).all()


@by_name(["mlp-silu", "densenet", "hf-gpt2", "gate"])
def test_blocks_are_symmetric(name: str) -> None:
    c = case(name)
    report = report_of(c, "shared")
    for v in report.names:
        for w in report.names:
            for part in PARTS:
                assert error(report.block(v, w, part), report.block(w, v, part).T) < 1e-12


@by_name(CASES)
def test_structure_claims_no_zero_that_the_oracle_refutes(name: str) -> None:
    c = case(name)
    found = dh.structure(c.model, c.batch, loss=c.loss, points=[*c.names, *c.parameters])
    truth = truth_of(name)
    for i, v in enumerate(found.names):
        for j, w in enumerate(found.names):
            scale = float((truth.full[v, v].norm() * truth.full[w, w].norm()).sqrt())
            if not found.gn_alive[i, j]:
                assert float(truth.gn[v, w].norm()) <= 1e-13 * scale
            if not found.tensor_alive[i, j]:
                assert float((truth.full[v, w] - truth.gn[v, w]).norm()) <= 1e-13 * scale
            if not c.interact and v in c.names and w in c.names:
                rank = torch.linalg.matrix_rank(truth.block(v, w, "gn", "per_sample", samples(c)), rtol=1e-9)
                assert int(rank.max()) <= found.rank_bound[i, j]
                shared = torch.linalg.matrix_rank(truth.block(v, w, "gn", "shared"), rtol=1e-9)
                assert int(shared) <= found.shared_rank_bound[i, j]
