"""Made tables, equations, flowcharts, boxes and pages: what they say is what they show."""

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
