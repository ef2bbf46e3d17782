import pytest
import torch
from herdkit.text import SamplingOptions, Speculation, generate
from herdkit.text.sampling import distribution

PROMPTS = [[5, 9, 11, 3, 12, 8], [4], [1, 2, 6]]


@pytest.fixture(scope="module")
def target(make_model):
    return make_model(max_seq_len=64)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_greedy_is_that_of_the_target_alone(make_model, target, length):
    options = SamplingOptions(max_new_tokens=20)
    plain = generate(target, PROMPTS, options)
    for draft in (make_model(max_seq_len=64, n_layers=1, seed=5), target):
        found = generate(target, PROMPTS, options, speculation=Speculation(draft=draft, length=length))
        assert [row.tokens for row in found] == [row.tokens for row in plain]
        for ours, theirs in zip(found, plain, strict=True):
            assert ours.log_probs == pytest.approx(theirs.log_probs, rel=1e-9)
            assert ours.ending == "length"


def test_the_targets_own_proposals_all_stand(target, monkeypatch):
    calls = []
    hidden = type(target).hidden
    monkeypatch.setattr(
        type(target),
        "hidden",
        lambda self, tokens, **rest: calls.append(tokens.shape[1]) or hidden(self, tokens, **rest),
    )
    for temperature in (0.0, 2.0):
        calls.clear()
        options = SamplingOptions(max_new_tokens=17, temperature=temperature)
        generate(target, PROMPTS[:1], options, speculation=Speculation(draft=target, length=3))
        # Two prefills, then four rounds: three proposals and a judgement each, which give four tokens.
        assert calls[2:] == [2, 1, 1, 4] * 4


@torch.no_grad()
def test_the_distribution_is_that_of_the_target(make_model):
    target, draft = (make_model(vocab_size=16, n_layers=n, max_seq_len=16, seed=n) for n in (2, 1))
    for model in (target, draft):
        model.output.weight *= 0.3
    options = SamplingOptions(max_new_tokens=3, temperature=1.0, top_p=0.98)
    samples = 6000
    rows = generate(target, [[3, 1]], options, samples=samples, seed=0, speculation=Speculation(draft=draft, length=2))

    def of(model, *prefixes):
        return distribution(model(torch.tensor([[3, 1, *prefix] for prefix in prefixes]))[:, -1], options)

    # All pairs of the second and the third token, which are those that speculation gives.
    firsts, pairs = [(f,) for f in range(16)], [(f, s) for f in range(16) for s in range(16)]
    two = of(target, ()).reshape(16, 1) * of(target, *firsts)
    three = two[..., None] * of(target, *pairs).view(16, 16, 16)
    expected = three.sum(0).flatten() * samples
    observed = torch.tensor([16 * row.tokens[1] + row.tokens[2] for row in rows]).bincount(minlength=256).double()
    assert observed[expected == 0].sum() == 0
    # The test wants at least five in a cell: the rare ones are one cell together.
    rare = expected < 5
    cells = torch.where(rare, 0, 1 + torch.arange(256))
    observed = torch.zeros(257, dtype=torch.float64).index_add(0, cells, observed)
    expected = torch.zeros(257, dtype=torch.float64).index_add(0, cells, expected)
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert len(expected) > 60
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0), statistic / 2) > 1e-3
    # The draft alone would not do.
    assert (of(target, *firsts) - of(draft, *firsts)).abs().sum(-1).mean() > 0.3


def test_rows_end_in_the_middle_of_a_round(make_model, target):
    free = generate(target, PROMPTS, SamplingOptions(max_new_tokens=20))
    stops = [free[0].tokens[7], free[2].tokens[3]]
    options = SamplingOptions(max_new_tokens=20, stop_ids=stops)
    plain = generate(target, PROMPTS, options)
    found = generate(target, PROMPTS, options, speculation=Speculation(draft=target, length=5))
    assert [(row.tokens, row.ending) for row in found] == [(row.tokens, row.ending) for row in plain]


def test_wrong_drafts(make_model, target):
    with pytest.raises(ValueError, match="vocabulary of 64 tokens, the model one of 128"):
        generate(target, PROMPTS, speculation=Speculation(draft=make_model(vocab_size=64)))
    small = make_model(max_seq_len=16)
    with pytest.raises(ValueError, match="max_seq_len \\(16\\)"):
        generate(target, PROMPTS, SamplingOptions(max_new_tokens=20), speculation=Speculation(draft=small))
    with pytest.raises(ValueError, match="length"):
        Speculation(draft=target, length=0)
