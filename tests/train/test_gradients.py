"""Gradients between the backward pass and the optimizer."""

import torch
from herdkit.train.gradients import clip, gradient_norm
from herdkit.train.place import Place
from herdkit.train.stage_copies import StageCopies


def test_an_update_without_gradients_has_norm_zero(monkeypatch):
    """As of inputs that no batch had, with all else frozen."""
    place = Place()
    for alone in (True, False):
        monkeypatch.setattr(Place, "replicas_alone", alone)
        norm = gradient_norm({}, {}, place, StageCopies([], place))
        assert norm == torch.zeros(())
        clip({}, norm, 1.0)
