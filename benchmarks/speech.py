"""Speech beside its peers, in turns: the encoder beside those of transformers and torchaudio, the front end beside
torchaudio's, what BEST-RQ's targets take of a training step, and transcription in multiples of real time.

    python benchmarks/speech.py [--rounds 7] [--threads 1] [--model runs/tiny-herd/model] [--only encoder]

Encoders have equal sizes (width, layers, heads, inner width, kernel) and get the same ragged batches, with the lengths
told to each as it takes them. Prints one JSON line with medians; ratios above 1 say that herdkit is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torchaudio
from herdkit.speech import BestRQ, BestRQConfig, Conformer, ConformerConfig, FeatureConfig, log_mel
from herdkit.speech.bestrq import fully_hidden, span_mask
from herdkit.speech.conformer import stack_frames, valid_frames
from torch import Tensor, nn

SIZES = {"dim": 256, "n_layers": 6, "n_heads": 4, "ffn_dim": 1024, "conv_kernel": 7}
FRAMES = torch.tensor([1600, 1120, 740, 610, 480, 350, 230, 200])
"""Mel frames of a batch: from 2 to 16 s."""


PARTS = ("encoder", "front-end", "targets", "transcription")


class Transformers(nn.Module):
    def __init__(self):
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

        super().__init__()
        config = Wav2Vec2BertConfig(
            hidden_size=SIZES["dim"],
            num_hidden_layers=SIZES["n_layers"],
            num_attention_heads=SIZES["n_heads"],
            intermediate_size=SIZES["ffn_dim"],
            conv_depthwise_kernel_size=SIZES["conv_kernel"],
            feature_projection_input_dim=320,
            position_embeddings_type="rotary",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            conformer_conv_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
        )
        config._attn_implementation = "sdpa"
        self.model = Wav2Vec2BertModel(config)

    def forward(self, features: Tensor, frames: Tensor) -> Tensor:
        stacked, lengths = stack_frames(features, frames, 4)
        mask = valid_frames(lengths, stacked.shape[1]).long()
        return self.model(input_features=stacked, attention_mask=mask).last_hidden_state


class Torchaudio(nn.Module):
    def __init__(self):
        super().__init__()
        self.input = nn.Linear(320, SIZES["dim"])
        self.model = torchaudio.models.Conformer(
            SIZES["dim"], SIZES["n_heads"], SIZES["ffn_dim"], SIZES["n_layers"], SIZES["conv_kernel"]
        )

    def forward(self, features: Tensor, frames: Tensor) -> Tensor:
        stacked, lengths = stack_frames(features, frames, 4)
        return self.model(self.input(stacked), lengths)[0]


class Herdkit(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Conformer(ConformerConfig(**SIZES))

    def forward(self, features: Tensor, frames: Tensor) -> Tensor:
        return self.model(features, frames)[0]


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    for call in calls.values():
        call()
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: median(one[name] for one in times) for name in calls}


def ratios(found: dict[str, float]) -> dict[str, Any]:
    ours = found["herdkit"]
    return {
        "seconds": {name: round(value, 5) for name, value in found.items()},
        "ratio": {name: round(value / ours, 3) for name, value in found.items() if name != "herdkit"},
    }


def encoders(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    models = {"herdkit": Herdkit(), "transformers": Transformers(), "torchaudio": Torchaudio()}
    features = torch.randn(len(FRAMES), int(FRAMES.max()), 80)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(features, FRAMES)

    def train(model: nn.Module) -> None:
        model.zero_grad()
        model(features, FRAMES).square().mean().backward()

    made: dict[str, Any] = {"parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}}
    for name, run in (("forward", forward), ("forward and backward", train)):
        made[name] = ratios(in_turns({n: lambda m=m, r=run: r(m) for n, m in models.items()}, rounds))
    return made


def front_end(rounds: int) -> dict[str, Any]:
    oracle = torchaudio.transforms.MelSpectrogram(
        sample_rate=16_000, n_fft=512, win_length=400, hop_length=160, f_min=20.0, f_max=8000.0, n_mels=80, pad=176,
        center=False,
    )  # fmt: skip
    waveforms = [torch.randn(160 * frames) for frames in FRAMES.tolist()]

    def normalised(features: Tensor) -> Tensor:
        features = features - features.mean(dim=1, keepdim=True)
        return features * torch.rsqrt(features.square().mean(dim=1, keepdim=True) + 1e-5)

    def theirs() -> None:
        for waveform in waveforms:
            normalised(oracle(waveform).clamp_min(1e-8).log())

    def ours() -> None:
        for waveform in waveforms:
            log_mel(waveform, FeatureConfig())

    return ratios(in_turns({"herdkit": ours, "torchaudio": theirs}, 5 * rounds))


def targets(rounds: int) -> dict[str, Any]:
    """The share of a BEST-RQ step (forward, backward, update) that is the search for the nearest codes."""
    made = {}
    shapes = {
        "tiny recipe": (ConformerConfig(dim=128, n_layers=4, n_heads=4, ffn_dim=384), (4, 512)),
        "49M, the paper's codebooks": (ConformerConfig(dim=512, n_layers=8, n_heads=8, ffn_dim=2048), (16, 8192)),
    }
    features = torch.randn(len(FRAMES), int(FRAMES.max()), 80)
    for name, (conformer, (books, codes)) in shapes.items():
        model = BestRQ(Conformer(conformer), BestRQConfig(n_codebooks=books, n_codes=codes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        hidden = span_mask(FRAMES, features.shape[1], 0.025, 32, generator)
        stacked, lengths = stack_frames(features, FRAMES, 4)
        chosen = stacked[fully_hidden(hidden, FRAMES, 4) & valid_frames(lengths, stacked.shape[1])]

        def step(model: BestRQ = model, optimizer: Any = optimizer) -> None:
            loss, count, _ = model(features, FRAMES, torch.Generator().manual_seed(0))
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()

        def search(model: BestRQ = model, chosen: Tensor = chosen) -> None:
            model.quantise(chosen)

        found = in_turns({"step": step, "targets": search}, max(3, rounds // 2))
        made[name] = {
            "parameters": sum(p.numel() for p in model.encoder.parameters()),
            "frames": len(chosen),
            "share": round(found["targets"] / found["step"], 4),
            "seconds": {key: round(value, 4) for key, value in found.items()},
        }
    return made


def transcription(path: str, rounds: int) -> dict[str, Any]:
    import herdkit
    from herdkit.speech.transcribe import Transcriber, TranscriptionConfig

    model = herdkit.load(path, adapters=["speech"])
    generator = torch.Generator().manual_seed(0)
    time_ = torch.arange(3 * 16_000) / 16_000
    recordings = []
    for _ in range(32):
        pitch = 110 + 60 * torch.rand(1, generator=generator)
        voice = sum(torch.sin(2 * torch.pi * k * pitch * time_) / k for k in range(1, 25))
        envelope = torch.sin(torch.pi * 5 * time_).square() + 0.02
        recordings.append(0.1 * envelope * voice + 1e-3 * torch.randn(len(time_), generator=generator))
    made: dict[str, Any] = {}
    for by in ("answer", "ctc"):
        # As many tokens as words of a sentence: what a model that does not know these sounds says has no end.
        config = TranscriptionConfig(by=by, max_new_tokens=24)  # type: ignore[arg-type]
        transcriber = Transcriber(model, config)
        found = in_turns({"herdkit": lambda t=transcriber: t(recordings)}, max(3, rounds // 2))
        made[by] = {"real_time": round(3 * len(recordings) / found["herdkit"], 1)}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="directory of a model with speech, for the speed of transcription")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(all)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "threads": options.threads}
    measures = {"encoder": encoders, "front-end": front_end, "targets": targets}
    if options.model:
        measures["transcription"] = lambda rounds: transcription(options.model, rounds)
    for name in options.only:
        if name in measures:
            result[name] = measures[name](options.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
