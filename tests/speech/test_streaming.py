"""Streaming gives what the masked forward pass over the whole utterance gives, whatever the pieces are."""

import pytest
import torch
from herdkit.speech import Conformer, ConformerConfig, FeatureConfig, LogMelStream, log_mel
from herdkit.speech.streaming import ConformerStream
from torch import nn

SIZES = {"n_mels": 6, "dim": 16, "n_layers": 3, "n_heads": 2, "ffn_dim": 24, "conv_kernel": 5}


def chunked(chunk=4, left=6, dtype=torch.float64, **changes) -> Conformer:
    torch.manual_seed(0)
    model = Conformer(ConformerConfig(**SIZES | {"chunk_frames": chunk, "left_frames": left} | changes)).to(dtype)
    for weight in model.parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight, mean=float(weight.mean() > 0.5), std=0.3)
    return model.eval()


def utterance(frames: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(frames, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole(model: Conformer, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(features[None], torch.tensor([len(features)]))[0][0]


def streamed(model: Conformer, features: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    stream, out, at = ConformerStream(model, 1), [], 0
    for i, piece in enumerate(pieces):
        part = features[at : at + piece]
        ends = torch.tensor([i == len(pieces) - 1])
        encoded, lengths = stream.push(part[None], torch.tensor([len(part)]), ends)
        out.append(encoded[0, : lengths[0]])
        at += piece
    assert at == len(features)
    return torch.cat(out)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("chunk", "left"), [(4, 6), (1, 0), (3, 3), (8, 40), (5, 1)])
def test_any_split_gives_the_frames_of_the_whole_utterance(chunk, left, dtype, tolerance):
    model, features = chunked(chunk, left, dtype), utterance(157, 1, dtype)
    expected = whole(model, features)
    assert expected.shape == (40, 16)
    for pieces in ([157], [1] * 157, [10] * 15 + [7], [64, 0, 3, 90], [100, 57, 0], [0, 156, 1]):
        torch.testing.assert_close(streamed(model, features, pieces), expected, atol=tolerance, rtol=0)


def test_rows_at_different_stages_are_each_as_if_alone():
    model = chunked()
    texts = [[utterance(n, seed) for seed, n in enumerate(lengths)] for lengths in ((90, 33), (7, 64, 50), (121,))]
    generator = torch.Generator().manual_seed(5)
    stream = ConformerStream(model, 3)
    place = [[0, 0] for _ in texts]
    found = [[[] for _ in row] for row in texts]
    while any(which < len(row) for (which, _), row in zip(place, texts, strict=True)):
        counts, ends, features = [], [], torch.full((3, 40, 6), float("nan"), dtype=torch.float64)
        before = [which for which, _ in place]
        for n, row in enumerate(texts):
            which, at = place[n]
            left = len(row[which]) - at if which < len(row) else 0
            count = min(int(torch.randint(0, 40, (), generator=generator)), left)
            if count:
                features[n, :count] = row[which][at : at + count]
            ends.append(which < len(row) and count == left)
            counts.append(count)
            place[n] = [which + 1, 0] if ends[-1] else [which, at + count]
        encoded, lengths = stream.push(features, torch.tensor(counts), torch.tensor(ends))
        assert not encoded[torch.arange(encoded.shape[1]) >= lengths[:, None]].any()
        for n, which in enumerate(before):
            if which < len(texts[n]):
                found[n][which].append(encoded[n, : lengths[n]])
    for row, parts in zip(texts, found, strict=True):
        for features, pieces in zip(row, parts, strict=True):
            torch.testing.assert_close(torch.cat(pieces), whole(model, features), atol=1e-12, rtol=0)


def test_frames_come_as_soon_as_their_chunk_is_complete():
    model, features = chunked(chunk=4), utterance(40, 0)
    stream, counts = ConformerStream(model, 1), []
    for frame in features:
        counts.append(int(stream.push(frame[None, None], torch.tensor([1]))[1]))
    assert [i for i, count in enumerate(counts) if count] == [15, 31]
    assert set(counts) == {0, 4}


def test_a_frame_sees_its_chunk_and_what_the_config_says_before_it():
    model = chunked(chunk=4, left=6, n_layers=1, conv_kernel=1)
    features = utterance(120, 2)
    base = whole(model, features)
    for edited in (0, 21, 22, 29):
        noisy = features.clone()
        noisy[4 * edited : 4 * edited + 4] += utterance(4, 9)
        moved = (whole(model, noisy) - base).abs().amax(1) > 1e-9
        expected = [t // 4 * 4 - 6 <= edited < t // 4 * 4 + 4 for t in range(30)]
        assert moved.tolist() == expected, edited


def test_padding_and_neighbours_change_nothing_and_gradients_are_finite():
    model = chunked(chunk=3, left=2)
    frames = torch.tensor([90, 13, 4, 61])
    features = torch.full((4, 90, 6), float("nan"), dtype=torch.float64)
    for n, count in enumerate(frames.tolist()):
        features[n, :count] = utterance(count, n)
    encoded, lengths = model(features, frames)
    for n, count in enumerate(frames.tolist()):
        alone = whole(model, features[n, :count])
        torch.testing.assert_close(encoded[n, : lengths[n]], alone, atol=1e-12, rtol=0)
        assert not encoded[n, lengths[n] :].any()
    encoded.square().sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_a_reset_row_forgets_and_the_others_remember():
    model, features = chunked(), utterance(96, 3)
    stream = ConformerStream(model, 2)
    stream.push(torch.randn(2, 48, 6).double(), torch.tensor([48, 0]))
    stream.push(features[None, :48].expand(2, -1, -1), torch.tensor([0, 48]))
    stream.reset([0])
    for part in (features[:48], features[48:]):
        stream.push(part.expand(2, -1, -1), torch.tensor([len(part), 0]))
    encoded, lengths = stream.push(features[None, 48:].expand(2, -1, -1), torch.tensor([0, 48]))
    assert lengths.tolist() == [0, 12]
    torch.testing.assert_close(encoded[1], whole(model, features)[12:], atol=1e-12, rtol=0)


def test_an_encoder_of_whole_utterances_cannot_stream():
    with pytest.raises(ValueError, match="chunk_frames"):
        ConformerStream(Conformer(ConformerConfig(**SIZES)), 1)
    with pytest.raises(ValueError, match="go together"):
        ConformerConfig(**SIZES, chunk_frames=4)
    with pytest.raises(ValueError, match="left_frames must be at least 0"):
        ConformerConfig(**SIZES, chunk_frames=4, left_frames=-1)


def test_from_samples_to_encoder_frames_a_stream_is_the_whole():
    torch.manual_seed(0)
    config = FeatureConfig(normalize="none")
    model = Conformer(ConformerConfig(**SIZES | {"n_mels": 80}, chunk_frames=4, left_frames=8)).eval()
    waveform = 0.1 * torch.randn(16_000 + 333)
    expected = whole(model, log_mel(waveform, config))
    for pieces in (800, 1601, 20_000):
        mel, stream, found = LogMelStream(config), ConformerStream(model, 1), []
        for part in [*waveform.split(pieces), None]:
            features = mel.finish() if part is None else mel.push(part)
            encoded, lengths = stream.push(features[None], torch.tensor([len(features)]), torch.tensor([part is None]))
            found.append(encoded[0, : lengths[0]])
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=0)
