"""How a layout cuts the language model (section 3.3.2): which layers a stage has, and what a process stores."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..train.layout import Layout, LayoutError, ParallelConfig
from .model import TransformerConfig


class Stage(NamedTuple):
    """A stage of the pipeline: its layers, and whether it begins with the embedding or ends with norm and output. Tied
    embeddings are in both."""

    layers: range
    embedding: bool = False
    output: bool = False


class Weight(NamedTuple):
    """A matrix or vector: its shape, and the dimension that `tensor` divides, None where all hold the whole."""

    shape: tuple[int, ...]
    divided: int | None = None


def stages(config: TransformerConfig, parallel: ParallelConfig) -> list[Stage]:
    """All stages in order; process p of the pipeline has every `pipeline`-th from p on.

    Embedding and output count as a layer each, so that the first and the last stage have one layer fewer (126 + 2 =
    16 x 8); where that does not come out even, the stages between have one more.

    Raises:
        LayoutError: more stages than layers + 2.
    """
    count = parallel.pipeline * parallel.chunks
    if count == 1:
        return [Stage(range(config.n_layers), embedding=True, output=True)]
    slots = config.n_layers + 2
    if slots < count:
        raise LayoutError(
            "pipeline",
            f"pipeline x chunks = {parallel.pipeline} x {parallel.chunks} = {count} stages are more than "
            f"n_layers + 2 = {config.n_layers} + 2 = {slots}",
        )
    sizes = [slots // count] * count
    for stage in [*range(1, count - 1), 0, count - 1][: slots % count]:
        sizes[stage] += 1
    sizes[0] -= 1
    sizes[-1] -= 1
    made, start = [], 0
    for i, size in enumerate(sizes):
        made.append(Stage(range(start, start + size), embedding=i == 0, output=i == count - 1))
        start += size
    return made


class Share(NamedTuple):
    """What one process of the pipeline has.

    Args:
        stages: its own. layers: in all of them. embedding, output: whether they are among them.
        stored: elements of weights that it keeps, of the process that keeps most: `fully_shard` gives out whole rows.
        gathered: elements of weights, once the processes that share the storage have gathered them.
        unit: the largest that is gathered at once, of a layer, embedding or output.
    """

    stages: list[Stage]
    layers: int
    embedding: bool
    output: bool
    stored: int
    gathered: int
    unit: int


def shares(config: TransformerConfig, parallel: ParallelConfig, layout: Layout) -> dict[int, Share]:
    """The share of each process of the pipeline, by its place there, without those whose layers and ends equal those of
    one before: what holds for these holds for all, and the earlier one has more passes in flight.

    Raises:
        LayoutError: see `stages`.
    """

    def gathered(weight: Weight) -> int:
        return math.prod(weight.shape) // (1 if weight.divided is None else layout.tensor)

    def stored(weight: Weight) -> int:
        rows = weight.shape[0] // (layout.tensor if weight.divided == 0 else 1)
        return gathered(weight) // rows * math.ceil(rows / layout.storage)

    layer_stored = sum(map(stored, layer_weights(config).values()))
    layer_gathered = sum(map(gathered, layer_weights(config).values()))
    vocabulary = Weight((config.vocab_size, config.dim), 0)
    everything, made = stages(config, parallel), {}
    for place in range(parallel.pipeline):
        own = everything[place :: parallel.pipeline]
        layers, embedding, output = sum(len(stage.layers) for stage in own), own[0].embedding, own[-1].output
        ends = [vocabulary] * (embedding + output - (embedding and output and config.tie_embeddings))
        norm = [Weight((config.dim,))] * output
        share = Share(
            own,
            layers,
            embedding,
            output,
            stored=layers * layer_stored + sum(map(stored, ends + norm)),
            gathered=layers * layer_gathered + sum(map(gathered, ends + norm)),
            unit=max(layer_gathered, *map(gathered, ends), 0),
        )
        made.setdefault((layers, embedding, output), (place, share))
    return dict(made.values())


def layer_weights(config: TransformerConfig) -> dict[str, Weight]:
    """The weights of a layer by name."""
    D, F, kv = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    return {
        "attention.wq": Weight((D, D), 0),
        "attention.wk": Weight((kv, D), 0),
        "attention.wv": Weight((kv, D), 0),
        "attention.wo": Weight((D, D), 1),
        "feed_forward.w1": Weight((F, D), 0),
        "feed_forward.w2": Weight((D, F), 1),
        "feed_forward.w3": Weight((F, D), 0),
        "attention_norm": Weight((D,)),
        "ffn_norm": Weight((D,)),
    }


def row_unit(layout: Layout) -> int:
    """Of what the length of rows must be a multiple: `context` takes two chunks of a row each, and `tensor` divides
    what a process has of it."""
    return math.lcm(2 * layout.context if layout.context > 1 else 1, layout.tensor * layout.context)


def require_fits(config: TransformerConfig, layout: Layout, row_length: int) -> None:
    """
    Raises:
        LayoutError: the layout does not divide the model or the rows; says with which numbers.
    """
    sizes = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % layout.tensor:
            raise LayoutError("tensor", f"{layout.tensor} does not divide {name} {size}")
    if layout.context > 1 and row_length % (2 * layout.context):
        raise LayoutError("context", f"row_length {row_length} is not a multiple of 2 x context = {2 * layout.context}")
    if row_length % (layout.tensor * layout.context):
        raise LayoutError(
            "tensor",
            f"row_length {row_length} is not a multiple of tensor x context = {layout.tensor} x {layout.context}, "
            "which share its positions",
        )
