"""The vision transformer: architecture only (section 7.2 of "The Llama 3 Herd of Models", arXiv 2407.21783, and
the encoder of the released Llama 3.2 Vision).

A plain ViT with three additions, each behind a gate that starts at zero: tile embeddings, positions that know the
tile, and global layers on top. An encoder for contrastive pre-training is one without tiles and global layers;
its weights go on into the full encoder (`herdkit.vision.interchange.load_vision_state`). Letters in shapes as in
`herdkit.vision.packed`; S tokens of all packed images, D model width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..text.linear import Linear
from .packed import Encoder, Groups, PackedTiles, Sequences
from .tiles import canvas_numbers, canvases

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PATCH_NORM_EPS = 1e-2
"""In units of pixels of deviation 1, so that the noise of an even patch is not blown up."""


@dataclass(kw_only=True, frozen=True)
class VisionConfig:
    """Sizes and choices of a vision transformer; `preset` has those of the paper. Never changed in place: an adapter
    writes down what its encoder is built from, see `ImageAdapter.change_encoder`.

    Args:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels, a divisor of `image_size`.
        dim, n_layers, n_heads, ffn_dim: of the transformer; attention runs over all tiles of an image.
        n_global_layers: gated layers after the norm that closes the local ones.
        taps: the state before each of these local layers, ascending, is part of the features.
        max_tiles: tiles of an image at most; with 1 there are no tile embeddings.
        norm_eps: epsilon of every LayerNorm.
        attention_bias, patch_bias: biases of attention and of the patch embedding; the released encoder has none.
        patch_norm: a LayerNorm over the pixels of each patch before they are embedded (Dual PatchNorm, arXiv
            2302.01327): what a patch shows counts, not how bright it is. Neither the paper nor CLIP has it.
        position_std: deviation of the learned positions at the start; None for CLIP's, dim^-0.5, at which small
            encoders learn where things are long after what they are.
        input_norm: a LayerNorm before the first layer, as in CLIP.
        activation: "quick_gelu" is that of OpenAI's CLIP weights.
        pooling: of `pooled`: the class token, or the mean of the patch tokens.
        tile_tables: what the embeddings of tiles are told apart by: "place", row and column on the canvas, as in Meta's
            code; or "arrangement", number of the canvas (see `herdkit.vision.tiles.canvases`) and number of the tile,
            as in Hugging Face's, where training lets one place differ from canvas to canvas.
        padding: "clean": tiles and tokens that are padding do not exist for the others. "released": as in the
            released code, padding is blocked from padding only, so that real tokens attend to padded tiles;
            trained weights of the release depend on it.
        mean, std: normalisation of the three colours of uint8 tiles, for values in [0, 1].
    """

    image_size: int
    patch_size: int
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    n_global_layers: int = 0
    taps: tuple[int, ...] = ()
    max_tiles: int = 1
    norm_eps: float = 1e-5
    attention_bias: bool = False
    patch_bias: bool = False
    patch_norm: bool = False
    position_std: float | None = None
    input_norm: bool = True
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    pooling: Literal["class", "mean"] = "class"
    tile_tables: Literal["place", "arrangement"] = "place"
    padding: Literal["clean", "released"] = "clean"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        for name in ("taps", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "patch_size", "dim", "n_layers", "n_heads", "ffn_dim", "max_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) is no multiple of patch_size ({self.patch_size})")
        if self.dim % self.n_heads:
            raise ValueError(f"dim ({self.dim}) is no multiple of n_heads ({self.n_heads})")
        if self.n_global_layers < 0:
            raise ValueError(f"n_global_layers must not be negative, not {self.n_global_layers}")
        if wrong := [tap for tap in self.taps if not 0 <= tap < self.n_layers]:
            raise ValueError(f"taps {wrong} are not among the {self.n_layers} layers, counted from 0")
        if list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"taps must ascend without repeats, not {self.taps}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"mean and std need three values, not {self.mean} and {self.std}")
        choices = {"activation": ACTIVATIONS, "pooling": ("class", "mean"), "padding": ("clean", "released")}
        choices["tile_tables"] = ("place", "arrangement")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {tuple(allowed)}, not {getattr(self, name)!r}")

    @property
    def width(self) -> int:
        """Channels of the features: the final state and the taps."""
        return self.dim * (1 + len(self.taps))

    @property
    def tile_rows(self) -> int:
        """Rows of the tables of tiles: those of the largest canvas, or all canvases and one for none."""
        return self.max_tiles if self.tile_tables == "place" else 1 + len(canvases(self.max_tiles))

    @property
    def tokens(self) -> int:
        """Tokens of a tile L, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


def preset(name: str, **overrides) -> VisionConfig:
    """A new config: "tiny", "h14" (ViT-H/14 for contrastive pre-training, 630M parameters; section 7.2), or
    "h14-336", "h14-448", "h14-560" (with taps, four tiles and the 8 global layers: the 850M encoder).

    Raises:
        ValueError: no such preset.
    """
    huge = {"patch_size": 14, "dim": 1280, "n_layers": 32, "n_heads": 16, "ffn_dim": 5120}
    # The paper counts the tapped layers from 1: 4, 8, 16, 24, 31.
    full = huge | {"n_global_layers": 8, "taps": (3, 7, 15, 23, 30), "max_tiles": 4}
    sizes = {
        "tiny": {
            "image_size": 64,
            "patch_size": 8,
            "dim": 128,
            "n_layers": 4,
            "n_heads": 4,
            "ffn_dim": 512,
            "n_global_layers": 1,
            "taps": (1, 3),
            "max_tiles": 4,
        },
        "h14": huge | {"image_size": 224},
        "h14-336": full | {"image_size": 336},
        "h14-448": full | {"image_size": 448},
        "h14-560": full | {"image_size": 560},
    }
    if name not in sizes:
        raise ValueError(f"no vision preset {name!r}; there are {', '.join(sizes)}")
    return VisionConfig(**(sizes[name] | overrides))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


class Attention(nn.Module):
    """Self-attention within each sequence of a packed batch."""

    def __init__(self, dim: int, n_heads: int, bias: bool):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.out = Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """(S, D) to (S, D), of the tokens that are run here."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        return self.out(sequences.attend(q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, activation: str):
        super().__init__()
        self.fc1 = Linear(dim, ffn_dim, bias=True)
        self.fc2 = Linear(ffn_dim, dim, bias=True)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); a gated block multiplies both by tanh of a scalar that
    starts at zero."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        ffn_dim: int,
        *,
        norm_eps: float = 1e-5,
        attention_bias: bool = False,
        activation: str = "gelu",
        gated: bool = False,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, norm_eps)
        self.attention = Attention(dim, n_heads, attention_bias)
        self.mlp_norm = nn.LayerNorm(dim, norm_eps)
        self.mlp = MLP(dim, ffn_dim, activation)
        self.gate_attention = nn.Parameter(torch.zeros(1)) if gated else None
        self.gate_mlp = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        attended = self.attention(self.attention_norm(x), sequences)
        x = x + (attended if self.gate_attention is None else self.gate_attention.tanh() * attended)
        out = self.mlp(self.mlp_norm(x))
        return x + (out if self.gate_mlp is None else self.gate_mlp.tanh() * out)

    def init_weights(self, n_layers: int) -> None:
        """CLIP's rule: it follows the width, so that narrow models start with working attention too."""
        dim = self.attention.out.in_features
        residual = dim**-0.5 * (2 * n_layers) ** -0.5
        nn.init.normal_(self.attention.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.attention.out.weight, std=residual)
        nn.init.normal_(self.mlp.fc1.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(self.mlp.fc2.weight, std=residual)
        for linear in (self.attention.qkv, self.attention.out, self.mlp.fc1, self.mlp.fc2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class VisionTransformer(Encoder):
    """The image encoder. At initialisation all gates are zero and it is the plain ViT of its local layers."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.mean, self.std = config.mean, config.std
        self.image_size, self.max_tiles = config.image_size, config.max_tiles
        self.width, self.pooled_width = config.width, config.dim
        dim, tokens, tiles = config.dim, config.tokens, config.max_tiles

        self.patch_norm = nn.LayerNorm(3 * config.patch_size**2, PATCH_NORM_EPS) if config.patch_norm else nn.Identity()
        self.patch_embedding = Linear(3 * config.patch_size**2, dim, bias=config.patch_bias)
        self.class_embedding = nn.Parameter(torch.randn(dim) * dim**-0.5)
        position_std = dim**-0.5 if config.position_std is None else config.position_std
        self.position_embedding = nn.Parameter(torch.randn(tokens, dim) * position_std)
        if tiles > 1:
            rows = config.tile_rows
            self.tile_position_embedding = nn.Parameter(torch.empty(rows, tiles, tokens, dim))
            self.position_gate = nn.Parameter(torch.zeros(1))
            self.pre_tile_embedding = nn.Parameter(torch.randn(rows, tiles, 1, dim) * dim**-0.5)
            self.pre_tile_gate = nn.Parameter(torch.zeros(1))
            self.post_tile_embedding = nn.Parameter(torch.randn(rows, tiles, 1, dim) * dim**-0.5)
            self.post_tile_gate = nn.Parameter(torch.zeros(1))
            self.init_tile_positions()
        self.input_norm = nn.LayerNorm(dim, config.norm_eps) if config.input_norm else nn.Identity()
        self.layers = self._blocks(config.n_layers, gated=False)
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        self.global_layers = self._blocks(config.n_global_layers, gated=True)

    def _blocks(self, count: int, gated: bool) -> nn.ModuleList:
        config = self.config
        blocks = nn.ModuleList()
        for _ in range(count):
            block = Block(
                config.dim,
                config.n_heads,
                config.ffn_dim,
                norm_eps=config.norm_eps,
                attention_bias=config.attention_bias,
                activation=config.activation,
                gated=gated,
            )
            block.init_weights(config.n_layers + config.n_global_layers)
            blocks.append(block)
        return blocks

    @torch.no_grad()
    def init_tile_positions(self) -> None:
        """Sets the positions that know the tile to the ViT's own, stretched over the whole canvas of max_tiles x
        max_tiles tiles, as the release did."""
        tiles, side = self.max_tiles, math.isqrt(self.config.tokens - 1)
        whole = resize_grid(self.position_embedding[1:], tiles * side)
        whole = whole.view(tiles, side, tiles, side, -1).transpose(1, 2).flatten(2, 3)
        table = torch.cat([self.position_embedding[0].expand(tiles, tiles, 1, -1), whole], dim=2)
        if self.config.tile_tables == "arrangement":
            table = by_arrangement(table)
        self.tile_position_embedding.copy_(table)

    def forward(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.padding == "released":
            return self._forward_released(tiles, n_tiles, grid)
        packed = PackedTiles(n_tiles, tiles.shape[1])
        where = self._where(packed, grid)
        x = self._embed(self.normalise(packed.pack(tiles)), where)
        features = self._encode(x, where, self.sequences(self._groups(packed)))
        return packed.unpack(features), packed.token_mask(self.config.tokens)

    def pooled(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> Tensor:
        """The class token, or the mean of the patch tokens, after the local layers and their norm, averaged over
        the tiles of an image; global layers and taps have no part in it. Padding is always "clean" here: the
        released mode concerns an encoder under an adapter."""
        packed = PackedTiles(n_tiles, tiles.shape[1])
        x = self._embed(self.normalise(packed.pack(tiles)), self._where(packed, grid))
        shape, x = x.shape, x.flatten(0, 1)
        sequences = Sequences(self._groups(packed))
        for layer in self.layers:
            x = layer(x, sequences)
        if self.config.pooling == "class":
            return packed.mean(self.norm(x.view(shape)[:, 0]))
        return packed.mean(self.norm(x).view(shape)[:, 1:].mean(1))

    def _where(self, packed: PackedTiles, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries of the tables of tiles are those of each packed tile."""
        return self._entries(packed.tile, grid[packed.image])

    def _entries(self, tile: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tables have the embedding of a tile: of tile numbers (...) and grids (..., 2)."""
        rows, columns = grid.unbind(-1)
        if self.config.tile_tables == "place":
            return tile // columns, tile % columns
        return canvas_numbers(rows, columns, self.max_tiles), tile

    def sequences(self, groups: Groups, mask: Tensor | None = None) -> Sequences:
        """What `forward` runs of its tokens, as in `Sequences`."""
        return Sequences(groups, mask)

    def _groups(self, packed: PackedTiles) -> Groups:
        return [(n, t * self.config.tokens) for n, t in packed.groups]

    def _embed(self, tiles: Tensor, where: tuple[Tensor, Tensor], real: Tensor | float = 1.0) -> Tensor:
        """(V, 3, s, s) to (V, L, D). Tile embeddings and positions are scaled by `real`, (V, 1, 1)."""
        p = self.config.patch_size
        V, _, height, width = tiles.shape
        if height != self.image_size or width != self.image_size:
            raise ValueError(f"tiles of {width} x {height} pixels; the encoder takes {self.image_size} squared")
        patches = tiles.view(V, 3, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(V, -1, 3 * p * p).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(self.patch_norm(patches))
        tiled = self.max_tiles > 1
        if tiled:
            x = x + real * self.pre_tile_gate.tanh() * self.pre_tile_embedding[where]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(V, 1, -1), x], dim=1)
        if tiled:
            gate = self.position_gate.tanh()
            x = x + (1 - gate) * self.position_embedding + real * gate * self.tile_position_embedding[where]
        else:
            x = x + self.position_embedding
        return self.input_norm(x)

    def _encode(
        self, x: Tensor, where: tuple[Tensor, Tensor], sequences: Sequences, real: Tensor | float = 1.0
    ) -> Tensor:
        """All layers: (V, L, D) to (V, L, width). The saved states come interleaved, channel c of tap j at
        D + c * len(taps) + j, as the weights of the release expect."""
        shape, x = x.shape, sequences.own(x.flatten(0, 1))
        saved = []
        for i, layer in enumerate(self.layers):
            if i in self.config.taps:
                saved.append(x)
            x = layer(x, sequences)
        x = self.norm(x)
        if self.max_tiles > 1:
            embedding = real * self.post_tile_gate.tanh() * self.post_tile_embedding[where]
            x = x + sequences.own(embedding.expand(shape).flatten(0, 1))
        for layer in self.global_layers:
            x = layer(x, sequences)
        if saved:
            x = torch.cat([x, torch.stack(saved, dim=-1).flatten(1).to(x.dtype)], dim=-1)
        return sequences.whole(x).view(*shape[:2], -1)

    def _forward_released(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """All images padded to `max_tiles` and tiles to a multiple of 8 tokens, at least one more than there
        are; padded tiles are all zeros after normalisation, and have embeddings only where a table gives them some:
        that by arrangement has entries for them, zeros as released."""
        N, T = tiles.shape[:2]
        if self.max_tiles < T:
            raise ValueError(f"{T} tiles, but max_tiles is {self.max_tiles}")
        L, total = self.config.tokens, self.max_tiles
        real = torch.arange(total, device=tiles.device) < n_tiles[:, None]
        pixels = self.normalise(tiles)
        if tiles.dtype == torch.uint8:
            pixels = pixels * real[:, :T, None, None, None]
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, total - T)).flatten(0, 1)
        tile = torch.arange(total, device=tiles.device).repeat(N)
        where = self._entries(tile, grid.repeat_interleave(total, dim=0))
        scale: Tensor | float = 1.0
        if self.config.tile_tables == "place":
            scale = real.flatten()[:, None, None].to(self.class_embedding.dtype)

        x = F.pad(self._embed(pixels, where, scale), (0, 0, 0, 8 - L % 8))
        padding = ~F.pad(real[..., None].expand(N, total, L), (0, 8 - L % 8), value=False).flatten(1)
        mask = ~(padding[:, None, :, None] & padding[:, None, None, :])
        features = self._encode(x, where, self.sequences([(N, padding.shape[1])], mask), scale)
        features = features.view(N, total, -1, self.width)[:, :T, :L]
        return features, real[:, :T].repeat_interleave(L, dim=1)

    def flops_per_image(self, n_tiles: int = 1) -> int:
        """Floating-point operations of `forward` for one image; a training step takes three times as many."""
        config = self.config
        S = n_tiles * config.tokens
        linear = 4 * config.dim**2 + 2 * config.dim * config.ffn_dim
        block = 2 * S * linear + 4 * S * S * config.dim
        patches = 2 * S * 3 * config.patch_size**2 * config.dim
        return (config.n_layers + config.n_global_layers) * block + patches


def by_arrangement(table: Tensor) -> Tensor:
    """A table of tiles by place (max_tiles, max_tiles, L, D) as one by arrangement (see `VisionConfig.tile_tables`),
    (1 + canvases, max_tiles, L, D): zeros where a canvas has no tile, and for number 0, which is no canvas."""
    tiles = len(table)
    expanded = table.new_zeros(1 + len(canvases(tiles)), *table.shape[1:])
    for number, (rows, columns) in enumerate(canvases(tiles), start=1):
        expanded[number, : rows * columns] = table[:rows, :columns].flatten(0, 1)
    return expanded


def resize_grid(table: Tensor, side: int) -> Tensor:
    """A table of square positions (g * g, D), row by row, to (side * side, D): bilinear with aligned corners,
    as the release resizes its tables."""
    old = math.isqrt(table.shape[0])
    grid = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)
    return grid.flatten(2).squeeze(0).T.to(table.dtype)
