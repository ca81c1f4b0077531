"""The demo, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dag_hesse import errors
from dag_hesse.cli import main
from dag_hesse.monitor import demo


@pytest.mark.parametrize("model", demo.MODELS)
@pytest.mark.parametrize("optimizer", demo.OPTIMIZERS)
def test_models_and_optimizers(model: str, optimizer: str, tmp_path: Path) -> None:
    monitor = demo.run(model, optimizer, 0.3, 2, None, tmp_path / "a.png", quiet=True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not monitor.failures
    assert ("preconditioned" in monitor.quantities) == (optimizer == "adam")
    assert len(monitor.history["curvature/stability"]) >= 1 or optimizer == "adam"


def test_what_is_no_budget_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor-demo", "--budget", "much", "--out", str(tmp_path / "a.png")]) == 1
    assert "budget='much'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(errors.OptionError, match="budget"):
        demo.run("mlp", "sgd", 1.0, 1, "0%", tmp_path / "a.png")
