"""Image encoders by name, ours, those of timm and open_clip, or anyone's; and their weights into ours."""

from __future__ import annotations

import inspect
import math
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...text.model_directory import dataclass_from_dict
from ..encoder import VisionConfig, VisionTransformer, preset, resize_grid
from ..packed import Encoder, PackedTiles

GROUP = "herdkit.encoders"


class InterchangeError(ValueError):
    """Weights that do not fit; the message names every missing, surplus or ill-shaped tensor."""


def build_encoder(spec: Mapping[str, Any]) -> Encoder:
    """The encoder that a recipe or `config.json` describes, with new weights.

    Args:
        spec: `type` and its options. {"type": "herdkit", "preset": "tiny"} and/or the fields of `VisionConfig`;
            {"type": "timm" | "open_clip", "model": name} and the fields of `ForeignConfig`; or a name that a
            package declares in the entry-point group `herdkit.encoders` for a callable that takes the options.

    Raises:
        ValueError: no or an unknown type, or an unknown option.
    """
    options = dict(spec)
    kind = options.pop("type", None)
    if kind == "herdkit":
        if "preset" not in options:
            return VisionTransformer(dataclass_from_dict(VisionConfig, options, "encoder."))
        base = preset(options.pop("preset"))
        values = {f.name: getattr(base, f.name) for f in fields(base)}
        return VisionTransformer(dataclass_from_dict(VisionConfig, values | options, "encoder."))
    if kind in FOREIGN:
        return FOREIGN[kind](dataclass_from_dict(ForeignConfig, options, "encoder."))
    points = list(entry_points(group=GROUP, name=kind)) if kind else []
    if not points:
        known = sorted({"herdkit", *FOREIGN, *(point.name for point in entry_points(group=GROUP))})
        raise ValueError(f"encoder.type is {kind!r}; there are {', '.join(known)}")
    encoder = points[0].load()(**options)
    if not isinstance(encoder, Encoder):
        raise ValueError(f"the entry point {kind!r} of {GROUP} made {type(encoder).__name__}, which is no Encoder")
    return encoder


@dataclass(kw_only=True)
class ForeignConfig:
    """A vision tower of another library.

    Args:
        model: its name there.
        image_size: tile side in pixels; None for the tower's own.
        taps: the state before each of these blocks, ascending from 1, is part of the features.
        max_tiles: tiles of an image at most. The tower sees each tile alone.
        options: further arguments of the library's `create_model`.
    """

    model: str
    image_size: int | None = None
    taps: tuple[int, ...] = ()
    max_tiles: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if list(self.taps) != sorted(set(self.taps)) or any(tap < 1 for tap in self.taps):
            raise ValueError(f"taps must ascend without repeats from 1 (outputs of block 0), not {self.taps}")


class ForeignEncoder(Encoder):
    """A tower of another library under the interface of ours; features interleaved as ours are."""

    def __init__(self, config: ForeignConfig):
        super().__init__()
        self.config = config
        self.max_tiles = config.max_tiles

    @abstractmethod
    def states(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(V, 3, s, s) to the final tokens after the tower's norm and the tapped states, each (V, L, D)."""

    @abstractmethod
    def pool(self, pixels: Tensor) -> Tensor:
        """(V, 3, s, s) to the tower's own pooled vectors (V, pooled_width)."""

    def forward(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        packed = PackedTiles(n_tiles, tiles.shape[1])
        features, saved = self.states(self.normalise(packed.pack(tiles)))
        if saved:
            features = torch.cat([features, torch.stack(saved, dim=-1).flatten(-2).to(features.dtype)], dim=-1)
        return packed.unpack(features), packed.token_mask(features.shape[1])

    def pooled(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> Tensor:
        packed = PackedTiles(n_tiles, tiles.shape[1])
        return packed.mean(self.pool(self.normalise(packed.pack(tiles))))


class TimmEncoder(ForeignEncoder):
    """A vision transformer of timm, or any of its models that gives tokens and has `forward_intermediates`."""

    def __init__(self, config: ForeignConfig, model: nn.Module | None = None):
        """`model`: one that is built already, in place of a new one of the name in `config`."""
        super().__init__(config)
        from timm import create_model  # seconds to import, and most models need none of it
        from timm.data.config import resolve_model_data_config

        if model is None:
            size = {} if config.image_size is None else {"img_size": config.image_size}
            model = create_model(config.model, num_classes=0, **size, **config.options)
        self.model: Any = model
        intermediates = getattr(model, "forward_intermediates", None)
        if config.taps and (
            intermediates is None or "return_prefix_tokens" not in inspect.signature(intermediates).parameters
        ):
            raise ValueError(f"{config.model!r} has no one row of tokens from block to block; leave its taps out")
        data = resolve_model_data_config(model)
        self.mean, self.std = data["mean"], data["std"]
        self.image_size = config.image_size or data["input_size"][-1]
        self.width = self.model.num_features * (1 + len(config.taps))
        self.pooled_width = self.model.num_features

    def states(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.config.taps:
            return self._tokens(self.model.forward_features(pixels)), []
        final, found = self.model.forward_intermediates(
            pixels,
            indices=[tap - 1 for tap in self.config.taps],
            norm=False,
            output_fmt="NLC",
            return_prefix_tokens=True,
        )
        saved = [torch.cat(pair[::-1], dim=1) if isinstance(pair, tuple) else pair for pair in found]
        return final, saved

    def _tokens(self, features: Tensor) -> Tensor:
        """What a tower gives, tokens or a map, as tokens (V, L, D)."""
        if features.dim() == 4:
            in_front = getattr(self.model, "output_fmt", "NCHW") in ("NCHW", None)
            features = features.flatten(2).transpose(1, 2) if in_front else features.flatten(1, 2)
        if features.dim() != 3:
            name = self.config.model
            raise ValueError(f"{name!r} gives features of shape {tuple(features.shape)}, neither tokens nor a map")
        return features

    def pool(self, pixels: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)


class OpenClipEncoder(ForeignEncoder):
    """The vision transformer of an open_clip model."""

    def __init__(self, config: ForeignConfig):
        super().__init__(config)
        from open_clip import create_model
        from open_clip.transformer import VisionTransformer as OpenClipTransformer

        size = {} if config.image_size is None else {"force_image_size": config.image_size}
        clip = create_model(config.model, pretrained=None, pretrained_hf=False, **size, **config.options)
        if not isinstance(clip.visual, OpenClipTransformer):
            raise ValueError(
                f"the vision tower of open_clip's {config.model!r} is a {type(clip.visual).__name__}; only its own "
                "vision transformers can be encoders (timm's are there as type 'timm')"
            )
        self.visual: Any = clip.visual
        cfg: Any = self.visual.preprocess_cfg
        self.mean, self.std = cfg["mean"], cfg["std"]
        size = self.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.width = self.visual.transformer.width * (1 + len(config.taps))
        self.pooled_width = self.visual.output_dim

    def states(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = self.visual.forward_intermediates(
            pixels,
            indices=[*(tap - 1 for tap in self.config.taps), self.visual.transformer.layers - 1],
            output_fmt="NLC",
            output_extra_tokens=True,
            intermediates_only=True,
        )
        pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
        *saved, last = (torch.cat(pair, dim=1) for pair in pairs)
        return self.visual.ln_post(last), saved

    def pool(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)


FOREIGN: dict[str, type[ForeignEncoder]] = {"timm": TimmEncoder, "open_clip": OpenClipEncoder}


Source = str | os.PathLike | nn.Module | Mapping[str, Tensor]

NAMES = {
    "timm": {
        r"cls_token": "class_embedding",
        r"pos_embed": "position_embedding",
        r"patch_embed\.proj": "patch_embedding",
        r"norm_pre": "input_norm",
        r"norm": "norm",
        r"blocks\.(\d+)\.norm1": r"layers.\1.attention_norm",
        r"blocks\.(\d+)\.attn\.qkv": r"layers.\1.attention.qkv",
        r"blocks\.(\d+)\.attn\.proj": r"layers.\1.attention.out",
        r"blocks\.(\d+)\.norm2": r"layers.\1.mlp_norm",
        r"blocks\.(\d+)\.mlp\.(fc[12])": r"layers.\1.mlp.\2",
    },
    "open_clip": {
        r"class_embedding": "class_embedding",
        r"positional_embedding": "position_embedding",
        r"conv1": "patch_embedding",
        r"ln_pre": "input_norm",
        r"ln_post": "norm",
        r"transformer\.resblocks\.(\d+)\.ln_1": r"layers.\1.attention_norm",
        r"transformer\.resblocks\.(\d+)\.attn\.in_proj": r"layers.\1.attention.qkv",
        r"transformer\.resblocks\.(\d+)\.attn\.out_proj": r"layers.\1.attention.out",
        r"transformer\.resblocks\.(\d+)\.ln_2": r"layers.\1.mlp_norm",
        r"transformer\.resblocks\.(\d+)\.mlp\.c_fc": r"layers.\1.mlp.fc1",
        r"transformer\.resblocks\.(\d+)\.mlp\.c_proj": r"layers.\1.mlp.fc2",
    },
}


def load_timm(encoder: VisionTransformer, source: Source) -> None:
    """Loads a plain vision transformer of timm (class token, learned positions, no layer scale) into ours; its
    classifier is left out. Ours usually needs attention_bias and patch_bias, no input_norm and norm_eps 1e-6.

    Raises:
        InterchangeError: the architectures differ.
    """
    _load_foreign(encoder, source, "timm", dropped=r"head\..*")


def load_open_clip(encoder: VisionTransformer, source: Source) -> None:
    """Loads the vision transformer of an open_clip model, of the whole model's state or of its `visual` alone,
    into ours; its projection is left out. Ours needs attention_bias.

    Raises:
        InterchangeError: the architectures differ.
    """
    state = read_state(source)
    visual = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    _load_foreign(encoder, visual or state, "open_clip", dropped="proj")


def _load_foreign(encoder: VisionTransformer, source: Source, library: str, dropped: str) -> None:
    shapes = {
        "class_embedding": Tensor.flatten,
        "patch_embedding.weight": lambda weight: weight.flatten(1),
        "position_embedding": lambda table: table.flatten(0, -2),
    }
    state, unknown = {}, []
    for name, tensor in read_state(source).items():
        ours = _renamed(name, NAMES[library])
        if ours:
            state[ours] = shapes.get(ours, Tensor.contiguous)(tensor)
        elif not re.fullmatch(dropped, name):
            unknown.append(name)
    if unknown:
        raise InterchangeError(f"the {library} tower has tensors that a plain ViT has not: {', '.join(unknown)}")
    load_vision_state(encoder, state)


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Our name for a foreign parameter; its ending is weight, bias, or part of the stem."""
    stem, ending = re.sub(r"[._](weight|bias)$", "", name), re.search(r"(weight|bias)$", name)
    for pattern, ours in table.items():
        if re.fullmatch(pattern, stem):
            return re.sub(pattern, ours, stem) + (f".{ending[0]}" if ending else "")
    return None


def load_vision_state(encoder: VisionTransformer, source: Source) -> None:
    """Loads the weights of one of our encoders into another that may have more: other tile sizes (positions are
    resized), tiles and global layers (which keep their initial values; the positions that know the tile are made
    anew from the plain ones). This is the step from contrastive pre-training to the adapter, and from one tile
    size to the next.

    Raises:
        InterchangeError: the architectures differ otherwise.
    """
    state, expected = dict(read_state(source)), encoder.state_dict()
    side = math.isqrt(encoder.config.tokens - 1)
    for name in ("position_embedding", "tile_position_embedding"):
        if name in state and name in expected:
            state[name] = _resize_positions(state[name], side)
    added = ("tile_position_", "position_gate", "pre_tile_", "post_tile_", "global_layers.")
    missing = [name for name in expected if name not in state and not name.startswith(added)]
    faults = [f"missing {name}" for name in missing]
    faults += [f"surplus {name}" for name in state if name not in expected]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if faults:
        raise InterchangeError("the weights do not fit the encoder: " + "; ".join(faults))
    encoder.load_state_dict(state, strict=False)
    if "tile_position_embedding" in expected and "tile_position_embedding" not in state:
        encoder.init_tile_positions()


def _resize_positions(table: Tensor, side: int) -> Tensor:
    """(..., 1 + g * g, D) to (..., 1 + side * side, D), the class token's row kept apart; others as they are."""
    count = table.shape[-2] - 1
    if count == side * side or math.isqrt(count) ** 2 != count:
        return table
    rows: Sequence[Tensor] = table.reshape(-1, *table.shape[-2:]).unbind()
    resized = [torch.cat([row[:1], resize_grid(row[1:], side)]) for row in rows]
    return torch.stack(resized).view(*table.shape[:-2], 1 + side * side, table.shape[-1])


def read_state(source: Source) -> Mapping[str, Tensor]:
    """Tensors by name from a module, a state dict, or a file: safetensors, or a PyTorch file that holds nothing
    but tensors (`state_dict` in it is looked into).

    Raises:
        InterchangeError: no such file.
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        raise InterchangeError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)
