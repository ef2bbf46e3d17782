"""Supervised fine-tuning of the image and video adapters on questions and answers (section 7.5.2); which parts
train is the recipe's freeze plan: encoder and image adapter for images, the video parts alone for video."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters.model_directory import attach_adapters
from ..adapters.stage import AdapterRecipe, initial_model, train_on_dialogs
from ..train.recipe import Stage
from .video_adapter import VideoAdapter


@dataclass(kw_only=True)
class VisionFinetuneRecipe(AdapterRecipe):
    """
    Args:
        init: model directory to start from: the finetuned language model, on which the paper finetunes adapters that
            were pre-trained on the base model, or one with adapters already.
        graft: model directories whose further adapters join it, though they were trained with other weights of the
            language model: image or video parts from their pre-training.
        frames, merge: what the video adapter samples from a clip and merges into one from now on; None leaves them.
    """

    graft: list[str] = field(default_factory=list)
    frames: int | None = None
    merge: int | None = None


def finetune(recipe: VisionFinetuneRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains the adapters of `recipe.init` on dialogs and writes `run_dir/model`.

    Raises:
        ValueError: the language models differ in size or tokens; there is no video adapter of ours for `frames` or
            `merge`, or they do not fit it.
    """
    torch.manual_seed(recipe.trainer.seed)
    model, weights = initial_model(recipe)
    for path in recipe.graft:
        attach_adapters(model, path, other_weights=True, weights=weights)
    if recipe.frames is not None or recipe.merge is not None:
        video = model.adapters.get("video")
        if not isinstance(video, VideoAdapter):
            raise ValueError("frames and merge: the model has no video adapter of ours")
        frames = video.config.frames if recipe.frames is None else recipe.frames
        merge = video.config.merge if recipe.merge is None else recipe.merge
        video.sample(frames, merge)
    return train_on_dialogs(recipe, model, weights, run_dir)


STAGE = Stage(VisionFinetuneRecipe, finetune)
