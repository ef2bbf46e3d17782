"""Pre-training of the vision parts: the encoder by image-text contrast, then the image adapter and the video
adapter on captions through the frozen language model (sections 7.2 and 7.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.stage import AdapterRecipe, initial_model, train_on_dialogs
from ..data.shards import Sample
from ..data.sources import DataConfig, open_loader
from ..text.model_directory import load_part, load_text, save_part
from ..text.tokenizer import Tokenizer
from ..train.parallel import rank, world_size
from ..train.recipe import Stage, StageRecipe, train_by
from .contrastive import ContrastiveModel, TextTower, TextTowerConfig, WordTower, clip_loss
from .encoder import VisionTransformer
from .image_adapter import ImageAdapter, ImageAdapterConfig
from .interchange import build_encoder, load_vision_state
from .packed import Encoder
from .tiles import ImagePreparation
from .video_adapter import VideoAdapter, VideoAdapterConfig

IMAGE_MEMBERS = ("png", "jpg", "jpeg", "webp")


@dataclass(kw_only=True)
class ContrastiveRecipe(StageRecipe):
    """
    Args:
        init: model directory whose tokenizer reads the captions.
        encoder: see `herdkit.vision.interchange.build_encoder`.
        text_tower: sizes of the text tower; its vocabulary is the tokenizer's. Left out: `WordTower` of the
            language model in `init`.
        embedding_dim: width of the space that both towers share; left out: the text tower's.
        data: samples with an image and its caption in the member `txt`.
    """

    init: str
    encoder: dict[str, Any]
    text_tower: TextTowerConfig | None = None
    embedding_dim: int | None = None
    data: DataConfig = field(default_factory=DataConfig)


class PairCollator:
    """Samples with an image and a `txt` member to the batch of `ContrastiveModel`; captions of more than
    `max_length` tokens are cut."""

    def __init__(self, tokenizer: Tokenizer, prepare: ImagePreparation, max_length: int | None = None):
        self.tokenizer = tokenizer
        self.prepare = prepare
        self.max_length = max_length

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: a sample has no image; MediaError: it does not decode.
        """
        images, captions = [], []
        for _, sample in samples:
            member = next((name for name in IMAGE_MEMBERS if name in sample.members), None)
            if member is None:
                raise ValueError(f"{sample.shard}: sample {sample.key} has none of {', '.join(IMAGE_MEMBERS)}")
            images.append(self.prepare.load(sample.members[member]))
            tokens = self.tokenizer.encode(sample.text("txt"))
            if self.max_length is not None:
                # Cut as CLIP does: the last token, which the tower reads, is always the end of the text.
                tokens = tokens[: self.max_length - 1]
            captions.append(torch.tensor([*tokens, self.tokenizer.eos_id]))
        lengths = torch.tensor([len(caption) for caption in captions])
        tokens = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
        return {**self.prepare(images), "tokens": tokens, "lengths": lengths}


def contrastive_objective(model: ContrastiveModel, batch: Mapping[str, Tensor]):
    return clip_loss(*model(batch))


def pretrain_encoder(recipe: ContrastiveRecipe, run_dir: Path) -> dict[str, Any]:
    """Trains both towers and writes the image encoder to `run_dir/encoder.safetensors`."""
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
    model = ContrastiveModel(encoder, text, recipe.embedding_dim)
    prepare = ImagePreparation(tile_size=encoder.image_size, max_tiles=encoder.max_tiles)
    collate = PairCollator(tokenizer, prepare, max_length)
    batch_size = recipe.trainer.micro_batch_size(world_size())
    # The loss speaks to all processes: each must have a batch in every step.
    loader = open_loader(recipe.data, collate, batch_size, rank(), world_size(), drop_last=True)
    result = train_by(recipe, model, loader, contrastive_objective, run_dir)
    if rank() == 0:
        save_part(model.vision, run_dir / "encoder.safetensors")
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
    model = initial_model(recipe)
    adapter = ImageAdapter(recipe.adapter, model.text.config)
    if recipe.encoder_weights:
        load_encoder(adapter.encoder, Path(recipe.encoder_weights))
    model.attach(adapter)
    return train_on_dialogs(recipe, model, run_dir)


def load_encoder(encoder: Encoder, file: Path) -> None:
    """Loads an encoder that the contrastive stage wrote; one of ours may have gained global layers since."""
    if isinstance(encoder, VisionTransformer):
        load_vision_state(encoder, file)
    else:
        load_part(encoder, file)


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
    model = initial_model(recipe)
    adapter = VideoAdapter(recipe.adapter, model.text.config)
    if recipe.see_as_image:
        image = model.adapters.get("image")
        if not isinstance(image, ImageAdapter):
            raise ValueError(f"see_as_image: {recipe.init} has no image adapter of ours")
        adapter.see_as_image(image)
    model.attach(adapter)
    return train_on_dialogs(recipe, model, run_dir)


CONTRASTIVE = Stage(ContrastiveRecipe, pretrain_encoder)
IMAGE = Stage(ImagePretrainRecipe, pretrain_image_adapter)
VIDEO = Stage(VideoPretrainRecipe, pretrain_video_adapter)
