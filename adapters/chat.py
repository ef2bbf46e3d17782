"""Dialogs with a composed model: messages with media in, the assistant's answer out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data.dialogs import Message, parse_dialog
from ..text.cache import KVCache
from ..text.generate import Forward, KeptPrompt, generate, stream_text
from ..text.sampling import SamplingOptions
from ..text.tokenizer import Tokenizer
from .batching import DialogEncoder, Port
from .contract import ModalityBatch

if TYPE_CHECKING:
    from .compose import ComposedModel

Dialog = Sequence[Mapping[str, Any] | Message]


def reply(model: ComposedModel, messages: Dialog, **options: Any) -> str:
    """The assistant's answer to a dialog.

    Args:
        messages: `{"role": ..., "content": ...}` each; content is a string or a list of parts
            (`{"type": "text", "text": ...}`, `{"type": "image", "image": path, bytes or picture}`, ...).
        options: `seed`, and the fields of `SamplingOptions`: `max_new_tokens` (256), `temperature` (0: greedy),
            `top_k`, `top_p`, `min_p`, `stop_strings`. `kept`: a `KeptPrompt`, so that of a dialog without media only
            what has come since the last call is run.

    Raises:
        DialogError: the messages break the schema. MediaError: a medium cannot be read.
        ValueError: no adapter takes a part, the model has no tokenizer, or the dialog is too long.
    """
    return "".join(stream_reply(model, messages, **options))


def stream_reply(
    model: ComposedModel, messages: Dialog, *, kept: KeptPrompt | None = None, **options: Any
) -> Iterator[str]:
    """The same answer in pieces of whole characters, as they are generated. Errors arise at the call, not at
    the first piece."""
    prompts, inputs, tokenizer = encode_prompts(model, [messages])
    sampling, seed = _sampling(tokenizer, options)
    if kept is not None and not inputs:
        return stream_text(model.text, tokenizer, prompts[0], sampling, seed=seed, kept=kept)
    return stream_text(model.text, tokenizer, prompts[0], sampling, seed=seed, forward=decoder(model, inputs))


def reply_batch(model: ComposedModel, dialogs: Sequence[Dialog], **options: Any) -> list[str]:
    """`reply` to several dialogs at once, each as if it were alone."""
    prompts, inputs, tokenizer = encode_prompts(model, dialogs)
    sampling, seed = _sampling(tokenizer, options)
    completions = generate(
        model.text, prompts, sampling, seed=seed, tokenizer=tokenizer, forward=decoder(model, inputs)
    )
    return [completion.text(tokenizer, sampling.stop_strings) for completion in completions]


def _sampling(tokenizer: Tokenizer, options: Mapping[str, Any]) -> tuple[SamplingOptions, int | None]:
    """The options of a chat as those of the decoding loop, which end where the assistant's turn does, and the seed."""
    fields = {"stop_ids": tokenizer.stop_ids, **options}
    seed = fields.pop("seed", None)
    return SamplingOptions(**fields), seed


def encode_prompts(
    model: ComposedModel, dialogs: Sequence[Dialog]
) -> tuple[list[list[int]], dict[str, ModalityBatch], Tokenizer]:
    """Dialogs to prompt tokens that end with the assistant's open header, and the inputs that stand in them."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; give one to compose(..., tokenizer=...)")
    ports = {adapter.part: Port.of(adapter) for adapter in model.adapters.values()}
    encoder = DialogEncoder(model.tokenizer, ports)
    documents = []
    for dialog in dialogs:
        # Every type of part passes here: the encoder's error names those that the model takes.
        parsed = parse_dialog(list(dialog), "chat", {"image", "video", "audio", *ports})  # type: ignore[arg-type]
        documents.append(encoder.document(parsed, "chat", prompt=True))
    device = model.text.tok_embeddings.weight.device
    inputs = encoder.inputs([[document] for document in documents])
    return (
        [document.tokens for document in documents],
        {name: batch.to(device) for name, batch in inputs.items()},
        model.tokenizer,
    )


def decoder(model: ComposedModel, inputs: Mapping[str, ModalityBatch]) -> Forward:
    """How the decoding loop runs a composed model: the inputs come with the prompt and stay in its cache."""
    from .compose import ComposedCache

    composed: ComposedCache | None = None

    def forward(tokens: Tensor, positions: Tensor | None, cache: KVCache) -> Tensor:
        nonlocal composed
        if composed is None:
            composed = ComposedCache(cache)
            return model.hidden(tokens, inputs, cache=composed)
        return model.hidden(tokens, positions=positions, cache=composed)

    return forward
