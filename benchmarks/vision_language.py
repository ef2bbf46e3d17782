"""A composed model with images and transformers' mllama with the same weights: the forward pass over images and text,
on images that fill one of four tiles and on images that fill all, and greedy decoding with an image, also with int8
weights. In turns in one process.

    OMP_PROC_BIND=true python benchmarks/vision_language.py [--threads 2] [--rounds 5]

Ratios are theirs / ours, medians over rounds: above 1 where ours is faster. The encoder is run in both declared
behaviours: "clean", where tiles that an image does not fill cost nothing, and "released", where they are run along as
the released weights expect. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import herdkit
import torch
from herdkit.adapters import ComposedModel, ModalityBatch, Placements
from herdkit.adapters.chat import decoder
from herdkit.adapters.quantisation import quantise
from herdkit.text import SamplingOptions, generate
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_mllama import get_all_supported_aspect_ratios

VOCAB = 8192


def theirs(tile: int) -> MllamaForConditionalGeneration:
    config = MllamaConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 512, "num_hidden_layers": 15, "num_attention_heads": 8,
            "num_key_value_heads": 4, "intermediate_size": 1536, "cross_attention_layers": [3, 8, 13],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "pad_token_id": None,
        },
        vision_config={
            "image_size": tile, "patch_size": 14, "hidden_size": 320, "intermediate_size": 1280, "attention_heads": 4,
            "num_hidden_layers": 8, "num_global_layers": 2, "intermediate_layers_indices": [1, 3, 5],
            "vision_output_dim": 1280, "max_num_tiles": 4,
            "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(4)],
        },
        image_token_index=VOCAB,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name and p.numel() == 1:
                p.fill_(0.5)
    return model


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"


def seconds(run: Callable[[], object]) -> float:
    start = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - start


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--text", type=int, default=192, help="tokens of text; the paper's mean (%(default)s)")
    parser.add_argument("--tile", type=int, default=224, help="side of a tile in pixels (%(default)s)")
    parser.add_argument("--new", type=int, default=16, help="tokens decoded (%(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default=clock, help="cpu: beside other work (%(default)s)")
    options = parser.parse_args()
    clock = options.clock
    torch.set_num_threads(options.threads)
    model = theirs(options.tile)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours, small = herdkit.load(Path(folder)), quantise(herdkit.load(Path(folder)))
    B, T = options.batch, options.text
    tokens = torch.randint(0, VOCAB, (B, T))
    tokens[:, 0] = VOCAB
    where = Placements(
        torch.arange(B), torch.zeros(B, dtype=torch.int64), torch.ones(B, dtype=torch.int64),
        torch.full((B,), 10**9), torch.arange(B),
    )  # fmt: skip
    result: dict = {
        "threads": options.threads,
        "clock": clock,
        "torch": torch.__version__,
        "batch": B,
        "text_tokens": T,
    }
    for name, (rows, columns), number in (("one_of_four_tiles", (1, 1), 1), ("four_tiles", (2, 2), 6)):
        count = rows * columns
        pixels = torch.randn(B, 1, 4, 3, options.tile, options.tile)
        pixels[:, :, count:] = 0
        real = torch.arange(4) < count
        given = {
            "pixel_values": pixels,
            "aspect_ratio_ids": torch.full((B, 1), number),
            "aspect_ratio_mask": real.long().expand(B, 1, 4),
        }
        batch = {"tiles": pixels[:, 0, :count], "n_tiles": torch.full((B,), count)}
        batch["grid"] = torch.tensor([[rows, columns]] * B)
        inputs = {"image": ModalityBatch(batch, where)}
        mask = real.long().expand(B, T, 1, 4)
        text = torch.where(tokens == VOCAB, 0, tokens)

        @torch.inference_mode()
        def hf(given=given, mask=mask) -> torch.Tensor:
            return model(input_ids=tokens, cross_attention_mask=mask, **given).logits

        @torch.inference_mode()
        def here(padding: str, text=text, inputs=inputs) -> torch.Tensor:
            ours.image.change_encoder(padding=padding)
            return ours(text, inputs)

        ways = {
            "transformers": hf,
            "clean": lambda here=here: here("clean"),
            "released": lambda here=here: here("released"),
        }
        result[name] = compare(ways, options.rounds)

        @torch.inference_mode()
        def hf_decode(new: int, given=given, mask=mask) -> torch.Tensor:
            return model.generate(
                input_ids=tokens, cross_attention_mask=mask, **given, max_new_tokens=new, min_new_tokens=new,
                do_sample=False,
            )  # fmt: skip

        def our_decode(new: int, model: ComposedModel, text=text, inputs=inputs) -> list:
            model.image.change_encoder(padding="clean")
            prompts = text.tolist()
            options_ = SamplingOptions(max_new_tokens=new)
            return generate(model.text, prompts, options_, forward=decoder(model, inputs))

        decoders = {
            "transformers": hf_decode,
            "here": lambda new, our_decode=our_decode: our_decode(new, ours),
            "int8": lambda new, our_decode=our_decode: our_decode(new, small),
        }
        times: dict[str, list[float]] = {way: [] for way in decoders}
        whole: dict[str, list[float]] = {way: [] for way in decoders}
        for run in decoders.values():
            run(2)
        for _ in range(options.rounds):
            for way, run in decoders.items():
                first, all_of = seconds(lambda run=run: run(1)), seconds(lambda run=run: run(1 + options.new))
                times[way].append(max(all_of - first, 1e-9))
                whole[way].append(all_of)
        result[name]["decoding_tokens_per_second"] = {
            way: round(B * options.new / median(own), 1) for way, own in times.items()
        }
        for way in ("here", "int8"):
            kind = "" if way == "here" else f"_{way}"
            result[name][f"decoding_ratio{kind}"] = ratio(times["transformers"], times[way])
            result[name][f"prompt_and_decoding_ratio{kind}"] = ratio(whole["transformers"], whole[way])
    print(json.dumps(result))


def compare(ways: dict[str, Callable[[], object]], rounds: int) -> dict:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            times[name].append(seconds(run))
    found: dict = {"forward_seconds": {name: round(median(own), 4) for name, own in times.items()}}
    for name in ("clean", "released"):
        found[f"forward_ratio_{name}"] = ratio(times["transformers"], times[name])
    return found


def ratio(theirs: list[float], ours: list[float]) -> float:
    return round(median(a / b for a, b in zip(theirs, ours, strict=True)), 3)


if __name__ == "__main__":
    main()
