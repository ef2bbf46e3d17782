"""The needle-in-a-haystack test (section 3.4.2): does the model find a sentence hidden anywhere in its context?

A haystack is begin of text, held-out prose with one password in it, and the question for the password. It counts as
found when every token of the answer has the highest logit, which is what greedy decoding would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from ..data.shards import ShardReader
from ..data.sources import SourceConfig
from ..data.synthetic.needles import needles
from .model import Transformer
from .tokenizer import Tokenizer


@dataclass(kw_only=True)
class NeedleConfig:
    """
    Args:
        prose: samples with a `txt` member to hide the needles in.
        depths: how many places, evenly from the beginning (0) to just before the question (1).
        samples: haystacks for each length and depth.
        seed: of needles and prose.
    """

    prose: list[SourceConfig] = field(default_factory=list)
    depths: int = 5
    samples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.depths < 2 or self.samples < 1:
            raise ValueError(f"depths must be at least 2 and samples 1, not {self.depths} and {self.samples}")


@dataclass(frozen=True)
class NeedleResult:
    """`found[i][j]` is the share of needles found at `lengths[i]` tokens and `depths[j]` (0: at the beginning)."""

    lengths: list[int]
    depths: list[float]
    found: list[list[float]]

    @property
    def worst(self) -> float:
        return min(share for row in self.found for share in row)


class NeedleTest:
    """Haystacks made once for a tokenizer.

    Raises:
        ValueError: there is no prose, or too little for the longest haystack asked for.
    """

    def __init__(self, config: NeedleConfig, tokenizer: Tokenizer):
        if not config.prose:
            raise ValueError("prose is empty; name shards of text to hide the needles in")
        self.config, self.tokenizer = config, tokenizer
        readers = [ShardReader(source.shards) for source in config.prose]
        texts = [reader[i].text("txt") for reader in readers for i in range(len(reader))]
        self._prose = [token for row in tokenizer.encode_batch(texts) for token in row]

    def haystack(self, length: int, depth: float, number: int) -> tuple[list[int], list[int]]:
        """Prompt and answer tokens, `length` in all, with the needle at the depth."""
        rng = Random(f"{self.config.seed}/{length}/{depth}/{number}")
        (hidden,) = needles(rng, 1)
        statement = self.tokenizer.encode(f" {hidden.statement}")
        question, answer = self.tokenizer.encode(f" {hidden.question}"), self.tokenizer.encode(hidden.answer)
        straw = length - 1 - len(statement) - len(question) - len(answer)
        if not 0 <= straw <= len(self._prose):
            raise ValueError(
                f"a haystack of {length} tokens needs {straw} tokens of prose; there are {len(self._prose)}"
            )
        start = rng.randint(0, len(self._prose) - straw)
        prose = self._prose[start : start + straw]
        at = round(depth * straw)
        return [self.tokenizer.bos_id, *prose[:at], *statement, *prose[at:], *question], answer

    @torch.no_grad()
    def __call__(self, model: Transformer, lengths: Sequence[int]) -> NeedleResult:
        """The share found by length and depth, one haystack at a time.

        Raises:
            ValueError: a length is beyond the model's `max_seq_len`, or there is too little prose for it.
        """
        depths = [i / (self.config.depths - 1) for i in range(self.config.depths)]
        found = [[self._share_found(model, length, depth) for depth in depths] for length in lengths]
        return NeedleResult(list(lengths), depths, found)

    def _share_found(self, model: Transformer, length: int, depth: float) -> float:
        right = 0
        for number in range(self.config.samples):
            prompt, answer = self.haystack(length, depth, number)
            tokens = torch.tensor([prompt + answer[:-1]], device=model.tok_embeddings.weight.device)
            logits = model.unembed(model.hidden(tokens)[0, -len(answer) :])
            right += logits.argmax(-1).tolist() == answer
        return right / self.config.samples


def plot(result: NeedleResult, path: Path, title: str) -> None:
    """The heat map as a picture: lengths across, depths downwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.9 * len(result.lengths), 1.2 + 0.5 * len(result.depths)), layout="constrained")
    axes = figure.subplots()
    grid = torch.tensor(result.found).T
    image = axes.imshow(grid.numpy(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(result.lengths)), [f"{length:,}" for length in result.lengths])
    axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title)
    for i, row in enumerate(grid.tolist()):
        for j, share in enumerate(row):
            legible = "black" if 0.15 < share < 0.85 else "white"
            axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8, color=legible)
    figure.colorbar(image, label="found")
    figure.savefig(path, dpi=120)
