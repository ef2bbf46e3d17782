"""BEST-RQ, the self-supervised objective of the speech encoder (section 8.3.1 of "The Llama 3 Herd of
Models", arXiv 2407.21783; arXiv 2202.01855): the encoder sees features with hidden spans and tells, for every
hidden frame, which codes a frozen random quantiser gives the true features.

Letters in shapes: N utterances, F mel frames, C mel bins, T encoder frames, Q codebooks, M hidden encoder
frames of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conformer import Conformer, stack_frames, valid_frames

SCORES_AT_ONCE = 2**25
"""Scores that the search for the nearest codes holds at a time, 256 MiB: memory does not grow with M."""

MAX_FRAMES = 6000
"""Mel frames of a stretch, 60 s (section 8.3.1: 6K)."""


@dataclass(kw_only=True)
class BestRQConfig:
    """The paper's values. Where it is silent (one projection for each codebook, the filler, Xavier
    projections, normal codes) the choice is that of BEST-RQ and of Google USM (arXiv 2303.01037).

    Args:
        n_codebooks: Q.
        n_codes: codes of a codebook.
        code_dim: width of a code.
        mask_probability: that a hidden span starts at a mel frame; spans may overlap, so that far from the
            start of an utterance a share 1 - (1 - mask_probability) ** mask_span is hidden (55.5 %).
        mask_span: mel frames of a span.
        noise_std: hidden frames are replaced by normal noise of this standard deviation.
        seed: of the projections and codes.
    """

    n_codebooks: int = 16
    n_codes: int = 8192
    code_dim: int = 16
    mask_probability: float = 0.025
    mask_span: int = 32
    noise_std: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name in ("n_codebooks", "n_codes", "code_dim", "mask_span"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be above 0 and at most 1, not {self.mask_probability}")


class BestRQ(nn.Module):
    """An encoder with the quantiser and the classifiers ("multi-softmax") that train it.

    Buffers, drawn from `config.seed` and never trained: `projections` (Q, stack * C, code_dim), Xavier
    uniform; `codes` (Q, n_codes, code_dim), normal, of length 1.
    """

    projections: Tensor
    codes: Tensor

    def __init__(self, encoder: Conformer, config: BestRQConfig):
        super().__init__()
        self.encoder, self.config = encoder, config
        width, Q = encoder.config.stack * encoder.config.n_mels, config.n_codebooks
        generator = torch.Generator().manual_seed(config.seed)
        # Named device: the same values also where a module is built under another default device.
        options = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        bound = math.sqrt(6 / (width + config.code_dim))
        projections = (torch.rand(Q, width, config.code_dim, **options) * 2 - 1) * bound
        codes = F.normalize(torch.randn(Q, config.n_codes, config.code_dim, **options), dim=-1)
        self.register_buffer("projections", projections)
        self.register_buffer("codes", codes)
        self.head = nn.Linear(encoder.config.dim, Q * config.n_codes)
        # The encoder's frames have about unit variance: small weights start the loss at ln(n_codes).
        nn.init.normal_(self.head.weight, std=1 / encoder.config.dim)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def quantise(self, stacked: Tensor) -> Tensor:
        """Nearest codes by cosine similarity: stacked frames (M, stack * C) to (M, Q) int64.

        In float64, so that rounding, which follows the shape of a batch, never turns a near tie: the targets
        of a frame do not depend on its batch, its padding or the number of processes.
        """
        with torch.autocast(stacked.device.type, enabled=False):
            projected = torch.matmul(stacked.double(), self.projections.double())  # (Q, M, code_dim)
            codes = self.codes.double().transpose(1, 2)
            rows = max(1, SCORES_AT_ONCE // (codes.shape[0] * codes.shape[2]))
            # The length of the projected frame scales all its scores alike, so only codes need length 1.
            nearest = [torch.bmm(part, codes).argmax(dim=-1) for part in projected.split(rows, dim=1)]
        return torch.cat(nearest, dim=1).transpose(0, 1)

    def forward(
        self, features: Tensor, frames: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, int, dict[str, tuple[Tensor, Tensor | int]]]:
        """Hides spans and scores the predictions at the encoder frames whose mel frames are all hidden.

        Args:
            features: (N, F, C), normalised, padded on the right; frames: (N,) int64.
            generator: for spans and noise, on the features' device; torch's default one if None.

        Returns:
            The cross-entropies summed over hidden frames and codebooks, their number, and metrics as
            (sum, count): `accuracy`; `masked_share`, of the mel frames; `codes_used`, different codes among
            the targets of this batch in each codebook; `code_usage`, that as a share of what as many even draws would
            hit (small: the features are not normalised, or nobody speaks).
        """
        config, encoder = self.config, self.encoder
        size = features.shape[1]
        hidden = span_mask(frames, size, config.mask_probability, config.mask_span, generator)
        noise = torch.empty_like(features).normal_(std=config.noise_std, generator=generator)
        encoded, _ = encoder(torch.where(hidden[..., None], noise, features), frames)

        stacked, lengths = stack_frames(features, frames, encoder.config.stack)
        chosen = fully_hidden(hidden, frames, encoder.config.stack) & valid_frames(lengths, stacked.shape[1])
        targets = self.quantise(stacked[chosen])
        logits = self.head(encoded[chosen]).unflatten(-1, (config.n_codebooks, config.n_codes))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

        used = torch.zeros(config.n_codebooks, config.n_codes, dtype=torch.bool, device=targets.device)
        used[torch.arange(config.n_codebooks, device=targets.device), targets] = True
        metrics: dict[str, tuple[Tensor, Tensor | int]] = {
            "accuracy": ((logits.detach().argmax(dim=-1) == targets).sum(), targets.numel()),
            "masked_share": (hidden.sum(), frames.sum()),
            "codes_used": (used.sum(), config.n_codebooks),
            "code_usage": (used.sum() / max(expected_codes(len(targets), config.n_codes), 1), config.n_codebooks),
        }
        return loss_sum, targets.numel(), metrics


def expected_codes(draws: int, n_codes: int) -> float:
    """How many different codes so many even draws hit on average."""
    return n_codes * -math.expm1(draws * math.log1p(-1 / n_codes)) if n_codes > 1 else min(draws, 1)


def span_mask(
    frames: Tensor, size: int, probability: float, span: int, generator: torch.Generator | None = None
) -> Tensor:
    """(N, size) bool: in each row its own spans of `span` frames, one starting at every frame with
    `probability`, cut at the end of the utterance (`frames`, (N,))."""
    valid = valid_frames(frames, size)
    starts = torch.rand(valid.shape, generator=generator, device=frames.device) < probability
    begun = starts.cumsum(dim=1)
    return (begun > F.pad(begun, (span, 0))[:, :size]) & valid


def fully_hidden(hidden: Tensor, frames: Tensor, stack: int) -> Tensor:
    """(N, T) bool from (N, F): encoder frames of which every mel frame of the utterance is hidden. One that
    shows a part of its frames would give a part of its target away."""
    known = ~hidden & valid_frames(frames, hidden.shape[1])
    known = F.pad(known, (0, -known.shape[1] % stack), value=False)
    return ~known.unflatten(1, (-1, stack)).any(dim=-1)


def random_crop(features: Tensor, max_frames: int = MAX_FRAMES, generator: torch.Generator | None = None) -> Tensor:
    """A random stretch of at most `max_frames` frames of one utterance (F, C)."""
    surplus = features.shape[0] - max_frames
    if surplus <= 0:
        return features
    start = int(torch.randint(surplus + 1, (), generator=generator))
    return features[start : start + max_frames]
