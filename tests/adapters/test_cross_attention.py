"""How a gated cross-attention layer starts."""

import pytest
import torch
from herdkit.adapters.cross_attention import CrossAttention, GatedCrossAttention, match_queries_to_keys
from herdkit.adapters.resampler import PerceiverResampler, spread


def test_text_attends_at_first_to_the_memory_that_is_like_it():
    torch.manual_seed(0)
    attention = CrossAttention(64, 4, 2, 64, 1e-5)
    memory = torch.randn(20, 12, 64)
    looked_up = torch.randint(12, (20,))
    query = attention.wq(memory[torch.arange(20), looked_up] + 0.3 * torch.randn(20, 64)).view(20, 1, 4, 16)
    keys, _ = attention.keys_values(memory)
    weights = attention.q_norm(query).transpose(1, 2) @ keys.repeat_interleave(2, dim=1).mT
    assert (weights.argmax(-1).squeeze(-1) == looked_up[:, None]).float().mean() > 0.9
    gram = attention.wk.weight @ attention.wk.weight.T
    torch.testing.assert_close(gram, torch.eye(32), rtol=0, atol=1e-5)


def test_memory_of_another_width_starts_from_independent_draws():
    attention = CrossAttention(64, 4, 2, 48, 1e-5)
    keys, values = attention.keys_values(torch.randn(2, 5, 48))
    assert keys.shape == values.shape == (2, 2, 5, 16)


def test_query_heads_of_one_key_head_part_in_the_first_step():
    torch.manual_seed(0)
    layer = GatedCrossAttention(64, 4, 2, 96, gate_init=0.5)
    hidden = torch.randn(2, 7, 64)
    keys, values = layer.keys_values(torch.randn(2, 5, 64))
    out = layer(hidden, keys, values, torch.ones(2, 1, 7, 5, dtype=torch.bool))
    (out * torch.randn_like(out)).sum().backward()
    first, second = layer.attention.wq.weight.grad.view(2, 2, 16, 64).unbind(1)
    assert (first - second).norm() > 0.1 * first.norm()


def test_latents_of_a_resampler_look_for_their_like_too():
    for layer in PerceiverResampler(64, 3, 2, 4, 96, max_frames=2, max_tokens=5).layers:
        assert torch.equal(layer.wq.weight, layer.wkv.weight[:64])
        torch.testing.assert_close(layer.wq.weight @ layer.wq.weight.T, torch.eye(64), rtol=0, atol=1e-5)


def test_weights_of_any_precision_and_without_memory_can_be_drawn():
    query, key = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    match_queries_to_keys(query, key, 16)
    assert torch.equal(query.view(2, 2, 16, 64), key.view(2, 1, 16, 64).expand(-1, 2, -1, -1))
    with torch.device("meta"):
        assert CrossAttention(64, 4, 2, 64, 1e-5).wq.weight.is_meta


def test_latents_start_at_all_places_at_some_times_or_at_some_places_at_one():
    def pairs(*sizes):
        return [tuple(pair) for pair in torch.stack(spread(*sizes), 1).tolist()]

    assert pairs(6, 8, 3) == [(0, 0), (0, 1), (0, 2), (7, 0), (7, 1), (7, 2)]
    assert [time for time, _ in pairs(9, 8, 3)] == [0, 0, 0, 4, 4, 4, 7, 7, 7]
    assert pairs(3, 8, 5) == [(4, 0), (4, 2), (4, 4)]
    for n_latents in (1, 5, 7, 23, 24):
        found = pairs(n_latents, 4, 6)
        assert len(set(found)) == n_latents, "equal latents would stay equal"
    with pytest.raises(ValueError, match="25 latents are more than 4 frames of 6 tokens"):
        spread(25, 4, 6)


def test_each_latent_looks_first_at_its_own_piece():
    torch.manual_seed(0)
    resampler = PerceiverResampler(64, 6, 1, 4, 96, max_frames=4, max_tokens=3).double()
    frames = torch.zeros(1, 4, 3, 64, dtype=torch.float64)
    before = resampler(frames)
    moved = []
    for time, place in zip(*spread(6, 4, 3), strict=True):
        other = frames.clone()
        other[0, time, place] = torch.randn(64)
        moved.append((resampler(other) - before)[0].norm(dim=-1).argmax().item())
    assert moved == list(range(6))
    with pytest.raises(ValueError, match="4 tokens in a frame, but the resampler was built for 3"):
        resampler(torch.zeros(1, 4, 4, 64, dtype=torch.float64))
