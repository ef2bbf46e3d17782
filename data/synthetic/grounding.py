"""Made scenes with what stands where: boxes as numbers in the text, and marks drawn on the picture and cited (section
7.1.1: visual grounding in the annealing set, in both encodings of the paper)."""

from __future__ import annotations

from random import Random
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .drawing import Box, draw_scene
from .encoding import png
from .scenes import Split, sample_scene
from .words import with_article

BOX = "<box>{}, {}, {}, {}</box>"
"""Left, top, right, bottom as shares of the picture's sides, with two decimals. The paper puts them between special
tokens and names neither these nor the precision."""


def box_text(box: Box, size: tuple[int, int]) -> str:
    """A box in pixels as text, of a picture of `size` (width, height)."""
    shares = (value / side for value, side in zip(box, (*size, *size), strict=True))
    return BOX.format(*(f"{share:.2f}" for share in shares))


def parse_boxes(text: str) -> list[tuple[float, float, float, float]]:
    """The boxes that stand in a text, as shares; what is no box is left out."""
    found = []
    for piece in text.split("<box>")[1:]:
        values = piece.partition("</box>")[0].split(",")
        try:
            left, top, right, bottom = map(float, values)
        except ValueError:
            continue
        found.append((left, top, right, bottom))
    return found


def marked(picture: Image.Image, boxes: list[Box]) -> Image.Image:
    """A copy with a frame around each box and its number, from 1, at its upper left."""
    copy = picture.copy()
    draw = ImageDraw.Draw(copy)
    font = ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans-Bold.ttf", 11)
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=(255, 0, 255))
        x, y = max(left - 2, 0), max(top - 13, 0)
        draw.rectangle((x, y, x + 9, y + 12), fill=(255, 0, 255))
        draw.text((x + 5, y + 6), str(number), fill="white", font=font, anchor="mm")
    return copy


def sample(seed: int, index: int, split: Split = "train") -> dict[str, Any]:
    """The members of one sample: a scene, and a dialog that asks where something is, what is in a box, or what a drawn
    mark shows. It depends on the arguments alone."""
    rng = Random(f"{seed}/grounding/{split}/{index}")
    scene = sample_scene(rng, split)
    boxes: list[Box] = []
    picture = draw_scene(scene, rng, boxes)
    number = rng.randrange(len(boxes))
    name, box = scene.objects[number].name, box_text(boxes[number], picture.size)
    kind = ("where", "what", "mark")[index % 3]
    if kind == "where":
        asked, said = f"where is the {name}", f"the {name} is at {box}"
    elif kind == "what":
        asked, said = f"what is at {box}", with_article(name)
    else:
        order = rng.sample(range(len(boxes)), len(boxes))
        picture = marked(picture, [boxes[i] for i in order])
        asked = f"what is mark {order.index(number) + 1}"
        said = f"mark {order.index(number) + 1} is the {name}"
    user = {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": asked}]}
    return {"png": png(picture), "json": {"messages": [user, {"role": "assistant", "content": said}], "kind": kind}}
