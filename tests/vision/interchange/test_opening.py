"""Llama 3.2 Vision opened for training: read by whoever shares it out, layer by layer."""

import herdkit
import mllama_models as mllama
import pytest
import torch
from herdkit.adapters import ModelDirectoryError, attach_adapters, compose
from herdkit.adapters.deferred import has_memory, without_memory
from herdkit.adapters.distribute import share_out
from herdkit.adapters.model_directory import open_model
from herdkit.text.weights import HeldWeights
from herdkit.train.place import Place
from herdkit.vision import VideoAdapter, VideoAdapterConfig
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The same model in both layouts."""
    tokenizer, folder = mllama.tokenizer(), tmp_path_factory.mktemp("models")
    model = mllama.tiny()
    mllama.give_places(model)
    first = mllama.save_theirs(model, folder / "huggingface", tokenizer)
    model = herdkit.load(first)
    return {"huggingface": first, "meta": herdkit.save(model, folder / "meta", "meta", model_parallel=2)}


def require_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", ["huggingface", "meta"])
def test_what_is_shared_out_is_what_is_loaded(released, layout):
    wanted = herdkit.load(released[layout], dtype=torch.float32).state_dict()
    model, weights = open_model(released[layout])
    assert all(parameter.is_meta for parameter in model.text.parameters())
    layers = [*model.image.interleaved().values()]
    assert len(layers) == 2
    assert not any(has_memory(layer) for layer in layers)
    kept = {name for name, tensor in model.image.state_dict().items() if not tensor.is_meta}
    assert all(name.startswith("cross_attention.") for name in model.image.state_dict().keys() - kept)
    require_equal(share_out(model, weights, Place(), 16).model.state_dict(), wanted)


def test_video_layers_begin_as_those_of_an_image_adapter_without_memory(released):
    model, weights = open_model(released["huggingface"])
    with without_memory():
        video = VideoAdapter(
            VideoAdapterConfig(
                frames=4, merge=2, tile_size=28, tile_tokens=17, max_tiles=4, n_image_layers=2, every=1, n_latents=3,
                dim=32, n_layers=1, n_heads=4, aggregator_ffn_dim=64,
            ),
            model.text.config,
        )  # fmt: skip
    video.see_as_image(model.image)
    model.attach(video)
    assert not any(has_memory(layer) for layer in video.interleaved().values())
    whole = share_out(model, weights, Place(), 16).model
    for place, layer in whole.image.interleaved().items():
        require_equal(whole.video.interleaved()[place].state_dict(), layer.state_dict())


def test_its_adapter_joins_a_model_without_memory(released, tmp_path):
    whole = herdkit.load(released["huggingface"])
    alone = herdkit.save(compose(whole.text, whole.tokenizer), tmp_path / "alone")
    model, weights = open_model(alone)
    attach_adapters(model, released["huggingface"], weights=weights)
    assert not any(has_memory(layer) for layer in model.image.interleaved().values())
    require_equal(share_out(model, weights, Place(), 16).model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("given", [True, False])
def test_its_adapter_has_its_memory_where_the_language_model_has(released, given):
    """Weights are given of language models in memory, too, as of those of a layout that is read whole."""
    whole = herdkit.load(released["huggingface"])
    model = compose(whole.text, whole.tokenizer)
    attach_adapters(model, released["huggingface"], weights=HeldWeights.of(model.text) if given else None)
    require_equal(model.state_dict(), whole.state_dict())


def test_a_layer_that_is_not_finite_is_named_when_it_is_read(released, tmp_path):
    path = herdkit.save(herdkit.load(released["huggingface"]), tmp_path / "ours")
    tensors = load_file(path / "image.safetensors")
    name = next(name for name in tensors if name.endswith("wo.weight") and name.startswith("cross_attention"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path / "image.safetensors")
    model, weights = open_model(path)
    with pytest.raises(ModelDirectoryError, match=f"image.safetensors: {name} holds values that are not finite"):
        share_out(model, weights, Place(), 16)
