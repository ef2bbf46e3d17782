"""The built sets: nothing leaks from test to training, everything decodes, and a build can be resumed."""

import json
import re
from hashlib import sha256

import numpy as np
import pytest
from herdkit.data.dialogs import dialog_sample
from herdkit.data.media import load_audio, load_image, load_video
from herdkit.data.shards import ShardReader
from herdkit.data.synthetic import SetSizes, build, samples, set_names
from herdkit.data.synthetic.drawing import draw_scene
from herdkit.data.synthetic.facts import facts
from herdkit.data.synthetic.scenes import caption
from herdkit.data.synthetic.speech import HELD_OUT_VOICE, TRAINING_VOICES
from herdkit.data.synthetic.words import COLOURS, HELD_OUT_PAIRS

SIZES = {
    "english_bytes": 40_000,
    "dialogues": 100,
    "pairs": 40,
    "captions": 60,
    "scenes": 260,  # two jobs
    "clips": 16,
    "transcripts": 30,
    "spoken_questions": 30,
    "two_senses": 30,
    "held_out": 25,
}
SPEECH = [name for name in set_names() if name.startswith(("speech", "spoken", "two"))]
ASKING = [n for n in set_names() if re.search(r"questions_|_dialogs_new|two_senses_heldout", n)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("made")
    build(folder, SetSizes(**SIZES), seed=3, workers=0)
    return folder


def read(folder, name):
    reader = ShardReader(str(folder / name / "*.tar"))
    return [reader[i] for i in range(len(reader))]


def digests(folder):
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.tar"))
    }


def test_every_set_is_there_and_every_sample_decodes(made):
    assert len(set_names()) >= 19
    for name in set_names():
        found = read(made, name)
        manifest = json.loads((made / name / "manifest.json").read_text())
        assert len(found) == manifest["samples"] > 0
        for sample in found[:8]:
            if name == "image_pairs":
                assert load_image(sample.members["png"]).size in ((96, 96), (192, 96), (96, 192))
            elif "json" not in sample.members:
                assert len(sample.text("txt")) >= (200 if "pretrain" in name else 60)
            for message in dialog_sample(sample) if "json" in sample.members else ():
                for part in message.media:
                    if part.type == "image":
                        assert load_image(part.media).size in ((96, 96), (192, 96), (96, 192))
                    elif part.type == "video":
                        assert load_video(part.media, 4).frames.shape == (4, 3, 96, 96)
                    else:
                        assert 1.0 <= len(load_audio(part.media)) / 16000 < 4.5


def test_dialogs_have_the_shape_that_their_stage_expects(made):
    shapes = {
        "image_captions": (["image"], ["image", "text"]),
        "image_questions": (["image", "text"],),
        "video_questions_new": (["video", "text"],),
        "spoken_questions": (["audio"],),
        "two_senses": (["image", "audio"],),
    }
    for name, allowed in shapes.items():
        for sample in read(made, name):
            messages = dialog_sample(sample)
            assert messages[0].role == "user"
            assert [part.type for part in messages[0].parts] in list(allowed)
            assert all(not message.media for message in messages[1:])
    for sample in read(made, "speech_transcripts"):
        system, user, assistant = dialog_sample(sample)
        assert (system.role, system.text) == ("system", "Repeat after me in English:")
        assert [part.type for part in user.parts] == ["audio"]
        assert assistant.text == sample.text("txt")
    turns = {len(dialog_sample(sample)) // 2 for sample in read(made, "image_questions")}
    assert {7} <= turns <= {5, 6, 7}


@pytest.mark.parametrize("name", ASKING)
def test_test_questions_have_one_answer_of_known_chance(made, name):
    for sample in read(made, name):
        content = sample.json()
        assert content["kind"]
        assert content["messages"][-1]["content"] in content["choices"]
        assert len(content["choices"]) >= 2
        assert sum(m["role"] == "assistant" for m in content["messages"]) == 1


def test_held_out_pairs_are_in_no_training_picture_or_clip(made):
    pairs = [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]
    for name in ("image_captions", "image_questions", "video_captions", "video_questions", "two_senses"):
        for sample in read(made, name):
            said = sample.members.get("txt", b"").decode() + json.dumps(sample.json())
            said = said.split('"choices"')[0]
            assert not any(pair in said for pair in pairs), (name, sample.key)
    # Questions and captions of the same key show the same clip, so the captions speak for both.
    captions, questions = read(made, "video_captions"), read(made, "video_questions")
    for one, other in zip(captions, questions, strict=True):
        (container,) = set(one.members) & {"mp4", "webm"}
        assert one.key == other.key
        assert one.members[container] == other.members[container]


def test_what_is_drawn_for_each_split_keeps_its_promise(monkeypatch):
    """At the moment of drawing, since pictures with questions carry no caption."""
    drawn = []

    def spy(scene, rng):
        drawn.append(scene)
        return draw_scene(scene, rng)

    monkeypatch.setattr(samples.drawing, "draw_scene", spy)
    seen = {}
    for make in (samples.pairs, samples.captions, samples.pictures):
        for split in ("train",) if make is samples.pairs else ("train", "new", "combination"):
            drawn.clear()
            make(["set"], 0, 0, 150, **({} if make is samples.pairs else {"split": split}))
            assert len(drawn) == 150
            seen[make.__name__, split] = {caption(scene) for scene in drawn}
            held = [{(o.colour, o.shape) for o in scene.objects} & HELD_OUT_PAIRS for scene in drawn]
            assert all(held) if split == "combination" else not any(held)
    train = seen["pairs", "train"] | seen["captions", "train"] | seen["pictures", "train"]
    for (_, split), captions in seen.items():
        assert split == "train" or not captions & train


def test_pictures_have_colours_where_their_captions_name_them(made):
    for sample in read(made, "image_pairs"):
        pixels = np.asarray(load_image(sample.members["png"]).convert("RGB")).astype(int)
        coloured = (pixels.max(2) - pixels.min(2)).max() > 0
        assert coloured == any(colour in sample.text("txt").split() for colour in COLOURS)


def test_combination_questions_ask_for_a_held_out_object(made):
    named = 0
    pairs = {f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS}
    for sample in read(made, "image_questions_combinations"):
        content = sample.json()
        question, answer = (message.text for message in dialog_sample(sample))
        named += any(pair in f"{question} {answer}" for pair in pairs)
        assert content["kind"] not in ("word", "count")
    assert named > 5


def test_new_clips_and_documents_are_in_no_training_set(made):
    for name in ("video_captions", "text_pretrain"):
        train, new = ({s.text() for s in read(made, f"{name}{end}")} for end in ("", "_new"))
        assert new
        assert not train & new


def test_the_held_out_voice_speaks_in_test_sets_alone(made):
    training = {voice.name for voice in TRAINING_VOICES}
    for name in SPEECH:
        voices = {sample.json()["voice"] for sample in read(made, name)}
        if "heldout" in name:
            assert voices == {HELD_OUT_VOICE.name}
        else:
            assert voices <= training
            assert len(voices) > 8


def test_held_out_facts_are_asked_in_the_test_set_alone(made):
    held = {phrasing for fact in facts() if fact.held_out for phrasing in fact.phrasings}
    for name in ("spoken_questions", "speech_transcripts"):
        assert not held & {sample.text() for sample in read(made, name)}
    test = read(made, "spoken_questions_heldout_voice")
    assert 0 < sum(sample.json()["new_fact"] for sample in test) < len(test)
    for sample in test:
        assert (sample.text() in held) == sample.json()["new_fact"]


def test_bytes_depend_on_the_seed_alone_and_worker_processes_change_nothing(made, tmp_path):
    only = ["image_captions", "video_captions", "speech_transcripts", "text_dialogs"]
    built = build(tmp_path / "two", SetSizes(**SIZES), seed=3, workers=2, only=only)
    assert set(only) < set(built)  # sets of one group come together
    again = digests(tmp_path / "two")
    assert {path.split("/")[0] for path in again} == set(built)
    assert again.items() <= digests(made).items()
    build(tmp_path / "other", SetSizes(**SIZES), seed=4, workers=0, only=["text_dialogs"])
    other = digests(tmp_path / "other")["text_dialogs/000000.tar"]
    assert other != digests(made)["text_dialogs/000000.tar"]


def test_a_build_is_resumed_set_by_set(tmp_path):
    sizes = SetSizes(**SIZES)
    only = ["text_dialogs_new", "image_questions_combinations"]
    first = build(tmp_path, sizes, workers=0, only=only)
    assert set(first) == set(only)
    tars = {name: tmp_path / name / "000000.tar" for name in only}
    before = digests(tmp_path)
    times = {name: path.stat().st_mtime_ns for name, path in tars.items()}
    # as if it had been killed while it wrote the second set
    (tmp_path / only[1] / "manifest.json").unlink()
    tars[only[1]].write_bytes(b"torn")
    seen = []
    again = build(tmp_path, sizes, workers=0, only=only, progress=lambda *state: seen.append(state))
    assert digests(tmp_path) == before
    assert tars[only[0]].stat().st_mtime_ns == times[only[0]]
    assert "seconds" not in again[only[0]]
    assert "seconds" in again[only[1]]
    assert seen == [(only[1], 25, 25)]


def test_mistakes_are_named(tmp_path):
    build(tmp_path, SetSizes(**SIZES), workers=0, only=["text_dialogs_new"])
    with pytest.raises(ValueError, match="text_dialogs_new was built with seed 0, now 1 is asked for"):
        build(tmp_path, SetSizes(**SIZES), seed=1, workers=0, only=["text_dialogs_new"])
    with pytest.raises(ValueError, match="no set is named nonsense"):
        build(tmp_path, only=["nonsense"])
    with pytest.raises(ValueError, match="clips must be at least 1"):
        SetSizes(clips=0)
