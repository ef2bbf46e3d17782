"""Made speech: a program of its own, recordings as promised."""

import importlib.util
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torchaudio
from herdkit.data.synthetic import speech
from herdkit.data.synthetic.espeak import Espeak, EspeakError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra herdkit[synthesis]"
)


@pytest.fixture(scope="module")
def espeak():
    with Espeak() as program:
        yield program


def test_the_gpl_library_is_never_in_this_process(espeak):
    espeak.speak("hello", "en-us")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "espeak" not in maps.read_text()


def test_a_missing_wheel_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EspeakError, match=r'pip install "herdkit\[synthesis\]"'):
        Espeak()


@pytest.mark.parametrize("voice", ["xx", "en-us+nobody"])
def test_an_unknown_voice_is_an_error_and_the_next_word_is_still_spoken(espeak, voice):
    with pytest.raises(EspeakError, match=voice.replace("+", r"\+")):
        espeak.speak("hello", voice)
    assert len(espeak.speak("hello", "en-us")[0]) > 5000


def test_all_voices_exist_and_sound_different(espeak):
    spoken = [espeak.speak("the red star", voice.name)[0] for voice in (*speech.TRAINING_VOICES, speech.HELD_OUT_VOICE)]
    assert len(spoken) >= 17
    assert len({samples.tobytes() for samples in spoken}) == len(spoken)


def test_the_held_out_voice_is_in_no_training_voice():
    variant = speech.HELD_OUT_VOICE.name.partition("+")[2]
    assert variant
    assert all(voice.name.partition("+")[2] != variant for voice in speech.TRAINING_VOICES)


def test_speed_and_pitch_are_heard(espeak):
    slow, rate = espeak.speak("what colour is the star", "en-us", 120)
    fast, _ = espeak.speak("what colour is the star", "en-us", 220)
    assert len(slow) > 1.4 * len(fast)

    def pitch(setting):
        """Of the loudest 60 ms, by the echo of its part below 900 Hz."""
        samples, _ = espeak.speak("are you on", "en-us+m1", 150, setting)
        spectrum = np.fft.rfft(samples)
        spectrum[int(900 * len(samples) / rate) :] = 0
        low = np.fft.irfft(spectrum, len(samples))
        length = int(0.06 * rate)
        start = max(range(0, len(low) - length, 200), key=lambda i: (low[i : i + length] ** 2).sum())
        stretch = low[start : start + length]
        echo = np.correlate(stretch, stretch, "full")[length - 1 :]
        return rate / (rate // 300 + echo[rate // 300 : rate // 55].argmax())

    assert pitch(80) > 1.15 * pitch(20)


def test_the_same_history_gives_the_same_samples():
    said = ["one plus two", "where is the heart", "one plus two"]
    runs = []
    for _ in range(2):
        with Espeak() as program:
            runs.append([program.speak(text, "en-us+f2")[0].tobytes() for text in said])
    assert runs[0] == runs[1]


def test_resampling_agrees_with_torchaudio():
    rng = np.random.default_rng(0)
    window = np.hanning(22050)
    samples = (window * rng.standard_normal(22050)).astype(np.float32)
    ours = speech.resample(samples, 22050)
    theirs = torchaudio.functional.resample(torch.from_numpy(samples), 22050, 16000, lowpass_filter_width=128).numpy()
    n = min(len(ours), len(theirs))

    def below(signal, hertz):  # the two differ in how sharply they cut near 8 kHz
        spectrum = np.fft.rfft(signal[:n])
        spectrum[int(hertz * n / 16000) :] = 0
        return np.fft.irfft(spectrum, n)

    assert np.abs(below(ours, 7000) - below(theirs, 7000)).max() < 2e-3
    tone = np.sin(2 * np.pi * 1000 * np.arange(22050) / 22050) * window
    assert np.abs(np.fft.rfft(speech.resample(tone, 22050)[:16000])).argmax() == 1000


def test_recordings_keep_length_level_margins_and_noise(espeak):
    rng = Random(0)
    voices = Counter()
    levels, snrs = [], []
    for _ in range(60):
        text = rng.choice(
            ["two plus two", "what colour is the star", "the red circle moves right then the heart moves up"]
        )
        samples, voice = speech.speak(espeak, text, speech.TRAINING_VOICES, rng)
        voices[voice] += 1
        assert samples.dtype == np.float32
        assert np.abs(samples).max() < 1
        assert 1.0 <= len(samples) / 16000 < 4.0
        frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)
        loudness = 10 * np.log10((frames**2).mean(1) + 1e-12)
        levels.append(10 * np.log10(np.mean(samples**2)))
        snrs.append(np.percentile(loudness, 90) - loudness[:5].mean())  # the first 50 ms hold noise alone
    assert len(voices) > 15
    assert min(levels) > -34
    assert max(levels) < -14
    assert np.ptp(levels) > 8
    assert np.percentile(snrs, 5) > 8
    assert np.percentile(snrs, 95) < 38
    assert np.ptp(snrs) > 12


def test_nobody_speaks_faster_than_can_be_spelled(espeak):
    text = "the green square goes from the middle right to the middle left"
    rng = Random(0)
    for _ in range(25):
        samples, _ = speech.speak(espeak, text, speech.TRAINING_VOICES, rng)
        silence = 0.12  # at least
        assert len(samples) / 16000 - silence >= len(text) / speech.MAX_LETTERS_PER_SECOND
    assert len(samples) / 16000 < 4
