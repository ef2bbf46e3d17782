"""Small adapters for tests: one per route and one that takes both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from herdkit.adapters import Adapter, Contribution, GatedCrossAttention
from herdkit.text.model import Transformer, TransformerConfig
from torch import nn

TEXT = TransformerConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=320, max_seq_len=256)


def text_model(seed: int = 0, dtype=torch.float64) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(TEXT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@dataclass(kw_only=True)
class ToyConfig:
    width: int = 6


class VectorPreparation:
    """Inputs are (L, width) tensors of any length L; they take one position."""

    def load(self, source):
        return torch.as_tensor(source)

    def positions(self, item) -> int:
        return 1

    def __call__(self, items: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(item) for item in items])
        return {"values": nn.utils.rnn.pad_sequence(list(items), batch_first=True), "lengths": lengths}


class SoftPreparation(VectorPreparation):
    """Each vector becomes a soft token."""

    def positions(self, item) -> int:
        return len(item)


class MemoryAdapter(Adapter):
    modality = "image"
    part = "image"
    placeholder = "<|image|>"
    config_class = ToyConfig
    layers_at = (1, 3)

    def __init__(self, config: ToyConfig, text: TransformerConfig):
        super().__init__(config, text)
        self.prepare = VectorPreparation()
        self.encoder = nn.Linear(config.width, text.dim)
        self.layers = nn.ModuleList(GatedCrossAttention(text.dim, 4, 2, 48, gate_init=0.7) for _ in self.layers_at)

    def interleaved(self):
        return dict(zip(self.layers_at, self.layers, strict=True))

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Contribution:
        values = batch["values"]
        mask = torch.arange(values.shape[1]) < batch["lengths"][:, None]
        return Contribution(memory=self.encoder(values.to(self.encoder.weight)), memory_mask=mask)


class VideoToy(MemoryAdapter):
    modality = "video"
    part = "video"
    placeholder = "<|video|>"
    order = -1
    requires = ("image",)
    layers_at = (1,)

    def forward(self, batch, *, image):
        return image(batch)


class SoftAdapter(Adapter):
    modality = "speech"
    part = "audio"
    placeholder = "<|audio|>"
    config_class = ToyConfig

    def __init__(self, config: ToyConfig, text: TransformerConfig):
        super().__init__(config, text)
        self.prepare = SoftPreparation()
        self.encoder = nn.Linear(config.width, text.dim)

    def forward(self, batch):
        return Contribution(soft_tokens=self.encoder(batch["values"].to(self.encoder.weight)))


def randomise(module: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not name.endswith(("gate_attn", "gate_ffwd")):
            nn.init.normal_(parameter, std=0.3)
    return module.double()
