import pytest
import torch
from herdkit.text import KeptPrompt, SamplingOptions, generate, stream, stream_text
from herdkit.text.compiled import compile_step

PROMPTS = [[5, 9, 77, 3, 120, 8], [4], [33, 2, 64]]
# Logits of these weights are wide; the temperature flattens them, so that the draws decide.
HOT = SamplingOptions(max_new_tokens=12, temperature=20.0, top_p=0.95)


def greedy(new, **options):
    return SamplingOptions(max_new_tokens=new, **options)


def tokens_of(completions):
    return [completion.tokens for completion in completions]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(max_seq_len=64)


class TestGreedy:
    def test_equals_transformers(self, model, make_hf):
        hf = make_hf(model)
        ours = tokens_of(generate(model, PROMPTS, greedy(24)))
        for prompt, row in zip(PROMPTS, ours, strict=True):
            ids = torch.tensor([prompt])
            out = hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
            )
            assert row == out[0, len(prompt) :].tolist()
        assert len({tuple(row) for row in ours}) == 3

    @pytest.mark.parametrize("options", [greedy(20), HOT])
    def test_a_row_is_its_own_single_run(self, model, options):
        together = generate(model, PROMPTS, options, seed=[3, 1, 4])
        for prompt, seed, row in zip(PROMPTS, [3, 1, 4], together, strict=True):
            (alone,) = generate(model, [prompt], options, seed=seed)
            assert row.tokens == alone.tokens
            assert row.log_probs == pytest.approx(alone.log_probs, rel=1e-9)

    def test_log_probs_are_those_of_the_full_forward(self, model):
        for options in (greedy(10), HOT):
            for prompt, row in zip(PROMPTS, generate(model, PROMPTS, options, seed=0), strict=True):
                logits = model(torch.tensor([prompt + row.tokens]))[0, len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
                assert row.log_probs == pytest.approx(expected.tolist(), rel=1e-9)
                assert row.log_prob == pytest.approx(expected.sum().item())

    def test_rows_end_alone_and_the_others_go_on(self, model):
        free = tokens_of(generate(model, PROMPTS, greedy(20)))
        ends = [next(token for token in free[i] if not any(token in free[j] for j in others))
                for i, others in ((0, (1, 2)), (2, (0, 1)))]  # fmt: skip
        stopped = generate(model, PROMPTS, greedy(20, stop_ids=ends))
        for i, end in zip((0, 2), ends, strict=True):
            assert stopped[i].tokens == free[i][: free[i].index(end)]
        assert stopped[1].tokens == free[1]
        assert [row.ending for row in stopped] == ["stop_token", "length", "stop_token"]

    def test_prompts_in_several_chunks(self, model, monkeypatch):
        monkeypatch.setitem(generate.__globals__, "PREFILL_TOKENS", 4)
        few = generate(model, PROMPTS, greedy(5))
        monkeypatch.undo()
        assert tokens_of(few) == tokens_of(generate(model, PROMPTS, greedy(5)))

    def test_stream_is_the_same_and_lazy(self, model):
        expected = generate(model, PROMPTS[:1], greedy(10))[0].tokens
        tokens = stream(model, PROMPTS[0], greedy(10))
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
        generate(model, PROMPTS, greedy(3))
        assert shapes == [(3, 64)] * 3

    def test_own_forward(self, model):
        calls = []

        def forward(tokens, positions, cache):
            calls.append((tokens.tolist(), positions.tolist()))
            return model.hidden(tokens, positions=positions, cache=cache)

        own = tokens_of(generate(model, PROMPTS, greedy(3), forward=forward))
        assert own == tokens_of(generate(model, PROMPTS, greedy(3)))
        assert [row[: len(p)] for row, p in zip(calls[0][0], PROMPTS, strict=True)] == PROMPTS
        assert calls[0][1] == [list(range(6))] * 3
        assert [positions for _, positions in calls[1:]] == [[[6], [1], [3]], [[7], [2], [4]]]
        assert calls[1][0] == [[row[0]] for row in own]

    def test_compiled_step(self, model):
        torch._dynamo.reset()
        step = compile_step(model, backend="eager")
        for prompts in (PROMPTS, [p[::-1] for p in PROMPTS]):
            with torch._dynamo.config.patch(error_on_recompile=True):
                given = generate(model, prompts, greedy(8), step=step)
            assert tokens_of(given) == tokens_of(generate(model, prompts, greedy(8)))

    def test_slots_are_checked(self, model):
        longest = max(map(len, PROMPTS))
        with pytest.raises(ValueError, match=f"{longest} tokens and 8 new ones exceed the {longest + 7} slots"):
            generate(model, PROMPTS, greedy(8), step=model.hidden, slots=longest + 7)
        with pytest.raises(ValueError, match="which only a step uses"):
            generate(model, PROMPTS, greedy(8), slots=100)


class TestSeeds:
    def test_draws_follow_from_the_seed_alone(self, model):
        first = tokens_of(generate(model, PROMPTS, HOT, seed=7))
        assert first == tokens_of(generate(model, PROMPTS, HOT, seed=[7, 8, 9]))
        assert first != tokens_of(generate(model, PROMPTS, HOT, seed=8))
        assert tokens_of(generate(model, PROMPTS, HOT)) != tokens_of(generate(model, PROMPTS, HOT))

    def test_samples_of_a_prompt_differ_and_do_not_depend_on_their_number(self, model):
        eight = tokens_of(generate(model, PROMPTS, HOT, samples=8, seed=7))
        assert len({tuple(row) for row in eight}) == 24
        three = tokens_of(generate(model, PROMPTS[1:2], HOT, samples=3, seed=8))
        assert three == eight[8:11]
        assert eight[::8] == tokens_of(generate(model, PROMPTS, HOT, seed=7))

    def test_samples_share_the_prompt(self, model, monkeypatch):
        shapes = []
        hidden = type(model).hidden

        def spy(self, tokens, **arguments):
            shapes.append(tuple(tokens.shape))
            cache = arguments["cache"]
            if len(shapes) > 1:
                assert [cache.prompts.keys[0].shape[0], cache.own.keys[0].shape[0]] == [3, 15]
            return hidden(self, tokens, **arguments)

        monkeypatch.setattr(type(model), "hidden", spy)
        generate(model, PROMPTS, greedy(3), samples=5)
        assert shapes == [(3, 6), (15, 1), (15, 1)]

    def test_leaves_the_global_generator_alone(self, model):
        before = torch.get_rng_state()
        generate(model, PROMPTS, HOT)
        assert torch.equal(before, torch.get_rng_state())


class TestText:
    def spell(self, model, tokenizer, text):
        """A forward after which the model says this text, byte by byte, whatever the prompt."""
        script = [token for byte in text.encode() for token in [self.byte_token(tokenizer, byte)]] + [0] * 20

        def forward(tokens, positions, cache):
            calls.append(1)
            hidden = torch.zeros(*tokens.shape, model.config.dim, dtype=torch.float64)
            return hidden + script[len(calls) - 1]

        calls = []
        return forward

    @staticmethod
    def byte_token(tokenizer, byte):
        return next(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == bytes([byte]))

    @pytest.fixture
    def speaking(self, model, monkeypatch):
        """A model whose logits are highest at the token that the hidden state names."""

        def unembed(hidden):
            return torch.nn.functional.one_hot(hidden[..., 0].long(), 1024).double()

        monkeypatch.setattr(model, "unembed", unembed)
        return model

    @pytest.mark.parametrize(
        ("said", "stops", "text"),
        [
            ("one STOP two", ["STOP"], "one "),
            ("one STO STOP two", ["STOP", "never"], "one STO "),
            ("blöd 😀 end", ["😀"], "blöd "),
            ("aab", ["ab", "aab"], ""),
            ("ababac", ["abac"], "ab"),
            ("one", ["e STOP"], "one"),
        ],
    )
    def test_stop_strings_over_several_tokens(self, speaking, tokenizer, said, stops, text):
        options = greedy(max(len(said.encode()), 1), stop_strings=stops)
        forward = self.spell(speaking, tokenizer, said)
        (row,) = generate(speaking, [[1]], options, tokenizer=tokenizer, forward=forward)
        assert row.text(tokenizer, stops) == text
        assert row.ending == ("length" if text == said else "stop_string")
        # The tokens end with the one that completed the string.
        spoken = bytes(b"".join(map(tokenizer.token_bytes, row.tokens))).decode()
        assert spoken == said[: len(spoken)]
        assert text == said or any(spoken.endswith(stop) for stop in stops)

        forward = self.spell(speaking, tokenizer, said)
        pieces = list(stream_text(speaking, tokenizer, [1], options, forward=forward))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)

    def test_pieces_come_as_soon_as_they_are_certain(self, speaking, tokenizer):
        options = greedy(9, stop_strings=["bcd"])
        pieces = stream_text(speaking, tokenizer, [1], options, forward=self.spell(speaking, tokenizer, "abcébcd😀"))
        assert list(pieces) == ["a", "bc", "é"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop_strings": "STOP"}, "stop_strings"),
        ({"stop_strings": ["a"]}, "need the tokenizer"),
        ({"max_new_tokens": 60}, "max_seq_len"),
        ({"prompts": [[1], []]}, "empty"),
        ({"samples": 0}, "samples"),
        ({"seed": [1]}, "1 seeds for 3 prompts"),
        ({"seed": -3}, "negative"),
    ],
)
def test_wrong_arguments(model, changes, message):
    arguments = {"prompts": PROMPTS} | changes
    around = {name: arguments.pop(name) for name in ("prompts", "samples", "seed") if name in arguments}
    with pytest.raises(ValueError, match=message):
        generate(model, options=SamplingOptions(**{"max_new_tokens": 4} | arguments), **around)


def test_errors_of_a_stream_arise_at_the_call(model):
    with pytest.raises(ValueError, match="empty"):
        stream(model, [], greedy(4))


def test_no_prompts(model):
    assert generate(model, []) == []


class TestKeptPrompt:
    @pytest.fixture
    def runs(self, model, monkeypatch):
        """How many tokens each call of the model ran."""
        widths = []
        hidden = model.hidden

        def counted(tokens, **options):
            widths.append(tokens.shape[1])
            return hidden(tokens, **options)

        monkeypatch.setattr(model, "hidden", counted)
        return widths

    @pytest.mark.parametrize("options", [greedy(8), HOT])
    def test_a_conversation(self, model, runs, options):
        kept, prompt = KeptPrompt(), [5, 9, 77]
        for turn in range(3):
            expected = generate(model, [prompt], options, seed=turn)[0]
            runs.clear()
            (given,) = generate(model, [prompt], options, seed=turn, kept=kept)
            assert given.tokens == expected.tokens
            torch.testing.assert_close(given.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)
            # Of the last turn's answer the last token was never run.
            assert runs == [3 if turn == 0 else 4, *[1] * (options.max_new_tokens - 1)]
            assert kept.tokens == [*prompt, *given.tokens[:-1]]
            prompt = [*prompt, *given.tokens, 7, 8 + turn, 9]

    @pytest.mark.parametrize(
        ("following", "run"), [([1, 2, 3, 4], 1), ([1, 2, 3], 1), ([1, 2, 9, 4, 5], 3), ([7, 7], 2), ([1], 1)]
    )
    def test_only_what_differs_is_run(self, model, runs, following, run):
        kept = KeptPrompt()
        generate(model, [[1, 2, 3, 4]], greedy(1), kept=kept)
        expected = tokens_of(generate(model, [following], greedy(9)))
        runs.clear()
        assert tokens_of(generate(model, [following], greedy(9), kept=kept)) == expected
        assert runs[0] == run

    def test_after_a_stream_that_was_left(self, model):
        kept = KeptPrompt()
        tokens = stream(model, [5, 9, 77], greedy(20), kept=kept)
        begun = [next(tokens) for _ in range(4)]
        assert kept.tokens == [5, 9, 77, *begun[:3]]
        prompt = [5, 9, 77, *begun, 3]
        expected = tokens_of(generate(model, [prompt], greedy(12)))
        assert tokens_of(generate(model, [prompt], greedy(12), kept=kept)) == expected

    def test_after_an_error_in_the_model(self, model, monkeypatch):
        kept = KeptPrompt()
        generate(model, [[5, 9, 77]], greedy(4), kept=kept)

        def fails(*_, **__):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as broken:
            broken.setattr(model, "hidden", fails)
            with pytest.raises(RuntimeError):
                generate(model, [[5, 9, 3, 4]], greedy(4), kept=kept)
        assert kept.tokens == [5, 9]
        expected = tokens_of(generate(model, [[5, 9, 77, 1]], greedy(4)))
        assert tokens_of(generate(model, [[5, 9, 77, 1]], greedy(4), kept=kept)) == expected

    def test_of_another_model(self, model, make_model):
        kept, other = KeptPrompt(), make_model(max_seq_len=64, seed=5)
        generate(model, PROMPTS[:1], greedy(4), kept=kept)
        assert tokens_of(generate(other, PROMPTS[:1], greedy(4), kept=kept)) == tokens_of(
            generate(other, PROMPTS[:1], greedy(4))
        )
        half = make_model(max_seq_len=64).to(torch.bfloat16)
        generate(half, PROMPTS[:1], greedy(4), kept=kept)

    def test_what_it_excludes(self, model):
        for arguments in ({"samples": 2}, {"forward": model.hidden}, {"step": model.hidden}):
            with pytest.raises(ValueError, match="kept goes with one prompt, one sample"):
                generate(model, PROMPTS[:1], kept=KeptPrompt(), **arguments)
        with pytest.raises(ValueError, match="kept goes with"):
            generate(model, PROMPTS, kept=KeptPrompt())
