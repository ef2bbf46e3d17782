"""Llama 3.2 Vision in Meta's layout, against the rules by which the release was made into Hugging Face's."""

import json
import re
from pathlib import Path

import herdkit
import mllama_models as mllama
import pytest
import torch
from herdkit.adapters import ModelDirectoryError, load_ports
from herdkit.text.tokenizer import Tokenizer
from mllama_models import IMAGES, LENGTHS, ROWS, our_logits, their_logits
from torch import Tensor

# Meta's names by Hugging Face's, as the release's conversion has them.
RENAMED = {
    r"language_model\.model\.norm\.weight": "text_model.norm.weight",
    r"language_model\.lm_head\.weight": "text_model.output.weight",
    r"multi_modal_projector\.(\w+)": r"vision_model.vision_projection.\1",
    r"vision_model\.class_embedding": "vision_model.vision_encoder.class_embedding",
    r"vision_model\.patch_embedding\.weight": "vision_model.vision_encoder.conv1._linear.weight",
    r"vision_model\.gated_positional_embedding\.embedding": "vision_model.vision_encoder.positional_embedding",
    r"vision_model\.gated_positional_embedding\.gate": "vision_model.vision_encoder.gated_positional_embedding_gate",
    r"vision_model\.layernorm_(pre|post)\.(\w+)": r"vision_model.vision_encoder.ln_\1.\2",
    r"vision_model\.(pre|post)_tile_positional_embedding\.gate": r"vision_model.vision_encoder.\1_tile_pos_embed.gate",
    r"vision_model\.(\w+)\.layers\.(\d+)\.self_attn\.(\w)_proj\.weight": (
        r"vision_model.vision_encoder.\1.resblocks.\2.attn.w\3.weight"
    ),
    r"vision_model\.(\w+)\.layers\.(\d+)\.mlp\.fc1\.(\w+)": r"vision_model.vision_encoder.\1.resblocks.\2.mlp.c_fc.\3",
    r"vision_model\.(\w+)\.layers\.(\d+)\.mlp\.fc2\.(\w+)": (
        r"vision_model.vision_encoder.\1.resblocks.\2.mlp.c_proj.\3"
    ),
    r"vision_model\.(\w+)\.layers\.(\d+)\.input_layernorm\.(\w+)": (
        r"vision_model.vision_encoder.\1.resblocks.\2.ln_1.\3"
    ),
    r"vision_model\.(\w+)\.layers\.(\d+)\.post_attention_layernorm\.(\w+)": (
        r"vision_model.vision_encoder.\1.resblocks.\2.ln_2.\3"
    ),
    r"vision_model\.global_transformer\.layers\.(\d+)\.(gate_\w+)": (
        r"vision_model.vision_encoder.global_transformer.resblocks.\1.\2"
    ),
}
LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "cross_attn.q_proj": "attention.wq",
    "cross_attn.k_proj": "attention.wk",
    "cross_attn.v_proj": "attention.wv",
    "cross_attn.o_proj": "attention.wo",
    "cross_attn.q_norm": "attention.q_norm",
    "cross_attn.k_norm": "attention.k_norm",
    "cross_attn_attn_gate": "gate_attn",
    "cross_attn_mlp_gate": "gate_ffwd",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
SECOND = r"(mlp\.c_proj|attn\.wo|attention\.wo|feed_forward\.w2)\.weight"
FIRST = (
    r"(conv1\._linear|attn\.w[qkv]|attention\.w[qkv]|mlp\.c_fc|vision_projection|feed_forward\.w[13]|tok_embeddings|"
    r"learnable_embedding|output)\.(weight|bias)"
)


def metas(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model of transformers, written with its names of files, by Meta's names; those of one file."""
    out = {}
    cross = (1, 4)
    for name, tensor in theirs.items():
        if match := re.fullmatch(r"language_model\.model\.layers\.(\d+)\.(.+?)(\.weight)?", name):
            number, part = int(match[1]), LAYER[match[2]]
            place = cross.index(number) if number in cross else number - sum(i < number for i in cross)
            stack = "cross_attention_layers" if number in cross else "layers"
            if "self_attn.q" in name or "self_attn.k" in name:
                heads = 4 if "q_proj" in name else 2
                # Halves of a head to neighbouring pairs.
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            out[f"text_model.{stack}.{place}.{part}{match[3] or ''}"] = tensor
        elif name == "language_model.model.embed_tokens.weight":
            out["text_model.tok_embeddings.weight"], out["text_model.learnable_embedding.weight"] = tensor.split(
                [600, 8]
            )
        elif "embedding.weight" in name and "tile" in name:
            stem = re.search(r"(pre|post)_tile|gated", name)[0]
            stem = stem if stem == "gated" else f"{stem}_pos_embed.embedding"
            tokens = 17 if stem == "gated" else 1
            table, found = tensor.view(9, 4, tokens, 32), torch.zeros(4, 4, tokens, 32)
            # One row of four, two by two, and one column of four have all places that are in use.
            found[0], found[:2, :2], found[:, 0] = table[4], table[6].unflatten(0, (2, 2)), table[8]
            out[f"vision_model.vision_encoder.{stem.replace('gated', 'gated_positional_embedding')}"] = found
        else:
            (pattern,) = [p for p in RENAMED if re.fullmatch(p, name)]
            tensor = tensor.flatten(1) if "patch_embedding" in name else tensor
            out[re.sub(pattern, RENAMED[pattern], name)] = tensor
    return out


def write_meta(tensors: dict[str, Tensor], path: Path, ranks: int) -> Path:
    path.mkdir()
    params = {"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 600, "multiple_of": 128}
    params |= {"ffn_dim_multiplier": 0.6, "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": False}
    params |= {"vision_chunk_size": 28, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2}
    (path / "params.json").write_text(json.dumps(params | {"vision_num_heads": 4, "vision_taps": [1, 3]}))
    for rank in range(ranks):
        shard = {}
        for name, tensor in tensors.items():
            axis = 1 if re.search(SECOND, name) else 0 if re.search(FIRST, name) else None
            shard[name] = tensor.clone() if axis is None else tensor.chunk(ranks, axis)[rank].clone()
        shard["text_model.rope.freqs"] = torch.ones(8)
        torch.save(shard, path / ("consolidated.pth" if ranks == 1 else f"consolidated.{rank:02}.pth"))
    return path


@pytest.fixture(scope="module")
def theirs():
    model = mllama.tiny()
    mllama.give_places(model)
    return model


@pytest.fixture(scope="module")
def tensors(theirs, tmp_path_factory):
    from safetensors.torch import load_file

    path = mllama.save_theirs(theirs, tmp_path_factory.mktemp("models") / "huggingface")
    return metas(load_file(path / "model.safetensors"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_in_metas_files_has_the_logits_of_transformers(theirs, tensors, tmp_path, ranks):
    ours = herdkit.load(write_meta(tensors, tmp_path / "meta", ranks))
    found, expected = our_logits(ours, ROWS, IMAGES), their_logits(mllama.by_meta(mllama_copy(theirs)), ROWS, IMAGES)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=0, atol=1e-4)
    assert ours.image.encoder.config.tile_tables == "place"


def mllama_copy(model):
    copy = mllama.tiny()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_saved_is_what_meta_has(tensors, tmp_path, ranks):
    ours = herdkit.load(write_meta(tensors, tmp_path / "meta", ranks))
    # A release lies under a directory of its own in Hugging Face's repositories.
    saved = herdkit.save(ours, tmp_path / "model" / "original", "meta", model_parallel=ranks)
    for file in (tmp_path / "meta").glob("*.pth"):
        expected, found = (torch.load(folder / file.name, weights_only=True) for folder in (tmp_path / "meta", saved))
        del expected["text_model.rope.freqs"]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            rows = 1 if "learnable" in name else None
            if "learnable" not in name or file.name in ("consolidated.pth", "consolidated.00.pth"):
                assert torch.equal(found[name][:rows], tensor[:rows]), name
    again = herdkit.load(tmp_path / "model")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_from_hugging_face_to_meta_and_back(theirs, tensors, tmp_path):
    path = mllama.save_theirs(theirs, tmp_path / "huggingface")
    ours = herdkit.load(path)
    ours.tokenizer = Tokenizer.train(["a red circle"], 600)
    saved = herdkit.save(ours, tmp_path / "meta", "meta")
    written = torch.load(saved / "consolidated.pth", weights_only=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items() if "learnable" not in name)
    assert load_ports(saved)[1][0].prepare == ours.image.prepare
    assert json.loads((saved / "params.json").read_text())["vision_num_cross_attention_layers"] == 2


def test_faults_are_named(tensors, tmp_path):
    path = write_meta(tensors | {"text_model.surplus": torch.zeros(1)}, tmp_path / "meta", 2)
    with pytest.raises(ModelDirectoryError, match=r"consolidated\.01\.pth: surplus text_model\.surplus"):
        herdkit.load(path)
    (path / "consolidated.00.pth").rename(path / "consolidated.02.pth")
    with pytest.raises(ModelDirectoryError, match=r"found \['consolidated\.01\.pth', 'consolidated\.02\.pth'\]"):
        herdkit.load(path)
    small = {name: tensor for name, tensor in tensors.items() if "tok_embeddings" not in name}
    with pytest.raises(ModelDirectoryError, match=r"params\.json: text_model\.tok_embeddings\.weight is missing"):
        herdkit.load(write_meta(small, tmp_path / "less", 1))
    model = herdkit.load(write_meta(tensors, tmp_path / "whole", 1))
    with pytest.raises(ValueError, match="model_parallel 3 does not divide"):
        herdkit.save(model, tmp_path / "three", "meta", model_parallel=3)
    model.image.encoder.mean = (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"meta\.vision: the encoder's mean and std must be CLIP's"):
        herdkit.save(model, tmp_path / "mean", "meta")
    assert not (tmp_path / "mean").exists()


def test_tables_that_differ_by_arrangement_have_no_place_in_metas_layout(tmp_path):
    model = herdkit.load(mllama.save_theirs(mllama.tiny(), tmp_path / "huggingface"))
    with pytest.raises(ValueError, match="tables of tiles differ from arrangement to arrangement"):
        herdkit.save(model, tmp_path / "meta", "meta")
