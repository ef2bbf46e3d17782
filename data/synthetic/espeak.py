"""Speech from espeak-ng, run as a program of its own.

espeak-ng is under the GPL. It is loaded only by the process that runs this file; the rest of herdkit talks to
that process through pipes, with `Espeak`. The library and its data come from the wheel espeakng-loader, the
optional extra "synthesis".

The program reads one JSON object a line from standard input, `{"text", "voice", "rate", "pitch"}`, and answers
each with a line of JSON, `{"samples": n, "sample_rate": r}` or `{"error": reason}`, followed by n little-endian
int16. This file imports nothing of herdkit, so that the program starts in a moment.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _PITCH = 1, 3
_BUFFER_MS = 1000


class EspeakError(RuntimeError):
    """espeak-ng is not installed, does not know a voice, or broke off."""


class Espeak:
    """A running espeak-ng program; a context manager.

    Two programs that are given the same sequence of utterances answer with the same samples; those of one
    utterance may differ with what was spoken before it.

    Raises:
        EspeakError: the wheel espeakng-loader is not installed.
    """

    def __init__(self):
        if importlib.util.find_spec("espeakng_loader") is None:
            raise EspeakError('made speech needs espeak-ng: pip install "herdkit[synthesis]"')
        # -P keeps this folder off the module path, where names like `texts` could shadow others.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def speak(self, text: str, voice: str, rate: int = 170, pitch: int = 50) -> tuple[np.ndarray, int]:
        """One utterance.

        Args:
            text: plain words.
            voice: an espeak-ng voice, with a variant after "+": "en-us+f3".
            rate: words per minute.
            pitch: 0 to 99.

        Returns:
            Mono samples (samples,) float32 in [-1, 1], and the sample rate in Hz.

        Raises:
            EspeakError: an unknown voice, or the program ended.
        """
        import numpy as np  # here, so that the program itself starts without it

        source, sink = _pipes(self._process)
        request = json.dumps({"text": text, "voice": voice, "rate": rate, "pitch": pitch})
        try:
            sink.write(request.encode() + b"\n")
            sink.flush()
        except BrokenPipeError as error:
            raise EspeakError(f"espeak-ng ended with code {self._process.wait()}") from error
        line = source.readline()
        if not line:
            raise EspeakError(f"espeak-ng ended with code {self._process.wait()} at the text {text!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise EspeakError(answer["error"])
        samples = np.frombuffer(source.read(2 * answer["samples"]), dtype="<i2")
        return samples.astype(np.float32) / 32768, answer["sample_rate"]

    def close(self) -> None:
        source, sink = _pipes(self._process)
        sink.close()
        source.close()
        self._process.wait()

    def __enter__(self) -> Espeak:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdout is None or process.stdin is None:
        raise EspeakError("espeak-ng was started without pipes")
    return process.stdout, process.stdin


class _Library:
    """libespeak-ng through ctypes; only ever made in the program's own process."""

    def __init__(self):
        import espeakng_loader

        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._lib.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, data, _DONT_EXIT)
        if self.sample_rate <= 0:
            raise EspeakError(f"espeak-ng does not start from {data.decode()}")
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else it starts from the clock
        self._voices = {path.name for path in os.scandir(os.path.join(data.decode(), "voices", "!v"))}  # noqa: PTH118
        self._chunks: list[bytes] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._receive)  # the library keeps only the pointer
        self._lib.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> bytes:
        variant = voice.partition("+")[2]
        # An unknown variant is not an error to the library: it would speak with the plain voice.
        if (variant and variant not in self._voices) or self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise EspeakError(f"espeak-ng has no voice {voice!r}")
        self._lib.espeak_SetParameter(_RATE, rate, 0)
        self._lib.espeak_SetParameter(_PITCH, pitch, 0)
        self._chunks.clear()
        encoded = text.encode()
        failed = self._lib.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
        if failed or self._lib.espeak_Synchronize():
            raise EspeakError(f"espeak-ng failed on the text {text!r}")
        return b"".join(self._chunks)


def _serve() -> None:
    library = _Library()
    for line in sys.stdin.buffer:
        try:
            pcm = library.speak(**json.loads(line))
            answer = {"samples": len(pcm) // 2, "sample_rate": library.sample_rate}
        except EspeakError as error:
            pcm, answer = b"", {"error": str(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pcm)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
