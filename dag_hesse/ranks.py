"""Processes of ``torch.distributed`` that work on one problem: shards of the batch, or shares of the vectors.

A :class:`~torch.distributed.device_mesh.DeviceMesh` says who: along ``data`` every rank brings other samples, and
products are added up; along ``probe`` every rank sweeps other vectors of the same samples. All ranks make the same
calls.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dag_hesse.alike import content, described, of_modules
from dag_hesse.errors import OptionError, RankError, kind_of

# Its functions take the group of the hour as a default, which then lives past destroy_process_group: gloo's threads
# would meet an interpreter that is being taken down, and abort it. Dynamo imports it at some time; now, it takes none.
if dist.is_available() and not dist.is_initialized():
    importlib.import_module("torch.distributed.nn.functional")

AXES = ("data", "probe")
_HEARD = "_other_ranks_know"  # mark of an error that the other ranks were told of


class Ranks:
    """The ranks that this one works with.

    Args:
        mesh: a DeviceMesh whose axes are called ``"data"`` and ``"probe"``, or one of these.

    Raises:
        OptionError: it is none.
    """

    def __init__(self, mesh: Any) -> None:
        advice = "expected a DeviceMesh: init_device_mesh('cpu', (2,), mesh_dim_names=('data',))."
        if not (dist.is_available() and dist.is_initialized()):
            raise OptionError(
                "mesh= needs torch.distributed's process group: call init_process_group, or use torchrun."
            )
        names = getattr(mesh, "mesh_dim_names", None)
        if not isinstance(mesh, dist.DeviceMesh):
            raise OptionError(f"mesh is {kind_of(mesh)}; {advice}")
        if not names or not set(names) <= set(AXES):
            raise OptionError(f"the mesh's axes are called {names}; expected 'data', 'probe' or both.")
        self.members: set[int] = set(mesh.mesh.flatten().tolist())
        groups = {name: mesh.get_group(name) for name in names}
        self._groups = list(groups.values())
        self.data, self.probe = groups.get("data"), groups.get("probe")

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What fails on one rank fails on all, wherever they are by then.

        Raises:
            RankError: on the others, with what it said there.
        """
        try:
            yield
        except Exception as error:
            if not _heard(error):
                setattr(error, _HEARD, True)
                self._exchanged(what, None, f"{type(error).__name__}: {error}")
            raise
        self.told(what, None)

    def told(self, what: str, mine: Any) -> list[Any]:
        """What every rank of the mesh says, the same list on all.

        Raises:
            RankError: one has failed, makes another call, or does not answer.
        """
        said = self._exchanged(what, mine, None)
        failed = [(rank, doing, error) for rank, doing, error, _ in said if error is not None]
        if failed:
            raise RankError("{1} failed on rank {0}: {2}".format(*failed[0]))
        others = [(rank, doing) for rank, doing, _, _ in said if doing != what]
        if others:
            raise RankError(f"{what} met {others[0][1]} on rank {others[0][0]}: expected the same calls on all ranks.")
        return [item for _, _, _, item in said]

    def _exchanged(self, what: str, mine: Any, error: str | None) -> list[tuple[int, str, str | None, Any]]:
        """(rank, what it does, how that failed, what it says) of all ranks."""
        said = [(dist.get_rank(), what, error, mine)]
        for group in self._groups:
            every: list[Any] = [None] * dist.get_world_size(group)
            try:
                dist.all_gather_object(every, said, group=group)
            except RuntimeError as reason:
                raise RankError(f"a rank does not answer: {reason}") from reason
            said = [item for items in every for item in items]
        return said

    def agree(self, what: str, mine: Mapping[str, Any], beside: Mapping[Any, Mapping[str, Any]] | None = None) -> None:
        """See that all ranks say the same: by every name of ``mine``, and of ``beside`` by what two of them both have.

        Raises:
            RankError: they do not: the first name that differs, and on which rank.
        """
        beside = beside or {}
        short = _short(mine), {key: _short(value) for key, value in beside.items()}
        if not _alike(self.told(what, short)):
            self._tell_apart(what, mine, beside)

    def _tell_apart(self, what: str, mine: Mapping[str, Any], beside: Mapping[Any, Mapping[str, Any]]) -> None:
        """Raise :class:`RankError` for the first name that differs; checksums alone do not say which it is."""
        every = self.told(what, (dist.get_rank(), dict(mine), dict(beside)))
        seen: dict[Any, tuple[int, Mapping[str, Any]]] = {}
        for rank, theirs, more in every:
            for key, found in {None: theirs, **more}.items():
                _check_same(what, seen.setdefault(key, (rank, found)), (rank, found))

    def check_model(
        self, model: nn.Module, mine: Mapping[str, Any], beside: Mapping[Any, Mapping[str, Any]] | None = None
    ) -> None:
        """See that all ranks have the same model, and the same of what else they say as in :meth:`agree`.

        Raises:
            RankError: they do not: what they computed would be of no one model.
            OptionError: BatchNorm normalizes by the statistics of a shard.
        """
        check_norms(model)
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors = {f"'{name}'": content(x) for name, x in held.items()}
        self.agree("the problem", {**mine, **of_modules(model), **tensors}, beside)

    def _that_differ(self, what: str, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of those that ranks have other values of; the same list on all."""
        every = self.told(what, {name: content(x) for name, x in tensors.items()})
        names = sorted(set().union(*every))
        return [name for name in names if len({theirs.get(name) for theirs in every}) > 1]

    def adopt_buffers(self, model: nn.Module, own: dict[str, Tensor]) -> None:
        """Give a model's buffers the first rank's values, as DistributedDataParallel does before a forward.

        What this rank had, of those that differ, is put into ``own`` first: BatchNorm's statistics, say, which every
        rank has of its own samples.
        """
        buffers = dict(model.named_buffers())
        own |= {name: buffers[name].detach().clone() for name in self._that_differ("buffers", buffers)}
        with torch.no_grad():
            for name in own:
                for group in self._groups:
                    x = buffers[name].contiguous()
                    dist.broadcast(x, group=group, group_src=0)
                    buffers[name].copy_(x)

    def least(self, what: str, mine: int) -> int:
        """The smallest of a number that every rank has its own of: room in memory, say."""
        return min(self.told(what, mine))

    def check_loss(self, mine: float) -> None:
        """See that ranks that share the vectors have the same loss, before it is added up over the shards.

        Raises:
            RankError: they do not.
        """
        if self.probe is None:
            return
        number = 0 if self.data is None else dist.get_rank(self.data)
        every = [loss for shard, loss in self.told("a loss", (number, mine)) if shard == number]
        if not all(math.isclose(loss, mine, rel_tol=1e-6) for loss in every):
            raise RankError(
                f"ranks along 'probe' have the losses {every}: expected the same samples on all, and the same random "
                "draws where the model makes some (torch.manual_seed, or model.eval())."
            )

    def of_shards(self, what: str, mine: Any) -> list[Any]:
        """What every shard has, in order; of each, one of those that share it."""
        number, _ = self.place
        said = self.told(what, (number, 0 if self.data is None else dist.get_rank(self.data), mine))
        of_mine = {shard: item for other, shard, item in said if other == number}
        return [of_mine[shard] for shard in sorted(of_mine)]

    def added(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the shards, the same bits on all; one collective a type."""
        if self.data is None:
            return list(tensors)
        found: list[Tensor] = list(tensors)
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            places = [k for k, x in enumerate(tensors) if x.dtype == dtype]
            flat = torch.cat([tensors[k].reshape(-1) for k in places])
            dist.all_reduce(flat, group=self.data)
            for k, piece in zip(places, flat.split([tensors[k].numel() for k in places]), strict=True):
                found[k] = piece.reshape(tensors[k].shape)
        return found

    @property
    def place(self) -> tuple[int, int]:
        """(number, count) of this rank among those that share the vectors."""
        return (0, 1) if self.probe is None else (dist.get_rank(self.probe), dist.get_world_size(self.probe))

    def sent(self, x: Tensor, owner: int) -> None:
        """Put into ``x`` what the ``owner``-th of those that share the vectors has there."""
        if self.probe is not None:
            dist.broadcast(x, group=self.probe, group_src=owner)


def _short(said: Mapping[str, Any]) -> str:
    """A checksum of what a rank says."""
    return hashlib.sha256(repr(list(said.items())).encode()).hexdigest()


def _alike(every: Sequence[tuple[str, Mapping[Any, str]]]) -> bool:
    """Whether checksums are the same on all ranks, and those by a key on all that have it."""
    seen: dict[Any, str] = {}
    return all(seen.setdefault(key, x) == x for own, more in every for key, x in {None: own, **more}.items())


def _check_same(what: str, one: tuple[int, Mapping[str, Any]], other: tuple[int, Mapping[str, Any]]) -> None:
    """Raise :class:`RankError` for the first name by which two ranks do not say the same."""
    (rank, mine), (number, theirs) = one, other
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        here, there = mine.get(name, "missing"), theirs.get(name, "missing")
        if here != there:
            raise RankError(
                f"ranks differ in {what}: {name} is {here} on rank {rank}, and {there} on rank {number}; expected the "
                "same on all ranks."
            )


def _heard(error: BaseException | None) -> bool:
    """Whether all ranks have heard of an error, or of what caused it: then they wait for no other word of it."""
    while error is not None:
        if isinstance(error, RankError) or hasattr(error, _HEARD):
            return True
        error = error.__cause__
    return False


def agree(ranks: Ranks | None, what: str, **options: Any) -> None:
    """See that all ranks, where there are several, have called ``what`` with the same options: they stay in step then.

    Raises:
        RankError: they have not.
    """
    if ranks is not None:
        ranks.agree(what, {f"{name}=": described(value) for name, value in options.items()})


def together(ranks: Ranks | None, what: str) -> AbstractContextManager[None]:
    """:meth:`Ranks.together`, where there are several."""
    return nullcontext() if ranks is None else ranks.together(what)


def whole_model(model: Any) -> Any:
    """What DistributedDataParallel holds.

    Raises:
        OptionError: BatchNorm normalizes by the statistics of a shard, or parameters lie in flat parts.
    """
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    if isinstance(model, nn.Module):
        flat = [name for name, _ in model.named_parameters() if "_flat_param" in name]
        if flat:
            raise OptionError(
                f"'{flat[0]}' is a part of what FullyShardedDataParallel has flattened: shard by fully_shard, or give "
                "a model with whole parameters."
            )
        check_norms(model)
    return model


def check_norms(model: nn.Module) -> None:
    """See that no BatchNorm is in training mode.

    Raises:
        OptionError: one is.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise OptionError(
                f"'{name}' normalizes by the statistics of this rank's samples: the shards' losses do not add up to "
                "the whole's. Call model.eval(), or use one process."
            )


__all__ = ["AXES", "Ranks", "agree", "check_norms", "together", "whole_model"]
