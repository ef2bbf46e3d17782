"""The weights of cross-attention against transformers' mllama, and where they lie on the picture."""

import herdkit
import mllama_models as mllama
import numpy as np
import pytest
import torch
from herdkit.adapters import compose
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.tokenizer import Tokenizer
from herdkit.vision.attention_map import look, overlay, patch_grid, recorded_weights
from herdkit.vision.image_adapter import ImageAdapter, ImageAdapterConfig
from mllama_models import IMAGES, LENGTHS, ROWS, our_logits, picture, their_logits
from PIL import Image


@pytest.fixture(scope="module")
def theirs():
    return mllama.tiny()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    model = herdkit.load(mllama.save_theirs(theirs, tmp_path_factory.mktemp("mllama") / "model"))
    model.tokenizer = Tokenizer.train(["a red circle and a blue square"] * 9, mllama.VOCAB)
    return model


def test_weights_are_those_of_transformers(theirs, ours):
    mllama.by_meta(theirs)
    theirs.set_attn_implementation("eager")
    found: dict[int, torch.Tensor] = {}
    for place, index in ((1, 1), (3, 4)):
        module = theirs.model.language_model.layers[index].cross_attn
        module.register_forward_hook(lambda _, given, out, place=place: found.update({place: out[1]}))
    their_logits(theirs, ROWS, IMAGES)
    with recorded_weights(ours) as weights:
        our_logits(ours, ROWS, IMAGES)
    assert weights.keys() == {1, 3}
    # Our rows of images hold as many tiles as the largest of the batch, all four of theirs here.
    for place, given in weights.items():
        for row, length in enumerate(LENGTHS):
            start = ROWS[row].index(mllama.IMAGE)
            torch.testing.assert_close(
                given[row, :, start:length], found[place][row, :, start:length], rtol=0, atol=1e-5
            )


def dialog(*pictures: Image.Image) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "a red"}]}]


def test_a_map_has_the_patches_that_the_picture_fills(ours):
    wide, small = picture(60, 28, 1), picture(14, 28, 2)
    (first, grid), (second, other) = look(ours, dialog(wide, small), "a circle")
    assert (first.size, second.size) == (wide.size, small.size)
    assert grid.shape == (4, 9)  # three tiles, of which 60 pixels fill 2.14, in patches of 7
    assert other.shape == (4, 2)
    assert 0 < float(grid.sum() + other.sum()) < 1
    assert overlay(small, other).size == (14 * 23, 28 * 23)
    assert np.asarray(overlay(wide, grid)).std() > 0
    with pytest.raises(ValueError, match="no picture"):
        look(ours, [{"role": "user", "content": "a red"}], "a")
    with pytest.raises(ValueError, match="the answer is empty"):
        look(ours, dialog(small), "")


def test_entries_stand_where_their_tiles_do(ours):
    """A weight for one patch of one tile lands at its place on the canvas."""
    square = picture(56, 56, 3)
    weights = torch.zeros(4, 17)
    weights[2, 1 + 6] = 1  # lower left tile, second row of patches, third column
    grid = patch_grid(weights, square, ours.image)
    assert grid.shape == (8, 8)
    assert grid.nonzero().tolist() == [[5, 2]]


TOWERS = {
    "class token": {"type": "timm", "model": "vit_tiny_patch16_224", "options": {"depth": 1}},
    "patches alone": {
        "type": "timm", "model": "vit_tiny_patch16_224",
        "options": {"depth": 1, "class_token": False, "global_pool": "avg"},
    },
    "registers": {"type": "timm", "model": "vit_tiny_patch16_224", "options": {"depth": 1, "reg_tokens": 4}},
}  # fmt: skip


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_others_have_the_same_patches(tower, monkeypatch):
    """Of pictures of three tiles and of one in one batch: 4 x 4 patches of a tile, the last of its tokens."""
    tokenizer = Tokenizer.train(["a red circle and a blue square"] * 9, 540)
    text = TransformerConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=64
    )
    torch.manual_seed(0)
    config = ImageAdapterConfig(encoder=TOWERS[tower] | {"image_size": 64}, n_cross_layers=1)
    model = compose(Transformer(text), tokenizer, image=ImageAdapter(config, text)).eval()
    wide, small = picture(170, 64, 1), picture(30, 64, 2)
    before = look(model, dialog(wide, small), "a circle")
    assert [grid.shape for _, grid in before] == [(4, 11), (4, 2)]
    encode = model.image.forward

    def marked(batch, **required):
        given = encode(batch, **required)
        tiles = given.memory.unflatten(1, (3, -1))
        # The wide one's last tile, second row and third column; the small one's fourth row and second column.
        for number, tile, row, column in ((0, 2, 1, 2), (1, 0, 3, 1)):
            tiles[number, tile, -16 + 4 * row + column] = 5 * torch.randn(
                32, generator=torch.Generator().manual_seed(1)
            )
        return given

    monkeypatch.setattr(model.image, "forward", marked)
    after = look(model, dialog(wide, small), "a circle")
    moved = [(b[1] - a[1]).abs() for a, b in zip(before, after, strict=True)]
    assert [divmod(int(change.argmax()), change.shape[1]) for change in moved] == [(1, 10), (3, 1)]


def test_an_answer_looks_where_memory_changes(ours, monkeypatch):
    """One patch's memory is made another: of all weights, that of this patch moves most."""
    square = picture(28, 28, 4)
    before = look(ours, dialog(square), "a")[0][1].flatten()
    encode = ours.image.forward

    def marked(batch, **required):
        given = encode(batch, **required)
        given.memory[:, 1 + 9] = 5 * torch.randn(64, generator=torch.Generator().manual_seed(1))
        return given

    monkeypatch.setattr(ours.image, "forward", marked)
    after = look(ours, dialog(square), "a")[0][1].flatten()
    assert before.shape == (16,)
    assert (after - before).abs().argmax() == 9
