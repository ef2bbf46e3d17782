"""Images with their captions, as batches of contrastive training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.shards import Sample
from ..text.tokenizer import Tokenizer
from .tiles import ImagePreparation

IMAGE_MEMBERS = ("png", "jpg", "jpeg", "webp")


def encode_captions(
    tokenizer: Tokenizer, captions: Sequence[str], max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Captions to tokens (N, T) int64, each with the end of the text after it, and lengths (N,) int64. What is longer
    than `max_length` is cut as CLIP does: the last token, which the tower reads, is always the end of the text."""
    rows = []
    for caption in captions:
        tokens = tokenizer.encode(caption)
        if max_length is not None:
            tokens = tokens[: max_length - 1]
        rows.append(torch.tensor([*tokens, tokenizer.eos_id]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def image_of(sample: Sample) -> bytes:
    """The member of a sample that is an image.

    Raises:
        ValueError: it has none; names it.
    """
    member = next((name for name in IMAGE_MEMBERS if name in sample.members), None)
    if member is None:
        raise ValueError(f"{sample.shard}: sample {sample.key} has none of {', '.join(IMAGE_MEMBERS)}")
    return sample.members[member]


class PairCollator:
    """Samples with an image and a `txt` member to the batch of `ContrastiveModel`; captions of more than
    `max_length` tokens are cut."""

    def __init__(self, tokenizer: Tokenizer, prepare: ImagePreparation, max_length: int | None = None):
        self.tokenizer = tokenizer
        self.prepare = prepare
        self.max_length = max_length

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: a sample has no image; MediaError: it does not decode.
        """
        images = [self.prepare.load(image_of(sample)) for _, sample in samples]
        captions = [sample.text("txt") for _, sample in samples]
        tokens, lengths = encode_captions(self.tokenizer, captions, self.max_length)
        return {**self.prepare(images), "tokens": tokens, "lengths": lengths}
