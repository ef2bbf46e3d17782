"""Write down what a recording says, then answer it.

python -m herdkit.demos.speech runs/tiny-herd/model question.wav
"""

import sys

from .. import load


def main(model_directory: str, recording: str) -> None:
    model = load(model_directory, adapters=["speech"])
    spoken = {"role": "user", "content": [{"type": "audio", "audio": recording}]}

    # The system prompt chooses the task (section 8.2.1 of the paper): none for dialogue, this one to transcribe.
    repeat = {"role": "system", "content": "Repeat after me in English:"}
    print("heard:  ", model.chat([repeat, spoken], max_new_tokens=64))
    print("answer: ", model.chat([spoken], max_new_tokens=64))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
