"""Spoken questions by every route: a model with random weights answers nonsense, but by each route its own."""

import io
import json
from pathlib import Path

import pytest
import soundfile
from herdkit.adapters.chat import reply_batch
from herdkit.adapters.model_directory import save
from herdkit.cli import main
from herdkit.data.shards import ShardReader, ShardWriter
from herdkit.speech.questions import answer_questions, in_words, scores, spoken_question
from herdkit.speech.transcribe import Transcriber, TranscriptionConfig
from herdkit.speech.transcribe_files import Recording, find_recordings
from syllables import RATE, syllables

WORDS = ("what is two plus one", "go left", "red star")
HEARD = ("what is two", "", "red star")


def flac(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, syllables(1.0, seed).numpy(), RATE, format="FLAC")
    return file.getvalue()


def asked(audio) -> list[dict]:
    """A dialog whose last question is spoken."""
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    return [*history, {"role": "user", "content": [{"type": "audio", "audio": audio}]}]


@pytest.fixture(scope="module")
def shard(speaking, tmp_path_factory) -> Path:
    """To the first two questions what the model answers directly is right, to the third what it answers in words."""
    folder = tmp_path_factory.mktemp("questions")
    direct = reply_batch(speaking, [asked(flac(seed)) for seed in range(3)], max_new_tokens=64)
    written = reply_batch(speaking, [[*asked("")[:2], {"role": "user", "content": WORDS[2]}]], max_new_tokens=64)
    assert written[0].strip() != direct[2].strip()
    with ShardWriter(folder / "%06d.tar") as writer:
        for i, right in enumerate((direct[0], direct[1], written[0])):
            messages = [*asked("flac"), {"role": "assistant", "content": right.strip() or " "}]
            writer.write(f"{i}", {"flac": flac(i), "txt": WORDS[i], "json": {"messages": messages}})
    return folder / "000000.tar"


def test_every_route_answers_what_it_was_given(speaking, shard):
    recordings = find_recordings([str(shard)])
    lines = [
        {"id": recording.id, "status": "ok" if heard else "empty", "text": heard, "reference": said}
        for recording, heard, said in zip(recordings, HEARD, WORDS, strict=True)
    ]
    found = list(answer_questions(Transcriber(speaking, TranscriptionConfig(batch_size=2)), recordings, lines))
    for n, one in enumerate(found):
        texts = {"cascade": HEARD[n], "written": WORDS[n]}
        dialogs = {"direct": asked(flac(n))} | {
            route: [*asked("")[:2], {"role": "user", "content": text}] for route, text in texts.items() if text
        }
        assert one.given == {
            route: speaking.chat(dialog, max_new_tokens=64).strip() for route, dialog in dialogs.items()
        }
    assert [one.right("direct") for one in found] == [1, 1, 0]
    assert [one.right(route) for one in found for route in ("cascade", "written")][4:] == [1, 1]
    assert found[1].right("cascade") == 0, "nothing was heard"
    table = scores(found)
    assert {route: mean.count for route, mean in table.items()} == {"direct": 3, "cascade": 3, "written": 3}
    assert table["direct"].score == pytest.approx(2 / 3)
    assert table["direct"].interval == pytest.approx(1.96 * (2 / 9 / 3) ** 0.5)
    unknown = [{**line, "reference": ""} for line in lines]
    without = list(answer_questions(Transcriber(speaking), recordings, unknown))
    assert [set(one.given) for one in without] == [{"direct", "cascade"}, {"direct"}, {"direct", "cascade"}]
    assert list(scores(without)) == ["direct", "cascade"]
    broken = [{"id": lines[0]["id"], "status": "error", "error": "x"}, *lines[1:]]
    assert len(list(answer_questions(Transcriber(speaking), recordings, broken))) == 2


def test_what_is_no_spoken_question_is_named(speaking, shard, tmp_path):
    line = {"id": "talk.wav", "status": "ok", "text": "red star"}
    with pytest.raises(ValueError, match=r"talk.wav: a file has no question"):
        list(answer_questions(Transcriber(speaking), [Recording("talk.wav", "talk.wav")], [line]))
    spoken = {"type": "audio", "audio": "flac"}
    answer = {"role": "assistant", "content": "yes"}
    dialogs = {
        "0": [{"role": "user", "content": [spoken, spoken]}, answer],
        "1": [{"role": "user", "content": [spoken]}, answer, {"role": "user", "content": "and?"}, answer],
        "2": [{"role": "user", "content": [spoken]}],
    }
    with ShardWriter(tmp_path / "%06d.tar") as writer:
        for key, messages in dialogs.items():
            writer.write(key, {"flac": flac(0), "json": {"messages": messages}})
    reader = ShardReader(str(tmp_path / "*.tar"))
    for n, message in enumerate(("2 there and 2 in all", "0 there and 1 in all", "its answer")):
        with pytest.raises(ValueError, match=f"sample {n}: .*{message}"):
            spoken_question(reader[n])
    messages = spoken_question(ShardReader(str(shard))[0]).prompt
    assert [message.text for message in in_words(messages, "go left")] == ["hi", "hello", "go left"]


def test_the_report_and_evaluate_say_how_many_are_right(speaking, shard, tmp_path, capsys):
    model = str(save(speaking, tmp_path / "model"))
    given = ["transcribe", model, str(shard), "--by", "ctc", "--out", str(tmp_path / "o.jsonl"), "--questions"]
    assert main(given) == 1
    assert "--questions goes with --report" in capsys.readouterr().err
    main([*given, "--report", str(tmp_path / "r.html")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["questions"]["direct"] == {"score": pytest.approx(2 / 3), "interval": pytest.approx(0.533, abs=1e-3),
                                             "count": 3}  # fmt: skip
    page = (tmp_path / "r.html").read_text()
    assert "Spoken questions" in page
    assert "the transcript (cascade)" in page
    assert page.count("<td>directly</td><td>") >= 1, "the third is wrong directly, and shown"
    assert main(["evaluate", model, str(shard), "--out", str(tmp_path / "e")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["score"] == pytest.approx(2 / 3)
