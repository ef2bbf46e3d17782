"""Speech encoders by name: ours, torchaudio's Conformer, Wav2Vec2-BERT and Whisper of transformers, or anyone's.

All stand behind one interface, so that the adapter and its stages take any of them, and keep one promise: neither
padding nor the other utterances of a batch change an utterance's frames. Weights are random until they are loaded.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..text.model_directory import dataclass_from_dict, load_part
from .conformer import Conformer, ConformerConfig, stack_frames, valid_frames
from .features import FeatureConfig
from .foreign_features import kaldi_features, whisper_features

GROUP = "herdkit.speech_encoders"


class EncoderSpec(ABC):
    """What is known of an encoder without building it; small and picklable.

    Attributes:
        width: of its frames.
        stride: feature frames of one of its frames.
        features: that it takes.
    """

    width: int
    stride: int
    features: FeatureConfig

    @abstractmethod
    def length(self, frames: int) -> int:
        """Encoder frames of an utterance of so many feature frames."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A new encoder: a module that is called with features (N, F, C), padded on the right with anything, and frames
        (N,) int64, and returns (N, T, width), zeros beyond each utterance, and the lengths (N,)."""


def encoder_spec(options: Mapping[str, Any]) -> EncoderSpec:
    """The encoder that a recipe or `config.json` describes.

    Args:
        options: `type` and its options: {"type": "torchaudio"} and the fields of `TorchaudioSpec`; {"type":
            "wav2vec2-bert" | "whisper"} and the fields of those; or a name given to `register_speech_encoder`, or
            declared in the entry-point group `herdkit.speech_encoders`, for what takes the options and returns an
            `EncoderSpec`.

    Raises:
        ValueError: no or an unknown type, or an unknown option.
    """
    values = dict(options)
    kind = values.pop("type", None)
    if kind in _SPECS:
        return dataclass_from_dict(_SPECS[kind], values, "encoder.")
    points = {point.name: point for point in entry_points(group=GROUP)}
    if kind in _registered:
        made = _registered[kind](**values)
    elif kind in points:
        made = points[kind].load()(**values)
    else:
        known = sorted({*_SPECS, *_registered, *points})
        near = difflib.get_close_matches(str(kind), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"encoder.type is {kind!r}; {hint}")
    if not isinstance(made, EncoderSpec):
        raise ValueError(f"the speech encoder {kind!r} is described by a {type(made).__name__}, no EncoderSpec")
    return made


def register_speech_encoder(name: str, make: Callable[..., EncoderSpec]) -> None:
    """Makes a kind of encoder known for this process; packages declare an entry point instead."""
    _registered[name] = make


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Loads the weights of an encoder: of a safetensors file of ours, or of a directory in the layout of transformers.

    Raises:
        ModelDirectoryError: see `load_part`. ValueError: a directory, but the encoder is not of transformers, or its
            tensors are not those of the encoder.
    """
    if path.is_dir():
        if not isinstance(encoder, HuggingFaceEncoder):
            raise ValueError(f"{path}: a directory, but {type(encoder).__name__} takes a safetensors file")
        encoder.load_pretrained(path)
    else:
        load_part(encoder, path)


@dataclass
class ConformerSpec(EncoderSpec):
    """Ours."""

    conformer: ConformerConfig
    features: FeatureConfig

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.conformer.dim

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.conformer.stack

    def length(self, frames: int) -> int:
        return self.conformer.length(frames)

    def build(self) -> Conformer:
        return Conformer(self.conformer)


@dataclass(kw_only=True)
class TorchaudioSpec(EncoderSpec):
    """`torchaudio.models.Conformer` over stacked frames of our features.

    Args:
        width, n_heads, ffn_dim, n_layers, conv_kernel, dropout: of its arguments.
        stack: mel frames of an encoder frame.
        features: that it takes.
    """

    width: int
    n_heads: int
    ffn_dim: int
    n_layers: int
    conv_kernel: int = 31
    dropout: float = 0.0
    stack: int = 4
    features: FeatureConfig = field(default_factory=FeatureConfig)

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.stack

    def length(self, frames: int) -> int:
        return -(-frames // self.stack)

    def build(self) -> nn.Module:
        return TorchaudioEncoder(self)


class TorchaudioEncoder(nn.Module):
    """torchaudio's Conformer with group norm. It lets the padding of a batch into its convolutions, so that utterances
    of each length run by themselves: exact, and slower the more lengths a batch has."""

    def __init__(self, spec: TorchaudioSpec):
        from torchaudio.models import Conformer as Model

        super().__init__()
        self.stack = spec.stack
        self.input = nn.Linear(spec.stack * spec.features.n_mels, spec.width)
        self.model = Model(
            spec.width, spec.n_heads, spec.ffn_dim, spec.n_layers, spec.conv_kernel, spec.dropout, use_group_norm=True
        )

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        stacked, lengths = stack_frames(features, frames, self.stack)
        projected = self.input(stacked)
        out = torch.zeros_like(projected)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            encoded, _ = self.model(projected[rows, :length], lengths[rows])
            out = out.index_put((rows[:, None], torch.arange(length, device=rows.device)), encoded.to(out.dtype))
        return out, lengths


@dataclass(kw_only=True)
class HuggingFaceSpec(EncoderSpec):
    """An encoder of transformers.

    Args:
        config: the fields of its configuration there that differ from their defaults.
    """

    config: dict[str, Any] = field(default_factory=dict)

    stride: ClassVar[int] = 2  # type: ignore[misc]

    @cached_property
    def configuration(self) -> Any:
        """The configuration of transformers.

        Raises:
            ModuleNotFoundError: transformers is not installed.
            ValueError: an unknown field.
        """
        made = self._configuration_class()
        default = made()
        if unknown := [name for name in self.config if not hasattr(default, name)]:
            raise ValueError(f"encoder.config.{unknown[0]}: {made.__name__} has no such field")
        return made(**self.config)

    @abstractmethod
    def _configuration_class(self) -> Any: ...


class Wav2Vec2BertSpec(HuggingFaceSpec):
    """`transformers.Wav2Vec2BertModel`: a Conformer over pairs of frames, of 20 ms."""

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.configuration.hidden_size

    @property
    def features(self) -> FeatureConfig:  # type: ignore[override]
        return kaldi_features()

    def length(self, frames: int) -> int:
        return max(frames // 2, 1)

    def _configuration_class(self) -> Any:
        return _transformers().Wav2Vec2BertConfig

    def build(self) -> HuggingFaceEncoder:
        return Wav2Vec2BertEncoder(_transformers().Wav2Vec2BertModel, self.configuration)


class WhisperSpec(HuggingFaceSpec):
    """The encoder of `transformers.WhisperModel`: frames of 20 ms, of at most 30 s, which it always fills up."""

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.configuration.d_model

    @property
    def features(self) -> FeatureConfig:  # type: ignore[override]
        return whisper_features(self.configuration.num_mel_bins)

    def length(self, frames: int) -> int:
        """
        Raises:
            ValueError: more than the encoder's positions.
        """
        # The last frames see the utterance by less than half a window; 30 s have none of those.
        most = 2 * self.configuration.max_source_positions
        if frames > most + 2:
            raise ValueError(f"{frames} frames, but the encoder of Whisper takes {most} (30 s); set max_seconds")
        return -(-min(frames, most) // 2)

    def _configuration_class(self) -> Any:
        return _transformers().WhisperConfig

    def build(self) -> HuggingFaceEncoder:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Model

        return WhisperEncoder(Model, self.configuration)


class HuggingFaceEncoder(nn.Module):
    """A model of transformers under our interface."""

    def __init__(self, model_class: Any, configuration: Any):
        super().__init__()
        # Encoders that are built without their parent leave this unset, and then ignore masks without a word.
        configuration._attn_implementation = "sdpa"
        self.model = model_class(configuration)

    def load_pretrained(self, path: Path) -> None:
        """The weights of a directory, from safetensors alone.

        Raises:
            ValueError: tensors are missing or surplus, or the directory's configuration is another one than the
                encoder's; names the first difference.
            OSError: there are none.
        """
        loaded, missing = self._read(path)
        theirs, ours = loaded.config.to_dict(), self.model.config.to_dict()
        differing = [name for name in _FUNCTION if name in ours and ours[name] != theirs.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path}: {name} is {theirs.get(name)!r} there and {ours[name]!r} in encoder.config, which must be "
                "the same"
            )
        if missing:
            raise ValueError(f"{path}: {len(missing)} tensors of the encoder are not there, the first: {missing[0]}")
        wanted, found = ({name: t.shape for name, t in m.state_dict().items()} for m in (self.model, loaded))
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                raise ValueError(f"{path}: its configuration is not that of the encoder: {name} differs")
        self.model.load_state_dict(loaded.state_dict())

    def _read(self, path: Path) -> tuple[Any, list[str]]:
        """The encoder of a directory, and which of its tensors are not there."""
        return _from_pretrained(type(self.model), path)


class Wav2Vec2BertEncoder(HuggingFaceEncoder):
    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        # As its own feature extractor, an odd last frame is left out.
        pairs, _ = stack_frames(features, frames, 2)
        lengths = (frames // 2).clamp_min(1)
        valid = valid_frames(lengths, int(lengths.max()))
        pairs = pairs[:, : valid.shape[1]].masked_fill(~valid[..., None], 0)
        encoded = self.model(input_features=pairs, attention_mask=valid.long()).last_hidden_state
        return encoded.masked_fill(~valid[..., None], 0), lengths


class WhisperEncoder(HuggingFaceEncoder):
    def _read(self, path: Path) -> tuple[Any, list[str]]:
        # A directory holds the decoder as well, and names what is the encoder's by a prefix.
        whole, missing = _from_pretrained(_transformers().WhisperModel, path)
        return whole.encoder, [name for name in missing if name.startswith("encoder.")]

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        size = 2 * self.model.config.max_source_positions
        features, frames = features[:, :size], frames.clamp_max(size)
        valid = valid_frames(frames, features.shape[1])[..., None]
        # Silence, as in Whisper's own features: 8 below the loudest, which is 2 after scaling, but at least -1.5.
        silence = features.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True).sub(2).clamp_min(-1.5)
        filled = torch.where(valid, features, silence)
        if (lacking := size - filled.shape[1]) > 0:
            filled = torch.cat((filled, silence.expand(-1, lacking, filled.shape[2])), dim=1)
        lengths = (frames + 1) // 2
        encoded = self.model(filled.transpose(1, 2)).last_hidden_state[:, : int(lengths.max())]
        return encoded.masked_fill(~valid_frames(lengths, encoded.shape[1])[..., None], 0), lengths


_FUNCTION = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "position_embeddings_type",
    "left_max_position_embeddings",
    "right_max_position_embeddings",
    "rotary_embedding_base",
    "conv_depthwise_kernel_size",
    "encoder_layers",
    "encoder_attention_heads",
    "activation_function",
    "scale_embedding",
    "max_source_positions",
    "num_mel_bins",
)
"""Of a configuration: what changes the encoder's function, some of it without changing a shape."""


def _from_pretrained(model_class: Any, path: Path) -> tuple[Any, list[str]]:
    model, found = model_class.from_pretrained(
        path, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    return model, sorted(map(str, [*found["missing_keys"], *found.get("mismatched_keys", ())]))


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this speech encoder is one of transformers: pip install transformers") from error
    return transformers


_SPECS: dict[str, type[EncoderSpec]] = {
    "torchaudio": TorchaudioSpec,
    "wav2vec2-bert": Wav2Vec2BertSpec,
    "whisper": WhisperSpec,
}
_registered: dict[str, Callable[..., EncoderSpec]] = {}
