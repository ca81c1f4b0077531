"""CIFAR-10 and CIFAR-100 as their authors give them out: the binary files, or the pickled ones."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dag_hesse.errors import DatasetError, MissingFileError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Names and sizes of a data set's files.

    Attributes:
        name: of the data set.
        classes: how many there are.
        binary, pickled: names of the folders.
        files: by split, names in the binary layout; the pickled one has them without their ending.
        images: by split, how many images a file has.
        labels: bytes before an image in the binary layout; the last one is the label.
        key: of the labels in the pickled layout.
    """

    name: str
    classes: int
    binary: str
    pickled: str
    files: dict[str, tuple[str, ...]]
    images: dict[str, int]
    labels: int
    key: str

    def inside(self, folder: Path) -> tuple[Path, bool] | None:
        """Where its files are, in the folder or in one of its own name in there, and whether they are pickled."""
        for pickled, name in ((False, self.binary), (True, self.pickled)):
            first = self.files["test"][0]
            for place in (folder / name, folder):
                if (place / (first.removesuffix(".bin") if pickled else first)).is_file():
                    return place, pickled
        return None


_TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
CIFAR10 = Layout(
    "CIFAR-10", 10, "cifar-10-batches-bin", "cifar-10-batches-py",
    {"train": _TRAIN, "test": ("test_batch.bin",)}, {"train": 10000, "test": 10000}, 1, "labels",
)  # fmt: skip
CIFAR100 = Layout(
    "CIFAR-100", 100, "cifar-100-binary", "cifar-100-python",
    {"train": ("train.bin",), "test": ("test.bin",)}, {"train": 50000, "test": 10000}, 2, "fine_labels",
)  # fmt: skip


def read(folder: Path, layout: Layout, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) of bytes and labels (n,) of one split.

    Raises:
        MissingFileError: a file is missing.
        DatasetError: a file has another size or content than it must have.
    """
    place = layout.inside(folder)
    if place is None:
        raise MissingFileError(
            f"{layout.name} is not in {folder}: expected {layout.binary}/{layout.files['test'][0]} or "
            f"{layout.pickled}/{layout.files['test'][0].removesuffix('.bin')}. Without --data, scikit-learn's digits "
            "stand in for it."
        )
    where, pickled = place
    parts = []
    for name in layout.files[split]:
        path = where / (name.removesuffix(".bin") if pickled else name)
        if not path.is_file():
            raise MissingFileError(f"{path} is missing, while other files of {layout.name} are there: unpack it anew.")
        parts.append((_unpickled if pickled else _binary)(path, layout, layout.images[split]))
    pixels, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    if labels.max() >= layout.classes:
        raise DatasetError(f"{where} has label {labels.max()}; {layout.name} has {layout.classes} classes.")
    return torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _binary(path: Path, layout: Layout, count: int) -> Part:
    record = layout.labels + _PIXELS
    if path.stat().st_size != count * record:
        raise DatasetError(f"{path} has {path.stat().st_size} bytes; expected {count} records of {record}.")
    records = np.fromfile(path, dtype=np.uint8).reshape(count, record)
    return records[:, layout.labels :].copy(), records[:, layout.labels - 1].copy()


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of arrays, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if arrays or (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no business in a data set")


def _unpickled(path: Path, layout: Layout, count: int) -> Part:
    try:
        found = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        pixels, labels = np.asarray(found["data"], np.uint8), np.asarray(found[layout.key], np.uint8)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise DatasetError(f"{path} is not a pickled file of {layout.name}: {error}.") from error
    if pixels.shape != (count, _PIXELS) or labels.shape != (count,):
        raise DatasetError(f"{path} has images of {pixels.shape}; expected ({count}, {_PIXELS}) and as many labels.")
    return pixels, labels
