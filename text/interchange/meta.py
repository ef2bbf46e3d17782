"""Meta's original layout, in and out: `params.json`, `consolidated.00.pth` and following, one file for each rank of
model parallelism, and `tokenizer.model`. Names and the order of rows are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...train.files import sync
from ..model import RopeScaling, Transformer, TransformerConfig
from ..tokenizer import Tokenizer
from .directory_weights import StoredWeights, TrainedWeights
from .tensor_files import ModelDirectoryError, Piece, StoredTensors, integer, open_tensors, read_json, write_json

PARAMS = "params.json"

# What the released models with scaled frequencies have, and params.json does not say.
_SCALED_LENGTH, _PLAIN_LENGTH = 131_072, 8192
_TIED_FACTOR, _UNTIED_FACTOR = 32.0, 8.0


def load_meta(path: Path, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a directory with `params.json` and `consolidated.*.pth`.

    Args:
        dtype: None for that of the files.

    Raises:
        ModelDirectoryError: see `open_meta` and `herdkit.text.interchange.tensor_files.fill`.
    """
    return open_meta(path).load(dtype)


def open_meta(path: Path) -> StoredWeights:
    """The weights of such a directory, to be read.

    Raises:
        ModelDirectoryError: see `config_from_meta`; a file of the row is not there.
    """
    files = sorted(path.glob("consolidated.*.pth"))
    expected = [path / f"consolidated.{i:02}.pth" for i in range(len(files))]
    if not files or files != expected:
        raise ModelDirectoryError(f"{path}: expected consolidated.00.pth and so on, found {[f.name for f in files]}")
    params = read_json(path / PARAMS)
    rows, copies = _vocabulary(files)
    try:
        config = config_from_meta(params, vocab_size=rows, tie_embeddings=copies is not None)
        with torch.device("meta"):
            model = Transformer(config)
        pieces = {}
        for rank, file in enumerate(files):
            targets = {name: name for name in model.state_dict()}
            if file in (copies or ()):
                targets["output.weight"] = "tok_embeddings.weight"
            pieces[file] = [
                Piece(stored, name, shard_region(config, name, rank, len(files))) for stored, name in targets.items()
            ]
    except ValueError as error:
        raise ModelDirectoryError(f"{path / PARAMS}: {error}") from error
    return StoredWeights(config, StoredTensors(pieces, model.state_dict(), ignored=["rope.freqs"]))


def save_meta(
    model: Transformer | TrainedWeights, tokenizer: Tokenizer | None, path: Path, model_parallel: int = 1
) -> None:
    """Fills a directory that Meta's code loads. All processes that share the weights call it.

    Args:
        model_parallel: number of files: one for each rank of tensor parallelism. Beyond the number of key-value
            heads, every rank gets one of its own, as a copy, as in the released 16 files of the 405B: what is
            loaded again has more such heads and gives the same logits.

    Raises:
        ValueError: the model cannot be split so, or the tokenizer has no such form.
    """
    if not 1 <= model_parallel <= 100:
        raise ValueError(f"model_parallel must be between 1 and 100, not {model_parallel}")
    weights = TrainedWeights.of(model)
    config, names = weights.config, list(weights.tensors.kinds)
    params = config_to_meta(config)
    params["n_kv_heads"] = max(config.n_kv_heads, model_parallel)
    for i in range(model_parallel):
        shard = {
            # Clones: a view would drag the whole tensor into the file.
            name: tensor[shard_region(config, name, i, model_parallel)].cpu().clone()
            for name, tensor in weights.tensors.of_file(names)
        }
        if not weights.tensors.writes(names):
            continue
        if config.tie_embeddings:  # Meta's code wants both names; the file holds the numbers once.
            shard["output.weight"] = shard["tok_embeddings.weight"]
        file = path / f"consolidated.{i:02}.pth"
        torch.save(shard, file)
        sync(file)
    if not weights.first:
        return
    write_json(path / PARAMS, params)
    if tokenizer is not None:
        tokenizer.save(path / "tokenizer.model")


def shard_region(config: TransformerConfig, name: str, rank: int, ranks: int) -> tuple[slice, ...]:
    """The part of a parameter that the file of one rank holds; () is the whole. Where there are more ranks than
    key-value heads, neighbouring ranks hold the same head.

    Raises:
        ValueError: the parameter cannot be split into so many.
    """
    part = name.removesuffix(".weight").rsplit(".", 1)[-1]
    units = {"wq": config.n_heads, "wk": config.n_kv_heads, "wv": config.n_kv_heads, "wo": config.n_heads}
    units |= dict.fromkeys(("w1", "w2", "w3"), config.ffn_dim)
    units |= dict.fromkeys(("output", "tok_embeddings"), config.vocab_size)
    if part not in units:
        return ()
    if part in ("wk", "wv") and ranks > config.n_kv_heads and ranks % config.n_kv_heads == 0:
        rank, ranks = rank * config.n_kv_heads // ranks, config.n_kv_heads
    if units[part] % ranks:
        raise ValueError(f"model_parallel {ranks} does not divide {name}: it has {units[part]} parts")
    width = units[part] // ranks * (config.head_dim if part in ("wq", "wk", "wv", "wo") else 1)
    block = slice(rank * width, (rank + 1) * width)
    return (slice(None), block) if part in ("wo", "w2") else (block,)


def config_from_meta(params: Mapping[str, Any], *, vocab_size: int, tie_embeddings: bool) -> TransformerConfig:
    """Our config from the content of a `params.json`.

    Args:
        vocab_size: rows of the stored embedding, for a `params.json` without vocab_size, or with -1.
        tie_embeddings: `params.json` does not say it: the files do.

    Raises:
        ValueError: a key is missing or no number.
    """
    try:
        dim, n_heads = integer(params, "dim"), integer(params, "n_heads")
        multiple = integer(params, "multiple_of", 256)
        inner = int((params.get("ffn_dim_multiplier") or 1.0) * int(8 * dim / 3))
        scaled = bool(params.get("use_scaled_rope"))
        factor = params.get("rope_scaling_factor", _TIED_FACTOR if tie_embeddings else _UNTIED_FACTOR)
        stated = integer(params, "vocab_size", -1)
        return TransformerConfig(
            dim=dim,
            n_layers=integer(params, "n_layers"),
            n_heads=n_heads,
            n_kv_heads=integer(params, "n_kv_heads", n_heads),
            ffn_dim=multiple * -(-inner // multiple),
            vocab_size=stated if stated > 0 else vocab_size,
            rope_theta=params.get("rope_theta", 500_000.0),
            rope_scaling=RopeScaling(factor=factor) if scaled else None,
            norm_eps=params.get("norm_eps", 1e-5),
            max_seq_len=integer(params, "max_position_embeddings", _SCALED_LENGTH if scaled else _PLAIN_LENGTH),
            tie_embeddings=tie_embeddings,
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None


def config_to_meta(config: TransformerConfig) -> dict[str, Any]:
    """The content of a `params.json`. Two keys that Meta's files have not, `rope_scaling_factor` and
    `max_position_embeddings`, are there only where the released models of that kind have another value.

    Raises:
        ValueError: a frequency scaling that Meta's code cannot do.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling != RopeScaling(factor=scaling.factor):
        raise ValueError(f"Meta's layout knows rope_scaling by its factor alone, this model has {scaling}")
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        # Meta's code cuts the product down to a whole number; the half is far from both of its ends.
        "ffn_dim_multiplier": (config.ffn_dim + 0.5) / int(8 * config.dim / 3),
        "multiple_of": 1,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": scaling is not None,
    }
    if scaling is not None and scaling.factor != (_TIED_FACTOR if config.tie_embeddings else _UNTIED_FACTOR):
        params["rope_scaling_factor"] = scaling.factor
    if config.max_seq_len != (_PLAIN_LENGTH if scaling is None else _SCALED_LENGTH):
        params["max_position_embeddings"] = config.max_seq_len
    return params


def _vocabulary(files: Sequence[Path]) -> tuple[int, set[Path] | None]:
    """Rows of the embedding in all files; and those of the files whose output projection is a copy of it, or None
    where the projection is another matrix. `fill` names the files that cannot be read here, beside all other faults.

    Raises:
        ModelDirectoryError: none of the files can be read.
    """
    rows: list[int] = []
    copies: set[Path] | None = set()
    for file in files:
        try:
            with open_tensors(file) as opened:
                embedding = opened.read("tok_embeddings.weight")
                rows.append(len(embedding))
                if copies is not None and "output.weight" in opened.names():
                    head = opened.read("output.weight")
                    # Matrices that differ do so in their first row: the rest of them need not be read.
                    same = torch.equal(head[:1], embedding[:1]) and torch.equal(head, embedding)
                    copies = copies | {file} if same else None
        except (ModelDirectoryError, KeyError):
            continue
    if not rows:
        raise ModelDirectoryError(f"{files[0]}: no file from it on is whole and holds tok_embeddings.weight")
    return rows[0] * len(files), copies
