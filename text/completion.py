"""What a request becomes: its tokens, and where its text ends."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .sampling import SamplingOptions, row_generator
from .tokenizer import Tokenizer

Ending = Literal["stop_token", "stop_string", "length"]


@dataclass
class Completion:
    """The continuation of one prompt.

    Args:
        tokens: without the stop token; where a stop string ended it, up to the token that completed the string.
        log_probs: of each token, natural logarithm of its probability in the model's own distribution: temperature 1,
            nothing filtered.
        ending: what ended it: a token of `stop_ids`, one of `stop_strings`, or `max_new_tokens`; None as long as it is
            not at its end.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ending: Ending | None = None

    @property
    def log_prob(self) -> float:
        """Of all tokens together."""
        return sum(self.log_probs)

    def text(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> str:
        """The text of the tokens, up to the first of the stop strings."""
        return "".join(text_pieces(tokenizer, iter(self.tokens), stop_strings))


class Row:
    """One request while it runs: its completion, its draws and whether it goes on."""

    def __init__(self, options: SamplingOptions, seed: int, sample: int, tokenizer: Tokenizer | None):
        self.completion = Completion()
        self.draws = row_generator(seed, sample)
        self._left = options.max_new_tokens
        self._stop_ids = frozenset(options.stop_ids)
        self._tokenizer = tokenizer
        self._strings = StopStrings(options.stop_strings) if options.stop_strings else None

    @property
    def running(self) -> bool:
        return self.completion.ending is None

    def take(self, token: int, log_prob: float) -> None:
        """The next token."""
        if token in self._stop_ids:
            self.completion.ending = "stop_token"
            return
        self.completion.tokens.append(token)
        self.completion.log_probs.append(log_prob)
        self._left -= 1
        if self._strings is not None and self._tokenizer is not None:
            self._strings.push(self._tokenizer.token_bytes(token))
        if self._strings is not None and self._strings.found:
            self.completion.ending = "stop_string"
        elif not self._left:
            self.completion.ending = "length"


class StopStrings:
    """Finds strings in bytes that come in pieces. Bytes, since a piece may end within a character.

    Attributes:
        found: one of the strings is complete; nothing follows.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = [string.encode() for string in strings]
        self._held = b""
        self.found = False

    def push(self, piece: bytes) -> bytes:
        """What is now known to stand before any stop string; the rest is held back."""
        self._held += piece
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            free, self._held = self._held[: min(places)], b""
            return free
        keep = max((self._overlap(string) for string in self._strings), default=0)
        cut = len(self._held) - keep
        free, self._held = self._held[:cut], self._held[cut:]
        return free

    def flush(self) -> bytes:
        """What is held back, when no more comes."""
        rest, self._held = self._held, b""
        return rest

    def _overlap(self, string: bytes) -> int:
        """The length of the longest end of what is held that begins the string."""
        longest = min(len(self._held), len(string) - 1)
        return next((n for n in range(longest, 0, -1) if self._held.endswith(string[:n])), 0)


def text_pieces(tokenizer: Tokenizer, tokens: Iterator[int], stop_strings: Sequence[str] = ()) -> Iterator[str]:
    """Tokens to pieces of text, as they come: whole characters, nothing of a stop string or after it."""
    decoder, stops = codecs.getincrementaldecoder("utf-8")(errors="replace"), StopStrings(stop_strings)
    for token in tokens:
        if piece := decoder.decode(stops.push(tokenizer.token_bytes(token))):
            yield piece
        if stops.found:
            break
    if rest := decoder.decode(stops.flush(), final=True):
        yield rest
