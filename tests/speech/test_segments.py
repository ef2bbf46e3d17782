from itertools import pairwise

import pytest
import torch
from herdkit.speech.evaluate import made_silence
from herdkit.speech.segments import Segment, SegmentConfig, Segmenter, find_segments, joined
from syllables import RATE, pause, syllables

CUT = SegmentConfig(max_seconds=8.0)


def recording(*lengths: float) -> tuple[torch.Tensor, list[tuple[float, float]]]:
    """Speech of so many seconds, each after a pause, and where it stands."""
    parts, truth, at = [], [], 0.0
    for number, seconds in enumerate(lengths):
        gap = 0.7 + 0.3 * (number % 3)
        parts += [pause(gap), syllables(seconds, number)]
        truth.append((at + gap, at + gap + seconds))
        at += gap + seconds
    return torch.cat([*parts, pause(1.0)]), truth


def pushed(waveform: torch.Tensor, pieces: int, config: SegmentConfig = CUT) -> list[Segment]:
    segmenter, found = Segmenter(RATE, config), []
    for piece in waveform.split(pieces):
        found += segmenter.push(piece)
    return found + segmenter.finish()


def test_speech_is_found_where_it_is():
    waveform, truth = recording(2.0, 1.2, 3.0, 0.6)
    found = pushed(waveform, len(waveform))
    assert len(found) == len(truth)
    for segment, (start, end) in zip(found, truth, strict=True):
        assert start - 0.25 <= segment.start / RATE <= start + 0.05
        assert end - 0.15 <= segment.end / RATE <= end + 0.25
    assert all(a.end <= b.start for a, b in pairwise(found))


@pytest.mark.parametrize("pieces", [160, 777, 16_000, 50_000])
def test_how_samples_are_handed_in_changes_nothing(pieces):
    waveform, _ = recording(2.0, 11.0, 0.8, 5.0)
    assert pushed(waveform, pieces) == pushed(waveform, len(waveform))


def test_a_file_joins_what_a_stream_finds():
    waveform, _ = recording(2.0, 11.0, 0.8, 5.0)
    stream, file = pushed(waveform, 16_000), find_segments(waveform, RATE, CUT)
    assert len(file) < len(stream)
    starts, ends = {one.start for one in stream}, {one.end for one in stream}
    assert all(one.start in starts and one.end in ends for one in file)


def test_the_start_of_a_recording_may_be_speech():
    (found,) = find_segments(torch.cat((syllables(2.0), pause(1.0))), RATE)
    assert found.start == 0
    assert found.end / RATE == pytest.approx(2.0, abs=0.25)


def test_long_speech_is_cut_at_its_quietest_and_nothing_is_lost():
    speech = syllables(30.0)
    speech[7 * RATE : 7 * RATE + 1600] *= 0.01  # shorter than a pause
    found = pushed(torch.cat((pause(1.0), speech, pause(1.0))), RATE)
    assert max(segment.end - segment.start for segment in found) <= 8 * RATE
    assert found[0].end / RATE == pytest.approx(8.05, abs=0.06)
    assert found[0].end == found[1].start
    covered = sum(segment.end - segment.start for segment in found) / RATE
    assert covered == pytest.approx(30, abs=0.6)
    assert len(found) < 7


@pytest.mark.parametrize("kind", list(made_silence(RATE, 0.1, 1)))
def test_nothing_is_found_where_nobody_speaks(kind):
    for waveform in made_silence(RATE, 4.0, 4)[kind]:
        assert find_segments(torch.from_numpy(waveform), RATE) == []


def test_speech_in_noise_fifteen_decibels_below_is_found():
    speech = syllables(3.0)
    noise = torch.randn(5 * RATE, generator=torch.Generator().manual_seed(0))
    noisy = noise * speech.square().mean().sqrt() * 10**-0.75
    noisy[RATE : 4 * RATE] += speech
    (found,) = find_segments(noisy, RATE)
    assert found.start / RATE == pytest.approx(1.0, abs=0.35)
    assert found.end / RATE == pytest.approx(4.0, abs=0.35)


def test_neighbours_share_a_segment_where_they_fit():
    segments = [Segment(0, 10), Segment(12, 20), Segment(25, 40), Segment(41, 60)]
    assert joined(segments, 20) == [Segment(0, 20), Segment(25, 40), Segment(41, 60)]
    assert joined(segments, 35) == [Segment(0, 20), Segment(25, 60)]
    assert joined([], 5) == []
    waveform, _ = recording(2.0, 1.2, 3.0, 0.6)
    assert len(find_segments(waveform, RATE, CUT)) == 2


def test_short_and_empty_recordings():
    assert find_segments(torch.zeros(0), RATE) == []
    assert find_segments(torch.zeros(100), RATE) == []
    assert Segmenter(RATE).finish() == []


@pytest.mark.parametrize(
    ("values", "field"),
    [({"min_silence": 0.0}, "min_silence"), ({"margin": 0.3}, "margin"), ({"min_speech": 0.0}, "min_speech")],
)
def test_config_errors_name_the_field(values, field):
    with pytest.raises(ValueError, match=field):
        SegmentConfig(**values)
    with pytest.raises(ValueError, match="multiple of 100"):
        Segmenter(11_025 + 3)
