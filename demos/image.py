"""Ask a model about a picture.

python -m herdkit.demos.image runs/tiny-herd/model photo.jpg "what colour is the circle?" [looked.png]
"""

import sys

from .. import load


def main(model_directory: str, picture: str, question: str, map_file: str | None = None) -> None:
    model = load(model_directory, adapters=["image"])
    user = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}

    answer = ""
    for piece in model.stream_chat([user], max_new_tokens=64):
        print(piece, end="", flush=True)
        answer += piece
    print()

    # What stands behind the answer: the tiles the picture was cut into, and the memory that the language model's
    # cross-attention layers read.
    image = model.adapters["image"]
    batch = image.prepare([image.prepare.load(picture)])
    memory = image(batch).memory
    print(f"{int(batch['n_tiles'][0])} tile(s), {memory.shape[1]} entries of width {memory.shape[2]}", file=sys.stderr)

    if map_file is not None:
        from ..vision.attention_map import look, overlay

        ((shown, looked_at),) = look(model, [user], answer)
        overlay(shown, looked_at).save(map_file)
        print(f"where it looked: {map_file}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
