"""Made clips: one to three shapes, of which one moves straight across the picture, or two do so in turn.

Every clip is as likely as the same clip played backwards, so no single frame from the middle of a movement says
which way it goes, and objects that stay look like those that move. Drawing and encoding are in
`herdkit.data.synthetic.drawing` and `herdkit.data.synthetic.encoding`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from .scenes import SceneObject, reference
from .words import ALL_PAIRS, COLOURS, DIRECTIONS, SHAPES, SIZES, TRAINING_PAIRS, Question, listed

Split = Literal["train", "new", "text", "text new"]
"""As for pictures, `herdkit.data.synthetic.scenes.Split`."""

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Object `index` crosses the grid in `direction`, from its own cell to the far side."""

    index: int
    direction: str


@dataclass(frozen=True, kw_only=True)
class MovingScene:
    """Args:
    objects: where each stands at the start, in reading order.
    movements: one or two, in order of time, of different objects; they share the clip's time equally.
    """

    objects: tuple[SceneObject, ...]
    movements: tuple[Movement, ...]

    def held_out(self) -> bool:
        """Whether the clip is one of the tenth that no training set shows (by a hash of its caption)."""
        return zlib.crc32(caption(self).encode()) % 10 == 0

    def positions(self, time: float) -> list[tuple[float, float]]:
        """(column, row) of each object, in cells, at a time from 0 to 1."""
        places = [(float(o.column), float(o.row)) for o in self.objects]
        share = 1 / len(self.movements)
        for order, movement in enumerate(self.movements):
            done = min(max((time - order * share) / share, 0.0), 1.0)
            dx, dy = _STEPS[movement.direction]
            column, row = places[movement.index]
            places[movement.index] = (column + 2 * done * dx, row + 2 * done * dy)
        return places


def sample_clip(rng: Random, split: Split = "train") -> MovingScene:
    """A random moving scene of a split."""
    pairs = TRAINING_PAIRS if split in ("train", "new") else ALL_PAIRS
    count = rng.choices((1, 2, 3), weights=(1, 4, 3))[0]
    movers = 1 if count == 1 or rng.random() < 0.5 else 2
    while True:
        clip = _sample(rng, pairs, count, movers)
        if clip is not None and clip.held_out() == (split in ("new", "text new")):
            return clip


def _sample(rng: Random, pairs: Sequence[tuple[str, str]], count: int, movers: int) -> MovingScene | None:
    """None where objects would leave the picture or run into each other."""
    cells = sorted((row, column) for column, row in rng.sample([(c, r) for c in range(3) for r in range(3)], count))
    objects = [
        SceneObject(colour=colour, shape=shape, size=rng.choice(SIZES), row=row, column=column)
        for (row, column), (colour, shape) in zip(cells, rng.sample(pairs, count), strict=True)
    ]
    movements = []
    occupied = list(cells)
    for index in rng.sample(range(count), movers):
        direction = rng.choice(DIRECTIONS)
        dx, dy = _STEPS[direction]
        row, column = cells[index]
        path = [(row + k * dy, column + k * dx) for k in (1, 2)]
        if any(not (0 <= r < 3 and 0 <= c < 3) or (r, c) in occupied for r, c in path):
            return None
        occupied[index] = path[-1]
        movements.append(Movement(index=index, direction=direction))
    return MovingScene(objects=tuple(objects), movements=tuple(movements))


def reverse(clip: MovingScene) -> MovingScene:
    """The clip played backwards."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    ends = clip.positions(1.0)
    order = sorted(range(len(ends)), key=lambda i: (ends[i][1], ends[i][0]))
    return MovingScene(
        objects=tuple(replace(clip.objects[i], column=round(ends[i][0]), row=round(ends[i][1])) for i in order),
        movements=tuple(
            Movement(index=order.index(m.index), direction=opposite[m.direction]) for m in reversed(clip.movements)
        ),
    )


def caption(clip: MovingScene) -> str:
    """ "the red circle moves right, then the blue square moves up while the green star stays"."""
    moved = ", then ".join(f"the {clip.objects[m.index].name} moves {m.direction}" for m in clip.movements)
    still = [f"the {o.name}" for o in _still(clip)]
    return moved + (f" while {listed(still)} {'stays' if len(still) == 1 else 'stay'}" if still else "")


def questions(clip: MovingScene, rng: Random) -> list[Question]:
    """One question of every kind that the clip answers without doubt, in random order."""
    asked = [kind(clip, rng) for kind in _KINDS]
    found = [question for question in asked if question is not None]
    rng.shuffle(found)
    return found


def _still(clip: MovingScene) -> list[SceneObject]:
    moving = {m.index for m in clip.movements}
    return [o for i, o in enumerate(clip.objects) if i not in moving]


def _one_movement(clip: MovingScene, rng: Random) -> tuple[SceneObject, Movement, str]:
    """An object, its movement, and the words that tell it apart: "moves", "moves first" or "moves last"."""
    order = rng.randrange(len(clip.movements))
    words = "moves" if len(clip.movements) == 1 else ("moves first", "moves last")[order]
    movement = clip.movements[order]
    return clip.objects[movement.index], movement, words


def _mover(clip: MovingScene, rng: Random) -> Question | None:
    if len(clip.objects) == 1:  # any single frame would do
        return None
    one, _, words = _one_movement(clip, rng)
    form = rng.choice(("which object {}", "what {}", "what is the object that {}"))
    names = tuple(o.name for o in clip.objects)
    return Question(
        kind="mover",
        question=form.format(words),
        answer=one.name,
        choices=names,
        form=f"the object that {words} is the {{}}",
    )


def _direction(clip: MovingScene, rng: Random) -> Question | None:
    one, movement, words = _one_movement(clip, rng)
    name = f"the {reference(clip.objects, one, rng)}"
    if rng.random() < 0.3:
        name = f"the object that {words}"
    form = rng.choice(("which way does {} move", "where does {} move", "in which direction does {} move"))
    if "object" in name:
        form = rng.choice(("which way does {} go", "where does {} go", "in which direction does {} go"))
    sentence = f"{name} {'goes' if 'object' in name else 'moves'} {{}}"
    return Question(
        kind="direction",
        question=form.format(name),
        answer=movement.direction,
        choices=DIRECTIONS,
        form=sentence,
    )


def _happens(clip: MovingScene, rng: Random) -> Question | None:
    if len(clip.objects) == 1:
        return None
    one, _, words = _one_movement(clip, rng)
    question = f"what happens {words.partition(' ')[2]}".strip()
    sentences = tuple(f"the {o.name} moves" for o in clip.objects)
    return Question(kind="happens", question=question, answer=f"the {one.name} moves", choices=sentences)


def _count(clip: MovingScene, rng: Random) -> Question | None:
    if len(clip.objects) == 1:
        return None
    form = rng.choice(("how many objects move", "how many things move", "count the objects that move"))
    return Question(
        kind="count movers",
        question=form,
        answer=("one", "two")[len(clip.movements) - 1],
        choices=("one", "two"),
    )


def _attribute(clip: MovingScene, rng: Random) -> Question | None:
    one, _, words = _one_movement(clip, rng)
    attribute = rng.choice(("colour", "shape"))
    values = {getattr(o, attribute) for o in clip.objects}
    if len(values) < len(clip.objects) or len(values) == 1:
        return None
    form = rng.choice(("what {} is the object that {}", "which {} {}"))
    return Question(
        kind=f"mover's {attribute}",
        question=form.format(attribute, words),
        answer=getattr(one, attribute),
        choices=tuple(COLOURS) if attribute == "colour" else SHAPES,
        form=f"the object that {words} is {'' if attribute == 'colour' else 'a '}{{}}",
    )


def _moves(clip: MovingScene, rng: Random) -> Question | None:
    still = _still(clip)
    if not still:
        return None
    if rng.random() < 0.5:
        one, answer = _one_movement(clip, rng)[0], "yes"
    else:
        one, answer = rng.choice(still), "no"
    name = reference(clip.objects, one, rng)
    return Question(kind="moves", question=f"does the {name} move", answer=answer, choices=("yes", "no"))


def _before(clip: MovingScene, rng: Random) -> Question | None:
    if len(clip.movements) == 1:
        return None
    first, last = (reference(clip.objects, clip.objects[m.index], rng) for m in clip.movements)
    answer, words = rng.choice((("yes", "before"), ("no", "after")))
    if rng.random() < 0.5:
        first, last, answer = last, first, "no" if answer == "yes" else "yes"
    return Question(
        kind="before",
        question=f"does the {first} move {words} the {last}",
        answer=answer,
        choices=("yes", "no"),
    )


_KINDS: tuple[Callable[..., Question | None], ...] = (
    _mover,
    _direction,
    _happens,
    _count,
    _attribute,
    _moves,
    _before,
)
