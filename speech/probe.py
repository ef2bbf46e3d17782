"""What a speech encoder has learned without words: it is frozen, and a linear layer tells from each of its frames which
letter is being said.

Which letter that is comes from the alignment of a model that was trained with CTC. Compare an encoder with the random
weights that it began as: those do not fail altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import SpeechAdapter
from .alignment import align_tokens
from .conformer import Conformer
from .features import FeatureConfig, log_mel, pad_features

UNLABELLED = -100
_WEIGHT_DECAY, _ITERATIONS = 1e-4, 60


@dataclass
class LabelledUtterance:
    """A recording (samples,) and the byte that is said in each encoder frame (T,) int64, `UNLABELLED` where none is."""

    waveform: Tensor
    labels: Tensor


@torch.no_grad()
def label_frames(adapter: SpeechAdapter, waveform: Tensor, text: str) -> LabelledUtterance:
    """The letters of a transcript at their frames, by the CTC head for bytes of a trained adapter.

    Raises:
        AlignmentError: the transcript has more letters than the recording has frames. ValueError: no CTC head.
    """
    batch = adapter.prepare([waveform])
    encoded, lengths = adapter.encode(batch["features"], batch["frames"])
    labels = torch.full((int(lengths[0]),), UNLABELLED)
    logits = adapter.ctc_logits(encoded)[0, : len(labels)]
    for span in align_tokens(logits, [byte + 1 for byte in text.encode()]):
        labels[span.start : span.end] = span.token - 1
    return LabelledUtterance(waveform, labels)


@torch.no_grad()
def encoder_states(
    encoder: Conformer, waveforms: Sequence[Tensor], features: FeatureConfig, batch_size: int = 32
) -> list[Tensor]:
    """The states (L + 1, T, D) of each recording before the first block and after each."""
    made: list[Tensor] = []
    seen: list[Tensor] = []
    hooks = [
        encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0])),
        *(block.register_forward_hook(lambda *given: seen.append(given[2])) for block in encoder.blocks),
    ]
    try:
        for first in range(0, len(waveforms), batch_size):
            batch = pad_features([log_mel(one, features) for one in waveforms[first : first + batch_size]])
            seen.clear()
            _, lengths = encoder(batch["features"], batch["frames"])
            made += [part.clone() for part in torch.stack(seen).split(lengths.tolist(), dim=1)]
    finally:
        for hook in hooks:
            hook.remove()
    return made


def probe(
    encoder: Conformer,
    train: Sequence[LabelledUtterance],
    held_out: Sequence[LabelledUtterance],
    features: FeatureConfig,
) -> list[float]:
    """The share of the held-out frames whose letter a linear layer tells right from the states before the first block
    and after each, L + 1 numbers; the layer is fitted to the frames of `train`, without chance."""
    was_training = encoder.training
    encoder.eval()
    seen, unseen = (
        torch.cat(encoder_states(encoder, [one.waveform for one in part], features), dim=1)
        for part in (train, held_out)
    )
    encoder.train(was_training)
    said, asked = (torch.cat([one.labels for one in part]) for part in (train, held_out))
    return [
        _accuracy(x[said != UNLABELLED], said[said != UNLABELLED], z[asked != UNLABELLED], asked[asked != UNLABELLED])
        for x, z in zip(seen, unseen, strict=True)
    ]


def _accuracy(x: Tensor, labels: Tensor, held_out: Tensor, expected: Tensor) -> float:
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-5
    x, held_out = (x - mean) / deviation, (held_out - mean) / deviation
    weight = nn.Parameter(x.new_zeros(256, x.shape[1]))
    bias = nn.Parameter(x.new_zeros(256))
    optimizer = torch.optim.LBFGS((weight, bias), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + _WEIGHT_DECAY * weight.square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    with torch.no_grad():
        return (F.linear(held_out, weight, bias).argmax(-1) == expected).float().mean().item()
