import sys

import pytest
import torch
from herdkit.text import SamplingOptions, generate
from herdkit.text.quantisation import Int8Linear, quantise


def test_rounds_by_half_a_scale_at_most(make_model):
    pytest.importorskip("torchao")
    model, exact = make_model(torch.float32), make_model(torch.float32)
    assert quantise(model) is model
    for name, module in exact.named_modules():
        if isinstance(module, torch.nn.Linear):
            found = model.get_submodule(name)
            assert isinstance(found, Int8Linear)
            error = (found.weight * found.scale[:, None] - module.weight).abs()
            assert (error <= found.scale[:, None] * 0.501).all()
            torch.testing.assert_close(found.scale, module.weight.detach().abs().amax(1) / 127, rtol=0.01, atol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_decodes_with_the_rounded_weights(make_model, tied, rows):
    pytest.importorskip("torchao")
    model = quantise(make_model(torch.float32, tie_embeddings=tied))
    rounded = make_model(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            rounded.get_submodule(name).weight.data = module.weight * module.scale[:, None]
    rounded.tok_embeddings.weight.data = model.tok_embeddings.weight.data
    tokens = torch.randint(128, (rows, 1))
    with torch.inference_mode():
        found, expected = model(tokens), rounded(tokens)
    # bfloat16 activations: 8 bits.
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert len(generate(model, [[1, 2, 3]] * rows, SamplingOptions(max_new_tokens=4))) == rows


def test_without_torchao_the_error_names_the_extra(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = make_model(torch.float32, tie_embeddings=True)
    with pytest.raises(ModuleNotFoundError, match="herdkit\\[quantisation\\]"):
        quantise(model)
    assert model.output is None, "the model is as it was"
