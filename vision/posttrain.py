"""Supervised fine-tuning of the image and video adapters on questions and answers (section 7.5.2); which parts
train is the recipe's freeze plan: encoder and image adapter for images, the video parts alone for video."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters.compose import ComposedModel
from ..adapters.model_directory import attach_adapters
from ..adapters.stage import AdapterRecipe, initial_model, train_on_dialogs
from ..text.model_directory import load_text
from ..train.recipe import Stage
from .video_adapter import VideoAdapter


@dataclass(kw_only=True)
class VisionFinetuneRecipe(AdapterRecipe):
    """
    Args:
        language_model: model directory whose language model takes the place of that of `init`: the paper pre-trains
            adapters on the base model and finetunes them on the finetuned one. "" leaves it.
        graft: model directories whose further adapters join it, though they were trained with other weights of the
            language model: video parts from their pre-training.
        frames, merge: what the video adapter samples from a clip and merges into one from now on; None leaves them.
    """

    language_model: str = ""
    graft: list[str] = field(default_factory=list)
    frames: int | None = None
    merge: int | None = None


def finetune(recipe: VisionFinetuneRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains the adapters of `recipe.init` on dialogs and writes `run_dir/model`.

    Raises:
        ValueError: the language models differ in size; there is no video adapter of ours for `frames` or `merge`.
    """
    torch.manual_seed(recipe.trainer.seed)
    model = initial_model(recipe)
    if recipe.language_model:
        swap_language_model(model, recipe.language_model)
    for path in recipe.graft:
        attach_adapters(model, path, other_weights=True)
    if recipe.frames is not None or recipe.merge is not None:
        video = model.adapters.get("video")
        if not isinstance(video, VideoAdapter):
            raise ValueError("frames and merge: the model has no video adapter of ours")
        frames, merge = recipe.frames or video.config.frames, recipe.merge or video.config.merge
        video.sample(frames, merge)
    return train_on_dialogs(recipe, model, run_dir)


def swap_language_model(model: ComposedModel, path: str) -> None:
    """Gives a model the language model of another directory, which must have the same sizes and vocabulary.

    Raises:
        ValueError: it has not.
    """
    other, tokenizer = load_text(path, model.text.tok_embeddings.weight.dtype)
    if other.config != model.text.config:
        raise ValueError(f"{path}: its language model has other sizes than the one that it is to replace")
    if model.tokenizer is not None and tokenizer.to_json() != model.tokenizer.to_json():
        raise ValueError(f"{path}: its tokenizer is another than that of the model it is to join")
    model.text.load_state_dict(other.state_dict())


STAGE = Stage(VisionFinetuneRecipe, finetune)
