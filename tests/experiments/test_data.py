"""Data in the standard layouts, made here: sizes are checked, and what is missing or wrong is told."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dag_hesse.errors import DatasetError, MissingFileError
from dag_hesse.experiments import cifar
from dag_hesse.experiments.data import CHANNELS, HALVES, augmented, digits, images
from dag_hesse.experiments.exp5 import teacher

COUNT = 20


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of 20 images a file."""
    for name in ("CIFAR10", "CIFAR100"):
        layout = replace(getattr(cifar, name), images={"train": COUNT, "test": COUNT})
        monkeypatch.setattr(cifar, name, layout)
        monkeypatch.setattr(f"dag_hesse.experiments.data.{name}", layout)


def records(labels: int, classes: int, seed: int = 0) -> np.ndarray:
    g = np.random.default_rng(seed)
    label = g.integers(0, classes, (COUNT, labels), dtype=np.uint8)
    return np.concatenate([label, g.integers(0, 256, (COUNT, 3072), dtype=np.uint8)], axis=1)


def binary(folder: Path, layout: cifar.Layout) -> dict[str, np.ndarray]:
    place = folder / layout.binary
    place.mkdir(parents=True)
    made = {}
    for k, name in enumerate(name for split in layout.files.values() for name in split):
        made[name] = records(layout.labels, layout.classes, k)
        made[name].tofile(place / name)
    return made


@pytest.mark.parametrize("inside", [False, True])
def test_binary_cifar10(tmp_path: Path, inside: bool) -> None:
    made = binary(tmp_path, cifar.CIFAR10)
    data = images(tmp_path / cifar.CIFAR10.binary if inside else tmp_path, HALVES)
    assert (data.name, data.classes, len(data.train), len(data.test)) == ("CIFAR-10", 10, 5 * COUNT, COUNT)
    first = made["data_batch_2.bin"][3]
    x, y = data.train.batch(torch.tensor([COUNT + 3]))
    assert int(y) == first[0]
    assert torch.allclose(x[0, 1, 2], torch.tensor(first[1 + 1024 + 64 : 1 + 1024 + 96]).float() / 127.5 - 1, atol=1e-6)


def test_binary_cifar100_has_fine_labels(tmp_path: Path) -> None:
    made = binary(tmp_path, cifar.CIFAR100)
    data = images(tmp_path, HALVES, 100)
    assert (data.name, data.trainable, data.note) == ("CIFAR-100", True, "")
    assert data.test.y.tolist() == made["test.bin"][:, 1].tolist()


@pytest.mark.parametrize("layout", [cifar.CIFAR10, cifar.CIFAR100], ids=lambda layout: layout.name)
def test_pickled_layout(layout: cifar.Layout, tmp_path: Path) -> None:
    place = tmp_path / layout.pickled
    place.mkdir()
    made = {}
    for k, name in enumerate(name for split in layout.files.values() for name in split):
        rows = made[name] = records(layout.labels, layout.classes, k)
        content = {"data": rows[:, layout.labels :], layout.key: rows[:, layout.labels - 1].tolist()}
        (place / name.removesuffix(".bin")).write_bytes(pickle.dumps(content, protocol=2))
    data = images(tmp_path, HALVES, layout.classes)
    test = made[layout.files["test"][0]]
    assert data.test.y.tolist() == test[:, layout.labels - 1].tolist()
    assert torch.equal(data.test.x.view(COUNT, -1), torch.from_numpy(test[:, layout.labels :]))


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps(Harm()), pickle.dumps({"data": 1}), pickle.dumps([1])]
)
def test_pickles_of_other_things(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / cifar.CIFAR10.pickled
    place.mkdir()
    for name in ("test_batch", *(f"data_batch_{k}" for k in range(1, 6))):
        (place / name).write_bytes(content)
    with pytest.raises(DatasetError, match="data_batch_1"):
        images(tmp_path, HALVES)
    assert "must not run" not in capsys.readouterr().out


def test_missing_and_cut_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="is no folder"):
        images(tmp_path / "nowhere", HALVES)
    with pytest.raises(MissingFileError, match="expected cifar-10-batches-bin"):
        images(tmp_path, HALVES)
    with pytest.raises(MissingFileError, match="CIFAR-10 is not in"):
        images(tmp_path, HALVES, 100)
    binary(tmp_path, cifar.CIFAR10)
    broken = tmp_path / cifar.CIFAR10.binary / "data_batch_3.bin"
    content = broken.read_bytes()
    broken.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=f"data_batch_3.bin has {len(content) - 1} bytes"):
        images(tmp_path, HALVES)
    broken.write_bytes(bytes([77]) + content[1:])
    with pytest.raises(DatasetError, match="label 77"):
        images(tmp_path, HALVES)
    broken.unlink()
    with pytest.raises(MissingFileError, match="is missing"):
        images(tmp_path, HALVES)


def test_stand_ins_say_so(tmp_path: Path) -> None:
    data = images(None, HALVES)
    assert "stand-in" in data.note
    assert len(data.train) + len(data.test) == 1797
    assert 0 <= int(data.test.x.min()) < int(data.test.x.max()) == 255
    binary(tmp_path, cifar.CIFAR10)
    labelled = images(tmp_path, HALVES, 100)
    assert not labelled.trainable
    assert "random labels" in labelled.note
    assert int(labelled.train.y.max()) > 9
    assert torch.equal(labelled.train.y, images(tmp_path, HALVES, 100).train.y)
    assert not images(None, HALVES, 100).trainable


def test_digests_tell_data_apart() -> None:
    data = digits(HALVES)
    assert data.digest == digits(HALVES).digest
    other = replace(data, test=replace(data.test, y=data.test.y.flip(0)))
    assert other.digest != data.digest


def test_augmentation_cuts_and_mirrors() -> None:
    x = torch.arange(1, 1 + 3 * 32 * 32, dtype=torch.int32).view(1, 3, 32, 32).expand(200, -1, -1, -1).contiguous()
    made = augmented(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[:1], (4, 4, 4, 4))[0]
    seen = set()
    for one in made:
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(one, _cut(padded, top, left, flip))
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 100
    assert {flip for *_, flip in seen} == {False, True}
    plain = CHANNELS(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None)
    assert torch.allclose(plain[0, 0], torch.full((32, 32), -0.4914 / 0.2470))


def _cut(padded: torch.Tensor, top: int, left: int, flip: bool) -> torch.Tensor:
    found = padded[:, top : top + 32, left : left + 32]
    return found.flip(2) if flip else found


def test_teacher_targets_are_standardized_by_the_training_split() -> None:
    data = teacher()
    assert (tuple(data.train.x.shape), tuple(data.test.x.shape)) == ((2048, 8, 16), (512, 8, 16))
    assert float(data.train.y.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(data.train.y.std()) == pytest.approx(1.0, abs=1e-6)
    assert float(teacher(noise=0.1).train.y.std()) == pytest.approx(1.0, abs=1e-6)
