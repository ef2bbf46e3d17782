"""Files of prompts to files of completions: in batches, resumable, the result whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.dialogs import parse_dialog
from ..train.journal import Journal
from ..train.progress import ProgressLine
from .completion import Completion
from .dialog import encode_prompt
from .generate import Forward, generate, static_slots
from .model import Transformer
from .sampling import SamplingOptions
from .speculative import Speculation
from .tokenizer import Tokenizer

FIELDS = ("prompt", "messages", "id", "seed")


@dataclass
class Prompt:
    """One line of a file of prompts.

    Args:
        id: its field `id`, or the number of its line, from 1 on.
        line: that number.
        tokens: ids of the text, or of the dialog up to the assistant's open header.
        seed: its field `seed`; None where it has none.
    """

    id: str | int
    line: int
    tokens: list[int]
    seed: int | None = None


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a file. In a `.jsonl` file every line is an object with `prompt`, a text to be continued, or
    `messages`, a dialog to be answered, and perhaps `id` and `seed`. In any other file every line is a text to be
    continued. Empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the file and the line: no JSON object, a missing, unknown or ill-typed field, an id that
            occurs twice, no prompt at all.
    """
    prompts: list[Prompt] = []
    seen: dict[str | int, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error})") from error
        if not text:
            continue
        prompt = _parse(text, number, where, tokenizer) if path.suffix == ".jsonl" else None
        prompts.append(prompt or Prompt(number, number, tokenizer.encode(text, bos=True)))
        if (first := seen.setdefault(prompts[-1].id, number)) != number:
            raise ValueError(f"{where}: the id {prompts[-1].id!r} is that of line {first} already")
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return prompts


def _parse(text: str, number: int, where: str, tokenizer: Tokenizer) -> Prompt:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise ValueError(f"{where}: must be an object with either 'prompt' or 'messages'")
    if unknown := set(entry) - set(FIELDS):
        raise ValueError(f"{where}: unknown field {min(unknown)!r}; known are {', '.join(FIELDS)}")
    id, seed = entry.get("id", number), entry.get("seed")
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise ValueError(f"{where}: id must be a string or a whole number, not {id!r}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise ValueError(f"{where}: seed must be a whole number from 0 on, not {seed!r}")
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ValueError(f"{where}: prompt must be a string, not {entry['prompt']!r}")
        return Prompt(id, number, tokenizer.encode(entry["prompt"], bos=True), seed)
    tokens = encode_prompt(parse_dialog(entry["messages"], where, ()), tokenizer).tokens
    return Prompt(id, number, tokens, seed)


def generate_file(
    model: Transformer,
    tokenizer: Tokenizer,
    source: Path,
    out: Path,
    options: SamplingOptions,
    *,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    step: Forward | None = None,
    speculation: Speculation | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Continues every prompt of `source` and writes `out`: for each prompt, in their order, a line
    `{"id": ..., "completions": [{"text", "ending", "tokens", "log_prob"}, ...]}` (see `Completion`; `tokens` is their
    number).

    `out` appears when all is done. Until then finished prompts are kept in `out` + `.partial`; the same call goes on
    from there, at whatever moment it was killed, and gives the same file: the batches are those of the first call, of
    which one that was cut short is run again as a whole, since the last digits of a row depend on how many run beside
    it. A call with other settings is refused; with another `batch_size` it may differ in those digits.

    Args:
        options: its `stop_ids` are those of the tokenizer if it has none.
        samples: completions of each prompt.
        seed: a prompt on line i without a seed of its own has `seed + i`, in whatever batch it runs.
        batch_size: prompts that run together, of like length.
        step: as in `generate`; all batches have one shape then, so that it is compiled once.
        settings: what else makes the result what it is, such as the model's path; kept and compared as the rest.

    Returns: counts and rates of this call, for the command line's last line.

    Raises:
        ValueError: see `read_prompts`; a prompt is too long, which names its line; other settings than those of the
            unfinished or finished result.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    options = dataclasses.replace(options, stop_ids=tuple(options.stop_ids) or tokenizer.stop_ids)
    prompts = read_prompts(source, tokenizer)
    for prompt in prompts:
        if len(prompt.tokens) + options.max_new_tokens > model.config.max_seq_len:
            raise ValueError(
                f"{source}:{prompt.line}: {len(prompt.tokens)} tokens and {options.max_new_tokens} new ones exceed "
                f"max_seq_len ({model.config.max_seq_len})"
            )
    record = {
        "prompts": hashlib.sha256(source.read_bytes()).hexdigest(),
        "samples": samples,
        "seed": seed,
        "speculation": speculation.length if speculation else None,
        "compiled": step is not None,
        **dataclasses.asdict(options),
        **(settings or {}),
    }
    journal = Journal(out, json.loads(json.dumps(record)))
    done = journal.read()
    # Like lengths share a batch; the longest come first, so that memory fails early and the time that remains is not
    # underrated.
    ordered = sorted(prompts, key=lambda p: -len(p.tokens))
    slots = None if step is None else static_slots(len(ordered[0].tokens) + options.max_new_tokens)
    generated, tokens, started = 0, 0, time.monotonic()
    with ProgressLine("prompts", len(prompts), len(done)) as progress:
        for first in range(0, len(ordered), batch_size):
            batch = ordered[first : first + batch_size]
            if all(prompt.id in done for prompt in batch):
                continue
            run = batch if step is None else [*batch, *[batch[-1]] * (batch_size - len(batch))]
            completions = generate(
                model,
                [prompt.tokens for prompt in run],
                options,
                samples=samples,
                seed=[seed + prompt.line if prompt.seed is None else prompt.seed for prompt in run],
                tokenizer=tokenizer,
                step=step,
                slots=slots,
                speculation=speculation,
            )[: len(batch) * samples]
            lines = []
            for i, prompt in enumerate(batch):
                if prompt.id in done:
                    continue
                own = completions[i * samples : (i + 1) * samples]
                lines.append({"id": prompt.id, "completions": [_entry(c, tokenizer, options) for c in own]})
            journal.append(lines)
            done |= {line["id"]: line for line in lines}
            generated += len(lines)
            tokens += sum(len(completion.tokens) for completion in completions)
            progress.update(len(done), f"{tokens / (time.monotonic() - started):.0f} tokens/s")
    journal.finish([done[prompt.id] for prompt in prompts])
    seconds = time.monotonic() - started
    return {
        "out": str(out),
        "prompts": len(prompts),
        "generated": generated,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
    }


def _entry(completion: Completion, tokenizer: Tokenizer, options: SamplingOptions) -> dict[str, Any]:
    return {
        "text": completion.text(tokenizer, options.stop_strings),
        "ending": completion.ending,
        "tokens": len(completion.tokens),
        "log_prob": completion.log_prob,
    }
