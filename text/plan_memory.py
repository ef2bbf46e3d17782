"""Memory of a process in a layout: weights and state exactly, activations by what compiled layers keep."""

from __future__ import annotations

from dataclasses import dataclass

from ..train.hardware import RESERVED_BYTES
from ..train.layout import Layout, ParallelConfig, passes_in_flight, run_length
from .loss import CHUNK_BYTES
from .model import TransformerConfig
from .parallel import Share


@dataclass(frozen=True, kw_only=True)
class Load:
    """The share of one update that falls to a process.

    Args:
        row_length: of the rows.
        rows: of a micro-batch in one group of data parallel.
        micro_batches: of the update.
        width: bytes of a number in the precision of training.
        compiled: whether layers are; without, one tensor more of the feed-forward is kept.
    """

    row_length: int
    rows: int
    micro_batches: int
    width: int
    compiled: bool = True

    def positions(self, layout: Layout) -> int:
        """Of a micro-batch on one process, before `tensor` divides them."""
        return self.rows * self.row_length // layout.context


def memory_bytes(
    config: TransformerConfig, parallel: ParallelConfig, layout: Layout, load: Load, place: int, share: Share
) -> dict[str, int]:
    """By what takes it, on the process that stores most among those at one place of the pipeline.

    Weights, gradients and moments are stored in float32 and sharded. Gradients are reduced after every run of
    micro-batches: until then those of its stage are whole, or, where a run is one micro-batch, those of one unit (a
    layer, embedding or output).

    Args:
        share: of that place.
    """
    width, positions = load.width, load.positions(layout)
    run = run_length(parallel, load.micro_batches)
    summed = share.unit if run == 1 else max(share.unit, share.gathered // parallel.chunks)
    copied = layout.storage > 1 or width < 4
    held = passes_in_flight(parallel, place, load.micro_batches) / parallel.chunks
    kept = held * share.layers * kept_elements(config, parallel.recompute, load.compiled)
    if parallel.recompute == "none" and not load.compiled:
        # What the norms made is kept as it was gathered for the products.
        kept += held * share.layers * 2 * config.dim * (layout.tensor - 1)
    if parallel.recompute != "none":
        kept += kept_elements(config, "none", load.compiled)  # of the layer that is being made again
    ends = 2 * config.dim if share.output else 0
    divided = positions / layout.tensor
    parts = {
        "weights": 4 * share.stored,
        "gradients": 4 * share.stored,
        "moments": 8 * share.stored,
        # With re-sharding two units are there at a time: the one in use and the next.
        "working_copy": width * (2 * share.unit if parallel.reshard else share.gathered) if copied else 0,
        "whole_gradients": width * share.unit + 4 * summed if layout.storage > 1 else 0,
        "activations": width * divided * (kept + ends),
        "logits": 2 * min(CHUNK_BYTES, 4 * divided * config.vocab_size) if share.output else 0,
        "reserved": RESERVED_BYTES,
    }
    rounded = {name: round(size) for name, size in parts.items()}
    return {**rounded, "total": sum(rounded.values())}


def kept_elements(config: TransformerConfig, recompute: str, compiled: bool = True) -> int:
    """Numbers that one position of a layer leaves for the backward pass, shared evenly by `tensor`.

    Without recomputation: the residual stream before the two norms, what these make of it, queries, what attention
    gives, keys, values, and in the feed-forward the gate, what it gates and their product; a compiler makes again what
    lies between, the gate's SiLU, which is kept otherwise. Norms' outputs are kept divided and gathered again beside
    the backward products. "selective": the layer's input, queries, values, what attention gives, the gate and the last
    product. "full": the layer's input.
    """
    D, F, kv = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    return {"none": 6 * D + 2 * kv + (3 if compiled else 4) * F, "selective": 4 * D + kv + F, "full": D}[recompute]
