import json

import herdkit
import pytest
import torch
from herdkit.adapters import compose
from herdkit.text import (
    RopeScaling,
    SamplingOptions,
    config_from_hf,
    config_to_hf,
    from_hf_state_dict,
    preset,
    to_hf_state_dict,
)
from herdkit.text.model_directory import ModelDirectoryError
from safetensors.torch import load_file, save_file

# As in the released config.json of Llama 3.1 8B and Llama 3.2 1B.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


class TestConfig:
    def test_released_file(self):
        assert config_from_hf(LLAMA_31_8B) == preset("8b")
        assert config_from_hf(LLAMA_31_8B | {"rope_scaling": None}).rope_scaling is None

    def test_rope_parameters(self):
        newer = {key: value for key, value in LLAMA_31_8B.items() if not key.startswith("rope_")}
        newer["rope_parameters"] = LLAMA_31_8B["rope_scaling"] | {"rope_theta": 500000.0}
        assert config_from_hf(newer) == preset("8b")
        newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
        assert config_from_hf(newer).rope_theta == 123.0

    @pytest.mark.parametrize("name", ["8b", "1b", "tiny"])
    def test_transformers_reads_ours(self, name):
        transformers = pytest.importorskip("transformers")
        config = preset(name)
        read = transformers.LlamaConfig(**config_to_hf(config)).to_dict()
        assert config_from_hf(read) == config
        for part in ("rope_parameters", "rope_scaling"):
            older_or_newer = {key: value for key, value in config_to_hf(config).items() if key != part}
            assert config_from_hf(older_or_newer) == config

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "mistral"}, "model_type"),
            ({"hidden_act": "gelu"}, "hidden_act"),
            ({"attention_bias": True}, "attention_bias"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
            ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
            ({"head_dim": 96}, "head_dim"),
            ({"hidden_size": "4096"}, "hidden_size is '4096', not a whole number"),
        ],
    )
    def test_what_llama_3_does_not_have(self, changes, message):
        with pytest.raises(ValueError, match=message):
            config_from_hf(LLAMA_31_8B | changes)

    def test_a_missing_key(self):
        with pytest.raises(ValueError, match="hidden_size is missing"):
            config_from_hf({key: value for key, value in LLAMA_31_8B.items() if key != "hidden_size"})


class TestStateDict:
    @pytest.mark.parametrize("tied", [False, True])
    def test_there_and_back(self, make_model, tied):
        model = make_model(tie_embeddings=tied, rope_scaling=RopeScaling())
        state = model.state_dict()
        hf = to_hf_state_dict(model.config, state)
        back = from_hf_state_dict(model.config, hf)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
        assert ("lm_head.weight" in hf) != tied
        moved = "model.layers.0.self_attn.{}_proj.weight"
        assert not torch.equal(hf[moved.format("k")], state["layers.0.attention.wk.weight"])
        assert torch.equal(hf[moved.format("v")], state["layers.0.attention.wv.weight"])

    def test_names_are_those_of_transformers(self, make_model, make_hf):
        model = make_model()
        expected = {name: tensor.shape for name, tensor in make_hf(model).state_dict().items()}
        found = {name: tensor.shape for name, tensor in to_hf_state_dict(model.config, model.state_dict()).items()}
        assert found == expected

    def test_a_tied_model_in_memory_has_its_head_twice(self, make_model, make_hf):
        model = make_model(tie_embeddings=True)
        in_memory = make_hf(model).state_dict()
        assert "lm_head.weight" in in_memory
        back = from_hf_state_dict(model.config, in_memory)
        assert torch.equal(back["tok_embeddings.weight"], model.tok_embeddings.weight)
        with pytest.raises(ValueError, match=r"surplus lm_head\.weight"):
            from_hf_state_dict(model.config, in_memory | {"lm_head.weight": in_memory["lm_head.weight"] + 1})

    def test_every_problem_is_named(self, make_model):
        model = make_model()
        hf = to_hf_state_dict(model.config, model.state_dict())
        del hf["model.norm.weight"], hf["model.layers.2.mlp.up_proj.weight"]
        hf["model.layers.3.mlp.up_proj.weight"] = torch.zeros(1)
        hf["lm_head.weight"] = hf["lm_head.weight"].T
        hf["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        with pytest.raises(ValueError, match="do not fit") as error:
            from_hf_state_dict(model.config, hf)
        for problem in (
            "missing model.norm.weight",
            "missing model.layers.2.mlp.up_proj.weight",
            "surplus model.layers.3.mlp.up_proj.weight",
            "lm_head.weight has shape (64, 128), expected (128, 64)",
        ):
            assert problem in str(error.value)
        assert "inv_freq" not in str(error.value)


TOKENS = torch.arange(2 * 512).reshape(2, 512) * 7 % 128
KINDS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "scaled": {"rope_scaling": RopeScaling()},
}


@torch.no_grad()
def logits(model):
    out = model.float()(TOKENS)
    return getattr(out, "logits", out)


class TestWhatTransformersSaves:
    @pytest.mark.parametrize("shard", ["50KB", "1GB"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_we_load(self, make_model, make_hf, tmp_path, kind, dtype, shard):
        hf = make_hf(make_model(dtype=dtype, **KINDS[kind]))
        hf.save_pretrained(tmp_path, max_shard_size=shard)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "50KB")
        model = herdkit.load(tmp_path).text
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        assert not model.training
        assert all(weight.requires_grad for weight in model.parameters())
        assert model.config.tie_embeddings == (kind == "tied")
        assert torch.equal(model.tok_embeddings.weight, hf.model.embed_tokens.weight)
        # Loaded anew: `hf.to(bfloat16)` rounds the rotary frequencies as well, `from_pretrained` does not.
        hf = type(hf).from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(logits(model), logits(hf), rtol=0, atol=2e-4)

    def test_another_dtype_on_request(self, make_model, make_hf, tmp_path):
        make_hf(make_model(dtype=torch.float32)).save_pretrained(tmp_path)
        model = herdkit.load(tmp_path, dtype=torch.bfloat16).text
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}

    def test_the_older_keys(self, make_model, make_hf, tmp_path):
        hf = make_hf(make_model(dtype=torch.float32, rope_scaling=RopeScaling()))
        hf.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = herdkit.load(tmp_path).text
        assert model.config.rope_scaling == RopeScaling()
        torch.testing.assert_close(logits(model), logits(hf), rtol=0, atol=2e-4)

    def test_a_tied_head_in_the_file_must_be_the_embedding(self, make_model, make_hf, tmp_path):
        make_hf(make_model(dtype=torch.float32, tie_embeddings=True)).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        for change in (0, 1):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
            save_file(tensors, tmp_path / "model.safetensors")
            if not change:
                herdkit.load(tmp_path)
                continue
            with pytest.raises(ModelDirectoryError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
                herdkit.load(tmp_path)


class TestWhatWeSave:
    @pytest.mark.parametrize("max_shard_bytes", [60_000, 10**9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_transformers_loads(self, make_model, tmp_path, kind, dtype, max_shard_bytes):
        transformers = pytest.importorskip("transformers")
        model = make_model(dtype=dtype, **KINDS[kind])
        herdkit.save(compose(model), tmp_path / "hf", "huggingface", max_shard_bytes=max_shard_bytes)
        files = sorted((tmp_path / "hf").glob("*.safetensors"))
        assert (len(files) > 2) == (max_shard_bytes == 60_000)
        assert all(file.stat().st_size < 60_000 + 4096 for file in files) == (max_shard_bytes == 60_000)
        hf, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not any(report.values())
        assert hf.dtype == dtype
        again = herdkit.load(tmp_path / "hf").text
        assert again.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        torch.testing.assert_close(logits(hf), logits(model), rtol=0, atol=2e-4)

    def test_transformers_generates_and_stops_as_we_do(self, tokenizer, make_model, tmp_path):
        transformers = pytest.importorskip("transformers")
        model = make_model(dtype=torch.float32, vocab_size=tokenizer.vocab_size)
        herdkit.save(compose(model, tokenizer), tmp_path / "hf", "huggingface")
        hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        settings = hf.generation_config
        assert (settings.bos_token_id, settings.pad_token_id) == (tokenizer.bos_id, tokenizer.pad_id)
        assert settings.eos_token_id == list(tokenizer.stop_ids)
        prompt = tokenizer.encode("some words", bos=True)
        options = SamplingOptions(max_new_tokens=30, stop_ids=tokenizer.stop_ids)
        ours = herdkit.text.generate(model, [prompt], options)[0].tokens
        theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
        assert theirs[: len(ours)] == ours

    def test_its_tokenizer(self, tokenizer, make_model, tmp_path):
        transformers = pytest.importorskip("transformers")
        model = make_model(dtype=torch.float32, vocab_size=tokenizer.vocab_size, max_seq_len=77)
        path = herdkit.save(compose(model, tokenizer), tmp_path / "hf", "huggingface")
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        text = "some words, 1234\n\n don't  "
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
        assert (theirs.bos_token_id, theirs.pad_token_id) == (tokenizer.bos_id, tokenizer.pad_id)
        assert (theirs.eos_token_id, theirs.model_max_length) == (tokenizer.eot_id, 77)
        again = herdkit.load(path).tokenizer
        assert again.encode(text) == tokenizer.encode(text)

    def test_errors(self, make_model, tmp_path):
        model = compose(make_model())
        with pytest.raises(ValueError, match="layout must be one of herdkit, huggingface, meta, not 'gguf'"):
            herdkit.save(model, tmp_path / "x", "gguf")
        with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
            herdkit.save(model, tmp_path / "x", "huggingface", max_shard_bytes=0)
        assert list(tmp_path.iterdir()) == []


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def move(path, name, to):
    index = path / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {name: to})


FIRST, SECOND = "model.embed_tokens.weight", "model-00002-of-"


class TestDamage:
    @pytest.fixture
    def path(self, make_model, tmp_path):
        model = compose(make_model(dtype=torch.float32))
        return herdkit.save(model, tmp_path / "hf", "huggingface", max_shard_bytes=100_000)

    def spoil(self, path, number, change):
        file = sorted(path.glob("model-*.safetensors"))[number]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def test_all_faults_are_named_at_once(self, path):
        self.spoil(path, 0, lambda t: t.update({"extra": torch.ones(1), FIRST: t[FIRST][1:].clone()}))
        self.spoil(path, 1, lambda t: t["model.layers.0.post_attention_layernorm.weight"].fill_(float("inf")))
        self.spoil(path, -1, lambda t: t.pop("model.norm.weight"))
        cut = sorted(path.glob("model-*.safetensors"))[2]
        cut.write_bytes(cut.read_bytes()[:-100])
        with pytest.raises(ModelDirectoryError) as error:
            herdkit.load(path)
        for fault in (
            "model-00001-of-00005.safetensors: surplus extra",
            "model-00001-of-00005.safetensors: model.embed_tokens.weight has shape (127, 64), expected (128, 64)",
            "model-00002-of-00005.safetensors: model.layers.0.post_attention_layernorm.weight holds values that are",
            "model-00003-of-00005.safetensors: not a whole safetensors file",
            "and should hold 7 tensors, model.layers.1.self_attn.v_proj.weight to",
            "model-00005-of-00005.safetensors: missing model.norm.weight",
        ):
            assert fault in str(error.value)
        assert str(error.value).count(";") == 4

    @pytest.mark.parametrize(
        "name",
        ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "..\\s.safetensors", 3, None],
    )
    def test_an_index_leads_nowhere_else(self, path, name):
        (path.parent / "secret.safetensors").write_bytes(b"x")
        move(path, FIRST, name)
        with pytest.raises(ModelDirectoryError, match="which names no safetensors file beside it"):
            herdkit.load(path)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda p: (p / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
            (lambda p: (p / "model.safetensors.index.json").write_text("{"), "index.json: not valid JSON"),
            (lambda p: (p / "model.safetensors.index.json").write_text("[]"), "holds list, not an object"),
            (
                lambda p: edit_json(p / "model.safetensors.index.json", weight_map={}),
                "'weight_map' is missing",
            ),
            (lambda p: next(p.glob("model-00002*")).unlink(), "00002-of-00005.safetensors: missing, and should hold"),
            (
                lambda p: move(p, FIRST, "model-00002-of-00005.safetensors"),
                "00001-of-00005.safetensors: surplus",
            ),
            (lambda p: edit_json(p / "config.json", model_type="mistral"), "config.json: model_type is 'mistral'"),
            (lambda p: edit_json(p / "config.json", num_hidden_layers=4), "missing model.layers.3.self_attn.q_proj"),
            (lambda p: edit_json(p / "config.json", hidden_size=128, head_dim=32), "expected"),
            (lambda p: edit_json(p / "config.json", hidden_size=10**9, head_dim=None), r"expected \(128, 1000000000\)"),
            (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        ],
    )
    def test_each_is_named(self, path, damage, message):
        damage(path)
        with pytest.raises(ModelDirectoryError, match=message):
            herdkit.load(path)

    def test_integers_are_no_weights(self, path):
        self.spoil(path, 0, lambda t: t.update({FIRST: t[FIRST].to(torch.int8)}))
        with pytest.raises(ModelDirectoryError, match=r"embed_tokens\.weight is of type torch\.int8, expected"):
            herdkit.load(path)
