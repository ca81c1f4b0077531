"""Where the tests' models, batches and samples lie, set by ``pytest --device``, and the random states they draw from."""

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "cpu"


def random_states() -> list[Tensor]:
    """The generators' states, of the CPU first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if NAME.startswith("cuda") else ())]


def set_random_states(states: Sequence[Tensor]) -> None:
    """Put back what :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(list(states[1:]))
