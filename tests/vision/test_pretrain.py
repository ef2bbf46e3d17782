"""The pairs of contrastive pre-training: captions and bad samples."""

import io

import numpy as np
import pytest
from herdkit.data.media import MediaError
from herdkit.data.shards import Sample
from herdkit.text.tokenizer import Tokenizer
from herdkit.vision.pairs import PairCollator
from herdkit.vision.tiles import ImagePreparation
from PIL import Image


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red circle and a blue square"] * 20, 540)


def sample(i: int, **changes) -> Sample:
    pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Sample(f"{i:03d}", "made.tar", {"png": buffer.getvalue(), "txt": b"a red circle"} | changes)


def collator(tokenizer, max_length: int | None = 8) -> PairCollator:
    return PairCollator(tokenizer, ImagePreparation(tile_size=32, max_tiles=1), max_length)


def test_captions_end_with_the_end_token_even_when_cut(tokenizer):
    batch = collator(tokenizer)([(0, sample(0)), (1, sample(1, txt=b"a red circle and a blue square " * 5))])
    assert batch["lengths"].tolist() == [batch["tokens"][0].tolist().index(tokenizer.eos_id) + 1, 8]
    assert batch["tokens"][1, -1] == tokenizer.eos_id
    long = collator(tokenizer, None)([(0, sample(0, txt=b"a red circle and a blue square " * 5))])
    assert long["lengths"].item() > 8


def test_samples_without_an_image_or_with_a_broken_one_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"made\.tar: sample 007 has none of png"):
        collator(tokenizer)([(0, Sample("007", "made.tar", {"txt": b"a"}))])
    with pytest.raises(MediaError):
        collator(tokenizer)([(0, sample(1, png=b"not a picture"))])
