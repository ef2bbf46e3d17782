"""What the loop and a stage say to each other: the objective, the loader and the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

Metrics = Mapping[str, tuple[Tensor | float, Tensor | float]]
"""Name to (sum, count). Sums and counts are added over micro-batches, processes and the updates between two
lines of the log; what is logged is sum / count. A name may be absent where a batch has nothing to say on it.
"""

Outcome = tuple[Tensor, Tensor | int, Metrics]
"""Of a batch: the loss sum, the number of targets, and the metrics; see `Objective`."""


class Objective(Protocol):
    """What a stage optimises: a plain function.

    It returns the *sum* of the losses of the batch's targets and the number of targets, never a mean: the
    trainer divides the gradients by the number of targets of the whole update, so that any split of the same
    samples into micro-batches, processes or packed rows gives the same update.
    """

    def __call__(self, model: Any, batch: Any, /) -> Outcome:
        """Runs under autocast (the backward pass does not).

        Returns:
            The loss sum (scalar, float32 or float64; without a gradient where the batch touches no trained
            parameter), the number of targets (0 is fine), and metrics, detached.
        """
        ...


class Loader(Protocol):
    """A stream of micro-batches that can be put back in place.

    It goes on for as long as the run, or ends on every process after the same number of micro-batches. In the last of
    them a process for which no sample is left gets None: it takes part in the update with no loss and no targets. An
    objective that speaks to other processes by itself cannot do that; its loader drops an incomplete last step.

    A loader that leaves out bad samples keeps them in a list `bad`, as dataclasses, and their number in the whole run
    in `bad_count`; the trainer adds those of other processes to its `bad_elsewhere`. `faults`, dataclasses as well, are
    what is damaged in its shards.

    `state_dict` describes what was consumed (not what was fetched ahead), the same on every process, in plain
    JSON values; after `load_state_dict` of it a new iterator yields the batches that follow.
    """

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def move(batch: Any, device: torch.device) -> Any:
    """The batch on a device: anything with `.to(device)`, and dicts, lists and tuples of such; other values
    (strings, numbers) stay as they are."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [move(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
