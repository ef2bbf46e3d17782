import pytest
import torch
from herdkit.text import attention
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


@pytest.mark.parametrize("layout", ["mask", "rows"])
def test_documents_see_only_themselves(documents, layout, monkeypatch):
    monkeypatch.setattr(attention, "FEW_DOCUMENTS", {"mask": T, "rows": 0}[layout])
    seen = see_own_document(documents)
    assert isinstance(seen, torch.Tensor) == (layout == "mask")
    q, k, v = made(requires_grad=True)
    wanted, found = one_by_one(q, k, v), attend(q, k, v, seen)
    torch.testing.assert_close(found, wanted)
    sent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for gradient, of_torch in zip(
        torch.autograd.grad(found, (q, k, v), sent), torch.autograd.grad(wanted, (q, k, v), sent), strict=True
    ):
        torch.testing.assert_close(gradient, of_torch)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_attention_on_a_cpu_is_that_of_float32(monkeypatch, amx, autocast):
    monkeypatch.setattr(attention, "cpu_has", lambda unit: amx)
    seen = []
    kernel = F.scaled_dot_product_attention

    def spied(q, *rest, **options):
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, *rest, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spied)
    given = [x.detach().bfloat16().requires_grad_() for x in made()]
    exact = [x.detach().double().requires_grad_() for x in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(*([x.float() for x in given] if autocast else given))
    assert found.dtype == torch.bfloat16
    native = (torch.float32 if autocast else torch.bfloat16, autocast)
    assert seen == [native if amx else (torch.float32, False)]
    wanted = attend(*exact)
    sent = torch.ones_like(found)
    rounded = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(found.double(), wanted, **rounded)
    gradients = torch.autograd.grad(found, given, sent), torch.autograd.grad(wanted, exact, sent.double())
    for gradient, of_exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient.double(), of_exact, rtol=3e-2, atol=5e-2)


def test_bfloat16_attention_compiles_into_one_graph():
    given = [x.bfloat16() for x in made()]
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="eager")(*given), attend(*given))


def test_rows_are_masked_where_they_are_short_and_hold_few_documents(documents):
    few = documents[[1, 3]]
    assert isinstance(see_own_document(few), torch.Tensor)
    assert not isinstance(see_own_document(few.repeat(1, SHORT_ROW // T + 1)), torch.Tensor)
    assert not isinstance(see_own_document(documents), torch.Tensor)


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
