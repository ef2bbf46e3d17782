"""Llama 3.2 Vision in Hugging Face's layout (model type "mllama"), in and out.

There, cross-attention layers count among the language model's, the embedding has eight rows more than the output, of
which one is the image's, and tables of tiles are written out for every arrangement (`tile_tables: arrangement`); where
all of them agree, as in the released weights, they become ours by place.

What transformers does otherwise than Meta's code, and so than this (found in 5.23.0, see the tests):

- `intermediate_layers_indices` are read as the states after those blocks, where the released weights were trained on
  the states before them. Here, as in vLLM, they are before.
- In text before the first image, the attention branch of its cross-attention layers is not masked, so that text
  sees images that come after it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.compose import ComposedModel, compose
from ...text.chat_template import chat_template
from ...text.interchange.huggingface import (
    files_by_name,
    hf_name,
    rotated_heads,
    save_tokenizer,
    split_sizes,
    to_halves,
    to_pairs,
    write_index,
)
from ...text.interchange.tensor_files import (
    ModelDirectoryError,
    Piece,
    StoredTensors,
    read_json,
    save_tensors,
    write_json,
)
from ...text.model import Transformer, TransformerConfig
from ...text.tokenizer import SPECIAL_TOKENS, Tokenizer
from ..encoder import by_arrangement
from ..image_adapter import ImageAdapter
from ..tiles import canvases
from .huggingface_config import (
    configs_from_hf,
    configs_to_hf,
    image_token_of,
    preprocessing_to_hf,
    read_preprocessing,
)
from .released_model import ReleasedLayout, parts_of
from .tile_tables import TABLES

EXTRA_ROWS = 8
"""Rows of the embedding beyond the vocabulary."""

IMAGE_TOKEN = "<|image|>"

_CROSS = {
    "attention.wq.weight": "cross_attn.q_proj.weight",
    "attention.wk.weight": "cross_attn.k_proj.weight",
    "attention.wv.weight": "cross_attn.v_proj.weight",
    "attention.wo.weight": "cross_attn.o_proj.weight",
    "attention.q_norm.weight": "cross_attn.q_norm.weight",
    "attention.k_norm.weight": "cross_attn.k_norm.weight",
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_ENCODER = {
    "class_embedding": "class_embedding",
    "patch_embedding.weight": "patch_embedding.weight",
    "position_embedding": "gated_positional_embedding.embedding",
    "position_gate": "gated_positional_embedding.gate",
    "tile_position_embedding": "gated_positional_embedding.tile_embedding.weight",
    "pre_tile_embedding": "pre_tile_positional_embedding.embedding.weight",
    "pre_tile_gate": "pre_tile_positional_embedding.gate",
    "post_tile_embedding": "post_tile_positional_embedding.embedding.weight",
    "post_tile_gate": "post_tile_positional_embedding.gate",
    "input_norm.weight": "layernorm_pre.weight",
    "input_norm.bias": "layernorm_pre.bias",
    "norm.weight": "layernorm_post.weight",
    "norm.bias": "layernorm_post.bias",
}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "gate_attention": "gate_attn",
    "gate_mlp": "gate_ffn",
}
# transformers from 4.52 on has other names in memory; some tools write them to files.
_LATER_NAMES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@dataclass(frozen=True)
class Match:
    """A tensor there and what holds it here.

    Args:
        stored: its name in the files.
        target: name of our parameter; rows: the part of it, None for the whole.
        heads: of rotated rows, whose order differs; 0 for none.
        shape: in the files, where that differs and only the shape does.
    """

    stored: str
    target: str
    rows: slice | None = None
    heads: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def region(self) -> tuple[slice, ...]:
        return () if self.rows is None else (self.rows,)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        if self.heads:
            return to_halves(tensor, self.heads)
        return tensor if self.shape is None else tensor.reshape(self.shape)


def matches(model: ComposedModel) -> Iterator[Match]:
    """Every tensor but the embedding of tokens, in the order of the layers; the encoder's tables are by arrangement."""
    text, (adapter, encoder) = model.text.config, parts_of(model)
    places = adapter.config.places(text.n_layers)
    for name in model.text.state_dict():
        if name == "tok_embeddings.weight":
            continue
        theirs = hf_name(name)
        if name.startswith("layers."):
            number = int(name.split(".")[1])
            theirs = hf_name(name.replace(f".{number}.", f".{number + sum(place <= number for place in places)}.", 1))
        yield Match(f"language_model.{theirs}", f"text.{name}", heads=rotated_heads(text, name))
    for index, place in enumerate(places):
        for ours, theirs in _CROSS.items():
            stored = f"language_model.model.layers.{place + index}.{theirs}"
            yield Match(stored, f"image.cross_attention.{place}.{ours}")
    for end in ("weight", "bias"):
        yield Match(f"multi_modal_projector.{end}", f"image.projection.{end}")
    config = encoder.config
    rows = 1 + len(canvases(config.max_tiles))
    shapes: dict[str, tuple[int, ...]] = {
        "pre_tile_embedding": (rows, config.max_tiles * config.dim),
        "post_tile_embedding": (rows, config.max_tiles * config.dim),
        "tile_position_embedding": (rows, config.max_tiles * config.tokens * config.dim),
        "patch_embedding.weight": (config.dim, 3, config.patch_size, config.patch_size),
    }
    for ours, theirs in _ENCODER.items():
        yield Match(f"vision_model.{theirs}", f"image.encoder.{ours}", shape=shapes.get(ours))
    for ours, theirs in (("layers", "transformer"), ("global_layers", "global_transformer")):
        for name in getattr(encoder, ours).state_dict():
            number, _, part = name.partition(".")
            stem, dot, end = part.rpartition(".") if part.endswith(("weight", "bias")) else (part, "", "")
            prefix, target = f"vision_model.{theirs}.layers.{number}.", f"image.encoder.{ours}.{name}"
            if stem == "attention.qkv":
                for i, letter in enumerate("qkv"):
                    region = slice(i * config.dim, (i + 1) * config.dim)
                    yield Match(f"{prefix}self_attn.{letter}_proj.{end}", target, region)
            else:
                yield Match(prefix + _BLOCK[stem] + dot + end, target)


class HuggingFaceVision(ReleasedLayout):
    """The layout "huggingface.mllama"."""

    def build(self, path: Path) -> ComposedModel:
        content = read_json(path / "config.json")
        try:
            text, adapter = configs_from_hf(content, read_preprocessing(path))
            with torch.device("meta"):
                model = compose(Transformer(text), image=ImageAdapter(adapter, text))
        except ValueError as error:
            raise ModelDirectoryError(f"{path / 'config.json'}: {error}") from error
        model.tokenizer = load_tokenizer(path, content, text)
        return model

    def stored(self, path: Path) -> tuple[ComposedModel, StoredTensors]:
        model = self.build(path)
        files = files_by_name(path)
        later = "lm_head.weight" in files
        pieces: dict[Path, list[Piece]] = {file: [] for file in files.values()}
        faults = []
        for piece in [*_embedding(model, image_token_of(read_json(path / "config.json"))), *_pieces(model)]:
            name = _later_name(piece.name) if later else piece.name
            if name in files:
                pieces[files[name]].append(dataclasses.replace(piece, name=name))
            elif f"{path}: missing {name}" not in faults:
                faults.append(f"{path}: missing {name}")
        ignored = [name for name in files if name.endswith("inv_freq")]
        return model, StoredTensors(pieces, model.state_dict(), ignored, faults)

    def save(
        self, model: ComposedModel, path: Path, *, max_shard_bytes: int = 5_000_000_000, model_parallel: int = 1
    ) -> None:
        (_, encoder), text = parts_of(model), model.text.config
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if encoder.config.tile_tables == "place":
            for name in TABLES:
                state[f"image.encoder.{name}"] = by_arrangement(state[f"image.encoder.{name}"])
        tokens = state["text.tok_embeddings.weight"]
        image_token = text.vocab_size if model.tokenizer is None else model.tokenizer.vocab_size
        embedding = torch.cat([tokens, tokens.new_zeros(EXTRA_ROWS, text.dim)])
        embedding[image_token] = state["image.placeholder_embedding"]
        name = "language_model.model.embed_tokens.weight"
        found = {name: Match(name, ""), **{match.stored: match for match in matches(model)}}
        tensors = {
            name: embedding if not match.target else state[match.target][match.region] for name, match in found.items()
        }
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        shards = split_sizes(sizes, max_shard_bytes)
        for file, names in shards.items():
            save_tensors({name: found[name].to_theirs(tensors[name]) for name in names}, path / file)
        write_index(shards, sum(sizes.values()), path)
        dtype = str(tokens.dtype).removeprefix("torch.")
        write_json(path / "config.json", configs_to_hf(model, image_token) | {"dtype": dtype, "torch_dtype": dtype})
        write_json(path / "preprocessor_config.json", preprocessing_to_hf(encoder))
        if model.tokenizer is not None:
            template = chat_template({"image": IMAGE_TOKEN})
            text_of = with_image_token(model.tokenizer)
            save_tokenizer(model.tokenizer, path, text.max_seq_len, template, text_of)
            write_json(path / "chat_template.json", {"chat_template": template})


def _pieces(model: ComposedModel) -> Iterator[Piece]:
    state, head = model.state_dict(), model.text.config.head_dim
    for match in matches(model):
        arrange, width = None, 1
        if match.heads:
            arrange, width = partial(to_pairs, width=head), head
        elif match.shape is not None:
            arrange = partial(torch.reshape, shape=state[match.target].shape)
        yield Piece(match.stored, match.target, match.region, arrange, width, match.shape)


def _embedding(model: ComposedModel, image_token: int) -> Iterator[Piece]:
    """The embedding of tokens and that of the image's placeholder, of one stored tensor."""
    rows, width = model.text.config.vocab_size, model.text.config.dim
    name, shape = "language_model.model.embed_tokens.weight", (rows + EXTRA_ROWS, width)
    if not 0 <= image_token < rows + EXTRA_ROWS:
        raise ModelDirectoryError(f"image_token_index {image_token} is no row of {name}, which has {shape[0]}")
    yield Piece(name, "text.tok_embeddings.weight", (), lambda stored: stored[:rows], shape=shape)
    yield Piece(name, "image.placeholder_embedding", (), lambda stored: stored[image_token], shape=shape)


def _later_name(name: str) -> str:
    for before, after in _LATER_NAMES.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def load_tokenizer(path: Path, content: Mapping[str, Any], text: TransformerConfig) -> Tokenizer | None:
    """The tokenizer of a directory without the image's token beyond the vocabulary: placeholders have the id that
    Meta's tokenizer gives them.

    Raises:
        ModelDirectoryError: it is none of Llama 3's, or has more tokens than the model.
    """
    file = path / "tokenizer.json"
    try:
        if file.is_file():
            stored = json.loads(file.read_text(encoding="utf-8"))
            image_token = image_token_of(content)
            stored["added_tokens"] = [
                token
                for token in stored.get("added_tokens", [])
                if not (token["content"] == IMAGE_TOKEN and token["id"] == image_token)
            ]
            tokenizer = Tokenizer.from_json(json.dumps(stored))
        else:
            tokenizer = Tokenizer.load(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # the library raises nothing narrower for a file that it cannot read
        raise ModelDirectoryError(f"{file}: {error}") from error
    if tokenizer.vocab_size > text.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model's vocabulary {text.vocab_size}"
        raise ModelDirectoryError(f"{path}: the tokenizer has {sizes}")
    return tokenizer


def with_image_token(tokenizer: Tokenizer) -> str:
    """The text of a `tokenizer.json` in which the image's token comes after all others, and the places of media among
    the reserved ones have the release's names."""
    content = json.loads(tokenizer.to_json())
    media = SPECIAL_TOKENS.index(IMAGE_TOKEN)
    for token in content["added_tokens"]:
        place = token["id"] - tokenizer.bos_id
        if place >= media:
            token["content"] = f"<|reserved_special_token_{place - media + 2}|>"
    last = dict(content["added_tokens"][-1])
    content["added_tokens"].append(last | {"id": tokenizer.vocab_size, "content": IMAGE_TOKEN})
    return json.dumps(content, ensure_ascii=False)
