"""Clips of different lengths and sizes, several in a dialog and in the rows of one batch: gradients and decoding."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from herdkit.adapters import ModalityBatch, compose
from herdkit.adapters.chat import encode_prompts, reply, reply_batch
from herdkit.data.synthetic import encoding
from herdkit.text import Tokenizer, Transformer, TransformerConfig
from herdkit.vision.image_adapter import ImageAdapter, ImageAdapterConfig
from herdkit.vision.video_adapter import VideoAdapter, VideoAdapterConfig
from PIL import Image

ENCODER = {"type": "herdkit", "image_size": 16, "patch_size": 8, "dim": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 32}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red circle and a blue square"] * 20, 540)
    text = TransformerConfig(
        dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=tokenizer.vocab_size, max_seq_len=256
    )
    image = ImageAdapterConfig(encoder=ENCODER | {"max_tiles": 4}, n_cross_layers=2, gate_init=0.7)
    video = VideoAdapterConfig(
        frames=6, merge=3, tile_size=16, tile_tokens=5, max_tiles=4, n_image_layers=2, every=1, n_latents=3, dim=24,
        n_layers=1, n_heads=3, aggregator_ffn_dim=48, gate_init=0.7,
    )  # fmt: skip
    adapters = {"image": ImageAdapter(image, text), "video": VideoAdapter(video, text)}
    with torch.no_grad():
        for name, gate in adapters["image"].encoder.named_parameters():
            if "gate" in name:
                gate.fill_(0.5)
    return compose(Transformer(text), tokenizer, **adapters).double().eval()


def clip(frames: int, width: int, height: int) -> dict:
    generator = np.random.default_rng(frames)
    pictures = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(frames)]
    return {"type": "video", "video": encoding.video(pictures, Fraction(8), "mp4")}


@pytest.fixture(scope="module")
def dialogs():
    """Fewer frames than are sampled, as many, and more; one, two and four tiles."""
    short, even, long, last = clip(2, 16, 16), clip(6, 48, 16), clip(23, 32, 32), clip(9, 16, 32)
    still = {"type": "image", "image": Image.fromarray(np.full((16, 30, 3), 90, np.uint8))}
    red, square = ({"type": "text", "text": text} for text in (" a red circle", " a square"))
    contents = [[short, red, long, still, square], [even, last, red], [square]]
    return [[{"role": "user", "content": content}] for content in contents]


def rows_of(model, dialogs):
    """Padded tokens, their lengths, and the inputs with tiles as numbers that take gradients."""
    prompts, inputs, _ = encode_prompts(model, dialogs)
    length = max(map(len, prompts))
    tokens = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts])
    found = {}
    for kind, batch in inputs.items():
        tiles = model.image.encoder.normalise(batch.tensors["tiles"]).double().requires_grad_()
        found[kind] = ModalityBatch(batch.tensors | {"tiles": tiles}, batch.placements)
    return tokens, [len(prompt) for prompt in prompts], found


def last_logits(model, dialogs):
    tokens, lengths, inputs = rows_of(model, dialogs)
    logits = model(tokens, inputs)
    return torch.stack([row[length - 1] for row, length in zip(logits, lengths, strict=True)]), inputs


def test_a_batch_learns_what_its_rows_learn_alone(model, dialogs):
    weights = torch.randn(3, model.text.config.vocab_size, dtype=torch.float64)

    def gradients(loss) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits, inputs = last_logits(model, dialogs)
    together = gradients((logits * weights).sum())
    clips = inputs["video"].tensors
    assert clips["n_tiles"].tolist() == [1, 4, 3, 2]
    real = torch.arange(4) < clips["n_tiles"][:, None]
    seen = clips["tiles"].grad.abs().amax((3, 4, 5)) > 0  # of each frame's tiles
    assert torch.equal(seen, real[:, None].expand_as(seen))
    assert inputs["image"].tensors["tiles"].grad.any()
    summed: dict[str, torch.Tensor] = {}
    for row, dialog in enumerate(dialogs):
        alone, _ = last_logits(model, [dialog])
        torch.testing.assert_close(alone[0], logits[row], rtol=0, atol=1e-10)
        for name, gradient in gradients((alone[0] * weights[row]).sum()).items():
            summed[name] = summed.get(name, 0) + gradient
    assert summed.keys() == together.keys()
    assert {name for name in together if not together[name].any()} == set()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-8, atol=1e-10)


def test_clips_are_seen_by_their_own_rows_alone(model, dialogs):
    logits, inputs = last_logits(model, dialogs)
    logits[1].square().sum().backward()
    moved = inputs["video"].tensors["tiles"].grad.abs().amax((1, 2, 3, 4, 5)) > 0
    assert moved.tolist() == [False, False, True, True]
    assert not inputs["image"].tensors["tiles"].grad.any()


def test_rows_are_decoded_as_each_alone_and_as_without_a_cache(model, dialogs):
    options = {"max_new_tokens": 6, "stop_ids": ()}
    replies = reply_batch(model, dialogs, **options)
    assert replies == [reply(model, dialog, **options) for dialog in dialogs]
    assert len(set(replies)) == 3
    for dialog, said in zip(dialogs, replies, strict=True):
        tokens, _, inputs = rows_of(model, [dialog])
        row = tokens[0].tolist()
        with torch.no_grad():
            for _ in range(6):
                row.append(int(model(torch.tensor([row]), inputs)[0, -1].argmax()))
        assert model.tokenizer.decode(row[-6:]) == said
