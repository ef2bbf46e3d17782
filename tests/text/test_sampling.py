import pytest
import torch
from herdkit.text import SamplingOptions
from herdkit.text.sampling import FIRST_CANDIDATES, distribution, sample


def options(**changes):
    return SamplingOptions(**{"temperature": 1.0} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.3},
        {"top_k": 7},
        {"min_p": 0.1},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("vocabulary", [50, 2000])
def test_keeps_what_transformers_keeps(changes, vocabulary):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    # A flat row, whose tokens beyond the first candidates are wanted too.
    logits[1] /= 10
    warped = transformers.TemperatureLogitsWarper(changes.get("temperature", 1.0))(None, logits)
    if "top_k" in changes:
        warped = transformers.TopKLogitsWarper(changes["top_k"])(None, warped)
    if "top_p" in changes:
        warped = transformers.TopPLogitsWarper(changes["top_p"])(None, warped)
    if "min_p" in changes:
        warped = transformers.MinPLogitsWarper(changes["min_p"])(None, warped)
    found = distribution(logits, options(**changes))
    assert torch.equal(found > 0, warped.isfinite())
    torch.testing.assert_close(found, warped.softmax(-1))
    if "top_p" in changes and "top_k" not in changes and vocabulary > FIRST_CANDIDATES:
        assert (found[1] > 0).sum() > FIRST_CANDIDATES

    # An even grid of draws gives the probabilities themselves.
    draws = torch.linspace(0, 1 - 1e-6, 20_000)
    drawn = sample(logits[:1].expand(len(draws), -1), draws, options(**changes)).bincount(minlength=vocabulary)
    torch.testing.assert_close(drawn / len(draws), found[0].float(), atol=2e-4, rtol=0)


def test_the_last_draw_is_still_among_those_kept():
    logits = torch.tensor([[0.0, 5.0, -torch.inf, 1.0, -torch.inf]])
    for changes in ({}, {"top_p": 0.5}, {"top_p": 0.999}, {"top_k": 5}, {"min_p": 0.001}):
        assert sample(logits, torch.tensor([1 - 2**-24]), options(**changes)).item() in (0, 1, 3)


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2000, generator=generator) * torch.tensor([[3.0], [0.1], [1.0], [0.01]])
    draws = torch.rand(4, generator=generator)
    together = sample(logits, draws, options(top_p=0.95))
    alone = [sample(logits[i : i + 1], draws[i : i + 1], options(top_p=0.95))[0] for i in range(4)]
    assert torch.equal(together, torch.stack(alone))


def test_greedy_is_a_distribution_too():
    logits = torch.randn(2, 3, 9)
    assert torch.equal(distribution(logits, SamplingOptions()).argmax(-1), logits.argmax(-1))
    assert torch.equal(distribution(logits, SamplingOptions()).sum(-1), torch.ones(2, 3))
