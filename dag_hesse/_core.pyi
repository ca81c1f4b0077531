from numpy import int64, uint8
from numpy.typing import NDArray

def reach(
    nodes: int,
    inputs: NDArray[int64],
    children: NDArray[int64],
    sites: NDArray[int64],
    points: NDArray[int64],
    count: int,
) -> NDArray[uint8]: ...
def meetings(reached: NDArray[uint8], left: NDArray[int64], right: NDArray[int64]) -> NDArray[uint8]: ...
def min_cut(
    inputs: NDArray[int64],
    children: NDArray[int64],
    capacity: NDArray[int64],
    sites: NDArray[int64],
    sinks: NDArray[int64],
) -> int: ...
def transpose(
    source: int, target: int, matrices: int, rows: int, columns: int, itemsize: int, threads: int
) -> None: ...

class Program:
    """A program: (name, slots, number) a row."""

    def __init__(
        self, rows: list[tuple[str, list[int], float]], operands: int, per_row: list[bool], registers: int
    ) -> None: ...
    def run(
        self,
        is_double: bool,
        sizes: list[int],
        operands: list[tuple[int, list[int]]],
        results: list[int],
        threads: int,
        row: int,
    ) -> None: ...
