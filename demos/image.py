"""Ask a model about a picture.

python -m herdkit.demos.image runs/tiny-herd/model photo.jpg "what colour is the circle?"
"""

import sys

from .. import load


def main(model_directory: str, picture: str, question: str) -> None:
    model = load(model_directory, adapters=["image"])
    user = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}

    for piece in model.stream_chat([user], max_new_tokens=64):
        print(piece, end="", flush=True)
    print()

    # What stands behind the answer: the tiles the picture was cut into, and the memory that the language model's
    # cross-attention layers read.
    image = model.adapters["image"]
    batch = image.prepare([image.prepare.load(picture)])
    memory = image(batch).memory
    print(f"{int(batch['n_tiles'][0])} tile(s), {memory.shape[1]} entries of width {memory.shape[2]}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
