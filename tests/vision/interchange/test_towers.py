"""Towers of timm and open_clip as encoders, and their weights in ours: features and gradients."""

import copy
from importlib.metadata import EntryPoint, EntryPoints

import open_clip
import pytest
import timm
import torch
from herdkit.vision.encoder import VisionConfig, VisionTransformer
from herdkit.vision.interchange import (
    ForeignConfig,
    InterchangeError,
    OpenClipEncoder,
    TimmEncoder,
    build_encoder,
    load_open_clip,
    load_timm,
    load_vision_state,
    towers,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 4, "width": 32, "head_width": 8, "patch_size": 7, "mlp_ratio": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 1},
}


def roughen(module: nn.Module) -> nn.Module:
    """Random weights of deviation 0.3 in float64, so that no path is silent."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in module.double().named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1 if "n" in name and p.dim() == 1 and "weight" in name else 0))
    return module.eval()


def timm_vit(**options) -> TimmViT:
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    return roughen(TimmViT(**(sizes | {"num_classes": 5} | options)))


def open_clip_visual() -> open_clip.transformer.VisionTransformer:
    return roughen(open_clip.transformer.VisionTransformer(28, 7, 32, 4, 4, 2.0, output_dim=16))


def ours(**changes) -> VisionTransformer:
    sizes = {"image_size": 28, "patch_size": 7, "dim": 32, "n_layers": 4, "n_heads": 4, "ffn_dim": 64}
    return VisionTransformer(VisionConfig(**(sizes | {"attention_bias": True} | changes))).double()


TIMM_LIKE = {"patch_bias": True, "input_norm": False, "norm_eps": 1e-6}


def tiles(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 1, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def one_tile(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(n, dtype=torch.int64), torch.ones(n, 2, dtype=torch.int64)


def same_in_value_and_gradient(encoder: VisionTransformer, foreign: nn.Module, run, rename: dict[str, str]) -> None:
    """Our features and those that `run` makes of the foreign tower; gradients of the input and of some weights."""
    pixels, theirs_in = tiles().requires_grad_(), tiles().requires_grad_()
    features, _ = encoder(pixels, *one_tile(2))
    theirs = run(theirs_in[:, 0])
    torch.testing.assert_close(features[:, 0], theirs, rtol=1e-8, atol=1e-8)
    weights = torch.randn(theirs.shape, dtype=torch.float64)
    (features[:, 0] * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(pixels.grad, theirs_in.grad, rtol=1e-7, atol=1e-7)
    for a, b in rename.items():
        grad = foreign.get_parameter(b).grad
        torch.testing.assert_close(encoder.get_parameter(a).grad, grad.view(encoder.get_parameter(a).shape))


def interleave(final: torch.Tensor, taps: list[torch.Tensor]) -> torch.Tensor:
    """Channel c of tap j stands at D + c * taps + j."""
    width, count = final.shape[-1], len(taps)
    out = final.new_empty(*final.shape[:-1], width * (1 + count))
    for c in range(width):
        out[..., c] = final[..., c]
        for j in range(count):
            out[..., width + count * c + j] = taps[j][..., c]
    return out


def timm_features(model: TimmViT, pixels: torch.Tensor, taps: tuple[int, ...]) -> torch.Tensor:
    seen = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, given, i=i: seen.__setitem__(i, given[0]))
        for i, block in enumerate(model.blocks)
    ]
    final = model.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    return interleave(final, [seen[tap] for tap in taps])


def open_clip_features(visual, pixels: torch.Tensor, taps: tuple[int, ...]) -> torch.Tensor:
    seen = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, given, kwargs, i=i: seen.__setitem__(i, given[0]), with_kwargs=True)
        for i, block in enumerate(visual.transformer.resblocks)
    ]
    hooks.append(visual.transformer.register_forward_hook(lambda _, given, out: seen.__setitem__("last", out)))
    visual(pixels)
    for hook in hooks:
        hook.remove()
    return interleave(visual.ln_post(seen["last"]), [seen[tap] for tap in taps])


def test_timm_weights_in_our_encoder():
    foreign, encoder = timm_vit(), ours(taps=(0, 2, 3), **TIMM_LIKE)
    load_timm(encoder, foreign)
    same_in_value_and_gradient(
        encoder,
        foreign,
        lambda pixels: timm_features(foreign, pixels, (0, 2, 3)),
        {
            "patch_embedding.weight": "patch_embed.proj.weight",
            "layers.1.attention.qkv.weight": "blocks.1.attn.qkv.weight",
            "layers.3.mlp.fc1.bias": "blocks.3.mlp.fc1.bias",
            "position_embedding": "pos_embed",
            "class_embedding": "cls_token",
        },
    )


def test_open_clip_weights_in_our_encoder():
    foreign, encoder = open_clip_visual(), ours(taps=(1, 3))
    load_open_clip(encoder, foreign)
    same_in_value_and_gradient(
        encoder,
        foreign,
        lambda pixels: open_clip_features(foreign, pixels, (1, 3)),
        {
            "patch_embedding.weight": "conv1.weight",
            "layers.1.attention.qkv.weight": "transformer.resblocks.1.attn.in_proj_weight",
            "layers.2.attention.qkv.bias": "transformer.resblocks.2.attn.in_proj_bias",
            "layers.3.mlp.fc2.weight": "transformer.resblocks.3.mlp.c_proj.weight",
            "input_norm.weight": "ln_pre.weight",
        },
    )
    pooled = encoder.pooled(tiles(), *one_tile(2)) @ foreign.proj
    torch.testing.assert_close(pooled, foreign(tiles()[:, 0]), rtol=1e-8, atol=1e-8)


def test_weights_from_files_and_whole_models(tmp_path):
    foreign = open_clip_visual()
    expected = ours()
    load_open_clip(expected, foreign)
    whole = {f"visual.{name}": t for name, t in foreign.state_dict().items()}
    whole |= {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.zeros(3)}
    torch.save({"state_dict": whole, "epoch": 3}, tmp_path / "clip.pt")
    save_file(foreign.state_dict(), tmp_path / "visual.safetensors")
    for source in (whole, tmp_path / "clip.pt", str(tmp_path / "visual.safetensors")):
        encoder = ours()
        load_open_clip(encoder, source)
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), expected.parameters(), strict=True))
    with pytest.raises(InterchangeError, match=r"nowhere\.pt: no such file"):
        load_open_clip(ours(), tmp_path / "nowhere.pt")


def test_towers_that_do_not_match_are_named():
    with pytest.raises(InterchangeError, match=r"surplus patch_embedding\.bias"):
        load_timm(ours(input_norm=False), timm_vit())
    with pytest.raises(InterchangeError, match=r"missing input_norm\.weight"):
        load_timm(ours(patch_bias=True), timm_vit())
    with pytest.raises(
        InterchangeError, match=r"layers\.0\.mlp\.fc1\.weight has shape \(64, 32\), expected \(96, 32\)"
    ):
        load_timm(ours(ffn_dim=96, **TIMM_LIKE), timm_vit())
    with pytest.raises(InterchangeError, match=r"blocks\.0\.ls1\.gamma"):
        load_timm(ours(**TIMM_LIKE), timm_vit(init_values=1e-2))
    with pytest.raises(InterchangeError, match="missing class_embedding"):
        load_timm(ours(**TIMM_LIKE), timm_vit(class_token=False, global_pool="avg", fc_norm=False))


def test_a_pretrained_encoder_grows_into_the_full_one():
    """From contrastive pre-training to the adapter: tiles, taps, global layers and a larger tile size."""
    small = roughen(ours())
    same = ours(max_tiles=4, n_global_layers=2, taps=(1, 2))
    load_vision_state(same, small)
    a, _ = small(tiles(), *one_tile(2))
    b, _ = same(tiles(), *one_tile(2))
    torch.testing.assert_close(b[..., :32], a)
    assert torch.equal(same.tile_position_embedding[0, 0, 0], small.position_embedding[0])
    torch.testing.assert_close(same.tile_position_embedding[3, 3, 16], small.position_embedding[16])

    large = ours(max_tiles=4, n_global_layers=2, taps=(1, 2), image_size=56)
    load_vision_state(large, small)
    assert torch.equal(large.position_embedding[0], small.position_embedding[0])
    grid = small.position_embedding[1:].view(4, 4, 32).permute(2, 0, 1)[None]
    stretched = nn.functional.interpolate(grid.float(), size=(8, 8), mode="bilinear", align_corners=True)
    torch.testing.assert_close(
        large.position_embedding[1:].view(8, 8, 32).permute(2, 0, 1).float(), stretched[0], rtol=1e-5, atol=1e-5
    )

    larger = ours(max_tiles=4, n_global_layers=2, image_size=112)
    state = roughen(large).state_dict()
    load_vision_state(larger, state)
    assert torch.equal(larger.tile_position_embedding[1, 2, 0], large.tile_position_embedding[1, 2, 0])
    torch.testing.assert_close(larger.tile_position_embedding[1, 2, 256], large.tile_position_embedding[1, 2, 64])
    assert torch.equal(larger.global_layers[1].gate_mlp, large.global_layers[1].gate_mlp)
    with pytest.raises(InterchangeError, match=r"surplus global_layers\.0"):
        load_vision_state(ours(), same)


@pytest.mark.parametrize("taps", [(), (1, 3)])
def test_a_timm_tower_as_encoder(taps):
    config = ForeignConfig(model="vit_tiny_patch16_224", taps=taps)
    model = timm_vit(num_classes=0)
    encoder = TimmEncoder(config, copy.deepcopy(model))
    counts, grid = torch.tensor([1, 3, 1]), torch.tensor([[1, 1], [1, 3], [1, 1]])
    given = torch.randn(3, 3, 3, 28, 28, dtype=torch.float64)
    features, mask = encoder(given, counts, grid)
    assert features.shape == (3, 3, 17, encoder.width)
    real = torch.arange(3) < counts[:, None]
    assert torch.equal(mask, real.repeat_interleave(17, 1))
    torch.testing.assert_close(features[real], timm_features(model, given[real], taps))
    assert not features[~real].any()
    pooled = encoder.pooled(given, counts, grid)
    torch.testing.assert_close(pooled[1], model(given[1]).mean(0))
    # Each tile alone, so that junk in padded tiles is never looked at.
    junk = torch.where(real[..., None, None, None], given, torch.nan)
    assert torch.equal(encoder(junk, counts, grid)[0], features)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_towers_that_give_maps_are_encoders(name):
    """Convolutions and windows: the map of the last stage, place by place, row by row."""
    small = {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)} if name.startswith("swin") else {}
    size = 224 if small else 64
    encoder = TimmEncoder(ForeignConfig(model=name, image_size=size if small else None, options=small)).eval()
    tiles = torch.randn(2, 1, 3, size, size)
    with torch.no_grad():
        features, mask = encoder(tiles, *one_tile(2))
        whole = encoder.model.forward_features(tiles[:, 0])
    if small:
        whole = whole.permute(0, 3, 1, 2)
    side = whole.shape[2]
    assert features.shape == (2, 1, side * side, encoder.width)
    torch.testing.assert_close(features[1, 0, side + 1], whole[1, :, 1, 1])
    assert mask.all()
    with torch.no_grad():
        assert encoder.pooled(tiles, *one_tile(2)).shape == (2, encoder.pooled_width)


def test_taps_of_towers_of_many_resolutions_are_refused():
    with pytest.raises(ValueError, match=r"'test_convnext' has no one row of tokens .* leave its taps out"):
        TimmEncoder(ForeignConfig(model="test_convnext", taps=(1,)))


def test_encoders_by_name(monkeypatch):
    vit = {"type": "timm", "model": "vit_tiny_patch16_224", "image_size": 32, "taps": [3, 7]}
    encoder = build_encoder(vit | {"options": {"depth": 8, "patch_size": 8}})
    assert isinstance(encoder, TimmEncoder)
    assert (encoder.image_size, encoder.width, encoder.pooled_width) == (32, 3 * 192, 192)
    config = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert (tuple(encoder.mean), tuple(encoder.std)) == (config.mean, config.std)
    raw = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    features, _ = encoder(raw, *one_tile(2))
    assert features.shape == (2, 1, 17, 576)
    assert encoder.pooled(raw, *one_tile(2)).shape == (2, 192)

    tiny = build_encoder({"type": "herdkit", "preset": "tiny", "taps": [2], "n_layers": 3})
    assert isinstance(tiny, VisionTransformer)
    assert (tiny.config.n_layers, tiny.config.taps, tiny.config.image_size) == (3, (2,), 64)
    spec = {"type": "herdkit", "image_size": 32, "patch_size": 8, "dim": 16, "n_layers": 1, "n_heads": 2}
    assert build_encoder(spec | {"ffn_dim": 32}).width == 16

    class Blur(towers.ForeignEncoder):
        def __init__(self, strength):
            super().__init__(ForeignConfig(model="blur"))
            self.strength = strength

        def states(self, pixels):
            return pixels.flatten(2), []

        def pool(self, pixels):
            return pixels.flatten(1)

    points = EntryPoints([EntryPoint("blur", f"{__name__}:Blur", towers.GROUP)])
    monkeypatch.setattr(EntryPoint, "load", lambda self: Blur)
    monkeypatch.setattr(towers, "entry_points", lambda **wanted: points.select(**wanted))
    assert build_encoder({"type": "blur", "strength": 3}).strength == 3

    for wrong, message in (
        ({"type": "nobody"}, "blur, herdkit, open_clip, timm"),
        ({}, "encoder.type is None"),
        ({"type": "herdkit", "preset": "tiny", "n_layer": 3}, "did you mean 'n_layers'"),
        ({"type": "timm", "model": "vit_tiny_patch16_224", "tap": [1]}, "did you mean 'taps'"),
        ({"type": "timm", "model": "vit_tiny_patch16_224", "taps": [0]}, "taps"),
    ):
        with pytest.raises(ValueError, match=message):
            build_encoder(wrong)


def test_an_open_clip_tower_as_encoder(tmp_path):
    open_clip.factory._MODEL_CONFIGS["herdkit-test"] = TINY_CLIP
    try:
        encoder = build_encoder({"type": "open_clip", "model": "herdkit-test", "taps": [1, 3]})
    finally:
        del open_clip.factory._MODEL_CONFIGS["herdkit-test"]
    assert isinstance(encoder, OpenClipEncoder)
    roughen(encoder)
    assert (encoder.image_size, encoder.width, encoder.pooled_width) == (28, 96, 16)
    assert tuple(encoder.mean) == open_clip.OPENAI_DATASET_MEAN
    features, mask = encoder(tiles(), *one_tile(2))
    assert mask.all()
    theirs = open_clip_features(encoder.visual, tiles()[:, 0], (1, 3))
    torch.testing.assert_close(features[:, 0], theirs)
    mine = ours(taps=(1, 3))
    load_open_clip(mine, encoder.visual)
    torch.testing.assert_close(mine(tiles(), *one_tile(2))[0], features)
    torch.testing.assert_close(encoder.pooled(tiles(), *one_tile(2)), encoder.visual(tiles()[:, 0]))
