import math

import pytest
import torch
from herdkit.text import KVCache, RopeScaling, Transformer, TransformerConfig, ladder, preset, to_hf_state_dict
from herdkit.text.model import document_positions, rotary_turns

SCALINGS = pytest.mark.parametrize("scaling", [None, RopeScaling()], ids=["plain-rope", "llama3-rope"])


def tokens(batch, length, vocab=128, seed=0):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def scale_free(ours, theirs):
    """Largest difference in units of the oracle's standard deviation."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


class TestParityWithTransformers:
    @SCALINGS
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_logits_and_gradients_float64(self, make_model, make_hf, scaling, tied):
        model = make_model(rope_scaling=scaling, tie_embeddings=tied)
        hf = make_hf(model)
        ids = tokens(2, 512)
        ours, theirs = model(ids), hf(ids, use_cache=False).logits
        # transformers computes its norms in float32, whatever the model's dtype.
        assert scale_free(ours, theirs) < 1e-4

        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
        (ours.tanh() * weights).sum().backward()
        (theirs.tanh() * weights).sum().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        expected = dict(hf.named_parameters())
        for name, gradient in to_hf_state_dict(model.config, gradients).items():
            assert scale_free(gradient, expected[name].grad) < 1e-3, name

    @SCALINGS
    def test_logits_float32(self, make_model, make_hf, scaling):
        model = make_model(torch.float32, rope_scaling=scaling)
        ids = tokens(1, 600)
        with torch.no_grad():
            assert scale_free(model(ids), make_hf(model)(ids, use_cache=False).logits) < 1e-3

    def test_these_weights_and_lengths_show_a_missing_rope_scaling(self, make_model):
        ids = tokens(1, 512)
        with torch.no_grad():
            plain, scaled = make_model()(ids), make_model(rope_scaling=RopeScaling())(ids)
        assert scale_free(plain, scaled) > 0.1

    @SCALINGS
    def test_rotation_out_to_131072_positions(self, make_model, make_hf, scaling):
        model = make_model(dim=256, n_heads=2, n_kv_heads=1, n_layers=1, rope_scaling=scaling)
        positions = torch.cat([torch.arange(1000), torch.arange(130_072, 131_072)])
        turns = rotary_turns(model.config, positions)[:, 0]
        cos, sin = make_hf(model).model.rotary_emb(torch.zeros(1, dtype=torch.float64), positions[None])
        assert turns.shape == (2000, 64)
        torch.testing.assert_close(turns.real.double(), cos[0, :, :64], atol=1e-4, rtol=0)
        torch.testing.assert_close(turns.imag.double(), sin[0, :, :64], atol=1e-4, rtol=0)


class TestDocuments:
    LENGTHS = (7, 30, 1, 26)

    def packed(self):
        rows = [tokens(1, n, seed=i)[0] for i, n in enumerate(self.LENGTHS)]
        ids = torch.cat(rows)[None].repeat(2, 1)
        ids[1] = ids[1].flip(0)
        documents = torch.repeat_interleave(torch.arange(4), torch.tensor(self.LENGTHS))
        return ids, torch.stack([documents, documents.flip(0)])

    def test_positions_restart(self):
        documents = torch.tensor([[4, 4, 4, 0, 0, 9], [1, 2, 2, 2, 2, 2]])
        expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
        assert document_positions(documents).tolist() == expected

    def test_packed_equals_separate_rows_with_gradients(self, make_model):
        model, (ids, documents) = make_model(), self.packed()
        packed = model(ids, documents=documents)
        separate = torch.stack(
            [
                torch.cat([model(ids[row][documents[row] == d][None])[0] for d in documents[row].unique_consecutive()])
                for row in range(2)
            ]
        )
        assert scale_free(packed, separate) < 1e-10
        weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=packed.dtype)
        ours = torch.autograd.grad((packed.tanh() * weights).sum(), list(model.parameters()))
        theirs = torch.autograd.grad((separate.tanh() * weights).sum(), list(model.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            assert scale_free(a, b) < 1e-8

    def test_other_documents_leave_no_trace(self, make_model):
        model, (ids, documents) = make_model(torch.float32), self.packed()
        changed = torch.where(documents == 1, ids, (ids + 17) % 128)
        with torch.no_grad():
            before, after = model(ids, documents=documents), model(changed, documents=documents)
        assert torch.equal(before[documents == 1], after[documents == 1])
        assert not torch.equal(before[documents == 3], after[documents == 3])

    def test_not_with_a_cache(self, make_model):
        model, (ids, documents) = make_model(), self.packed()
        cache = KVCache(model.config, 2, 64, torch.float64)
        with pytest.raises(ValueError, match="documents"):
            model(ids, documents=documents, cache=cache)


class TestCache:
    LENGTHS = torch.tensor([5, 13, 1])

    @pytest.mark.parametrize("chunk", [1, 3])
    @pytest.mark.parametrize("kind", [{}, {"growing": True}, {"static": True}])
    def test_ragged_decode_equals_the_full_forward(self, make_model, chunk, kind, monkeypatch):
        monkeypatch.setattr("herdkit.text.cache.FIRST_CAPACITY", 8)
        model, ids = make_model(), tokens(3, 40)
        full = model(ids)
        cache = KVCache(model.config, 3, 40, torch.float64, **kind)
        prompt = ids[:, :13].clone()
        padding = torch.arange(13) >= self.LENGTHS[:, None]
        prompt[padding] = 99
        prefill = model(prompt, cache=cache)
        assert scale_free(prefill[~padding], full[:, :13][~padding]) < 1e-11
        for step in range(0, 24, chunk):
            positions = self.LENGTHS[:, None] + step + torch.arange(chunk)
            logits = model(ids.gather(1, positions), positions=positions, cache=cache)
            expected = full.gather(1, positions[..., None].expand(-1, -1, 128))
            assert scale_free(logits, expected) < 1e-11

    def test_prefill_with_explicit_positions_is_the_same(self, make_model):
        model, ids = make_model(), tokens(2, 9)
        caches = [KVCache(model.config, 2, 16, torch.float64) for _ in range(2)]
        plain = model(ids, cache=caches[0])
        explicit = model(ids, positions=torch.arange(9).expand(2, -1), cache=caches[1])
        torch.testing.assert_close(plain, explicit)
        torch.testing.assert_close(caches[0].keys, caches[1].keys)

    def test_beyond_its_slots(self, make_model):
        model = make_model()
        cache = KVCache(model.config, 1, 4, torch.float64)
        with pytest.raises(ValueError, match="position 4 is beyond the cache's 4 slots"):
            model(tokens(1, 5), cache=cache)
        with pytest.raises(ValueError, match="position 4"):
            model(tokens(1, 1), positions=torch.tensor([[4]]), cache=cache)


class TestForward:
    def test_causal_and_rows_independent(self, make_model):
        model, ids = make_model(), tokens(3, 20)
        changed = ids.clone()
        changed[:, 12:] = 5
        with torch.no_grad():
            full = model(ids)
            assert torch.equal(full[:, :12], model(changed)[:, :12])
            torch.testing.assert_close(full[1:2], model(ids[1:2]))

    def test_embeddings_in_place_of_tokens(self, make_model):
        model, ids = make_model(), tokens(2, 6)
        assert torch.equal(model(ids), model(embeddings=model.embed(ids)))
        assert torch.equal(model(ids), model.unembed(model.hidden(ids)))

    def test_before_layer_runs_just_before_each_layer(self, make_model):
        model, ids, seen = make_model(), tokens(2, 6), []

        def look(i, hidden):
            seen.append((i, hidden))
            return hidden

        assert torch.equal(model(ids, before_layer=look), model(ids))
        assert [i for i, _ in seen] == [0, 1, 2]
        assert torch.equal(seen[0][1], model.embed(ids))

        def restart(i, hidden):
            return model.embed(ids) if i == 2 else hidden

        last_layer_alone = make_model(n_layers=1)
        last_layer_alone.load_state_dict(
            {
                name.replace("layers.2.", "layers.0."): value
                for name, value in model.state_dict().items()
                if "layers.0." not in name and "layers.1." not in name
            }
        )
        assert torch.equal(model(ids, before_layer=restart), last_layer_alone(ids))

    def test_bfloat16_autocast_stays_near_float32(self):
        torch.manual_seed(0)
        model, ids = Transformer(preset("tiny")), tokens(2, 32)
        with torch.no_grad():
            exact = model(ids)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = model(ids)
        assert rounded.dtype == torch.bfloat16
        assert scale_free(rounded.float(), exact) < 0.1

    def test_wrong_arguments(self, make_model):
        model = make_model(max_seq_len=8)
        with pytest.raises(ValueError, match="either tokens or embeddings"):
            model()
        with pytest.raises(ValueError, match=r"9 tokens is longer than max_seq_len \(8\)"):
            model(tokens(1, 9))


class TestConstruction:
    @pytest.mark.parametrize(
        ("name", "parameters", "cache_bytes"),
        [
            ("8b", 8_030_261_248, 131_072),
            ("70b", 70_553_706_496, 327_680),
            ("405b", 405_853_388_800, 516_096),
            ("1b", 1_235_814_400, 32_768),
            ("3b", 3_212_749_824, 114_688),
        ],
    )
    def test_the_papers_sizes(self, name, parameters, cache_bytes):
        with torch.device("meta"):
            model = Transformer(preset(name))
        table = model.parameter_table()
        assert sum(weight.numel() for weight in model.parameters()) == parameters
        assert table.pop("total") == sum(table.values()) == parameters
        assert model.kv_bytes_per_token() == cache_bytes
        assert model.kv_bytes_per_token(torch.float32) == 2 * cache_bytes

    def test_the_ladder_is_what_its_names_say(self):
        units = {"m": 1e6, "b": 1e9}
        for name, config in ladder().items():
            with torch.device("meta"):
                table = Transformer(config).parameter_table()
            size = name.removeprefix("ladder-")
            inner = table["total"] - table["embeddings"] - table["output"]
            assert inner == pytest.approx(float(size[:-1]) * units[size[-1]], rel=0.03), name

    def test_compute_of_the_paper(self):
        with torch.device("meta"):
            model = Transformer(preset("405b"))
        # Section 3.2.1: 3.8e25 operations over 15.6T tokens (6 N D, which leaves attention out).
        assert 3 * 15.6e12 * model.flops_per_token(0) == pytest.approx(3.8e25, rel=0.01)
        per_layer = 2 * 2 * 16_384 * 4096
        assert model.flops_per_token(4096) - model.flops_per_token(0) == 126 * per_layer

    def test_runs_on_the_meta_device(self):
        with torch.device("meta"):
            model = Transformer(preset("70b"))
            logits = model(torch.zeros(2, 64, dtype=torch.int64))
        assert logits.shape == (2, 64, 128_256)
        assert logits.is_meta

    def test_materialised_from_the_meta_device(self, make_model):
        config = make_model().config
        with torch.device("meta"):
            model = Transformer(config)
        model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(3))
        expected = Transformer(config)
        expected.init_weights(torch.Generator().manual_seed(3))
        ids = tokens(1, 5)
        assert torch.equal(model(ids), expected(ids))
        assert not list(model.buffers())

    def test_metas_parameter_names(self, make_model):
        names = {name for name, _ in make_model(n_layers=1).named_parameters()}
        layer = {"attention_norm", "ffn_norm", *(f"attention.w{x}" for x in "qkvo")}
        layer |= {f"feed_forward.w{i}" for i in (1, 2, 3)}
        assert names == {f"{name}.weight" for name in ("tok_embeddings", "norm", "output")} | {
            f"layers.0.{name}.weight" for name in layer
        }
        tied = {name for name, _ in make_model(n_layers=1, tie_embeddings=True).named_parameters()}
        assert names - tied == {"output.weight"}

    def test_initial_weights(self):
        torch.manual_seed(0)
        model = Transformer(preset("tiny"))
        layer = model.layers[3]
        # Cut at three deviations, a normal distribution has 0.987 of its own deviation.
        for weight in (layer.attention.wq, layer.attention.wv, layer.feed_forward.w1, layer.feed_forward.w3):
            assert weight.weight.std().item() * weight.in_features**0.5 == pytest.approx(0.987, rel=0.05)
        for weight in (layer.attention.wo, layer.feed_forward.w2):
            scaled = weight.weight.std().item() * math.sqrt(12 * weight.in_features)
            assert scaled == pytest.approx(0.987, rel=0.05)
        # Its logits have about unit variance, which costs an untrained model about half a nat.
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(
                model(tokens(2, 64)).flatten(0, 1), tokens(2, 64, seed=1).flatten()
            )
        assert loss.item() == pytest.approx(math.log(model.config.vocab_size) + 0.5, abs=0.3)

    @pytest.mark.parametrize(
        ("field", "value"), [("n_heads", 5), ("n_kv_heads", 3), ("n_layers", 0), ("vocab_size", -1)]
    )
    def test_impossible_sizes_name_the_field(self, field, value):
        sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 128}
        with pytest.raises(ValueError, match=field):
            TransformerConfig(**(sizes | {field: value}))

    def test_unknown_preset(self):
        with pytest.raises(ValueError, match="no preset '7b'"):
            preset("7b")
