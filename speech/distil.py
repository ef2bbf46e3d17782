"""Distillation: the language model's answer to what is heard is drawn to its answer to the written words (Ultravox and
others; the paper trains on the right answers alone)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..text.loss import CHUNK_BYTES


def distillation_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's next-token distributions to the student's, summed over positions
    and times the squared temperature, so that its gradients keep their size (Hinton et al., 2015).

    Args:
        student, teacher: (M, D) hidden states after the final norm; no gradient goes to the teacher.
        weight: (V, D), the output projection.
        temperature: that both distributions are softened with.
        chunk_bytes: memory of the float32 logits of a chunk of positions; they are made again for the backward pass.

    Raises:
        ValueError: they differ in number.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"the student has states of shape {tuple(student.shape)}, the teacher {tuple(teacher.shape)}")
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for heard, read in zip(student.split(rows), teacher.detach().split(rows), strict=True):
        if len(heard):
            part = checkpoint(_divergence, heard, read, weight, temperature, use_reentrant=False)
            assert isinstance(part, Tensor)
            total = total + part
    return total


def _divergence(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    heard, read = (
        (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        for logits in (F.linear(student, weight), F.linear(teacher, weight))
    )
    return F.kl_div(heard, read, reduction="sum", log_target=True) * temperature**2
