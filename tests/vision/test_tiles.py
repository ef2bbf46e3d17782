"""Tiles against the release's processor in transformers, and what a preparation promises its adapter."""

import io
import pickle
import random
import time

import numpy as np
import pytest
import torch
from herdkit.adapters.contract import Preparation
from herdkit.data.media import Clip, MediaError
from herdkit.vision.encoder import CLIP_MEAN, CLIP_STD, VisionTransformer, preset
from herdkit.vision.tiles import ImagePreparation, VideoPreparation, arrange, canvas_numbers, canvases
from PIL import Image
from transformers.models.mllama.image_processing_mllama import (
    MllamaImageProcessor,
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_known_arrangements():
    """Width x height to (ratio id, tiles), tile 28: hand-checked values of the release."""
    known = {
        (28, 28): (1, 1),
        (30, 28): (2, 2),
        (28, 30): (5, 2),
        (57, 28): (3, 3),
        (28, 57): (7, 3),
        (29, 29): (6, 4),
        (100, 30): (4, 4),
        (30, 200): (8, 4),
        (300, 200): (6, 4),
    }
    for (width, height), (ratio, tiles) in known.items():
        plan = arrange(height, width, 28, 4)
        assert canvases(4).index((plan.rows, plan.columns)) + 1 == ratio
        assert plan.rows * plan.columns == tiles


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 7, 12])
def test_canvases_are_numbered_as_in_the_release(max_tiles):
    grids = torch.tensor(get_all_supported_aspect_ratios(max_tiles))
    order = torch.randperm(len(grids), generator=torch.Generator().manual_seed(0)).view(1, -1)
    assert torch.equal(canvas_numbers(*grids[order].unbind(-1), max_tiles), order + 1)


@pytest.mark.parametrize(("max_tiles", "side"), [(1, 28), (4, 28), (4, 560), (6, 28)])
def test_arrangement_is_the_release_rule(max_tiles, side):
    assert canvases(max_tiles) == get_all_supported_aspect_ratios(max_tiles)
    sizes = random.Random(0)
    most = 14 * side
    cases = [(sizes.randint(1, most), sizes.randint(1, most)) for _ in range(4000)]
    cases += [(1, most), (most, 1), (2, 393), (393, 2), (side, side), (2 * side, 2 * side), (1, 1)]
    for height, width in cases:
        canvas = get_optimal_tiled_canvas(height, width, max_tiles, side)
        fitted = get_image_size_fit_to_canvas(height, width, *canvas, side)
        plan = arrange(height, width, side, max_tiles)
        assert (plan.rows * side, plan.columns * side) == tuple(canvas), (height, width)
        assert (plan.height, plan.width) == tuple(fitted), (height, width)


def test_pixels_are_those_of_the_release():
    processor = MllamaImageProcessorPil(
        size={"height": 28, "width": 28}, max_image_tiles=4, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    sizes = [(28, 28), (64, 64), (100, 30), (3, 90), (13, 9), (56, 28), (400, 300), (393, 2), (84, 28)]
    pictures = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    theirs = processor([[p] for p in pictures], return_tensors="pt")
    prepare = ImagePreparation(tile_size=28)
    ours = prepare(pictures)
    pixels = VisionTransformer(preset("tiny", image_size=28, patch_size=7)).normalise(ours["tiles"])
    for i in range(len(sizes)):
        count = int(ours["n_tiles"][i])
        assert count == theirs["num_tiles"][i][0]
        assert int(theirs["aspect_ratio_ids"][i, 0]) == canvases(4).index(tuple(ours["grid"][i].tolist())) + 1
        torch.testing.assert_close(pixels[i, :count], theirs["pixel_values"][i, 0, :count], rtol=0, atol=2e-6)
        assert not ours["tiles"][i, count:].any()


@pytest.mark.parametrize(("kind", "levels"), [(MllamaImageProcessorPil, 0), (MllamaImageProcessor, 1)])
def test_random_pictures_are_those_of_the_release(kind, levels):
    """Canvas, padding, ids and masks equal; pixels within a level of 255 of torch's resampling, equal to Pillow's."""
    processor = kind(size={"height": 28, "width": 28}, max_image_tiles=4, do_normalize=False, do_rescale=False)
    sizes = random.Random(1)
    pictures = [picture(sizes.randint(1, 200), sizes.randint(1, 200), seed=i) for i in range(300)]
    theirs = processor([[p] for p in pictures], return_tensors="pt")
    ours = ImagePreparation(tile_size=28)(pictures)
    ids = torch.tensor([canvases(4).index(tuple(grid)) + 1 for grid in ours["grid"].tolist()])
    assert torch.equal(theirs["aspect_ratio_ids"][:, 0], ids)
    assert torch.equal(theirs["aspect_ratio_mask"][:, 0].bool(), torch.arange(4) < ours["n_tiles"][:, None])
    assert [count for (count,) in theirs["num_tiles"]] == ours["n_tiles"].tolist()
    difference = (theirs["pixel_values"][:, 0].round().int() - ours["tiles"].int()).abs()
    assert difference.max() <= levels
    assert not theirs["pixel_values"][:, 0][torch.arange(4) >= ours["n_tiles"][:, None]].any()


def test_a_picture_of_the_tiles_size_is_not_resampled():
    image = picture(56, 28)
    out = ImagePreparation(tile_size=28)([image])
    exact = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(out["tiles"][0, 0], exact[:, :, :28])
    assert torch.equal(out["tiles"][0, 1], exact[:, :, 28:])
    assert out["grid"].tolist() == [[1, 2]]


def test_a_batch_is_padded_to_its_own_largest_picture():
    prepare = ImagePreparation(tile_size=28)
    assert prepare([picture(28, 28), picture(20, 28)])["tiles"].shape == (2, 1, 3, 28, 28)
    assert prepare([picture(28, 28), picture(56, 28)])["tiles"].shape == (2, 2, 3, 28, 28)
    alone = prepare([picture(20, 28)])["tiles"]
    assert torch.equal(prepare([picture(56, 28), picture(20, 28)])["tiles"][1, :1], alone[0])


def test_preparations_keep_the_contract(tmp_path):
    image = picture(64, 64)
    image.save(tmp_path / "picture.png")
    (tmp_path / "bad.png").write_text("this is no picture")
    for prepare in (ImagePreparation(tile_size=28), VideoPreparation(frames=2, tile_size=28)):
        assert isinstance(prepare, Preparation)
        assert pickle.loads(pickle.dumps(prepare)) == prepare
        with pytest.raises(MediaError, match=r"bad\.png"):
            prepare.load(tmp_path / "bad.png")
    prepare = ImagePreparation(tile_size=28)
    loaded = prepare.load(tmp_path / "picture.png")
    assert prepare.positions(loaded) == 1
    assert torch.equal(prepare([loaded])["tiles"], prepare([image])["tiles"])
    with pytest.raises(ValueError, match="0 x 5"):
        arrange(5, 0, 28, 4)


def test_sizes_are_numbers_of_tiles_found_without_decoding():
    prepare = ImagePreparation(tile_size=28)
    for height, width in ((20, 20), (28, 100), (100, 28), (60, 60), (90, 30)):
        image = Image.new("RGB", (width, height))
        file = io.BytesIO()
        image.save(file, "png")
        tiles = prepare([image])["n_tiles"].item()
        assert prepare.size(file.getvalue()) == prepare.size(image) == tiles
    assert VideoPreparation(frames=3, tile_size=28, max_tiles=4).size(b"any clip") == 12


def test_frames_are_cut_like_pictures():
    """A frame of the right size takes the same tiles as the picture; others are resampled by torch, which rounds
    differently from Pillow by at most two of 255."""
    for size, limit in (((56, 28), 0), ((100, 64), 2), ((13, 9), 2)):
        image = picture(*size)
        frame = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        clip = Clip(torch.stack([frame, frame.flip(0)]), torch.tensor([0.0, 1.0]))
        video = VideoPreparation(frames=2, tile_size=28, max_tiles=4)([clip])
        still = ImagePreparation(tile_size=28)([image])
        assert video["tiles"].shape[:2] == (1, 2)
        assert torch.equal(video["grid"], still["grid"])
        assert torch.equal(video["n_tiles"], still["n_tiles"])
        assert (video["tiles"][:, 0].int() - still["tiles"].int()).abs().max() <= limit
        assert torch.equal(video["tiles"][:, 1], video["tiles"][:, 0].flip(2))


def test_clips_of_other_lengths_are_refused_and_sizes_may_differ():
    prepare = VideoPreparation(frames=3, tile_size=28, max_tiles=4)
    wide = Clip(torch.zeros(3, 3, 28, 84, dtype=torch.uint8), torch.arange(3.0))
    small = Clip(torch.full((3, 3, 20, 20), 9, dtype=torch.uint8), torch.arange(3.0))
    out = prepare([wide, small])
    assert out["tiles"].shape == (2, 3, 3, 3, 28, 28)
    assert out["n_tiles"].tolist() == [3, 1]
    assert not out["tiles"][1, :, 1:].any()
    with pytest.raises(ValueError, match="2 frames"):
        prepare([Clip(wide.frames[:2], wide.times[:2])])


def test_a_small_picture_takes_well_under_a_millisecond():
    prepare = ImagePreparation(tile_size=64)
    images = [picture(64, 64, seed=i) for i in range(32)]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        prepare(images)
        best = min(best, (time.perf_counter() - start) / len(images))
    assert best < 0.3e-3
