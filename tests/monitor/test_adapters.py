"""Adapters within the real libraries: numbers arrive, training is as without them, checkpoints go on."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse.monitor import hugging_face, tensorboard
from dag_hesse.monitor import lightning as for_lightning
from tests.monitor.common import data, matrix, net, top, truth

F32 = torch.float32


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(F32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(folder: Path, *callbacks: Any, steps: int = 6, resume: Any = None, **options: Any) -> tuple[Lit, pl.Trainer]:
    torch.manual_seed(0)
    model, loader = Lit(), DataLoader(TensorDataset(*data(24, F32)), batch_size=3)
    logger = CSVLogger(folder, flush_logs_every_n_steps=1)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        logger=logger,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    torch.manual_seed(1)
    trainer.fit(model, loader, ckpt_path=resume)
    return model, trainer


@pytest.mark.parametrize("submodule", ["", "net"])
def test_lightning(submodule: str, tmp_path: Path) -> None:
    alone, _ = fit(tmp_path / "alone", accumulate_grad_batches=2, enable_checkpointing=False)
    callback = for_lightning.MonitorCallback(data(9, F32), submodule=submodule, every=3)
    model, trainer = fit(tmp_path / "own", callback, accumulate_grad_batches=2, enable_checkpointing=False)
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), model.state_dict().values(), strict=True))
    monitor = callback.monitor
    assert monitor is not None and not monitor.failures
    assert [step for step, _ in monitor.history["curvature/sharpness"]] == [0, 3, 6]
    names = [name for name, _ in model.net.named_parameters()]
    expected = top(matrix(truth(model.net, data(9, F32)), names).double())
    assert math.isclose(monitor.history["curvature/sharpness"][-1][1], expected, rel_tol=1e-4)
    assert float(trainer.callback_metrics["curvature/sharpness"]) == pytest.approx(expected, rel=1e-4)
    with open(Path(trainer.logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["curvature/stability"] or row["curvature/sharpness"]]
    assert [int(row["step"]) for row in rows] == [0, 3, 6]
    assert float(rows[-1]["curvature/update"]) == pytest.approx(monitor.history["curvature/update"][-1][1])


def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        kept = pl.callbacks.ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
        return [for_lightning.MonitorCallback(data(9, F32), every=2, submodule="net"), kept]

    whole = callbacks()
    fit(tmp_path / "whole", *whole, steps=8)
    (checkpoint,) = (tmp_path / "kept").glob("*step=4.ckpt")
    resumed = callbacks()
    fit(tmp_path / "resumed", *resumed, steps=8, resume=checkpoint)
    steps = [step for step, _ in resumed[0].monitor.history["curvature/loss"]]
    assert steps == [step for step, _ in whole[0].monitor.history["curvature/loss"]] == [1, 2, 4, 6, 8]
    assert resumed[0].monitor.history["curvature/loss"][:3] == whole[0].monitor.history["curvature/loss"][:3]


def test_lightning_refuses_before_training(tmp_path: Path) -> None:
    for callback, error in (
        (for_lightning.MonitorCallback(data(9, F32), optimizer=1), errors.OptionError),
        (for_lightning.MonitorCallback(data(9, F32), points=["nothing"]), errors.PointError),
    ):
        with pytest.raises(error):
            fit(tmp_path, callback)
    with pytest.raises(errors.OptionError, match="optimizer=-1"):
        for_lightning.MonitorCallback(data(9), optimizer=-1)
    assert for_lightning.MonitorCallback(data(9)).state_dict() == {}


IDS = torch.arange(64 * 8).reshape(64, 8) * 7 % 50


class Heard(TrainerCallback):
    """What others that the trainer reports to are given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        self.logs.append(dict(logs))


def trainer(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=8))
    rows = [{"input_ids": x, "labels": x} for x in IDS]
    settings = {"per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 2, "save_steps": 4} | options
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **settings)
    return Trainer(model, arguments, train_dataset=rows)


def watched(folder: Path, **options: Any) -> tuple[Trainer, hugging_face.MonitorCallback, Heard]:
    own, heard = trainer(folder, **options), Heard()
    callback = hugging_face.MonitorCallback(own, {"input_ids": IDS[:6], "labels": IDS[:6]}, every=4)
    own.add_callback(callback)
    own.add_callback(heard)
    return own, callback, heard


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_hugging_face(options: dict[str, Any], tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone", **options)
    alone.train()
    own, callback, heard = watched(tmp_path / "own", **options)
    own.train()
    pairs = zip(alone.model.state_dict().values(), own.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    monitor = callback.monitor
    assert monitor is not None and not monitor.failures and monitor.quantities[3:5] == ("preconditioned", "stability")
    for logs in (own.state.log_history, heard.logs):
        assert [entry["curvature/sharpness"] for entry in logs if "curvature/sharpness" in entry] == [
            value for _, value in monitor.history["curvature/sharpness"]
        ]
    assert [e["step"] for e in own.state.log_history if "curvature/sharpness" in e] == [1, 4, 8]
    assert [e["step"] for e in own.state.log_history if "loss" in e] == [2, 4, 6, 8]  # the trainer's own are all there
    plain = GPT2LMHeadModel(own.model.config)
    plain.load_state_dict(own.model.state_dict())
    again = dh.Monitor(plain.train(), {"input_ids": IDS[:6], "labels": IDS[:6]}, quantities=["sharpness"]).step(0)
    expected = again["curvature/sharpness"]
    assert monitor.history["curvature/sharpness"][-1][1] == pytest.approx(expected, rel=1e-4)  # float32, bf16 or not


def test_hugging_face_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    own, whole, _ = watched(tmp_path)
    own.train()
    assert (tmp_path / "checkpoint-4" / hugging_face.FILE).exists()
    own, resumed, _ = watched(tmp_path)
    own.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    series, other = (callback.monitor.history["curvature/loss"] for callback in (resumed, whole))
    assert [step for step, _ in series] == [1, 4, 8] and series[:2] == other[:2]


def test_tensorboard(tmp_path: Path) -> None:
    model, batch = net(), data()
    monitor = dh.Monitor(model, batch, every=2, quantities=["loss", "sharpness"])
    given = SummaryWriter(str(tmp_path / "given"))
    for place, target in ((tmp_path / "own", tmp_path / "own"), (tmp_path / "given", given)):
        with tensorboard.MonitorWriter(monitor, target) as writer:
            found = {step: metrics for step in range(10, 14) if (metrics := writer.step(step))}
        events = EventAccumulator(str(place)).Reload()
        assert set(events.Tags()["scalars"]) == set(next(iter(found.values())))
        scalars = events.Scalars("curvature/sharpness")
        assert [event.step for event in scalars] == list(found)
        assert scalars[-1].value == pytest.approx(list(found.values())[-1]["curvature/sharpness"])
    with pytest.raises(errors.OptionError, match="SummaryWriter"):
        tensorboard.MonitorWriter(monitor, 3)


@pytest.mark.parametrize(
    "module, hidden, message",
    [
        ("lightning", ("lightning.pytorch", "pytorch_lightning"), "pip install lightning"),
        ("hugging_face", ("transformers",), "pip install 'transformers"),
    ],
)
def test_what_is_missing_is_named(module: str, hidden: tuple[str, ...], message: str, monkeypatch: Any) -> None:
    name = f"dag_hesse.monitor.{module}"
    before = sys.modules.pop(name)
    for library in hidden:
        monkeypatch.setitem(sys.modules, library, None)
    try:
        with pytest.raises(errors.DependencyError, match=message):
            importlib.import_module(name)
    finally:
        sys.modules[name] = before
        setattr(dh.monitor, module, before)


def test_tensorboard_that_is_missing_is_named(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monitor = dh.Monitor(nn.Linear(4, 3), data(dtype=F32), quantities=["loss"])
    with pytest.raises(errors.DependencyError, match="pip install tensorboard"):
        tensorboard.MonitorWriter(monitor, tmp_path)


def test_the_other_package_of_lightning_will_do(monkeypatch: Any) -> None:
    name = "dag_hesse.monitor.lightning"
    before = sys.modules.pop(name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    try:
        import pytorch_lightning

        found = importlib.import_module(name)
        assert issubclass(found.MonitorCallback, pytorch_lightning.Callback)
    finally:
        sys.modules[name] = before
        dh.monitor.lightning = before
