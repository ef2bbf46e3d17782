"""What a speech encoder has learned without words: it is frozen, and a linear layer learns to spell from its frames.

The probe sees a weighted sum of the states after every block, as in SUPERB (arXiv 2105.01051), and is trained with CTC
on the bytes of the transcripts. Compare an encoder with its own random initial weights: those do not fail altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .conformer import Conformer
from .ctc import ctc_loss, greedy_ctc
from .evaluate import Errors, character_errors
from .features import FeatureConfig, log_mel, pad_features


@dataclass(kw_only=True)
class ProbeConfig:
    """
    Args:
        steps, batch_size, lr: of the linear layer's training by Adam.
        seed: of its weights and of the order.
        features: of the encoder.
    """

    steps: int = 400
    batch_size: int = 32
    lr: float = 5e-3
    seed: int = 0
    features: FeatureConfig


@dataclass
class Utterance:
    """States (L + 1, T, D) of a frozen encoder, before its first block and after each, and what is said."""

    states: Tensor
    text: str


class Probe(nn.Module):
    """(N, L + 1, T, D) states to logits (N, T, 257) of bytes, class 0 being the blank."""

    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.mixture = nn.Parameter(torch.zeros(layers))
        self.spell = nn.Linear(dim, 257)

    def forward(self, states: Tensor) -> Tensor:
        return self.spell(torch.einsum("l,nltd->ntd", self.mixture.softmax(0), states))


@torch.no_grad()
def encode_states(
    encoder: Conformer, recordings: Sequence[tuple[Tensor, str]], features: FeatureConfig, batch_size: int = 32
) -> list[Utterance]:
    """Runs a frozen encoder over (waveform, text) pairs."""
    made = []
    seen: list[Tensor] = []
    hooks = [
        encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0])),
        *(block.register_forward_hook(lambda *given: seen.append(given[2])) for block in encoder.blocks),
    ]
    try:
        for first in range(0, len(recordings), batch_size):
            part = recordings[first : first + batch_size]
            batch = pad_features([log_mel(waveform, features) for waveform, _ in part])
            seen.clear()
            _, lengths = encoder(batch["features"], batch["frames"])
            states = torch.stack(seen, dim=1)
            made += [
                Utterance(row[:, :length].clone(), text)
                for row, length, (_, text) in zip(states, lengths.tolist(), part, strict=True)
            ]
    finally:
        for hook in hooks:
            hook.remove()
    return made


def probe(
    encoder: Conformer,
    train: Sequence[tuple[Tensor, str]],
    held_out: Sequence[tuple[Tensor, str]],
    config: ProbeConfig,
) -> Errors:
    """Character errors of a probe of the encoder, trained on `train` and tested on `held_out`.

    Args:
        train, held_out: (waveform (samples,), text) pairs.
    """
    was_training = encoder.training
    encoder.eval()
    seen = encode_states(encoder, train, config.features)
    unseen = encode_states(encoder, held_out, config.features)
    encoder.train(was_training)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Probe(*(seen[0].states.shape[i] for i in (0, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    for _ in range(config.steps):
        chosen = torch.randint(len(seen), (config.batch_size,), generator=generator).tolist()
        states, lengths = _padded([seen[i] for i in chosen])
        said = [torch.tensor([byte + 1 for byte in seen[i].text.encode()]) for i in chosen]
        counts = torch.tensor([len(row) for row in said])
        loss, count = ctc_loss(model(states), lengths, pad_sequence(said, batch_first=True), counts)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        schedule.step()
    heard = []
    with torch.no_grad():
        for first in range(0, len(unseen), config.batch_size):
            states, lengths = _padded(unseen[first : first + config.batch_size])
            rows = greedy_ctc(model(states), lengths)
            heard += [bytes(token - 1 for token in row).decode("utf-8", "replace") for row in rows]
    return character_errors([utterance.text for utterance in unseen], heard)


def _padded(utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
    """States (N, L + 1, T, D), zeros on the right, and lengths (N,)."""
    lengths = torch.tensor([utterance.states.shape[1] for utterance in utterances])
    rows = pad_sequence([utterance.states.transpose(0, 1) for utterance in utterances], batch_first=True)
    return rows.transpose(1, 2), lengths
