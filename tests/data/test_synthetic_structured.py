"""Made charts, tables, equations, flowcharts, boxes and pages: what they say is what they show."""

import io
import json
import re
from random import Random

import numpy as np
import pytest
from herdkit.data.dialogs import dialog_sample
from herdkit.data.shards import Sample
from herdkit.data.synthetic import grounding, screenshots, structured
from herdkit.data.synthetic.drawing import draw_scene
from herdkit.data.synthetic.scenes import sample_scene
from PIL import Image


def dialog(members: dict) -> list:
    stored = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in members.items()
    }
    return dialog_sample(Sample("000", "made.tar", stored), ("image",))


@pytest.mark.parametrize("kind", structured.MAKERS)
def test_samples_are_dialogs_and_follow_from_the_seed(kind):
    members = structured.sample(kind, 0, 4, side=224)
    assert structured.sample(kind, 0, 4, side=224) == members
    assert structured.sample(kind, 0, 6, side=224)["txt"] != members["txt"]
    messages = dialog(members)
    assert messages[-1].text == members["txt"]
    picture = Image.open(io.BytesIO(members["png"]))
    assert picture.mode == "RGB"
    assert picture.width == 224
    assert np.asarray(picture).std() > 5


def test_a_chart_says_what_it_shows():
    for seed in range(8):
        for kind in structured.CHART_KINDS:
            made = structured.chart(Random(seed), kind)
            rows = re.findall(r"\| (\w+) \| (\d+) \|", made.text)
            values = {name: int(value) for name, value in rows}
            asked = {question.kind: question for question in made.questions}
            assert values[asked["largest"].answer] == max(values.values())
            assert values[asked["smallest"].answer] == min(values.values())
            name = asked["value"].question.removeprefix("what is the value of ")
            assert asked["value"].answer == str(values[name])
            assert asked["count"].answer == str(len(values))
            assert all(question.answer in question.choices for question in made.questions)


def test_the_bars_of_a_chart_are_as_high_as_their_values():
    """Columns of the picture that are the bar's ink, counted."""
    rng = Random(5)
    made = structured.chart(rng, "bar", side=448)
    values = [int(value) for value in re.findall(r"\| (\d+) \|", made.text)]
    pixels = np.asarray(made.picture).astype(int)
    coloured = (pixels.max(2) - pixels.min(2)) > 60
    heights = coloured.sum(0)
    # Runs of neighbouring columns with ink, one for each bar.
    runs = [run for run in np.split(heights, np.flatnonzero(np.diff(heights > 4)) + 1) if run.max() > 4]
    tall = [float(np.median(run)) for run in runs if len(run) > 8]
    assert len(tall) == len(values)
    scale = tall[0] / values[0]
    assert np.allclose(tall, np.array(values) * scale, rtol=0.08, atol=3)


def test_tables_hold_what_their_text_holds():
    markdown, latex = (structured.table(Random(3), format=form) for form in ("markdown", "latex"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.text.splitlines()]
    rows = [line.removesuffix(" \\\\").split(" & ") for line in latex.text.splitlines()[1:-1]]
    assert [cells[0], *cells[2:]] == rows


def test_flowcharts_have_an_arrow_for_each_line():
    made = structured.flowchart(Random(1))
    lines = made.text.splitlines()
    assert lines[0] == "flowchart TD"
    assert all(re.fullmatch(r"    \w+ --> \w+", line) for line in lines[1:])


def test_boxes_hold_their_objects():
    for seed in range(5):
        scene, boxes = sample_scene(Random(seed)), []
        picture = draw_scene(scene, Random(seed), boxes)
        # The boxes change nothing of the picture.
        assert picture.tobytes() == draw_scene(scene, Random(seed)).tobytes()
        assert len(boxes) == len(scene.objects)
        pixels = np.asarray(picture).astype(int)
        vivid = (pixels.max(2) - pixels.min(2)) > 90
        inside = np.zeros_like(vivid)
        for left, top, right, bottom in boxes:
            inside[max(top, 0) : bottom, max(left, 0) : right] = True
            assert vivid[max(top, 0) : bottom, max(left, 0) : right].mean() > 0.2
        assert not (vivid & ~inside).any()


def test_grounding_reads_back():
    kinds = set()
    for index in range(9):
        members = grounding.sample(0, index)
        asked, answered = dialog(members)
        kinds.add(members["json"]["kind"])
        boxes = grounding.parse_boxes(asked.text + answered.text)
        assert len(boxes) == (members["json"]["kind"] != "mark")
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
    assert kinds == {"where", "what", "mark"}
    assert grounding.parse_boxes("<box>1, 2</box> <box>a, b, c, d</box> <box>0.1, 0.2, 0.3, 0.4</box>") == [
        (0.1, 0.2, 0.3, 0.4)
    ]


def test_pages_frame_the_element_that_is_asked_for():
    source, code = screenshots.page(Random(2))
    assert source.count("outline:3px") == 1
    assert "outline" not in code
    assert source.replace(' style="outline:3px solid #e6007e;outline-offset:2px"', "").count(code) >= 1


@pytest.mark.skipif(screenshots.find_browser() is None, reason="no browser on this machine")
def test_a_browser_draws_the_frame():
    members = screenshots.sample(0, 0)
    picture = np.asarray(Image.open(io.BytesIO(members["png"])).convert("RGB")).astype(int)
    frame = np.abs(picture - (0xE6, 0, 0x7E)).sum(2) < 30
    assert frame.sum() > 50
    assert dialog(members)[-1].text.startswith("<")


def test_without_a_browser_it_says_so(monkeypatch):
    monkeypatch.setattr(screenshots, "BROWSERS", ("no-such-browser",))
    with pytest.raises(screenshots.BrowserError, match="none of no-such-browser is on the path"):
        screenshots.screenshot("<p>")
