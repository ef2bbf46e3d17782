"""Time and traffic of one update in a layout, from the sizes of the model and the data sheet of the accelerator.

A micro-batch takes the time of its matrix products, of attention, of what only moves memory, and of the collectives of
tensor and context parallel, none of which is hidden. FSDP's collectives are hidden as far as the passes beside them
last, and slow them down; between stages only what fills the pipeline is waited for (asynchronous sends, section 3.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..train.hardware import COLLECTIVE_SHARE, MEMORY_SHARE, Accelerator, Group, Transfer, gather, send, together
from ..train.layout import Layout, ParallelConfig, run_length
from .model import TransformerConfig
from .parallel import Share, layer_weights
from .plan_memory import Load, stored_width

LOGIT_BYTES = 24
"""Moved for one logit in a step, forward and backward: made, normalised in float32, turned into its gradient, used."""

GRADIENT_BYTES = 10
"""Moved for one gathered weight in a micro-batch: its gradient read and added in float32."""

CAST_BYTES = 12
"""Moved for one weight in a micro-batch where autocast rounds it: read and written, and its gradient likewise."""

STATE_BYTES = 30
"""Moved for one parameter by AdamW: weight, gradient and moments read, all but the gradient written, and a copy."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one update on the process that everybody waits for, by what takes them.

    `sharding` is what FSDP does not hide, `bubble` the pipeline's filling and draining. Bytes are those that a device
    receives in one update from its own server and from others.
    """

    matmul: float
    attention: float
    memory: float
    tensor: float
    context: float
    sharding: float
    bubble: float
    optimizer: float
    server_bytes: float
    network_bytes: float

    @property
    def total(self) -> float:
        work = self.matmul + self.attention + self.memory + self.tensor + self.context
        return work + self.sharding + self.bubble + self.optimizer

    def seconds(self) -> dict[str, float]:
        names = ("matmul", "attention", "memory", "tensor", "context", "sharding", "bubble", "optimizer")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Pass:
    """One micro-batch on one process, forward and backward, through all its stages: seconds, and its collectives."""

    matmul: float
    attention: float
    memory: float
    tensor: Transfer
    context: Transfer

    @property
    def seconds(self) -> float:
        return self.matmul + self.attention + self.memory + self.tensor.seconds + self.context.seconds


def flops_per_token(config: TransformerConfig, row_length: int) -> float:
    """Of training, by the convention that utilisation is quoted in (the paper's table 4, torchtitan): 6 N + 12 L D T,
    where N leaves out the input embedding, and attention is counted as if it were not causal."""
    layer = sum(math.prod(weight.shape) for weight in layer_weights(config).values())
    multiplied = config.n_layers * layer + config.vocab_size * config.dim + config.dim
    return 6.0 * multiplied + 12.0 * config.n_layers * config.dim * row_length


def step_time(
    config: TransformerConfig,
    parallel: ParallelConfig,
    layout: Layout,
    load: Load,
    device: Accelerator,
    owners: Sequence[Share],
) -> StepTime:
    """Seconds and traffic of one update.

    Args:
        owners: the shares of the processes of the pipeline, without repetition (see `shares`).
    """
    passes = [_pass(config, parallel, layout, load, device, share) for share in owners]
    work, count = max(passes, key=lambda found: found.seconds), load.micro_batches
    sharded = [
        _sharding(config, parallel, layout, load, device, share, found.seconds)
        for share, found in zip(owners, passes, strict=True)
    ]
    exposed, traffic = max(sharded, key=lambda found: found[0])
    between = Transfer()
    if layout.pipeline > 1:
        size = load.positions(layout) * config.dim * stored_width(parallel, load.width) / layout.tensor
        between = send(device, layout.neighbours(device.per_server, "pipeline") == layout.pipeline, size)
    filling = (layout.pipeline - 1) * (work.seconds / parallel.chunks + 2 * between.seconds)
    late = count * max(0.0, 2 * parallel.chunks * between.seconds - work.seconds)
    received = together(
        [work.tensor.times(count), work.context.times(count), between.times(2 * parallel.chunks * count), traffic]
    )
    stored = max(share.stored for share in owners)
    return StepTime(
        matmul=count * work.matmul,
        attention=count * work.attention,
        memory=count * work.memory,
        tensor=count * work.tensor.seconds,
        context=count * work.context.seconds,
        sharding=exposed,
        bubble=filling + late,
        optimizer=STATE_BYTES * stored / (device.memory_bandwidth * MEMORY_SHARE),
        server_bytes=received.server_bytes,
        network_bytes=received.network_bytes,
    )


def _pass(
    config: TransformerConfig,
    parallel: ParallelConfig,
    layout: Layout,
    load: Load,
    device: Accelerator,
    share: Share,
) -> _Pass:
    layers, ends = share.layers, share.embedding + share.output
    D, F, kv = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    positions, width, full = load.positions(layout), load.width, parallel.recompute == "full"

    matrices = 2 * D * D + 2 * kv * D + 3 * D * F
    again = {"none": 0, "selective": D * D + kv * D + D * F, "full": matrices}[parallel.recompute]
    products = 2 * (layers * (3 * matrices + again) + share.output * 3 * config.vocab_size * D)
    # With few positions reading the weights, three times, takes longer than multiplying by them.
    multiplying = positions * products / layout.tensor / (device.peak_flops * device.matmul)
    # Fused attention makes its scores again in the backward pass: five products for the two of the forward pass.
    scores = 4 * layers * D * (load.row_length / 2) * (1 + 2.5 + full)

    stream = stored_width(parallel, width)
    moved = layers * moved_bytes(config, parallel, width) + share.output * config.vocab_size * LOGIT_BYTES
    weights = (GRADIENT_BYTES + (CAST_BYTES if stream != width else 0)) * share.gathered
    if layout.storage > 1:
        # What has been gathered is copied to where the weights are.
        gatherings = (1 + parallel.reshard) / (1 if parallel.reshard else run_length(parallel, load.micro_batches))
        weights += 2 * stream * gatherings * share.gathered
    bandwidth = device.memory_bandwidth * MEMORY_SHARE

    # Each layer gathers its input twice and scatters its output twice, and the other way round in the backward pass.
    collectives = layers * {"none": 8, "selective": 10, "full": 12}[parallel.recompute] + 2 * ends
    tensor = Group(layout.tensor, layout.neighbours(device.per_server, "tensor"))
    context = Group(layout.context, layout.neighbours(device.per_server, "context"))
    # Keys and values of the whole row: gathered forward and backward, and their gradient scattered in float32.
    pairs = load.rows * load.row_length * 2 * kv / layout.tensor
    rounds = [gather(device, context, pairs * width).times(2 + full), gather(device, context, pairs * 4)]
    return _Pass(
        matmul=max(multiplying, 3 * width * share.gathered / bandwidth),
        attention=positions * scores / layout.tensor / (device.peak_flops * device.attention),
        memory=(positions * moved / layout.tensor + weights) / bandwidth,
        # What is gathered has the width of the stream, what is scattered that of the products.
        tensor=gather(device, tensor, positions * D * (stream + width) / 2).times(collectives),
        context=together(rounds).times(layers),
    )


def moved_bytes(config: TransformerConfig, parallel: ParallelConfig, width: int) -> int:
    """Bytes that one position of a layer moves in a step beside its products, shared evenly by `tensor`: by the two
    norms and the sums before them, the rotation of queries and keys (in float32), and the gate; backward also by the
    sums of what flows into the inputs of products. A compiler leaves one pass over memory of each, and twice that
    backward."""
    D, F, kv = config.dim, config.ffn_dim, config.n_kv_heads * config.head_dim
    stream = stored_width(parallel, width)
    if parallel.compile != "none":
        forward = (4 * stream + 6 * width) * D + 2 * width * kv + 3 * width * F
        backward = 2 * forward
    else:
        cast = 5 * (stream + width) * D if stream != width else 0
        rotation = (2 * width + 16) * (D + kv)
        forward = (8 * stream + 2 * width) * D + cast + rotation + 5 * width * F
        backward = 25 * stream * D + cast + rotation + 9 * width * F
    return backward + forward * (1 if parallel.recompute == "none" else 2)


def _added(collectives: float, passes: float) -> float:
    """Seconds that collectives add to the passes beside them."""
    return max(COLLECTIVE_SHARE * collectives, collectives - passes)


def _sharding(
    config: TransformerConfig,
    parallel: ParallelConfig,
    layout: Layout,
    load: Load,
    device: Accelerator,
    share: Share,
    seconds: float,
) -> tuple[float, Transfer]:
    """Seconds that FSDP's collectives add to an update, and all that they move.

    Args:
        seconds: of one micro-batch on this process, forward and backward.
    """
    group = Group(layout.storage, layout.neighbours(device.per_server, "context", "shard"))
    replicas = Group(layout.replicate, layout.neighbours(device.per_server, "replicate"))
    run = run_length(parallel, load.micro_batches)
    runs = math.ceil(load.micro_batches / run)

    width = stored_width(parallel, load.width)
    weights = gather(device, group, share.gathered * width)
    reduced = gather(device, group, share.gathered * 4)
    averaged = gather(device, replicas, share.gathered * 4 / layout.storage).times(2)
    backward = together([reduced, averaged, weights if parallel.reshard else Transfer()])
    forward_share = 1 / 4 if parallel.recompute == "full" else 1 / 3
    beside = run * seconds
    gathered = runs if parallel.reshard else 1
    exposed = gathered * _added(weights.seconds, forward_share * beside)
    exposed += runs * _added(backward.seconds, (1 - forward_share) * beside)
    # Nothing runs beside the first gathering and the last reduction.
    exposed += gather(device, group, share.unit * width).seconds + gather(device, group, share.unit * 4).seconds
    return exposed, together([weights.times(gathered), backward.times(runs)])
