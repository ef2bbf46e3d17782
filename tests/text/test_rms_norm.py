"""RMSNorm beside torch's own."""

import pytest
import torch
from herdkit.text.rms_norm import rms_norm
from torch.nn import functional as F


def given(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, dtype=dtype, generator=generator) + 1
    weight = torch.randn(shape[-1], dtype=dtype, generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 7), (2, 4, 3, 8), (0, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_torch(shape, dtype):
    x, weight = given(*shape, dtype=dtype)
    mine, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5)
    torch.testing.assert_close(mine, theirs)
    gradient = torch.randn_like(theirs)
    both = (torch.autograd.grad(y, (x, weight), gradient) for y in (mine, theirs))
    for of_mine, of_theirs in zip(*both, strict=True):
        torch.testing.assert_close(of_mine, of_theirs)


def test_gradients_are_those_of_finite_differences_with_a_large_epsilon():
    x, weight = given(2, 3, 6)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.5), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight.detach(), 0.5), (x,))


def test_views_and_rows_of_zeros():
    x, weight = given(4, 6, 8)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(rms_norm(turned, weight, 1e-5), F.rms_norm(turned, weight.shape, weight, 1e-5))
    gradient = torch.randn(4, 6, 8, dtype=x.dtype).transpose(0, 1)
    both = (
        torch.autograd.grad(f(turned), x, gradient)[0]
        for f in (
            lambda x: rms_norm(x, weight, 1e-5),
            lambda x: F.rms_norm(x, weight.shape, weight, 1e-5),
        )
    )
    torch.testing.assert_close(*both)
    zeros = torch.zeros(2, 8, requires_grad=True)
    rms_norm(zeros, torch.ones(8), 1e-5).sum().backward()
    torch.testing.assert_close(zeros.grad, torch.full((2, 8), 1e5**0.5))


def test_mixed_precision_is_as_in_torch():
    x, weight = given(3, 8, dtype=torch.float32)
    half = x.to(torch.bfloat16)
    torch.testing.assert_close(rms_norm(half, weight, 1e-5), F.rms_norm(half, weight.shape, weight, 1e-5))
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs)
