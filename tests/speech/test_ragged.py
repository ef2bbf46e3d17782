import torch
from herdkit.speech.ragged import Frames


def test_packing_leaves_the_padding_out_and_padding_brings_zeros():
    frames = Frames(torch.tensor([3, 1, 0, 2]), 3)
    padded = torch.randn(4, 3, 5)
    packed = frames.pack(padded)
    assert torch.equal(packed, torch.cat([padded[0], padded[1, :1], padded[3, :2]]))
    assert torch.equal(frames.pad(packed), padded * frames.valid[..., None])
    full = Frames(torch.tensor([3, 3]), 3)
    assert torch.equal(full.pad(full.pack(padded[:2])), padded[:2])


def test_gradients_are_those_of_indexing():
    frames = Frames(torch.tensor([3, 1, 2]), 4)
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frames.pack, padded)
    assert torch.autograd.gradcheck(frames.pad, packed)
    (frames.pad(packed) * torch.ones(3, 4, 2).double()).sum().backward()
    assert torch.equal(packed.grad, torch.ones(6, 2).double())


def test_garbage_in_the_padding_never_comes_in():
    frames = Frames(torch.tensor([2, 1]), 3)
    padded = torch.full((2, 3, 2), float("nan"))
    padded[0, :2], padded[1, 0] = 1.0, 2.0
    assert torch.isfinite(frames.pad(frames.pack(padded))).all()
