"""The image adapter: encoder, projection and gated cross-attention layers in the language model (section 7.2 of the
paper; sizes and placement as in the released Llama 3.2 Vision)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from ..adapters.contract import Adapter, Contribution, InterleavedLayer
from ..adapters.cross_attention import GatedCrossAttention
from ..adapters.deferred import interleaved_layers
from ..text.linear import Linear
from ..text.model import TransformerConfig
from .encoder import VisionTransformer
from .interchange import build_encoder, load_vision_state
from .sequence_parallel import share_tokens
from .tiles import ImagePreparation


@dataclass(kw_only=True)
class ImageAdapterConfig:
    """Sizes of the image adapter; `preset` has those of the paper.

    Args:
        encoder: what `herdkit.vision.interchange.build_encoder` makes the encoder from, such as
            {"type": "herdkit", "preset": "tiny"} or {"type": "timm", "model": "vit_base_patch16_224"}.
        n_cross_layers: cross-attention layers in the language model.
        cross_layers: before which of its layers they run, ascending; None for those of `placement`.
        ffn_dim: hidden width of their feed-forward branch; None for that of the language model.
        gate_init: their gates before tanh at the start; 0 leaves the language model undisturbed.
        memory_positions: side of a square table of learned positions that is stretched over the whole image, all
            its tiles together, and added to the patches after the projection, much as in DETR (arXiv 2005.12872);
            0 for none, as released. Where a thing is, is a small part of what a small encoder says of it, and
            cross-attention finds it late. The encoder's tokens must be a class token and a square of patches.
    """

    encoder: dict[str, Any] = field(default_factory=lambda: {"type": "herdkit", "preset": "tiny"})
    n_cross_layers: int
    cross_layers: tuple[int, ...] | None = None
    ffn_dim: int | None = None
    gate_init: float = 0.0
    memory_positions: int = 0

    def __post_init__(self):
        if self.n_cross_layers < 1:
            raise ValueError(f"n_cross_layers must be at least 1, not {self.n_cross_layers}")
        if self.cross_layers is not None:
            self.cross_layers = tuple(self.cross_layers)
            if len(self.cross_layers) != self.n_cross_layers or list(self.cross_layers) != sorted(
                set(self.cross_layers)
            ):
                raise ValueError(
                    f"cross_layers must be {self.n_cross_layers} ascending numbers, as many as n_cross_layers, not "
                    f"{self.cross_layers}"
                )
        if self.memory_positions < 0:
            raise ValueError(f"memory_positions must not be negative, not {self.memory_positions}")

    def places(self, n_text_layers: int) -> list[int]:
        """Before which of the language model's layers the cross-attention layers run."""
        if self.cross_layers is None:
            return placement(n_text_layers, self.n_cross_layers)
        return list(self.cross_layers)


def preset(name: str) -> ImageAdapterConfig:
    """A new config for the language model of that name: "tiny", "8b", "70b" or "405b". Tile size 448, as the base
    model of the release and the paper's video stage have it. The paper does not give the number of layers at
    405B; 32 fit its 100B parameters.

    Raises:
        ValueError: no such preset.
    """
    if name == "tiny":
        return ImageAdapterConfig(n_cross_layers=3)
    layers = {"8b": 8, "70b": 20, "405b": 32}
    if name not in layers:
        raise ValueError(f"no image adapter preset {name!r}; there are tiny, 8b, 70b and 405b")
    encoder = {"type": "herdkit", "preset": "h14-448"}
    return ImageAdapterConfig(encoder=encoder, n_cross_layers=layers[name])


def placement(n_text_layers: int, n_cross_layers: int) -> list[int]:
    """Before which text layers the cross-attention layers run: from the last one down, every
    ceil(n_text_layers / n_cross_layers)-th. 32 and 8 give 3, 7, ..., 31.

    Raises:
        ValueError: the rule finds fewer places than layers.
    """
    step = -(-n_text_layers // n_cross_layers)
    places = list(range(n_text_layers - 1, -1, -step))[:n_cross_layers]
    if len(places) < n_cross_layers:
        raise ValueError(
            f"{n_cross_layers} cross-attention layers cannot be spread over {n_text_layers} text layers: every "
            f"{step}th gives {len(places)}"
        )
    return places[::-1]


def cross_attention(text: TransformerConfig, ffn_dim: int | None, gate_init: float) -> GatedCrossAttention:
    """A layer with the language model's heads and width that reads memory of the same width."""
    return GatedCrossAttention(
        dim=text.dim,
        n_heads=text.n_heads,
        n_kv_heads=text.n_kv_heads,
        ffn_dim=ffn_dim or text.ffn_dim,
        memory_dim=text.dim,
        norm_eps=text.norm_eps,
        gate_init=gate_init,
    )


def stretched(table: Tensor, side: int, rows: int, columns: int, tiles: int) -> Tensor:
    """A table (g, g, D) over the whole of rows x columns tiles of `side` patches squared: (tiles, side * side, D),
    zeros for tiles beyond these."""
    size = (rows * side, columns * side)
    whole = F.interpolate(table.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)
    cut = rearrange(whole[0], "d (r h) (c w) -> (r c) (h w) d", r=rows, c=columns)
    return F.pad(cut, (0, 0, 0, 0, 0, tiles - len(cut)))


class ImageAdapter(Adapter):
    """Images as memory for cross-attention. Each image stands in the text as one placeholder, whose embedding is
    learned. Letters in shapes as in `herdkit.vision.packed`; D width of the language model."""

    modality = "image"
    part = "image"
    placeholder = "<|image|>"
    config_class = ImageAdapterConfig

    def __init__(self, config: ImageAdapterConfig, text: TransformerConfig):
        super().__init__(config, text)
        self.encoder = build_encoder(config.encoder)
        self.prepare = ImagePreparation(tile_size=self.encoder.image_size, max_tiles=self.encoder.max_tiles)
        self.projection = Linear(self.encoder.width, text.dim, bias=True)
        side = config.memory_positions
        self.memory_position = nn.Parameter(torch.randn(side, side, text.dim)) if side else None
        self.placeholder_embedding = nn.Parameter(torch.randn(text.dim) * 0.02)
        make = partial(cross_attention, text, config.ffn_dim, config.gate_init)
        places = config.places(text.n_layers)
        self.cross_attention = interleaved_layers(self.modality, dict.fromkeys(places, make))

    def forward(self, batch: Mapping[str, Tensor], **required: nn.Module) -> Contribution:
        """As in `Adapter.forward`.

        Raises:
            ValueError: `memory_positions` are wanted, but the encoder's tokens are not 1 and a square.
        """
        features, mask = self.encoder(batch["tiles"], batch["n_tiles"], batch["grid"])
        memory = self._memory(features, batch["grid"])
        soft = self.placeholder_embedding.expand(len(memory), 1, -1)
        return Contribution(soft_tokens=soft, memory=memory, memory_mask=mask)

    def encode_frames(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Frames of clips, each encoded as an image of its own: features (N, F, T' * L, D) as in the memory, and
        their mask (N, F, T' * L) bool.

        Args:
            tiles: (N, F, T, 3, s, s), F frames of each clip.
            n_tiles, grid: (N,) and (N, 2), of every frame of a clip.
        """
        N, F = tiles.shape[:2]
        grid = grid.repeat_interleave(F, dim=0)
        features, mask = self.encoder(tiles.flatten(0, 1), n_tiles.repeat_interleave(F), grid)
        return self._memory(features, grid).unflatten(0, (N, F)), mask.unflatten(0, (N, F))

    def _memory(self, features: Tensor, grid: Tensor) -> Tensor:
        """(N, T, L, width) to (N, T * L, D)."""
        memory = self.projection(features)
        if self.memory_position is not None:
            _, T, L, _ = features.shape
            side = math.isqrt(L - 1)
            if 1 + side**2 != L:
                raise ValueError(f"memory_positions: the encoder gives {L} tokens for a tile, not 1 and a square")
            grids, which = grid.unique(dim=0, return_inverse=True)
            places = [stretched(self.memory_position, side, rows, columns, T) for rows, columns in grids.tolist()]
            memory = memory + F.pad(torch.stack(places)[which], (0, 0, 1, 0))
        return memory.flatten(1, 2)

    def change_encoder(self, **changes: Any) -> None:
        """Runs the encoder otherwise from now on, and keeps that in what is saved.

        Args:
            changes: `padding` and `pooling` of its `VisionConfig`; `tile_tables` where the tables are of that form
                already, see `herdkit.vision.interchange.tile_tables`.

        Raises:
            ValueError: the encoder is none of ours, or a change asks for other weights.
        """
        encoder = self.encoder
        if not isinstance(encoder, VisionTransformer):
            raise ValueError(f"a {type(encoder).__name__} cannot be changed; only a VisionTransformer can")
        if wrong := sorted(changes.keys() - {"padding", "pooling", "tile_tables"}):
            raise ValueError(f"encoder.{wrong[0]} cannot be changed: only padding, pooling and tile_tables can")
        config = replace(encoder.config, **changes)
        if config.max_tiles > 1 and len(encoder.tile_position_embedding) != config.tile_rows:
            raise ValueError(f"encoder.tile_tables cannot be changed to {config.tile_tables!r}: its tables are not so")
        encoder.config = config
        self.config = replace(self.config, encoder={**self.config.encoder, **changes})

    @torch.no_grad()
    def with_tiles_of(self, image_size: int) -> ImageAdapter:
        """A copy whose encoder takes tiles of another side in pixels: its tables of positions are stretched, all other
        weights are the same (section 7.2: annealing goes on with larger tiles).

        Raises:
            ValueError: the encoder is none of ours, or its patches do not divide the side.
        """
        if not isinstance(self.encoder, VisionTransformer):
            raise ValueError(f"the tile size of a {type(self.encoder).__name__} cannot be changed")
        changed = copy.deepcopy(self)
        changed.config = replace(self.config, encoder={**self.config.encoder, "image_size": image_size})
        encoder = build_encoder(changed.config.encoder)
        assert isinstance(encoder, VisionTransformer)
        load_vision_state(encoder, self.encoder)
        changed.encoder = encoder.to(self.placeholder_embedding).train(self.training)
        changed.prepare = ImagePreparation(tile_size=encoder.image_size, max_tiles=encoder.max_tiles)
        return changed

    def shared(self, group: ProcessGroup, **required: nn.Module) -> AbstractContextManager[None] | None:
        return share_tokens(self.encoder, group) if isinstance(self.encoder, VisionTransformer) else None

    def interleaved(self) -> Mapping[int, InterleavedLayer]:
        return {int(i): layer for i, layer in self.cross_attention.items()}  # type: ignore[misc]
