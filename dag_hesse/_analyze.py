"""analyze(): the stages in order."""

from __future__ import annotations

from typing import Any

from torch import nn

from dag_hesse._capture.losses import Loss
from dag_hesse._capture.points import Names
from dag_hesse._capture.reduction import Option
from dag_hesse._mapper import Mapper
from dag_hesse.estimate.run import Progress
from dag_hesse.options import checked_options
from dag_hesse.plan.task import Pairs
from dag_hesse.progress import check_progress
from dag_hesse.report import CurvatureReport
from dag_hesse.report.call import call_text


@checked_options()
def analyze(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names | None = None,
    pairs: Pairs | None = None,
    space: str = "activation",
    batch_mode: str = "shared",
    mode: str = "auto",
    probes: int = 32,
    rtol: float | None = None,
    stable_rank: bool = True,
    reduction: Option = None,
    memory: int | str | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
    verify: str = "gradient",
    compile: bool = False,
    mesh: Any = None,
) -> CurvatureReport:
    """Map the inter-layer Hessian blocks of a model on a batch (paper, Definitions 23 and 24; design §2).

    Args:
        model: any ``nn.Module``; it comes back exactly as it was.
        batch: ``(inputs, targets)``, ``(input, input, …, targets)``, a dict of keyword inputs, or an iterable of these,
            taken as one loss.
        loss: ``callable(output, targets) -> scalar tensor``; None: the model's own, or inferred from the targets.
        output: name of the module or tap that the loss consumes, where it cannot be inferred.
        points: module names, taps, parameter names, or globs over these, in which ``*`` does not cross dots and ``**``
            does; None: at most 16 from the module tree, and what is tapped. A mapping, as
            ``{"stem": ["conv1", "bn1"]}``, makes each group of parameters one point.
        pairs: pairs of points to look at alone, as ``[("layer1", "layer3"), ("layer1", "fc")]``: names, globs or
            positions. Own blocks of points that are named come with them, as coupling needs these; others are NaN
            unless zero by proof. With ``points=None``, the points are those that pairs name.
        space: ``"activation"`` or ``"parameter"``: what module names stand for.
        batch_mode: ``"shared"`` (one perturbation for all samples), ``"per_sample"`` or ``"joint"`` (design §2.3).
        mode: ``"auto"``, ``"exact"``, ``"gram"`` or ``"probes"``.
        probes: Rademacher probes per source point, where probes are used.
        rtol: instead of so many, eight probes a source, doubled until every norm's relative standard error is below
            this: at most 4096 probes, and a warning says where that is not enough.
        stable_rank: False: leave out stable ranks that probes do not give (they are NaN). The spectral norms that they
            need take about half of all sweeps, and more for flat spectra.
        reduction: how the losses of several batches add up: ``"mean"`` over samples, ``"sum"``, a weight per batch, or
            a callable that gives a batch's weight; None: found by evaluating the loss on sub-batches (for a mean,
            a loader that is not held is iterated once more).
        memory: bytes that the call may use beside the model, an integer or a text such as ``"4GiB"``; None: what is
            free. A quarter is for a loader's batches
            (beyond, it is iterated again in every pass), a quarter for linearizations that are kept from pass to pass
            (beyond, they are made anew), and half for sweeps and what they return.
        seed: of the probes. The global RNG is neither read for them nor changed.
        progress: True: a bar on stderr (lines where that is no terminal); False: nothing; None: a bar where stderr is
            a terminal and a stage is foreseen to take more than 3 s; a callable: called with (stage, sweeps done,
            sweeps predicted).
        verify: what the captured graph is compared with before a product is given out: ``"gradient"`` (the model's own
            loss and gradient, at the cost of one gradient), ``"product"`` (one H·v by double-backward as well), or
            ``"none"``.
        compile: whether linearization and sweeps are compiled by TorchInductor first. That takes a minute or more for
            every number of probes that is swept at once, so it pays for large batches and many probes.
        mesh: a ``DeviceMesh`` of ``torch.distributed``. Along its axis ``"data"`` every rank brings other samples, and
            the map is that of all samples; along ``"probe"`` every rank sweeps some of the probes. Every rank makes the
            same calls, and has the same report.

    Returns:
        A :class:`~dag_hesse.CurvatureReport` of n points: n×n maps with methods and standard errors.

    Raises:
        DagHesseError: a subclass says what was received, what was expected and what to do, before heavy work.

    Examples:
        >>> import torch, dag_hesse
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> report = dag_hesse.analyze(model, (torch.randn(10, 8), torch.randint(0, 3, (10,))))
        >>> report.names, report.resonance.shape, bool((report.tensor_norm == 0.0).all())
        (('1', '3'), (2, 2), True)
        >>> batch = torch.randn(10, 8), torch.randint(0, 3, (10,))
        >>> dag_hesse.analyze(model, batch, pairs=[("0", "4")]).names
        ('0', '4')
    """
    given = dict(locals())
    call = call_text(analyze, given)
    check_progress(given.pop("progress"))
    return Mapper(**given).report(progress, call)
