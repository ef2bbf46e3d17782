"""Recipes carry the paper's numbers, and build what it describes (on the meta device)."""

from pathlib import Path

import herdkit
import pytest
import torch
from herdkit.speech import BestRQ, BestRQConfig, Conformer, SpeechAdapter, adapter_preset, conformer_preset
from herdkit.speech.bestrq import MAX_FRAMES
from herdkit.speech.finetune import SpeechRecipe
from herdkit.speech.pretrain import BestRQRecipe
from herdkit.text.presets import preset
from herdkit.train.config import load_recipe

RECIPES = Path(herdkit.__file__).parent / "speech/recipes"


def test_pre_training_has_the_numbers_of_section_8_3_1():
    recipe = load_recipe(RECIPES / "bestrq_1b.yaml", BestRQRecipe)
    assert recipe.conformer == conformer_preset("1b")
    assert recipe.bestrq == BestRQConfig()
    assert (recipe.bestrq.n_codebooks, recipe.bestrq.n_codes, recipe.bestrq.code_dim) == (16, 8192, 16)
    assert (recipe.bestrq.mask_probability, recipe.bestrq.mask_span, MAX_FRAMES) == (0.025, 32, 6000)
    assert (recipe.trainer.steps, recipe.trainer.batch_size) == (500_000, 2048)
    with torch.device("meta"):
        model = BestRQ(Conformer(recipe.conformer), recipe.bestrq)
    assert model.projections.shape == (16, 320, 16)
    assert model.codes.shape == (16, 8192, 16)
    assert sum(weight.numel() for weight in model.encoder.parameters()) == pytest.approx(1.0e9, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "steps", "batch", "lr", "count"),
    [("8b", 650_000, 512, 1e-4, 102.3e6), ("70b", 600_000, 768, 4e-5, 114.9e6)],
)
def test_supervised_training_has_the_numbers_of_section_8_3_1(name, steps, batch, lr, count):
    recipe = load_recipe(RECIPES / f"finetune_{name}.yaml", SpeechRecipe)
    assert recipe.adapter == adapter_preset("1b")
    assert (recipe.trainer.steps, recipe.trainer.batch_size, recipe.optimizer.lr) == (steps, batch, lr)
    assert (recipe.answer_weight, recipe.ctc_weight, recipe.alignment_weight, recipe.distil_weight) == (1, 0, 0, 0)
    assert [rule.pattern for rule in recipe.freeze if rule.trainable] == ["speech.*"]
    assert recipe.adapter.max_seconds == 60
    with torch.device("meta"):
        adapter = SpeechAdapter(recipe.adapter, preset(name))
    bridge = sum(w.numel() for name, w in adapter.named_parameters() if not name.startswith("encoder."))
    assert bridge == pytest.approx(count, rel=2e-3)
