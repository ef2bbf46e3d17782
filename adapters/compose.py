"""The composed model: one language model, kept unchanged, and the adapters attached to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..text.cache import KVCache
from ..text.model import Transformer
from ..text.tokenizer import Tokenizer
from ..train.objective import Outcome
from . import chat as chatting
from .contract import Adapter, Contribution, InterleavedLayer, ModalityBatch, Placements

OF_TEXT = ("text", "embeddings")
"""What an adapter may require of the language model."""


@dataclass
class RowMemory:
    """The memory of one modality, gathered to the rows of a batch; kept in the cache while decoding.

    Args:
        layers: keys and values by text layer index, each (B, H_kv, K * M, Dh).
        entries: (B, K, M) bool, True where the entry is real.
        placements: where the inputs stand; slot: (P,) which of the K inputs of its row a placement shows.
    """

    modality: str
    layers: dict[int, tuple[Tensor, Tensor]]
    entries: Tensor
    placements: Placements
    slot: Tensor

    def mask(self, columns: Tensor) -> Tensor:
        """(B, T) columns of the token rows to (B, T, K * M) bool, True where the column sees the entry."""
        B, K, _ = self.entries.shape
        where = self.placements
        at = columns[where.row]
        hits = (where.start[:, None] <= at) & (at < where.end[:, None])
        visible = torch.zeros(B * K, columns.shape[1], dtype=torch.int32, device=columns.device)
        visible.index_add_(0, where.row * K + self.slot, hits.int())
        visible = visible.view(B, K, -1).transpose(1, 2) > 0
        return (visible[..., None] & self.entries[:, None]).flatten(2)


@dataclass
class ComposedCache:
    """What decoding keeps: the language model's keys and values and those of every memory in the rows."""

    text: KVCache
    memories: list[RowMemory] = field(default_factory=list)


class ComposedModel(nn.Module):
    """A language model with adapters. Its parameters are `text.<name>` and `<modality>.<name>`, where <name>
    is the name in the part's own checkpoint file.

    Without inputs, it runs the language model and nothing else: text-only logits are bit-identical to those
    of the bare `Transformer`, whatever is attached.
    """

    def __init__(self, text: Transformer, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.text = text
        self.tokenizer = tokenizer
        self.modalities: list[str] = []

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by modality, in the order of attachment."""
        return {name: getattr(self, name) for name in self.modalities}

    def attach(self, adapter: Adapter) -> None:
        """Adds an adapter.

        Raises:
            ValueError: its modality, placeholder or dialog part is taken, a required adapter is missing, or it
                names text layers that do not exist.
        """
        name = adapter.modality
        if not name.isidentifier() or hasattr(self, name) or name in OF_TEXT:
            raise ValueError(f"cannot attach modality {name!r}: the name is taken or no Python identifier")
        for other in self.adapters.values():
            for attribute in ("placeholder", "part"):
                if getattr(other, attribute) == getattr(adapter, attribute):
                    value = getattr(adapter, attribute)
                    raise ValueError(f"cannot attach {name!r}: {other.modality!r} has the {attribute} {value!r}")
        if missing := set(adapter.requires) - {*OF_TEXT, *self.modalities}:
            raise ValueError(f"cannot attach {name!r} before the adapters it requires: {sorted(missing)}")
        n_layers = self.text.config.n_layers
        if outside := [i for i in adapter.interleaved() if not 0 <= i < n_layers]:
            raise ValueError(f"{name!r} has layers before text layers {outside}; the text model has {n_layers}")
        self.add_module(name, adapter)
        self.modalities.append(name)

    def detach(self, modality: str) -> Adapter:
        """Removes an adapter and returns it.

        Raises:
            ValueError: nothing of that name is attached, or another adapter requires it.
        """
        if modality not in self.modalities:
            raise ValueError(f"no adapter {modality!r} is attached; there are {self.modalities}")
        if users := [name for name, other in self.adapters.items() if modality in other.requires]:
            raise ValueError(f"cannot detach {modality!r}: {users} require it")
        adapter = self.adapters[modality]
        self.modalities.remove(modality)
        delattr(self, modality)
        return adapter

    def make_cache(self, batch: int, max_len: int, dtype: torch.dtype | None = None) -> ComposedCache:
        """An empty cache for `batch` rows of at most `max_len` positions."""
        weight = self.text.tok_embeddings.weight
        cache = KVCache(self.text.config, batch, max_len, dtype=dtype or weight.dtype, device=weight.device)
        return ComposedCache(cache)

    def columns(self, length: int, device: torch.device) -> Tensor:
        """Where the positions that are run stand in their row, ascending, for rows of `length` tokens: (T,) int64."""
        return torch.arange(length, device=device)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 to (B, T, D), before anything is put in place of placeholders."""
        return self.text.embed(tokens)

    def contribution(self, modality: str, batch: ModalityBatch) -> Contribution:
        """What an adapter gives for its inputs."""
        return self.own_contribution(modality, batch)

    def own_contribution(self, modality: str, batch: ModalityBatch) -> Contribution:
        """What it gives for those of its inputs that this process runs it for, with their losses."""
        return getattr(self, modality)(batch.tensors, **self.required(modality))

    def required(self, modality: str) -> dict[str, nn.Module]:
        """The parts of the model that an adapter's `requires` names."""
        names = self.adapters[modality].requires
        return {name: self.text.tok_embeddings if name == "embeddings" else getattr(self, name) for name in names}

    def contributions(
        self, inputs: Mapping[str, ModalityBatch], known: Mapping[str, Contribution]
    ) -> dict[str, tuple[Contribution, Placements]]:
        """What all adapters give, but for those of which it is known, and where it belongs."""
        return {
            name: (known[name] if name in known else self.contribution(name, batch), batch.placements)
            for name, batch in inputs.items()
        }

    def adapter_loss(self, given: Iterable[Contribution]) -> Outcome | None:
        """The losses that adapters found by themselves, as those of no further targets; None where there are none."""
        losses = [(name, loss) for one in given for name, loss in one.losses.items()]
        if not losses:
            return None
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        for name, loss in losses:
            before = metrics.get(name, (0, 0))
            metrics[name] = (before[0] + loss.values.detach().sum(), before[1] + loss.counts.sum())
        return torch.stack([loss.weight * loss.values.sum() for _, loss in losses]).sum(), 0, metrics

    def interleaved(self, modality: str) -> Mapping[int, InterleavedLayer]:
        """The layers of a modality by the number, in `text.layers`, of the layer that each runs before."""
        return self.adapters[modality].interleaved()

    def forward(self, tokens: Tensor, inputs: Mapping[str, ModalityBatch] | None = None, **options) -> Tensor:
        """Logits (B, T, V); arguments as in `hidden_and_loss`."""
        return self.text.unembed(self.hidden(tokens, inputs, **options))

    def hidden(self, tokens: Tensor, inputs: Mapping[str, ModalityBatch] | None = None, **options) -> Tensor:
        """The hidden state after the last norm, (B, T, D); arguments as in `hidden_and_loss`."""
        return self.hidden_and_loss(tokens, inputs, **options)[0]

    def hidden_and_loss(
        self,
        tokens: Tensor,
        inputs: Mapping[str, ModalityBatch] | None = None,
        *,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: ComposedCache | None = None,
        contributions: Mapping[str, Contribution] | None = None,
    ) -> tuple[Tensor, Outcome | None]:
        """The hidden state after the last norm, (B, T, D), and `adapter_loss`; None with `embeddings`, in which the
        adapters had their part before.

        Args:
            tokens: (B, T) int64, with placeholder tokens where inputs stand.
            inputs: by modality; a modality without inputs is absent.
            embeddings: (B, T, D), in place of those of tokens and soft tokens.
            positions, documents: as in `Transformer.hidden`.
            cache: from `make_cache`, or around the `KVCache` of a decoding loop. The inputs come with the
                first call; later calls see them through the cache.
            contributions: by modality, what the adapter gave for the inputs, where that is known already; the
                adapter is then not run.

        Raises:
            ValueError: inputs of a modality that is not attached.
        """
        if unknown := set(inputs or {}) - set(self.modalities):
            raise ValueError(f"inputs of {sorted(unknown)}, but the model has {self.modalities or 'no adapters'}")
        rows = tokens.shape[0]
        columns = self.columns(tokens.shape[1], tokens.device)
        begins = embeddings is None
        if embeddings is None:
            embeddings = self.embed(tokens)
        memories = cache.memories if cache else []
        found = self.contributions(inputs or {}, contributions or {})
        for name, (given, where) in found.items():
            if begins and given.soft_tokens is not None:
                embeddings = place_soft_tokens(embeddings, given.soft_tokens, where, columns)
            if given.memory is not None:
                memories.append(gather_memory(name, self.interleaved(name), given, where, rows))

        arguments: dict[str, Any] = {"positions": positions, "documents": documents}
        arguments["cache"] = cache.text if cache else None
        if memories:
            seeing = columns.expand(rows, -1) if cache is None or positions is None else positions
            arguments["before_layer"] = self._interleave(memories, seeing)
        loss = self.adapter_loss(given for given, _ in found.values()) if begins else None
        return self.text.hidden(embeddings=embeddings, **arguments), loss

    def _interleave(self, memories: list[RowMemory], columns: Tensor):
        """The function that the language model calls before each of its layers."""
        steps: dict[int, list[tuple]] = {}
        for memory in sorted(memories, key=lambda m: (self.adapters[m.modality].order, m.modality)):
            mask = memory.mask(columns)
            seen = mask.any(-1, keepdim=True)
            mask = (mask | ~seen)[:, None]
            for i, layer in self.interleaved(memory.modality).items():
                steps.setdefault(i, []).append((layer, *memory.layers[i], mask, seen))

        def before_layer(i: int, hidden: Tensor) -> Tensor:
            for layer, keys, values, mask, seen in steps.get(i, ()):
                # Whatever a layer does, positions without memory keep their bits.
                hidden = torch.where(seen, layer(hidden, keys, values, mask), hidden)
            return hidden

        return before_layer

    def parameter_table(self) -> list[tuple[str, int, int]]:
        """(part, parameters, of them trainable) for the text and every adapter."""
        rows = []
        for name in ("text", *self.modalities):
            parameters = list(getattr(self, name).parameters())
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            rows.append((name, sum(p.numel() for p in parameters), trainable))
        return rows

    def flops_per_token(self, context: float, memory: Mapping[str, int] | None = None) -> int:
        """Floating-point operations of the forward pass for a text token: the language model's own and those
        of the interleaved layers of the modalities named in `memory`, with so many visible entries. Encoders
        are not in it: they run once an input, not once a token."""
        total = self.text.flops_per_token(context)
        for name, entries in (memory or {}).items():
            for layer in self.adapters[name].interleaved().values():
                # Keys and values are made once an input, so their projections are not a token's cost.
                weights = sum(
                    p.numel() for n, p in layer.named_parameters() if not n.endswith(("wk.weight", "wv.weight"))
                )
                total += 2 * weights + 4 * entries * self.text.config.dim
        return total

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Cache bytes of a text token, the language model's own: memories do not grow with the text."""
        return self.text.kv_bytes_per_token(dtype)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options) -> str:
        """The model's answer to a dialog; see `herdkit.adapters.chat.reply`."""
        return chatting.reply(self, messages, **options)

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **options) -> Iterator[str]:
        """The same answer in pieces, as they are generated."""
        return chatting.stream_reply(self, messages, **options)


def compose(text: Transformer, tokenizer: Tokenizer | None = None, **adapters: Adapter) -> ComposedModel:
    """One model of a language model and adapters: `compose(text=lm, image=..., speech=...)`.

    Raises:
        ValueError: a keyword differs from its adapter's modality, or see `ComposedModel.attach`.
    """
    model = ComposedModel(text, tokenizer)
    waiting = dict(adapters)
    while waiting:
        ready = [k for k, a in waiting.items() if not set(a.requires) & set(waiting)]
        if not ready:
            raise ValueError(f"adapters {sorted(waiting)} require each other in a circle")
        for keyword in ready:
            adapter = waiting.pop(keyword)
            if keyword != adapter.modality:
                raise ValueError(f"{keyword}= was given the adapter of modality {adapter.modality!r}")
            model.attach(adapter)
    return model


def place_soft_tokens(embeddings: Tensor, soft: Tensor, where: Placements, columns: Tensor) -> Tensor:
    """Puts the soft tokens (N, S, D) of each input over its placeholder positions in (B, T, D).

    Args:
        columns: (T,) int64, ascending: where the embeddings stand in their rows.

    Raises:
        ValueError: an input takes more positions than the adapter gave soft tokens.
    """
    if where.length.numel() and int(where.length.max()) > soft.shape[1]:
        raise ValueError(
            f"an input stands on {int(where.length.max())} placeholders, but its adapter gave {soft.shape[1]} "
            "soft tokens: Preparation.positions and the adapter's forward disagree"
        )
    offset = torch.arange(soft.shape[1], device=soft.device)
    placement, offset = (offset < where.length[:, None]).nonzero(as_tuple=True)
    column = where.start[placement] + offset
    at = torch.searchsorted(columns, column).clamp(max=len(columns) - 1)
    own = columns[at] == column
    placement, offset, at = placement[own], offset[own], at[own]
    return embeddings.index_put((where.row[placement], at), soft[where.input[placement], offset].to(embeddings.dtype))


def gather_memory(
    modality: str, reading: Mapping[int, InterleavedLayer], given: Contribution, where: Placements, rows: int
) -> RowMemory:
    """Projects the memory of N inputs to keys and values for the layers that read it, once each, and lays them out by
    row."""
    assert given.memory is not None
    # Many layers read the memory: in float32 their gradients add up in float32 (section 3.3.2).
    memory = given.memory.float() if given.memory.dtype in (torch.bfloat16, torch.float16) else given.memory
    N, M, _ = memory.shape
    valid = given.memory_mask
    if valid is None:
        valid = torch.ones(N, M, dtype=torch.bool, device=memory.device)

    pairs, pair = torch.unique(where.row * N + where.input, return_inverse=True)
    pair_row, pair_input = pairs // N, pairs % N
    pair_slot = torch.arange(len(pairs), device=pairs.device) - torch.searchsorted(pair_row, pair_row)
    K = int(pair_slot.max()) + 1 if len(pairs) else 1
    table = torch.zeros(rows, K, dtype=torch.int64, device=pairs.device)
    present = torch.zeros(rows, K, dtype=torch.bool, device=pairs.device)
    table[pair_row, pair_slot] = pair_input
    present[pair_row, pair_slot] = True

    def by_row(x: Tensor) -> Tensor:
        _, H, _, Dh = x.shape
        return x[table].transpose(1, 2).reshape(rows, H, K * M, Dh)

    layers = {}
    for i, layer in reading.items():
        keys, values = layer.keys_values(memory)
        layers[i] = (by_row(keys), by_row(values))
    entries = valid[table] & present[..., None]
    return RowMemory(modality, layers, entries, where, pair_slot[pair])
