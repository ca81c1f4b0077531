"""Several processes as one: gloo, two to four ranks, against one process that has all samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import multiprocessing, nn

import dag_hesse as dh
from dag_hesse.cli import main
from dag_hesse.errors import OptionError
from tests.distributed import training, work
from tests.distributed.gang import Gang

pytestmark = pytest.mark.xdist_group("ranks")  # one process has the gang
GANG = Gang()
run = GANG.run


@pytest.fixture(scope="module", autouse=True)
def gang() -> Iterator[None]:
    yield
    GANG.end()


DIFFER = {  # what is another one on rank 1: what the error says of rank 0
    "activation module": "module '1' is Tanh() in training mode on rank 0, and Softplus(beta=1.0",
    "setting of a module": "module '1' is Softplus(beta=1.0, threshold=20.0) in training mode on rank 0",
    "activation function": "aten.sigmoid.default in the model or its loss is run 1× on rank 0, and missing on rank 1",
    "function of another size": "aten.sigmoid.default in the model or its loss is run on rank 0, and missing on rank 1",
    "order of rows": "'0.weight' is float64 (6, 4) with bits",
    "two signs": "'0.weight' is float64 (6, 4) with bits",
    "loss": "loss= is torch.nn.functional.cross_entropy on rank 0, and tests.distributed.work.ignoring with code",
    "lambda": "loss= is tests.distributed.differing.unlike.<locals>.<lambda> with code",
    "weights of a loss": "loss= is CrossEntropyLoss() in training mode; weight float64 (3,) with bits",
    "inferred loss": "the loss is cross-entropy, as targets are integers on rank 0, and mean squared error",
    "mode of dropout": "the model is Sequential() in evaluation mode on rank 0, and Sequential() in training mode on rank 1",
    "operator": "the operator is 'HessianOperator' on rank 0, and 'GGNOperator' on rank 1",
    "points": "the points' 1. is '0' (6,) (activation) on rank 0, and '1' (6,) (activation) on rank 1",
    "params": "params= is ['0.weight', '0.bias'] on rank 0, and ['0.bias', '0.weight'] on rank 1",
    "drawn targets": "seed= is 0 on rank 0, and 1 on rank 1",
    "kind of call": "the operator is 'HessianOperator' on rank 0, and missing on rank 1",
    "map mode": "mode= is 'exact' on rank 0, and 'probes' on rank 1",
    "map probes": "probes= is 8 on rank 0, and 16 on rank 1",
    "map seed": "seed= is 0 on rank 0, and 1 on rank 1",
    "map rtol": "rtol= is 0.1 on rank 0, and 0.2 on rank 1",
    "map pairs": "pairs= is [['0', '4']] on rank 0, and [['2', '4']] on rank 1",
    "stored error": "error= is 0.1 on rank 0, and 0.2 on rank 1",
    "monitor": "loss= is torch.nn.functional.cross_entropy on rank 0",
    "refreshed": "the model is Sequential() in evaluation mode on rank 0, and Sequential() in training mode on rank 1",
    "eigsh": "ranks differ in eigsh(): k= is 1 on rank 0, and 2 on rank 1",
    "option of eigsh": "ranks differ in eigsh(): which= is 'LA' on rank 0, and 'SA' on rank 1",
    "eigsh of a sum": "ranks differ in eigsh(): k= is 1 on rank 0, and 2 on rank 1",
    "eigsh of a block": "ranks differ in eigsh(): k= is 1 on rank 0, and 2 on rank 1",
    "top_eigenvectors": "ranks differ in top_eigenvectors(): k= is 1 on rank 0",
    "trace": "ranks differ in trace(): matvecs= is 20 on rank 0, and 21 on rank 1",
    "diagonal": "ranks differ in diagonal(): seed= is 0 on rank 0",
    "spectral_density": "ranks differ in spectral_density(): ncv= is 5 on rank 0",
    "solve": "ranks differ in solve(): b= is float64 (83,) with bits",
    "landscape": "ranks differ in landscape(): points= is 3 on rank 0, and 5 on rank 1",
    "block": "ranks multiply other blocks, or other parts",
    "order of a vector": "VectorError: ranks multiply with different vectors",
    "block of a report": "ranks differ in block(): v= is '0' on rank 0, and '2' on rank 1",
}


def test_ranks_that_differ_are_told_in_what(tmp_path: Path) -> None:
    for found in run("differing.unlike", 2, tmp_path):
        assert found.keys() == DIFFER.keys()
        for name, text in DIFFER.items():
            assert found[name].startswith("VectorError" if "VectorError" in text else "RankError"), (name, found[name])
            assert text in found[name], (name, found[name])


def test_what_may_differ_between_ranks_is_no_error(tmp_path: Path) -> None:
    for found in run("differing.likewise", 2, tmp_path):
        assert found == dict.fromkeys(found, "") and len(found) == 5


def alone(name: str) -> dict[str, Any]:
    return work.figures(dh.HessianOperator(work.model(), work.samples(), loss=work.LOSSES[name]))


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, rtol=1e-12, atol=1e-13 * float(x.abs().max()), msg=key)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_make_the_operator_of_all_samples(ranks: int, tmp_path: Path) -> None:
    every = run("work.by_data", ranks, tmp_path)
    for found in every:
        for name in work.LOSSES:
            same(found[name], alone(name))
        A = dh.HessianOperator(work.model(), work.samples(), loss=F.cross_entropy, space="activation")
        same(found["activations"], {"many": A @ work.vectors(A)})
        G = dh.GGNOperator(work.model(), work.samples(), loss=F.cross_entropy)
        same(found["wrapped"], {"one": G @ work.vectors(G)[:, 0]})
        fisher = dh.FisherOperator(work.model(), work.samples(), loss=nn.CrossEntropyLoss(ignore_index=1))
        same(found["fisher"], {"one": fisher @ work.vectors(fisher)[:, 0]})
        for name in work.LOSSES:
            for key, x in found[name].items():
                assert torch.equal(x, every[0][name][key])
    for rank, found in enumerate(every):
        texts = found["errors"]
        assert texts["batch"].startswith(
            "NonFiniteError" if rank else "RankError: making the operator failed on rank 1: NonFinite"
        )
        assert texts["vector"].startswith("VectorError: ranks multiply with different vectors")
        assert "eval()" in texts["norm"] and "batch_mode='shared'" in texts["joint"]
        assert "expected a DeviceMesh" in texts["no mesh"] and "expected 'data', 'probe' or both" in texts["names"]
        for what, name in (("model", "2.bias"), ("map", "2.bias"), ("refreshed", "0.weight")):
            assert texts[what].startswith(f"RankError: ranks differ in the problem: '{name}' is float64"), texts[what]
            assert "on rank 0, and float64" in texts[what] and texts[what].count("with bits") == 2
        assert texts["stale"].startswith("StaleError" if rank else "RankError: a product failed on rank 1: StaleError")


@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_of_several_ranks_count_as_in_one(ranks: int, tmp_path: Path) -> None:
    for found in run("work.added_up", ranks, tmp_path):
        for name in work.ADDED:
            same(found[name], work.added(name))
        assert "none of this rank's batches counts" in found["nothing"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_vectors_give_the_bits_of_one_process(ranks: int, tmp_path: Path) -> None:
    H = dh.HessianOperator(work.model(), work.samples(), loss=F.cross_entropy)
    H._problem.chunk = 2
    expected = work.figures(H)
    for found in run("work.by_probe", ranks, tmp_path):
        for key, x in expected.items():
            assert torch.equal(found["mean"][key], x), key


def test_shards_and_shares_at_once(tmp_path: Path) -> None:
    for found in run("work.by_both", 4, tmp_path):
        same(found["ignoring"], alone("ignoring"))


@pytest.mark.parametrize("axis", ["data", "probe"])
def test_a_map_of_several_ranks_is_that_of_one(axis: str, tmp_path: Path) -> None:
    expected = work.maps(work.samples(), work.ignoring)
    for found in run(f"work.map_by_{axis}", 2, tmp_path):
        for name, report in expected.items():
            mine = found[name]
            assert mine.facts["batch_size"] == report.facts["batch_size"]
            assert abs(mine.facts["loss"] - report.facts["loss"]) < 1e-14
            for metric, values in report.values.items():
                assert (mine.method[metric] == report.method[metric]).all(), (name, metric)
                rtol = 0 if axis == "probe" else 1e-11 if metric == "stable_rank" else 1e-12  # its ‖H‖₂ by Lanczos
                for x, y in ((mine.values[metric], values), (mine.stderr[metric], report.stderr[metric])):
                    np.testing.assert_allclose(
                        x, y, rtol, atol=bool(rtol) * 1e-14 * values.max(), err_msg=f"{name} {metric}"
                    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_stored_blocks_of_shards_are_those_of_all_samples(ranks: int, tmp_path: Path) -> None:
    expected, every = work.stored(work.samples(), work.ignoring), run("work.stored_by_data", ranks, tmp_path)
    routes = {name: route for name, (route, *_) in expected.items()}
    assert {"gram", "exact", "one pass", "two passes"} <= set(routes.values()), routes
    for rank, found in enumerate(every):
        for name, (route, kinds, cores, dense) in expected.items():
            mine, first = found[name], every[0][name]
            assert mine[:2] == (route, kinds)
            assert torch.equal(mine[3], first[3])
            torch.testing.assert_close(mine[3], dense, rtol=0, atol=1e-12 * float(dense.norm()), msg=name)
            if route in ("gram", "exact") and cores is not None:
                for pair, core in cores.cores.items():
                    torch.testing.assert_close(mine[2].cores[pair], core, rtol=0, atol=1e-12 * float(dense.norm()))
        for part in ("gn", "tensor"):
            text = found[f"failing {part}"]
            assert text.startswith("MemoryError" if rank == 1 else "RankError") and "nothing is left" in text
        assert "batch_mode='shared'" in found["joint"]


def test_shares_of_the_vectors_store_the_bits_of_one_process(tmp_path: Path) -> None:
    expected = work.stored(work.samples(), work.ignoring)
    for found in run("work.stored_by_probe", 2, tmp_path):
        for name, (route, kinds, _, dense) in expected.items():
            assert found[name][:2] == (route, kinds) and torch.equal(found[name][3], dense), name
        assert found["apart"].startswith("RankError: ranks along 'probe' have the losses")


@pytest.mark.parametrize("ranks", [2, 3])
def test_monitors_of_several_ranks_measure_as_one(ranks: int, tmp_path: Path) -> None:
    every = run("training.monitored", ranks, tmp_path)
    first, alone = every[0], every[0]["alone"]
    assert [x is not None for x in alone] == [True, False] * 3
    assert {"curvature/stability", "curvature/update_tensor", "curvature/gn_gap/stem"} <= alone[4].keys()
    assert not all(map(torch.equal, first["states"][-1], every[1]["states"][-1]))  # BatchNorm's statistics differ
    for found in every:
        assert found["several"] == first["several"]  # to the bit
        for mine, expected in zip(found["several"], alone, strict=True):
            assert mine is expected is None or mine == pytest.approx(expected, rel=1e-12, abs=1e-14)
        np.testing.assert_allclose(found["report"][0], first["report"][1], 1e-12)
        assert found["shared"][0] == first["shared"][1]
        for step in (6, 7):
            going_on, resumed = found[f"resumed {step}"]
            assert going_on == resumed and (going_on is None) == (step == 7)
        assert found["differ"].startswith("RankError: of the ranks' monitors, the next is [99, 8")
        assert found["refused"].startswith("OptionError: mesh= takes training=False")
        assert found["paced"] == training.paced(training.net(), work.samples(), None, 0)

    check_failures([found["failures"] for found in every])


def check_failures(every: list[list[Any]]) -> None:
    """All lose the same numbers, one says why, and the others who did."""
    for rank, steps in enumerate(every):
        assert [metrics for metrics, _ in steps] == [metrics for metrics, _ in every[0]]
        counts = [metrics["curvature/failed"] for metrics, _ in steps]
        assert counts[0] == counts[5] == 0 and counts[2:5] == [1, 1, 1] and counts[1] == 4, counts
        error = "MemoryError: nothing is left" if rank == 1 else "RankError: "
        for step in (1, 2):
            assert all(text.startswith(error) and "nothing is left" in text for _, text in steps[step][1]), steps[step]
        (name, text), *_ = steps[3][1]
        assert name == "all" and "'stem.0.weight' holds 1 NaN" in text
        (name, text), *_ = steps[4][1]
        assert name == "stability" and "another number on another rank" in text


def test_a_rank_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    multiprocessing.spawn(work.enter, (2, str(tmp_path), "work.left_alone"), nprocs=2)
    text = torch.load(tmp_path / "0", weights_only=False)
    assert text.startswith("RankError: a rank does not answer")


def test_parameters_in_parts_are_gathered_into_a_copy(tmp_path: Path) -> None:
    expected, given = alone("mean"), {"loss": F.cross_entropy}
    resonance = dh.analyze(work.model(), work.samples(), points=["0", "2"], **given).resonance
    blocks = dh.BlockMatrix.from_model(work.model(), work.samples(), points=["0"], progress=False, **given).to_dense()
    for rank, found in enumerate(run("work.sharded", 2, tmp_path)):
        same(found["figures"], expected)
        np.testing.assert_allclose(found["map"], resonance, 1e-12)
        torch.testing.assert_close(found["blocks"], blocks, rtol=0, atol=1e-12 * float(blocks.norm()))
        assert torch.equal(found["again"], found["figures"]["one"])
        assert found["kinds"][:2] == ["FSDPSequential", "FSDPLinear"]
        assert all(map(torch.equal, *found["trained"]))  # as a model that nobody has looked at
        assert "StaleError: parameter '0.weight'" in found["stale"]
        later = work.model()
        later.load_state_dict(found["state"])
        H = dh.HessianOperator(later, work.samples(), **given)
        for name in ("refreshed", "anew"):
            same({"one": found[name]}, {"one": H @ work.vectors(H)[:, 0]})
        texts = found["errors"]
        assert "'0.weight' is a DTensor" in texts["alone"] and "full_tensor()" in texts["alone"]
        assert "MemoryBudgetError: gathering 6 tensors" in texts["memory"] and "'2.weight'" in texts["memory"], rank
        assert "OptionError: '0' computes in parallel" in texts["tensors"]
        assert "flat_param' is a part of what FullyShardedDataParallel" in texts["flat"]


def under_torchrun(*words: str) -> str:
    """What two ranks print."""
    script = str(Path(__file__).with_name("command.py"))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *words]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_under_torchrun(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given, file = ["mlp", "--batch", "6", "--image", "2", "--points", "0", "2"], tmp_path / "map.json"
    text = under_torchrun("analyze", *given, "--ranks", "probe", "--json", str(file))
    assert text.count("activation points") == 1  # one process prints
    assert main(["analyze", *given, "--json", "-"]) == 0
    found, expected = (json.loads(text)["metrics"]["resonance"] for text in (file.read_text(), capfd.readouterr().out))
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-5)
    files = [tmp_path / "several", tmp_path / "one"]
    assert under_torchrun("blocks", *given, "--ranks", "data", "--out", str(files[0])).count("written to") == 1
    assert main(["blocks", *given, "--out", str(files[1])]) == 0
    several, one = (dh.BlockMatrix.load(file).to_dense() for file in files)
    torch.testing.assert_close(several, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert main(["analyze", "mlp", "--ranks", "data"]) == 1
    assert "torchrun" in capfd.readouterr().err


def test_a_mesh_needs_a_process_group() -> None:
    with pytest.raises(OptionError, match="init_process_group"):
        dh.HessianOperator(work.model(), work.samples(), loss=F.cross_entropy, mesh="data")


def test_no_group_lives_past_its_end() -> None:
    """gloo's threads abort a process that ends before them; Dynamo would import what keeps a group as a default."""
    code = """if True:
        import sys, tempfile, torch.distributed as dist
        import dag_hesse
        dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
        import torch._dynamo
        group = dist.group.WORLD
        dist.destroy_process_group()
        print(sys.getrefcount(group))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr
