"""Supervised fine-tuning of the image and video adapters on questions and answers (section 7.5.2); which parts
train is the recipe's freeze plan: encoder and image adapter for images, the video parts alone for video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..adapters.stage import AdapterRecipe, initial_model, train_on_dialogs
from ..train.recipe import Stage


def finetune(recipe: AdapterRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains the adapters of `recipe.init` on dialogs and writes `run_dir/model`."""
    torch.manual_seed(recipe.trainer.seed)
    return train_on_dialogs(recipe, initial_model(recipe), run_dir)


STAGE = Stage(AdapterRecipe, finetune)
