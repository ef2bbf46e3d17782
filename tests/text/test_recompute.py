from collections import Counter

import pytest
import torch
from herdkit.text.recompute import ATTENTION, PRODUCTS, recompute
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))


def step(model, tokens):
    """Gradients, and what the forward and the backward pass call."""
    model.zero_grad()
    with Ops() as forward:
        loss = model.hidden(tokens)[..., :7].square().sum()
    with Ops() as backward:
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], forward.calls, backward.calls


@pytest.mark.parametrize(("what", "attention", "silu", "products"), [("full", 3, 3, 21), ("selective", 0, 3, 9)])
def test_makes_again_what_it_says_with_the_same_gradients(make_model, what, attention, silu, products):
    model = make_model(dtype=torch.float32)
    tokens = torch.randint(128, (2, 16))
    wanted, _, plain = step(model, tokens)
    recompute(model, what)
    found, _, again = step(model, tokens)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    more = again - plain
    assert sum(more[op] for op in ATTENTION) == attention
    assert more[torch.ops.aten.silu.default] == silu
    assert sum(more[op] for op in PRODUCTS) == products


def test_none_changes_nothing(make_model):
    model = make_model(dtype=torch.float32)
    forwards = [layer.forward for layer in model.layers]
    recompute(model, "none")
    assert [layer.forward for layer in model.layers] == forwards
