import pytest
from herdkit.adapters.evaluate import Answer, leave_out, score, score_by_kind, size
from herdkit.data.dialogs import parse_dialog


def answer(kind, expected, given, choices=4):
    return Answer(index=0, kind=kind, choices=choices, prompt="", expected=expected, given=given)


def test_scores_count_exact_matches_by_kind_with_chance_and_interval():
    found = [
        answer("colour", "red", "Red."),
        answer("colour", "red", "dark red"),
        answer("count", "two", " two", choices=2),
        answer("count", "two", ""),
    ]
    total = score(found)
    assert (total.right, total.count) == (2, 4)
    assert total.chance == pytest.approx((1 / 4 + 1 / 4 + 1 / 2 + 1 / 4) / 4)
    assert total.interval == pytest.approx(1.96 * (0.5 * 0.5 / 4) ** 0.5)
    assert {kind: one.accuracy for kind, one in score_by_kind(found).items()} == {"colour": 0.5, "count": 0.5}
    assert score([answer("", "a", "a", choices=0)]).chance is None
    with pytest.raises(ValueError, match="no answers"):
        score([])


def test_a_question_that_was_only_spoken_stays_a_message_without_its_sound():
    spoken = [{"role": "user", "content": [{"type": "audio", "audio": b"x"}]}]
    (message,) = leave_out(parse_dialog(spoken, "here"), ["audio"])
    assert parse_dialog([message], "again")[0].text == ""


def test_no_samples_are_not_all_samples():
    assert [size(range(5), limit) for limit in (None, 1, 9)] == [5, 1, 5]
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        size(range(5), 0)
