"""Made texts: English prose, facts, dialogues."""

import re
from collections import Counter
from random import Random

from herdkit.data.dialogs import parse_dialog
from herdkit.data.synthetic import texts
from herdkit.data.synthetic.english import english_documents
from herdkit.data.synthetic.facts import facts
from herdkit.data.synthetic.words import NUMBERS


def test_english_is_prose_of_the_promised_length_without_repeats():
    documents = english_documents(300_000)
    assert 295_000 < sum(len(d) + 1 for d in documents) < 302_000
    assert all(200 <= len(d) <= 1200 and d.isascii() for d in documents)
    paragraphs = Counter(p for d in documents for p in d.split("\n"))
    assert max(paragraphs.values()) == 1
    letters = sum(c.isalpha() or c == " " for d in documents for c in d) / sum(map(len, documents))
    assert letters > 0.93
    common = Counter(w for d in documents for w in d.lower().split())
    assert {"the", "of", "a", "to"} <= {w for w, _ in common.most_common(8)}
    assert english_documents(300_000) == documents
    assert documents[: len(english_documents(50_000))] == english_documents(50_000)


def test_facts_are_right_where_rules_can_tell():
    table = facts()
    phrasings = [p for fact in table for p in fact.phrasings]
    assert len(set(phrasings)) == len(phrasings) >= 300
    days = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
    opposite = {}
    for fact in table:
        assert fact.answer in fact.choices
        last = fact.phrasings[0].split()
        if fact.kind == "sum":
            assert NUMBERS.index(fact.answer) == NUMBERS.index(last[2]) + NUMBERS.index(last[4])
        if fact.kind == "difference":
            assert NUMBERS.index(fact.answer) == NUMBERS.index(last[2]) - NUMBERS.index(last[4])
        if fact.kind.startswith("day"):
            step = 1 if "after" in fact.kind else -1
            assert fact.answer == days[(days.index(last[-1]) + step) % 7]
        if fact.kind.startswith("number"):
            step = 1 if "after" in fact.kind else -1
            assert NUMBERS.index(fact.answer) == NUMBERS.index(last[-1]) + step
        if fact.kind == "opposite":
            opposite[last[-1]] = fact.answer
    assert len(opposite) >= 40
    assert all(opposite[answer] == word for word, answer in opposite.items())


def test_every_kind_of_fact_is_also_heard_in_training():
    kept, held = ({fact.kind for fact in facts() if fact.held_out == out} for out in (False, True))
    assert kept == {fact.kind for fact in facts()}
    assert held
    assert 0.08 < sum(fact.held_out for fact in facts()) / len(facts()) < 0.18


def test_dialogues_keep_the_schema_and_copy_exactly():
    made = list(texts.dialogues(Random(0), 2000))
    assert len(made) == 2000
    turns = Counter()
    copies = paused = 0
    for messages in made:
        parsed = parse_dialog(messages, "here")
        roles = [m.role for m in parsed]
        body = roles[1:] if roles[0] == "system" else roles
        assert body == ["user", "assistant"] * (len(body) // 2)
        turns[len(body) // 2] += 1
        if roles[0] == "system":
            assert parsed[0].text == "Repeat after me in English:"
            said, copied = parsed[1].text, parsed[2].text
            assert said.split(f" {texts.PAUSE}")[0] == copied
            paused += said != copied
            copies += 1
    assert copies > 240
    assert 0.44 < paused / copies < 0.56
    assert turns[1] > 350
    assert sum(n for t, n in turns.items() if t > 1) > 700
    assert list(texts.dialogues(Random(0), 2000))[:200] == made[:200]


def test_the_words_are_few():
    """So that a small model meets each of them often."""
    made = texts.dialogues(Random(1), 3000)
    words = Counter(
        word
        for messages in made
        for message in messages
        if message["role"] != "system"
        for word in re.findall(r"\w+", message["content"])
    )
    assert 200 < len(words) < 320
    assert sum(n < 3 for n in words.values()) < 10


def test_new_questions_are_about_what_no_training_text_describes():
    rng = Random(2)
    seen = {
        messages[0]["content"].split(". ")[0]
        for messages in texts.dialogues(rng, 2500)
        if ". " in messages[0]["content"]
    }
    asked = [texts.new_question(rng) for _ in range(200)]
    described = {m[0]["content"].split(". ")[0] for m, _ in asked if ". " in m[0]["content"]}
    assert len(described) > 60
    assert not described & seen
    for messages, question in asked:
        assert messages[-1]["content"] == question.sentence
        assert question.answer in question.choices


def test_spoken_sentences_are_plain_words_without_held_out_facts():
    rng = Random(3)
    held = {p for fact in facts() if fact.held_out for p in fact.phrasings}
    said = [texts.sentence(rng) for _ in range(1500)]
    vocabulary = set(texts.spoken_vocabulary())
    assert not held & set(said)
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)+", text) and len(text.split()) <= 12 for text in said)
    assert len(set(said)) > 900
    rare = {w for text in said for w in text.split()} - vocabulary
    assert len(rare) < 30  # the question words
    some = {texts.sentence(rng, held_out_facts=True) for _ in range(1500)}
    assert held & some


def test_dictations_hold_words_that_cannot_be_guessed_and_no_held_out_fact(monkeypatch):
    rng = Random(3)
    held = {p for fact in facts() if fact.held_out for p in fact.phrasings}
    said = [texts.dictation(rng) for _ in range(1500)]
    assert not held & set(said)
    assert {word for text in said for word in text.split()} >= set(texts.spoken_vocabulary())
    # After "the opposite of" stand words that have none.
    opposites = {word for fact in facts() if fact.kind == "opposite" for word in fact.phrasings[0].split()}
    found = {text.split()[-1] for _ in range(4000) if "opposite of" in (text := texts.dictation(rng))}
    assert len(found - opposites) > 40
    monkeypatch.setattr(texts, "word_salad", lambda rng, shortest, longest: rng.choice([*held, "two words"]))
    monkeypatch.setattr(texts, "spoken_vocabulary", lambda: ("long", "black", "dog"))
    monkeypatch.setattr(texts, "sentence", lambda rng: "two words")
    assert not held & {texts.dictation(rng) for _ in range(500)}


def test_recitations_say_a_few_words_over_and_over():
    rng = Random(4)
    told = [texts.recitation(rng) for _ in range(200)]
    assert len(set(told)) > 190
    for text in told:
        words = text.split()
        assert 20 <= len(words) <= 32
        periods = [n for n in range(1, 9) if words[n:] == words[:-n] and len(words) % n == 0]
        assert periods


def test_no_spoken_sentence_holds_a_word_outside_the_spoken_vocabulary():
    rng = Random(8)
    found = {word for _ in range(8000) for word in texts.sentence(rng, held_out_facts=True).split()}
    assert found <= set(texts.spoken_vocabulary())


def test_text_before_a_pause_is_the_same_text():
    rng = Random(7)
    pauses = Counter()
    for _ in range(2000):
        text = texts.sentence(rng)
        found = texts.before_pause(text, rng)
        assert found.startswith(f"{text} ")
        rest = found.removeprefix(f"{text} ").split(" ")
        assert set(rest) == {texts.PAUSE}
        pauses[len(rest)] += 1
    assert set(pauses) == set(range(1, 25))
