"""The chain of vision stages with the smallest models, each from what the one before wrote; and the paper's recipes."""

import dataclasses
import io
from fractions import Fraction
from pathlib import Path

import herdkit
import numpy as np
import pytest
import torch
from herdkit.adapters import ModalityBatch
from herdkit.adapters.chat import decoder, encode_prompts
from herdkit.data.shards import ShardWriter
from herdkit.data.synthetic import encoding
from herdkit.text import SamplingOptions, Tokenizer, Transformer, TransformerConfig, generate
from herdkit.text.model_directory import save_text
from herdkit.text.presets import preset as text_preset
from herdkit.train.config import load_recipe
from herdkit.train.recipe import find_stage, read_stage_name
from herdkit.vision import image_adapter, video_adapter
from herdkit.vision.image_adapter import ImageAdapter
from herdkit.vision.interchange import build_encoder
from herdkit.vision.video_adapter import VideoAdapter
from PIL import Image

RECIPES = Path(herdkit.__file__).parent / "vision" / "recipes"
ENCODER = "type: herdkit, image_size: 16, patch_size: 8, dim: 16, n_layers: 2, n_heads: 2, ffn_dim: 32"
COMMON = """
root: {root}
data: {{sources: [{{shards: "{root}/{shards}/*.tar"}}], row_length: 64}}
optimizer: {{lr: 1.0e-2, weight_decay: 0.0}}
schedule: {{kind: constant}}
trainer: {{steps: 2, batch_size: 2, checkpoint_every: 2, keep: 1}}
"""
DIALOG = {"messages": [{"role": "user", "content": []}, {"role": "assistant", "content": "a red circle"}]}


def picture(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Language models of one size, base and tuned, and a few images and clips with dialogs."""
    root = tmp_path_factory.mktemp("stages")
    tokenizer = Tokenizer.train(["a red circle and a blue square"] * 20, 540)
    config = TransformerConfig(
        dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=64
    )
    for name, seed in (("base", 0), ("tuned", 1)):
        torch.manual_seed(seed)
        save_text(Transformer(config), tokenizer, root / name)
    for kind in ("image", "video"):
        member = "png" if kind == "image" else "mp4"
        (root / kind).mkdir()
        with ShardWriter(root / kind / "%06d.tar", max_count=100, existing="replace") as writer:
            for i in range(4):
                file = io.BytesIO()
                picture(i).save(file, "png")
                frames = [np.asarray(picture(10 * i + j, 32)) for j in range(8)]
                data = file.getvalue() if kind == "image" else encoding.video(frames, Fraction(8), "mp4")
                asked = {"role": "user", "content": [{"type": kind, kind: member}]}
                dialog = {"messages": [asked, DIALOG["messages"][1]]}
                writer.write(f"{i}", {member: data, "json": dialog, "txt": "a red circle"})
    return root


def run(root: Path, name: str, text: str, shards: str = "image"):
    path = root / f"{name}.yaml"
    path.write_text(text + COMMON.format(root=root, shards=shards))
    stage = find_stage(read_stage_name(path))
    result = stage.run(load_recipe(path, stage.recipe), root / "runs" / name)
    assert result["steps"] == 2
    model = root / "runs" / name / "model"
    return herdkit.load(model) if model.exists() else None


def freeze(*trainable: str) -> str:
    rules = "".join(f'\n  - {{pattern: "{pattern}", trainable: true}}' for pattern in trainable)
    return f'\nfreeze:\n  - {{pattern: "*", trainable: false}}{rules}'


def changed(before, after, part: str) -> bool:
    old, new = before.state_dict(), after.state_dict()
    names = [name for name in old if name.startswith(part)]
    return any(old[name].shape != new[name].shape or not torch.equal(old[name], new[name]) for name in names)


def test_the_chain_of_the_paper(root):
    tower = "\ntext_tower: {max_length: 12, dim: 16, n_layers: 1, n_heads: 2, ffn_dim: 32}\nembedding_dim: 8"
    run(
        root,
        "contrast",
        f"stage: vision.contrastive\ninit: {root}/base\nloss: siglip\nencoder: {{{ENCODER}}}{tower}"
        f'\nheld_out: {{retrieval: "{root}/image/*.tar"}}',
    )
    assert (root / "runs/contrast/open_clip/open_clip_model.safetensors").is_file()
    full = f"{ENCODER}, n_global_layers: 1, taps: [1], max_tiles: 4"
    first = run(
        root,
        "pretrain",
        f"stage: vision.image_pretrain\ninit: {root}/base\nencoder_weights: {root}/runs/contrast/encoder.safetensors"
        f"\nadapter: {{encoder: {{{full}}}, n_cross_layers: 2, gate_init: 0.5}}" + freeze("image.*"),
    )
    base, tuned = herdkit.load(root / "base"), herdkit.load(root / "tuned")
    assert not changed(base, first, "text.")

    annealed = run(
        root,
        "anneal",
        f"stage: vision.image_anneal\ninit: {root}/runs/pretrain/model\nimage_size: 32" + freeze("image.*"),
    )
    assert annealed.image.encoder.image_size == annealed.image.prepare.tile_size == 32
    assert annealed.image.encoder.position_embedding.shape == (17, 16)
    assert changed(first, annealed, "image.cross_attention.")
    assert not changed(base, annealed, "text.")

    finetuned = run(
        root,
        "image_sft",
        f'stage: vision.sft\ninit: {root}/tuned\ngraft: ["{root}/runs/anneal/model"]' + freeze("image.*"),
    )
    assert not changed(tuned, finetuned, "text.")
    assert changed(annealed, finetuned, "image.encoder.")

    sizes = (
        "frames: 2, merge: 2, max_merge: 4, tile_size: 32, tile_tokens: 17, max_tiles: 1, n_image_layers: 2, every: 1"
    )
    sizes += ", n_latents: 2, dim: 16, n_layers: 1, n_heads: 2, aggregator_ffn_dim: 32, gate_init: 0.5"
    video = run(
        root,
        "video",
        f"stage: vision.video_pretrain\ninit: {root}/runs/anneal/model\nadapter: {{{sizes}}}" + freeze("video.*"),
        "video",
    )
    assert not changed(annealed, video, "image.")
    last = run(
        root,
        "video_sft",
        f'stage: vision.sft\ninit: {root}/runs/image_sft/model\ngraft: ["{root}/runs/video/model"]\nframes: 8\nmerge: 4'
        + freeze("video.*"),
        "video",
    )
    assert last.modalities == ["image", "video"]
    assert (last.video.config.frames, last.video.config.merge, last.video.config.max_merge) == (8, 4, 4)
    assert last.video.prepare.frames == 8
    assert changed(video, last, "video.aggregator.")
    assert not changed(finetuned, last, "image.")
    assert not changed(tuned, last, "text.")
    answers_as_without_a_cache(last, root)


def answers_as_without_a_cache(model, root: Path) -> None:
    """A dialog with two clips and two pictures between each other, of different sizes and lengths."""
    clips = [
        encoding.video([np.asarray(picture(i, size)) for i in range(count)], Fraction(8), "mp4")
        for size, count in ((32, 3), (64, 20))
    ]
    asked = [
        {"type": "image", "image": picture(1)}, {"type": "video", "video": clips[0]}, {"type": "text", "text": "a red"},
        {"type": "video", "video": clips[1]}, {"type": "image", "image": picture(2, 50)}, {"type": "text", "text": "a"},
    ]  # fmt: skip
    messages = [{"role": "user", "content": asked}]
    prompts, inputs, tokenizer = encode_prompts(model, [messages])
    found = []
    with torch.no_grad():
        for _ in range(6):
            logits = model(torch.tensor([prompts[0] + found]), inputs)
            found.append(int(logits[0, -1].argmax()))
    options = SamplingOptions(max_new_tokens=6, stop_ids=())
    (row,) = generate(model.text, prompts, options, tokenizer=tokenizer, forward=decoder(model, inputs))
    assert row.tokens == found
    # Every one of the four is seen.
    for kind, batch in inputs.items():
        for number in range(2):
            tensors = {name: tensor.clone() for name, tensor in batch.tensors.items()}
            tensors["tiles"][number] = 255 - tensors["tiles"][number]
            with torch.no_grad():
                other = model(torch.tensor([prompts[0]]), inputs | {kind: ModalityBatch(tensors, batch.placements)})
                same = model(torch.tensor([prompts[0]]), inputs)
            moved = (other - same)[0].abs().amax(1)
            start = int(batch.placements.start[number])
            assert not moved[:start].any()
            assert moved[start:].max() > 1e-5


def test_what_does_not_fit_is_named(root):
    other = TransformerConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=540, max_seq_len=64
    )  # fmt: skip
    save_text(Transformer(other), herdkit.load(root / "base").tokenizer, root / "shallow")
    text = "stage: vision.sft\ninit: {}"
    with pytest.raises(ValueError, match="base: its adapters were trained for another language model"):
        run(root, "a", text.format(root / "shallow") + f'\ngraft: ["{root}/base"]')
    with pytest.raises(ValueError, match="frames and merge: the model has no video adapter"):
        run(root, "b", text.format(root / "base") + "\nframes: 4")
    with pytest.raises(ValueError, match="has no image adapter of ours"):
        run(root, "c", f"stage: vision.image_anneal\ninit: {root}/base")
    config = video_adapter.preset("tiny")
    video = VideoAdapter(config, text_preset("tiny"))
    with pytest.raises(ValueError, match=r"merge \(8\) is above max_merge \(4\)"):
        video.sample(8, 8)
    model = herdkit.load(root / "base")
    model.attach(ImageAdapter(image_adapter.ImageAdapterConfig(n_cross_layers=2), model.text.config))
    model.attach(VideoAdapter(dataclasses.replace(config, n_image_layers=2), model.text.config))
    herdkit.save(model, root / "moving")
    for key in ("frames", "merge"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0"):
            run(root, key, text.format(root / "moving") + f"\n{key}: 0")


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_recipes_have_the_papers_models(size):
    """The sizes of the presets, and so of the paper (see test_adapters), stand in the recipes."""

    def recipe(stem):
        path = RECIPES / f"{stem}_{size}.yaml"
        return load_recipe(path, find_stage(read_stage_name(path)).recipe)

    image = recipe("image_pretrain")
    assert image.adapter.n_cross_layers == image_adapter.preset(size).n_cross_layers
    assert (image.trainer.batch_size, image.optimizer.lr, image.optimizer.weight_decay) == (16_384, 1e-3, 0.01)
    assert image.trainer.steps == round(6e9 / 16_384)
    with torch.device("meta"):
        encoder = build_encoder(image.adapter.encoder)
        assert (encoder.image_size, encoder.width, encoder.max_tiles) == (336, 7680, 4)
        projected = sum(p.numel() for p in encoder.parameters()) + 7681 * 4096
    assert projected / 1e6 == pytest.approx(831.7, abs=0.06)
    assert (recipe("image_anneal").optimizer.lr, recipe("image_anneal").image_size) == (2e-5, 448)
    assert recipe("image_sft").graft == [f"./runs/image_anneal_{size}/model"]
    if size == "405b":
        return
    video = recipe("video_pretrain")
    assert video.adapter == video_adapter.preset(size, "pretrain")
    assert (video.trainer.batch_size, video.optimizer.lr, video.data.row_length) == (4096, 1e-4, 190)
    sft, preset = recipe("video_sft"), video_adapter.preset(size)
    assert (sft.frames, sft.merge) == (preset.frames, preset.merge) == (64, 32)
    with torch.device("meta"):
        adapter = VideoAdapter(video.adapter, text_preset(size))
        adapter.sample(sft.frames, sft.merge)
    assert adapter.config == preset


def test_larger_tiles_keep_what_a_tile_says():
    """Twice the side: positions are stretched, the corners keep theirs, and all else is the same."""
    text = text_preset("tiny")
    small = ImageAdapter(image_adapter.preset("tiny"), text)
    large = small.with_tiles_of(128)
    assert large.encoder.image_size == large.prepare.tile_size == 128
    old, new = small.encoder.position_embedding, large.encoder.position_embedding
    assert torch.equal(new[0], old[0])
    torch.testing.assert_close(new[[1, 16, -16, -1]], old[[1, 8, -8, -1]])
    kept = {name: tensor for name, tensor in small.state_dict().items() if "position_embedding" not in name}
    assert all(torch.equal(large.state_dict()[name], tensor) for name, tensor in kept.items())
    assert small.encoder.image_size == small.prepare.tile_size == 64
