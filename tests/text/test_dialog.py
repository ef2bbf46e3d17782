import pytest
from herdkit.data.dialogs import Message, Part
from herdkit.text import encode_dialog, encode_prompt


def message(role, *parts):
    return Message(role, [Part("text", text=part) if isinstance(part, str) else part for part in parts])


DIALOG = [
    message("system", "Be brief.\n"),
    message("user", "  What is 2 + 2?"),
    message("assistant", "\n4. <|eot_id|> "),
    message("user", "Sure?"),
    message("assistant", "Yes."),
]

# Written by hand from the released model card's format.
EXPECTED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4. <|eot_id|><|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
)


def test_format(tokenizer):
    encoded = encode_dialog(DIALOG, tokenizer)
    assert tokenizer.decode(encoded.tokens, keep_special=True) == EXPECTED
    assert len(encoded.tokens) == len(encoded.targets)
    assert encoded.placements == []
    # The string in the assistant's text is text: five messages, five control tokens.
    assert encoded.tokens.count(tokenizer.eot_id) == 5
    assert encoded.tokens.count(tokenizer.bos_id) == 1


def test_tokens_equal_those_of_the_whole_string(tokenizer):
    """The released template is tokenised as one string; ours piece by piece."""
    plain = [m for m in DIALOG if "<|eot_id|>" not in m.parts[0].text]
    encoded = encode_dialog(plain, tokenizer)
    text = tokenizer.decode(encoded.tokens, keep_special=True)
    assert encoded.tokens == tokenizer.encode(text, allow_special=True)


def test_targets_are_the_answers_and_their_ends(tokenizer):
    encoded = encode_dialog(DIALOG, tokenizer)
    learned = [id for id, target in zip(encoded.tokens, encoded.targets, strict=True) if target]
    assert tokenizer.decode(learned, keep_special=True) == "4. <|eot_id|><|eot_id|>Yes.<|eot_id|>"
    assert learned.count(tokenizer.eot_id) == 2


def test_prompt_opens_the_answer(tokenizer):
    encoded = encode_prompt(DIALOG[:2], tokenizer)
    text = tokenizer.decode(encoded.tokens, keep_special=True)
    head = EXPECTED.index("4.")
    assert text == EXPECTED[:head]
    assert not any(encoded.targets)
    assert len(encoded.targets) == len(encoded.tokens)
    whole = encode_dialog(DIALOG[:3], tokenizer).tokens
    assert whole[: len(encoded.tokens)] == encoded.tokens


def test_tool_results(tokenizer):
    encoded = encode_dialog([message("ipython", "42"), message("assistant", "It is 42.")], tokenizer)
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>" in tokenizer.decode(
        encoded.tokens, keep_special=True
    )


class TestMedia:
    image, audio = Part("image", media="png"), Part("audio", media="wav")

    def expand(self, tokenizer):
        counts = {"image": ("<|image|>", 1), "audio": ("<|audio|>", 3)}

        def expand(part):
            name, count = counts[part.type]
            return [tokenizer.special(name)] * count

        return expand

    def test_placeholders_and_where_they_stand(self, tokenizer):
        messages = [
            message("user", self.image, " What is it? ", self.audio, self.image, " \n"),
            message("assistant", "A dog."),
        ]
        encoded = encode_dialog(messages, tokenizer, self.expand(tokenizer))
        assert tokenizer.decode(encoded.tokens, keep_special=True) == (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|> What is it? "
            "<|audio|><|audio|><|audio|><|image|><|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
        )
        assert [part.type for _, _, part in encoded.placements] == ["image", "audio", "image"]
        assert encoded.placements[1][2] is self.audio
        for start, length, part in encoded.placements:
            assert encoded.tokens[start : start + length] == self.expand(tokenizer)(part)
            assert not any(encoded.targets[start : start + length])

    def test_only_the_ends_of_a_message_are_stripped(self, tokenizer):
        encoded = encode_dialog([message("user", " a ", self.image, " b ")], tokenizer, self.expand(tokenizer))
        assert tokenizer.decode(encoded.tokens, keep_special=True).endswith("\n\na <|image|> b<|eot_id|>")

    def test_how_text_is_cut_into_parts_does_not_matter(self, tokenizer):
        whole = encode_dialog([message("user", " some words here ")], tokenizer)
        cut = encode_dialog([message("user", " so", "me wo", "", "rds here", " ")], tokenizer)
        assert cut.tokens == whole.tokens

    def test_errors(self, tokenizer):
        expand = self.expand(tokenizer)
        with pytest.raises(ValueError, match="message 1: an assistant message cannot hold image"):
            encode_dialog([message("user", "draw"), message("assistant", self.image)], tokenizer, expand)
        with pytest.raises(ValueError, match="message 0: nothing is attached that takes audio"):
            encode_dialog([message("user", self.audio)], tokenizer)
        with pytest.raises(ValueError, match="nothing is attached"):
            encode_dialog([message("user", self.audio)], tokenizer, lambda part: [])
        with pytest.raises(ValueError, match="role 'robot'"):
            encode_dialog([message("robot", "beep")], tokenizer)
