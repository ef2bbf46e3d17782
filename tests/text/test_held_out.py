import pytest
import torch
from herdkit.data.shards import ShardWriter
from herdkit.data.sources import SourceConfig
from herdkit.text.held_out import HeldOut, HeldOutConfig
from herdkit.text.row_stage import document_encoder
from torch.nn import functional as F

DOCUMENTS = [" ".join(f"{word}{i}" for i in range(count)) for word, count in (("alpha", 40), ("beta", 1), ("zeta", 25))]


@pytest.mark.parametrize("row_length", [16, 17, 250])
def test_every_token_counts_once_however_documents_are_cut(make_model, tokenizer, tmp_path, row_length):
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=256)
    for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS[::-1])):
        with ShardWriter(tmp_path / name / "%06d.tar") as writer:
            for i, text in enumerate(documents):
                writer.write(f"{i}", {"txt": text.encode()})
    sources = [SourceConfig(shards=str(tmp_path / name / "*.tar"), name=name) for name in "ab"]
    held_out = HeldOut(HeldOutConfig(sources=sources, batch_size=3), document_encoder(tokenizer), 0, row_length)
    losses = held_out.document_losses(model)
    expected = []
    for text in DOCUMENTS:
        tokens = [*tokenizer.encode(text, bos=True), tokenizer.eos_id]
        loss, at = 0.0, 1
        while at < len(tokens):
            row = torch.tensor(tokens[at - 1 : at - 1 + row_length])
            loss += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
            at += len(row) - 1
        expected.append((loss, len(tokens) - 1))
    torch.testing.assert_close(losses["a"], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["b"], losses["a"].flip(0))
    mean = sum(loss for loss, _ in expected) / sum(count for _, count in expected)
    assert held_out(model, 0)["a_loss"] == pytest.approx(mean, rel=1e-5)
