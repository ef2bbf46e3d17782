"""Pre-training of the vision parts: the encoder by image-text contrast, then the image adapter and the video
adapter on captions through the frozen language model (sections 7.2 and 7.4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapters.deferred import without_memory
from ..adapters.stage import AdapterRecipe, initial_model, train_on_dialogs
from ..data.sources import DataConfig, open_loader
from ..text.model_directory import load_part, load_text, save_part
from ..train.parallel import rank, world_size
from ..train.recipe import Stage, StageRecipe, train_by
from .contrastive import (
    SIGLIP_BIAS,
    SIGLIP_SCALE,
    ContrastiveModel,
    TextTower,
    TextTowerConfig,
    WordTower,
    clip_objective,
    siglip_objective,
)
from .encoder import VisionTransformer
from .image_adapter import ImageAdapter, ImageAdapterConfig
from .interchange import build_encoder, load_vision_state
from .interchange.open_clip import open_clip_refusal, save_open_clip
from .packed import Encoder
from .pairs import PairCollator
from .tiles import ImagePreparation
from .video_adapter import VideoAdapter, VideoAdapterConfig
from .zero_shot import ZeroShot, ZeroShotConfig


@dataclass(kw_only=True)
class ContrastiveRecipe(StageRecipe):
    """
    Args:
        init: model directory whose tokenizer reads the captions.
        encoder: see `herdkit.vision.interchange.build_encoder`.
        text_tower: sizes of the text tower; its vocabulary is the tokenizer's. Left out: `WordTower` of the
            language model in `init`.
        embedding_dim: width of the space that both towers share; left out: the text tower's.
        loss: "clip" or "siglip".
        held_out: what to measure at `trainer.evaluate_every` and at the end; left out: nothing.
        data: samples with an image and its caption in the member `txt`.
    """

    init: str
    encoder: dict[str, Any]
    text_tower: TextTowerConfig | None = None
    embedding_dim: int | None = None
    loss: Literal["clip", "siglip"] = "clip"
    held_out: ZeroShotConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)


def pretrain_encoder(recipe: ContrastiveRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains both towers and writes the image encoder to `run_dir/encoder.safetensors`, and both to `run_dir/open_clip`
    where open_clip can hold them."""
    torch.manual_seed(recipe.trainer.seed)
    language_model, tokenizer = load_text(recipe.init, torch.float32)
    encoder = build_encoder(recipe.encoder)
    max_length = None
    if recipe.text_tower is None:
        text = WordTower(language_model.tok_embeddings.weight)
    else:
        max_length = recipe.text_tower.max_length
        recipe.text_tower.vocab_size = tokenizer.vocab_size
        text = TextTower(recipe.text_tower)
    start = {} if recipe.loss == "clip" else {"initial_scale": SIGLIP_SCALE, "initial_bias": SIGLIP_BIAS}
    model = ContrastiveModel(encoder, text, recipe.embedding_dim, **start)
    prepare = ImagePreparation(tile_size=encoder.image_size, max_tiles=encoder.max_tiles)
    collate = PairCollator(tokenizer, prepare, max_length)
    batch_size = recipe.trainer.micro_batch_size(world_size())
    # The loss speaks to all processes: each must have a batch in every step.
    loader = open_loader(recipe.data, collate, batch_size, rank(), world_size(), drop_last=True)
    measure = None
    if recipe.held_out is not None:
        measure = ZeroShot(recipe.held_out, tokenizer, prepare, max_length).measure
    objective = clip_objective if recipe.loss == "clip" else siglip_objective
    result = train_by(recipe, model, loader, objective, run_dir, measure)
    if rank() == 0:
        save_part(model.vision, run_dir / "encoder.safetensors")
        if open_clip_refusal(model) is None:
            save_open_clip(model, run_dir / "open_clip", tokenizer)
    return result


@dataclass(kw_only=True)
class ImagePretrainRecipe(AdapterRecipe):
    """
    Args:
        adapter: sizes of the image adapter, encoder included.
        encoder_weights: safetensors file of the pre-trained encoder; "" starts it at random.
    """

    adapter: ImageAdapterConfig
    encoder_weights: str = ""


def pretrain_image_adapter(recipe: ImagePretrainRecipe, run_dir: Path) -> dict[str, Any]:
    """Attaches a new image adapter and trains it, with its encoder, on captions."""
    torch.manual_seed(recipe.trainer.seed)
    model, weights = initial_model(recipe)
    with without_memory(recipe.trainer.seed):
        adapter = ImageAdapter(recipe.adapter, model.text.config)
    if recipe.encoder_weights:
        load_encoder(adapter.encoder, Path(recipe.encoder_weights))
    model.attach(adapter)
    return train_on_dialogs(recipe, model, weights, run_dir)


def load_encoder(encoder: Encoder, file: Path) -> None:
    """Loads an encoder that the contrastive stage wrote; one of ours may have gained global layers since."""
    if isinstance(encoder, VisionTransformer):
        load_vision_state(encoder, file)
    else:
        load_part(encoder, file)


@dataclass(kw_only=True)
class ImageAnnealRecipe(AdapterRecipe):
    """
    Args:
        init: model directory with a pre-trained image adapter.
        image_size: side of a tile in pixels to go on with; None for that of `init`.
    """

    image_size: int | None = None


def anneal_image_adapter(recipe: ImageAnnealRecipe, run_dir: Path) -> dict[str, Any]:
    """Goes on with a trained image adapter, on better captions and larger tiles. The optimizer starts anew.

    Raises:
        ValueError: `init` has no image adapter of ours; another adapter reads its tiles.
    """
    torch.manual_seed(recipe.trainer.seed)
    model, weights = initial_model(recipe)
    image = model.adapters.get("image")
    if not isinstance(image, ImageAdapter):
        raise ValueError(f"{recipe.init} has no image adapter of ours")
    if recipe.image_size not in (None, image.encoder.image_size):
        if users := [name for name, other in model.adapters.items() if "image" in other.requires]:
            raise ValueError(f"image_size: {', '.join(users)} of {recipe.init} cannot follow to tiles of another size")
        model.image = image.with_tiles_of(recipe.image_size)
    return train_on_dialogs(recipe, model, weights, run_dir)


@dataclass(kw_only=True)
class VideoPretrainRecipe(AdapterRecipe):
    """
    Args:
        init: model directory with a trained image adapter.
        adapter: sizes of the video adapter.
        see_as_image: starts the video cross-attention layers as the image adapter's, see
            `VideoAdapter.see_as_image`; otherwise anew, as in the paper.
    """

    adapter: VideoAdapterConfig
    see_as_image: bool = False


def pretrain_video_adapter(recipe: VideoPretrainRecipe, run_dir: Path) -> dict[str, Any]:
    """Attaches a new video adapter and trains it on captions; all else stays as it is (section 7.4)."""
    torch.manual_seed(recipe.trainer.seed)
    model, weights = initial_model(recipe)
    with without_memory(recipe.trainer.seed):
        adapter = VideoAdapter(recipe.adapter, model.text.config)
    if recipe.see_as_image:
        image = model.adapters.get("image")
        if not isinstance(image, ImageAdapter):
            raise ValueError(f"see_as_image: {recipe.init} has no image adapter of ours")
        adapter.see_as_image(image)
    model.attach(adapter)
    return train_on_dialogs(recipe, model, weights, run_dir)


CONTRASTIVE = Stage(ContrastiveRecipe, pretrain_encoder)
IMAGE = Stage(ImagePretrainRecipe, pretrain_image_adapter)
IMAGE_ANNEAL = Stage(ImageAnnealRecipe, anneal_image_adapter)
VIDEO = Stage(VideoPretrainRecipe, pretrain_video_adapter)
