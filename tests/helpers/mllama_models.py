"""Tiny models of transformers' mllama with every gate open, and what they and ours make of the same rows."""

import json
from pathlib import Path

import numpy as np
import torch
from herdkit.adapters.batching import FOREVER, end_of_sight
from herdkit.adapters.compose import ComposedModel
from herdkit.adapters.contract import ModalityBatch, Placements
from herdkit.text.tokenizer import Tokenizer
from herdkit.vision.encoder import CLIP_MEAN, CLIP_STD
from PIL import Image
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_mllama import get_all_supported_aspect_ratios
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

VOCAB, IMAGE = 600, 600


def tiny(taps: tuple[int, ...] = (1, 3), **text) -> MllamaForConditionalGeneration:
    torch.manual_seed(0)
    config = MllamaConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "cross_attention_layers": [1, 4],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "pad_token_id": None,
            "max_position_embeddings": 512,
            **text,
        },
        vision_config={
            "image_size": 28,
            "patch_size": 7,
            "hidden_size": 32,
            "intermediate_size": 64,
            "attention_heads": 4,
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "intermediate_layers_indices": list(taps),
            "vision_output_dim": 96,
            "max_num_tiles": 4,
            "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(4)],
        },
        image_token_index=IMAGE,
    )
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name and p.numel() == 1:
                p.fill_(0.3 + 0.6 * torch.rand(()).item())  # each another, so that none can stand for another
            else:
                p.copy_(0.15 * torch.randn_like(p) + ("norm" in name and name.endswith("weight")))
    return model


def tokenizer() -> Tokenizer:
    """With a token for every id of the vocabulary."""
    extra = ["".join(chr(97 + (i + j) % 26) for j in range(k)) for k in range(2, 12) for i in range(26)]
    found = Tokenizer.train(["a red circle and a blue square stand beside a green star", *extra] * 3, VOCAB)
    assert found.vocab_size == VOCAB
    return found


def by_meta(model: MllamaForConditionalGeneration) -> MllamaForConditionalGeneration:
    """The model with the two things put right that transformers does otherwise than Meta's code: which states are
    tapped, and that text before an image sees nothing of it."""
    vision = model.model.vision_model
    vision.intermediate_layers_indices = [tap - 1 for tap in vision.config.intermediate_layers_indices]
    for layer in model.model.language_model.layers:
        if isinstance(layer, MllamaCrossAttentionDecoderLayer):
            mask_attention(layer)
    return model


def mask_attention(layer: MllamaCrossAttentionDecoderLayer) -> None:
    seen: dict[str, Tensor | None] = {}
    layer.register_forward_pre_hook(
        lambda _, given, named: seen.update(mask=named["full_text_row_masked_out_mask"]), with_kwargs=True
    )

    def masked(_, given, out):
        return out if seen["mask"] is None else (out[0] * seen["mask"][:, 0], *out[1:])

    layer.cross_attn.register_forward_hook(masked)


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


ROWS = [[7, 8, IMAGE, 5, 6, IMAGE, 9, 10, 11], [3, IMAGE, IMAGE, 4, 2, 12], [IMAGE, 13, 14]]
IMAGES = [
    [picture(28, 28, 0), picture(60, 28, 1)],
    [picture(100, 90, 2), picture(20, 70, 3)],
    [picture(30, 90, 4)],
]
LENGTHS = [len(row) for row in ROWS]


@torch.no_grad()
def give_places(model: MllamaForConditionalGeneration) -> None:
    """Tables of tiles that tell places apart alone, as the released ones do, written out by hand."""
    vision = model.model.vision_model
    embeddings = [vision.gated_positional_embedding.tile_embedding]
    embeddings += [vision.pre_tile_positional_embedding.embedding, vision.post_tile_positional_embedding.embedding]
    for embedding in embeddings:
        table = 0.2 * torch.randn(4, 4, embedding.weight.shape[1] // 4)
        embedding.weight.zero_()
        for number, (rows, columns) in enumerate(get_all_supported_aspect_ratios(4), start=1):
            tiles = [table[r, c] for r in range(rows) for c in range(columns)]
            embedding.weight[number, : rows * columns * table.shape[2]] = torch.cat(tiles)


def processor() -> MllamaImageProcessorPil:
    return MllamaImageProcessorPil(
        size={"height": 28, "width": 28}, max_image_tiles=4, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )


def save_theirs(model: MllamaForConditionalGeneration, path: Path, tokenizer: Tokenizer | None = None) -> Path:
    model.save_pretrained(path)
    processor().save_pretrained(path)
    if tokenizer is not None:
        # As in the release: the eleventh special token is a reserved one, and the image's stands behind all others.
        content = json.loads(tokenizer.to_json())
        special = content["added_tokens"]
        for token in special:
            if (place := token["id"] - tokenizer.bos_id) >= 11:
                token["content"] = f"<|reserved_special_token_{place - 9}|>"
        special.append(special[-1] | {"id": IMAGE, "content": "<|image|>"})
        (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def their_logits(model: MllamaForConditionalGeneration, rows: list[list[int]], images: list[list[Image.Image]]):
    made = processor()(images, return_tensors="pt")
    length = max(map(len, rows))
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, IMAGE) for row in rows], made["num_tiles"], 4, length
    )
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    inputs = {name: made[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        return model(input_ids=tokens, cross_attention_mask=torch.as_tensor(mask), **inputs).logits


def our_logits(model: ComposedModel, rows: list[list[int]], images: list[list[Image.Image]]) -> Tensor:
    length = max(map(len, rows))
    found = []
    for number, row in enumerate(rows):
        placed = [(at, 1, 0) for at, token in enumerate(row) if token == IMAGE]
        for i, (at, _, _) in enumerate(placed):
            found.append((number, at, 1, end_of_sight(placed, i, 0, FOREVER), len(found)))
    columns = torch.tensor(found).unbind(1)
    batch = ModalityBatch(model.image.prepare([image for row in images for image in row]), Placements(*columns))
    # Our models have no such token; what stands at a placeholder's position is replaced.
    tokens = torch.tensor([[0 if t == IMAGE else t for t in row] + [0] * (length - len(row)) for row in rows])
    with torch.no_grad():
        return model(tokens, {"image": batch})
