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
