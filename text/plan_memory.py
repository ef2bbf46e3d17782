"""Memory of a process in a layout: weights and state exactly, activations by what layers keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    row_length: int
    rows: int
    micro_batches: int
    width: int

    def positions(self, layout: Layout) -> int:
        """Of a micro-batch on one process, before `tensor` divides them."""
        return self.rows * self.row_length // layout.context


def stored_width(parallel: ParallelConfig, width: int) -> int:
    """Bytes of a number of gathered weights, and of the residual stream, which starts as a row of one of them: float32
    but with `gather` bfloat16. Autocast rounds both for each product.

    Args:
        width: bytes of a number in the precision of training.
    """
    return width if parallel.gather == "bfloat16" else 4


def memory_bytes(
    config: TransformerConfig, parallel: ParallelConfig, layout: Layout, load: Load, place: int, share: Share
) -> dict[str, int]:
    """By what takes it, on the process that stores most among those at one place of the pipeline.

    Weights, gradients and moments are stored in float32 and sharded. Gradients are reduced after every run of
    micro-batches: until then those of its stage are whole, or, where a run is one micro-batch, those of one unit (a
    layer, embedding or output). Autocast keeps its copies of all weights until the forward pass ends.

    Args:
        share: of that place.
    """
    width, positions = load.width, load.positions(layout)
    stream = stored_width(parallel, width)
    run = run_length(parallel, load.micro_batches)
    summed = share.unit if run == 1 else max(share.unit, share.gathered // parallel.chunks)
    gathered = 2 * share.unit if parallel.reshard else share.gathered
    held = passes_in_flight(parallel, place, load.micro_batches) / parallel.chunks
    kept = held * share.layers * kept_bytes(config, parallel, width)
    if parallel.recompute != "none":
        kept += kept_bytes(config, replace(parallel, recompute="none"), width)  # of the layer that is being made again
    whole = 0
    if layout.tensor > 1:
        # What a norm made is gathered for the products of its layer, and their gradients of it are parts of a sum.
        # Without a compiler or recomputation it stays gathered until the backward pass.
        layers = held * share.layers if parallel.recompute == parallel.compile == "none" else 1
        gathered_norms = layers * (layout.tensor - 1) * _normed(parallel, width)
        whole = (gathered_norms + layout.tensor) * width * config.dim
    ends = 2 * stream * config.dim if share.output else 0
    divided = positions / layout.tensor
    parts = {
        "weights": 4 * share.stored,
        "gradients": 4 * share.stored,
        "moments": 8 * share.stored,
        # With re-sharding two units are there at a time: the one in use and the next.
        "working_copy": (stream * gathered if layout.storage > 1 else 0)
        + (width * share.gathered if stream != width else 0),
        "whole_gradients": stream * share.unit + 4 * summed if layout.storage > 1 else 0,
        "activations": divided * (kept + whole + ends),
        "logits": 2 * min(CHUNK_BYTES, 4 * divided * config.vocab_size) if share.output else 0,
        "reserved": RESERVED_BYTES,
    }
    rounded = {name: round(size) for name, size in parts.items()}
    return {**rounded, "total": sum(rounded.values())}


def kept_bytes(config: TransformerConfig, parallel: ParallelConfig, width: int) -> int:
    """Bytes that one position of a layer leaves for the backward pass, shared evenly by `tensor`.

    Without recomputation: the residual stream before the two norms, what these make of it, queries, what attention
    gives, keys, values, and in the feed-forward the gate, what it gates, the gate's SiLU and their product. A compiler
    makes the SiLU again, and the stream before the second norm from what attention adds to it; it rounds what a norm
    made once, which autocast does for each of the products with it. "selective": the layer's input, queries, values,
    what attention gives, the gate and, though nothing needs it, the last product, which a compiler leaves out. "full":
    the layer's input.
    """
    D, F, kv = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    stream, compiled = stored_width(parallel, width), parallel.compile != "none"
    if parallel.recompute == "full":
        return stream * D
    if parallel.recompute == "selective":
        return stream * D + width * ((2 if compiled else 3) * D + kv + F)
    second = width if compiled else stream
    return (stream + second) * D + width * ((_normed(parallel, width) + 2) * D + 2 * kv + (3 if compiled else 4) * F)


def _normed(parallel: ParallelConfig, width: int) -> int:
    """Tensors that the products of a layer keep of what its two norms made."""
    return 2 if parallel.compile != "none" or stored_width(parallel, width) == width else 5
