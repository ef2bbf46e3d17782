"""A complete adapter outside of herdkit: depth readings of a range finder become soft tokens."""

from dataclasses import dataclass

import torch
from herdkit.adapters import Adapter, Contribution, Projector
from torch import nn


@dataclass(kw_only=True)
class DepthConfig:
    readings: int = 4


class DepthPreparation:
    def load(self, source):
        return torch.tensor([float(number) for number in str(source).split()])

    def positions(self, item):
        return len(item)

    def __call__(self, items):
        return {"depths": nn.utils.rnn.pad_sequence(list(items), batch_first=True)}


class DepthAdapter(Adapter):
    modality = "depth"
    part = "depth"
    placeholder = "<|reserved_special_token_9|>"
    config_class = DepthConfig

    def __init__(self, config, text):
        super().__init__(config, text)
        self.prepare = DepthPreparation()
        self.projector = Projector(1, text.dim)

    def forward(self, batch):
        return Contribution(soft_tokens=self.projector(batch["depths"][..., None]))
