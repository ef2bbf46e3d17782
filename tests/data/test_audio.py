import contextlib
import io
import struct

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from herdkit.data.media import MediaError, audio_length, load_audio


def tone(rate, seconds=1.0, frequency=440.0, channels=1, amplitude=0.5):
    """(samples, channels); every channel has another amplitude."""
    wave = np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)
    return np.stack([amplitude * wave / (channel + 1) for channel in range(channels)], 1).astype(np.float32)


def encoded(samples, rate, format="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def correlation(a, b):
    """The best over small shifts: lossy codecs add some delay."""
    length = min(len(a), len(b)) - 4000
    b = b[2000 : 2000 + length]
    shifts = [a[2000 + shift : 2000 + shift + length] for shift in range(-1200, 1200, 3)]
    return max(float(torch.dot(s, b) / (s.norm() * b.norm())) for s in shifts)


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 3e-2),
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 5e-2),
        ("MP3", "MPEG_LAYER_III", 5e-2),
    ],
)
def test_sound_files(format, subtype, tolerance):
    samples = tone(16_000)
    loaded = load_audio(encoded(samples, 16_000, format, subtype))
    assert (loaded.dtype, loaded.shape) == (torch.float32, (16_000,))
    assert np.abs(loaded.numpy() - samples[:, 0])[500:-500].max() <= tolerance


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_resampling_is_torchaudios(rate):
    samples = tone(rate, 0.3)
    loaded = load_audio(encoded(samples, rate, subtype="FLOAT"))
    wave = torch.from_numpy(samples[:, 0])
    assert torch.equal(loaded, torchaudio.transforms.Resample(rate, 16_000)(wave))
    # The function makes its filter in float32, the transform in float64.
    assert torch.allclose(loaded, torchaudio.functional.resample(wave, rate, 16_000), atol=1e-4)


def test_other_target_rates():
    samples = tone(44_100, 0.3)
    for target in [8_000, 22_050, 44_100, 48_000]:
        loaded = load_audio(encoded(samples, 44_100, subtype="FLOAT"), target)
        oracle = torchaudio.transforms.Resample(44_100, target)(torch.from_numpy(samples[:, 0]))
        assert torch.equal(loaded, oracle)
    with pytest.raises(ValueError, match="sample_rate"):
        load_audio(encoded(samples, 44_100), 0)


@pytest.mark.parametrize("rate", [7_993, 8_000, 11_025, 16_000, 22_050, 44_100, 47_999, 96_000])
@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_lengths_without_decoding_are_those_of_decoding(rate, format):
    if format == "MP3" and rate not in (8_000, 11_025, 16_000, 22_050, 44_100):
        rate = 48_000
    for seconds in (0.5, 0.7001):
        content = encoded(tone(rate, seconds), rate, format)
        for target in (16_000, 22_050):
            assert audio_length(content, target) == len(load_audio(content, target))


def test_lengths_of_containers_and_of_bad_files(audio):
    content = audio("m4a", tone(24_000).T, 24_000, "aac")
    assert audio_length(content) == len(load_audio(content))
    whole = encoded(tone(16_000), 16_000, "FLAC")
    assert audio_length(whole[:5000]) == 16_000, "damage behind the header goes unseen"
    for bad in (b"", whole[:30], b"text" * 100):
        with pytest.raises(MediaError) as caught:
            audio_length(bad)
        assert caught.value.source is bad


@pytest.mark.parametrize("rate", [47_999, 44_101, 15_991, 7_993])
def test_odd_rates_cost_no_huge_filter(rate):
    samples = tone(rate, 0.5)
    loaded = load_audio(encoded(samples, rate, subtype="FLOAT"))
    assert len(loaded) == pytest.approx(8_000, rel=1e-3)
    assert correlation(loaded, torch.from_numpy(tone(16_000, 0.5)[:, 0])) > 0.99


@pytest.mark.parametrize("channels", range(1, 7))
def test_channels_are_averaged(channels):
    samples = tone(16_000, 0.2, channels=channels)
    loaded = load_audio(encoded(samples, 16_000, subtype="FLOAT"))
    assert np.allclose(loaded.numpy(), samples.mean(1), atol=1e-7)


def test_long_sound_is_read_in_blocks_without_seams():
    samples = np.random.default_rng(0).uniform(-1, 1, (700_001, 2)).astype(np.float32)
    assert np.allclose(load_audio(encoded(samples, 16_000, subtype="FLOAT")).numpy(), samples.mean(1), atol=1e-7)


@pytest.mark.parametrize(
    ("ending", "codec", "rate", "layout", "channels"),
    [
        ("m4a", "aac", 16_000, "mono", 1),
        ("m4a", "aac", 44_100, "stereo", 2),
        ("mp4", "aac", 48_000, "mono", 1),
        ("webm", "libopus", 48_000, "stereo", 2),
        ("mka", "flac", 16_000, "mono", 1),
        ("mov", "pcm_s16le", 8_000, "mono", 1),
    ],
)
def test_containers_that_libsndfile_does_not_read(audio, ending, codec, rate, layout, channels):
    samples = tone(rate, channels=channels)
    if codec in ("flac", "pcm_s16le"):
        data = audio(ending, np.round(samples.T * 32767).astype(np.float32) / 32768, rate, codec, layout)
    else:
        data = audio(ending, samples.T, rate, codec, layout)
    loaded = load_audio(data)
    assert loaded.dtype == torch.float32
    assert abs(len(loaded) - 16_000) <= 2500
    right = torch.from_numpy(tone(16_000)[:, 0]) * sum(1 / (c + 1) for c in range(channels)) / channels
    assert correlation(loaded, right) > 0.99
    assert float(loaded[3000:12_000].norm() / right[3000:12_000].norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("container", "sound"), [("mp4", "aac"), ("mkv", "libopus"), ("mov", "pcm_s16le")])
def test_sound_of_a_video(video, container, sound):
    loaded = load_audio(video(container, frames=10, sound=sound))
    assert correlation(loaded, torch.from_numpy(tone(16_000)[:, 0])) > 0.99


def reason(source):
    with pytest.raises(MediaError) as caught:
        load_audio(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_holds_no_sound_is_a_named_error(video, tmp_path):
    assert "has no sound track" in reason(video("mp4", frames=3))
    assert "holds no samples" in reason(encoded(np.zeros((0, 1), np.float32), 16_000))
    for value in [np.nan, np.inf]:
        samples = tone(16_000, 0.1)
        samples[100] = value
        assert "not finite" in reason(encoded(samples, 16_000, subtype="FLOAT"))
    text = tmp_path / "note.wav"
    text.write_text("plain text, no sound\n" * 100)
    assert reason(text).startswith(f"{text}: ")
    raw = tmp_path / "sound.raw"
    raw.write_bytes(tone(16_000).tobytes())
    assert reason(raw).startswith(f"{raw}: ")
    assert reason(tmp_path / "none.wav").endswith("cannot open: No such file or directory")
    assert "directory" in reason(tmp_path)
    assert "is empty" in reason(b"")


@pytest.mark.parametrize("rate", [1, 900_000])
def test_unlikely_sample_rates_are_refused(rate):
    data = bytearray(encoded(tone(16_000, 0.1), 16_000))
    data[24:28] = struct.pack("<I", rate)
    assert f"sample rate of {rate} Hz" in reason(data)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("AIFF", "PCM_16"), ("MP3", "MPEG_LAYER_III")],
)
def test_truncated_sound_files(format, subtype, part):
    data = encoded(tone(16_000, 2), 16_000, format, subtype)
    reason(data[: int(len(data) * part)])


@pytest.mark.parametrize("part", [0.1, 0.5])
@pytest.mark.parametrize("ending", ["m4a", "mka"])
def test_truncated_containers(audio, ending, part):
    data = audio(ending, tone(16_000, 3).T, 16_000, "aac")
    load_audio(data)
    reason(data[: int(len(data) * part)])


def test_wav_of_a_pipe_has_no_length():
    data = bytearray(encoded(tone(16_000), 16_000))
    for place in (4, 40):
        data[place : place + 4] = b"\xff\xff\xff\xff"
    assert len(load_audio(data)) == 16_000


def test_sources_and_repeatability(tmp_path):
    data = encoded(tone(44_100), 44_100)
    path = tmp_path / "tone.wav"
    path.write_bytes(data)
    misnamed = tmp_path / "tone.raw"
    misnamed.write_bytes(data)
    first = load_audio(data)
    assert not first.requires_grad
    with path.open("rb") as file:
        for source in [path, str(path), misnamed, bytearray(data), io.BytesIO(data), file]:
            assert torch.equal(load_audio(source), first)


def test_damaged_data_never_escapes_as_another_error(audio):
    random = np.random.default_rng(0)
    samples = tone(16_000, 0.3)
    datas = [encoded(samples, 16_000, format) for format in ["WAV", "FLAC", "OGG", "MP3"]]
    datas.append(audio("m4a", samples.T, 16_000))
    for data in datas:
        for _ in range(30):
            broken = np.frombuffer(data, np.uint8).copy()
            broken[random.integers(0, min(len(data), 400), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(MediaError):
                assert torch.isfinite(load_audio(broken.tobytes())).all()
