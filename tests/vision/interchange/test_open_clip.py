"""Contrastive models in open_clip and from it: vectors of images and texts, and what the loss is made of."""

import json

import open_clip
import pytest
import torch
from herdkit.text.interchange.tensor_files import ModelDirectoryError
from herdkit.text.tokenizer import Tokenizer
from herdkit.vision.contrastive import ContrastiveModel, TextTower, TextTowerConfig
from herdkit.vision.encoder import VisionConfig, VisionTransformer
from herdkit.vision.interchange.open_clip import (
    load_open_clip_model,
    mlp_ratio,
    model_of_config,
    save_open_clip,
    to_open_clip,
)
from herdkit.vision.pairs import encode_captions
from safetensors.torch import save_file

TEXTS = ["a red circle", "a blue square and a red circle", "a"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red circle and a blue square"] * 20, 540)


def model_of(tokenizer: Tokenizer, *, bias: float | None = None, dim: int | None = 16, **vision) -> ContrastiveModel:
    torch.manual_seed(0)
    sizes = {"image_size": 28, "patch_size": 7, "dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 96}
    text = TextTowerConfig(
        vocab_size=tokenizer.vocab_size, max_length=9, dim=24, n_layers=2, n_heads=3, ffn_dim=72
    )  # fmt: skip
    model = ContrastiveModel(VisionTransformer(VisionConfig(**(sizes | vision))), TextTower(text), dim, 5.0, bias)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("logit"):
                p.copy_(0.3 * torch.randn_like(p) + ("norm" in name and name.endswith("weight")))
    return model.eval()


def vectors(model: ContrastiveModel, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    tiles = torch.randn(3, 1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    one = torch.ones(3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64)
    with torch.no_grad():
        return model.encode_images(tiles, *one), model.encode_text(*encode_captions(tokenizer, TEXTS, 9))


def their_vectors(model, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    tiles = torch.randn(3, 1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tokens, _ = encode_captions(tokenizer, TEXTS, 9)
    padded = torch.nn.functional.pad(tokens, (0, 9 - tokens.shape[1]))
    with torch.no_grad():
        return model.encode_image(tiles[:, 0], normalize=True), model.encode_text(padded, normalize=True)


@pytest.mark.parametrize(
    ("bias", "vision"),
    [(None, {"attention_bias": True}), (-7.0, {"pooling": "mean"}), (None, {})],
    ids=["class token", "mean and bias", "no attention bias"],
)
def test_open_clip_loads_what_we_save_and_gives_the_same_vectors(tokenizer, tmp_path, bias, vision):
    ours = model_of(tokenizer, bias=bias, **vision)
    path = save_open_clip(ours, tmp_path / "clip", tokenizer)
    theirs = open_clip.create_model(f"local-dir:{path}").eval()
    expected = vectors(ours, tokenizer)
    for a, b in zip(expected, their_vectors(theirs, tokenizer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert theirs.logit_scale.item() == pytest.approx(ours.logit_scale.item())
    assert (theirs.logit_bias is None) is (bias is None)
    assert bias is None or theirs.logit_bias.item() == pytest.approx(bias)
    assert tuple(theirs.visual.preprocess_cfg["mean"]) == ours.vision.mean
    again = load_open_clip_model(path)
    for a, b in zip(expected, vectors(again, tokenizer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(again.logit_scale, ours.logit_scale)
    # And back, weight for weight.
    assert torch.equal(
        theirs.visual.transformer.resblocks[1].mlp.c_fc.weight,
        open_clip.create_model(f"local-dir:{save_open_clip(again, path, tokenizer)}")
        .visual.transformer.resblocks[1]
        .mlp.c_fc.weight,
    )
    assert Tokenizer.load(path).encode("a red circle") == tokenizer.encode("a red circle")


def test_a_model_of_open_clip_is_read(tokenizer, tmp_path):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 8, "patch_size": 7, "mlp_ratio": 2},
        "text_cfg": {"context_length": 9, "vocab_size": 540, "width": 24, "heads": 3, "layers": 2, "mlp_ratio": 3},
    }
    torch.manual_seed(0)
    text = {**config["text_cfg"], "pool_type": "eos", "eos_id": tokenizer.eos_id}
    theirs = open_clip.CLIP(16, config["vision_cfg"], text).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p))
    path = tmp_path / "clip"
    path.mkdir()
    # What directories of others spell out.
    absent = dict.fromkeys(("norm_kwargs", "act_kwargs", "ls_init_value", "block_type"))
    spelt = {"vision_cfg": absent | {"timm_model_name": None} | config["vision_cfg"], "text_cfg": absent | text}
    content = {"model_cfg": {**config, **spelt}, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (path / "open_clip_config.json").write_text(json.dumps(content))
    save_file(theirs.state_dict(), path / "open_clip_model.safetensors")
    ours = load_open_clip_model(path)
    assert ours.vision.mean == ours.vision.config.mean == (0.5, 0.4, 0.3)
    assert ours.vision.std == ours.vision.config.std == (0.2, 0.3, 0.4)
    for a, b in zip(vectors(ours, tokenizer), their_vectors(theirs, tokenizer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    def refused(**changes) -> str:
        content = {"model_cfg": {**config, "text_cfg": text, **changes}}
        (path / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(ModelDirectoryError) as error:
            load_open_clip_model(path)
        return str(error.value)

    assert "timm_model_name is 'vit'" in refused(vision_cfg={**config["vision_cfg"], "timm_model_name": "vit"})
    assert "quick_gelu" in refused(quick_gelu=True)
    for pool in ("first", "last", "none"):
        assert f"text_cfg.pool_type is '{pool}'" in refused(text_cfg={**text, "pool_type": pool})
    assert "vision_cfg.pool_type is 'last'" in refused(vision_cfg={**config["vision_cfg"], "pool_type": "last"})
    for part, key, value in (
        ("vision_cfg", "image_size", [28, 28]),
        ("vision_cfg", "layers", [1, 1, 1, 1]),
        ("vision_cfg", "head_width", 0),
        ("vision_cfg", "mlp_ratio", "4"),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
        ("text_cfg", "heads", None),
        ("text_cfg", "norm_kwargs", {"eps": 1e-6}),
        ("text_cfg", "qk_norm", True),
    ):
        given = {**config, "text_cfg": text}[part]
        assert f"{part}.{key} is {value!r}" in refused(**{part: {**given, key: value}})
    assert "embed_dim is None" in refused(embed_dim=None)
    assert "text_cfg is missing" in refused(text_cfg=None)
    message = refused(embed_dim=8)
    assert "visual.proj has shape (32, 16), expected (32, 8)" in message
    assert "missing visual.transformer.resblocks.2.ln_1.weight" in refused(
        vision_cfg={**config["vision_cfg"], "layers": 3}
    )


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-g-14"])
def test_open_clips_own_configs_are_read(name):
    """The second's hidden width is no whole multiple of its width."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        ours, theirs = model_of_config(config, {}), open_clip.CLIP(**config)
    shapes = [
        {key: tensor.shape for key, tensor in state.items()} for state in (to_open_clip(ours), theirs.state_dict())
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("RN50", r"vision_cfg\.layers is \[3, 4, 6, 3\]"),
        ("coca_ViT-B-32", "custom_text"),
        ("ViT-M-16-alt", r"vision_cfg\.ls_init_value"),
        ("ViT-B-32-quickgelu", "quick_gelu"),
        ("convnext_base", r"vision_cfg\.timm_model_name"),
    ],
)
def test_open_clips_configs_of_other_kinds_are_refused_by_name(name, key):
    with pytest.raises(ValueError, match=key):
        model_of_config(open_clip.get_model_config(name), {})


def test_open_clip_finds_every_hidden_width_again():
    """It cuts off what the quotient of the two widths gives; 61 / 7 * 7 is a little less than 61."""
    assert int(61 / 7 * 7) == 60
    assert all(int(dim * mlp_ratio(ffn, dim)) == ffn for dim in range(1, 200) for ffn in range(1, 500))


def test_models_that_open_clip_cannot_hold_are_refused(tokenizer, tmp_path):
    for changes, reason in (
        ({"patch_norm": True}, r"encoder\.patch_norm must be False, not True"),
        ({"max_tiles": 4}, r"encoder\.max_tiles must be 1"),
        ({"activation": "quick_gelu"}, r"encoder\.activation must be 'gelu'"),
        ({"dim": None}, "embedding_dim"),
    ):
        vision = {} if "dim" in changes else changes
        model = model_of(tokenizer, dim=changes.get("dim", 16), **vision)
        with pytest.raises(ValueError, match=reason):
            save_open_clip(model, tmp_path / "clip", tokenizer)
    assert not (tmp_path / "clip").exists()
