"""A pairwise cover of a test's axes: where each case is slow, and faults come from one setting or from two together."""

import itertools
from collections.abc import Callable, Iterable, Sequence


def pairwise(
    axes: Sequence[Sequence],
    allowed: Callable[[tuple], bool] = lambda row: True,
    given: Iterable[tuple] = (),
) -> list[tuple]:
    """Rows, one value of each axis, such that every two values of different axes stand together in some row.

    An axis may itself be a product: pairwise([list(product(backends, dtypes)), a, b]) has every backend with every
    dtype and each value of a, and every value of a with each of b. Triples are not promised. The rows follow from the
    arguments alone (greedily, first come first), so that processes that collect the same test agree.

    Args:
        axes: the values of each, told apart by their index, so they need not be hashable.
        allowed: whether a row can be. A pair that no row holds with this is left out; finding that takes all rows, so
            such axes have to be short.
        given: rows that there are already; they are not repeated in what is returned.
    """
    indices = [range(len(axis)) for axis in axes]

    def values(row: tuple) -> tuple:
        return tuple(axis[i] for axis, i in zip(axes, row, strict=True))

    def pairs(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    rows = [row for row in itertools.product(*indices) if allowed(values(row))]
    missing = set().union(*map(pairs, rows))
    for row in given:
        missing -= pairs(tuple(list(axis).index(value) for axis, value in zip(axes, row, strict=True)))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))  # the first of the best
        missing -= pairs(best)
        chosen.append(values(best))
    return chosen
