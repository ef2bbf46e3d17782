"""Makes the samples of the sets: what `herdkit.data.synthetic.sets` calls in its worker processes.

Every function takes the names of the sets, a seed and the range of indices to make; what it makes depends on
nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Any, Literal

import numpy as np

from . import clips, drawing, encoding, scenes, speech, texts
from .english import is_held_out
from .espeak import Espeak
from .facts import facts
from .words import Question

Made = tuple[str, str, dict[str, Any]]
"""Set, key and members of a sample."""
Split = Literal["train", "new", "combination"]

Part = dict[str, str]
_CLIP_SECONDS = 2
_SOUND_RATE = 16000


def _rng(seed: int, *names: str | int) -> Random:
    return Random("/".join(map(str, (seed, *names))))


def _user(*parts: Part | str) -> dict[str, Any]:
    """A message whose parts are media or text; plain text where it is alone."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    typed = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": typed}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _media(kind: str, member: str) -> Part:
    return {"type": kind, kind: member}


def _asked(questions: Sequence[Question], medium: Part, rng: Random) -> list[dict[str, Any]]:
    messages = []
    for question in questions:
        text = texts.typed(question.question, rng)
        messages += [_user(text) if messages else _user(medium, text), _assistant(question.sentence)]
    return messages


def _of(question: Question) -> dict[str, Any]:
    return {"kind": question.kind, "choices": question.sentences}


def english(sets: Sequence[str], seed: int, start: int, stop: int) -> list[Made]:
    """`stop` is the number of bytes; the seed plays no part."""
    train, new = sets
    documents = texts.english_documents(stop)
    return [(new if is_held_out(i) else train, f"{i:06d}", {"txt": text}) for i, text in enumerate(documents)]


def recitations(sets: Sequence[str], seed: int, start: int, stop: int) -> list[Made]:
    rng = _rng(seed, "recitations", start)
    return [(sets[0], f"{index:06d}", {"txt": texts.recitation(rng)}) for index in range(start, stop)]


def dialogues(sets: Sequence[str], seed: int, start: int, stop: int) -> list[Made]:
    made = texts.dialogues(_rng(seed, "dialogues", start), stop - start)
    return [(sets[0], f"{start + i:06d}", {"json": {"messages": messages}}) for i, messages in enumerate(made)]


def new_dialogues(sets: Sequence[str], seed: int, start: int, stop: int) -> list[Made]:
    made = []
    for index in range(start, stop):
        messages, question = texts.new_question(_rng(seed, "new dialogue", index))
        made.append((sets[0], f"{index:06d}", {"json": {"messages": messages, **_of(question)}}))
    return made


def pairs(sets: Sequence[str], seed: int, start: int, stop: int) -> list[Made]:
    """Pictures with captions that leave much out, for contrastive training. Where the caption is silent about
    colours the picture has none: shapes are then learned apart from the colours that they are seen in."""
    made: list[Made] = []
    for index in range(start, stop):
        rng = _rng(seed, "pair", index)
        scene = scenes.sample_scene(rng)
        picture, mentioned = drawing.draw_scene(scene, rng), scenes.some_attributes(rng)
        if "colour" not in mentioned:
            picture = picture.convert("L")
        members = {"png": encoding.png(picture), "txt": scenes.caption(scene, mentioned)}
        made.append((sets[0], f"{index:06d}", members))
    return made


def captions(sets: Sequence[str], seed: int, start: int, stop: int, *, split: Split) -> list[Made]:
    """Captioned pictures. Most dialogs want a sentence on every object, some the caption."""
    made: list[Made] = []
    for index in range(start, stop):
        rng = _rng(seed, "caption", split, index)
        scene = scenes.sample_scene(rng, split)
        png, medium = encoding.png(drawing.draw_scene(scene, rng)), _media("image", "png")
        caption = scenes.caption(scene)
        if rng.random() < 0.7:
            messages = [_user(medium, texts.DESCRIBE_OBJECTS), _assistant(scenes.statements(scene, rng))]
        else:
            messages = _captioned(medium, caption, texts.DESCRIBE_PICTURE, rng)
        made.append((sets[0], f"{index:06d}", {"png": png, "txt": caption, "json": {"messages": messages}}))
    return made


def pictures(sets: Sequence[str], seed: int, start: int, stop: int, *, split: Split) -> list[Made]:
    """Pictures with questions; for "combination" on held-out pairs alone."""
    made: list[Made] = []
    for index in range(start, stop):
        rng = _rng(seed, "picture", split, index)
        scene = scenes.sample_scene(rng, split)
        png = encoding.png(drawing.draw_scene(scene, rng))
        about = rng.choice(scenes.held_out_objects(scene)) if split == "combination" else None
        medium = _media("image", "png")
        if split == "train":
            questioned: dict[str, Any] = {"messages": _asked(scenes.lesson(scene, rng), medium, rng)}
        else:
            questioned = _tested(scenes.questions(scene, rng, about), medium, rng)
        made.append((sets[0], f"{index:06d}", {"png": png, "json": questioned}))
    return made


def _captioned(medium: Part, caption: str, instruction: str, rng: Random) -> list[dict[str, Any]]:
    """A dialog that asks for the caption, half of the time without a word."""
    user = _user(medium) if rng.random() < 0.5 else _user(medium, instruction)
    return [user, _assistant(caption)]


def _tested(asked: list[Question], medium: Part, rng: Random) -> dict[str, Any]:
    """A dialog of the first question, and what it takes to mark the answer."""
    return {"messages": _asked(asked[:1], medium, rng), **_of(asked[0])}


def videos(sets: Sequence[str], seed: int, start: int, stop: int, *, split: Literal["train", "new"]) -> list[Made]:
    caption_set, question_set = sets
    made: list[Made] = []
    for index in range(start, stop):
        rng = _rng(seed, "clip", split, index)
        clip = clips.sample_clip(rng, split)
        rate = 8 if rng.random() < 0.8 else rng.choice((6, 10, 12, 24))
        container = "mp4" if rng.random() < 0.75 else "webm"
        frames = drawing.draw_clip(clip, rate * _CLIP_SECONDS, rng)
        data = encoding.video(frames, Fraction(rate), container, _sound(rng))
        medium, key = _media("video", container), f"{index:06d}"
        caption = clips.caption(clip)
        messages = _captioned(medium, caption, texts.DESCRIBE_CLIP, rng)
        made.append((caption_set, key, {container: data, "txt": caption, "json": {"messages": messages}}))
        if split == "train":
            questioned: dict[str, Any] = {"messages": _asked(clips.lesson(clip, rng), medium, rng)}
        else:
            questioned = _tested(clips.questions(clip, rng), medium, rng)
        made.append((question_set, key, {container: data, "json": questioned}))
    return made


def _sound(rng: Random) -> np.ndarray | None:
    """Mostly no sound track; else silence or a tone, which mean nothing."""
    if rng.random() < 0.92:
        return None
    time = np.arange(_CLIP_SECONDS * _SOUND_RATE) / _SOUND_RATE
    return np.sin(2 * np.pi * rng.uniform(200, 800) * time) * rng.choice((0.0, 0.1))


def transcripts(sets: Sequence[str], seed: int, start: int, stop: int, *, split: Literal["train", "new"]) -> list[Made]:
    """Spoken dictations to train on, and plain sentences in the held-out voice to test with."""
    made: list[Made] = []
    with Espeak() as espeak:
        for index in range(start, stop):
            rng = _rng(seed, "sentence", split, index)
            text = texts.dictation(rng) if split == "train" else texts.sentence(rng)
            flac, voice = _spoken(espeak, text, split, rng)
            messages = [
                {"role": "system", "content": texts.COPY_PROMPT},
                _user(_media("audio", "flac")),
                _assistant(text),
            ]
            content = {"messages": messages, "voice": voice}
            made.append((sets[0], f"{index:06d}", {"flac": flac, "txt": text, "json": content}))
    return made


def spoken_questions(
    sets: Sequence[str], seed: int, start: int, stop: int, *, split: Literal["train", "new"]
) -> list[Made]:
    """Spoken facts. In the test set every second one is a fact that no training speech asks: `new_fact`."""
    known = [fact for fact in facts() if not fact.held_out]
    new = [fact for fact in facts() if fact.held_out]
    made: list[Made] = []
    with Espeak() as espeak:
        for index in range(start, stop):
            rng = _rng(seed, "spoken question", split, index)
            fact = rng.choice(new if split == "new" and index % 2 else known)
            text = rng.choice(fact.phrasings)
            flac, voice = _spoken(espeak, text, split, rng)
            content = {
                "messages": [_user(_media("audio", "flac")), _assistant(fact.answer)],
                "kind": fact.kind,
                "choices": fact.choices,
                "voice": voice,
                "new_fact": fact.held_out,
            }
            made.append((sets[0], f"{index:06d}", {"flac": flac, "txt": text, "json": content}))
    return made


def two_senses(sets: Sequence[str], seed: int, start: int, stop: int, *, split: Literal["train", "new"]) -> list[Made]:
    """A picture and a spoken question about it; the test set has new pictures and the held-out voice."""
    made: list[Made] = []
    with Espeak() as espeak:
        for index in range(start, stop):
            rng = _rng(seed, "two senses", split, index)
            scene = scenes.sample_scene(rng, split)
            png = encoding.png(drawing.draw_scene(scene, rng))
            question = scenes.questions(scene, rng)[0]
            flac, voice = _spoken(espeak, question.question, split, rng)
            user = _user(_media("image", "png"), _media("audio", "flac"))
            content = {"messages": [user, _assistant(question.sentence)], **_of(question), "voice": voice}
            members = {"png": png, "flac": flac, "txt": question.question, "json": content}
            made.append((sets[0], f"{index:06d}", members))
    return made


def _spoken(espeak: Espeak, text: str, split: str, rng: Random) -> tuple[bytes, str]:
    voices = speech.TRAINING_VOICES if split == "train" else (speech.HELD_OUT_VOICE,)
    samples, voice = speech.speak(espeak, text, voices, rng)
    return encoding.flac(samples, speech.SAMPLE_RATE), voice
