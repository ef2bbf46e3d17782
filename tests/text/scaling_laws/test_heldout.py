import pytest
import torch
from herdkit.text.scaling_laws import ForecastConfig
from herdkit.text.scaling_laws.heldout import answer, continuations, measure
from torch.nn import functional as F

DOCUMENTS = [
    " ".join(f"{word}{i}" for i in range(40)) for word in ("alpha", "beta", "gamma", "delta", "épsilon", "zeta")
]
CONFIG = ForecastConfig(prompt_chars=20, answer_chars=10, choices=3)


@pytest.fixture(scope="module")
def model(make_model, tokenizer):
    return make_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)


def nll(model, tokens, start):
    """Of tokens[start:], in one row of its own."""
    logits = model(torch.tensor([tokens[:-1]]))[0, start - 1 :].detach()
    return F.cross_entropy(logits.float(), torch.tensor(tokens[start:]), reduction="sum").item()


def test_every_token_counts_once_however_documents_are_cut(model, tokenizer):
    for row_length in (16, 17, 250):
        found = measure(model, tokenizer, DOCUMENTS, row_length)
        expected, count = 0.0, 0
        for text in DOCUMENTS:
            tokens = [*tokenizer.encode(text, bos=True), tokenizer.eos_id]
            count += len(tokens) - 1
            at = 1
            while at < len(tokens):
                row = tokens[at - 1 : at - 1 + row_length]
                expected += nll(model, row, 1)
                at += len(row) - 1
        assert found.tokens == count
        assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.characters == sum(map(len, DOCUMENTS))
    assert found.bytes == found.characters + 40
    assert found.per_token * found.tokens == pytest.approx(found.per_character * found.characters)


def test_answers_are_those_of_one_row_at_a_time(model, tokenizer):
    questions = continuations(DOCUMENTS, CONFIG)
    right, total = 0, 0.0
    for question in questions:
        prompt = tokenizer.encode(question.prompt, bos=True)
        scores = [nll(model, prompt + tokenizer.encode(c), len(prompt)) / len(c) for c in question.choices]
        total += scores[question.answer]
        right += min(scores) == scores[question.answer]
    found = answer(model, tokenizer, questions)
    assert found.accuracy == right / len(questions)
    assert found.nll == pytest.approx(total / len(questions), rel=1e-5)


def test_questions_are_cut_from_the_documents():
    questions = continuations(DOCUMENTS, CONFIG)
    assert len({question.answer for question in questions}) == CONFIG.choices
    for question in questions:
        (home,) = [i for i, text in enumerate(DOCUMENTS) if question.prompt in text]
        assert question.prompt + question.choices[question.answer] in DOCUMENTS[home]
        assert len(set(question.choices)) == CONFIG.choices
        for choice in question.choices:
            assert choice.startswith(" ")
            assert (choice in DOCUMENTS[home]) == (choice == question.choices[question.answer])
    assert questions == continuations(DOCUMENTS, CONFIG)
    assert questions != continuations(DOCUMENTS, CONFIG, seed=1)
    assert len(continuations(DOCUMENTS, ForecastConfig(prompt_chars=20, answer_chars=10, questions=5))) == 5


def test_too_few_documents_for_questions():
    with pytest.raises(ValueError, match="2 held-out documents give no questions with 3 choices"):
        continuations(DOCUMENTS[:2], CONFIG)
