import json
import pickle
import random

import pytest
import tokenizers
from herdkit.text import Tokenizer
from herdkit.text.completion import text_pieces
from herdkit.text.tokenizer import PRE_TOKENS

DIFFICULT = [
    "",
    " ",
    "plain words",
    "  two  spaces \t tabs\t\n\n\r\n line ends \r",
    "don't WE'LL I'M y'all's",
    "0 12 345 6789 1234567890 1e-5 ٣٤٥",
    "héllo ﬁne naïve Ünïcödé e\u0301",
    "हिन्दी ภาษาไทย 中文字符 日本語 한국어 العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 \U0001f9d1\U0001f3fd",
    "null \x00 bell \x07 bom \ufeff zero\u200bwidth replacement \ufffd private \ue000 last \U0010ffff",
    "<|eot_id|> <|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
    "<|image|>",
    "x" * 3000 + " " * 500 + "!" * 500,
]

SCRIPTS = [
    "abcdeABCDE",
    "éüßñçàœ",
    "жщъыэюя",
    "αβγδέώ",
    "אבגשל",
    "سلامعربي",
    "हिन्दीक्ष",
    "ภาษาไทย",
    "中文漢字語",
    "ひらがなカナ",
    "한국어글",
    "👩🏽👍🎉🇩🇪",
    "=-+*/<>|{}()",
]


class TestRoundTrip:
    @pytest.mark.parametrize("text", DIFFICULT, ids=range(len(DIFFICULT)))
    def test_difficult_text(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer._backend.decode(ids) == text
        assert all(0 <= id < tokenizer.bos_id for id in ids)

    def test_random_characters(self, tokenizer):
        rng = random.Random(0)
        for _ in range(200):
            points = [rng.randrange(0x110000) for _ in range(20)]
            text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_batch(self, tokenizer):
        assert tokenizer.encode_batch(DIFFICULT) == [tokenizer.encode(text) for text in DIFFICULT]
        assert tokenizer.encode_batch(["a"], bos=True) == [tokenizer.encode("a", bos=True)]

    def test_an_unknown_id(self, tokenizer):
        with pytest.raises(ValueError, match="1024"):
            tokenizer.decode([1024])


class TestSpecialTokens:
    def test_llama_3_order_at_the_end_of_the_vocabulary(self, tokenizer):
        assert tokenizer.vocab_size == 1024
        first = 1024 - 256
        # The released ids are these offsets from 128,000.
        expected = {
            "<|begin_of_text|>": 0,
            "<|end_of_text|>": 1,
            "<|reserved_special_token_0|>": 2,
            "<|reserved_special_token_1|>": 3,
            "<|finetune_right_pad_id|>": 4,
            "<|step_id|>": 5,
            "<|start_header_id|>": 6,
            "<|end_header_id|>": 7,
            "<|eom_id|>": 8,
            "<|eot_id|>": 9,
            "<|python_tag|>": 10,
            "<|image|>": 11,
            "<|video|>": 12,
            "<|audio|>": 13,
            "<|reserved_special_token_2|>": 14,
            "<|reserved_special_token_243|>": 255,
        }
        assert {name: tokenizer.special(name) - first for name in expected} == expected
        assert tokenizer.bos_id == first
        assert tokenizer.stop_ids == (first + 1, first + 8, first + 9)
        assert tokenizer.pad_id == first + 4
        with pytest.raises(ValueError, match=r"no special token '<\|nothing\|>'"):
            tokenizer.special("<|nothing|>")

    def test_all_bytes_come_first(self, tokenizer):
        alphabet = {tokenizer.token_bytes(id) for id in range(256)}
        assert alphabet == {bytes([byte]) for byte in range(256)}

    def test_names_in_text_are_text_unless_asked_for(self, tokenizer):
        text = "a<|eot_id|>b<|unknown|>"
        assert max(tokenizer.encode(text)) < tokenizer.bos_id
        ids = tokenizer.encode(text, allow_special=True)
        assert ids.count(tokenizer.eot_id) == 1
        assert ids == [
            *tokenizer.encode("a"),
            tokenizer.eot_id,
            *tokenizer.encode("b"),
            *tokenizer.encode("<|unknown|>"),
        ]
        assert tokenizer.decode(ids) == "ab<|unknown|>"
        assert tokenizer.decode(ids, keep_special=True) == text

    def test_reserved_tokens_of_a_released_file_are_known_by_their_place(self, tokenizer):
        text = tokenizer.to_json()
        for name, released in (("image", 3), ("video", 4), ("audio", 5)):
            text = text.replace(f"<|{name}|>", f"<|released_reserved_{released}|>")
        released = Tokenizer.from_json(text)
        assert released.special("<|video|>") == tokenizer.special("<|video|>")
        assert released.vocab_size == 1024

    def test_another_tokenizer(self):
        other = tokenizers.Tokenizer(tokenizers.models.BPE())
        with pytest.raises(ValueError, match=r"it has no <\|begin_of_text"):
            Tokenizer(other)


class TestPreTokens:
    """Hand-cut examples of section A.3 of the fact sheet's rules."""

    @pytest.mark.parametrize(
        ("text", "pieces"),
        [
            ("I'll DON'T", ["I", "'ll", " DON", "'T"]),
            ("12345 1", ["123", "45", " ", "1"]),
            ("a  b", ["a", " ", " b"]),
            ("(word) x.y", ["(word", ")", " x", ".y"]),
            ("end!!\n\nnext", ["end", "!!\n\n", "next"]),
            (" \n  \n x", [" \n  \n", " x"]),
            ("tail   ", ["tail", "   "]),
            ("héé_ü", ["héé", "_ü"]),
        ],
    )
    def test_cuts(self, text, pieces):
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENS), "isolated")
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces

    def test_merges_never_cross_a_cut(self):
        trained = Tokenizer.train(["ab, 1234 ab, 1234"] * 50, 560)
        pieces = [trained.token_bytes(id).decode("utf-8", "replace") for id in range(256, trained.bos_id)]
        assert "ab" in pieces
        assert "123" in pieces
        assert not any("," in piece and "b" in piece for piece in pieces)
        assert "1234" not in pieces


class TestFiles:
    def test_training_is_deterministic(self):
        rng = random.Random(1)
        texts = [" ".join("".join(rng.choices("abcd", k=rng.randint(1, 6))) for _ in range(30)) for _ in range(50)]
        first, second = (Tokenizer.train(iter(texts), 700) for _ in range(2))
        assert first.to_json() == second.to_json()
        assert first.vocab_size == 700

    def test_too_little_text_gives_a_smaller_vocabulary(self):
        small = Tokenizer.train(["ab"], 1000)
        assert small.vocab_size == 256 + 1 + 256
        assert small.special("<|reserved_special_token_243|>") == small.vocab_size - 1
        with pytest.raises(ValueError, match="at least 512"):
            Tokenizer.train(["ab"], 511)

    def test_save_load_pickle(self, tokenizer, tmp_path):
        tokenizer.save(tmp_path)
        for copy in (
            Tokenizer.load(tmp_path),
            Tokenizer.load(tmp_path / "tokenizer.json"),
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert [copy.encode(text) for text in DIFFICULT] == [tokenizer.encode(text) for text in DIFFICULT]
            assert copy.special("<|audio|>") == tokenizer.special("<|audio|>")
        with pytest.raises(FileNotFoundError):
            Tokenizer.load(tmp_path / "nothing.json")

    def test_transformers_reads_the_file(self, tokenizer, tmp_path):
        transformers = pytest.importorskip("transformers")
        tokenizer.save(tmp_path)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        text = "some words, 1234 <|eot_id|>"
        assert fast(text)["input_ids"] == tokenizer.encode(text, allow_special=True)


def shuffled(rng, characters, length):
    return "".join(rng.choices(characters, k=length))


@pytest.fixture(scope="module")
def trained():
    """A vocabulary of many scripts, so that merges cross the bytes of a character."""
    rng = random.Random(0)
    words = [shuffled(rng, letters, rng.randint(1, 9)) for letters in SCRIPTS for _ in range(150)]
    return Tokenizer.train([" ".join(rng.choices(words, k=60)) for _ in range(150)], 2500)


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    file = tmp_path_factory.mktemp("meta") / "tokenizer.model"
    trained.save(file)
    return file


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(1)
    everything = [
        *"".join(SCRIPTS),
        *" \n\r\t'0123456789.,!?_-",
        "\u200d",
        "\ufe0f",
        "\u0301",
        "<|eot_id|>",
        "'ll",
        "\r\n",
    ]
    mixed = [shuffled(rng, everything, rng.randint(1, 60)) for _ in range(400)]
    runs = [unit * count for unit in (" ", "\n", "a", "1", "!", "é", "\r\n", " \n") for count in (2, 3, 4, 99, 5000)]
    return DIFFICULT + mixed + runs


@pytest.fixture(scope="module")
def oracle(file):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(file))
    names = {f"<|special_{i}|>": len(ranks) + i for i in range(256)}
    return tiktoken.Encoding("meta", pat_str=PRE_TOKENS, mergeable_ranks=ranks, special_tokens=names)


class TestMetaFile:
    """`tokenizer.model`, against tiktoken, which Meta's code runs on, and transformers' converter of it."""

    def test_equals_tiktoken(self, trained, file, texts, oracle):
        read = Tokenizer.load(file)
        assert read.vocab_size == oracle.n_vocab == trained.vocab_size
        for text in texts:
            expected = oracle.encode(text, disallowed_special=())
            assert read.encode(text) == expected, text
            assert trained.encode(text) == expected, text

    def test_equals_transformers_converter(self, trained, file, texts):
        pytest.importorskip("transformers")
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converted = TikTokenConverter(str(file)).converted()
        read = Tokenizer.load(file)
        ours, theirs = (json.loads(backend.to_str())["model"] for backend in (read._backend, converted))
        assert (ours["vocab"], ours["merges"], ours["ignore_merges"]) == (theirs["vocab"], theirs["merges"], True)
        assert [converted.encode(text).ids for text in texts] == [read.encode(text) for text in texts]

    def test_there_and_back(self, trained, file, tmp_path):
        read = Tokenizer.load(file.parent)
        assert [read.token_bytes(id) for id in range(2500)] == [trained.token_bytes(id) for id in range(2500)]
        assert read.special("<|image|>") == trained.special("<|image|>")
        read.save(tmp_path / "tokenizer.model")
        assert (tmp_path / "tokenizer.model").read_bytes() == file.read_bytes()
        read.save(tmp_path)  # tokenizer.json comes first in a directory
        assert Tokenizer.load(tmp_path).encode("don't 1234") == trained.encode("don't 1234")

    def test_long_texts_are_not_cut(self, trained, oracle):
        """Meta's code cuts runs at 25,000 characters (and texts at 400,000): that changes tokens at the cut alone."""
        rng = random.Random(2)
        run = shuffled(rng, SCRIPTS[0], 26_000)
        whole, cut = trained.encode(run), oracle.encode(run[:25_000]) + oracle.encode(run[25_000:])
        assert whole == oracle.encode(run) != cut
        alike = sum(1 for ours, theirs in zip(whole, cut, strict=False) if ours == theirs)
        from_behind = sum(1 for ours, theirs in zip(whole[::-1], cut[::-1], strict=False) if ours == theirs)
        assert alike + from_behind > len(whole) - 20
        text = "words and " * 45_000
        assert trained.decode(trained.encode(text)) == text
        assert trained.encode(text[:400_000]) + trained.encode(text[400_000:]) == trained.encode(text)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda lines: [*lines[:5], *lines[6:]], "line 6 is b.* not the token of rank 5"),
            (lambda lines: [*lines, b"YQ== 2244"], "a token is there twice"),
            (lambda lines: [*lines, b" 2244"], "line 2245 is b' 2244'"),
            (lambda lines: [*lines, b"%%% 2244"], "line 2245 is not a token in base64"),
            (lambda lines: [b"YQ==", *lines], "line 1 is not a token in base64 and its rank"),
            (
                lambda lines: [b"QUE= %d" % i if i == 7 else line for i, line in enumerate(lines)],
                "the bytes .* are no tok",
            ),
            (lambda lines: [], "the bytes .* are no tokens"),
        ],
    )
    def test_a_damaged_file(self, file, tmp_path, change, message):
        broken = tmp_path / "tokenizer.model"
        broken.write_bytes(b"\n".join(change(file.read_bytes().splitlines())))
        with pytest.raises(ValueError, match=f"tokenizer.model: {message}"):
            Tokenizer.load(broken)

    def test_what_the_format_cannot_say(self, trained, tmp_path):
        content = json.loads(trained.to_json())
        merges = content["model"]["merges"]
        content["model"]["merges"] = [*merges[1:], merges[0]]
        with pytest.raises(ValueError, match="the merges of this vocabulary are not those of its ranks"):
            Tokenizer.from_json(json.dumps(content)).save(tmp_path / "tokenizer.model")
        content = json.loads(trained.to_json())
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 2500, "content": "<|more|>"})
        with pytest.raises(ValueError, match="256 special tokens alone"):
            Tokenizer.from_json(json.dumps(content)).save(tmp_path / "tokenizer.model")
        assert list(tmp_path.iterdir()) == []


class TestTextPieces:
    @pytest.mark.parametrize("text", DIFFICULT, ids=range(len(DIFFICULT)))
    def test_they_join_to_the_text_and_are_whole(self, tokenizer, text):
        pieces = list(text_pieces(tokenizer, iter(tokenizer.encode(text))))
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)

    def test_a_character_comes_with_its_last_byte(self, tokenizer):
        taken = []
        ids = tokenizer.encode("🙂a")
        pieces = text_pieces(tokenizer, (taken.append(id) or id for id in ids))
        assert len(ids) == 5
        assert next(pieces) == "🙂"
        assert taken == ids[:4]

    def test_a_broken_character_at_the_end(self, tokenizer):
        ids = tokenizer.encode("a🙂")[:-1]
        assert list(text_pieces(tokenizer, iter(ids))) == ["a", "\ufffd"]
        assert tokenizer.decode(ids)[1:] == "\ufffd"

    def test_special_tokens_are_silent(self, tokenizer):
        assert list(text_pieces(tokenizer, iter([tokenizer.eot_id]))) == []
