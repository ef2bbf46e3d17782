"""Updates whose loss or gradient norm stands out from those before."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence

from .config import SpikePolicy

NORMAL = 1.4826  # standard deviations of a normal distribution in its median distance from the median
LEAST_SCALE = 0.01  # of the median


class Spikes:
    """The losses and gradient norms of the last updates made, and whether another stands out from them.

    Args:
        recent: (mean loss, gradient norm) of each.
    """

    def __init__(self, policy: SpikePolicy, recent: Iterable[Sequence[float]] = ()):
        self.policy = policy
        self.recent = deque((tuple(pair) for pair in recent), maxlen=policy.window)

    def reason(self, loss: float, norm: float) -> str | None:
        """Says how far an update stands out, see `SpikePolicy`; one that does not is remembered."""
        if len(self.recent) >= self.policy.least:
            losses, norms = zip(*self.recent, strict=True)
            for name, value, before in (("loss", loss, losses), ("gradient norm", norm, norms)):
                median = statistics.median(before)
                distance = statistics.median(abs(other - median) for other in before)
                scale = max(NORMAL * distance, LEAST_SCALE * abs(median))
                if value > median + self.policy.threshold * scale:
                    return f"the {name} is {value:.4g}, after a median of {median:.4g} ± {scale:.2g}"
        self.recent.append((loss, norm))
        return None
