"""Layers that are compiled train as they do otherwise. (Decoding: test_generate.py.)"""

import pytest
import torch
from herdkit.text.compiled import compile_layers
from herdkit.text.recompute import recompute
from torch._dynamo.testing import CompileCounterWithBackend


def gradients(model, tokens, documents):
    model.zero_grad()
    model.hidden(tokens, documents=documents)[..., :7].square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_gradients_are_those_of_eager_layers(make_model, what):
    torch._dynamo.reset()
    model = make_model(n_layers=4)
    tokens = torch.randint(128, (2, 24))
    documents = {
        "whole rows": None,
        "masked": torch.arange(24).ge(9).long().repeat(2, 1),
        "rearranged": torch.arange(24).div(5, rounding_mode="floor").repeat(2, 1),
    }
    wanted = {name: gradients(model, tokens, given) for name, given in documents.items()}
    counter = CompileCounterWithBackend("aot_eager")
    recompute(model, what)
    compile_layers(model, counter)
    for name, given in documents.items():
        found = gradients(model, tokens, given)
        for key, value in wanted[name].items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12 * value.abs().max().item())
        if name == "whole rows":
            assert counter.frame_count == 1, "one graph for all layers"
    assert counter.frame_count >= 2
