import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from herdkit.data import media
from herdkit.data.media import MediaError, image_size, load_image
from PIL import Image


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width, height, bit_depth, colour_type, rows, chunks=()):
    """A PNG written by hand, for what Pillow cannot write or would refuse to."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = b"".join(chunk(kind, content) for kind, content in chunks)
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + data + chunk(b"IEND", b"")


def pixels_of(image):
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def noise(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def flat(mode, colour, **info):
    image = Image.new(mode, (3, 2), colour)
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (flat("1", 1), "PNG", (255, 255, 255)),
        (flat("1", 0), "PNG", (0, 0, 0)),
        (flat("L", 100), "PNG", (100, 100, 100)),
        (flat("RGB", (1, 2, 3)), "PNG", (1, 2, 3)),
        (flat("LA", (100, 0)), "PNG", (255, 255, 255)),
        (flat("LA", (100, 255)), "PNG", (100, 100, 100)),
        (flat("RGBA", (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (flat("RGBA", (200, 0, 100, 51)), "PNG", (244, 204, 224)),  # 0.2 * colour + 0.8 * 255
        (flat("I;16", 0x8080), "PNG", (128, 128, 128)),
        (flat("I;16", 0xFFFF), "PNG", (255, 255, 255)),
        (flat("I;16", 257), "PNG", (1, 1, 1)),
        (flat("I;16B", 0x8080), "TIFF", (128, 128, 128)),
        (flat("I", 0x8080), "TIFF", (128, 128, 128)),
        (flat("CMYK", (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (flat("CMYK", (0, 0, 0, 255)), "TIFF", (0, 0, 0)),
        (flat("RGB", (1, 2, 3)), "BMP", (1, 2, 3)),
        (flat("RGB", (1, 2, 3)), "PPM", (1, 2, 3)),
    ],
    ids=lambda value: f"{value.mode}{value.getpixel((0, 0))}" if isinstance(value, Image.Image) else None,
)
def test_modes_become_rgb(image, format, expected):
    loaded = load_image(encoded(image, format))
    assert (loaded.mode, loaded.size) == ("RGB", (3, 2))
    assert set(pixels_of(loaded)) == {expected}
    assert set(pixels_of(load_image(image))) == {expected}


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert list(pixels_of(load_image(encoded(image)))) == [(10, 20, 30), (200, 100, 50)]
    half = encoded(image, transparency=bytes([0, 255]))
    assert list(pixels_of(load_image(half))) == [(255, 255, 255), (200, 100, 50)]
    assert list(pixels_of(load_image(encoded(image, "GIF", transparency=1)))) == [
        (10, 20, 30),
        (255, 255, 255),
    ]


def test_colour_keys_are_transparent():
    grey = png(2, 1, 8, 0, [bytes([7, 9])], [(b"tRNS", struct.pack(">H", 9))])
    assert list(pixels_of(load_image(grey))) == [(7, 7, 7), (255, 255, 255)]
    rgb = png(2, 1, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], [(b"tRNS", struct.pack(">HHH", 1, 2, 3))])
    assert list(pixels_of(load_image(rgb))) == [(255, 255, 255), (4, 5, 6)]
    deep = png(2, 1, 16, 0, [struct.pack(">HH", 257, 514)], [(b"tRNS", struct.pack(">H", 257))])
    assert list(pixels_of(load_image(deep))) == [(255, 255, 255), (2, 2, 2)]


def test_16_bit_colour():
    loaded = load_image(png(1, 1, 16, 2, [struct.pack(">HHH", 0, 0x8080, 0xFFFF)]))
    assert loaded.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("image", [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 1 << 20)])
def test_values_without_a_fixed_range_are_an_error(image):
    with pytest.raises(MediaError, match="no fixed range"):
        load_image(encoded(image, "TIFF"))


def stored_for(upright, orientation):
    """The pixels as a camera stores them, from the EXIF standard's words: which visual side the 0th row and the
    0th column of the stored picture are."""
    sides = [("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left")]
    sides += [("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom")]
    row, column = sides[orientation - 1]
    stored = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    return stored[:, ::-1] if column in ("bottom", "right") else stored


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, format):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16], upright[16:, :16], upright[:16, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored_for(upright, orientation)))
    lossless = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    loaded = np.asarray(load_image(encoded(image, format, exif=exif, **lossless)), np.int16)
    assert loaded.shape == upright.shape
    assert np.abs(loaded - upright).mean() < (3 if format == "JPEG" else 0.1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"Exif\0\0II*\0\xff\xff\xff\xffrest", b"Exif\0\0"])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_broken_exif_is_as_if_absent(exif, format):
    pixels = noise()
    loaded = load_image(encoded(Image.fromarray(pixels), format, exif=exif, lossless=True))
    assert np.array_equal(np.asarray(loaded), pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_extreme_shapes(size, format):
    loaded = load_image(encoded(Image.new("RGB", size, (255, 255, 255)), format))
    assert loaded.size == size
    assert loaded.getpixel((size[0] - 1, size[1] - 1)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert set(pixels_of(load_image(data))) == {(255, 0, 0)}


def test_huge_images_are_refused_before_they_are_decoded(monkeypatch):
    bomb = png(60_000, 60_000, 8, 2, [b"\0"])
    with pytest.raises(MediaError, match=r"exceeds limit|pixels"):
        load_image(bomb)
    monkeypatch.setattr(media, "MAX_PIXELS", 100)
    with pytest.raises(MediaError, match="32 x 24 pixels"):
        load_image(encoded(Image.fromarray(noise())))
    with pytest.raises(MediaError, match="20 x 10 pixels"):
        load_image(Image.new("RGB", (20, 10)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
def test_truncated_images(format, part):
    data = encoded(Image.fromarray(noise(64, 64)), format)
    with pytest.raises(MediaError):
        load_image(data[: int(len(data) * part)])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_data_never_escapes_as_another_error(monkeypatch):
    monkeypatch.setattr(media, "MAX_PIXELS", 1 << 20)
    random = np.random.default_rng(1)
    for format in ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]:
        data = np.frombuffer(encoded(Image.fromarray(noise(16, 16)), format), np.uint8)
        for _ in range(40):
            broken = data.copy()
            broken[random.integers(0, len(data), 6)] = random.integers(0, 256, 6)
            with contextlib.suppress(MediaError):
                assert load_image(broken.tobytes()).mode == "RGB"


def test_every_kind_of_source(tmp_path):
    pixels = noise()
    data = encoded(Image.fromarray(pixels))
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    moved = io.BytesIO(data)
    moved.seek(100)

    class Pipe(io.RawIOBase):
        def __init__(self):
            self.rest = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.rest.readinto(buffer)

    with path.open("rb") as file:
        for source in [path, str(path), data, bytearray(data), memoryview(data), moved, file, Pipe()]:
            assert np.array_equal(np.asarray(load_image(source)), pixels), source
    misnamed = tmp_path / "picture.jpg"
    misnamed.write_bytes(data)
    assert np.array_equal(np.asarray(load_image(misnamed)), pixels)


def test_an_image_object_stays_as_it_is():
    given = Image.fromarray(noise())
    before = given.tobytes()
    loaded = load_image(given)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert given.tobytes() == before
    opened = Image.open(io.BytesIO(encoded(given)))
    assert np.array_equal(np.asarray(load_image(opened)), noise())


def test_what_is_no_image_is_a_named_error(tmp_path):
    def reason(source):
        with pytest.raises(MediaError) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    text = tmp_path / "note.jpg"
    text.write_text("not a picture\n" * 50)
    assert reason(text) == f"{text}: not an image in a format that is read here"
    assert reason(tmp_path / "missing.png") == f"{tmp_path / 'missing.png'}: cannot open: No such file or directory"
    assert reason(tmp_path) == f"{tmp_path}: is a directory, not a file of image"
    empty = tmp_path / "empty.png"
    empty.touch()
    assert reason(empty) == f"{empty}: is empty"
    assert "is empty" in reason(b"")
    assert "empty path" in reason("")
    assert "cannot open" in reason("a\0b")
    assert "cannot open" in reason("x" * 5000)
    assert "no regular file" in reason("/dev/zero")
    assert "binary mode" in reason(io.StringIO("text"))
    with text.open() as opened_as_text:
        assert "binary mode" in reason(opened_as_text)
    # Pillow would hand PostScript to an interpreter.
    assert "not an image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(TypeError, match="int"):
        load_image(3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(Image.fromarray(noise())))
    path.chmod(0)
    with pytest.raises(MediaError, match="Permission denied"):
        load_image(path)


def test_the_size_of_a_picture_is_read_from_its_header(monkeypatch):
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        content = encoded(Image.fromarray(noise(31, 47)), format)
        assert image_size(content) == (47, 31)
        if format in ("PNG", "JPEG", "BMP"):
            assert image_size(content[: len(content) // 2 + 40]) == (47, 31), "damage behind the header goes unseen"
    for bad in (b"", b"text", png(47, 31, 8, 2, [])[:20]):
        with pytest.raises(MediaError) as caught:
            image_size(bad)
        assert caught.value.source is bad
