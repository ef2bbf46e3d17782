import pytest
import torch
from herdkit.train import FreezeRow, FreezeRule, apply_freeze
from herdkit.train.freezing import changing_buffers, ever_trained, freeze_table
from torch import nn


def model():
    encoder = nn.ModuleDict(
        {
            "block": nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)),
            "head": nn.Linear(3, 2),
        }
    )
    return nn.ModuleDict({"text": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "image": encoder})


def rule(pattern, trainable, from_step=0):
    return FreezeRule(pattern=pattern, trainable=trainable, from_step=from_step)


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_last_match_wins_and_the_table_counts():
    net = model()
    rows = apply_freeze(net, [rule("*", False), rule("image.*", True), rule("image.block.0.*", False)], 0)
    assert trained(net) == {
        "image.block.2.weight",
        "image.block.2.bias",
        "image.head.weight",
        "image.head.bias",
    }
    assert rows == [FreezeRow("text", 6, 0), FreezeRow("image", 9 + 6 + 8, 6 + 8)]
    assert freeze_table(rows, "t").row_count == 3


def test_modes_follow_what_trains():
    net = model()
    apply_freeze(net, [rule("text.*", False), rule("image.block.*", False)], 0)
    modes = {name: module.training for name, module in net.named_modules()}
    expected_eval = {
        "text",
        "text.0",
        "text.1",
        "image.block",
        "image.block.0",
        "image.block.1",
        "image.block.2",
    }
    assert {name for name, training in modes.items() if not training} == expected_eval
    net = model().eval()
    apply_freeze(net, [rule("image.block.0.*", False)], 0)
    # Dropout goes with the part that it stands in, a frozen layer beside it does not matter.
    assert {name for name, module in net.named_modules() if not module.training} == {"image.block.0"}


def test_frozen_batch_norm_keeps_its_statistics():
    net = model()
    apply_freeze(net, [rule("image.*", False)], 0)
    net["image"]["block"](torch.randn(5, 2))
    assert net["image"]["block"][2].num_batches_tracked == 0


def test_rules_of_later_steps():
    net = model()
    rules = [
        rule("*", False),
        rule("text.0.weight", True),
        rule("image.head.*", True, 5),
        rule("text.*", False, 7),
    ]
    expected = {0: {"text.0.weight"}, 4: {"text.0.weight"}}
    expected[5] = {"text.0.weight", "image.head.weight", "image.head.bias"}
    expected[7] = {"image.head.weight", "image.head.bias"}
    for step, names in expected.items():
        apply_freeze(net, rules, step)
        assert trained(net) == names
    assert ever_trained(net, rules) == ["text.0.weight", "image.head.weight", "image.head.bias"]


def test_unmatched_parameters_stay_as_they_are():
    net = model()
    net["image"]["head"].bias.requires_grad_(False)
    apply_freeze(net, [rule("text.*", False)], 0)
    assert "image.head.bias" not in trained(net)
    assert "image.head.weight" in trained(net)


def test_frozen_gradients_are_dropped():
    net = model()
    net["text"][0].weight.grad = torch.ones(2, 2)
    apply_freeze(net, [rule("text.*", False)], 0)
    assert net["text"][0].weight.grad is None


@pytest.mark.parametrize("from_step", [0, 9])
def test_a_pattern_without_a_match_names_the_nearest(from_step):
    with pytest.raises(ValueError, match=r"freeze rule 'image\.hed\.\*' matches no parameter; nearest: image\.head"):
        apply_freeze(model(), [rule("image.hed.*", False, from_step)], 0)


def test_tied_parameters_go_by_any_of_their_names():
    net = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "output": nn.Linear(2, 3, bias=False)})
    net["output"].weight = net["embedding"].weight
    apply_freeze(net, [rule("output.*", False)], 0)
    assert not net["embedding"].weight.requires_grad


def test_buffers_of_frozen_modules_do_not_change():
    net = model()
    assert set(changing_buffers(net, ["text.0.weight"])) == set()
    names = {f"image.block.2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(changing_buffers(net, ["image.block.2.weight"])) == names
