import pytest
import torch
from herdkit.speech import Conformer, ConformerConfig, conformer_preset
from herdkit.speech.conformer import Attention, ConformerBlock, Convolution, rotations, stack_frames
from herdkit.speech.ragged import Frames
from torch import nn
from torch.nn import functional as F
from torchaudio.models.conformer import ConformerLayer
from transformers import LlamaConfig, Wav2Vec2BertConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertConvolutionModule

SMALL = {"n_mels": 12, "dim": 24, "n_layers": 3, "n_heads": 2, "ffn_dim": 40}
FRAMES = torch.tensor([37, 90, 4, 61, 1])


def small(seed=0, dtype=torch.float64, **changes) -> Conformer:
    torch.manual_seed(seed)
    model = Conformer(ConformerConfig(**SMALL | changes)).to(dtype)
    for weight in model.parameters():
        if weight.dim() == 1:  # biases and gains that start at 0 or 1 would hide mistakes
            nn.init.normal_(weight, mean=float(weight.mean() > 0.5), std=0.3)
    return model


def batch(dtype=torch.float64, seed=0) -> torch.Tensor:
    features = torch.randn(len(FRAMES), 90, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return features * (torch.arange(90) < FRAMES[:, None])[..., None]


def with_garbage(features: torch.Tensor, kind: str) -> torch.Tensor:
    padding = (torch.arange(features.shape[1]) >= FRAMES[:, None])[..., None].expand_as(features)
    features = features.clone()
    features[padding] = {"noise": torch.randn(int(padding.sum()), dtype=features.dtype) * 50}.get(
        kind, torch.tensor(float("nan"), dtype=features.dtype)
    )
    return features


def test_the_papers_encoder_has_a_billion_parameters():
    with torch.device("meta"):
        model = Conformer(conformer_preset("1b"))
    per_layer = sum(weight.numel() for weight in model.blocks[0].parameters())
    total = sum(weight.numel() for weight in model.parameters())
    assert len(model.blocks) == 24
    assert per_layer == pytest.approx(41.7e6, rel=2e-3)
    assert total == pytest.approx(1.0e9, rel=5e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["noise", "nan"])
def test_neither_padding_nor_neighbours_change_an_utterance(dtype, tolerance, kind):
    model, features = small(dtype=dtype), batch(dtype)
    clean, lengths = model(features, FRAMES)
    dirty, _ = model(with_garbage(features, kind), FRAMES)
    assert lengths.tolist() == [10, 23, 1, 16, 1]
    assert clean.shape == (5, 23, 24)
    torch.testing.assert_close(dirty, clean, atol=0, rtol=0)
    for n, (frames, length) in enumerate(zip(FRAMES, lengths, strict=True)):
        alone, _ = model(features[n : n + 1, :frames], FRAMES[n : n + 1])
        torch.testing.assert_close(clean[n, :length], alone[0], atol=tolerance, rtol=0)
        assert not clean[n, length:].any()


def test_gradients_of_a_padded_batch_are_the_sum_of_those_of_its_utterances():
    model, weight = small(), torch.randn(23, 24, dtype=torch.float64)
    features = with_garbage(batch(), "noise").requires_grad_()
    encoded, lengths = model(features, FRAMES)
    (encoded * weight).sum().backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for n, (frames, length) in enumerate(zip(FRAMES, lengths, strict=True)):
        alone = features.detach()[n : n + 1, :frames].requires_grad_()
        (model(alone, FRAMES[n : n + 1])[0] * weight[:length]).sum().backward()
        torch.testing.assert_close(features.grad[n, :frames], alone.grad[0], atol=1e-11, rtol=1e-9)
        assert not features.grad[n, frames:].any()
    for got, parameter in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-10, rtol=1e-9)


def test_permuting_a_batch_permutes_its_result():
    model, features, order = small(), batch(), torch.tensor([3, 0, 4, 1, 2])
    encoded, lengths = model(features, FRAMES)
    permuted, permuted_lengths = model(features[order], FRAMES[order])
    torch.testing.assert_close(permuted, encoded[order], atol=1e-12, rtol=0)
    assert torch.equal(permuted_lengths, lengths[order])


def test_stacking_sets_neighbours_side_by_side_and_fills_the_tail_with_zeros():
    features = torch.randn(3, 10, 2)
    stacked, lengths = stack_frames(features, torch.tensor([10, 8, 5]), 4)
    assert stacked.shape == (3, 3, 8)
    assert lengths.tolist() == [3, 2, 2]
    for n, frames in enumerate((10, 8, 5)):
        for t in range(3):
            for k in range(4):
                source = 4 * t + k
                expected = features[n, source] if source < frames else torch.zeros(2)
                assert torch.equal(stacked[n, t, 2 * k : 2 * k + 2], expected)
    config = ConformerConfig(**SMALL)
    assert [config.length(frames) for frames in (1, 4, 5, 8, 6000)] == [1, 1, 2, 2, 1500]


def half_to_adjacent(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a query or key projection from lanes paired (i, i + Dh/2) to lanes paired (2i, 2i + 1)."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def copy_attention(ours: Attention, theirs: LlamaAttention) -> None:
    H = ours.n_heads
    with torch.no_grad():
        for name in ("weight", "bias") if ours.qkv.bias is not None else ("weight",):
            q, k, v, o = (getattr(getattr(theirs, part), name) for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
            getattr(ours.qkv, name).copy_(torch.cat((half_to_adjacent(q, H), half_to_adjacent(k, H), v)))
            getattr(ours.out, name).copy_(o)


def test_rotary_attention_equals_transformers_llama_attention_without_causality():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    theirs, ours = LlamaAttention(config, 0).double(), Attention(48, 4, bias=True).double()
    for bias in (weight for weight in theirs.parameters() if weight.dim() == 1):
        nn.init.normal_(bias)
    copy_attention(ours, theirs)
    x, T = torch.randn(3, 30, 48).double(), 30
    valid = torch.arange(T) < torch.tensor([30, 12, 1])[:, None]
    mask = torch.zeros(3, 1, T, T).double().masked_fill(~valid[:, None, None, :], float("-inf"))
    turn = LlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
    expected, _ = theirs(x, position_embeddings=turn, attention_mask=mask)
    got = ours(x, rotations(torch.arange(T), 12, 10_000.0), valid[:, None, None, :])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_attention_depends_on_distances_alone():
    torch.manual_seed(0)
    attention, x = Attention(48, 4, bias=True), torch.randn(2, 20, 48)
    valid = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    turn = rotations(torch.arange(520), 12, 10_000.0)
    early, late = attention(x, turn[:20], valid), attention(x, turn[500:], valid)
    torch.testing.assert_close(early, late, atol=1e-5, rtol=0)
    assert (attention(x, turn[:1].expand(20, -1, -1, -1), valid) - early).abs().max() > 1e-3


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, T), in place of torchaudio's BatchNorm."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_block_has_the_wiring_of_torchaudios_conformer_layer():
    """Both feed-forward halves, attention, convolution, norms and residuals; without positions, which
    torchaudio's does not have, and with LayerNorm in the place of its BatchNorm."""
    torch.manual_seed(0)
    theirs = ConformerLayer(24, 40, 2, depthwise_conv_kernel_size=7)
    theirs.conv_module.sequential[3] = ChannelNorm(24)
    theirs = theirs.double().eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    ours = ConformerBlock(ConformerConfig(**SMALL)).double()
    conv = theirs.conv_module.sequential
    pairs = [
        (ours.ffn_in.norm, theirs.ffn1.sequential[0]),
        (ours.ffn_in.up, theirs.ffn1.sequential[1]),
        (ours.ffn_in.down, theirs.ffn1.sequential[4]),
        (ours.attention_norm, theirs.self_attn_layer_norm),
        (ours.attention.out, theirs.self_attn.out_proj),
        (ours.convolution.norm, theirs.conv_module.layer_norm),
        (ours.convolution.pointwise_in, conv[0]),
        (ours.convolution.depthwise, conv[2]),
        (ours.convolution.depthwise_norm, conv[3]),
        (ours.convolution.pointwise_out, conv[5]),
        (ours.ffn_out.norm, theirs.ffn2.sequential[0]),
        (ours.ffn_out.up, theirs.ffn2.sequential[1]),
        (ours.ffn_out.down, theirs.ffn2.sequential[4]),
        (ours.norm, theirs.final_layer_norm),
    ]
    with torch.no_grad():
        for mine, other in pairs:
            mine.weight.copy_(other.weight.reshape(mine.weight.shape))
            mine.bias.copy_(other.bias)
        ours.attention.qkv.weight.copy_(theirs.self_attn.in_proj_weight)
        ours.attention.qkv.bias.copy_(theirs.self_attn.in_proj_bias)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(2, 33, 24).double()
    still = torch.ones(33, 1, 1, 6, dtype=torch.complex128)
    frames = Frames(torch.tensor([33, 33]), 33)
    got = frames.pad(ours(frames.pack(x), frames, still, frames.valid[:, None, None, :]))
    expected = theirs(x.transpose(0, 1), None).transpose(0, 1)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)


def test_the_convolution_equals_transformers_wav2vec2_bert_shifted_by_its_causal_padding():
    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        hidden_size=24, conv_depthwise_kernel_size=7, hidden_act="silu", conformer_conv_dropout=0.0
    )
    theirs = Wav2Vec2BertConvolutionModule(config).double()
    ours = Convolution(ConformerConfig(**SMALL)).double()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.5)
    nn.init.zeros_(theirs.layer_norm.bias)  # so that its causal padding and ours are both zeros
    with torch.no_grad():
        for mine, other in (
            (ours.norm, theirs.layer_norm),
            (ours.pointwise_in, theirs.pointwise_conv1),
            (ours.depthwise, theirs.depthwise_conv),
            (ours.depthwise_norm, theirs.depthwise_layer_norm),
            (ours.pointwise_out, theirs.pointwise_conv2),
        ):
            mine.weight.copy_(other.weight.reshape(mine.weight.shape))
            if other.bias is None:
                mine.bias.zero_()
            else:
                mine.bias.copy_(other.bias)
    x = torch.randn(2, 20, 24).double()
    expected = theirs(F.pad(x, (0, 0, 0, 3)))[:, 3:]
    frames = Frames(torch.tensor([20, 20]), 20)
    got = frames.pad(ours(frames.pack(x), frames))
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)


def test_bfloat16_autocast_stays_near_float32():
    model, features = small(dtype=torch.float32), batch(torch.float32)
    expected, _ = model(features, FRAMES)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = model(with_garbage(features, "nan"), FRAMES)
    assert (got.float() - expected).abs().mean() < 0.03
    got.float().square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_dropout_acts_in_training_alone():
    model, features = small(dropout=0.2), batch()
    model.eval()
    torch.testing.assert_close(model(features, FRAMES), model(features, FRAMES), atol=0, rtol=0)
    kept = small(dropout=0.0).train()
    torch.testing.assert_close(model(features, FRAMES)[0], kept(features, FRAMES)[0], atol=0, rtol=0)
    model.train()
    assert (model(features, FRAMES)[0] - kept(features, FRAMES)[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"conv_kernel": 6}, "conv_kernel"),
        ({"n_heads": 24}, "dim"),
        ({"stack": 0}, "stack"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_config_errors_name_the_field(changes, field):
    with pytest.raises(ValueError, match=field):
        ConformerConfig(**SMALL | changes)


def test_unknown_preset_names_those_that_exist():
    with pytest.raises(ValueError, match="1b and tiny"):
        conformer_preset("2b")
