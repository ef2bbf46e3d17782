import re
from itertools import pairwise

from herdkit.speech.alignment import Word
from herdkit.speech.subtitles import MAX_LETTERS, MAX_SECONDS, cues, srt, vtt
from herdkit.speech.transcribe import TextSegment


def test_both_formats():
    segments = [TextSegment(0.5, 2.0, "fish & <chips>"), TextSegment(3723.25, 3724.0, "over"), TextSegment(4, 5, "")]
    assert srt(segments) == (
        "1\n00:00:00,500 --> 00:00:02,000\nfish & <chips>\n\n2\n01:02:03,250 --> 01:02:04,000\nover\n\n"
    )
    assert vtt(segments) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\nfish &amp; &lt;chips&gt;\n\n01:02:03.250 --> 01:02:04.000\nover\n\n"
    )
    assert "\n\n2\n" in srt([TextSegment(0, 1, "a --> b"), TextSegment(1, 2, "c")])
    assert len(re.findall("-->", srt([TextSegment(0, 1, "a --> b")]))) == 1


def test_long_segments_become_several_cues_at_words():
    words = [Word(f"word{i:02d}", 0.5 * i, 0.5 * i + 0.4, 1.0) for i in range(40)]
    text = " ".join(word.text for word in words)
    for segment in (TextSegment(0.0, 19.9, text, words=words), TextSegment(0.0, 19.9, text)):
        found = cues([segment])
        assert " ".join(cue.text for cue in found) == text
        assert all(len(cue.text) <= MAX_LETTERS and cue.end - cue.start <= MAX_SECONDS for cue in found)
        assert all(a.end <= b.start for a, b in pairwise(found))
        assert found[-1].end <= 19.9001
    timed = cues([TextSegment(0.0, 19.9, text, words=words)])
    assert {cue.start for cue in timed} <= {word.start for word in words}
