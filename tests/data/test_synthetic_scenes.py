"""Made pictures: a reader that knows only the words must agree with them, and so must the pixels."""

import re
from collections import Counter
from random import Random

import numpy as np
import pytest
from herdkit.data.synthetic import scenes, words
from herdkit.data.synthetic.drawing import draw_scene

SPLITS = ("train", "new", "combination", "text", "text new")


def read_caption(text):
    """The objects (size, colour, shape, row, column) and the written word, from the words alone."""
    cells = {name: divmod(i, 3) for i, name in enumerate(words.PLACE_NAMES)}
    objects, word = [], None
    for phrase in re.split(r", | and ", text):
        if match := re.fullmatch(r"the word (\w+) at the (top|bottom)", phrase):
            word = match[1]
        else:
            match = re.fullmatch(r"an? (big|small) (\w+) (\w+) (?:at|in) the (.+)", phrase)
            objects.append((*match.groups()[:3], *cells[match[4]]))
    return objects, word


COMMON = {"the", "object", "a", "is", "at", "in", "word"}
"""Words of an answer's sentence that its question need not hold."""


def answer(question, objects, word):
    """A reader with rules of its own; the set of right answers."""
    numbers = ["zero", "one", "two", "three", "four"]

    def fitting(name):
        colour, shape = name.split() if " " in name else (None, name)
        found = [o for o in objects if o[2] == shape and colour in (None, o[1])]
        assert len(found) == 1, f"{name} is ambiguous"
        return found[0]

    def match(pattern):
        return re.fullmatch(pattern, question)

    if match(r".*\bword\b.*"):
        return {word}
    if match(r"how many objects (?:are there|do you see)|count the objects"):
        return {numbers[len(objects)]}
    if m := match(r"(?:how many|count the) (\w+?)(?: objects)?(?: are there| do you see)?"):
        value = m[1]
        singular = {"crosses": "cross"}.get(value, value.removesuffix("s"))
        return {numbers[sum(o[1] == value or o[2] == singular for o in objects)]}
    if m := match(r"(?:is the|what size is the|how big is the) (.+?)(?: big or small)?"):
        return {fitting(m[1])[0]}
    if m := match(r"(?:what colour is|which colour is|what is the colour of) the (\w+)"):
        return {fitting(m[1])[1]}
    if m := match(r"what shape is the (\w+) object|which shape is (\w+)|what is the (\w+) object"):
        (colour,) = [g for g in m.groups() if g]
        return {o[2] for o in objects if o[1] == colour}
    if m := match(r"(?:where is|where do you see|at which place is) the (.+)"):
        return {words.PLACES[fitting(m[1])[3]][fitting(m[1])[4]]}
    if m := match(r"(?:what|which object) (?:is|do you see) (?:at|in) the (.+)"):
        return {f"{o[1]} {o[2]}" for o in objects if words.PLACES[o[3]][o[4]] == m[1]}
    raise AssertionError(f"no rule reads {question!r}")


@pytest.mark.parametrize("split", SPLITS)
def test_questions_agree_with_a_reader_of_the_caption(split):
    rng = Random(split)
    kinds = Counter()
    for _ in range(150):
        scene = scenes.sample_scene(rng, split)
        objects, word = read_caption(scenes.caption(scene))
        assert word == scene.word
        about = rng.choice(scene.objects) if rng.random() < 0.3 else None
        for question in scenes.questions(scene, rng, about=about):
            assert answer(question.question, objects, word) == {question.answer}, question
            assert question.answer in question.choices
            assert question.sentence.split()[-1] == question.answer.split()[-1]
            assert set(question.form.replace("{}", "").split()) - COMMON <= set(question.question.split())
            assert len(set(question.choices)) == len(question.choices) > 1
            assert re.fullmatch(r"[a-z ]+", question.question)
            kinds[question.kind] += 1
    assert len(kinds) == 9
    assert min(kinds.values()) > 12


def test_splits_hold_what_they_promise():
    rng = Random(1)
    sampled = {split: [scenes.sample_scene(rng, split) for _ in range(700)] for split in SPLITS}
    contents = {split: {scenes.caption(scene) for scene in found} for split, found in sampled.items()}
    for new in ("new", "combination", "text new"):
        for train in ("train", "text"):
            assert not contents[new] & contents[train]
    for split in ("train", "new"):
        pairs = {(o.colour, o.shape) for scene in sampled[split] for o in scene.objects}
        assert pairs == set(words.TRAINING_PAIRS)
    for scene in sampled["combination"]:
        assert any((o.colour, o.shape) in words.HELD_OUT_PAIRS for o in scene.objects)


def test_held_out_pairs_leave_every_colour_and_shape_in_training():
    assert {c for c, _ in words.TRAINING_PAIRS} == set(words.COLOURS)
    assert {s for _, s in words.TRAINING_PAIRS} == set(words.SHAPES)
    assert len(words.HELD_OUT_PAIRS) == 6


def test_big_and_small_are_balanced():
    rng = Random(3)
    found = Counter()
    for _ in range(2000):
        for question in scenes.questions(scenes.sample_scene(rng), rng):
            if question.kind == "size":
                found[question.answer] += 1
    assert 0.85 < found["big"] / found["small"] < 1.18


def test_captions_mention_what_they_are_told_to_of_every_object():
    rng = Random(5)
    left_out = Counter()
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        chosen = scenes.some_attributes(rng)
        said = set(scenes.caption(scene, chosen).replace(",", "").split())
        for name, values in (("colour", words.COLOURS), ("shape", words.SHAPES), ("size", words.SIZES)):
            expected = {getattr(o, name) for o in scene.objects} if name in chosen else set()
            assert said & set(values) == expected
            left_out[name] += name not in chosen
        assert scene.word is None or scene.word in said
    assert 40 < left_out["shape"] < min(left_out["size"], left_out["colour"])
    assert max(left_out.values()) < 180


def test_statements_say_everything_of_every_object_and_name_it_without_doubt():
    rng = Random(6)
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        said = scenes.statements(scene, rng).split(". ")
        assert len(said) == len(scene.objects)
        found = set()
        for sentence in said:
            text = sentence.replace(",", "")
            (one,) = (
                o
                for o in scene.objects
                if {o.size, o.colour, o.shape, *o.place.split()} <= set(text.split())
                and text.rpartition("the ")[2] in (o.place, text.partition("the ")[2])
            )
            found.add(one)
            if key := re.match(r"the (\w+) object is", text):
                assert sum(o.colour == key[1] for o in scene.objects) == 1
            elif key := re.match(r"the (\w+) is", text):
                assert sum(o.shape == key[1] for o in scene.objects) == 1
        assert found == set(scene.objects)


def covered(picture):
    """Pixels that are clearly coloured, where ground and written words are near grey."""
    pixels = np.asarray(picture).astype(int)
    return (pixels.max(2) - pixels.min(2)) > 60


def components(mask):
    """Connected areas, each a list of (row, column)."""
    left = set(zip(*np.nonzero(mask), strict=True))
    found = []
    while left:
        stack, area = [left.pop()], []
        while stack:
            y, x = stack.pop()
            area.append((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(area)
    return found


@pytest.mark.parametrize("size", [(96, 96), (192, 96), (96, 192)])
def test_pixels_show_each_object_at_its_place_in_its_colour(size):
    rng = Random(str(size))
    names = list(words.COLOURS)
    palette = np.array(list(words.COLOURS.values()))
    for _ in range(60):
        cells = sorted(rng.sample([(r, c) for r in range(3) for c in range(3)], 3))
        objects = tuple(
            scenes.SceneObject(
                shape=rng.choice(words.SHAPES), colour=colour, size=rng.choice(words.SIZES), row=r, column=c
            )
            for (r, c), colour in zip(cells, rng.sample(names, 3), strict=True)
        )
        picture = draw_scene(scenes.Scene(objects=objects, size=size), rng)
        assert picture.size == size
        pixels = np.asarray(picture).astype(int)
        found = set()
        for area in components(covered(picture)):
            if len(area) < 12:
                continue
            y, x = np.mean(area, axis=0)
            colour = np.median([pixels[p] for p in area], axis=0)
            nearest = names[np.abs(palette - colour).sum(1).argmin()]
            found.add((nearest, int(3 * y / size[1]), int(3 * x / size[0])))
        touching = any(abs(a.row - b.row) + abs(a.column - b.column) == 1 for a in objects for b in objects)
        expected = {(o.colour, o.row, o.column) for o in objects}
        assert found == expected or (touching and len(found) < 3)


def test_shapes_and_sizes_are_told_apart_by_their_pixels():
    """Nearest mean picture, from other draws: what a linear probe could do at best."""
    rng = Random(4)

    def drawn(shape, size):
        one = scenes.SceneObject(shape=shape, colour=rng.choice(list(words.COLOURS)), size=size, row=1, column=1)
        mask = covered(draw_scene(scenes.Scene(objects=(one,)), rng)).astype(float)
        y, x = np.round(np.argwhere(mask).mean(0)).astype(int)
        return mask[y - 12 : y + 13, x - 12 : x + 13]

    kinds = [(shape, size) for shape in words.SHAPES for size in words.SIZES]
    means = {kind: np.mean([drawn(*kind) for _ in range(12)], axis=0) for kind in kinds}
    right = 0
    for kind in kinds:
        for _ in range(8):
            patch = drawn(*kind)
            right += min(means, key=lambda k: np.abs(means[k] - patch).sum()) == kind
    assert right >= 0.97 * 8 * len(kinds)


def test_written_words_are_drawn_and_differ():
    one = scenes.SceneObject(shape="circle", colour="red", size="big", row=1, column=1)
    rows = []
    for word in (None, *words.WRITTEN_WORDS):
        scene = scenes.Scene(objects=(one,), word=word, word_row=2)
        rows.append(np.asarray(draw_scene(scene, Random(0)).convert("L")).astype(int)[43:])
    ink = [np.abs(row - rows[0]) > 60 for row in rows[1:]]
    assert all(60 < mask.sum() < 500 for mask in ink)
    for i, mask in enumerate(ink):
        assert not mask[:, [0, 1, 2, -3, -2, -1]].any()  # it does not run out of the picture
        assert all((mask ^ other).sum() > 40 for other in ink[:i])


def test_same_seed_gives_the_same_picture():
    scene = scenes.sample_scene(Random(5))
    assert draw_scene(scene, Random(6)).tobytes() == draw_scene(scene, Random(6)).tobytes()
    assert draw_scene(scene, Random(6)).tobytes() != draw_scene(scene, Random(7)).tobytes()


def test_a_lesson_asks_what_is_hard_to_learn_and_no_question_twice():
    counts = 0
    for seed in range(200):
        scene = scenes.sample_scene(Random(seed), "train")
        asked = scenes.lesson(scene, Random(seed))
        kinds = [question.kind for question in asked]
        assert 5 <= len(asked) <= 7
        assert len({question.question for question in asked}) == len(asked)
        assert "object at" in kinds
        assert ("word" in kinds) == (scene.word is not None)
        counts += sum(kind.startswith("count ") for kind in kinds)
    assert counts > 1.7 * 200
    assert asked == scenes.lesson(scene, Random(199))
