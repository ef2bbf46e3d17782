import pytest
import torch
from herdkit.text.linear import FEW_ROWS, linear


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (FEW_ROWS, 1), (2, FEW_ROWS)])
def test_is_the_product_in_every_way_of_taking_it(shape):
    x, weight = torch.randn(*shape, 24, dtype=torch.float64), torch.randn(40, 24, dtype=torch.float64)
    expected = torch.einsum("btk,nk->btn", x, weight)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            torch.testing.assert_close(linear(x, weight), expected)
            assert linear(x, weight).is_contiguous()
