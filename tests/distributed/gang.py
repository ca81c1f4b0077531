"""Processes that wait for what they are to do as ranks: to start one takes longer than most of that."""

from __future__ import annotations

import importlib
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from tests.distributed import work

_PATIENCE = 300.0  # seconds that a rank may take


class Gang:
    """As many processes as were ever needed at once."""

    def __init__(self) -> None:
        self._members: list[tuple[Any, Connection]] = []

    def run(self, what: str, ranks: int, folder: Path) -> list[Any]:
        """What each of the ranks found."""
        while len(self._members) < ranks:
            self._members.append(_member())
        at_work = self._members[:ranks]
        for rank, (_, pipe) in enumerate(at_work):
            pipe.send((rank, ranks, str(folder), what))
        faults = [pipe.recv() if pipe.poll(_PATIENCE) else "no answer" for _, pipe in at_work]
        if any(faults):
            self.end()
        assert not any(faults), "\n".join(faults)
        return [torch.load(folder / str(rank), weights_only=False) for rank in range(ranks)]

    def end(self) -> None:
        """Of all processes."""
        for process, _ in self._members:
            process.kill()
            process.join()
        self._members.clear()


def _member() -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    return process, mine


def _serve(pipe: Connection) -> None:
    importlib.import_module("torch._dynamo")  # before there is a process group, which it would keep
    while True:
        given = pipe.recv()
        try:
            work.enter(*given)
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())
