import itertools

import pytest
import torch
from herdkit.speech.alignment import AlignmentError, align_tokens, align_words


def spelled(text: str, at: dict[int, int], frames: int) -> torch.Tensor:
    """Logits that say the byte `i` of a text in frame `at[i]`, and the blank elsewhere."""
    logits = torch.full((frames, 257), -4.0)
    logits[:, 0] = 3.0
    for i, frame in at.items():
        logits[frame, 0], logits[frame, text.encode()[i] + 1] = -4.0, 6.0
    return logits


@pytest.mark.parametrize("tokens", [[1], [1, 2], [2, 2], [1, 2, 1]])
def test_the_path_is_the_best_of_all(tokens):
    torch.manual_seed(0)
    logits = torch.randn(5, 3)
    scores = logits.log_softmax(-1)

    def collapsed(path):
        return [token for token, _ in itertools.groupby(path) if token]

    paths = [path for path in itertools.product(range(3), repeat=5) if collapsed(path) == tokens]
    best = max(paths, key=lambda path: sum(scores[t, c] for t, c in enumerate(path)))
    expected, at = [], 0
    for token, run in itertools.groupby(best):
        size = len(list(run))
        expected += [(token, at, at + size)] if token else []
        at += size
    assert [(span.token, span.start, span.end) for span in align_tokens(logits, tokens)] == expected


def test_words_stand_where_their_letters_are():
    text = "go über 日本"
    places = [4, 6, 9, 20, 21, 23, 24, 26, 30, 40, 41, 43, 45, 46, 48]
    assert len(text.encode()) == len(places)
    words = align_words(spelled(text, dict(enumerate(places)), 60), f" {text}  ", 0.04)
    assert [word.text for word in words] == ["go", "über", "日本"]
    assert [(word.start, word.end) for word in words] == [(0.16, 0.28), (0.8, 1.08), (1.6, 1.96)]
    assert all(word.score > 0.9 for word in words)
    assert align_words(spelled("ab", {0: 3, 1: 9}, 12), "xb", 1.0)[0].score < 0.1


def test_what_cannot_be_aligned_is_an_error():
    for text in ("", "far too long for five frames", "aaa"):
        with pytest.raises(AlignmentError, match="cannot be aligned with 4 frames"):
            align_words(torch.randn(4, 257), text, 0.04)
