"""Tables of tiles by place and by arrangement (see `herdkit.vision.encoder.VisionConfig.tile_tables`), one from the
other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..encoder import VisionTransformer, by_arrangement
from ..image_adapter import ImageAdapter
from ..tiles import canvases

TABLES = ("tile_position_embedding", "pre_tile_embedding", "post_tile_embedding")


def by_place(table: Tensor) -> Tensor | None:
    """A table by arrangement (1 + canvases, max_tiles, L, D) as the one by place that gives it, with zeros at places
    that no canvas has; None where it tells more than places apart."""
    tiles = table.shape[1]
    found = table.new_zeros(tiles, tiles, *table.shape[2:])
    for number, (rows, columns) in enumerate(canvases(tiles), start=1):
        found[:rows, :columns] = table[number, : rows * columns].unflatten(0, (rows, columns))
    return found if torch.equal(by_arrangement(found), table) else None


@torch.no_grad()
def tell_by_place(adapter: ImageAdapter) -> bool:
    """Changes the adapter's encoder to tables by place, if its tables tell no more apart; whether they did not."""
    encoder = adapter.encoder
    assert isinstance(encoder, VisionTransformer)
    if encoder.config.tile_tables == "place":
        return True
    tables = {name: by_place(getattr(encoder, name)) for name in TABLES}
    if any(table is None for table in tables.values()):
        return False
    for name, table in tables.items():
        assert table is not None
        setattr(encoder, name, nn.Parameter(table, requires_grad=getattr(encoder, name).requires_grad))
    adapter.change_encoder(tile_tables="place")
    return True
