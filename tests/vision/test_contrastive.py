"""The losses against open_clip and against one big batch on two and four processes; the text tower; the whole model."""

import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from herdkit.vision.contrastive import (
    ContrastiveModel,
    TextTower,
    TextTowerConfig,
    WordTower,
    clip_loss,
    siglip_loss,
    siglip_objective,
)
from herdkit.vision.encoder import VisionConfig, VisionTransformer
from torch.nn import functional as F


def pairs(n: int = 6, dim: int = 8):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(2, dim, dim, generator=generator, dtype=torch.float64).requires_grad_()


def towers(inputs, weights):
    return F.normalize(inputs[0] @ weights[0], dim=-1), F.normalize(inputs[1] @ weights[1], dim=-1)


def test_loss_and_gradients_are_those_of_open_clip():
    import open_clip

    inputs, weights = pairs()
    log_scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    expected = open_clip.ClipLoss()(*towers(inputs, weights), log_scale.exp())
    reference = torch.autograd.grad(expected, (weights, log_scale))
    total, count, metrics = clip_loss(*towers(inputs, weights), log_scale.exp())
    gradients = torch.autograd.grad(total / count, (weights, log_scale))
    assert count == 6
    torch.testing.assert_close((total / count).double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    images, texts = towers(inputs, weights)
    by_hand = ((images @ texts.T).argmax(1) == torch.arange(6)).sum()
    assert metrics["image_to_text"] == (by_hand, 6)


def test_sigmoid_loss_and_gradients_are_those_of_open_clip():
    from open_clip.loss import SigLipLoss

    inputs, weights = pairs()
    log_scale = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)
    learned = (weights, log_scale, bias)
    expected = SigLipLoss()(*towers(inputs, weights), log_scale.exp(), bias)
    reference = torch.autograd.grad(expected, learned)
    total, count, _ = siglip_loss(*towers(inputs, weights), log_scale.exp(), bias)
    torch.testing.assert_close((total / count).double(), expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(total / count, learned), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


SHARES = {2: [4, 2], 4: [2, 1, 2, 1]}
"""Pairs of each process: some have left out bad samples."""


def losses_of_rank(rank: int, world: int, folder: str) -> dict[str, list[torch.Tensor]]:
    """Joins the processes; loss and gradients of one rank's share, summed over ranks as a trainer does."""
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=150))
    inputs, weights = pairs()
    out = {}
    try:
        for name in ("clip global", "clip local", "siglip global"):
            kind, negatives = name.split()
            weights = weights.detach().requires_grad_()
            log_scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
            bias = torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)
            images, texts = towers(inputs.split(SHARES[world], dim=1)[rank], weights)
            if kind == "clip":
                loss, count, _ = clip_loss(images, texts, log_scale.exp(), negatives=negatives)
            else:
                loss, count, _ = siglip_loss(images, texts, log_scale.exp(), bias)
            loss.backward()
            sums = [loss.detach(), weights.grad, log_scale.grad]
            sums += [bias.grad] if kind == "siglip" else []
            for value in (*sums, total := torch.tensor(count)):
                dist.all_reduce(value)
            out[name] = [value / total for value in sums]
    finally:
        dist.destroy_process_group()
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_processes_are_one_big_batch(tmp_path, world):
    """A wrong gather has the right loss; the gradients tell."""
    import open_clip  # here, since it takes seconds and the other processes do without
    from open_clip.loss import SigLipLoss

    code = f"import sys, {__name__.rpartition('.')[2]} as t; t.losses_of_rank(int(sys.argv[1]), {world}, sys.argv[2])"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    if inherited := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + inherited
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], env=environment)
        for rank in range(1, world)
    ]
    try:
        out = losses_of_rank(0, world, str(tmp_path))
        assert [worker.wait(timeout=60) for worker in workers] == [0] * (world - 1)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()

    inputs, weights = pairs()
    log_scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)
    images, texts = towers(inputs, weights)
    whole = open_clip.ClipLoss()(images, texts, log_scale.exp())
    sigmoid = SigLipLoss()(images, texts, log_scale.exp(), bias)
    shares = SHARES[world]
    split = zip(images.split(shares), texts.split(shares), shares, strict=True)
    apart = sum(n * open_clip.ClipLoss()(i, t, log_scale.exp()) for i, t, n in split) / sum(shares)
    learned = {"clip global": (weights, log_scale), "siglip global": (weights, log_scale, bias)}
    for name, loss in {"clip global": whole, "clip local": apart, "siglip global": sigmoid}.items():
        gradients = torch.autograd.grad(loss, learned.get(name, (weights, log_scale)), retain_graph=True)
        for ours, theirs in zip(out[name], [loss, *gradients], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert abs(whole - apart) > 0.1


def tower(attention: str) -> TextTower:
    torch.manual_seed(0)
    config = TextTowerConfig(
        vocab_size=50, max_length=12, dim=32, n_layers=2, n_heads=4, ffn_dim=64, attention=attention
    )
    return TextTower(config).double()


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padding_of_captions_changes_nothing(attention):
    model = tower(attention)
    lengths = torch.tensor([5, 9, 1])
    tokens = torch.randint(50, (3, 9))
    out = model(tokens, lengths)
    junk = torch.where(torch.arange(9) < lengths[:, None], tokens, torch.randint(50, (3, 9)))
    longer = F.pad(junk, (0, 3), value=7)
    torch.testing.assert_close(model(longer, lengths), out, rtol=0, atol=1e-12)
    for i, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(model(tokens[i : i + 1, :length], lengths[i : i + 1]), out[i : i + 1])
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 50
    assert ((model(other, lengths) - out).abs().amax(1) > 1e-3).all()


def test_causal_text_tower_is_open_clips():
    import open_clip

    model = tower("causal")
    theirs = open_clip.transformer.TextTransformer(
        context_length=9, vocab_size=50, width=32, heads=4, layers=2, mlp_ratio=2, output_dim=None, pool_type="last"
    ).double()
    state = {
        "token_embedding.weight": model.token_embedding.weight,
        "positional_embedding": model.position_embedding[:9],
        "ln_final.weight": model.norm.weight,
        "ln_final.bias": model.norm.bias,
    }
    names = {
        "attention_norm.": "ln_1.",
        "mlp_norm.": "ln_2.",
        "attention.qkv.": "attn.in_proj_",
        "attention.out.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    }
    for i, layer in enumerate(model.layers):
        for name, value in layer.state_dict().items():
            stem = next(stem for stem in names if name.startswith(stem))
            state[f"transformer.resblocks.{i}.{name.replace(stem, names[stem])}"] = value
    missing, surplus = theirs.load_state_dict(state, strict=False)
    assert not surplus
    assert set(missing) <= {"text_projection"}
    theirs.text_projection = None
    tokens = torch.randint(50, (4, 9))
    torch.testing.assert_close(model(tokens, torch.full((4,), 9)), theirs(tokens), rtol=0, atol=1e-10)


def test_the_word_tower_is_the_locked_mean_of_normalised_embeddings():
    embeddings = torch.randn(50, 16)
    words = WordTower(embeddings)
    tokens = torch.tensor([[3, 4, 7], [5, 0, 0]])
    expected = torch.nn.functional.layer_norm(embeddings, (16,))
    found = words(tokens, torch.tensor([3, 1]))
    torch.testing.assert_close(found, torch.stack([expected[[3, 4, 7]].mean(0), expected[5]]))
    model = ContrastiveModel(small_model().vision, words)
    assert model.image_projection.out_features == 16
    assert torch.equal(model.text_projection(found), found)
    trained = [name for name, _ in model.named_parameters() if not name.startswith("vision.")]
    assert sorted(trained) == ["image_projection.weight", "logit_scale"]


def test_captions_that_are_too_long_are_named():
    with pytest.raises(ValueError, match="max_length is 12"):
        tower("causal")(torch.zeros(1, 13, dtype=torch.int64), torch.tensor([13]))
    with pytest.raises(ValueError, match="attention"):
        TextTowerConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, ffn_dim=64, attention="both")


def small_model() -> ContrastiveModel:
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, dim=32, n_layers=2, n_heads=4, ffn_dim=64)
    text = TextTowerConfig(vocab_size=50, max_length=12, dim=32, n_layers=1, n_heads=4, ffn_dim=64)
    return ContrastiveModel(VisionTransformer(vision), TextTower(text), 16)


def test_the_model_learns_which_caption_belongs_to_which_picture():
    model = small_model()
    n = 8
    batch = {
        "tiles": torch.randint(0, 256, (n, 1, 3, 16, 16), dtype=torch.uint8),
        "n_tiles": torch.ones(n, dtype=torch.int64),
        "grid": torch.ones(n, 2, dtype=torch.int64),
        "tokens": torch.randint(50, (n, 6)),
        "lengths": torch.full((n,), 6),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss, count, metrics = clip_loss(*model(batch))
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert metrics["image_to_text"][0] == metrics["text_to_image"][0] == n
    assert loss / n < 0.2 * math.log(n)
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    exact = clip_loss(*model(batch))[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = clip_loss(*model(batch))[0]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), abs=0.1 * n)


def test_a_sigmoid_needs_a_bias_which_learns():
    model = small_model()
    batch = {
        "tiles": torch.randint(0, 256, (3, 1, 3, 16, 16), dtype=torch.uint8),
        "n_tiles": torch.ones(3, dtype=torch.int64),
        "grid": torch.ones(3, 2, dtype=torch.int64),
        "tokens": torch.randint(50, (3, 6)),
        "lengths": torch.full((3,), 6),
    }
    with pytest.raises(ValueError, match="initial_bias"):
        siglip_objective(model, batch)
    model = ContrastiveModel(model.vision, model.text, 16, initial_scale=10.0, initial_bias=-10.0)
    siglip_objective(model, batch)[0].backward()
    assert model.logit_bias.grad.item() < 0
    assert all(p.grad is not None for p in model.parameters())


def test_the_scale_stops_at_100_and_can_fall_again():
    model = small_model()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    assert model.scale().item() == pytest.approx(100)
    for sign, moves in ((1, True), (-1, False)):
        model.logit_scale.grad = None
        (sign * model.scale()).sum().backward()
        assert bool(model.logit_scale.grad.any()) is moves
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    model.logit_scale.grad = None
    (-model.scale()).sum().backward()
    assert model.logit_scale.grad.item() == pytest.approx(-math.e)
