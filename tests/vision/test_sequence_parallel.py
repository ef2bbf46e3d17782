"""Images shared by processes: features, gradients and work are those of one process."""

import runpy
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("shared_images.py")
IMAGES = ((1,), (0, 1, 2), (0, 1, 2, 3, 4, 5))
LAYOUTS = (("tensor", {"tensor": 2}), ("context", {"context": 2}))


def parts(finish_program, processes, tmp_path, **arguments):
    assert finish_program(PROGRAM, processes, out=str(tmp_path / "out"), **arguments) == [0] * processes
    return [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize("processes", [2, 3])
def test_tokens_of_images_are_shared(finish_program, tmp_path, processes):
    alone = runpy.run_path(str(PROGRAM))["features_of"]
    found = parts(finish_program, processes, tmp_path, images=IMAGES)
    for name, which in found[0]:
        wanted, own = alone(name, list(which)), [one[name, which] for one in found]
        for one in own:
            torch.testing.assert_close(one["features"], wanted["features"], rtol=1e-10, atol=1e-12)
        for weight, whole in wanted["gradients"].items():
            summed = sum(one["gradients"][weight] for one in own)
            torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-11, msg=f"{name} {weight}")
        # Patches are embedded by all, and tokens of large images take more attention than others.
        assert max(one["flops"] for one in own) < 1.25 * wanted["flops"] / processes


def test_a_composed_model_shares_what_does_not_come_out_even(finish_program, tmp_path):
    composed = runpy.run_path(str(PROGRAM))["composed"]
    found = parts(finish_program, 2, tmp_path, layouts=LAYOUTS)
    for one in found:
        for (layout, images), gradients in one.items():
            wanted = composed({}, images)
            assert gradients.keys() == wanted.keys()
            for name, whole in wanted.items():
                torch.testing.assert_close(gradients[name], whole, rtol=1e-9, atol=1e-11, msg=f"{layout} {name}")
