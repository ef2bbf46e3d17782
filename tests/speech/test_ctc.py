import itertools

import pytest
import torch
from herdkit.speech import ctc_loss, greedy_ctc
from torch.nn import functional as F


def collapse(path) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token != 0]


@pytest.mark.parametrize("target", [[1], [1, 2], [2, 2], [1, 2, 1]])
def test_the_loss_is_that_of_all_paths_of_a_small_lattice(target):
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 3, dtype=torch.float64)
    scores = logits[0].log_softmax(-1)
    paths = [path for path in itertools.product(range(3), repeat=4) if collapse(path) == target]
    likelihood = sum(torch.exp(sum(scores[t, c] for t, c in enumerate(path))) for path in paths)
    loss, count = ctc_loss(logits, torch.tensor([4]), torch.tensor([target]), torch.tensor([len(target)]))
    assert loss.item() == pytest.approx(-likelihood.log().item(), rel=1e-10)
    assert count == len(target)


def made_batch(dtype=torch.float64):
    torch.manual_seed(1)
    logits = torch.randn(3, 20, 6, dtype=dtype)
    targets = torch.randint(1, 6, (3, 7))
    return logits, torch.tensor([20, 15, 9]), targets, torch.tensor([7, 5, 0])


def test_a_batch_is_the_sum_of_torch_ctc_losses_and_padding_counts_for_nothing():
    logits, lengths, targets, target_lengths = made_batch()
    logits.requires_grad_()
    loss, count = ctc_loss(logits, lengths, targets, target_lengths)
    loss.backward()
    alone = 0.0
    for n in range(3):
        scores = logits[n : n + 1, : lengths[n]].detach().log_softmax(-1).transpose(0, 1)
        alone += F.ctc_loss(
            scores,
            targets[n : n + 1, : target_lengths[n]],
            lengths[n : n + 1],
            target_lengths[n : n + 1],
            reduction="none",
        ).item()
    assert loss.item() == pytest.approx(alone, rel=1e-12)
    assert count == 12
    assert not logits.grad[1, 15:].any()
    assert not logits.grad[2, 9:].any()
    assert logits.grad[2, :9].any(), "an empty target is all blanks"

    targets[1, 5:], targets[2] = -100, 999
    dirty = logits.detach().clone()
    dirty[1, 15:] = 1e4
    again, _ = ctc_loss(dirty, lengths, targets, target_lengths)
    assert again.item() == loss.item()


def test_bfloat16_logits_are_scored_in_float32():
    logits, lengths, targets, target_lengths = made_batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = ctc_loss(logits.bfloat16(), lengths, targets, target_lengths)
    expected, _ = ctc_loss(logits.bfloat16().float(), lengths, targets, target_lengths)
    assert loss.dtype == torch.float32
    assert loss == expected


def test_a_target_that_cannot_be_written_is_named():
    logits = torch.zeros(2, 5, 4)
    lengths = torch.tensor([5, 5])
    targets = torch.tensor([[1, 2, 3, 1, 2], [1, 1, 1, 2, 2]])
    with pytest.raises(ValueError, match=r"utterance 1 .* 4 target tokens with 2 repeats do not fit in 5 frames"):
        ctc_loss(logits, lengths, targets, torch.tensor([5, 4]))
    loss, _ = ctc_loss(logits, lengths, targets, torch.tensor([5, 3]))
    assert torch.isfinite(loss)


@pytest.mark.parametrize(("token", "blank"), [(0, 0), (4, 0), (-1, 0), (2, 2)])
def test_targets_outside_the_classes_or_the_blank_are_refused(token, blank):
    with pytest.raises(ValueError, match=rf"in 0\.\.3 and not the blank, {blank}"):
        ctc_loss(torch.zeros(1, 5, 4), torch.tensor([5]), torch.tensor([[1, token]]), torch.tensor([2]), blank)


def test_any_class_can_be_the_blank():
    logits, lengths, targets, target_lengths = made_batch()
    expected, _ = ctc_loss(logits, lengths, targets, target_lengths)
    turned = logits.roll(-1, dims=2)  # class 0 becomes the last, 5
    found, _ = ctc_loss(turned, lengths, targets - 1, target_lengths, blank=5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert greedy_ctc(turned, lengths, blank=5) == [[t - 1 for t in row] for row in greedy_ctc(logits, lengths)]


def test_greedy_equals_collapsing_each_path():
    torch.manual_seed(0)
    logits, lengths = torch.randn(8, 30, 4), torch.tensor([30, 1, 2, 17, 30, 5, 9, 29])
    expected = [collapse(logits[n, : lengths[n]].argmax(-1).tolist()) for n in range(8)]
    assert greedy_ctc(logits, lengths) == expected
    assert any(len(set(path)) < len(path) for path in expected)
