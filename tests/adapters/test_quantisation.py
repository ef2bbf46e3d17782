"""Decoding with int8 weights through interleaved layers."""

import pytest
import torch
from herdkit.adapters import ModalityBatch, Placements, compose
from herdkit.adapters.quantisation import quantise
from herdkit.text.quantisation import Int8Linear
from toy_adapters import MemoryAdapter, SoftAdapter, ToyConfig, randomise, text_model


def make():
    text = text_model(dtype=torch.float32)
    adapters = (randomise(kind(ToyConfig(), text.config)).float() for kind in (MemoryAdapter, SoftAdapter))
    return compose(text, **{adapter.modality: adapter for adapter in adapters}).eval()


def test_decodes_with_the_rounded_weights_of_all_layers_that_a_token_meets():
    pytest.importorskip("torchao")
    model, rounded = quantise(make()), make()
    found = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    own = {name for name, module in rounded.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == {name for name in own if ".encoder" not in name}
    assert any(name.startswith("image.layers.") for name in found)
    for name in found:
        module = model.get_submodule(name)
        rounded.get_submodule(name).weight.data = module.weight * module.scale[:, None]
    one = torch.ones(1, dtype=torch.int64)
    where = Placements(0 * one, one, one, torch.full((1,), 6), 0 * one)
    image = ModalityBatch({"values": torch.randn(1, 5, 6), "lengths": torch.tensor([5])}, where)
    tokens = torch.randint(300, (1, 6))
    with torch.inference_mode():
        given, wanted, alone = model(tokens, {"image": image}), rounded(tokens, {"image": image}), rounded(tokens)
    assert (given - wanted).norm() < 0.02 * wanted.norm()
    assert (wanted - alone).norm() > 0.2 * wanted.norm()
