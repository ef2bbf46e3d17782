"""The examination of the multilingual demo, with a model that has learned nothing; its chain runs by recipes, which are
tested to fit their stages."""

import torch
from herdkit.adapters.compose import ComposedModel
from herdkit.data.shards import Sample
from herdkit.data.synthetic.languages import DIRECTIONS, LANGUAGES, spoken
from herdkit.demos.multilingual import CHAIN, examine
from herdkit.speech import ConformerConfig, SpeechAdapter, SpeechAdapterConfig
from herdkit.text.model import Transformer, TransformerConfig
from herdkit.text.tokenizer import Tokenizer
from herdkit.train.config import load_recipe


def test_every_language_and_direction_is_examined_by_every_route():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["the red dog sleeps today . der rote hund"] * 20, 540)
    text = TransformerConfig(
        dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=24, vocab_size=tokenizer.vocab_size, max_seq_len=256
    )
    adapter = SpeechAdapterConfig(
        conformer=ConformerConfig(dim=16, n_layers=1, n_heads=2, ffn_dim=24),
        dim=16, ffn_dim=24, n_heads=2, conv_stride=3, ctc_classes=257,
    )  # fmt: skip
    model = ComposedModel(Transformer(text), tokenizer)
    model.attach(SpeechAdapter(adapter, text))
    made = spoken(["new"], 0, 0, 8, split="new")
    samples = []
    for _, key, members in made:
        sample = Sample(key, "new.tar", {"flac": members["flac"], "txt": members["txt"].encode()})
        sample.json = lambda content=members["json"]: content
        samples.append(sample)
    results = examine(model.eval(), model, samples)
    counts = {language: row["count"] for language, row in results["transcription"].items()}
    assert counts == {**dict.fromkeys(LANGUAGES, 2), "all": 8}
    for row in results["transcription"].values():
        assert all(row[name]["word_error_rate"] >= 0 for name in ("answer", "ctc_head", "ctc_only"))
    assert list(results["translation"]) == [f"{source} to {target}" for source, target in DIRECTIONS]
    assert all(set(row) == {"direct", "cascade", "written"} for row in results["translation"].values())


def test_each_link_starts_from_one_before_it():
    made = {""}
    recipes = {}
    for link in CHAIN:
        recipe = recipes[link.name] = load_recipe(link.path, link.stage.recipe, ["root=out"])
        assert getattr(recipe, "init", "").removeprefix("out/stages/").removesuffix("/model") in made
        made.add(link.name)
    assert recipes["speech-translation"].init == "out/stages/speech-transcription/model"


def test_the_ctc_only_encoder_has_the_size_the_recordings_and_the_updates_of_the_other():
    recipes = {link.name: load_recipe(link.path, link.stage.recipe, ["root=out"]) for link in CHAIN}
    alone, first, second = (recipes[f"speech-{name}"] for name in ("ctc", "transcription", "translation"))
    assert alone.adapter.conformer == first.adapter.conformer
    assert alone.data.sources == first.data.sources == second.data.sources
    assert alone.trainer.steps == first.trainer.steps + second.trainer.steps
    assert alone.trainer.batch_size == first.trainer.batch_size == second.trainer.batch_size
    assert (alone.answer_weight, alone.alignment_weight, alone.distil_weight) == (0, 0, 0)
