"""What a contrastive model can do without training for it: name what a picture shows, and find a picture's captions
and a caption's picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.shards import Sample, ShardReader
from ..text.tokenizer import Tokenizer
from .contrastive import ContrastiveModel
from .pairs import encode_captions, image_of
from .tiles import ImagePreparation


@dataclass(kw_only=True)
class ZeroShotConfig:
    """
    Args:
        retrieval: shards of images with captions, one as `txt` or several in `captions` of `json`; "" for none.
        classification: shards of images with the number of their class as `cls`; "" for none.
        classes: the names of the classes, in the order of their numbers.
        templates: sentences with `{}` for the name; the mean of their vectors stands for a class.
        samples: of either at most, the first ones.
        batch_size: images or texts encoded together.
    """

    retrieval: str = ""
    classification: str = ""
    classes: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    samples: int = 5000
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not (self.retrieval or self.classification):
            raise ValueError("name shards for retrieval, for classification, or for both")
        if bool(self.classification) != bool(self.classes):
            raise ValueError("classification needs classes, and classes classification")
        if without := [template for template in self.templates if "{}" not in template]:
            raise ValueError(f"the template {without[0]!r} has no {{}} for the name of the class")


class ZeroShot:
    """Pictures, captions and classes, ready to be measured.

    Args:
        tokenizer: that of the model's text tower.
        prepare: that of its image encoder.
        max_length: tokens of a text at most; None for any number.

    Raises:
        ValueError: a sample lacks what is needed, or has a class that is not among the names; names it.
    """

    def __init__(
        self,
        config: ZeroShotConfig,
        tokenizer: Tokenizer,
        prepare: ImagePreparation,
        max_length: int | None = None,
    ):
        self._config, self._tokenizer, self._prepare, self._max_length = config, tokenizer, prepare, max_length
        self._pairs = list(_first(config.retrieval, config.samples))
        self._captions = [captions_of(sample) for sample in self._pairs]
        self._pictures = list(_first(config.classification, config.samples))
        self._labels = [class_of(sample, len(config.classes)) for sample in self._pictures]

    @torch.no_grad()
    def measure(self, model: ContrastiveModel, step: int = 0) -> dict[str, float]:
        """`top1` and `top5` accuracy, and `image_to_text_R@K`, `text_to_image_R@K` for K of 1, 5, 10, of a model in
        eval mode; serves as the evaluation hook of a stage, which sets that mode."""
        return self._retrieval(model) | self._classification(model)

    def _retrieval(self, model: ContrastiveModel) -> dict[str, float]:
        if not self._pairs:
            return {}
        texts = [caption for captions in self._captions for caption in captions]
        owner = torch.tensor([i for i, captions in enumerate(self._captions) for _ in captions])
        return recall(self._images(model, self._pairs) @ self._texts(model, texts).T, owner)

    def _classification(self, model: ContrastiveModel) -> dict[str, float]:
        if not self._pictures:
            return {}
        classes, templates = self._config.classes, self._config.templates
        texts = [template.replace("{}", name) for name in classes for template in templates]
        vectors = self._texts(model, texts).unflatten(0, (len(classes), len(templates))).mean(1)
        scores = self._images(model, self._pictures) @ F.normalize(vectors, dim=-1).T
        return accuracy(scores, torch.tensor(self._labels))

    def _images(self, model: ContrastiveModel, samples: Sequence[Sample]) -> Tensor:
        vectors = []
        for group in _groups(samples, self._config.batch_size):
            batch = self._prepare([self._prepare.load(image_of(sample)) for sample in group])
            device = model.logit_scale.device
            vectors.append(
                model.encode_images(*(batch[name].to(device) for name in ("tiles", "n_tiles", "grid"))).cpu()
            )
        return torch.cat(vectors)

    def _texts(self, model: ContrastiveModel, texts: Sequence[str]) -> Tensor:
        vectors = []
        for group in _groups(texts, self._config.batch_size):
            tokens, lengths = encode_captions(self._tokenizer, group, self._max_length)
            device = model.logit_scale.device
            vectors.append(model.encode_text(tokens.to(device), lengths.to(device)).cpu())
        return torch.cat(vectors)


def recall(similarity: Tensor, owner: Tensor, ks: Iterable[int] = (1, 5, 10)) -> dict[str, float]:
    """The share of images with one of their captions among the K most similar texts, and of captions with their image
    among the K most similar images.

    Args:
        similarity: (I, C) of I images and C captions.
        owner: (C,) int64, which image a caption is of.
    """
    images = torch.arange(len(similarity))
    found = {}
    for k in ks:
        texts = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
        found[f"image_to_text_R@{k}"] = (owner[texts] == images[:, None]).any(1).double().mean().item()
        pictures = similarity.topk(min(k, len(similarity)), dim=0).indices
        found[f"text_to_image_R@{k}"] = (pictures == owner).any(0).double().mean().item()
    return found


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1` and `top5`: the share of rows of scores (N, classes) whose label (N,) is among the highest."""
    return {
        f"top{k}": (scores.topk(min(k, scores.shape[1]), dim=1).indices == labels[:, None])
        .any(1)
        .double()
        .mean()
        .item()
        for k in (1, 5)
    }


def captions_of(sample: Sample) -> list[str]:
    """The captions of a sample: `captions` of its member `json`, or its `txt`.

    Raises:
        ValueError: it has none; names it.
    """
    content = sample.json() if "json" in sample.members else None
    if isinstance(content, Mapping) and "captions" in content:
        captions = content["captions"]
        if isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions):
            return captions
        raise ValueError(f"{sample.shard}: sample {sample.key}: captions in json must be a list of texts")
    if "txt" not in sample.members:
        raise ValueError(f"{sample.shard}: sample {sample.key} has neither txt nor captions in json")
    return [sample.text("txt")]


def class_of(sample: Sample, count: int) -> int:
    """The number of the class of a sample, its member `cls`.

    Raises:
        ValueError: it has none, or one that is not below `count`; names it.
    """
    where = f"{sample.shard}: sample {sample.key}"
    if "cls" not in sample.members:
        raise ValueError(f"{where} has no cls, the number of its class")
    text = sample.text("cls").strip()
    if not text.isdecimal() or int(text) >= count:
        raise ValueError(f"{where}: cls is {text!r}, not a number below the {count} classes")
    return int(text)


def _first(shards: str, count: int) -> Iterator[Sample]:
    if shards:
        reader = ShardReader(shards)
        for i in range(min(count, len(reader))):
            yield reader[i]


def _groups(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
