"""BEST-RQ on one of several processes, with the targets of every utterance that it sees; a program for
`finish_program`."""

import os
from hashlib import sha256
from pathlib import Path

import torch
from herdkit.speech import BestRQ
from herdkit.speech.conformer import stack_frames
from herdkit.speech.pretrain import pretrain_encoder
from herdkit.train import parallel


def main(recipe, run_dir, out, environ):
    """Writes `out`.<rank>: the targets (T, Q) of whole utterances, by a digest of their features."""
    torch.set_num_threads(1)
    os.environ.update(environ)
    seen, original = {}, BestRQ.forward

    def forward(self, features, frames, generator=None):
        stacked, lengths = stack_frames(features, frames, self.encoder.config.stack)
        targets = self.quantise(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])
        for one, count, row, length in zip(features, frames.tolist(), targets, lengths.tolist(), strict=True):
            seen[sha256(one[:count].numpy().tobytes()).hexdigest()] = row[:length].clone()
        return original(self, features, frames, generator)

    BestRQ.forward = forward
    with parallel.process_group():
        pretrain_encoder(recipe, Path(run_dir))
        torch.save(seen, f"{out}.{parallel.rank()}")


if __name__ == "__main__" and "arguments" in globals():
    main(**globals()["arguments"])
