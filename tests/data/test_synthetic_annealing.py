"""The annealing sets: built by one command, as dialogs whose pictures decode, the same for the same seed."""

import io
import json
from typing import Any

import numpy as np
import pytest
from herdkit.cli import build_parser, main
from herdkit.data.dialogs import dialog_sample
from herdkit.data.shards import Sample, ShardReader
from herdkit.data.synthetic import annealing, screenshots
from herdkit.data.synthetic.annealing import KINDS
from herdkit.data.synthetic.charts import SMALL_SIDE, SMALL_VALUES, VALUES, pair_is_held_out, title_is_held_out
from herdkit.data.synthetic.figures import NOUNS
from herdkit.data.synthetic.sets import build_annealing
from PIL import Image

DRAWN = [kind for kind in KINDS if kind != "screenshots"]
COUNT = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annealing")
    counts = dict.fromkeys(DRAWN, COUNT)
    build_annealing(folder, counts, seed=2, workers=0, side=160)
    build_annealing(folder, {"charts": 12, "grounding": COUNT}, seed=2, workers=0, side=160, held_out=True)
    return folder


def read(folder, name) -> list[Sample]:
    reader = ShardReader(str(folder / name / "*.tar"))
    return [reader[i] for i in range(len(reader))]


@pytest.mark.parametrize("kind", DRAWN)
def test_samples_are_dialogs_about_a_picture(made, kind):
    for name in KINDS[kind].sets:
        samples = read(made, name)
        assert len(samples) == COUNT
        for sample in samples:
            messages = dialog_sample(sample, ("image",))
            assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2)
            media = [part.media for message in messages for part in message.media]
            if name == "written_charts":
                assert not media
                continue
            (picture,) = (Image.open(io.BytesIO(data)) for data in media)
            assert picture.mode == "RGB"
            assert picture.width == 160 or kind == "grounding"
            assert np.asarray(picture).std() > 5
            if "txt" in sample.members:
                assert messages[-1].text == sample.text("txt")


def test_charts_are_transcribed_and_asked_about(made):
    for transcribed, questioned in zip(read(made, "chart_texts"), read(made, "chart_questions"), strict=True):
        assert transcribed.key == questioned.key
        assert transcribed.members["png"] == questioned.members["png"]
        numbers = "| value |" in transcribed.text("txt")
        assert len(dialog_sample(questioned)) == 2 * (5 + numbers)
    for sample in read(made, "written_charts"):
        first, *_ = dialog_sample(sample)
        numbers = "| value |" in first.text
        asked = {message.text.rstrip("?").split("\n")[-1] for message in dialog_sample(sample)[::2]}
        assert len(asked) == (6 if numbers else 2) + 2
        rows = [line.strip("| ").split(" | ") for line in first.text.split("\n\n")[1].splitlines()[2:]]
        for said in dialog_sample(sample)[1::2]:
            if said.text.startswith("the number of"):
                name, number = said.text.split()[3], int(said.text.split()[5])
                assert [name] in [row[:1] for row in rows]
                assert VALUES.stop + NOUNS.index(name) == number not in VALUES


def test_small_tables_in_writing_hold_what_small_charts_can(tmp_path):
    build_annealing(tmp_path, {"written_charts": 20}, seed=2, workers=0, side=SMALL_SIDE - 1)
    for sample in read(tmp_path, "written_charts"):
        _, *rows = (line.strip("| ").split(" | ") for line in sample.text("txt").split("\n\n")[1].splitlines()[1:])
        assert len(rows) <= 5
        for name, *value in rows:
            assert len(name) <= 5
            assert not value or int(*value) in SMALL_VALUES


def test_test_charts_have_one_question_each_and_all_is_new_in_them(made):
    texts, questions = read(made, "chart_texts_new"), read(made, "chart_questions_new")
    for transcribed, sample in zip(texts, questions, strict=True):
        content = sample.json()
        assert content["messages"][-1]["content"] in content["choices"]
        assert content["kind"] in ("largest", "smallest", "larger", "value", "count", "title")
        title, *rows = (line.strip("#| ").split(" | ") for line in transcribed.text("txt").splitlines())
        assert title_is_held_out(*title)
        pairs = [(name, int(value)) for name, value in (row for row in rows if len(row) == 2) if value.isdigit()]
        assert all(pair_is_held_out(*pair) for pair in pairs)


def test_each_sample_follows_from_seed_and_index():
    sized: dict[str, Any] = {"side": 96}
    for make, options in ((annealing.drawn_charts, {"split": "train", **sized}), (annealing.written_charts, sized)):
        together, later = make(["a", "b"], 3, 0, 4, **options), make(["a", "b"], 3, 2, 4, **options)
        assert together[-len(later) :] == later
        assert make(["a", "b"], 4, 2, 4, **options) != later


def test_one_command_makes_them(tmp_path, capsys):
    command = ["synthetic", "charts", "paragraphs", "--out", str(tmp_path), "--count", "2", "--side", "96"]
    assert main([*command, "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("/", 1)[-1] for line in lines[:-1]] == [
        "chart_texts: 2 samples", "chart_questions: 2 samples", "paragraphs: 2 samples",
    ]  # fmt: skip
    assert list(json.loads(lines[-1])["sets"]) == ["chart_texts", "chart_questions", "paragraphs"]
    assert Image.open(io.BytesIO(read(tmp_path, "chart_questions")[0].members["png"])).size == (96, 96)
    assert main([*command, "--workers", "0"]) == 0
    assert "made before" in capsys.readouterr().out
    # Other pictures than those that are there are not quietly kept.
    assert main([*command, "--workers", "0", "--side", str(SMALL_SIDE)]) == 1
    assert "was built with side 96, now 224 is asked for" in capsys.readouterr().err


def test_the_command_names_every_kind():
    synthetic = next(a for a in build_parser()._actions if a.choices).choices["synthetic"]
    assert all(kind in synthetic.format_help() for kind in KINDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["graphs"], "no kind is named 'graphs'; the kinds are charts"),
        (["tables", "--held-out"], "tables hold nothing out for tests; charts, grounding do"),
        (["tables", "--count", "0"], "tables must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_made_is_said(tmp_path, capsys, arguments, message):
    assert main(["synthetic", *arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_screenshots_without_a_browser_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(screenshots, "BROWSERS", ("no-such-browser",))
    with pytest.raises(screenshots.BrowserError, match="none of no-such-browser is on the path"):
        build_annealing(tmp_path, {"screenshots": 1}, workers=0)
    assert not list(tmp_path.rglob("manifest.json"))
