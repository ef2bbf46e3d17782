import pytest
import torch
from herdkit.text import RopeScaling, config_from_hf, config_to_hf, from_hf_state_dict, preset, to_hf_state_dict

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
            "lm_head.weight is (64, 128), not (128, 64)",
        ):
            assert problem in str(error.value)
        assert "inv_freq" not in str(error.value)
