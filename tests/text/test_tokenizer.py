import pickle
import random

import pytest
import tokenizers
from herdkit.text import StreamDecoder, Tokenizer
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


class TestStreamDecoder:
    @pytest.mark.parametrize("text", DIFFICULT, ids=range(len(DIFFICULT)))
    def test_pieces_join_to_the_text_and_are_whole(self, tokenizer, text):
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(id) for id in tokenizer.encode(text)]
        assert "".join(pieces) + decoder.flush() == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)

    def test_a_character_comes_with_its_last_byte(self, tokenizer):
        decoder = StreamDecoder(tokenizer)
        ids = tokenizer.encode("🙂")
        assert len(ids) == 4
        assert [decoder.push(id) for id in ids] == ["", "", "", "🙂"]

    def test_a_broken_character_at_the_end(self, tokenizer):
        decoder = StreamDecoder(tokenizer)
        ids = tokenizer.encode("a🙂")[:-1]
        assert "".join(map(decoder.push, ids)) == "a"
        assert decoder.flush() == tokenizer.decode(ids)[1:] == "\ufffd"

    def test_special_tokens_are_silent(self, tokenizer):
        assert StreamDecoder(tokenizer).push(tokenizer.eot_id) == ""
