"""Llama 3.2 Vision in Meta's original layout, in and out: `params.json`, `consolidated.pth` or one file for each rank
of model parallelism, `tokenizer.model`.

`params.json` gives the language model, the tile's size and the number of cross-attention layers. All other sizes of the
encoder are constants of Meta's code; here they are read from the tensors. What those do not say either is in two keys
that Meta's files have not, `vision_num_heads` and `vision_taps`, where it differs from the release.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...adapters.compose import ComposedModel, compose
from ...text.interchange.meta import PARAMS, config_from_meta, config_to_meta, shard_region
from ...text.interchange.tensor_files import (
    ModelDirectoryError,
    Piece,
    StoredTensors,
    integer,
    open_tensors,
    read_json,
    write_json,
)
from ...text.model import Transformer, TransformerConfig
from ...text.tokenizer import Tokenizer
from ...train.files import sync
from ..encoder import CLIP_MEAN, CLIP_STD, VisionConfig
from ..image_adapter import ImageAdapter, ImageAdapterConfig, placement
from .released_model import ReleasedLayout, parts_of
from .tile_tables import TABLES, by_place

HEADS, TAPS = 16, (3, 7, 15, 23, 30)
EXTRA = "text_model.learnable_embedding.weight"
"""Rows for new tokens, of which the first is the image's; eight, or one for each file."""

_VISION = "vision_model.vision_encoder."
_NAMES = {
    "class_embedding": "class_embedding",
    "patch_embedding.weight": "conv1._linear.weight",
    "position_embedding": "positional_embedding",
    "position_gate": "gated_positional_embedding_gate",
    "tile_position_embedding": "gated_positional_embedding",
    "pre_tile_embedding": "pre_tile_pos_embed.embedding",
    "pre_tile_gate": "pre_tile_pos_embed.gate",
    "post_tile_embedding": "post_tile_pos_embed.embedding",
    "post_tile_gate": "post_tile_pos_embed.gate",
    "input_norm.weight": "ln_pre.weight",
    "input_norm.bias": "ln_pre.bias",
    "norm.weight": "ln_post.weight",
    "norm.bias": "ln_post.bias",
}
_BLOCK = {
    "attention_norm": "ln_1",
    "attention.out": "attn.wo",
    "mlp_norm": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "gate_attention": "gate_attn",
    "gate_mlp": "gate_ffn",
}
# Along which dimension the files share a tensor of the encoder or the projection; all others they all have whole.
_SHARED = {"attention.out.weight": 1, "mlp.fc1.weight": 0, "mlp.fc1.bias": 0, "mlp.fc2.weight": 1}


@dataclass(frozen=True)
class Match:
    """A tensor in the file of one rank, and the region of our parameter that it is."""

    stored: str
    target: str
    region: tuple[slice, ...] = ()


def matches(model: ComposedModel, rank: int, ranks: int) -> Iterator[Match]:
    """Every tensor of one file but `EXTRA`.

    Raises:
        ValueError: a parameter cannot be split into so many.
    """
    text, (adapter, encoder) = model.text.config, parts_of(model)
    for name in model.text.state_dict():
        yield Match(f"text_model.{name}", f"text.{name}", shard_region(text, name, rank, ranks))
    for i, (place, layer) in enumerate(adapter.cross_attention.items()):
        for name in layer.state_dict():
            target, stored = f"image.cross_attention.{place}.{name}", f"text_model.cross_attention_layers.{i}.{name}"
            yield Match(stored, target, shard_region(text, name, rank, ranks))
    for end in ("weight", "bias"):
        target = f"image.projection.{end}"
        yield Match(f"vision_model.vision_projection.{end}", target, _share(text.dim, rank, ranks, 0, target))
    dim = encoder.config.dim
    for ours, theirs in _NAMES.items():
        region = _share(dim, rank, ranks, 0, ours) if ours == "patch_embedding.weight" else ()
        yield Match(_VISION + theirs, f"image.encoder.{ours}", region)
    for stack, theirs in (("layers", "transformer"), ("global_layers", "global_transformer")):
        for name, tensor in getattr(encoder, stack).state_dict().items():
            number, _, part = name.partition(".")
            prefix, target = f"{_VISION}{theirs}.resblocks.{number}.", f"image.encoder.{stack}.{name}"
            if part == "attention.qkv.weight":
                if encoder.config.n_heads % ranks:
                    heads = encoder.config.n_heads
                    raise ValueError(f"model_parallel {ranks} does not divide the {heads} heads of {target}")
                for i, letter in enumerate("qkv"):
                    (share,) = _share(dim, rank, ranks, 0, target)
                    rows = slice(i * dim + share.start, i * dim + share.stop)
                    yield Match(f"{prefix}attn.w{letter}.weight", target, (rows,))
                continue
            stem = next(stem for stem in sorted(_BLOCK, key=len, reverse=True) if part.startswith(stem))
            axis = _SHARED.get(part)
            region = () if axis is None else _share(tensor.shape[axis], rank, ranks, axis, target)
            yield Match(prefix + _BLOCK[stem] + part.removeprefix(stem), target, region)


def _share(size: int, rank: int, ranks: int, axis: int, name: str) -> tuple[slice, ...]:
    if size % ranks:
        raise ValueError(f"model_parallel {ranks} does not divide {name}: it has {size} parts")
    width = size // ranks
    return (*[slice(None)] * axis, slice(rank * width, (rank + 1) * width))


class MetaVision(ReleasedLayout):
    """The layout "meta.vision"."""

    def build(self, path: Path) -> ComposedModel:
        params, files = read_json(path / PARAMS), weight_files(path)
        try:
            text, adapter = configs_from_meta(params, files)
            with torch.device("meta"):
                model = compose(Transformer(text), image=ImageAdapter(adapter, text))
        except ValueError as error:
            raise ModelDirectoryError(f"{path / PARAMS}: {error}") from error
        try:
            model.tokenizer = Tokenizer.load(path)
        except FileNotFoundError:
            return model
        except ValueError as error:
            raise ModelDirectoryError(str(error)) from error
        if model.tokenizer.vocab_size > text.vocab_size:
            sizes = f"{model.tokenizer.vocab_size} tokens, the model's vocabulary {text.vocab_size}"
            raise ModelDirectoryError(f"{path}: the tokenizer has {sizes}")
        return model

    def stored(self, path: Path) -> tuple[ComposedModel, StoredTensors]:
        model, files = self.build(path), weight_files(path)
        ranks = len(files)
        pieces = {}
        try:
            for rank, file in enumerate(files):
                found = matches(model, rank, ranks)
                pieces[file] = [Piece(match.stored, match.target, match.region) for match in found]
        except ValueError as error:
            raise ModelDirectoryError(f"{path}: {error}") from error
        rows = max(8, ranks) // ranks, model.text.config.dim
        first = Piece(EXTRA, "image.placeholder_embedding", (), lambda stored: stored[0], shape=rows)
        pieces[files[0]].append(first)
        return model, StoredTensors(pieces, model.state_dict(), ["text_model.rope.freqs", EXTRA])

    def refusal(self, model: ComposedModel) -> str | None:
        if found := super().refusal(model):
            return found
        (adapter, encoder), text = parts_of(model), model.text.config
        if adapter.config.places(text.n_layers) != placement(text.n_layers, adapter.config.n_cross_layers):
            return "the cross-attention layers must be where `placement` puts them"
        if encoder.config.activation != "gelu":
            return f"encoder.activation must be 'gelu', not {encoder.config.activation!r}"
        if (tuple(encoder.mean), tuple(encoder.std)) != (CLIP_MEAN, CLIP_STD):
            return "the encoder's mean and std must be CLIP's, which Meta's code has built in"
        by_number = encoder.config.tile_tables == "arrangement"
        if by_number and any(by_place(getattr(encoder, name).detach()) is None for name in TABLES):
            return "the encoder's tables of tiles differ from arrangement to arrangement"
        return None

    def save(
        self, model: ComposedModel, path: Path, *, max_shard_bytes: int = 5_000_000_000, model_parallel: int = 1
    ) -> None:
        if not 1 <= model_parallel <= 100:
            raise ValueError(f"model_parallel must be between 1 and 100, not {model_parallel}")
        params = params_of(model)
        params["n_kv_heads"] = max(params["n_kv_heads"], model_parallel)
        write_json(path / PARAMS, params)
        state = model.state_dict()
        if parts_of(model)[1].config.tile_tables == "arrangement":
            for name in TABLES:
                table = by_place(state[f"image.encoder.{name}"])
                assert table is not None
                state[f"image.encoder.{name}"] = table
        extra = state["text.tok_embeddings.weight"].new_zeros(max(8, model_parallel), model.text.config.dim)
        extra[0] = state["image.placeholder_embedding"]
        for rank, part in enumerate(extra.chunk(model_parallel)):
            shard = {EXTRA: part.clone()}
            for match in matches(model, rank, model_parallel):
                # Clones: a view would drag the whole tensor into the file.
                shard[match.stored] = state[match.target].detach()[match.region].cpu().clone()
            file = path / (f"consolidated.{rank:02}.pth" if model_parallel > 1 else "consolidated.pth")
            torch.save(shard, file)
            sync(file)
        if model.tokenizer is not None:
            model.tokenizer.save(path / "tokenizer.model")


def weight_files(path: Path) -> list[Path]:
    """The files of the ranks in order.

    Raises:
        ModelDirectoryError: there are none, or one of the row is not there.
    """
    if (path / "consolidated.pth").is_file():
        return [path / "consolidated.pth"]
    files = sorted(path.glob("consolidated.*.pth"))
    if not files or files != [path / f"consolidated.{i:02}.pth" for i in range(len(files))]:
        found = [file.name for file in files]
        raise ModelDirectoryError(f"{path}: expected consolidated.pth or consolidated.00.pth and so on, found {found}")
    return files


def configs_from_meta(params: dict[str, Any], files: list[Path]) -> tuple[TransformerConfig, ImageAdapterConfig]:
    """Our configs from the content of `params.json` and the shapes in the files.

    Raises:
        ValueError: a key or a tensor is missing or has no place here.
    """
    with open_tensors(files[0]) as opened:
        shapes = {name: opened.kind(name)[0] for name in opened.names()}
    try:
        rows = shapes["text_model.tok_embeddings.weight"][0] * len(files)
        text = config_from_meta(params, vocab_size=rows, tie_embeddings=False)
        tiles, _, tokens, dim = shapes[f"{_VISION}gated_positional_embedding"]
        count = {
            stack: len({name.split(".")[4] for name in shapes if name.startswith(f"{_VISION}{stack}.resblocks.")})
            for stack in ("transformer", "global_transformer")
        }
        encoder = VisionConfig(
            image_size=integer(params, "vision_chunk_size"),
            patch_size=math.isqrt(shapes[f"{_VISION}conv1._linear.weight"][1] // 3),
            dim=dim,
            n_layers=count["transformer"],
            n_heads=integer(params, "vision_num_heads", HEADS),
            ffn_dim=shapes[f"{_VISION}transformer.resblocks.0.mlp.c_fc.weight"][0] * len(files),
            n_global_layers=count["global_transformer"],
            taps=tuple(params.get("vision_taps", TAPS)),
            max_tiles=tiles,
            padding="released",
        )
        n_cross_layers = integer(params, "vision_num_cross_attention_layers")
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    if encoder.tokens != tokens:
        raise ValueError(
            f"vision_chunk_size {encoder.image_size} gives {encoder.tokens} tokens, the tables are for {tokens}"
        )
    if integer(params, "vision_max_num_chunks", tiles) != tiles:
        raise ValueError(f"vision_max_num_chunks is {params['vision_max_num_chunks']}, the tables are for {tiles}")
    return text, ImageAdapterConfig(encoder={"type": "herdkit", **asdict(encoder)}, n_cross_layers=n_cross_layers)


def params_of(model: ComposedModel) -> dict[str, Any]:
    """The content of `params.json`."""
    adapter, encoder = parts_of(model)
    params = config_to_meta(model.text.config) | {
        "vision_chunk_size": encoder.image_size,
        "vision_max_num_chunks": encoder.max_tiles,
        "vision_num_cross_attention_layers": adapter.config.n_cross_layers,
    }
    if encoder.config.n_heads != HEADS:
        params["vision_num_heads"] = encoder.config.n_heads
    if encoder.config.taps != TAPS:
        params["vision_taps"] = list(encoder.config.taps)
    return params
