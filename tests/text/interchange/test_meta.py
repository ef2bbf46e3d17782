import json
from dataclasses import replace

import herdkit
import pytest
import torch
from herdkit.adapters import compose
from herdkit.text import RopeScaling, Tokenizer, config_from_meta, config_to_meta, preset
from herdkit.text.model_directory import ModelDirectoryError

# As in the released params.json.
RELEASED = {
    "8b": {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "70b": {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096},
    "405b": {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096},
    "1b": {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
    "3b": {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
}

# Along which axis the layers of Meta's code are split; the rest is on every rank.
AXIS = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output", "tok_embeddings"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


def write(model, path, ranks, **params):
    """Meta's files, made here without the code under test."""
    path.mkdir(parents=True)
    config = model.config
    state = model.state_dict()
    if config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"].clone()
    for rank in range(ranks):
        shard = {}
        for name, tensor in state.items():
            axis = AXIS.get(name.split(".")[-2])
            shard[name] = tensor if axis is None else tensor.chunk(ranks, axis)[rank].clone()
        torch.save(shard, path / f"consolidated.{rank:02}.pth")
    content = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "multiple_of": 1}
    content |= {"n_kv_heads": config.n_kv_heads, "ffn_dim_multiplier": (config.ffn_dim + 0.1) / int(8 * config.dim / 3)}
    content |= {"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": config.rope_scaling is not None}
    (path / "params.json").write_text(json.dumps(content | params))


def same(model, other):
    assert model.config == other.config
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


class TestConfig:
    @pytest.mark.parametrize("name", RELEASED)
    def test_released_files(self, name):
        params = RELEASED["8b"] | RELEASED[name]
        tied = name in ("1b", "3b")
        assert config_from_meta(params, vocab_size=5, tie_embeddings=tied) == preset(name)
        for unknown in ({"vocab_size": -1}, {"vocab_size": None}):
            assert config_from_meta(params | unknown, vocab_size=128256, tie_embeddings=tied) == preset(name)
        written = config_to_meta(preset(name))
        assert written.keys() == params.keys()
        assert config_from_meta(written, vocab_size=5, tie_embeddings=tied) == preset(name)

    @pytest.mark.parametrize("ffn_dim", [1, 7, 512, 13_573, 53_248])
    def test_every_inner_width_can_be_said(self, make_model, ffn_dim):
        config = make_model(max_seq_len=77, rope_scaling=RopeScaling(factor=3.0)).config
        config.ffn_dim = ffn_dim
        assert config_from_meta(config_to_meta(config), vocab_size=5, tie_embeddings=False) == config

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"dim": None}, "dim is None"), ({"n_layers": "2"}, "n_layers is '2'"), ({"dim": 4095}, "even multiple")],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ValueError, match=message):
            config_from_meta(RELEASED["8b"] | changes, vocab_size=5, tie_embeddings=False)
        params = {key: value for key, value in RELEASED["8b"].items() if key != "n_heads"}
        with pytest.raises(ValueError, match="n_heads is missing"):
            config_from_meta(params, vocab_size=5, tie_embeddings=False)
        with pytest.raises(ValueError, match="rope_scaling by its factor alone"):
            config_to_meta(replace(preset("8b"), rope_scaling=RopeScaling(low_freq_factor=2)))


class TestLoad:
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize(
        "kind", [{}, {"tie_embeddings": True}, {"rope_scaling": RopeScaling(), "max_seq_len": 131_072}]
    )
    def test_any_number_of_files(self, make_model, tmp_path, ranks, kind):
        model = make_model(dtype=torch.bfloat16, n_kv_heads=4, **kind)
        write(model, tmp_path / "model", ranks)
        loaded = herdkit.load(tmp_path / "model").text
        assert same(loaded, model)
        assert loaded.norm.weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("vocab", [{}, {"vocab_size": -1}, {"vocab_size": 128}])
    def test_the_vocabulary_and_the_folder_original(self, make_model, tmp_path, vocab):
        model = make_model()
        write(model, tmp_path / "hub" / "original", 2, **vocab)
        assert same(herdkit.load(tmp_path / "hub").text, model)

    def test_more_files_than_key_value_heads(self, make_model, tmp_path):
        """Every head is on two ranks; params.json may count it once or twice."""
        model = make_model(n_kv_heads=2)
        doubled = make_model(n_kv_heads=4)
        doubled.load_state_dict(model.state_dict() | {
            name: tensor.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
            for name, tensor in model.state_dict().items()
            if name.endswith(("wk.weight", "wv.weight"))
        })  # fmt: skip
        write(doubled, tmp_path / "twice", 4)
        write(doubled, tmp_path / "once", 4, n_kv_heads=2)
        assert same(herdkit.load(tmp_path / "twice").text, doubled)
        assert same(herdkit.load(tmp_path / "once").text, model)
        tokens = torch.arange(600)[None] * 11 % 128
        torch.testing.assert_close(doubled(tokens), model(tokens))
        file = tmp_path / "once" / "consolidated.03.pth"
        shard = torch.load(file)
        shard["layers.1.attention.wv.weight"][0, 0] += 1
        torch.save(shard, file)
        with pytest.raises(ModelDirectoryError, match=r"03\.pth: layers\.1\.attention\.wv\.weight differs from "):
            herdkit.load(tmp_path / "once")

    def test_all_faults_are_named_at_once(self, make_model, tmp_path):
        path = tmp_path / "model"
        write(make_model(n_kv_heads=4), path, 4)
        shards = [torch.load(path / f"consolidated.{i:02}.pth") for i in range(2)]
        del shards[0]["norm.weight"]
        shards[0]["extra"] = torch.ones(1)
        shards[1]["layers.0.feed_forward.w2.weight"] = torch.ones(64, 96)
        shards[1]["layers.2.attention.wo.weight"][3, 3] = float("nan")
        for i, shard in enumerate(shards):
            torch.save(shard, path / f"consolidated.{i:02}.pth")
        (path / "consolidated.02.pth").write_bytes(b"x")
        with pytest.raises(ModelDirectoryError) as error:
            herdkit.load(path)
        for fault in (
            "consolidated.00.pth: missing norm.weight",
            "consolidated.00.pth: surplus extra",
            "consolidated.01.pth: layers.0.feed_forward.w2.weight has shape (64, 96), expected (64, 24)",
            "consolidated.01.pth: layers.2.attention.wo.weight holds values that are not finite",
            "consolidated.02.pth: not a whole PyTorch file of tensors alone",
        ):
            assert fault in str(error.value)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda p: (p / "consolidated.00.pth").unlink(), r"expected consolidated\.00\.pth and so on, found"),
            (lambda p: (p / "consolidated.01.pth").write_bytes(b"x"), r"01\.pth: not a whole PyTorch file"),
            (lambda p: (p / "params.json").write_text("{}"), r"params\.json: dim is missing"),
            (lambda p: (p / "tokenizer.model").write_bytes(b"\n\x0a\x05"), r"tokenizer\.model: line 1 .*SentencePiece"),
            (lambda p: (p / "params.json").unlink(), "no config.json in it and no params.json"),
        ],
    )
    def test_damage_is_named(self, make_model, tmp_path, damage, message):
        write(make_model(), tmp_path / "model", 2)
        damage(tmp_path / "model")
        with pytest.raises(ModelDirectoryError, match=message):
            herdkit.load(tmp_path / "model")


class TestSave:
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    @pytest.mark.parametrize("tied", [False, True])
    def test_files_join_to_the_model(self, make_model, tokenizer, tmp_path, ranks, tied):
        model = make_model(n_kv_heads=4, vocab_size=1024, tie_embeddings=tied, max_seq_len=99)
        path = herdkit.save(compose(model, tokenizer), tmp_path / "meta", "meta", model_parallel=ranks)
        shards = [torch.load(path / f"consolidated.{i:02}.pth", weights_only=True) for i in range(ranks)]
        expected = dict(model.state_dict())
        if tied:
            expected["output.weight"] = expected["tok_embeddings.weight"]
        assert all(shard.keys() == expected.keys() for shard in shards)
        for name, tensor in expected.items():
            axis = AXIS.get(name.split(".")[-2])
            pieces = [shard[name] for shard in shards]
            whole = torch.cat(pieces, axis) if axis is not None else pieces[-1]
            assert torch.equal(whole, tensor), name
        sizes = sum(file.stat().st_size for file in path.glob("*.pth"))
        assert sizes < 1.2 * sum(weight.nbytes for weight in model.parameters()) + ranks * 8000
        loaded = herdkit.load(path)
        assert same(loaded.text, model)
        assert isinstance(loaded.tokenizer, Tokenizer)
        assert loaded.tokenizer.encode("some words") == tokenizer.encode("some words")

    def test_more_ranks_than_key_value_heads(self, make_model, tmp_path):
        model = make_model(n_kv_heads=2)
        path = herdkit.save(compose(model), tmp_path / "meta", "meta", model_parallel=4)
        loaded = herdkit.load(path).text
        assert loaded.config.n_kv_heads == 4
        tokens = torch.arange(600)[None] * 11 % 128
        torch.testing.assert_close(loaded(tokens), model(tokens))

    @pytest.mark.parametrize("ranks", [0, 3, 5])
    def test_errors_leave_nothing(self, make_model, tmp_path, ranks):
        with pytest.raises(ValueError, match=f"model_parallel .*{ranks}"):
            herdkit.save(compose(make_model()), tmp_path / "meta", "meta", model_parallel=ranks)
        assert list(tmp_path.iterdir()) == []
