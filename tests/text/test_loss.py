import pytest
import torch
from herdkit.text import loss as loss_module
from herdkit.text.loss import linear_cross_entropy
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

N, D, V = 50, 16, 300
CHUNK = 4 * V * 7  # seven positions, so that the last chunk is a rest


@pytest.fixture(autouse=True, params=[4 * V * 3, 1 << 22], ids=["several-blocks", "one-block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", request.param)


def made(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("chunk_bytes", [1, CHUNK, 1 << 30])
def test_loss_and_gradients_are_those_of_torch(dtype, tolerance, chunk_bytes):
    hidden, weight, targets = made(dtype)
    logits = hidden @ weight.T
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    loss, right = linear_cross_entropy(hidden, weight, targets, chunk_bytes)
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    assert right == (logits.argmax(-1) == targets).sum()
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    for gradient, of_torch in zip(found, torch.autograd.grad(3 * wanted, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, of_torch, rtol=tolerance, atol=10 * tolerance)


def test_bfloat16_logits_under_autocast():
    hidden, weight, targets = made()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
        loss, _ = linear_cross_entropy(hidden, weight, targets, CHUNK)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    for gradient, of_torch in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - of_torch).norm() / of_torch.norm() < 0.02


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    inputs = made()[:2]
    inputs[frozen].requires_grad_(False)
    loss, _ = linear_cross_entropy(*inputs, made()[2])
    loss.backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_nothing_larger_than_a_chunk_is_made():
    hidden, weight, targets = made()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        loss, _ = linear_cross_entropy(hidden, weight, targets, CHUNK)
        loss.backward()
    assert largest <= max(CHUNK // 4, weight.numel()) < N * V


def test_no_targets_and_no_gradients():
    hidden, weight, targets = made()
    loss, right = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert (loss.item(), right.item()) == (0, 0)
    loss.backward()
    assert not weight.grad.any()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets)[0] > 0


def test_a_second_backward_pass_is_refused():
    loss, _ = linear_cross_entropy(*made())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
