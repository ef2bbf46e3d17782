import pytest
import torch
from herdkit.text import generate, stream
from herdkit.text.generate import sample

PROMPTS = [[5, 9, 77, 3, 120, 8], [4], [33, 2, 64]]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(max_seq_len=64)


class TestGreedy:
    def test_equals_transformers(self, model, make_hf):
        hf = make_hf(model)
        ours = generate(model, PROMPTS, max_new_tokens=24, stop_ids=())
        for prompt, row in zip(PROMPTS, ours, strict=True):
            ids = torch.tensor([prompt])
            out = hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
            )
            assert row == out[0, len(prompt) :].tolist()
        assert len({tuple(row) for row in ours}) == 3

    def test_a_row_is_its_own_single_run(self, model):
        together = generate(model, PROMPTS, max_new_tokens=20, stop_ids=())
        assert together == [generate(model, [p], max_new_tokens=20, stop_ids=())[0] for p in PROMPTS]

    def test_stops_before_the_stop_token_and_others_go_on(self, model):
        free = generate(model, PROMPTS, max_new_tokens=20, stop_ids=())
        stop = next(token for token in free[0] if token not in free[1])
        stopped = generate(model, PROMPTS, max_new_tokens=20, stop_ids=[stop])
        assert stopped[0] == free[0][: free[0].index(stop)]
        assert stopped[1] == free[1]

    def test_stream_is_the_same_and_lazy(self, model):
        expected = generate(model, PROMPTS[:1], max_new_tokens=10, stop_ids=())[0]
        tokens = stream(model, PROMPTS[0], max_new_tokens=10, stop_ids=())
        first = next(tokens)
        # The consumer between two tokens is outside inference mode and can build a graph.
        assert not torch.is_inference_mode_enabled()
        assert [first, *tokens] == expected

    def test_projects_one_position_a_row(self, model, monkeypatch):
        shapes, unembed = [], model.unembed

        def spy(hidden):
            shapes.append(tuple(hidden.shape))
            return unembed(hidden)

        monkeypatch.setattr(model, "unembed", spy)
        generate(model, PROMPTS, max_new_tokens=3, stop_ids=())
        assert shapes == [(3, 64)] * 3

    def test_own_forward(self, model):
        calls = []

        def forward(tokens, positions, cache):
            calls.append((tokens.tolist(), positions.tolist()))
            return model.hidden(tokens, positions=positions, cache=cache)

        own = generate(model, PROMPTS, max_new_tokens=3, stop_ids=(), forward=forward)
        assert own == generate(model, PROMPTS, max_new_tokens=3, stop_ids=())
        assert [row[: len(p)] for row, p in zip(calls[0][0], PROMPTS, strict=True)] == PROMPTS
        assert calls[0][1] == [list(range(6))] * 3
        assert [positions for _, positions in calls[1:]] == [[[6], [1], [3]], [[7], [2], [4]]]
        assert calls[1][0] == [[row[0]] for row in own]


class TestSampling:
    def test_top_p_keeps_what_transformers_keeps(self):
        transformers = pytest.importorskip("transformers")
        logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
        for temperature, top_p in ((1.0, 0.9), (0.6, 0.9), (1.5, 0.3), (1.0, 1.0)):
            warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
            warped = transformers.TopPLogitsWarper(top_p)(None, warped)[0]
            draws = torch.linspace(0, 1 - 1e-6, 20_000)
            rows = logits.expand(len(draws), -1)
            found = sample(rows, draws, temperature=temperature, top_p=top_p).bincount(minlength=50) / len(draws)
            # The draws are an even grid, so that the shares are the probabilities themselves.
            torch.testing.assert_close(found, warped.softmax(-1), atol=2e-4, rtol=0)

    def test_the_last_draw_is_still_among_those_kept(self):
        logits = torch.tensor([[0.0, 5.0, -torch.inf, 1.0]])
        for top_p in (0.5, 0.999, 1.0):
            token = sample(logits, torch.tensor([1 - 2**-24]), temperature=1.0, top_p=top_p)
            assert token.item() in (0, 1, 3)

    def test_a_seed_gives_the_same_rows_alone_and_together(self, model):
        # Logits of these weights are wide; the temperature flattens them, so that the draws decide.
        options = {"max_new_tokens": 12, "stop_ids": (), "temperature": 20.0, "top_p": 0.95}
        together = generate(model, PROMPTS, seed=7, **options)
        assert together == generate(model, PROMPTS, seed=7, **options)
        assert together[2] == generate(model, [PROMPTS[2]], seed=9, **options)[0]
        assert together != generate(model, PROMPTS, seed=8, **options)
        assert generate(model, PROMPTS, **options) != generate(model, PROMPTS, **options)

    def test_leaves_the_global_generator_alone(self, model):
        before = torch.get_rng_state()
        generate(model, PROMPTS, max_new_tokens=2, stop_ids=(), temperature=1.0)
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 60}, "max_seq_len"),
        ({"prompts": [[1], []]}, "empty"),
    ],
)
def test_wrong_arguments(model, changes, message):
    options = {"prompts": PROMPTS, "max_new_tokens": 4, "stop_ids": ()} | changes
    with pytest.raises(ValueError, match=message):
        generate(model, options.pop("prompts"), **options)
    with pytest.raises(ValueError, match=message):
        # At the call: nothing is drawn from the iterator.
        stream(model, [] if "prompts" in changes else PROMPTS[0], **options)


def test_no_prompts(model):
    assert generate(model, [], max_new_tokens=4, stop_ids=()) == []
