import io
import math
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from herdkit.data import contact_sheet
from herdkit.data.contact_sheet import audio_sheet, film_strip, fitted, image_sheet, shortened, spectrogram, video_sheet
from herdkit.data.shards import Sample
from PIL import Image

COLOURS = [(200, 30, 30), (30, 160, 40), (40, 60, 220), (240, 200, 20), (150, 30, 170), (20, 180, 190), (250, 130, 20)]


def png(size, colour):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def box_of(pixels, colour):
    """Left, top, right and bottom of the pixels of this very colour."""
    rows, columns = np.nonzero((pixels == colour).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def area(pixels, colour):
    return int((pixels == colour).all(axis=-1).sum())


def test_images_stand_in_reading_order_whole_and_in_proportion():
    sizes = [(300, 300), (100, 50), (20, 80), (1000, 200), (64, 64), (3, 3), (33, 44)]
    samples = [
        Sample(f"{i:03d}", "x.tar", {"png": png(size, colour), "txt": b"words " * i})
        for i, (size, colour) in enumerate(zip(sizes, COLOURS, strict=True))
    ]
    pixels = np.asarray(image_sheet(samples, side=120, columns=3))
    boxes = [box_of(pixels, colour) for colour in COLOURS]
    for (width, height), box, colour in zip(sizes, boxes, COLOURS, strict=True):
        shown = (box[2] - box[0], box[3] - box[1])
        assert area(pixels, colour) == shown[0] * shown[1]  # a whole rectangle, nothing drawn over it
        assert max(shown) <= 118
        assert abs(shown[0] / shown[1] - width / height) < 0.05 * width / height
        assert max(shown) > 59  # small ones are enlarged
    rows = [boxes[0:3], boxes[3:6], boxes[6:]]
    for row in rows:
        assert len({box[3] for box in row}) == 1  # on one line
        assert all(one[2] < other[0] for one, other in pairwise(row))
    assert all(max(b[3] for b in one) < min(b[1] for b in other) for one, other in pairwise(rows))
    assert len({row[0][0] for row in rows}) == 1  # in columns
    # Words stand below each picture, between its row and the next, and start at its left side.
    for left, _, right, bottom in boxes:
        words = pixels[bottom + 2 : bottom + 50, left:right]
        assert (words.sum(axis=-1) < 300).any()


def test_a_picture_is_the_picture():
    content = np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3) * 2654435761 >> 8
    content = content.astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(content).save(file, "PNG")
    made = np.asarray(image_sheet([Sample("a", "x", {"png": file.getvalue()})], side=130))
    twice = content.repeat(2, axis=0).repeat(2, axis=1)
    found = [
        (top, left)
        for top in range(made.shape[0] - 96)
        for left in range(40)
        if (made[top, left : left + 8] == twice[0, :8]).all()
        and (made[top : top + 96, left : left + 128] == twice).all()
    ]
    assert len(found) == 1


def test_damaged_images_have_a_place_and_a_reason():
    good = png((40, 40), COLOURS[0])
    samples = [Sample("a", "x", {"png": good[:-30]}), Sample("b", "x", {"png": good, "txt": b"\xff"})]
    pixels = np.asarray(image_sheet(samples, side=100))
    left, *_ = box_of(pixels, COLOURS[0])
    assert left > 110
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)
    assert red[:, :110].any()
    assert image_sheet([Sample("a", "x", {"txt": b"x"})]) is None
    assert image_sheet([Sample("a", "x", {"png": good[:9]})]) is not None


def test_a_film_strip_has_the_frames_of_the_clip_in_order(video):
    clip = video("mp4", frames=32, size=(64, 48), rate=8)  # frame i is grey of 8 * i, its top left quarter red
    strip = np.asarray(film_strip(clip, side=66, frames=4)).astype(int)
    step = 64 + 2 + 4
    greys = [strip[40, 60 + n * step].mean() for n in range(4)]
    assert greys == pytest.approx([8 * 4, 8 * 12, 8 * 20, 8 * 28], abs=6)  # those at the centres of quarters
    for n in range(4):
        red = strip[10, 10 + n * step]
        assert red[0] > 200
        assert red[1:].max() < 60
    assert (strip[:, 67:69] == 255).all()


def test_video_sheet(video):
    content = video("webm", "libvpx", frames=16, size=(64, 48), rate=8)
    samples = [Sample("a", "x", {"webm": content, "txt": b"words"}), Sample("b", "x", {"webm": content[:100]})]
    pixels = np.asarray(video_sheet(samples, side=66)).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:] < 60).all(axis=-1)
    columns = np.nonzero(red[:60].any(axis=0))[0]
    runs = np.split(columns, np.nonzero(np.diff(columns) > 8)[0] + 1)
    assert len(runs) == 8
    assert video_sheet([Sample("a", "x", {"png": b""})]) is None


def wav(samples, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def tone(hertz, seconds):
    return 0.5 * np.sin(2 * math.pi * hertz * np.arange(round(seconds * 16_000)) / 16_000)


def test_a_spectrogram_shows_when_which_tone_sounds():
    sound = np.concatenate([tone(500, 0.5), np.zeros(8000), tone(4000, 1.0)])
    height, scale = 120, 100
    picture = np.asarray(spectrogram(torch.tensor(sound, dtype=torch.float32), scale, height, 960)).astype(int).sum(-1)
    bands = picture[:height, 36 : 36 + 200]

    def mel(hertz):
        return 2595 * math.log10(1 + hertz / 700)

    for start, stop, hertz in [(5, 45, 500), (105, 195, 4000)]:
        brightest = bands[:, start:stop].mean(axis=1).argmax()
        assert abs(brightest - height * (1 - mel(hertz) / mel(8000))) <= 3
    assert bands[:, 55:95].max() < 40  # silence is black
    assert picture.shape[1] == 36 + 200 + 24


def test_sounds_share_a_scale_of_time():
    samples = [
        Sample("a", "x", {"wav": wav(tone(440, 1.0))}),
        Sample("b", "x", {"wav": wav(tone(440, 2.0)), "txt": b"words"}),
        Sample("c", "x", {"wav": wav(tone(440, 2.0))[:100]}),
    ]
    pixels = np.asarray(audio_sheet(samples, width=500)).astype(int)
    dark = (pixels.sum(axis=-1) < 60).sum(axis=1)
    rows = np.nonzero(dark > 60)[0]
    one, other = (dark[group].max() for group in np.split(rows, np.nonzero(np.diff(rows) > 45)[0] + 1))
    assert 2 * one == pytest.approx(other, rel=0.05)
    assert audio_sheet([Sample("a", "x", {"txt": b"x"})]) is None


def test_long_sounds_are_cut():
    sound = torch.from_numpy(tone(440, 100).astype(np.float32))
    assert spectrogram(sound, 24, 100, 960).width == 960


def test_silence_and_very_short_sounds():
    for samples in [torch.zeros(16_000), torch.zeros(1), torch.full((300,), 0.5)]:
        assert spectrogram(samples, 100, 80, 960).height == 98


@pytest.mark.parametrize(
    ("size", "shown"), [((10, 20), (50, 100)), ((99, 99), (99, 99)), ((400, 100), (100, 25)), ((5000, 1), (100, 1))]
)
def test_fitted(size, shown):
    assert fitted(Image.new("RGB", size), (100, 100)).size == shown


def test_shortened():
    font = contact_sheet._font(12)
    text = "a rather long key with / folders / 000017"
    for width in range(20, 300, 7):
        for keep_end in (True, False):
            short = shortened(text, font, width, keep_end)
            assert font.getlength(short) <= width
            kept = short.strip("…")
            assert text.endswith(kept) if keep_end else text.startswith(kept)
    assert shortened(text, font, 1000) == text
