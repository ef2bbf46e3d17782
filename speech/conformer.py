"""The Conformer speech encoder of section 8.2.1 of "The Llama 3 Herd of Models" (arXiv 2407.21783):
architecture only.

Letters in shapes: N utterances, F mel frames (10 ms), T encoder frames (40 ms), M encoder frames of all utterances
together, C mel bins, D model width, H heads, Dh width of a head.

Where the paper is silent: the wiring is Gulati et al.'s (arXiv 2005.08100; half feed-forward, attention,
convolution, half feed-forward, norm), with LayerNorm in place of BatchNorm, so that no utterance depends on
its batch; attention is over the whole utterance. With `chunk_frames` the encoder can run while the utterance is
spoken, see `herdkit.speech.streaming`; the paper's does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..text.attention import dot_product_attention
from ..text.linear import Linear
from .ragged import Frames


@dataclass(kw_only=True)
class ConformerConfig:
    """Sizes of the encoder.

    Args:
        n_mels: bins C of a mel frame.
        stack: mel frames that make one encoder frame.
        dim: width D.
        n_layers: number of blocks.
        n_heads: attention heads H; `dim / n_heads` is the width of a head and must be even.
        ffn_dim: inner width of each of a block's two feed-forward halves.
        conv_kernel: odd number of encoder frames that the depthwise convolution spans.
        dropout: on every branch before it joins the residual stream; the paper names none.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of LayerNorm.
        chunk_frames: encoder frames of a chunk. A frame then attends to its own chunk and to the `left_frames` before
            that, and the convolution to frames before alone. None: attention over the whole utterance, and a
            convolution that is centred.
        left_frames: see there; needed with `chunk_frames`, and only there.
    """

    n_mels: int = 80
    stack: int = 4
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    conv_kernel: int = 7
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    chunk_frames: int | None = None
    left_frames: int | None = None

    def __post_init__(self):
        for name in ("n_mels", "stack", "dim", "n_layers", "n_heads", "ffn_dim", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise ValueError(f"dim ({self.dim}) must be an even multiple of n_heads ({self.n_heads})")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, not {self.conv_kernel}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if (self.chunk_frames is None) != (self.left_frames is None):
            raise ValueError("chunk_frames and left_frames go together: give both, or neither")
        if self.chunk_frames is not None and self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, not {self.chunk_frames}")
        if self.left_frames is not None and self.left_frames < 0:
            raise ValueError(f"left_frames must be at least 0, not {self.left_frames}")

    def length(self, frames: int) -> int:
        """Encoder frames of an utterance of so many mel frames: the tail counts, filled up with zeros."""
        return -(-frames // self.stack)


def conformer_preset(name: str) -> ConformerConfig:
    """A new config: "1b" (the paper's, section 8.2.1) or "tiny", which a CPU trains in minutes.

    Raises:
        ValueError: no such preset.
    """
    if name == "1b":
        return ConformerConfig(dim=1536, n_layers=24, n_heads=24, ffn_dim=4096)
    if name == "tiny":
        return ConformerConfig(dim=144, n_layers=4, n_heads=4, ffn_dim=576)
    raise ValueError(f"no Conformer preset {name!r}; there are 1b and tiny")


def valid_frames(lengths: Tensor, size: int) -> Tensor:
    """(N,) lengths to (N, size) bool, True where the frame belongs to the utterance."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def stack_frames(features: Tensor, frames: Tensor, stack: int) -> tuple[Tensor, Tensor]:
    """Sets `stack` neighbouring frames side by side.

    Args:
        features: (N, F, C); what lies beyond an utterance's frames is ignored, even if it is not finite.
        frames: (N,) int64, at least 1.

    Returns:
        (N, T, stack * C) and the lengths (N,), T = ceil(F / stack): a last group that is not full counts,
        with zeros (the mean of normalised features) in place of what it lacks.
    """
    features = features.masked_fill(~valid_frames(frames, features.shape[1])[..., None], 0)
    features = F.pad(features, (0, 0, 0, -features.shape[1] % stack))
    return features.unflatten(1, (-1, stack)).flatten(2), (frames + stack - 1) // stack


def rotations(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Unit complex numbers (..., T, 1, 1, Dh / 2) that turn each pair of lanes by its frame's angle, for positions
    (..., T) int64.

    Computed at every forward pass: a buffer would be lost by construction on the meta device and rounded by
    `model.to(torch.bfloat16)`.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions[..., None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[..., None, None, :]


def attended(lengths: Tensor, size: int, chunk: int | None, left: int | None) -> Tensor:
    """(N, 1, 1 or T, T) bool, True where the frame (second to last dimension) attends to the other (last).

    With chunks, frames of the padding see themselves: a softmax over nothing would give NaN, which a weight of 0 in
    other frames' sums does not remove.
    """
    valid = valid_frames(lengths, size)[:, None, None, :]
    if chunk is None or left is None:
        return valid
    place = torch.arange(size, device=lengths.device)
    begin = place - place % chunk
    window = (place >= begin[:, None] - left) & (place < begin[:, None] + chunk)
    return (window & valid) | (place == place[:, None])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates adjacent pairs of lanes of x (N, T, *, H, Dh) in float32 or wider; returns that dtype.

    One complex product: the same in real arithmetic takes three times as long on a CPU.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


class Attention(nn.Module):
    """Rotary self-attention. Also the adapter's."""

    def __init__(self, dim: int, n_heads: int, *, bias: bool):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.out = Linear(dim, dim, bias=bias)

    def split(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer `qkv` gives (N, T, 3 D) to queries and keys, turned by `rotations`, and values, each
        (N, H, T, Dh)."""
        qk, v = qkv.unflatten(-1, (3, self.n_heads, -1)).split((2, 1), dim=2)
        q, k = rotate(qk, rotation).to(v.dtype).transpose(1, 3).unbind(2)
        return q, k, v.squeeze(2).transpose(1, 2)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        """Queries (N, H, T, Dh), keys and values (N, H, S, Dh) and sees (N, 1, 1 or T, S) bool to what the layer `out`
        takes, (N, T, D)."""
        return dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, rotation: Tensor, sees: Tensor) -> Tensor:
        """x (N, T, D), rotation of `rotations`, sees of `attended`."""
        return self.out(self.weigh(*self.split(self.qkv(x), rotation), sees))


class FeedForward(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.up = Linear(config.dim, config.ffn_dim, bias=True)
        self.down = Linear(config.ffn_dim, config.dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.norm(x))))


class Convolution(nn.Module):
    """Pointwise, gate, depthwise over time, norm, SiLU, pointwise."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.pointwise_in = Linear(config.dim, 2 * config.dim, bias=True)
        self.depthwise = nn.Conv1d(config.dim, config.dim, config.conv_kernel, groups=config.dim)
        self.depthwise_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.pointwise_out = Linear(config.dim, config.dim, bias=True)
        self.causal = config.chunk_frames is not None

    def gate(self, x: Tensor) -> Tensor:
        """What the depthwise kernel is to see of frames (..., D)."""
        return F.glu(self.pointwise_in(self.norm(x)), dim=-1)

    def over_time(self, gated: Tensor) -> Tensor:
        """The depthwise convolution of (N, T, D), as if zeros stood around the utterance."""
        reach = self.depthwise.kernel_size[0] - 1
        if self.causal:
            return self.depthwise_conv(F.pad(gated, (0, 0, reach, 0)), 0)
        return self.depthwise_conv(gated, reach // 2)

    def depthwise_conv(self, gated: Tensor, padding: int) -> Tensor:
        """The same with so many zeros at both ends."""
        # A 2-D convolution over a channels-last view: no transposes, a third of conv1d's time on a CPU.
        image = gated.unsqueeze(2).permute(0, 3, 1, 2)
        weight = self.depthwise.weight.unsqueeze(-1)
        image = F.conv2d(image, weight, self.depthwise.bias, padding=(padding, 0), groups=image.shape[1])
        return image.permute(0, 2, 3, 1).squeeze(2)

    def finish(self, x: Tensor) -> Tensor:
        """What follows the depthwise convolution, (..., D)."""
        return self.pointwise_out(F.silu(self.depthwise_norm(x)))

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """x (M, D) of `frames`."""
        return self.finish(frames.pack(self.over_time(frames.pad(self.gate(x)))))


class ConformerBlock(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.ffn_in = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.n_heads, bias=True)
        self.convolution = Convolution(config)
        self.ffn_out = FeedForward(config)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, frames: Frames, rotation: Tensor, sees: Tensor) -> Tensor:
        """x (M, D) of `frames`, their `rotations`, sees of `attended`."""
        x = torch.add(x, self.dropout(self.ffn_in(x)), alpha=0.5)
        attention = self.attention
        q, k, v = attention.split(frames.pad(attention.qkv(self.attention_norm(x))), rotation)
        x = x + self.dropout(attention.out(frames.pack(attention.weigh(q, k, v, sees))))
        x = x + self.dropout(self.convolution(x, frames))
        x = torch.add(x, self.dropout(self.ffn_out(x)), alpha=0.5)
        return self.norm(x)


class Conformer(nn.Module):
    """Log-mel frames to encoder frames of 40 ms. Can be built on the meta device at any size."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.config = config
        self.input = Linear(config.stack * config.n_mels, config.dim, bias=True)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.n_layers))

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a padded batch. Neither padding nor the other utterances change an utterance's frames.

        Args:
            features: (N, F, C), padded on the right with anything.
            frames: (N,) int64, mel frames of each utterance, at least 1.

        Returns:
            (N, T, D), zeros beyond each utterance, and the lengths (N,), T = ceil(F / stack).
        """
        config = self.config
        stacked, lengths = stack_frames(features, frames, config.stack)
        T = stacked.shape[1]
        there = Frames(lengths, T)
        sees = attended(lengths, T, config.chunk_frames, config.left_frames)
        rotation = rotations(torch.arange(T, device=lengths.device), config.dim // config.n_heads, config.rope_theta)
        x = self.dropout(self.input(there.pack(stacked)))
        for block in self.blocks:
            x = block(x, there, rotation, sees)
        return there.pad(x), lengths
