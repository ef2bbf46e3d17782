"""Where in its pictures a model looked for an answer: the weights of the image adapter's cross-attention layers, patch
by patch, laid over the picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..adapters.chat import Dialog, encode_prompts
from ..adapters.compose import ComposedModel
from ..adapters.cross_attention import CrossAttention, GatedCrossAttention
from .image_adapter import ImageAdapter
from .tiles import ImagePreparation, arrange


@contextmanager
def recorded_weights(model: ComposedModel, modality: str = "image") -> Iterator[dict[int, Tensor]]:
    """Meanwhile every forward pass leaves the weights of the modality's cross-attention layers here, by the text layer
    that they run before: (B, H, T, K * M) float32, zeros for positions that see no input.

    Raises:
        ValueError: no such adapter is attached, or it has no layers of this kind.
    """
    adapter = model.adapters.get(modality)
    layers = {} if adapter is None else adapter.interleaved()
    if not layers or not all(isinstance(layer, GatedCrossAttention) for layer in layers.values()):
        raise ValueError(f"the model has no adapter {modality!r} with gated cross-attention layers")
    weights: dict[int, Tensor] = {}
    hooks = []
    for place, layer in layers.items():

        def keep(attention: CrossAttention, given: tuple[Tensor, ...], place: int = place) -> None:
            weights[place] = weights_of(attention, *given)

        hooks.append(layer.attention.register_forward_pre_hook(keep))  # type: ignore[union-attr]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def weights_of(attention: CrossAttention, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The weights with which `attention` would mix values, (B, H, T, K * M) float32; arguments as of its forward. A
    position that may see everything, as `compose` says of one that sees nothing, is among them as such."""
    B, T, _ = x.shape
    queries = attention.q_norm(attention.wq(x).view(B, T, attention.n_heads, attention.head_dim)).transpose(1, 2)
    keys = keys.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=1)
    scores = queries.float() @ keys.float().transpose(2, 3) / math.sqrt(attention.head_dim)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def look(model: ComposedModel, messages: Dialog, answer: str) -> list[tuple[Image.Image, Tensor]]:
    """The pictures of a dialog's messages, in order, and for each how much the answer looked at its patches: (rows,
    columns) of the picture's patches float32, the mean over layers, heads and the positions that say the answer. All
    pictures together, with their class tokens, have the sum 1; later pictures replace earlier ones in sight.

    Args:
        messages: as in `herdkit.adapters.chat.reply`, up to the question.
        answer: what the model said, or is to be asked about.

    Raises:
        ValueError: the model has no image adapter of ours, the dialog no picture, or the answer no token.
    """
    adapter = model.adapters.get("image")
    if not isinstance(adapter, ImageAdapter) or not isinstance(adapter.prepare, ImagePreparation):
        raise ValueError("the model has no image adapter of ours")
    prompts, inputs, tokenizer = encode_prompts(model, [messages])
    if "image" not in inputs:
        raise ValueError("the dialog has no picture")
    said = tokenizer.encode(answer)
    if not said:
        raise ValueError("the answer is empty")
    # The position before a token says it.
    positions = slice(len(prompts[0]) - 1, len(prompts[0]) + len(said) - 1)
    device = model.text.tok_embeddings.weight.device
    with recorded_weights(model) as weights, torch.no_grad():
        model.hidden(torch.tensor([prompts[0] + said], device=device), inputs)
    mean = torch.stack([layer[0, :, positions].mean((0, 1)) for layer in weights.values()]).mean(0).cpu()
    batch = inputs["image"]
    pictures = [adapter.prepare.load(source) for source in _pictures(messages)]
    order = list(dict.fromkeys(batch.placements.input.tolist()))
    per_input = mean.unflatten(0, (len(order), batch.tensors["tiles"].shape[1], -1))
    found = []
    for slot, number in enumerate(sorted(order)):
        found.append((pictures[number], patch_grid(per_input[slot], pictures[number], adapter)))
    return found


def patch_grid(weights: Tensor, picture: Image.Image, adapter: ImageAdapter) -> Tensor:
    """The weights (T, L) of a picture's entries in memory, those of padded tiles among them, as (rows, columns) of the
    patches that it fills. The patches are the last square number of a tile's tokens, behind class token and registers.
    """
    s = adapter.encoder.image_size
    plan = arrange(picture.height, picture.width, s, adapter.encoder.max_tiles)
    side = math.isqrt(weights.shape[1])
    patches = weights[: plan.rows * plan.columns, -side * side :]
    grid = patches.reshape(plan.rows, plan.columns, side, side).transpose(1, 2).reshape(plan.rows * side, -1)
    return grid[: math.ceil(plan.height / s * side), : math.ceil(plan.width / s * side)]


def _pictures(messages: Sequence[Any]) -> Iterator[Any]:
    for message in messages:
        content = message["content"] if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            if part["type"] == "image":
                yield part["image"]


def overlay(picture: Image.Image, grid: Tensor, strength: float = 0.6) -> Image.Image:
    """The picture, darkened where the answer did not look and glowing where it did; as large as the picture, but at
    least 320 pixels wide."""
    scale = max(1, math.ceil(320 / picture.width))
    size = (picture.width * scale, picture.height * scale)
    heat = grid / grid.max().clamp(min=1e-12)
    patch = Image.fromarray((255 * heat.numpy()).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps["inferno"](np.asarray(patch), bytes=True)[..., :3]
    base = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return Image.blend(base, Image.fromarray(np.ascontiguousarray(colours)), strength)
