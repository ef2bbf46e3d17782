import subprocess
import sys

import pytest
import torch
from herdkit.text import linear as module
from herdkit.text.linear import TRANSPOSED, linear, product
from torch.nn import functional as F

ROWS = [(1, 1), (1, 4), (3, 5), (1, TRANSPOSED[0]), (TRANSPOSED[-1], 1), (TRANSPOSED[-1] + 1, 1), (3, 50)]


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: request.param)
    calls, onednn = [], module._onednn
    monkeypatch.setattr(module, "_onednn", lambda x, *given: calls.append(x.shape) or onednn(x, *given))
    yield
    assert bool(calls) == request.param


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", ROWS)
def test_is_the_product_with_its_gradients(library, shape, biased):
    given = [torch.randn(*size, requires_grad=True) for size in [(*shape, 24), (40, 24), *[(40,)] * biased]]
    expected = F.linear(*(tensor.double() for tensor in given))
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, given, upstream)
    out = linear(*given)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for found, gradient in zip(torch.autograd.grad(out, given, upstream.float()), wanted, strict=True):
        torch.testing.assert_close(found, gradient.float(), rtol=1e-5, atol=3e-5)
    with torch.inference_mode():
        torch.testing.assert_close(linear(*given).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(product(*given).double(), expected, rtol=1e-5, atol=1e-5)
        assert linear(*given).is_contiguous()


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_computes_no_gradient_that_nobody_wants(library, wanted):
    sizes = {"x": (4, 24), "weight": (40, 24), "bias": (40,)}
    given = {name: torch.randn(*size, requires_grad=name == wanted) for name, size in sizes.items()}
    linear(**given).sum().backward()
    assert {name for name, tensor in given.items() if tensor.grad is not None} == {wanted}


def test_takes_a_transposed_weight(library):
    x, weight = torch.randn(100, 24), torch.randn(24, 40).T
    torch.testing.assert_close(product(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_takes_a_bias_of_any_stride(library):
    x, weight, bias = torch.randn(4, 24), torch.randn(40, 24), torch.randn(40, 2)[:, 1]
    torch.testing.assert_close(product(x, weight, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_is_one_operator_of_a_compiled_graph(library, biased):
    given = [torch.randn(*size, requires_grad=True) for size in [(2, 50, 24), (40, 24), *[(40,)] * biased]]
    wanted = torch.autograd.grad(linear(*given).square().sum(), given)
    compiled = torch.compile(lambda *given: linear(*given).square().sum(), backend="aot_eager", fullgraph=True)
    for found, gradient in zip(torch.autograd.grad(compiled(*given), given), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_leaves_everything_but_float32_to_torch(monkeypatch):
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_onednn", lambda *_: pytest.fail("oneDNN was called"))
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(3, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    x, weight = torch.randn(3, 24), torch.randn(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(torch.randn(0, 24), weight).shape == (0, 40)


def test_needs_no_onednn():
    """As in builds of torch for other processors, which have no operators of it."""
    program = """
import types, torch
torch.ops.mkldnn = types.SimpleNamespace()
torch.backends.mkldnn.is_available = lambda: False
from herdkit.text.linear import Linear
assert Linear(3, 4)(torch.zeros(2, 3)).shape == (2, 4)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
