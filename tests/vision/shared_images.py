"""Encodes images shared by processes, alone and in a composed model; a program for `finish_program`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from herdkit.adapters import compose
from herdkit.adapters.batching import Batch
from herdkit.adapters.contract import ModalityBatch, Placements
from herdkit.adapters.distribute import share_out
from herdkit.text.model import Transformer
from herdkit.text.rows import TokenBatch
from herdkit.text.weights import HeldWeights
from herdkit.train import parallel
from herdkit.train.gradients import summed_gradients
from herdkit.train.layout import ParallelConfig
from herdkit.train.place import Place
from herdkit.train.stage_copies import StageCopies
from herdkit.vision.encoder import VisionConfig, VisionTransformer
from herdkit.vision.sequence_parallel import share_tokens
from test_adapters import TEXT, image_of, video_of
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

ENCODERS = {
    "clean": {"padding": "clean"},
    "released": {"padding": "released"},
    "arrangement": {"padding": "released", "tile_tables": "arrangement"},
}
SIZES = {"image_size": 28, "patch_size": 7, "dim": 32, "n_layers": 4, "n_heads": 4, "ffn_dim": 64}
GRIDS = torch.tensor([[1, 1], [2, 2], [1, 2], [3, 1], [1, 1], [2, 1]])
COUNTS = GRIDS.prod(1)


def encoder(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(VisionConfig(**SIZES, n_global_layers=2, taps=(2, 3), max_tiles=4, **changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def features_of(name: str, which: list[int], rank: int = 0, world: int = 1) -> dict:
    """Features of some images, their FLOPs on this process, and the gradients of what it reads of them."""
    model = encoder(**ENCODERS[name])
    tiles = torch.randn(len(COUNTS), 4, 3, 28, 28, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = tiles[which], COUNTS[which], GRIDS[which]
    with FlopCounterMode(display=False) as flops:
        if world > 1:
            with share_tokens(model, dist.group.WORLD):
                features, mask = model(*inputs)
        else:
            features, mask = model(*inputs)
    own = features.flatten(1, 2)[mask][rank::world]
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(int(mask.sum()), features.shape[-1], generator=generator, dtype=torch.float64)
    (own * weights[rank::world]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"features": features.detach() + 0, "flops": flops.get_total_flops(), "gradients": gradients}


def composed(layout: dict, images: int) -> dict:
    """The gradients of a composed model, summed over the processes."""
    torch.manual_seed(3)
    model = compose(text=Transformer(TEXT).double(), image=image_of(), video=video_of())
    place = Place(ParallelConfig(**layout))
    tokens = torch.randint(TEXT.vocab_size, (2, 16), generator=torch.Generator().manual_seed(4))
    rows = TokenBatch(tokens, tokens.roll(-1, 1))
    counts, grids = torch.tensor([1, 4, 2])[:images], torch.tensor([[1, 1], [2, 2], [1, 2]])[:images]
    tiles = torch.randn(images, 4, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    clip = torch.randn(1, 4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    at = torch.arange(images)
    where = Placements(at % 2, 2 + 3 * at, torch.ones_like(at), torch.full_like(at, 16), at)
    one, end = torch.ones(1, dtype=torch.int64), torch.full((1,), 16)
    inputs = {
        "image": ModalityBatch({"tiles": tiles, "n_tiles": counts, "grid": grids}, where),
        "video": ModalityBatch(
            {"tiles": clip, "n_tiles": 2 * one, "grid": torch.tensor([[2, 1]])}, Placements(one, one, one, end, 0 * one)
        ),
    }
    part = share_out(model, HeldWeights.of(model.text), place, 16)
    loss, *_ = part.objective(part.model, Batch(rows, inputs))
    loss.backward()
    parameters = list(part.model.named_parameters())
    summed_gradients(parameters, place, StageCopies((name for name, _ in parameters), place))
    whole = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in parameters}
    return {name: gradient + 0 for name, gradient in whole.items()}


def main(out, environ, images=(), layouts=()):
    torch.set_num_threads(1)
    os.environ.update(environ)
    with parallel.process_group():
        rank, world = parallel.rank(), parallel.world_size()
        found = {(name, which): features_of(name, list(which), rank, world) for name in ENCODERS for which in images}
        found |= {(name, count): composed(layout, count) for name, layout in layouts for count in (1, 3)}
        torch.save(found, f"{out}.{rank}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
