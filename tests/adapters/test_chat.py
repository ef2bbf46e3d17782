"""Turns of a conversation, with and without what the last one left."""

import importlib.util
from pathlib import Path

import pytest
import torch
from herdkit.adapters import compose
from herdkit.text import KeptPrompt, Tokenizer, Transformer, TransformerConfig


@pytest.fixture(scope="module")
def model():
    path = Path(__file__).parent.parent / "third_party" / "depth_adapter.py"
    spec = importlib.util.spec_from_file_location("depth_adapter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = Tokenizer.train(["how far is it two metres"], 514)
    config = TransformerConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=tokenizer.vocab_size, max_seq_len=512
    )
    torch.manual_seed(0)
    depth = module.DepthAdapter(module.DepthAdapter.config_class(), config)
    return compose(Transformer(config), tokenizer, depth=depth)


def user(text, depth=None):
    media = [] if depth is None else [{"type": "depth", "depth": depth}]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def conversation(model, kept, *turns):
    messages, answers = [], []
    for seed, turn in enumerate(turns):
        messages.append(turn)
        options = {"max_new_tokens": 8, "temperature": 1.0, "seed": seed}
        answers.append(model.chat(messages, **options, **kept))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_only_what_is_new_of_a_conversation_is_run(model, monkeypatch):
    turns = [user("how far is it"), user("is it far"), user("two")]
    expected = conversation(model, {}, *turns)
    run = []
    hidden = model.text.hidden

    def counted(*tokens, **options):
        run.append((options["embeddings"] if "embeddings" in options else tokens[0]).shape[1])
        return hidden(*tokens, **options)

    monkeypatch.setattr(model.text, "hidden", counted)
    assert conversation(model, {"kept": KeptPrompt()}, *turns) == expected
    once = sum(run)
    run.clear()
    assert conversation(model, {}, *turns) == expected
    assert once < 0.7 * sum(run)


def test_with_media_the_whole_prompt_is_run(model):
    turns = [user("how far"), user("how far", "1 2 3"), user("how far", "900 -800"), user("two")]
    assert conversation(model, {"kept": KeptPrompt()}, *turns) == conversation(model, {}, *turns)
