import dataclasses

import pytest
import torch
from herdkit.text.scaling_laws import ForecastConfig
from herdkit.text.scaling_laws.questions import Question, answer, word_orders
from torch.nn import functional as F

DOCUMENTS = [
    " ".join(f"{word}{i}" for i in range(40)) for word in ("alpha", "beta", "gamma", "delta", "épsilon", "zeta")
]
CONFIG = ForecastConfig(prompt_chars=20, answer_chars=16, choices=3)


@pytest.fixture(scope="module")
def model(make_model, tokenizer):
    return make_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)


def nll(model, tokens, start):
    """Of tokens[start:], in one row of its own."""
    logits = model(torch.tensor([tokens[:-1]]))[0, start - 1 :].detach()
    return F.cross_entropy(logits.float(), torch.tensor(tokens[start:]), reduction="sum").item()


def test_answers_are_those_of_one_row_at_a_time(model, tokenizer):
    uneven = Question(prompt="alpha0 alpha1", choices=(" a", " alpha2 alpha3", " beta0 beta1 beta2 gamma7"), answer=1)
    questions = [*word_orders(DOCUMENTS, CONFIG), uneven]
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
    questions = word_orders(DOCUMENTS, CONFIG)
    assert {question.answer for question in questions} == set(range(CONFIG.choices))
    for question in questions:
        right = question.choices[question.answer]
        assert any(question.prompt + right in text for text in DOCUMENTS)
        assert len(set(question.choices)) == CONFIG.choices
        for choice in question.choices:
            assert choice.startswith(" ")
            assert sorted(choice.split()) == sorted(right.split())
    assert questions == word_orders(DOCUMENTS, CONFIG)
    assert questions != word_orders(DOCUMENTS, CONFIG, seed=1)
    assert len(word_orders(DOCUMENTS, dataclasses.replace(CONFIG, questions=5))) == 5


@pytest.mark.parametrize("change", [{"prompt_chars": 400}, {"answer_chars": 1}])
def test_documents_that_give_no_question(change):
    with pytest.raises(ValueError, match="6 held-out documents give no question"):
        word_orders(DOCUMENTS, dataclasses.replace(CONFIG, **change))
