"""Made clips: one to three shapes, of which one crosses the picture, or two do so in turn; between movements all
rest.

Every clip is as likely as the same clip played backwards, so no single frame says which way anything goes, and
objects that stay look like those that move. Drawing and encoding are in `herdkit.data.synthetic.drawing` and
`herdkit.data.synthetic.encoding`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from .scenes import SceneObject, reference
from .words import ALL_PAIRS, COLOURS, PLACE_NAMES, PLACES, SHAPES, SIZES, TRAINING_PAIRS, Question, listed

Split = Literal["train", "new", "text", "text new"]
"""As for pictures, `herdkit.data.synthetic.scenes.Split`."""

_DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))
_MOVING = 0.12
"""Share of the clip's time that a movement takes."""
_MIDDLES = {1: ((0.3, 0.7),), 2: ((0.25, 0.35), (0.65, 0.75))}
"""The range of the middle of each movement, by their number; the clip backwards has the same."""


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Object `index` crosses the grid, from its own cell to the far side.

    Args:
        index: of the object.
        direction: (columns, rows) of a step, one of them 0, the other -1 or 1.
        middle: when half of the way is done, as a share of the clip's time.
    """

    index: int
    direction: tuple[int, int]
    middle: float


@dataclass(frozen=True, kw_only=True)
class MovingScene:
    """Args:
    objects: where each stands at the start, in reading order.
    movements: one or two, in order of time, of different objects.
    """

    objects: tuple[SceneObject, ...]
    movements: tuple[Movement, ...]

    def held_out(self) -> bool:
        """Whether the clip is one of the tenth that no training set shows (by a hash of its caption)."""
        return zlib.crc32(caption(self).encode()) % 10 == 0

    def positions(self, time: float) -> list[tuple[float, float]]:
        """(column, row) of each object, in cells, at a time from 0 to 1."""
        places = [(float(o.column), float(o.row)) for o in self.objects]
        for movement in self.movements:
            done = min(max((time - movement.middle) / _MOVING + 0.5, 0.0), 1.0)
            dx, dy = movement.direction
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
    for index, (earliest, latest) in zip(rng.sample(range(count), movers), _MIDDLES[movers], strict=True):
        dx, dy = rng.choice(_DIRECTIONS)
        row, column = cells[index]
        path = [(row + k * dy, column + k * dx) for k in (1, 2)]
        if any(not (0 <= r < 3 and 0 <= c < 3) or (r, c) in occupied for r, c in path):
            return None
        occupied[index] = path[-1]
        movements.append(Movement(index=index, direction=(dx, dy), middle=round(rng.uniform(earliest, latest), 3)))
    return MovingScene(objects=tuple(objects), movements=tuple(movements))


def reverse(clip: MovingScene) -> MovingScene:
    """The clip played backwards."""
    ends = clip.positions(1.0)
    order = sorted(range(len(ends)), key=lambda i: (ends[i][1], ends[i][0]))
    return MovingScene(
        objects=tuple(replace(clip.objects[i], column=round(ends[i][0]), row=round(ends[i][1])) for i in order),
        movements=tuple(
            Movement(
                index=order.index(m.index),
                direction=(-m.direction[0], -m.direction[1]),
                middle=round(1 - m.middle, 3),
            )
            for m in reversed(clip.movements)
        ),
    )


def caption(clip: MovingScene) -> str:
    """ "the red circle goes from the top left to the top right, then the blue square goes from the bottom left to the
    top left while the green star stays in the middle"."""
    moved = ", then ".join(statement(clip, movement) for movement in clip.movements)
    still = [f"the {o.name} stays {o.where}" for o in _still(clip)]
    return moved + (f" while {listed(still)}" if still else "")


def statement(clip: MovingScene, movement: Movement) -> str:
    """ "the red circle goes from the middle left to the middle right"."""
    return f"the {clip.objects[movement.index].name} goes from {_path(clip, movement)}"


def questions(clip: MovingScene, rng: Random) -> list[Question]:
    """One question of every kind that the clip answers without doubt, in random order."""
    asked = [kind(clip, rng) for kind in _KINDS]
    found = [question for question in asked if question is not None]
    rng.shuffle(found)
    return found


def lesson(clip: MovingScene, rng: Random, count: int = 8) -> list[Question]:
    """Questions to learn from, in random order. Which object moves is what takes a small model longest, so of these
    there is one on every movement; the others take turns."""
    asked = [kind(clip, rng, movement) for kind in _LEARNED_LATE for movement in clip.movements]
    late = [question for question in asked if question is not None]
    others = [question for question in questions(clip, rng) if question.kind not in {one.kind for one in late}]
    chosen = [*late, *others][:count]
    return rng.sample(chosen, len(chosen))


def _path(clip: MovingScene, movement: Movement) -> str:
    start = clip.objects[movement.index]
    return _path_between(start.column, start.row, movement.direction)


def _path_between(column: int, row: int, direction: tuple[int, int]) -> str:
    dx, dy = direction
    return f"the {PLACES[row][column]} to the {PLACES[row + 2 * dy][column + 2 * dx]}"


_PATHS = tuple(
    _path_between(column, row, (dx, dy))
    for row in range(3)
    for column in range(3)
    for dx, dy in _DIRECTIONS
    if 0 <= column + 2 * dx < 3 and 0 <= row + 2 * dy < 3
)


def _still(clip: MovingScene) -> list[SceneObject]:
    moving = {m.index for m in clip.movements}
    return [o for i, o in enumerate(clip.objects) if i not in moving]


def _one_movement(
    clip: MovingScene, rng: Random, movement: Movement | None = None
) -> tuple[SceneObject, Movement, str]:
    """An object, its movement, by default any, and the words that tell it apart: "moves", "moves first" or "moves
    last"."""
    order = rng.randrange(len(clip.movements)) if movement is None else clip.movements.index(movement)
    words = "moves" if len(clip.movements) == 1 else ("moves first", "moves last")[order]
    movement = clip.movements[order]
    return clip.objects[movement.index], movement, words


def _mover(clip: MovingScene, rng: Random, movement: Movement | None = None) -> Question | None:
    """The answer says "first" or "last" next to the object that it has to find, as in `scenes.questions` the place."""
    if len(clip.objects) == 1:  # any single frame would do
        return None
    one, _, words = _one_movement(clip, rng, movement)
    order = words.partition(" ")[2]
    form = rng.choice(("which object {}", "what {}", "what is the object that {}"))
    return Question(
        kind="mover",
        question=form.format(words),
        answer=one.name,
        choices=tuple(o.name for o in clip.objects),
        form=f"{order} the {{}} moves" if order else "the object that moves is the {}",
    )


def _stays(clip: MovingScene, rng: Random) -> Question | None:
    still = _still(clip)
    if len(still) != 1:
        return None
    form = rng.choice(("which object stays", "what stays", "what is the object that stays"))
    return Question(
        kind="stays",
        question=form,
        answer=still[0].name,
        choices=tuple(o.name for o in clip.objects),
        form="the object that stays is the {}",
    )


def _movement(clip: MovingScene, rng: Random) -> Question | None:
    one, movement, _ = _one_movement(clip, rng)
    form = rng.choice(("where does the {} go", "where does the {} move", "from where to where does the {} go"))
    name = reference(clip.objects, one, rng)
    return Question(
        kind="movement",
        question=form.format(name),
        answer=_path(clip, movement),
        choices=_PATHS,
        form=f"the {name} goes from {{}}",
    )


def _place(clip: MovingScene, rng: Random) -> Question | None:
    """Of any object, so that whether it moves is not known beforehand."""
    index = rng.randrange(len(clip.objects))
    time, when, forms = rng.choice(
        (
            (0.0, "at the start", ("where is the {} at the start", "where is the {} at first")),
            (1.0, "at the end", ("where is the {} at the end", "where does the {} end")),
        )
    )
    name = reference(clip.objects, clip.objects[index], rng)
    column, row = map(round, clip.positions(time)[index])
    return Question(
        kind=f"place {when}",
        question=rng.choice(forms).format(name),
        answer=PLACES[row][column],
        choices=PLACE_NAMES,
        form=f"{when} the {name} is {{}}",
    )


def _happens(clip: MovingScene, rng: Random, movement: Movement | None = None) -> Question | None:
    if len(clip.objects) == 1:
        return None
    _, movement, words = _one_movement(clip, rng, movement)
    order = words.partition(" ")[2]
    return Question(
        kind="happens",
        question=f"what happens {order}".strip(),
        answer=statement(clip, movement),
        choices=tuple(f"the {o.name} goes from {path}" for o in clip.objects for path in _PATHS),
        form=f"{order} {{}}".strip(),
    )


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


def _attribute(clip: MovingScene, rng: Random, movement: Movement | None = None) -> Question | None:
    one, _, words = _one_movement(clip, rng, movement)
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


_LEARNED_LATE = (_mover, _happens, _attribute)
_KINDS: tuple[Callable[..., Question | None], ...] = (
    _mover,
    _stays,
    _movement,
    _place,
    _happens,
    _count,
    _attribute,
)
