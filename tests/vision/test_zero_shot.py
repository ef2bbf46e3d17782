"""Zero-shot classification against open_clip's classifier, and recall against counting by hand."""

import io

import numpy as np
import open_clip
import pytest
import torch
from herdkit.data.shards import ShardWriter
from herdkit.text.tokenizer import Tokenizer
from herdkit.vision.contrastive import ContrastiveModel, TextTower, TextTowerConfig
from herdkit.vision.encoder import VisionConfig, VisionTransformer
from herdkit.vision.interchange.open_clip import save_open_clip
from herdkit.vision.pairs import encode_captions
from herdkit.vision.tiles import ImagePreparation
from herdkit.vision.zero_shot import ZeroShot, ZeroShotConfig, accuracy, recall
from PIL import Image

CLASSES = ["circle", "square", "star", "ring", "cross", "heart", "arrow"]
TEMPLATES = ["a photo of a {}.", "a red {}"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a photo of a red circle, a square, a star, a ring, a cross"] * 20, 560)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, dim=32, n_layers=1, n_heads=4, ffn_dim=64)
    text = TextTowerConfig(vocab_size=tokenizer.vocab_size, max_length=16, dim=32, n_layers=1, n_heads=4, ffn_dim=64)
    return ContrastiveModel(VisionTransformer(vision), TextTower(text), 16).eval()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    with ShardWriter(path / "%06d.tar", max_count=100, existing="replace") as writer:
        for i in range(12):
            file = io.BytesIO()
            picture(i).save(file, "png")
            members = {"png": file.getvalue(), "cls": str(i % len(CLASSES)), "txt": f"a {CLASSES[i % 7]}"}
            if i % 3 == 0:
                members["json"] = {"captions": [f"a {CLASSES[i % 7]}", f"a red {CLASSES[i % 7]}"]}
            writer.write(f"{i:03d}", members)
    return str(path / "*.tar")


def zero_shot(tokenizer, **config) -> ZeroShot:
    return ZeroShot(ZeroShotConfig(**config), tokenizer, ImagePreparation(tile_size=16, max_tiles=1), 16)


def test_classification_is_that_of_open_clip(model, tokenizer, shards, tmp_path):
    measure = zero_shot(tokenizer, classification=shards, classes=CLASSES, templates=TEMPLATES, batch_size=5).measure
    found = measure(model)
    theirs = open_clip.create_model(f"local-dir:{save_open_clip(model, tmp_path / 'clip', tokenizer)}").eval()

    def tokens(texts):
        rows, _ = encode_captions(tokenizer, texts, 16)
        return torch.nn.functional.pad(rows, (0, 16 - rows.shape[1]))

    weights = open_clip.build_zero_shot_classifier(theirs, tokens, CLASSES, TEMPLATES)
    pixels = model.vision.normalise(ImagePreparation(tile_size=16)([picture(i) for i in range(12)])["tiles"])[:, 0]
    with torch.no_grad():
        scores = theirs.encode_image(pixels, normalize=True) @ weights
    labels = torch.arange(12) % 7
    for k in (1, 5):
        hits = [int(label) in row.topk(k).indices.tolist() for row, label in zip(scores, labels, strict=True)]
        assert found[f"top{k}"] == pytest.approx(sum(hits) / 12)


def test_recall_is_counted_with_all_captions_of_an_image():
    # Image 0 has captions 0 and 1, image 1 caption 2, image 2 captions 3 and 4.
    similarity = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.3], [0.2, 0.8, 0.7, 0.1, 0.0], [0.6, 0.1, 0.9, 0.2, 0.5]])
    owner = torch.tensor([0, 0, 1, 2, 2])
    found = recall(similarity, owner, (1, 2))
    # Image 0 finds its own first; image 1 finds its own second; image 2 finds 2, 0.
    assert found["image_to_text_R@1"] == pytest.approx(1 / 3)
    assert found["image_to_text_R@2"] == pytest.approx(2 / 3)
    # Best images of the captions: 2, 0, 2, (0 or 2), 2; second best: 1, 1, 1, -, 0.
    assert found["text_to_image_R@2"] == pytest.approx(4 / 5)
    assert recall(torch.eye(3), torch.arange(3))["text_to_image_R@10"] == 1
    assert accuracy(torch.eye(6), torch.tensor([0, 1, 2, 0, 4, 5])) == pytest.approx({"top1": 5 / 6, "top5": 1})


def test_retrieval_reads_captions_from_text_and_json(model, tokenizer, shards):
    measured = zero_shot(tokenizer, retrieval=shards)
    assert [len(captions) for captions in measured._captions] == [2, 1, 1] * 4
    found = measured.measure(model)
    assert set(found) == {f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert found["text_to_image_R@1"] <= found["text_to_image_R@5"] <= found["text_to_image_R@10"]


def test_what_is_missing_is_named(tokenizer, shards):
    for config, message in (
        ({}, "name shards"),
        ({"classification": "x"}, "classification needs classes"),
        ({"retrieval": "x", "templates": ["a photo"]}, "'a photo' has no {}"),
    ):
        with pytest.raises(ValueError, match=message):
            ZeroShotConfig(**config)
    with pytest.raises(ValueError, match=r"sample 003: cls is '3', not a number below the 3 classes"):
        zero_shot(tokenizer, classification=shards, classes=CLASSES[:3])
