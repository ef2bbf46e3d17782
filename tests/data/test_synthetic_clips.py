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
    """Moves as (name, start, end) in order, and (name, place) of what stays."""
    moved, _, still = text.partition(" while ")
    move = r"the (\w+ \w+) goes from the (.+) to the (.+)"
    moves = [re.fullmatch(move, part).groups() for part in moved.split(", then ")]
    stays = [
        re.fullmatch(r"the (\w+ \w+) stays (?:at|in) the (.+)", part).groups()
        for part in re.split(", | and ", still)
        if part
    ]
    return moves, stays


def answer(question, moves, stays):
    names = [name for name, *_ in [*moves, *stays]]

    def fitting(name):
        found = [n for n in names if n == name or n.split()[1] == name]
        assert len(found) == 1, f"{name} is ambiguous"
        return found[0]

    if re.match(r"how many|count", question):
        return ("zero", "one", "two")[len(moves)]
    if "stays" in question:
        ((name, _),) = stays
        return name
    where = dict(stays)
    if m := re.fullmatch(r"where (?:is|does) the (.+?) (at the start|at first|at the end|end)", question):
        ends = {name: place[m[2].endswith("end")] for name, *place in moves}
        return (where | ends)[fitting(m[1])]
    paths = {name: f"the {start} to the {end}" for name, start, end in moves}
    if m := re.fullmatch(r"(?:where|from where to where) does the (.+) (?:move|go)", question):
        return paths[fitting(m[1])]
    order = -1 if question.endswith("last") else 0
    assert len(moves) == 1 or order or question.endswith("first")
    name = moves[order][0]
    if question.startswith("what happens"):
        return f"the {name} goes from {paths[name]}"
    assert "moves" in question
    if re.match(r"(what|which) (colour|shape)", question):
        return name.split()["colour" not in question]
    return name


def test_questions_agree_with_a_reader_of_the_caption():
    rng = Random(0)
    kinds = Counter()
    for split in ("train", "new", "text", "text new"):
        for _ in range(120):
            clip = clips.sample_clip(rng, split)
            moves, stays = read_caption(clips.caption(clip))
            assert len(moves) + len(stays) == len(clip.objects)
            for question in clips.questions(clip, rng):
                assert answer(question.question, moves, stays) == question.answer, question
                assert question.answer in question.choices
                assert question.sentence == question.form.format(question.answer)
                assert question.answer in question.sentence
                assert len(set(question.choices)) == len(question.choices) > 1
                kinds[question.kind] += 1
    assert len(kinds) == 9
    assert min(kinds.values()) > 25


def test_a_lesson_asks_about_every_movement_and_no_question_twice():
    kinds = Counter()
    for seed in range(200):
        clip = clips.sample_clip(Random(seed))
        moves, stays = read_caption(clips.caption(clip))
        asked = clips.lesson(clip, Random(seed))
        assert asked == clips.lesson(clip, Random(seed))
        assert len(asked) <= 8
        assert len({question.question for question in asked}) == len(asked)
        assert all(answer(question.question, moves, stays) == question.answer for question in asked)
        for kind in ("mover", "happens"):
            answers = {question.answer for question in asked if question.kind == kind}
            assert len(answers) == (len(moves) if len(clip.objects) > 1 else 0)
        kinds.update(question.kind for question in asked)
    assert len(kinds) == 9
    assert min(kinds.values()) > 25


def test_splits_are_apart_and_show_no_held_out_pair():
    rng = Random(1)
    train, new = ({clips.sample_clip(rng, split) for _ in range(600)} for split in ("train", "new"))
    assert not {clips.caption(clip) for clip in train} & {clips.caption(clip) for clip in new}
    assert {(o.colour, o.shape) for clip in train | new for o in clip.objects} == set(words.TRAINING_PAIRS)


def test_each_direction_is_as_likely():
    rng = Random(2)
    found = Counter(m.direction for _ in range(2000) for m in clips.sample_clip(rng).movements)
    assert set(found) == {(-1, 0), (1, 0), (0, -1), (0, 1)}
    assert max(found.values()) < 1.2 * min(found.values())


def test_backwards_the_same_frames_tell_the_reverse():
    """So no single frame holds the answer: each is in a clip of the opposite movement as well."""
    rng = Random(3)
    for _ in range(20):
        clip = clips.sample_clip(rng)
        back = clips.reverse(clip)
        assert clips.reverse(back) == clip
        paths = [(start, end) for _, start, end in read_caption(clips.caption(clip))[0]]
        backwards = [(start, end) for _, start, end in read_caption(clips.caption(back))[0]]
        assert backwards == [(end, start) for start, end in reversed(paths)]
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


def cell(point):
    """The name of the place, in a picture of 96 pixels, whose middle is at most 6 pixels away."""
    column, row = (np.array(point) // 32).astype(int)
    assert np.abs(point - (np.array([column, row]) * 32 + 16)).max() < 6
    return words.PLACES[row][column]


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
        moves, stays = read_caption(clips.caption(clip))
        times = {1: [(0, -1)], 2: [(0, 3), (4, -1)]}[len(moves)]
        for (name, *path), (before, after) in zip(moves, times, strict=True):
            for frame, place in zip((before, after), path, strict=True):
                assert cell(centre(frames[frame], name.split()[0])) == place
        for name, place in stays:
            for frame in frames:
                assert cell(centre(frame, name.split()[0])) == place


def test_objects_rest_at_the_start_and_at_the_end_and_between_two_movements():
    rng = Random(8)
    for _ in range(100):
        clip = clips.sample_clip(rng)
        rests = [np.linspace(0, 0.18, 3), np.linspace(0.82, 1, 3)]
        if len(clip.movements) == 2:
            rests.append(np.linspace(0.42, 0.58, 3))
        for times in rests:
            places = np.array([clip.positions(time) for time in times])
            assert (places == places.round()).all()
            assert (places == places[:1]).all()


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
