"""Made pictures: a few coloured shapes on a 3 x 3 grid, sometimes with a written word, and questions on them.

A `Scene` is the truth; `caption`, `questions` and `draw_scene` (in `.drawing`) are views of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from .words import (
    ALL_PAIRS,
    COLOURS,
    HELD_OUT_PAIRS,
    NUMBERS,
    PAIR_NAMES,
    PLACE_NAMES,
    PLACES,
    SHAPES,
    SIZES,
    TRAINING_PAIRS,
    WRITTEN_WORDS,
    Question,
    listed,
    plural,
    with_article,
)

Split = Literal["train", "new", "combination", "text", "text new"]
"""Which scenes: those to train on; new ones of the same (colour, shape) pairs; new ones with at least one
held-out pair; and, for texts, ones of all pairs: to train on, and new. A language model knows the words "red star"
before it has seen one."""


SIDE = 96
"""Pixels of the side of a square picture."""


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    shape: str
    colour: str
    size: str
    column: int
    row: int

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def where(self) -> str:
        return f"{'in' if self.place == 'middle' else 'at'} the {self.place}"

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects in reading order, no two in one cell, no two of the same colour and shape.

    Args:
        objects: 1 to 4 objects.
        word: a written word that fills the row `word_row` (0 or 2), or None.
        size: (width, height) in pixels.
    """

    objects: tuple[SceneObject, ...]
    word: str | None = None
    word_row: int = 0
    size: tuple[int, int] = (SIDE, SIDE)

    def held_out(self) -> bool:
        """Whether the scene is one of the tenth that no training set shows (by a hash of its caption)."""
        return zlib.crc32(caption(self).encode()) % 10 == 0


def sample_scene(rng: Random, split: Split = "train") -> Scene:
    """A random scene of a split."""
    pairs = TRAINING_PAIRS if split in ("train", "new") else ALL_PAIRS
    while True:
        scene = _sample(rng, pairs)
        if scene.held_out() == (split not in ("train", "text")) and (split != "combination" or held_out_objects(scene)):
            return scene


def held_out_objects(scene: Scene) -> list[SceneObject]:
    """Those whose colour and shape no training picture shows together."""
    return [o for o in scene.objects if (o.colour, o.shape) in HELD_OUT_PAIRS]


def _sample(rng: Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    count = rng.choices((1, 2, 3, 4), weights=(3, 5, 4, 1))[0]
    word = rng.choice(WRITTEN_WORDS) if rng.random() < 0.25 else None
    word_row = rng.choice((0, 2)) if word else 0
    cells = [(row, column) for row in range(3) for column in range(3) if word is None or row != word_row]
    # Shapes and colours repeat often enough that counts above one are common.
    shapes, colours = (rng.sample(options, rng.choice((2, 3, 4, 6))) for options in (SHAPES, list(COLOURS)))
    chosen = [pair for pair in pairs if pair[0] in colours and pair[1] in shapes]
    if len(chosen) < count:
        chosen = list(pairs)
    objects = [
        SceneObject(colour=colour, shape=shape, size=rng.choice(SIZES), row=row, column=column)
        for (row, column), (colour, shape) in zip(
            sorted(rng.sample(cells, count)), rng.sample(chosen, count), strict=True
        )
    ]
    size = rng.choices(((SIDE, SIDE), (2 * SIDE, SIDE), (SIDE, 2 * SIDE)), weights=(18, 1, 1))[0]
    return Scene(objects=tuple(objects), word=word, word_row=word_row, size=size)


_ATTRIBUTES = ("size", "colour", "shape", "place")


def caption(scene: Scene, mentioned: Collection[str] = _ATTRIBUTES) -> str:
    """The scene in reading order: "a big red circle at the top left and a small green star in the middle".

    Args:
        mentioned: of size, colour, shape and place; without its shape, an object is an "object".
    """
    described = []
    for o in scene.objects:
        words = [o.size] * ("size" in mentioned) + [o.colour] * ("colour" in mentioned)
        phrase = with_article(" ".join([*words, o.shape if "shape" in mentioned else "object"]))
        described.append((o.row, f"{phrase} {o.where}" if "place" in mentioned else phrase))
    if scene.word is not None:
        described.append((scene.word_row, f"the word {scene.word} at the {('top', '', 'bottom')[scene.word_row]}"))
    return listed([phrase for _, phrase in sorted(described, key=lambda item: item[0])])


def some_attributes(rng: Random) -> list[str]:
    """At least one of what `caption` may mention: the shape mostly, each other one half of the time."""
    while not (chosen := [name for name in _ATTRIBUTES if rng.random() < (0.75 if name == "shape" else 0.5)]):
        pass
    return chosen


def statements(scene: Scene, rng: Random) -> str:
    """A sentence on each object in random order. Each first says which object it is about, by its place, colour,
    shape or name, and then the rest: to go on, one has to look that object up."""
    said = []
    for one in rng.sample(scene.objects, len(scene.objects)):
        ways = [
            f"{one.where} is {with_article(f'{one.size} {one.name}')}",
            f"the {one.name} is {one.size} and {one.where}",
        ]
        if sum(o.colour == one.colour for o in scene.objects) == 1:
            ways.append(f"the {one.colour} object is {with_article(f'{one.size} {one.shape}')} {one.where}")
        if sum(o.shape == one.shape for o in scene.objects) == 1:
            ways.append(f"the {one.shape} is {one.size}, {one.colour} and {one.where}")
        said.append(rng.choice(ways))
    return ". ".join(said)


def questions(scene: Scene, rng: Random, about: SceneObject | None = None) -> list[Question]:
    """One question of every kind that the scene answers without doubt, in random order.

    Args:
        about: if given, only questions whose subject this object is.
    """
    asked = [kind(scene, rng, about) for kind in _KINDS]
    found = [question for question in asked if question is not None]
    rng.shuffle(found)
    return found


def lesson(scene: Scene, rng: Random, count: int = 7) -> list[Question]:
    """Questions to learn from, in random order: always those of the kinds that take a small model longest, and of these
    two that count the objects of a shape or colour; the others take turns."""
    asked = questions(scene, rng)
    another = _count_some(scene, rng, None)
    if another is not None and all(another.question != question.question for question in asked):
        asked.append(another)
    asked.sort(key=lambda question: question.kind not in _LEARNED_LATE)
    return rng.sample(asked[:count], min(count, len(asked)))


def reference(scene_objects: Sequence[SceneObject], one: SceneObject, rng: Random) -> str:
    """Words that fit this object alone: "red star", or half of the time, where it is enough, "star"."""
    alone = sum(o.shape == one.shape for o in scene_objects) == 1
    return one.shape if alone and rng.random() < 0.5 else one.name


def _pick(options: Sequence[SceneObject], about: SceneObject | None, rng: Random) -> SceneObject | None:
    if about is not None:
        options = [o for o in options if o is about]
    return rng.choice(options) if options else None


def _colour(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    shapes = [o.shape for o in scene.objects]
    one = _pick([o for o in scene.objects if shapes.count(o.shape) == 1], about, rng)
    if one is None:
        return None
    form = rng.choice(("what colour is the {}", "which colour is the {}", "what is the colour of the {}"))
    return Question(
        kind="colour",
        question=form.format(one.shape),
        answer=one.colour,
        choices=tuple(COLOURS),
        form=f"the {one.shape} is {{}}",
    )


def _shape(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    colours = [o.colour for o in scene.objects]
    one = _pick([o for o in scene.objects if colours.count(o.colour) == 1], about, rng)
    if one is None:
        return None
    form = rng.choice(("what shape is the {} object", "which shape is {}", "what is the {} object"))
    return Question(
        kind="shape",
        question=form.format(one.colour),
        answer=one.shape,
        choices=SHAPES,
        form=f"the {one.colour} object is a {{}}",
    )


def _size(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    one = about or rng.choice(scene.objects)
    form = rng.choice(("is the {} big or small", "what size is the {}", "how big is the {}"))
    name = reference(scene.objects, one, rng)
    return Question(kind="size", question=form.format(name), answer=one.size, choices=SIZES, form=f"the {name} is {{}}")


def _position(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    """The answer names the place next to the object: with "at the" between them, a small model that has to look the
    place up takes that of another object in a quarter of the pictures."""
    one = about or rng.choice(scene.objects)
    form = rng.choice(("where is the {}", "where do you see the {}", "at which place is the {}"))
    name = reference(scene.objects, one, rng)
    return Question(
        kind="position",
        question=form.format(name),
        answer=one.place,
        choices=PLACE_NAMES,
        form=f"the {name} is {{}}",
    )


def _object_at(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    one = about or rng.choice(scene.objects)
    form = rng.choice(("what is {}", "what do you see {}", "which object is {}"))
    return Question(
        kind="object at",
        question=form.format(one.where),
        answer=one.name,
        choices=PAIR_NAMES,
        form=f"{one.where} is the {{}}",
    )


def _count(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    if about is not None:
        return None
    form = rng.choice(("how many objects are there", "how many objects do you see", "count the objects"))
    return Question(kind="count", question=form, answer=NUMBERS[len(scene.objects)], choices=NUMBERS[1:5])


def _count_some(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    """Objects of one shape or one colour; none of it in a fifth of the questions."""
    attribute = rng.choice(("shape", "colour"))
    values = list(SHAPES if attribute == "shape" else COLOURS)
    present = sorted({getattr(o, attribute) for o in scene.objects}, key=values.index)
    if about is not None:
        value = getattr(about, attribute)
    elif rng.random() < 0.2:
        value = rng.choice([v for v in values if v not in present])
    else:  # the more there are, the likelier the question, so that "one" is not always the answer
        tally = [sum(getattr(o, attribute) == v for o in scene.objects) for v in present]
        value = rng.choices(present, weights=[n**3 for n in tally])[0]
    many = sum(getattr(o, attribute) == value for o in scene.objects)
    things = plural(value) if attribute == "shape" else f"{value} objects"
    form = rng.choice(("how many {} are there", "how many {} do you see", "count the {}"))
    return Question(kind=f"count {attribute}", question=form.format(things), answer=NUMBERS[many], choices=NUMBERS[:5])


def _word(scene: Scene, rng: Random, about: SceneObject | None) -> Question | None:
    if scene.word is None or about is not None:
        return None
    form = rng.choice(("what word is written", "which word do you see", "what does the word say"))
    return Question(kind="word", question=form, answer=scene.word, choices=WRITTEN_WORDS, form="the word is {}")


_LEARNED_LATE = frozenset({"count shape", "count colour", "object at", "word"})
_KINDS: tuple[Callable[..., Question | None], ...] = (
    _colour,
    _shape,
    _size,
    _position,
    _object_at,
    _count,
    _count_some,
    _word,
)
