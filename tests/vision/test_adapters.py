"""The image and video adapters: sizes, placement, memory, and what the composed model sees of them."""

import dataclasses
import json

import pytest
import torch
from herdkit.adapters import adapter_class, compose
from herdkit.adapters.contract import Contribution, InterleavedLayer, ModalityBatch, Placements
from herdkit.adapters.resampler import spread
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.model_directory import dataclass_from_dict
from herdkit.text.presets import preset as text_preset
from herdkit.vision import image_adapter, video_adapter
from herdkit.vision.image_adapter import ImageAdapter, ImageAdapterConfig, placement
from herdkit.vision.video_adapter import VideoAdapter, VideoAdapterConfig
from torch.nn import functional as F

TEXT = TransformerConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=50, max_seq_len=64)
ENCODER = {
    "type": "herdkit",
    "image_size": 16,
    "patch_size": 8,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "ffn_dim": 32,
    "n_global_layers": 1,
    "taps": [1],
    "max_tiles": 4,
}
L = 5  # tokens of a tile


def image_of(**changes) -> ImageAdapter:
    torch.manual_seed(0)
    config = ImageAdapterConfig(**({"encoder": ENCODER, "n_cross_layers": 2, "gate_init": 0.5} | changes))
    adapter = ImageAdapter(config, TEXT).double()
    with torch.no_grad():
        for name, p in adapter.encoder.named_parameters():
            if "gate" in name:
                p.fill_(0.5)
    return adapter


def video_of(**changes) -> VideoAdapter:
    torch.manual_seed(1)
    values = {
        "frames": 4,
        "merge": 2,
        "tile_size": 16,
        "tile_tokens": 5,
        "max_tiles": 4,
        "n_image_layers": 2,
        "every": 1,
        "n_latents": 3,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "aggregator_ffn_dim": 48,
        "gate_init": 0.5,
    }
    return VideoAdapter(VideoAdapterConfig(**(values | changes)), TEXT).double()


def images(grids: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    grid = torch.tensor(grids)
    counts = grid.prod(1)
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(len(grids), int(counts.max()), 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"tiles": tiles, "n_tiles": counts, "grid": grid}


def clips(grids: list[list[int]], frames: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = images(grids)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(grids), frames, *batch["tiles"].shape[1:])
    return batch | {"tiles": torch.randn(shape, generator=generator, dtype=torch.float64)}


def parameters(module) -> float:
    return sum(p.numel() for p in module.parameters())


def test_image_adapters_have_the_papers_sizes():
    for name, count, block in (("8b", 8, 218.1e6), ("70b", 20, 855.7e6), ("405b", 32, 3.188e9)):
        config = image_adapter.preset(name)
        assert config.encoder == {"type": "herdkit", "preset": "h14-448"}
        with torch.device("meta"):
            adapter = ImageAdapter(dataclasses.replace(config, encoder=ENCODER), text_preset(name))
        assert len(adapter.interleaved()) == count
        assert parameters(adapter.cross_attention) / count == pytest.approx(block, rel=3e-4)
        if name == "405b":
            assert parameters(adapter.cross_attention) == pytest.approx(100e9, rel=0.03)


def test_a_new_video_adapter_can_look_at_clips_as_the_image_adapter_does_at_pictures():
    image, video = image_of(), video_of()
    video.see_as_image(image)
    for place, layer in video.interleaved().items():
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, image.interleaved()[place].state_dict()[name]), name
    with pytest.raises(ValueError, match="layer before text layer 1 is of another size"):
        video_of(ffn_dim=20).see_as_image(image)
    del image.cross_attention["3"]
    with pytest.raises(ValueError, match="the image adapter has no layer before text layer 3"):
        video.see_as_image(image)


def test_frames_pass_the_new_aggregator_nearly_unchanged():
    """So that each latent is most like the token at its own piece of the clip."""
    torch.manual_seed(0)
    video = video_of(n_latents=10, max_tiles=1, merge=4, dim=32, n_heads=4)
    frames = torch.randn(1, 4, 5, TEXT.dim, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (video.aggregator.latents, video.aggregator.time_embedding, video.aggregator.place_embedding):
            tensor.mul_(3)
    found = video.output_projection(video.aggregator(video.input_projection(frames)))
    times, places = spread(10, 4, 5)
    identity = video.output_projection(video.aggregator(torch.zeros_like(video.input_projection(frames))))
    change = F.normalize(found - identity, dim=-1)[0]
    alike = change @ F.normalize(frames.flatten(1, 2), dim=-1)[0].T
    assert alike.argmax(-1).tolist() == (times * 5 + places).tolist()


def test_video_adapters_have_the_papers_sizes():
    """Aggregator and video layers together: 0.6B at 8B, 4.6B at 70B; two and five video layers."""
    for name, total, cross, places in (
        ("8b", 0.6e9, 0.44e9, [15, 31]),
        ("70b", 4.6e9, 4.28e9, [15, 31, 47, 63, 79]),
    ):
        counts = set()
        for stage in ("pretrain", "finetune"):
            with torch.device("meta"):
                adapter = VideoAdapter(video_adapter.preset(name, stage), text_preset(name))
            assert list(adapter.interleaved()) == places
            assert parameters(adapter.cross_attention) == pytest.approx(cross, rel=0.01)
            assert parameters(adapter) == pytest.approx(total, rel=0.02)
            counts.add(parameters(adapter))
        assert len(counts) == 1
    assert video_adapter.preset("8b", "pretrain").merge == 16
    finetune = video_adapter.preset("8b")
    assert (finetune.frames, finetune.frames // finetune.merge) == (64, 2)


def test_placement_is_the_release_rule():
    assert placement(32, 8) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert placement(80, 20) == list(range(3, 80, 4))
    assert placement(126, 32) == list(range(1, 126, 4))
    assert placement(6, 3) == [1, 3, 5]
    assert placement(5, 5) == [0, 1, 2, 3, 4]
    for layers, crosses in ((4, 3), (4, 5)):
        with pytest.raises(ValueError, match=f"{crosses} cross-attention layers cannot"):
            placement(layers, crosses)


@pytest.mark.parametrize(("name", "adapter"), [("image", image_of()), ("video", video_of())], ids=["image", "video"])
def test_adapters_keep_the_contract(name, adapter):
    kind = adapter_class(name)
    assert type(adapter).__name__ == kind.__name__
    assert adapter.placeholder == f"<|{name}|>"
    assert (adapter.modality, adapter.part, adapter.kind) == (name, name, name)
    assert all(isinstance(layer, InterleavedLayer) for layer in adapter.interleaved().values())
    # What config.json keeps of the adapter builds one of the same parameters.
    stored = json.loads(json.dumps(dataclasses.asdict(adapter.config)))
    again = type(adapter)(dataclass_from_dict(adapter.config_class, stored), TEXT)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in adapter.named_parameters()}
    assert again.prepare == adapter.prepare


def test_tiny_presets_fit_the_tiny_language_model():
    text = text_preset("tiny")
    image, video = ImageAdapter(image_adapter.preset("tiny"), text), VideoAdapter(video_adapter.preset("tiny"), text)
    assert list(image.interleaved()) == list(video.interleaved()) == [1, 3, 5]
    tiles = torch.randint(0, 256, (2, 8, 1, 3, 64, 64), dtype=torch.uint8)
    one = {"n_tiles": torch.tensor([1, 1]), "grid": torch.tensor([[1, 1], [1, 1]])}
    assert image({"tiles": tiles[:, 0], **one}).memory.shape == (2, 65, 192)
    assert video({"tiles": tiles, **one}, image=image).memory.shape == (2, 16, 192)


def test_image_memory_is_the_projected_features_of_real_tiles():
    adapter = image_of()
    batch = images([[1, 1], [2, 2], [1, 3]])
    given = adapter(batch)
    assert isinstance(given, Contribution)
    features, mask = adapter.encoder(**batch)
    assert torch.equal(given.memory_mask, mask)
    assert mask.sum(1).tolist() == [L, 4 * L, 3 * L]
    torch.testing.assert_close(given.memory[mask], adapter.projection(features.flatten(1, 2)[mask]))
    assert given.soft_tokens.shape == (3, 1, 32)
    assert torch.equal(given.soft_tokens[1, 0], adapter.placeholder_embedding)


def test_an_image_adapter_over_a_timm_tower():
    encoder = {
        "type": "timm",
        "model": "vit_tiny_patch16_224",
        "image_size": 32,
        "taps": [1],
        "max_tiles": 2,
        "options": {"depth": 2},
    }
    adapter = image_of(encoder=encoder)
    assert (adapter.prepare.tile_size, adapter.prepare.max_tiles) == (32, 2)
    tiles = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    grid = torch.tensor([[1, 2], [1, 1]])
    given = adapter({"tiles": tiles, "n_tiles": grid.prod(1), "grid": grid})
    assert given.memory.shape == (2, 10, 32)
    assert given.memory_mask.sum(1).tolist() == [10, 5]


def test_what_is_changed_of_an_encoder_is_what_config_json_keeps():
    adapter = image_of(encoder=ENCODER)
    batch = images([[1, 1], [1, 3]])
    with torch.no_grad():
        before = adapter(batch).memory
        adapter.change_encoder(padding="released")
        after = adapter(batch).memory
    assert (after - before)[0].abs().max() > 1e-4
    assert "padding" not in ENCODER
    stored = json.loads(json.dumps(dataclasses.asdict(adapter.config)))
    again = ImageAdapter(dataclass_from_dict(ImageAdapterConfig, stored), TEXT).double()
    assert again.encoder.config == adapter.encoder.config
    again.load_state_dict(adapter.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batch).memory, after)
    for changes, named in (
        ({"padding": "none"}, "padding must be one of"),
        ({"dim": 8}, r"encoder\.dim cannot be changed"),
        ({"tile_tables": "arrangement"}, r"encoder\.tile_tables cannot be changed to 'arrangement'"),
    ):
        with pytest.raises(ValueError, match=named):
            adapter.change_encoder(**changes)
    assert again.config == adapter.config
    timm = {"type": "timm", "model": "vit_tiny_patch16_224", "image_size": 32, "options": {"depth": 1}}
    with pytest.raises(ValueError, match="a TimmEncoder cannot be changed"):
        image_of(encoder=timm).change_encoder(padding="clean")


def at(starts: list[int], rows: list[int], end: int = 12) -> Placements:
    n = len(starts)
    return Placements(
        row=torch.tensor(rows),
        start=torch.tensor(starts),
        length=torch.ones(n, dtype=torch.int64),
        end=torch.full((n,), end),
        input=torch.arange(n),
    )


def herd(**changes):
    torch.manual_seed(2)
    return compose(text=Transformer(TEXT).double(), image=image_of(**changes), video=video_of())


TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(3))


def test_text_sees_the_image_from_its_placeholder_on_and_padding_never():
    model = herd()
    batch = images([[1, 1], [2, 2]])
    where = at([4, 6], [0, 1])
    with torch.no_grad():
        plain = model(TOKENS)
        seen = model(TOKENS, {"image": ModalityBatch(batch, where)})
        moved = (seen - plain).abs().amax(-1)
        assert not moved[0, :4].any()
        assert not moved[1, :6].any()
        assert (moved[0, 4:] > 1e-4).all()
        assert (moved[1, 6:] > 1e-4).all()
        # Junk in padded tiles, and other images of the batch, leave the first row's bits alone.
        junk = batch | {"tiles": batch["tiles"].clone()}
        junk["tiles"][0, 1:] = torch.nan
        assert torch.equal(model(TOKENS, {"image": ModalityBatch(junk, where)}), seen)
        alone = {"tiles": batch["tiles"][:1, :1], "n_tiles": batch["n_tiles"][:1], "grid": batch["grid"][:1]}
        single = model(TOKENS[:1], {"image": ModalityBatch(alone, at([4], [0]))})
        torch.testing.assert_close(single, seen[:1], rtol=0, atol=1e-10)


def test_gates_at_zero_show_only_the_placeholder():
    model = herd(gate_init=0.0)
    where = at([4, 6], [0, 1])
    with torch.no_grad():
        first = model(TOKENS, {"image": ModalityBatch(images([[1, 1], [2, 2]]), where)})
        second = model(TOKENS, {"image": ModalityBatch(images([[1, 1], [2, 2]], seed=5), where)})
    assert torch.equal(first, second)


def test_every_weight_of_both_adapters_learns_from_text():
    model = herd()
    inputs = {
        "image": ModalityBatch(images([[2, 2]]), at([2], [0])),
        "video": ModalityBatch(clips([[1, 2]]), at([3], [1])),
    }
    model(TOKENS, inputs).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_video_memory_is_ordered_in_time():
    image, video = image_of(), video_of()
    batch = clips([[1, 1], [1, 2]])
    memory = video(batch, image=image).memory
    assert memory.shape == (2, 2 * 3, 32)

    def reordered(order: list[int]) -> torch.Tensor:
        return video(batch | {"tiles": batch["tiles"][:, order]}, image=image).memory

    # Each effective frame is made of its own frames alone: groups may be exchanged as wholes.
    torch.testing.assert_close(reordered([2, 3, 0, 1]), torch.cat([memory[:, 3:], memory[:, :3]], 1))
    # Within a group the order counts, and the other group is untouched.
    swapped = reordered([1, 0, 2, 3])
    assert ((swapped - memory)[:, :3].abs().amax((1, 2)) > 1e-3).all()
    torch.testing.assert_close(swapped[:, 3:], memory[:, 3:])
    # Every frame counts.
    for frame in range(4):
        other = batch | {"tiles": batch["tiles"].clone()}
        other["tiles"][:, frame] += 1
        moved = (video(other, image=image).memory - memory).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [frame < 2] * 3 + [frame >= 2] * 3


def test_clips_do_not_depend_on_their_batch_nor_on_padding():
    image, video = image_of(), video_of()
    batch = clips([[1, 1], [2, 2], [1, 2]])
    memory = video(batch, image=image).memory
    real = torch.arange(4) < batch["n_tiles"][:, None]
    junk = torch.where(real[:, None, :, None, None, None], batch["tiles"], torch.nan)
    assert torch.equal(video(batch | {"tiles": junk}, image=image).memory, memory)
    for i, count in enumerate([1, 4, 2]):
        alone = {name: value[i : i + 1] for name, value in batch.items()}
        alone["tiles"] = alone["tiles"][:, :, :count]
        torch.testing.assert_close(video(alone, image=image).memory[0], memory[i], rtol=0, atol=1e-10)


def test_a_frame_is_encoded_as_an_image():
    image = image_of()
    batch = clips([[1, 2], [1, 1]])
    frames, mask = image.encode_frames(**batch)
    for f in range(4):
        still = image(batch | {"tiles": batch["tiles"][:, f]})
        torch.testing.assert_close(frames[:, f], still.memory)
        assert torch.equal(mask[:, f], still.memory_mask)


def test_a_frozen_image_adapter_gets_no_gradient_from_video():
    image, video = image_of(), video_of()
    image.requires_grad_(False)
    video(clips([[1, 1]]), image=image).memory.sum().backward()
    assert all(p.grad is None for p in image.parameters())
    assert video.aggregator.latents.grad.any()


def test_video_layers_run_before_image_layers():
    model = herd()
    order = []
    for name in ("image", "video"):
        for i, layer in getattr(model, name).interleaved().items():
            layer.register_forward_pre_hook(lambda *_, name=name, i=i: order.append((i, name)))
    inputs = {
        "image": ModalityBatch(images([[1, 1]]), at([2], [0])),
        "video": ModalityBatch(clips([[1, 1]]), at([3], [0])),
    }
    model(TOKENS[:1], inputs)
    assert order == [(1, "video"), (1, "image"), (3, "video"), (3, "image")]


def test_wrong_configs_are_named():
    for change, named in (
        ({"merge": 3}, "merge"),
        ({"max_merge": 1}, "max_merge"),
        ({"every": 3}, "every"),
        ({"n_latents": 0}, "n_latents"),
    ):
        with pytest.raises(ValueError, match=named):
            video_of(**change)
    with pytest.raises(ValueError, match="n_cross_layers"):
        image_of(n_cross_layers=0)
    with pytest.raises(ValueError, match="tile_size of the video adapter is 32"):
        video_of(tile_size=32)(clips([[1, 1]]), image=image_of())
    for presets, name in ((image_adapter, "9b"), (video_adapter, "405b")):
        with pytest.raises(ValueError, match=name):
            presets.preset(name)


def test_memory_positions_say_where_in_the_whole_image_a_patch_is():
    adapter = image_of(memory_positions=2)
    batch = images([[1, 2], [1, 1]])
    with torch.no_grad():
        memory = adapter(batch).memory.view(2, 2, L, -1)
        left, right = adapter.memory_position.clone().unbind(1)  # of the upper and the lower row
        adapter.memory_position.zero_()
        plain = adapter(batch).memory.view(2, 2, L, -1)
    added = memory - plain
    torch.testing.assert_close(added[1, 0, 1:], torch.stack([left, right], 1).flatten(0, 1))
    torch.testing.assert_close(added[0, 0, 1::2], left)
    torch.testing.assert_close(added[0, 0, 2::2], 0.75 * left + 0.25 * right)
    torch.testing.assert_close(added[0, 1, 2::2], right)
    assert not added[:, :, 0].any()
    frames, _ = adapter.encode_frames(batch["tiles"][:, None], batch["n_tiles"], batch["grid"])
    torch.testing.assert_close(frames[:, 0], plain.flatten(1, 2))
    assert "memory_position" not in image_of().state_dict()
    with pytest.raises(ValueError, match="memory_positions"):
        image_of(memory_positions=-1)
