"""Made clips: what the captions say is what the decoded pixels do, and one frame does not tell it."""

import io
import re
from collections import Counter
from fractions import Fraction
from random import Random

import av
import numpy as np
import pytest
from herdkit.data.media import load_audio, load_video
from herdkit.data.synthetic import clips, words
from herdkit.data.synthetic.drawing import draw_clip
from herdkit.data.synthetic.encoding import video


def read_caption(text):
    """Moves as (name, direction) in order, and the names of what stays."""
    moved, _, still = text.partition(" while ")
    moves = [re.fullmatch(r"the (\w+ \w+) moves (\w+)", part).groups() for part in moved.split(", then ")]
    return moves, re.findall(r"the (\w+ \w+)", still.removesuffix(" stays").removesuffix(" stay"))


def answer(question, moves, still):
    names = [name for name, _ in moves] + still

    def fitting(name):
        found = [n for n in names if n == name or n.split()[1] == name]
        assert len(found) == 1, f"{name} is ambiguous"
        return found[0]

    order = -1 if question.split()[-1] == "last" or "moves last" in question else 0
    assert len(moves) == 1 or order or "first" in question or not re.search(r"\bmoves\b", question)
    name, direction = moves[order]
    if re.match(r"how many|count", question):
        return ("zero", "one", "two")[len(moves)]
    if m := re.fullmatch(r"does the (.+) move (before|after) the (.+)", question):
        places = [[n for n, _ in moves].index(fitting(m[g])) for g in (1, 3)]
        return "yes" if (places[0] < places[1]) == (m[2] == "before") else "no"
    if m := re.fullmatch(r"does the (.+) move", question):
        return "yes" if fitting(m[1]) in dict(moves) else "no"
    if m := re.fullmatch(r"(?:which way does|where does|in which direction does) the (.+) (?:move|go)", question):
        return direction if "object" in m[1] else dict(moves)[fitting(m[1])]
    if question.startswith("what happens"):
        return f"the {name} moves"
    if re.match(r"(what|which) (colour|shape)", question):
        return name.split()["colour" not in question]
    return name


def test_questions_agree_with_a_reader_of_the_caption():
    rng = Random(0)
    kinds = Counter()
    for split in ("train", "new", "text", "text new"):
        for _ in range(120):
            clip = clips.sample_clip(rng, split)
            moves, still = read_caption(clips.caption(clip))
            assert len(moves) + len(still) == len(clip.objects)
            for question in clips.questions(clip, rng):
                assert answer(question.question, moves, still) == question.answer, question
                assert question.answer in question.choices
                assert question.sentence == question.form.format(question.answer)
                assert question.sentence.endswith(question.answer)
                assert len(set(question.choices)) == len(question.choices) > 1
                kinds[question.kind] += 1
    assert len(kinds) == 8
    assert min(kinds.values()) > 25


def test_splits_are_apart_and_show_no_held_out_pair():
    rng = Random(1)
    train, new = ({clips.sample_clip(rng, split) for _ in range(600)} for split in ("train", "new"))
    assert not train & new
    assert {(o.colour, o.shape) for clip in train | new for o in clip.objects} == set(words.TRAINING_PAIRS)


def test_each_direction_is_as_likely():
    rng = Random(2)
    found = Counter(m.direction for _ in range(2000) for m in clips.sample_clip(rng).movements)
    assert set(found) == set(words.DIRECTIONS)
    assert max(found.values()) < 1.2 * min(found.values())


def test_backwards_the_same_frames_tell_the_reverse():
    """So no single frame holds the answer: each is in a clip of the opposite movement as well."""
    rng = Random(3)
    for _ in range(20):
        clip = clips.sample_clip(rng)
        back = clips.reverse(clip)
        assert clips.reverse(back) == clip
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
        directions = [m.direction for m in clip.movements]
        assert [m.direction for m in back.movements] == [opposite[d] for d in reversed(directions)]
        for time in np.linspace(0, 1, 7):
            shown = {(o.name, *np.round(p, 6)) for o, p in zip(clip.objects, clip.positions(time), strict=True)}
            same = zip(back.objects, back.positions(1 - time), strict=True)
            assert shown == {(o.name, *np.round(p, 6)) for o, p in same}


def test_objects_never_touch_while_they_move():
    rng = Random(4)
    for _ in range(200):
        clip = clips.sample_clip(rng)
        for time in np.linspace(0, 1, 25):
            places = np.array(clip.positions(time))
            for i in range(len(places)):
                for other in places[:i]:
                    assert np.abs(places[i] - other).max() > 0.99


def centre(frame, colour):
    """(x, y) of the pixels near a colour."""
    near = np.abs(frame.astype(int) - np.array(words.COLOURS[colour])).max(-1) < 60
    return np.argwhere(near).mean(0)[::-1]


@pytest.mark.parametrize("container", ["mp4", "webm"])
@pytest.mark.parametrize("rate", [8, 24])
def test_decoded_pixels_move_as_the_caption_says(container, rate):
    rng = Random(5)
    tested = 0
    while tested < 4:
        clip = clips.sample_clip(rng)
        if len({o.colour for o in clip.objects}) < len(clip.objects):
            continue
        tested += 1
        data = video(draw_clip(clip, 2 * rate, rng), Fraction(rate), container)
        decoded = load_video(data, 8)
        assert decoded.frames.shape == (8, 3, 96, 96)
        frames = decoded.frames.permute(0, 2, 3, 1).numpy()
        moves, still = read_caption(clips.caption(clip))
        half = {len(moves): (0, -1)} if len(moves) == 1 else {0: (0, 3), 1: (4, -1)}
        for order, (name, direction) in enumerate(moves):
            before, after = half.get(order, (0, -1)) if len(moves) == 2 else (0, -1)
            dx, dy = centre(frames[after], name.split()[0]) - centre(frames[before], name.split()[0])
            along, across = (dx, dy) if direction in ("left", "right") else (dy, dx)
            assert (along > 0) == (direction in ("right", "down"))
            assert abs(along) > 20
            assert abs(across) < 4
        for name in still:
            shift = centre(frames[-1], name.split()[0]) - centre(frames[0], name.split()[0])
            assert np.abs(shift).max() < 2


@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_files_are_what_they_say_and_the_same_bytes_again(container, codec):
    frames = draw_clip(clips.sample_clip(Random(6)), 16, Random(6))
    tone = 0.1 * np.sin(np.arange(32000) * 0.2)
    silent, sounding = (video(frames, Fraction(8), container, sound) for sound in (None, tone))
    assert video(frames, Fraction(8), container, tone) == sounding
    with av.open(io.BytesIO(sounding)) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name.removeprefix("lib") in (codec, "vpx-vp9", "dav1d")
        assert stream.average_rate == 8
        assert sum(1 for _ in file.decode(stream)) == 16
    with av.open(io.BytesIO(silent)) as file:
        assert not file.streams.audio
    heard = load_audio(sounding).numpy()
    assert len(heard) == pytest.approx(32000, abs=1500)
    spectrum = np.abs(np.fft.rfft(heard))
    assert spectrum.argmax() * 16000 / len(heard) == pytest.approx(0.2 * 16000 / (2 * np.pi), rel=0.02)


def test_the_same_clip_gives_the_same_bytes_often():
    """x264 with its macroblock tree gives other bytes in about one of thirty files."""
    rng = Random(7)
    drawn = [draw_clip(clips.sample_clip(rng), 16, rng) for _ in range(30)]
    first = [video(frames, Fraction(8), "mp4") for frames in drawn]
    for _ in range(2):
        assert [video(frames, Fraction(8), "mp4") for frames in drawn] == first
