"""Matrix products in 8 bits; on a CPU in the arithmetic that torchao has for that."""

import pytest
import torch
from herdkit.text.float8 import convert_to_float8
from herdkit.train.layout import LayoutError
from torch.nn import functional as F

torchao = pytest.importorskip("torchao.float8")
CPU = torch.device("cpu")


def test_the_layers_but_the_first_and_last_round_to_8_bits(make_model):
    model = make_model(dtype=torch.float32, n_layers=4)
    names = list(model.state_dict())
    plain, tokens = make_model(dtype=torch.float32, n_layers=4), torch.randint(128, (2, 16))
    convert_to_float8(model, "emulated", CPU)
    assert list(model.state_dict()) == names
    rounded = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    matrices = [name for name in names if "w" in name.rsplit(".", 2)[1] and name.split(".")[1] in "12"]
    assert rounded == {name.removesuffix(".weight") for name in matrices}
    assert len(rounded) == 14
    x = torch.randn(3, 5, 64)
    w1 = model.layers[1].feed_forward.w1
    scales = [448 / t.abs().max() for t in (x, w1.weight)]
    low = [(t * scale).to(torch.float8_e4m3fn).float() / scale for t, scale in zip((x, w1.weight), scales, strict=True)]
    torch.testing.assert_close(w1(x), F.linear(*low), rtol=1e-5, atol=1e-5)
    gradients = {}
    for name, one in (("plain", plain), ("rounded", model)):
        one.hidden(tokens).square().sum().backward()
        gradients[name] = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
    assert gradients["plain"].keys() == gradients["rounded"].keys()
    for key, value in gradients["plain"].items():
        similar = F.cosine_similarity(value.flatten(), gradients["rounded"][key].flatten(), dim=0)
        assert 0.8 < similar < 1 - 1e-7, key


def test_what_does_not_multiply_float8_is_refused(make_model):
    with pytest.raises(LayoutError, match=r"parallel\.float8: cpu does not multiply float8; 'emulated'"):
        convert_to_float8(make_model(), "rowwise", CPU)
    with pytest.raises(LayoutError, match=r"w1 is 72 x 64, and both must be multiples of 16"):
        convert_to_float8(make_model(ffn_dim=72), "emulated", CPU)
