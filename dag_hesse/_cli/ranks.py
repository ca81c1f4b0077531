"""``--ranks data|probe`` under torchrun: a mesh of all processes, a shard of the batch each, and one that writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree

from dag_hesse._capture.batch import is_one, one_batch
from dag_hesse.errors import OptionError
from dag_hesse.ranks import AXES


@dataclass(frozen=True)
class Group:
    """The processes; ``mesh`` is None where there is one."""

    mesh: Any = None
    axis: str | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes files and prints."""
        return self.mesh is None or dist.get_rank() == 0

    def shard(self, batch: Any) -> Any:
        """This process's samples.

        Raises:
            OptionError: there are several batches.
        """
        if self.axis != "data":
            return batch
        if not is_one(batch):
            raise OptionError("--ranks data divides one batch; a SPEC that gives several has its own shards in Python.")
        size, mine = one_batch(batch).size, slice(dist.get_rank(), None, dist.get_world_size())

        def part(x: Any) -> Any:
            return x[mine] if isinstance(x, Tensor) and x.ndim and len(x) == size else x

        return pytree.tree_map(part, batch)


def add_ranks(parser: Any) -> None:
    """The option."""
    parser.add_argument(
        "--ranks", choices=AXES, help="under torchrun: divide the batch's samples, or the probes, among the processes"
    )


@contextmanager
def working(axis: str | None, device: str) -> Iterator[Group]:
    """Meet the other processes, if they are asked for.

    Raises:
        OptionError: this is not run by torchrun.
    """
    if axis is None:
        yield Group()
        return
    if "WORLD_SIZE" not in os.environ:
        raise OptionError(
            f"--ranks is for torchrun: torchrun --nproc-per-node 2 -m dag_hesse analyze SPEC --ranks {axis}"
        )
    kind = device.partition(":")[0]
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Group(init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=(axis,)), axis)
    finally:
        dist.destroy_process_group()


__all__ = ["Group", "add_ranks", "working"]
