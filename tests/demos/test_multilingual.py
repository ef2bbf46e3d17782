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
    results = examine(model.eval(), samples)
    assert list(results["transcription"]) == list(LANGUAGES)
    assert all(row["count"] == 2 and row["answer"]["word_error_rate"] >= 0 for row in results["transcription"].values())
    assert list(results["translation"]) == [f"{source} to {target}" for source, target in DIRECTIONS]
    assert all(set(row) == {"direct", "cascade", "written"} for row in results["translation"].values())


def test_the_chain_is_one():
    made = ""
    for link in CHAIN:
        recipe = load_recipe(link.path, link.stage.recipe, ["root=out"])
        assert getattr(recipe, "init", "") == (made and f"out/stages/{made}/model")
        made = link.name
