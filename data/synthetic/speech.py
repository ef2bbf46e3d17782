"""Made speech: espeak-ng voices at random speed, pitch, level and noise, 16 kHz mono."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

from .espeak import Espeak

SAMPLE_RATE = 16000
MIN_SECONDS = 1.0
MAX_LETTERS_PER_SECOND = 22
"""Of speech. People stay below it, and a speech encoder of 25 frames a second can still spell what it hears."""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """An espeak-ng voice, and the speeds (words per minute) and pitches (0 to 99) at which it speaks."""

    name: str
    rates: tuple[int, int] = (130, 200)
    pitches: tuple[int, int] = (38, 62)


# Chosen before any model was trained, as an ordinary voice of the same kind as most training voices: a male
# American one of middle pitch. Its variant m3 speaks in no training voice, under no accent.
HELD_OUT_VOICE = Voice(name="en-us+m3")

_AMERICAN = (
    *("m1", "m2", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5"),
    *("Michael", "belinda", "linda", "robert", "travis", "victor", "steph", "shelby"),
)
TRAINING_VOICES = (
    Voice(name="en-us"),
    *(Voice(name=f"en-us+{variant}") for variant in _AMERICAN),
    *(Voice(name=name) for name in ("en-gb-x-rp+m2", "en-gb-x-rp+f3", "en+m5", "en+f4")),
)


def speak(espeak: Espeak, text: str, voices: Sequence[Voice], rng: Random) -> tuple[np.ndarray, str]:
    """One recording of `text` by one of the voices, at most about 3.5 s for a sentence of eleven words.

    Silence of 0.06 to 0.35 s stands before and after, the level of the speech is -30 to -16 dB (RMS), and white
    or pink noise lies 10 to 30 dB below it.

    Returns:
        Samples (samples,) float32 at 16 kHz, and the name of the voice.
    """
    voice = rng.choice(voices)
    words = len(text.split())
    # Long sentences are not spoken slowly: the longest recording sets the cost of a whole batch.
    rate = max(rng.randint(*voice.rates), min(17 * words, voice.rates[1]))
    pitch = rng.randint(*voice.pitches)
    while True:
        spoken, source_rate = espeak.speak(text, voice.name, rate, pitch)
        samples = _trimmed(resample(spoken, source_rate))
        if len(text) <= MAX_LETTERS_PER_SECOND * len(samples) / SAMPLE_RATE:
            break
        rate = round(0.9 * rate)
    return _recorded(samples, rng), voice.name


def resample(samples: np.ndarray, source_rate: int) -> np.ndarray:
    """To 16 kHz by cutting the spectrum: exact for a recording that begins and ends in silence."""
    common = np.gcd(source_rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, source_rate // common
    blocks = 10 * -(-len(samples) // (10 * down))  # lengths without large prime factors are fast
    spectrum = np.fft.rfft(samples, blocks * down)
    return np.fft.irfft(spectrum[: blocks * up // 2 + 1], blocks * up) * (up / down)


def _trimmed(samples: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(samples) > 0.005 * np.abs(samples).max(initial=1e-9))
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


def _recorded(speech: np.ndarray, rng: Random) -> np.ndarray:
    before, after = (round(rng.uniform(0.06, 0.35) * SAMPLE_RATE) for _ in range(2))
    after = max(after, round(MIN_SECONDS * SAMPLE_RATE) - before - len(speech))
    power = float(np.mean(speech**2))
    noise = _noise(rng.choice(("white", "pink")))
    start = rng.randrange(len(noise) - before - after - len(speech))
    recording = noise[start : start + before + len(speech) + after] * np.sqrt(power * 10 ** -rng.uniform(1, 3))
    recording[before : before + len(speech)] += speech
    level = 10 ** (rng.uniform(-30, -16) / 20)
    gain = min(level / np.sqrt(power), 0.99 / np.abs(recording).max())
    return (recording * gain).astype(np.float32)


@cache
def _noise(colour: str) -> np.ndarray:
    """About a minute of noise of unit power, from which recordings take random stretches."""
    samples = np.random.default_rng(0).standard_normal(1 << 20)
    if colour == "pink":
        spectrum = np.fft.rfft(samples)
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
        spectrum[: 20 * len(samples) // SAMPLE_RATE] = 0  # below 20 Hz
        samples = np.fft.irfft(spectrum)
    return samples / samples.std()
