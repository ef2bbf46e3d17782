"""The speech adapter (section 8.2.1 of "The Llama 3 Herd of Models", arXiv 2407.21783): Conformer frames of
40 ms to soft tokens of 80 ms that stand in the text in place of the placeholder tokens.

Letters in shapes: N utterances, F mel frames (10 ms), C mel bins, T encoder frames (40 ms), S soft tokens, D
width of the language model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.contract import Adapter, Contribution
from ..data.media import MediaError, audio_length, load_audio
from ..text.model import FeedForward, RMSNorm, TransformerConfig
from ..train.sharding import borrow_weight
from .conformer import Attention, ConformerConfig, conformer_preset, rotations, valid_frames
from .ctc import ctc_loss, greedy_ctc
from .encoders import ConformerSpec, EncoderSpec, encoder_spec
from .features import FeatureConfig, log_mel, pad_features
from .transcript_losses import TOKENS, TranscriptLosses


@dataclass(kw_only=True)
class SpeechAdapterConfig:
    """Sizes of the encoder and of the adapter after it.

    Args:
        conformer: the encoder.
        features: its input; left out with `encoder`, which brings its own.
        encoder: another encoder in place of the Conformer, such as {"type": "whisper",
            "config": {"d_model": 1280, ...}}; see `herdkit.speech.encoders.encoder_spec`.
        dim, ffn_dim: widths of the adapter's Transformer layer (the paper's: 3072 and 4096).
        n_heads: its heads; the paper gives no number.
        conv_kernel, conv_stride: of the convolution that shortens the sequence, in encoder frames; the kernel
            is odd.
        rope_theta, norm_eps: of the Transformer layer.
        output_scale: root mean square of the soft tokens at the start; that of the language model's token
            embeddings (`herdkit.adapters.projector.embedding_scale`) is a good value.
        word_temperature: makes every soft token a mixture of the language model's own token embeddings, weighted by
            softmax(logits / temperature) of a linear head: what is heard comes to the language model as the words that
            it knows. The paper hands over the output of the linear layer as it is, as None does; mixtures by the
            posteriors of a CTC head are from LegoSLM (arXiv 2505.11352). The head has V x D parameters.
        pause: the language model's token for no word, with `word_temperature`. Soft tokens that are most like it, or
            like the one before them, become this token and stand behind all others, so that the words follow one
            another as in a text (CTC compression, as in arXiv 2102.01578, but with their number unchanged, which has
            to be known before anything is heard). None leaves all at their places in time.
        ctc_classes: classes of a CTC head on the encoder's frames, the blank (class 0) included; None for
            none.
    """

    conformer: ConformerConfig | None = None
    features: FeatureConfig = field(default_factory=FeatureConfig)
    encoder: dict[str, Any] | None = None
    dim: int = 3072
    ffn_dim: int = 4096
    n_heads: int = 24
    conv_kernel: int = 3
    conv_stride: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    output_scale: float = 0.02
    word_temperature: float | None = None
    pause: int | None = None
    ctc_classes: int | None = None
    max_seconds: float = 60.0

    def __post_init__(self):
        for name in ("dim", "ffn_dim", "n_heads", "conv_kernel", "conv_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise ValueError(f"dim ({self.dim}) must be an even multiple of n_heads ({self.n_heads})")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, not {self.conv_kernel}")
        if self.output_scale <= 0:
            raise ValueError(f"output_scale must be positive, not {self.output_scale}")
        if self.word_temperature is not None and self.word_temperature <= 0:
            raise ValueError(f"word_temperature must be positive, not {self.word_temperature}")
        if self.pause is not None and self.word_temperature is None:
            raise ValueError("pause needs a word_temperature: without one, soft tokens are no words")
        if self.ctc_classes is not None and self.ctc_classes < 2:
            raise ValueError(f"ctc_classes must be at least 2 (the blank and a token), not {self.ctc_classes}")
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, not {self.max_seconds}")
        if (self.conformer is None) == (self.encoder is None):
            raise ValueError("give the sizes of a conformer, or another encoder, and not both")
        if self.encoder is not None:
            # What was saved holds the encoder's.
            if self.features not in (FeatureConfig(), self.encoder_spec.features):
                raise ValueError(
                    "features: the encoder brings its own; leave them out, or give them as encoder.features where its "
                    "type takes some"
                )
            self.features = self.encoder_spec.features
        elif self.conformer is not None and self.features.n_mels != self.conformer.n_mels:
            raise ValueError(
                f"features.n_mels ({self.features.n_mels}) and conformer.n_mels ({self.conformer.n_mels}) must be equal"
            )

    @cached_property
    def encoder_spec(self) -> EncoderSpec:
        """What is known of the encoder without building it."""
        if self.encoder is not None:
            return encoder_spec(self.encoder)
        assert self.conformer is not None
        return ConformerSpec(self.conformer, self.features)

    @property
    def frame_seconds(self) -> float:
        """Seconds of an encoder frame."""
        return self.encoder_spec.stride * self.features.hop / self.features.sample_rate

    def positions(self, samples: int) -> int:
        """Soft tokens for so many samples of audio: ceil(ceil((samples // hop) / stack) / conv_stride) frames
        and the two vectors around them.

        Raises:
            ValueError: fewer samples than one window, or more than `max_seconds`.
        """
        seconds = samples / self.features.sample_rate
        if seconds > self.max_seconds:
            raise ValueError(f"{seconds:.1f} s of audio is more than max_seconds ({self.max_seconds:g}); split it")
        return -(-self.encoder_spec.length(self.features.frames(samples)) // self.conv_stride) + 2


def adapter_preset(name: str) -> SpeechAdapterConfig:
    """A new config: "1b" (the paper's encoder and adapter, section 8.2.1) or "tiny", which a CPU trains in
    minutes.

    Raises:
        ValueError: no such preset.
    """
    if name == "1b":
        return SpeechAdapterConfig(conformer=conformer_preset("1b"))
    if name == "tiny":
        return SpeechAdapterConfig(conformer=conformer_preset("tiny"), dim=192, ffn_dim=512, n_heads=4)
    raise ValueError(f"no speech adapter preset {name!r}; there are 1b and tiny")


class SpeechPreparation:
    """Waveforms to features; the adapter's `Preparation`."""

    def __init__(self, config: SpeechAdapterConfig):
        self.config = config

    def load(self, source: Any) -> Tensor:
        """A path, bytes or file object of audio, or (samples,) floating-point numbers in -1..1 at
        `config.features.sample_rate` as a tensor or an array, to (samples,) float32.

        Raises:
            MediaError: what cannot be decoded, or is too short, too long, not one-dimensional or of integers.
        """
        if isinstance(source, Tensor | np.ndarray):
            name, samples = "audio", torch.as_tensor(source)
            if not samples.is_floating_point():
                raise MediaError(name, f"samples of type {samples.dtype}; give floating-point ones in -1..1")
            samples = samples.float()
        else:
            name = os.fsdecode(source) if isinstance(source, str | os.PathLike) else "audio"
            samples = load_audio(source, self.config.features.sample_rate)
        try:
            self.positions(samples)
        except ValueError as error:
            raise MediaError(name, error) from None
        return samples

    def size(self, source: Any) -> int:
        """Mel frames of what `load` takes; of a file from its header."""
        config = self.config.features
        if isinstance(source, Tensor | np.ndarray):
            return config.frames(len(source))
        return config.frames(audio_length(source, config.sample_rate))

    def positions(self, item: Tensor) -> int:
        """Soft tokens of a waveform (samples,).

        Raises:
            ValueError: not one-dimensional, too short, too long.
        """
        if item.dim() != 1:
            raise ValueError(f"a waveform has one dimension, not the shape {tuple(item.shape)}")
        return self.config.positions(item.shape[0])

    def __call__(self, items: Sequence[Tensor]) -> dict[str, Tensor]:
        """Waveforms to "features" (N, F, C) float32, zeros on the right, and "frames" (N,) int64."""
        return pad_features([log_mel(item, self.config.features) for item in items])


class SpeechAdapter(Adapter):
    """Conformer, convolution of stride 2, one rotary Transformer layer over the whole utterance, linear
    layer.

    The paper wraps each stretch of speech in two new special tokens; here they are two learned vectors, the
    first and the last soft token of every utterance, so that the language model's vocabulary stays as it is.

    Attributes:
        encoder: the `Conformer`, the part that BEST-RQ trains, or another one.
        ctc: linear layer on the encoder's frames, or None.
        words: linear layer from soft tokens to the language model's tokens, with a `word_temperature`; else None.
        losses: of recordings that come with what is said in them.
    """

    modality = "speech"
    part = "audio"
    placeholder = "<|audio|>"
    config_class = SpeechAdapterConfig
    requires = ("embeddings",)

    def __init__(self, config: SpeechAdapterConfig, text: TransformerConfig):
        super().__init__(config, text)
        self.prepare = SpeechPreparation(config)
        self.losses = TranscriptLosses()
        self.words = None
        if config.word_temperature is not None:
            self.words = nn.Linear(text.dim, text.vocab_size)
        spec = config.encoder_spec
        self.encoder = spec.build()
        self.ctc = None
        if config.ctc_classes is not None:
            self.ctc = nn.Linear(spec.width, config.ctc_classes)
        self.shorten = nn.Conv1d(
            spec.width,
            config.dim,
            config.conv_kernel,
            stride=config.conv_stride,
            padding=config.conv_kernel // 2,
        )
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config.dim, config.n_heads, bias=False)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.output = nn.Linear(config.dim, text.dim, bias=False)
        # The gain starts at 1, and output_scale is a factor beside it: Adam's steps have the size of the
        # learning rate whatever a weight's size, and would shake a gain of 0.02.
        self.output_norm = RMSNorm(text.dim, config.norm_eps)
        self.begin = nn.Parameter(torch.randn(text.dim))
        self.end = nn.Parameter(torch.randn(text.dim))

    def encode(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's frames (N, T, width) and their lengths (N,), for `bridge` and CTC; see
        `Conformer`."""
        return self.encoder(features, frames)

    def bridge(self, encoded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder frames to soft tokens.

        Args:
            encoded: (N, T, width), zeros beyond each utterance, as `encode` gives them.
            lengths: (N,) int64.

        Returns:
            (N, S, D): begin vector, frames, end vector, then zeros; and how many count, (N,).
        """
        config = self.config
        # Under autocast the norms would get bfloat16 beside their float32 gains, a slow path.
        x = self.shorten(encoded.transpose(1, 2)).transpose(1, 2).to(self.begin.dtype)
        lengths = (lengths + config.conv_stride - 1) // config.conv_stride
        valid = valid_frames(lengths, x.shape[1])
        positions = torch.arange(x.shape[1], device=x.device)
        rotation = rotations(positions, config.dim // config.n_heads, config.rope_theta)
        x = x + self.attention(self.attention_norm(x), rotation, valid[:, None, None, :])
        x = x + self.feed_forward(self.ffn_norm(x))
        x = self.output_norm(self.output(x).to(x.dtype)).masked_fill(~valid[..., None], 0)

        begin, end = self.begin.expand(len(x), 1, -1), self.end
        x = torch.cat((begin, x, torch.zeros_like(begin)), dim=1)
        is_last = torch.arange(x.shape[1], device=x.device) == lengths[:, None] + 1
        return torch.where(is_last[..., None], end, x) * config.output_scale, lengths + 2

    @torch.no_grad()
    def start_words(self, embeddings: Tensor) -> None:
        """Makes the head for words say, at the start, how much a soft token is like each of the embeddings (V, D).

        It is a head of its own because embeddings stand as it happens: to hit each of them, learned one by one, took
        the adapter twice as long with some language models as with others.
        """
        assert self.words is not None
        self.words.weight.copy_(F.normalize(embeddings, dim=1))
        self.words.bias.zero_()

    def token_logits(self, soft_tokens: Tensor, embeddings: Tensor | None) -> Tensor:
        """Soft tokens (..., D) of `bridge` to logits (..., V) of the language model's tokens: by the head for words or,
        where there is none, the likeness to each of the language model's embeddings (V, D), from -1 to 1 times the soft
        token's length in units of `output_scale`.

        Raises:
            ValueError: the embeddings are needed and not there.
        """
        soft_tokens = soft_tokens / self.config.output_scale
        if self.words is not None:
            return self.words(soft_tokens)
        if embeddings is None:
            raise ValueError("soft tokens are compared with the language model's words: give its token embeddings")
        return F.linear(soft_tokens, F.normalize(embeddings, dim=1))

    def soft_tokens(
        self, bridged: Tensor, lengths: Tensor, embeddings: Tensor | None, logits: Tensor | None = None
    ) -> Tensor:
        """What the language model is given, (N, S, D).

        Args:
            bridged, lengths: from `bridge`.
            embeddings: (V, D), the language model's; needed where the config has a `word_temperature`.
            logits: what `token_logits` gives for them, where that is known already.

        Raises:
            ValueError: they are needed and not there.
        """
        temperature, pause = self.config.word_temperature, self.config.pause
        if temperature is None:
            return bridged
        if embeddings is None:
            raise ValueError("word_temperature mixes the language model's words: give its token embeddings")
        logits = self.token_logits(bridged, embeddings) if logits is None else logits
        words = (logits / temperature).softmax(-1) @ embeddings
        at = torch.arange(bridged.shape[1], device=bridged.device)
        last = lengths[:, None] - 1
        between = (at > 0) & (at < last)
        soft = torch.where(between[..., None], words, bridged)
        if pause is None:
            return soft
        best = logits.argmax(-1)
        again = F.pad(best[:, 1:] == best[:, :-1], (1, 0)) & (at > 1)
        silent = between & ((best == pause) | again)
        soft = torch.where(silent[..., None], embeddings[pause], soft)
        # Begin, words, silence, end, padding.
        rank = between.long() + silent + 3 * (at == last) + 4 * (at > last)
        order = rank.argsort(dim=1, stable=True)
        return soft.gather(1, order[..., None].expand_as(soft))

    def forward(self, batch: Mapping[str, Tensor], **required: nn.Module) -> Contribution:
        """Soft tokens (N, S, D) of a batch that `prepare` made, and the losses of what is said in it, if that is
        there; see `herdkit.speech.transcript_losses`."""
        encoded, frames = self.encode(batch["features"], batch["frames"])
        bridged, lengths = self.bridge(encoded, frames)
        losses = self.losses.of_frames(self, encoded, frames, batch)
        embeddings = logits = None
        if self.words is not None or TOKENS in batch:
            words = required.get("embeddings")
            embeddings = None if words is None else borrow_weight(words)
            logits = self.token_logits(bridged, embeddings)
            losses |= self.losses.of_soft_tokens(logits, lengths, batch)
        return Contribution(soft_tokens=self.soft_tokens(bridged, lengths, embeddings, logits), losses=losses)

    def ctc_loss(
        self, encoded: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`herdkit.speech.ctc.ctc_loss` of the CTC head on what `encode` gave."""
        return ctc_loss(self.ctc_logits(encoded), lengths, targets, target_lengths)

    def greedy_ctc(self, encoded: Tensor, lengths: Tensor) -> list[list[int]]:
        """`herdkit.speech.ctc.greedy_ctc` of the CTC head on what `encode` gave."""
        return greedy_ctc(self.ctc_logits(encoded), lengths)

    def greedy_bytes(self, logits: Tensor) -> str:
        """The text that a CTC head for bytes spells over the frames (T, 257) of one utterance; what is no UTF-8 becomes
        the replacement character."""
        (classes,) = greedy_ctc(logits[None], torch.tensor([len(logits)], device=logits.device))
        return bytes(token - 1 for token in classes).decode("utf-8", "replace").strip()

    def ctc_logits(self, encoded: Tensor) -> Tensor:
        """Logits of the CTC head (N, T, classes) on what `encode` gave.

        Raises:
            ValueError: the adapter has none.
        """
        if self.ctc is None:
            raise ValueError("the speech adapter has no CTC head; set ctc_classes in its config")
        return self.ctc(encoded)
