"""How a gated cross-attention layer starts."""

import torch
from herdkit.adapters.cross_attention import CrossAttention, GatedCrossAttention


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
