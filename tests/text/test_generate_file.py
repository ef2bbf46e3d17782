import importlib
import json

import pytest
import torch
from herdkit import cli
from herdkit.text import SamplingOptions, Transformer, TransformerConfig
from herdkit.text.compiled import compile_step
from herdkit.text.generate_file import generate_file, read_prompts
from herdkit.text.model_directory import save_text

HOT = SamplingOptions(max_new_tokens=6, temperature=5.0, top_p=0.9)
LINES = [
    {"prompt": "ab cd", "id": "first"},
    {"messages": [{"role": "user", "content": "hello there"}]},
    {"prompt": "a much longer text than all the others", "seed": 5},
    {"prompt": "x"},
    {"prompt": "ef"},
]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48, "max_seq_len": 128}
    return Transformer(TransformerConfig(vocab_size=tokenizer.vocab_size, **sizes)).double().eval()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, LINES)))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_a_prompt_in_their_order_whatever_the_batches(model, tokenizer, source, tmp_path):
    outs = []
    for batch_size in (1, 2, 16):
        outs.append(tmp_path / f"{batch_size}.jsonl")
        result = generate_file(model, tokenizer, source, outs[-1], HOT, samples=3, batch_size=batch_size)
        assert (result["prompts"], result["generated"]) == (5, 5)
    rows = read(outs[0])
    assert [row["id"] for row in rows] == ["first", 3, 5, 7, 9]
    assert all(len(row["completions"]) == 3 for row in rows)
    assert result["tokens"] == sum(c["tokens"] for row in rows for c in row["completions"])
    for other in map(read, outs[1:]):
        for row, same in zip(rows, other, strict=True):
            assert [c["text"] for c in row["completions"]] == [c["text"] for c in same["completions"]]


def test_a_compiled_step_has_one_shape_and_gives_the_same(model, tokenizer, source, tmp_path, monkeypatch):
    # The package's attribute of this name is the function.
    monkeypatch.setattr(importlib.import_module("herdkit.text.generate"), "STATIC_SLOTS", 8)
    step = compile_step(model, backend="eager")
    for samples in (1, 3):
        torch._dynamo.reset()
        plain, compiled = tmp_path / f"plain{samples}.jsonl", tmp_path / f"compiled{samples}.jsonl"
        expected = generate_file(model, tokenizer, source, plain, HOT, samples=samples, batch_size=2)
        with torch._dynamo.config.patch(error_on_recompile=True):
            given = generate_file(model, tokenizer, source, compiled, HOT, samples=samples, batch_size=2, step=step)
        assert given["tokens"] == expected["tokens"]
        for row, same in zip(read(compiled), read(plain), strict=True):
            assert row["id"] == same["id"]
            assert [c["text"] for c in row["completions"]] == [c["text"] for c in same["completions"]]
    with pytest.raises(ValueError, match="compiled = False, not True"):
        generate_file(model, tokenizer, source, plain, HOT, samples=3, batch_size=2, step=step)


def test_killed_at_any_byte_it_goes_on_to_the_same_file(model, tokenizer, source, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate_file(model, tokenizer, source, whole, HOT, batch_size=2)

    def run(stop_after=None):
        calls = []

        def spy(*arguments, **options):
            calls.append(len(arguments[1]))
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            return generate_file.__globals__["real"](*arguments, **options)

        monkeypatch.setitem(generate_file.__globals__, "real", real)
        monkeypatch.setitem(generate_file.__globals__, "generate", spy)
        generate_file(model, tokenizer, source, out, HOT, batch_size=2)
        return calls

    real = generate_file.__globals__["generate"]
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=3)
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists()
    assert len(read(partial)) == 4
    partial.write_bytes(partial.read_bytes()[:-7])
    assert run() == [2, 1]
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    assert run() == []


def test_other_settings_are_refused(model, tokenizer, source, tmp_path):
    out = tmp_path / "out.jsonl"
    generate_file(model, tokenizer, source, out, HOT)
    with pytest.raises(ValueError, match=r"out.jsonl.settings.json: was made with seed = 0, not 3; delete"):
        generate_file(model, tokenizer, source, out, HOT, seed=3)
    source.write_text("{}")
    (tmp_path / "mine.jsonl").write_text("precious")
    source.write_text('{"prompt": "a"}')
    with pytest.raises(FileExistsError, match="not made here"):
        generate_file(model, tokenizer, source, tmp_path / "mine.jsonl", HOT)
    assert (tmp_path / "mine.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "either 'prompt' or 'messages'"),
        ('{"prompt": "a", "tempreature": 1}', "unknown field 'tempreature'"),
        ('{"prompt": 3}', "prompt must be a string"),
        ('{"messages": [{"role": "nobody", "content": "a"}]}', "role must be one of"),
        ('{"prompt": "a", "seed": -1}', "seed must be"),
        ('{"prompt": "a", "id": true}', "id must be"),
        ('{"prompt": "a", "id": 1}', "the id 1 is that of line 1"),
        (json.dumps({"prompt": "word " * 200}), "exceed max_seq_len"),
    ],
)
def test_errors_name_file_and_line(model, tokenizer, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=message) as error:
        generate_file(model, tokenizer, path, tmp_path / "out.jsonl", HOT)
    assert str(error.value).startswith(f"{path}:3")
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_plain_text_is_a_prompt_a_line(tokenizer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n{two}\r\n")
    prompts = read_prompts(path, tokenizer)
    assert [(p.id, p.tokens) for p in prompts] == [
        (1, tokenizer.encode("one", bos=True)),
        (3, tokenizer.encode("{two}", bos=True)),
    ]
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"prompts.txt:2: not UTF-8"):
        read_prompts(path, tokenizer)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path, tokenizer)


def test_the_commands(model, tokenizer, source, tmp_path, capsys, monkeypatch):
    save_text(model, tokenizer, tmp_path / "model")
    out = tmp_path / "deep" / "out.jsonl"
    arguments = ["generate", tmp_path / "model", source, "--out", out, "--max-new-tokens", 5, "--temperature", 2]
    arguments += ["--top-k", 20, "--min-p", 0.01, "--samples", 2, "--draft", tmp_path / "model", "--stop", "zzz"]
    assert cli.main([str(a) for a in arguments]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["generated"] == 5
    assert len(read(out)) == 5
    assert cli.main([str(a) for a in arguments]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["generated"] == 0

    arguments = ["chat", tmp_path / "model", "--prompt", "hello", "--max-new-tokens", 4, "--top-k", 3, "--seed", 1]
    assert cli.main([str(a) for a in arguments]) == 0
    first = capsys.readouterr().out
    assert cli.main([str(a) for a in arguments]) == 0
    assert capsys.readouterr().out == first
    assert cli.main([str(a) for a in [*arguments, "--top-p", 3]]) == 1
    assert "top_p must be in (0, 1], not 3.0" in capsys.readouterr().err
