from numpy import bool_, int64
from numpy.typing import NDArray

def reach(
    count: int,
    source: NDArray[int64],
    target: NDArray[int64],
    members: NDArray[int64],
    groups: NDArray[int64],
    group_count: int,
) -> NDArray[bool_]: ...
def interactions(reached: NDArray[bool_], left: NDArray[int64], right: NDArray[int64]) -> NDArray[bool_]: ...
def min_cut(
    source: NDArray[int64],
    target: NDArray[int64],
    capacity: NDArray[int64],
    starts: NDArray[int64],
    sinks: NDArray[int64],
) -> int: ...

class Program:
    """An elementwise program: (name, slots, number) a row."""

    def __init__(
        self, rows: list[tuple[str, list[int], float]], operands: int, results: int, registers: int
    ) -> None: ...
    def run(
        self,
        is_double: bool,
        sizes: list[int],
        operands: list[tuple[int, list[int]]],
        results: list[int],
        threads: int,
    ) -> None: ...
