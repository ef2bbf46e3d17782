"""From recordings to files of transcripts: with random weights the words mean nothing, all else does."""

import io
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from herdkit.adapters.model_directory import save
from herdkit.cli import main
from herdkit.data.media import MediaError
from herdkit.data.shards import ShardWriter
from herdkit.speech.cascade import Cascade
from herdkit.speech.segments import SegmentConfig
from herdkit.speech.transcribe import Transcriber, Transcript, TranscriptionConfig
from herdkit.speech.transcribe_files import Recording, find_recordings, transcribe_files
from syllables import RATE, pause, syllables

SHORT = SegmentConfig(max_seconds=4.0)


def transcriber(model, **options) -> Transcriber:
    return Transcriber(model, TranscriptionConfig(**{"segments": SHORT, "max_new_tokens": 6, **options}))


def conversation() -> torch.Tensor:
    return torch.cat([torch.cat((pause(0.8), syllables(1.5 + 0.3 * i, i))) for i in range(4)])


@pytest.mark.parametrize("options", [{}, {"by": "ctc"}, {"words": True}, {"max_new_tokens": None}])
def test_a_recording_says_in_a_batch_what_it_says_alone(speaking, options):
    one = transcriber(speaking, **options)
    recordings = [syllables(1.0), conversation(), pause(2.0), syllables(3.1, 5)]
    together = one(recordings)
    assert [found.status for found in together][2] == "no speech"
    assert one([torch.zeros(0)])[0].status == "no speech"
    assert [one([recording])[0].as_json() for recording in recordings] == [found.as_json() for found in together]
    small = transcriber(speaking, batch_size=1, **options)
    assert [found.as_json() for found in small(recordings)] == [found.as_json() for found in together]


def test_a_long_recording_is_cut_and_stitched(speaking):
    one = transcriber(speaking)
    (found,) = one([conversation()])
    assert len(found.segments) >= 2
    assert found.seconds == pytest.approx(len(conversation()) / RATE)
    assert found.text == " ".join(segment.text for segment in found.segments if segment.text)
    for segment in found.segments:
        piece = conversation()[round(segment.start * RATE) : round(segment.end * RATE)]
        assert one.segments([piece])[0].text == segment.text
        assert len(piece) <= 4 * RATE


def test_words_have_times_within_their_segment(speaking):
    found = transcriber(speaking, words=True, max_new_tokens=2)([conversation()])[0]
    timed = [segment for segment in found.segments if segment.words]
    assert timed
    for segment in timed:
        assert [word.text for word in segment.words] == segment.text.split()
        assert all(segment.start <= word.start < word.end <= segment.end + 0.05 for word in segment.words)


def test_a_stream_says_what_the_recording_says(speaking):
    one = transcriber(speaking)
    waveform = conversation()
    pieces = list(one.stream(waveform.split(1234)))
    assert [segment.text for segment in pieces] == [
        one.segments([waveform[round(p.start * RATE) : round(p.end * RATE)]])[0].text for p in pieces
    ]
    assert len(pieces) == 4
    far = torch.cat((waveform, pause(30.0), waveform))
    assert len(list(one.stream(far.split(4000)))) == 8
    doubled = waveform.repeat_interleave(2)
    other = list(one.stream(doubled.split(3000), 2 * RATE))
    for a, b in zip(pieces, other, strict=True):
        assert (a.start, a.end) == (pytest.approx(b.start, abs=0.06), pytest.approx(b.end, abs=0.06))


def test_the_prompt_is_the_papers(speaking):
    assert TranscriptionConfig(language="Thai").messages("x")[0]["content"] == "Repeat after me in Thai:"
    wanted = TranscriptionConfig(language="Czech", translate=True).messages("x")[0]["content"]
    assert wanted == "Translate the following sentence into Czech:"
    with pytest.raises(ValueError, match="no language 'Elvish'"):
        TranscriptionConfig(language="Elvish")
    with pytest.raises(ValueError, match="a translation is not said"):
        TranscriptionConfig(translate=True, words=True)
    with pytest.raises(ValueError, match="takes 20 s"):
        Transcriber(speaking, TranscriptionConfig(segments=SegmentConfig(max_seconds=30)))


def wav(samples: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", **options)
    return file.getvalue()


def bad_audio() -> dict[str, tuple[bytes, str]]:
    """Content, and the status and reason or warning that are due."""
    speech = syllables(2.0).numpy()
    good = wav(speech)
    broken = speech.copy()
    broken[900] = np.nan
    return {
        "empty.wav": (b"", "error: is empty"),
        "no_samples.wav": (wav(np.zeros(0)), "error: holds no samples"),
        "nan.wav": (wav(broken, subtype="FLOAT"), "error: holds samples that are not finite"),
        "infinite.wav": (wav(np.where(np.arange(len(speech)) == 5, np.inf, speech), subtype="FLOAT"), "error: "),
        "text.wav": (b"this is no sound at all, but some text\n" * 9, "error: "),
        "cut.wav": (good[: len(good) // 2], "error: is truncated"),
        "cut.flac": (_flac(speech)[:9000], "error: "),
        "tiny.wav": (wav(speech[:50]), "error: 50 samples of audio"),
        "silence.wav": (wav(np.zeros(3 * RATE)), "no speech"),
        "noise.wav": (wav(0.2 * np.random.default_rng(0).standard_normal(3 * RATE)), "no speech"),
        "clipped.wav": (wav(np.clip(50 * speech, -1, 1)), "ok: % of the samples are clipped"),
        "eight_bits.wav": (wav(speech, subtype="PCM_U8"), "ok"),
        "good.wav": (good, "ok"),
    }


def _flac(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC")
    return file.getvalue()


def test_bad_audio_has_its_reason_or_its_defined_behaviour(speaking, tmp_path):
    for name, (content, _) in bad_audio().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("no recording")
    one = transcriber(speaking, by="ctc")
    result = transcribe_files(one, find_recordings([str(tmp_path)]), tmp_path / "out.jsonl")
    lines = {Path(line["id"]).name: line for line in map(json.loads, (tmp_path / "out.jsonl").open())}
    assert set(lines) == set(bad_audio())
    for name, (_, due) in bad_audio().items():
        status, _, reason = due.partition(": ")
        assert lines[name]["status"] == status, (name, lines[name])
        said = lines[name].get("error", " ".join(lines[name].get("warnings", ())))
        assert reason in said, (name, said)
        assert "\n" not in said
        assert ("text" in lines[name]) == (status != "error")
        if status == "error":
            assert name in said, "the message names the file"
    assert result["error"] == sum(due.startswith("error") for _, due in bad_audio().values())
    assert (result["ok"], result["no speech"], result["empty"]) == (3, 2, 0)


def test_an_hour_is_transcribed(speaking):
    hour = torch.cat((pause(58.0), syllables(2.0))).repeat(60)
    (found,) = transcriber(speaking, by="ctc")([hour])
    assert found.seconds == 3600
    assert len(found.segments) == 60


def test_long_recordings_do_not_stay_in_memory(speaking, monkeypatch):
    one, alive, runs = transcriber(speaking, by="ctc", held_seconds=8.0), [], []
    whole = transcriber(speaking, by="ctc")
    recordings = [torch.cat((pause(9.0), syllables(3.0, seed))).repeat(3) for seed in range(5)]

    def sources():
        for recording in recordings:
            given = recording.clone()
            alive.append(weakref.ref(given))
            yield given
            del given
            assert sum(reference() is not None for reference in alive) <= 1

    def seen(self, waveforms):
        runs.append(sum(map(len, waveforms)) / RATE)
        assert all(waveform.untyped_storage().nbytes() == 4 * len(waveform) for waveform in waveforms)
        return original(self, waveforms)

    original = Transcriber.segments
    monkeypatch.setattr(Transcriber, "segments", seen)
    found = one(sources())
    assert len(runs) == 8
    assert max(runs) <= 8
    monkeypatch.undo()
    assert [transcript.as_json() for transcript in found] == [each.as_json() for each in whole(recordings)]
    with pytest.raises(ValueError, match="held_seconds"):
        TranscriptionConfig(held_seconds=0)


def test_a_killed_job_goes_on_and_gives_the_same_file(speaking, tmp_path, monkeypatch):
    recordings = []
    for i in range(40):
        soundfile.write(tmp_path / f"{i:02d}.wav", syllables(0.6 + 0.05 * (i % 7), i).numpy(), RATE)
        recordings.append(Recording(f"r{i}", str(tmp_path / f"{i:02d}.wav")))
    one = transcriber(speaking, by="ctc")
    transcribe_files(one, recordings, tmp_path / "whole.jsonl")
    calls = []

    def killed(self, sources):
        sources = list(sources)
        calls.append(len(sources))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, sources)

    original = Transcriber.__call__
    monkeypatch.setattr(Transcriber, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        transcribe_files(one, recordings, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    result = transcribe_files(one, recordings, tmp_path / "out.jsonl")
    assert calls == [16, 16, 16, 8]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert result["recordings"] == 40
    with pytest.raises(ValueError, match="was made with by = 'ctc', not 'answer'"):
        transcribe_files(transcriber(speaking), recordings, tmp_path / "out.jsonl")


def test_samples_of_shards_keep_their_references(speaking, tmp_path):
    with ShardWriter(tmp_path / "%06d.tar") as writer:
        for i in range(3):
            members = {"flac": _flac(syllables(1.0, i).numpy()), "txt": f"words {i}", "json": {"language": "Thai"}}
            writer.write(f"{i}", members if i != 1 else {"txt": "nothing to hear"})
    recordings = find_recordings([str(tmp_path / "000000.tar")])
    transcribe_files(transcriber(speaking, by="ctc"), recordings, tmp_path / "out.jsonl", subtitles={"srt": tmp_path})
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [line.get("reference") for line in lines] == ["words 0", None, "words 2"]
    assert [line.get("language") for line in lines] == ["Thai", None, "Thai"]
    assert lines[1]["error"].endswith("000000.tar: sample 1 has no audio; its members are txt")
    assert {path.name for path in tmp_path.glob("*.srt")} == {"0.srt", "2.srt"}


@pytest.fixture(scope="module")
def directory(speaking, tmp_path_factory) -> Path:
    return save(speaking, tmp_path_factory.mktemp("model") / "model")


def test_the_command_writes_subtitles_and_a_report_and_fails_where_something_failed(directory, tmp_path, capsys):
    with ShardWriter(tmp_path / "%06d.tar") as writer:
        for i in range(2):
            writer.write(f"{i}", {"flac": _flac(syllables(1.0, i).numpy()), "txt": "go left"})
    (tmp_path / "broken.wav").write_text("not sound")
    given = [str(directory), str(tmp_path / "000000.tar"), str(tmp_path / "broken.wav"), "--by", "ctc", "--words"]
    files = ["--out", str(tmp_path / "o.jsonl"), "--vtt", str(tmp_path / "vtt"), "--report", str(tmp_path / "r.html")]
    assert main(["transcribe", *given, *files]) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert (result["ok"], result["error"]) == (2, 1)
    assert result["error_rate"] > 0
    assert "1 of 3 recordings have no transcript" in printed.err
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "broken.wav: " in page
    assert "pink noise" in page
    assert (tmp_path / "vtt" / "0.vtt").read_text().startswith("WEBVTT")
    assert main(["transcribe", str(directory), "/nowhere", "--out", "x"]) == 1
    assert main(["transcribe", str(directory), str(tmp_path)]) == 1
    assert "--out FILE is needed" in capsys.readouterr().err


def test_a_pipe_is_transcribed_while_it_runs(directory, monkeypatch, capsys):
    pcm = (conversation() * 32767).round().to(torch.int16).numpy().tobytes()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "herdkit", "transcribe", str(directory), "-", "--by", "ctc"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        process.stdin.write(pcm[: len(pcm) // 2])
        process.stdin.flush()
        first = json.loads(process.stdout.readline())  # comes although the pipe is open
        process.stdin.write(pcm[len(pcm) // 2 :])
        process.stdin.close()
        rest = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert first["start"] < 1
    assert len(rest) == 3
    for content, message in ((wav(np.zeros(900)), "holds a file"), (b"abc", "middle of a sample")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["transcribe", str(directory), "-"]) == 1
        assert message in capsys.readouterr().err


def test_the_cascade_answers_the_words(speaking, monkeypatch):
    cascade = Cascade(speaking, TranscriptionConfig(segments=SHORT, by="ctc"))
    monkeypatch.setattr(Transcriber, "segments", lambda _, waveforms: [_said(w) for w in waveforms])
    spoken = [{"type": "text", "text": "now: "}, {"type": "audio", "audio": wav(syllables(1.0).numpy())}]
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    written = cascade.written([*history, {"role": "user", "content": spoken}])
    assert [message.role for message in written] == ["user", "assistant", "user"]
    assert written[-1].text == "now: go left"
    assert not any(message.media for message in written)
    assert isinstance(speaking.chat(written, max_new_tokens=3), str)
    silent = [{"role": "user", "content": [{"type": "audio", "audio": wav(np.zeros(RATE))}]}]
    with pytest.raises(MediaError, match="audio: no speech"):
        cascade.written(silent)


def test_spoken_turns_in_chat_are_heard_or_written_down_first(directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "q.wav").write_bytes(wav(syllables(1.0).numpy()))
    spoken = f"hello\n/audio {tmp_path / 'q.wav'}\nand then\n"
    for cascade in ([], ["--cascade"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(spoken))
        assert main(["chat", str(directory), "--max-new-tokens", "3", *cascade]) == 0
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) >= 3
        assert ("heard: " in printed.err) == bool(cascade)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/audio {tmp_path / 'gone.wav'}\n"))
    assert main(["chat", str(directory)]) == 1
    assert "gone.wav" in capsys.readouterr().err


def _said(waveform):
    from herdkit.speech.transcribe import TextSegment

    return TextSegment(0.0, len(waveform) / RATE, "go left")


def test_an_empty_answer_is_not_called_a_success(speaking, monkeypatch):
    from herdkit.speech.transcribe import TextSegment

    monkeypatch.setattr(Transcriber, "segments", lambda _, waveforms: [TextSegment(0, 1, "") for _ in waveforms])
    (found,) = transcriber(speaking)([syllables(1.0)])
    assert (found.status, found.text) == ("empty", "")
    assert Transcript("error", error="why").as_json() == {"status": "error", "error": "why"}


def test_a_model_without_what_is_needed_says_so(speaking):
    adapter = speaking.detach("speech")
    try:
        with pytest.raises(ValueError, match="no speech adapter; it has no adapters"):
            Transcriber(speaking)
    finally:
        speaking.attach(adapter)
    adapter.config.ctc_classes = None
    try:
        with pytest.raises(ValueError, match="no CTC head for bytes"):
            transcriber(speaking, words=True)
    finally:
        adapter.config.ctc_classes = 257
