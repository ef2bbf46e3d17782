"""The vocabulary: byte-level BPE with Llama 3's pre-tokenisation and its 256 special tokens (section 3.2 of
"The Llama 3 Herd of Models", arXiv 2407.21783; the special tokens are those of the released code)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from .tiktoken_file import merges_of, read_ranks, write_ranks

N_SPECIAL = 256
RANKS_FILE = "tokenizer.model"

_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    # Two of the released tokenizer's reserved tokens, named for the senses that it has no token for.
    "<|video|>",
    "<|audio|>",
)
SPECIAL_TOKENS = _NAMED + tuple(f"<|reserved_special_token_{i}|>" for i in range(2, 2 + N_SPECIAL - len(_NAMED)))
"""The special tokens in the order of their ids, from the id of `<|begin_of_text|>` on."""

_SPECIAL_TEXT = re.compile(r"(<\|[a-z0-9_]+\|>)")

PRE_TOKENS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with the space or mark before them
        r"\p{N}{1,3}",  # digits in groups of three
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line breaks after it
        r"\s*[\r\n]+",  # white space up to a line break
        r"\s+(?!\S)",  # white space, less the last space before a word
        r"\s+",
    )
)


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes every byte as one printable letter: itself where it is one in Latin-1, else the
    next free letter from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF_LETTER = _byte_of_letter()
_LETTER_OF_BYTE = {byte: letter for letter, byte in _BYTE_OF_LETTER.items()}


def _letters(token: bytes) -> str:
    return "".join(_LETTER_OF_BYTE[byte] for byte in token)


def _backend(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


class Tokenizer:
    """Text to token ids and back. Reads and writes `tokenizer.json` of the `tokenizers` library and Meta's
    `tokenizer.model`; a released file works as well: a special token that it still calls reserved, `special` knows
    by its place.

    Meta's own code cuts a text every 400,000 characters and runs of 25,000 with or without white space, since
    the library that it uses fails on longer ones. This one does not, so it does not cut, like the released
    `tokenizer.json`: only such texts get other tokens, and those around the cuts.

    Attributes:
        vocab_size: all ids, special tokens included.
        bos_id, eos_id, eot_id, eom_id, pad_id, start_header_id, end_header_id, python_tag_id: ids of
            special tokens.
        stop_ids: the ids that end an answer: end of text, end of message, end of turn.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        # Strings like "<|eot_id|>" in a text are text; control tokens come from `special` alone.
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = {token.content: id for id, token in backend.get_added_tokens_decoder().items()}
        if SPECIAL_TOKENS[0] not in added:
            raise ValueError(f"not a Llama 3 tokenizer: it has no {SPECIAL_TOKENS[0]}")
        first = added[SPECIAL_TOKENS[0]]
        self._special = {name: first + i for i, name in enumerate(_NAMED)} | added
        self._special_ids = set(added.values())
        self.bos_id = self.special("<|begin_of_text|>")
        self.eos_id = self.special("<|end_of_text|>")
        self.pad_id = self.special("<|finetune_right_pad_id|>")
        self.start_header_id = self.special("<|start_header_id|>")
        self.end_header_id = self.special("<|end_header_id|>")
        self.eom_id = self.special("<|eom_id|>")
        self.eot_id = self.special("<|eot_id|>")
        self.python_tag_id = self.special("<|python_tag|>")
        self.stop_ids = (self.eos_id, self.eom_id, self.eot_id)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns the byte pairs from texts; the same texts give the same vocabulary.

        Args:
            vocab_size: with the 256 bytes and the 256 special tokens. Texts with too few distinct words give
                fewer; read `vocab_size` of the result.

        Raises:
            ValueError: vocab_size is below 512.
        """
        if vocab_size < 256 + N_SPECIAL:
            raise ValueError(f"vocab_size must be at least {256 + N_SPECIAL}, not {vocab_size}")
        backend = _backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - N_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a `tokenizer.json`, from a `tokenizer.model` of Meta's, or from the directory that holds either.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is no Llama 3 tokenizer; names it.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", RANKS_FILE) if (path / name).is_file()]
            path = found[0] if found else path / "tokenizer.json"
        if path.suffix == ".model":
            return cls.from_ranks(read_ranks(path))
        content = path.read_bytes()
        try:
            return cls.from_json(content.decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower for a file that it cannot read
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """From the text of a `tokenizer.json`."""
        return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def from_ranks(cls, tokens: Sequence[bytes]) -> Tokenizer:
        """From the tokens of a tiktoken vocabulary in the order of their ranks, the 256 special tokens after them.
        The last of those have our names (see `SPECIAL_TOKENS`): Meta's file names none."""
        vocabulary = {_letters(token): rank for rank, token in enumerate(tokens)}
        merges = [(_letters(left), _letters(right)) for left, right in merges_of(tokens)]
        backend = _backend(models.BPE(vocabulary, merges, ignore_merges=True))
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
        return cls(backend)

    def to_json(self) -> str:
        """The text of a `tokenizer.json`."""
        return self._backend.to_str(pretty=True)

    def ranks(self) -> list[bytes]:
        """The tokens, without the special ones, in the order of their ranks: what `tokenizer.model` holds.

        Raises:
            ValueError: the vocabulary cuts words otherwise than its ranks say, or its special tokens are not 256 at
                its end, which the format cannot express.
        """
        if self.vocab_size != self.bos_id + N_SPECIAL or len(self._special_ids) != N_SPECIAL:
            raise ValueError(f"tokenizer.model holds vocabularies that end with {N_SPECIAL} special tokens alone")
        tokens = [self.token_bytes(id) for id in range(self.bos_id)]
        model = json.loads(self.to_json())["model"]
        merges = [tuple(bytes(_BYTE_OF_LETTER[x] for x in part) for part in pair) for pair in model["merges"]]
        # A trained vocabulary has one merge for each token, in order; then pairs that would make it otherwise never
        # stand side by side, and the ranks alone cut every word in the same way.
        in_order = [left + right for left, right in merges] == [token for token in tokens if len(token) > 1]
        if not in_order and merges != merges_of(tokens):
            raise ValueError("the merges of this vocabulary are not those of its ranks; tokenizer.model has no others")
        return tokens

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`, or Meta's `tokenizer.model` where path ends so; path is the file, or the
        directory for the first of them.

        Raises:
            ValueError: see `ranks`.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.suffix == ".model":
            write_ranks(self.ranks(), path)
        else:
            path.write_text(self.to_json(), encoding="utf-8")

    def __reduce__(self):
        return Tokenizer.from_json, (self.to_json(),)

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether both give every id the same meaning: a special token has it by its place, whatever it is called."""
        return self.bos_id == other.bos_id and self._ordinary() == other._ordinary()

    def _ordinary(self) -> dict[str, int]:
        return {token: id for token, id in self._backend.get_vocab().items() if id < self.bos_id}

    def special(self, name: str) -> int:
        """The id of a special token, such as "<|image|>".

        Raises:
            ValueError: no special token has this name.
        """
        if name not in self._special:
            raise ValueError(f"no special token {name!r} in this vocabulary")
        return self._special[name]

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            bos: begin with `<|begin_of_text|>`.
            allow_special: read names of special tokens in the text as control tokens. Never for text that comes
                from a user.
        """
        ids = [self.bos_id] if bos else []
        for piece in _SPECIAL_TEXT.split(text) if allow_special else (text,):
            if allow_special and piece in self._special:
                ids.append(self._special[piece])
            else:
                ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        start = [self.bos_id] if bos else []
        return [start + row.ids for row in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            keep_special: write special tokens by name; by default they are left out.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        pieces = (self.token_bytes(id, keep_special=keep_special) for id in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, id: int, *, keep_special: bool = False) -> bytes:
        """The bytes that a token stands for."""
        token = self._backend.id_to_token(id)
        if token is None:
            raise ValueError(f"no token has the id {id}; the vocabulary has {self.vocab_size}")
        if id in self._special_ids:
            return token.encode() if keep_special else b""
        return bytes(_BYTE_OF_LETTER[letter] for letter in token)
