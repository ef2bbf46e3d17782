"""The file format of tiktoken, in which Meta releases its vocabulary as `tokenizer.model`: a line for each token,
its bytes in base64, a space, its rank. Ranks say all about the merges; special tokens are not in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path


def read_ranks(file: Path) -> list[bytes]:
    """The tokens by rank.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not as above, ranks do not ascend from 0, a token is there twice, or a byte is none;
            names the file and the line.
    """
    tokens: list[bytes] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            in_order = int(rank) == len(tokens)
            tokens.append(base64.b64decode(token, validate=True))
        except ValueError:
            raise ValueError(
                f"{file}: line {number} is not a token in base64 and its rank, so this is no tiktoken vocabulary "
                "(those of Llama 2 and before are SentencePiece files, which herdkit does not read)"
            ) from None
        if not in_order or not tokens[-1]:
            raise ValueError(f"{file}: line {number} is {line!r}, not the token of rank {len(tokens) - 1}")
    distinct = set(tokens)
    if len(distinct) != len(tokens):
        raise ValueError(f"{file}: a token is there twice")
    if missing := [byte for byte in range(256) if bytes([byte]) not in distinct]:
        raise ValueError(f"{file}: the bytes {missing} are no tokens")
    return tokens


def write_ranks(tokens: Sequence[bytes], file: Path) -> None:
    """Writes the tokens, which stand in the order of their ranks."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    file.write_bytes(b"".join(lines))


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that joins to a third, as a list of merges: those that make the lower rank first, and
    among those that make the same token, those with the lower ranks of the parts first."""
    rank = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    for token in tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in rank and right in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges
