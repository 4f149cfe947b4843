"""What one process has counted since the deployment began: increments of a flat array of float64. Pure.

Nothing here is durable: `metrics.files.store` commits it. Every value that would make a counter fall, or a sum
meaningless, is refused with TallyError, and the caller's bulkhead counts that.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Final

from metrics.layout import Histogram, Layout

_INF: Final = float("inf")


class TallyError(ValueError):
    """A value that no metric can take; the text shows it."""


class Tally:
    """The working array of one process. One writer."""

    __slots__ = ("cells", "layout")

    def __init__(self, layout: Layout, cells: array[float] | None = None) -> None:
        """A new tally, or one that goes on from `cells`."""
        self.layout = layout
        self.cells = cells if cells is not None else array("d", bytes(8 * layout.num_cells))
        assert self.cells.typecode == "d"
        assert len(self.cells) == layout.num_cells
        self.reset_gauges()

    def inc(self, cell: int, amount: float = 1.0) -> None:
        """Add to a counter. Raises TallyError for a negative or not finite amount."""
        if not 0.0 <= amount < _INF:
            raise TallyError(f"a counter cannot grow by {amount!r}")
        self.cells[cell] += amount

    def set(self, cell: int, value: float) -> None:
        """Set a gauge. Raises TallyError for a value that is not finite."""
        if not -_INF < value < _INF:
            raise TallyError(f"a gauge cannot be {value!r}")
        self.cells[cell] = value

    def observe(self, histogram: Histogram, value: float, count: int = 1) -> None:
        """Observe a value `count` times. Raises TallyError for a negative or not finite value and a negative count."""
        if not (0.0 <= value < _INF and count >= 0):
            raise TallyError(f"a histogram cannot observe {value!r}, {count!r} times")
        offset, bounds = histogram
        cells = self.cells
        cells[offset + bisect_left(bounds, value)] += count
        cells[offset + len(bounds) + 1] += value * count

    def reset_gauges(self) -> None:
        """Gauges as a new incarnation finds them; counters and histograms stay."""
        for cell, value in self.layout.initial_gauges():
            self.cells[cell] = value


class GaugesOnly(Tally):
    """The tally of a deployment without statistics: gauges, which routing needs, and nothing else."""

    __slots__ = ()

    def inc(self, cell: int, amount: float = 1.0) -> None:
        """Counts nothing: there are no statistics."""

    def observe(self, histogram: Histogram, value: float, count: int = 1) -> None:
        """Observes nothing: there are no statistics."""
