"""Stored matrices as files: safetensors for numbers, JSON in the header; no pickle, whole or absent, memory-mapped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dag_hesse.errors import BlockFileError, MissingFileError, OptionError
from dag_hesse.files import check_output, check_path, write_whole
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.storage.build import Built
from dag_hesse.storage.cores import Cores
from dag_hesse.storage.pairs import PairFacts, Storage

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix

FORMAT = "dag-hesse blocks"
VERSION = 1


def save(matrix: BlockMatrix, path: str | Path) -> None:
    """As :meth:`dag_hesse.BlockMatrix.save`."""
    check_output(path)
    stored = {matrix.facts["part"]: matrix, **matrix._parts}
    if any(facts.kind is Storage.LIVE for each in stored.values() for facts in each.pairs.values()):
        raise OptionError("live blocks need the model and are not saved: make the matrix with rest='drop'.")
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    written: dict[int, str] = {}  # parts that are one and the same are written once
    for part, each in stored.items():
        described[part] = _described(each, written.setdefault(id(each.cores), part))
        if written[id(each.cores)] == part:
            tensors |= _tensors(each.cores, part)
    form = matrix.form
    header = {
        "names": form.names,
        "shapes": form.shapes,
        "dtype": _name(form.dtype),
        "dtypes": [_name(x) for x in form.dtypes],
        "part": matrix.facts["part"],
        "parts": described,
    }
    text = {"format": FORMAT, "version": str(VERSION), "matrix": json.dumps(header)}
    write_whole(path, lambda place: save_file(tensors, place, text))


def _described(matrix: BlockMatrix, same: str) -> dict[str, Any]:
    pairs = [[v, w, {**asdict(facts), "kind": facts.kind.value}] for (v, w), facts in matrix.pairs.items()]
    cores = matrix.cores
    stored = [list(pair) for pair in cores.cores]
    based = [v for v, basis in enumerate(cores.bases) if basis is not None]
    return {
        "same": same,
        "dims": cores.dims,
        "groups": cores.groups,
        "bases": based,
        "cores": stored,
        "pairs": pairs,
        "facts": matrix.facts,
    }


def _tensors(cores: Cores, part: str) -> dict[str, Tensor]:
    bases = {f"{part}.basis.{v}": x for v, x in enumerate(cores.bases) if x is not None}
    own = {f"{part}.core.{v}.{w}": x for (v, w), x in cores.cores.items()}
    # Tensors that share memory with others cannot be written, and those of a file that is being replaced may not be.
    return {name: x.contiguous().clone() for name, x in {**bases, **own}.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load(path: str | Path) -> BlockMatrix:
    """As :meth:`dag_hesse.BlockMatrix.load`."""
    check_path(path)
    if not Path(path).exists():
        raise MissingFileError(f"there are no blocks at '{path}': expected a file written by BlockMatrix.save().")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_format(path, header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (mapped, not read)
        return _made(json.loads(header["matrix"]), tensors)
    except BlockFileError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        raise BlockFileError(
            f"'{path}' cannot be read as blocks: expected a whole file written by BlockMatrix.save() ({error})."
        ) from error


def _check_format(path: str | Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise BlockFileError(f"'{path}' has format {header.get('format')!r}; expected {FORMAT!r}.")
    version = header.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise BlockFileError(
            f"'{path}' has version {version or 'none'} of its format and this package reads up to {VERSION}: install a "
            "newer dag-hesse."
        )


def _made(header: dict[str, Any], tensors: dict[str, Tensor]) -> BlockMatrix:
    from dag_hesse.storage.matrix import BlockMatrix

    form = VectorForm(
        tuple(header["names"]),
        tuple(map(tuple, header["shapes"])),
        getattr(torch, header["dtype"]),
        torch.device("cpu"),
        tuple(getattr(torch, x) for x in header["dtypes"]),
    )
    known: dict[str, Cores] = {}  # parts that were one and the same are so again
    built = {part: _built(described, tensors, known) for part, described in header["parts"].items()}
    others = {part: BlockMatrix(form, each) for part, each in built.items() if part != header["part"]}
    return BlockMatrix(form, built[header["part"]], parts=others)


def _check_shapes(cores: Cores) -> None:
    """Raise ValueError where numbers do not fit together."""
    for v, basis in enumerate(cores.bases):
        if basis is not None and basis.shape[:2] != (cores.groups, cores.dims[v]):
            raise ValueError(f"basis {v} has shape {tuple(basis.shape)}")
    for (v, w), core in cores.cores.items():
        if core.shape != (cores.groups, cores.rank(v), cores.rank(w)):
            raise ValueError(f"core {v}, {w} has shape {tuple(core.shape)}")


def _built(described: dict[str, Any], tensors: dict[str, Tensor], known: dict[str, Cores]) -> Built:
    part, based = described["same"], set(described["bases"])
    bases = [tensors[f"{part}.basis.{v}"] if v in based else None for v in range(len(described["dims"]))]
    cores = {(v, w): tensors[f"{part}.core.{v}.{w}"] for v, w in described["cores"]}
    numbers = known.setdefault(part, Cores(described["dims"], described["groups"], bases, cores))
    _check_shapes(numbers)
    pairs = {(v, w): PairFacts(**{**facts, "kind": Storage(facts["kind"])}) for v, w, facts in described["pairs"]}
    facts = {**described["facts"], "history": [tuple(x) for x in described["facts"].get("history", ())]}
    return Built(numbers, pairs, facts)
