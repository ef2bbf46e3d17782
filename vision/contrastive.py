"""Image-text contrastive pre-training of the encoder: the two towers and the losses of CLIP (arXiv 2103.00020) and
SigLIP (arXiv 2303.15343) (section 7.2 of the paper: ViT-H/14 on 2.5 billion pairs; it gives neither the text tower
nor the temperature)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn import functional as F

from ..text.linear import Linear
from ..text.presets import VOCAB_SIZE
from .encoder import Block
from .packed import Encoder, Sequences

Negatives = Literal["local", "global"]
"""Which pairs a row is told from: those of its own process, or those of all processes, with exact gradients for
the gathered features. A gather without gradients has the right loss and the wrong gradient, so there is none."""

MAX_SCALE = 100.0

SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0
"""Where SigLIP starts: so that at first nearly every pair is said to be none, as nearly every pair is."""


@dataclass(kw_only=True)
class TextTowerConfig:
    """Sizes of the text tower.

    Args:
        vocab_size: of the tokenizer, special tokens included.
        max_length: longest caption in tokens.
        dim, n_layers, n_heads, ffn_dim: of the transformer.
        attention: "causal" reads the state of the last token, as CLIP does; "bidirectional" the mean of all.
    """

    vocab_size: int = VOCAB_SIZE
    max_length: int = 77
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    attention: Literal["causal", "bidirectional"] = "causal"
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "max_length", "dim", "n_layers", "n_heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim ({self.dim}) is no multiple of n_heads ({self.n_heads})")
        if self.attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention must be 'causal' or 'bidirectional', not {self.attention!r}")


class TextTower(nn.Module):
    """A transformer over caption tokens with learned positions, pooled to one vector."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.config = config
        self.width = config.dim
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Parameter(torch.randn(config.max_length, config.dim) * 0.01)
        self.layers = nn.ModuleList()
        for _ in range(config.n_layers):
            block = Block(config.dim, config.n_heads, config.ffn_dim, norm_eps=config.norm_eps, attention_bias=True)
            block.init_weights(config.n_layers)
            self.layers.append(block)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(N, T) int64 tokens, padded on the right, and their lengths (N,) int64 to (N, dim).

        Raises:
            ValueError: more tokens than `max_length`.
        """
        N, T = tokens.shape
        if self.config.max_length < T:
            raise ValueError(f"captions of {T} tokens; the text tower's max_length is {self.config.max_length}")
        steps = torch.arange(T, device=tokens.device)
        real = steps < lengths[:, None]
        # Causal attention needs no padding mask: what is padded comes after what is read.
        causal = self.config.attention == "causal"
        mask = steps[:, None] >= steps if causal else real[:, None, None]
        x = (self.token_embedding(tokens) + self.position_embedding[:T]).flatten(0, 1)
        sequences = Sequences([(N, T)], mask)
        for layer in self.layers:
            x = layer(x, sequences)
        x = x.view(N, T, -1)
        if causal:
            return self.norm(x[torch.arange(N, device=x.device), lengths - 1])
        weights = real[..., None] / lengths[:, None, None]
        return (self.norm(x) * weights).sum(1)


class WordTower(nn.Module):
    """The mean of a language model's own word embeddings, each normalised, with nothing to train: captions that
    are learned against it put images into the space of the words (locked text, as in LiT, arXiv 2111.07991).

    Args:
        embeddings: (vocabulary, width).
    """

    embeddings: Tensor

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.width = embeddings.shape[1]
        normalised = F.layer_norm(embeddings.detach(), (self.width,))
        self.register_buffer("embeddings", normalised, persistent=False)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As in `TextTower`; any number of tokens."""
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return (self.embeddings[tokens] * (real / lengths[:, None])[..., None]).sum(1)


class ContrastiveModel(nn.Module):
    """An image encoder and a text tower with projections into one space.

    Args:
        vision: any image encoder.
        text: the text tower.
        dim: width of the space; None for that of the text tower, whose vectors then stand as they are.
        initial_scale: factor of the cosine similarities at the start; learned, at most 100 (CLIP's values).
        initial_bias: what is added to them, learned, for `siglip_loss`; None for none.
    """

    def __init__(
        self,
        vision: Encoder,
        text: TextTower | WordTower,
        dim: int | None = None,
        initial_scale: float = 1 / 0.07,
        initial_bias: float | None = None,
    ):
        super().__init__()
        self.vision = vision
        self.text = text
        self.image_projection = Linear(vision.pooled_width, dim or text.width)
        self.text_projection = nn.Identity() if dim is None else Linear(text.width, dim)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(initial_scale)))
        self.logit_bias = None if initial_bias is None else nn.Parameter(torch.full((1,), initial_bias))
        for projection in (self.image_projection, self.text_projection):
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def encode_images(self, tiles: Tensor, n_tiles: Tensor, grid: Tensor) -> Tensor:
        """Unit vectors (N, dim) float32; arguments as in `Encoder.forward`."""
        return F.normalize(self.image_projection(self.vision.pooled(tiles, n_tiles, grid)).float(), dim=-1)

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Unit vectors (N, dim) float32; arguments as in `TextTower.forward`."""
        return F.normalize(self.text_projection(self.text(tokens, lengths)).float(), dim=-1)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Image vectors, text vectors, and the scale, for `clip_loss`.

        Args:
            batch: `tiles`, `n_tiles`, `grid` as in `Encoder.forward`; `tokens`, `lengths` as in
                `TextTower.forward`; row i of both is a pair.
        """
        images = self.encode_images(batch["tiles"], batch["n_tiles"], batch["grid"])
        texts = self.encode_text(batch["tokens"], batch["lengths"])
        return images, texts, self.scale()

    def scale(self) -> Tensor:
        """The factor of the similarities, (1,), at most 100."""
        return Bounded.apply(self.logit_scale, math.log(MAX_SCALE)).exp()


class Bounded(torch.autograd.Function):
    """min(x, limit). Above the limit only gradients that lower x pass: a plain clamp would never let it return."""

    @staticmethod
    def forward(ctx, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x > limit)
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        return torch.where(above, grad.clamp(min=0), grad), None


def gathered(rows: Tensor) -> tuple[Tensor, int]:
    """The rows (N, C) of all processes, with gradients, and at which of them this process's own begin. Processes may
    differ in N: a loader leaves bad samples out."""
    rank = torch.distributed.get_rank()
    counts = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[rank] = len(rows)
    torch.distributed.all_reduce(counts)
    lengths = counts.tolist()
    padded = F.pad(rows, (0, 0, 0, max(lengths) - len(rows)))
    parts = torch.distributed.nn.functional.all_gather(padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]), sum(lengths[:rank])


def clip_objective(model: ContrastiveModel, batch: Mapping[str, Tensor]):
    """`clip_loss` of a batch."""
    return clip_loss(*model(batch))


def siglip_objective(model: ContrastiveModel, batch: Mapping[str, Tensor]):
    """`siglip_loss` of a batch.

    Raises:
        ValueError: the model has no bias.
    """
    if model.logit_bias is None:
        raise ValueError("siglip_loss needs a model with a bias; build it with initial_bias")
    images, texts, scale = model(batch)
    return siglip_loss(images, texts, scale, model.logit_bias)


def siglip_loss(
    image_features: Tensor, text_features: Tensor, scale: Tensor, bias: Tensor, *, negatives: Negatives = "global"
) -> tuple[Tensor, int, dict[str, tuple[Tensor, int]]]:
    """Every image with every text, a pair or not: the binary cross-entropy of each, summed over texts.

    As in `clip_loss`, sums over processes give the loss and the gradient of the whole batch.

    Args:
        image_features, text_features, scale, negatives: as in `clip_loss`.
        bias: (1,), added to the scaled similarities.

    Returns:
        Loss summed over this process's N images; N; and the metric `image_to_text`.
    """
    N = len(image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = image_features.float(), text_features.float()
        offset = 0
        if negatives == "global" and torch.distributed.is_initialized():
            texts, offset = gathered(texts)
        logits = scale.float() * images @ texts.T + bias.float()
        targets = torch.arange(offset, offset + N, device=logits.device)
        pairs = F.one_hot(targets, len(texts)).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, pairs, reduction="sum")
    return loss, N, {"image_to_text": ((logits.argmax(1) == targets).sum(), N)}


def clip_loss(
    image_features: Tensor, text_features: Tensor, scale: Tensor, *, negatives: Negatives = "global"
) -> tuple[Tensor, int, dict[str, tuple[Tensor, int]]]:
    """Symmetric cross-entropy of matching each image with its text and each text with its image.

    The sums of loss and count over all processes give the loss of the whole batch, and the summed gradients
    divided by the summed count its gradient: what `herdkit.train` does with every objective. Computed in float32
    also under autocast, because logits reach +-100.

    Args:
        image_features, text_features: (N, D) unit vectors, row i of both a pair; processes may differ in N.
        scale: (1,), factor of the similarities.
        negatives: see `Negatives`; "global" is "local" where torch.distributed is not initialised.

    Returns:
        Loss summed over this process's N pairs; N; and metrics `image_to_text` and `text_to_image`, correct
        matches and their number.
    """
    N, D = image_features.shape
    with torch.autocast(image_features.device.type, enabled=False):
        both = torch.cat([image_features, text_features], dim=1).float()
        everyone, offset = both, 0
        if negatives == "global" and torch.distributed.is_initialized():
            everyone, offset = gathered(both)
        all_images, all_texts = everyone.split(D, dim=1)
        images, texts = both.split(D, dim=1)
        targets = torch.arange(offset, offset + N, device=both.device)
        by_image = scale.float() * images @ all_texts.T
        by_text = scale.float() * texts @ all_images.T
        loss = F.cross_entropy(by_image, targets, reduction="sum")
        loss = (loss + F.cross_entropy(by_text, targets, reduction="sum")) / 2
    metrics = {
        "image_to_text": ((by_image.argmax(1) == targets).sum(), N),
        "text_to_image": ((by_text.argmax(1) == targets).sum(), N),
    }
    return loss, N, metrics
