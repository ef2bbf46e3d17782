"""On every layout speech trains as in one process: what the language model answers, and what the adapter's own losses
say of the recordings, each of which one process counts."""

import io
import runpy
from functools import cache
from pathlib import Path

import pytest
import soundfile
import torch
from herdkit.adapters import compose, save
from herdkit.data.shards import ShardWriter
from herdkit.speech.finetune import SpeechObjective
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.tokenizer import Tokenizer
from herdkit.train.layout import DIMENSIONS, Layout, LayoutError
from herdkit.train.place import Place
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("layouts.py")
TWO = {
    "tensor": {"tensor": 2},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
    "shards": {"shard": 2},
}
FOUR = {
    "tensor-context": {"tensor": 2, "context": 2},
    "pipeline-tensor": {"pipeline": 2, "tensor": 2},
    "pipeline-shards": {"pipeline": 2, "schedule": "interleaved", "chunks": 2, "shard": 2},
}
KINDS = {
    "answers": {"freeze": ("text.*",)},
    "transcripts": {},
    "words": {},
    "transcripts-alone": {"freeze": ("text.*",)},
}


DIALOG = b"""{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "flac"}]},
{"role": "assistant", "content": "go left"}]}"""
LEFT_OUT = {"pipeline": 2}, "transcripts-alone"
"""A pipeline of what does not run."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    program = runpy.run_path(str(PROGRAM))

    @cache
    def find(kind):
        return program["run"](tmp_path_factory.mktemp("alone"), {}, kind=kind, accumulate=2, **KINDS[kind])

    return find


@pytest.mark.parametrize(("processes", "layouts"), [(2, TWO), (4, FOUR)])
def test_trains_as_one_process_does(finish_program, tmp_path, alone, processes, layouts):
    runs = {
        f"{name}-{kind}": {"layout": layout, "kind": kind, "accumulate": 2, **options}
        for name, layout in layouts.items()
        for kind, options in KINDS.items()
        if kind in ("transcripts", "words") or (processes == 2 and (layout, kind) != LEFT_OUT)
    }
    arguments = {"runs": runs, "run_dir": str(tmp_path / "runs"), "out": str(tmp_path / "out")}
    assert finish_program(PROGRAM, processes, **arguments) == [0] * processes
    found = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(processes)]
    for name, options in runs.items():
        require_equal([one[name] for one in found], alone(options["kind"]), name)


@pytest.fixture
def root(tmp_path):
    """What the tiny recipe reads: a language model, and recordings of noise."""
    tokenizer = Tokenizer.train(["red star go left what is two plus one . "] * 20, 540)
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "max_seq_len": 256}
    text = Transformer(TransformerConfig(vocab_size=tokenizer.vocab_size, **sizes))
    save(compose(text, tokenizer), tmp_path / "stages/text-sft/model")
    for folder in ("speech_transcripts", "spoken_questions"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        with ShardWriter(tmp_path / "data" / folder / "%06d.tar") as writer:
            for i in range(9):
                noise = 0.1 * torch.randn(16_000 + 1_600 * i, generator=torch.Generator().manual_seed(i))
                recording = io.BytesIO()
                soundfile.write(recording, noise.numpy(), 16_000, format="FLAC")
                members = {"flac": recording.getvalue(), "txt": b"red star", "json": DIALOG}
                writer.write(f"{i:03d}", members)
    return tmp_path


def test_the_tiny_recipe_trains_the_same_model_on_every_layout(finish_program, root):
    """Three recordings for two processes, masks over them, and words as soft tokens."""
    trainer = {"steps": 2, "batch_size": 3, "checkpoint_every": 2, "precision": "float32"}
    given = [f"root={root}", 'encoder_weights=""', "augment={}", "schedule.warmup_steps=0", "schedule.decay_steps=1"]
    given += [f"trainer.{key}={value}" for key, value in trainer.items()]
    runs = {"alone": "parallel={}", "without answers": "parallel={tensor: 2}"}
    runs |= {name: f"parallel={{{name}: 2}}" for name in ("tensor", "context", "pipeline")}
    runs = {
        name: {"overrides": [*given, layout, f"answer_weight={0 if name.startswith('without') else 1}"]}
        for name, layout in runs.items()
    }
    alone = {"alone": runs.pop("alone"), "alone without answers": {"overrides": [*given, "answer_weight=0"]}}
    arguments = {"run_dir": str(root / "runs"), "out": str(root / "out")}
    assert finish_program(PROGRAM, 1, runs=alone, **arguments) == [0]
    expected = torch.load(root / "out.0", weights_only=True)
    assert finish_program(PROGRAM, 2, runs=runs, **arguments) == [0, 0]
    found = torch.load(root / "out.0", weights_only=True)
    for name, metrics in found.items():
        like = "alone without answers" if name.startswith("without") else "alone"
        del metrics["gradient_sum_time"]
        assert metrics == pytest.approx(expected[like], rel=1e-5), name
        saved, wanted = (load_file(root / "runs" / run / "model/speech.safetensors") for run in (name, like))
        assert saved.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(saved[key], tensor, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("layout", "options", "problem"),
    [
        ({"pipeline": 2}, {"answer_weight": 0.0}, "parallel.pipeline: nothing to share: answer_weight 0 leaves out"),
        *(({name: 2}, {"distil_weight": 1.0}, f"parallel.{name}: distil_weight") for name in DIMENSIONS[:3]),
    ],
)
def test_what_a_layout_cannot_do_is_refused(layout, options, problem):
    place = Place()
    place.layout = Layout(**layout)
    with pytest.raises(LayoutError, match=problem):
        SpeechObjective(**options).require_fits(place)


def require_equal(found, wanted, name):
    for one in found:
        assert one["tokens"] == wanted["tokens"]
        assert one["last"]["grad_norm"] == pytest.approx(wanted["last"]["grad_norm"], rel=1e-9), name
        means = {key: value for key, value in one["mean"].items() if key != "gradient_sum_time"}
        assert means == pytest.approx(wanted["mean"], rel=1e-9), name
    for i, gradients in enumerate(wanted["updates"]):
        assert {key for one in found for key in one["updates"][i]} == gradients.keys(), (name, i)
        for one in found:
            for key, gradient in one["updates"][i].items():
                difference = (gradient - gradients[key]).abs().max().item()
                assert difference <= 1e-9 * gradients[key].abs().max().item(), (name, i, key)
