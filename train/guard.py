"""What stops a run or an update: values that are not finite or stand out, and a request to terminate."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .config import SpikePolicy
from .spikes import Spikes


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; no update was made with it."""


class LossSpikeError(RuntimeError):
    """The loss or the gradient norm stands out from those before; no update was made with it."""


class Guard:
    """Decides whether an update is made. It sees values that are already summed over all processes and hence
    equal on each, so that all decide alike without a word more.

    Attributes:
        skipped: updates left out because something was not finite or stood out.
        empty: updates left out because there was no target in any batch of any process.
        last_good: the newest checkpoint, for the message.

    Args:
        state: `state_dict()` of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        non_finite: Literal["stop", "skip"],
        spikes: SpikePolicy | None = None,
        state: dict[str, Any] | None = None,
    ):
        state = state or {}
        self.non_finite = non_finite
        self.skipped: int = state.get("skipped", 0)
        self.empty: int = state.get("empty", 0)
        self.last_good: Path | None = None
        self._spikes = Spikes(spikes or SpikePolicy(), state.get("recent", ()))
        self._in_a_row: int = state.get("spikes_in_a_row", 0)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        state = {"skipped": self.skipped, "empty": self.empty}
        if self._spikes.policy.action == "ignore":
            return state
        return {**state, "recent": [list(pair) for pair in self._spikes.recent], "spikes_in_a_row": self._in_a_row}

    def objection(
        self, step: int, loss: float, count: float, norm: float, gradients: Mapping[str, Tensor]
    ) -> str | None:
        """None if update `step` can be made; else a line that says why it is left out.

        Args:
            loss: the loss sum, count: the number of targets, norm: the global gradient norm.
            gradients: by name, read only to find the culprit.

        Raises:
            NonFiniteError: with non_finite "stop".
            LossSpikeError: with spikes.action "stop", or after spikes.patience skipped in a row.
        """
        if math.isfinite(loss) and count == 0:
            self.empty += 1
            return f"step {step + 1}: no targets in any batch; no update ({self.empty} so far)"
        if math.isfinite(loss) and math.isfinite(norm):
            return self._spike(step, loss / count, norm)
        if math.isfinite(loss):
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            named = f" (first in {', '.join(bad[:3])})" if bad else ""
            reason = f"the gradient norm is {norm}{named}"
        else:
            reason = f"the loss is {loss}"
        if self.non_finite == "stop":
            raise NonFiniteError(
                f"step {step + 1}: {reason}; stopped before the update. Last good checkpoint: "
                f"{self.last_good or 'none yet'}; to leave such updates out, set trainer.non_finite to skip"
            )
        self.skipped += 1
        return f"step {step + 1}: {reason}; update skipped ({self.skipped} so far)"

    def _spike(self, step: int, loss: float, norm: float) -> str | None:
        policy = self._spikes.policy
        reason = None if policy.action == "ignore" else self._spikes.reason(loss, norm)
        if reason is None:
            self._in_a_row = 0
            return None
        good = self.last_good or "none yet"
        stopped = f"step {step + 1}: {reason}; stopped before the update. Last good checkpoint: {good}; "
        if policy.action == "stop":
            raise LossSpikeError(f"{stopped}to go on from there without this update, set trainer.spikes.action to skip")
        self._in_a_row += 1
        if self._in_a_row >= policy.patience:
            raise LossSpikeError(
                f"{stopped}{self._in_a_row} updates in a row stood out, which is no spike: look at the data from step "
                f"{step + 2 - self._in_a_row} on, or set trainer.spikes.action to ignore"
            )
        self.skipped += 1
        return f"step {step + 1}: {reason}; update skipped ({self.skipped} so far)"


class Termination:
    """Whether SIGTERM came."""

    requested = False


@contextmanager
def termination() -> Iterator[Termination]:
    """Turns SIGTERM, with which schedulers announce the end, into a wish that the loop reads between updates.
    Outside the main thread, where Python allows no handlers, the signal keeps its meaning."""
    wish = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def request(*_) -> None:
        wish.requested = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGTERM, before)
