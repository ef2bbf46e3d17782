import pytest
import torch
from herdkit.text.attention import SHORT_ROW, attend, document_block_mask, document_rows, see_own_document
from torch.nn import functional as F

LENGTHS = ([3, 1, 8, 20], [32], [1] * 9 + [23], [16, 16])
B, T, H, G, DH = len(LENGTHS), 32, 4, 2, 8


@pytest.fixture
def documents():
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])


def made(requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, H, DH), (B, T, G, DH), (B, T, G, DH)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes
    ]


def one_by_one(q, k, v):
    """Every document alone, with torch's own kernel."""
    rows = []
    for b, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        parts = [
            F.scaled_dot_product_attention(
                *(x[b : b + 1, end - n : end].transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
            for n, end in zip(lengths, ends, strict=True)
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("layout", [see_own_document, document_rows])
def test_documents_see_only_themselves(documents, layout):
    q, k, v = made(requires_grad=True)
    wanted, found = one_by_one(q, k, v), attend(q, k, v, layout(documents))
    torch.testing.assert_close(found, wanted)
    sent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for gradient, of_torch in zip(
        torch.autograd.grad(found, (q, k, v), sent), torch.autograd.grad(wanted, (q, k, v), sent), strict=True
    ):
        torch.testing.assert_close(gradient, of_torch)


def test_long_rows_are_not_masked(documents):
    assert isinstance(see_own_document(documents), torch.Tensor)
    assert not isinstance(see_own_document(documents.repeat(1, SHORT_ROW // T + 1)), torch.Tensor)


def test_rows_of_documents_are_at_most_half_padding(documents):
    rows = document_rows(documents)
    assert sum(n * width for n, width in rows.shapes) == len(rows.index) < 2 * B * T
    assert len(rows.shapes) <= 6
    torch.testing.assert_close(rows.index[rows.inverse], torch.arange(B * T))


def test_the_block_mask_of_gpus_says_the_same(documents):
    q, k, v = made()
    found = attend(q, k, v, document_block_mask(documents))
    torch.testing.assert_close(found, one_by_one(q, k, v))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_block_mask_has_gradients_on_a_gpu(documents):
    given = [x.detach().float().requires_grad_() for x in made()]
    wanted = one_by_one(*given)
    found = attend(*(x.cuda() for x in given), document_block_mask(documents.cuda()))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2, atol=1e-2)
    for gradient, of_torch in zip(
        torch.autograd.grad(found.sum(), given), torch.autograd.grad(wanted.sum(), given), strict=True
    ):
        torch.testing.assert_close(gradient, of_torch, rtol=1e-2, atol=1e-2)
