"""The probe finds what a frozen encoder shows, and changes nothing of it."""

import pytest
import torch
from herdkit.speech import Conformer, ConformerConfig, FeatureConfig
from herdkit.speech.probe import UNLABELLED, LabelledUtterance, encoder_states, label_frames, probe
from syllables import RATE, syllables

TONES = (400.0, 1200.0, 3000.0)


def encoder(seed: int = 0) -> Conformer:
    torch.manual_seed(seed)
    return Conformer(ConformerConfig(dim=24, n_layers=2, n_heads=2, ffn_dim=40))


def tones(seed: int) -> LabelledUtterance:
    """Random tones of 0.2 s, each with its own letter."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(TONES), (8,), generator=generator).tolist()
    time = torch.arange(RATE // 5) / RATE
    parts = [torch.sin(2 * torch.pi * TONES[which] * time) for which in chosen]
    labels = torch.tensor([97 + which for which in chosen]).repeat_interleave(5)
    labels[::5] = UNLABELLED
    noise = torch.randn(8 * len(time), generator=generator)
    return LabelledUtterance(torch.cat(parts) + 0.01 * noise, labels)


def test_tones_are_told_apart_and_random_letters_are_not():
    model, features = encoder(), FeatureConfig()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train, held_out = [tones(i) for i in range(12)], [tones(i) for i in range(12, 16)]
    found = probe(model, train, held_out, features)
    assert len(found) == 3
    assert min(found) > 0.9
    assert found == probe(model, train, held_out, features), "nothing is left to chance"
    for one in [*train, *held_out]:
        one.labels = torch.randint(97, 100, one.labels.shape)
    assert max(probe(model, train, held_out, features)) < 0.6
    assert model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_states_are_those_of_each_recording_alone():
    model, features = encoder().eval(), FeatureConfig()
    waveforms = [syllables(seconds, i) for i, seconds in enumerate((1.0, 0.5, 1.3))]
    together = encoder_states(model, waveforms, features)
    for one, states in zip(waveforms, together, strict=True):
        (alone,) = encoder_states(model, [one], features)
        assert states.shape == (3, -(-len(one) // 160 // 4), 24)
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)
    assert not model.blocks[0]._forward_hooks


def test_letters_stand_where_the_ctc_head_hears_them(speaking):
    found = label_frames(speaking.adapters["speech"], syllables(2.0), "go left")
    assert found.labels.shape == (50,)
    heard = [value for value in found.labels.unique_consecutive().tolist() if value != UNLABELLED]
    assert bytes(heard).decode() == "go left"
    with pytest.raises(ValueError, match="cannot be aligned"):
        label_frames(speaking.adapters["speech"], syllables(0.2), "far too many letters")
