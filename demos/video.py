"""Ask a model about a clip.

python -m herdkit.demos.video runs/tiny-herd/model clip.mp4 "what happens first?"
"""

import sys

from .. import load


def main(model_directory: str, clip: str, question: str) -> None:
    # Video encodes its frames with the image adapter's encoder, so both are loaded.
    model = load(model_directory, adapters=["image", "video"])
    user = {"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": question}]}

    for piece in model.stream_chat([user], max_new_tokens=64):
        print(piece, end="", flush=True)
    print()

    sampled = model.adapters["video"].prepare.load(clip)
    times = ", ".join(f"{time:.2f}" for time in sampled.times.tolist())
    print(f"saw the frames at {times} s", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
