import contextlib
import io
import struct
import threading
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from herdkit.data import media, video_seek
from herdkit.data.media import MediaError, load_video
from PIL import Image

FAST = {"deadline": "realtime", "cpu-used": "8"}
FINE = {"b": "4000000"}
LOSSLESS = {"qp": "0", "preset": "ultrafast"}


def shown(clip):
    """The index of each frame, from its brightness bottom right (see `encode_video`)."""
    return [round(value / 8) for value in clip.frames[:, :, -4:, -4:].float().mean((1, 2, 3)).tolist()]


def expected(stamps, end, frames):
    """The rule in its plainest form: at each slice's centre, the last frame that has begun."""
    start = Fraction(stamps[0])
    centres = [start + (Fraction(end) - start) * (2 * k + 1) / (2 * frames) for k in range(frames)]
    return [max(i for i, stamp in enumerate(stamps) if stamp <= centre) for centre in centres]


CONTAINERS = [
    ("mp4", "libx264", {}),
    ("mp4", "mpeg4", FINE),
    ("mov", "libx264", {}),
    ("mkv", "libx264", {}),
    ("mkv", "ffv1", {}),
    ("webm", "libvpx-vp9", FAST),
    ("webm", "libvpx", FAST),
    ("avi", "mpeg4", FINE),
    ("avi", "mpeg4", {"bf": "2"} | FINE),
    ("avi", "libx264", {}),
    ("flv", "libx264", {}),
    ("ts", "libx264", {}),
    ("gif", "gif", {}),
]


@pytest.mark.parametrize(("container", "codec", "options"), CONTAINERS)
def test_containers_and_codecs(video, container, codec, options):
    gif = container == "gif"
    data = video(container, codec, frames=31, options=options, pixels="rgb8" if gif else "yuv420p")
    clip = load_video(data, 8)
    assert clip.frames.dtype == torch.uint8
    assert clip.frames.shape == (8, 3, 48, 64)
    assert clip.frames.is_contiguous()
    assert clip.times.dtype == torch.float32
    right = expected(range(31), 31, 8)
    if gif:  # its palette has few greys
        assert torch.allclose(clip.times, torch.tensor(right) / 10, atol=1e-6)
    else:
        assert shown(clip) == right
        assert torch.allclose(clip.times, torch.tensor(right) / 10, atol=1e-3)
    red = clip.frames[:, :, 4, 4].float().mean(0)
    assert red[0] > 230
    assert red[1:].max() < 25


@pytest.mark.parametrize("count", [1, 2, 7, 30])
@pytest.mark.parametrize("frames", [1, 2, 5, 15, 16, 40])
def test_uniform_sampling(video, count, frames):
    clip = load_video(video("mkv", frames=count, options=LOSSLESS), frames)
    right = expected(range(count), count, frames)
    assert shown(clip) == right
    assert torch.allclose(clip.times, torch.tensor(right) / 10, atol=1e-3)


@pytest.mark.parametrize("container", ["mp4", "mkv", "webm"])
def test_variable_rate(video, container):
    stamps = [0, 40, 50, 60, 70, 80, 500, 540, 1000, 1001, 1500, 3000]
    codec, options = ("libvpx-vp9", FAST) if container == "webm" else ("libx264", LOSSLESS)
    data = video(
        container,
        codec,
        frames=len(stamps),
        rate=25,
        stamps=stamps,
        time_base=Fraction(1, 1000),
        options=options,
    )
    with av.open(io.BytesIO(data)) as file:
        end = max(p.pts + (p.duration or 0) for p in file.demux(video=0) if p.pts is not None) * 1000
        end = end * file.streams.video[0].time_base
    for frames in [1, 4, 9, 33]:
        # A last frame without a duration gets the customary one.
        chosen = shown(load_video(data, frames))
        ends = [end] if end > 3000 else [3000 + 3000 // 11, 3000 + 3000 // 11 + 1]
        assert chosen in [expected(stamps, one, frames) for one in ends]


def test_video_that_does_not_begin_at_zero(video):
    stamps = list(range(5000, 5300, 10))
    data = video("mkv", frames=30, stamps=stamps, time_base=Fraction(1, 100), options=LOSSLESS)
    clip = load_video(data, 6)
    assert shown(clip) == expected(range(30), 30, 6)
    assert clip.times[0].item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("container", "sound"), [("mp4", "aac"), ("mkv", "libopus"), ("webm", "libopus")])
def test_sound_makes_no_difference(video, container, sound):
    codec, options = ("libvpx-vp9", FAST) if container == "webm" else ("libx264", {})
    with_sound = load_video(video(container, codec, frames=20, options=options, sound=sound), 5)
    assert shown(with_sound) == expected(range(20), 20, 5)


def rotated(data, matrix):
    """An MP4 with another matrix in its track header (QuickTime File Format, "Track Header Atoms")."""
    place = data.index(b"tkhd") + 4 + 40
    return (
        data[:place]
        + struct.pack(">9i", *(int(v * scale) for v, scale in zip(matrix, SCALES, strict=True)))
        + (data[place + 36 :])
    )


SCALES = [1 << 16, 1 << 16, 1 << 30] * 3
# x' = a x + c y, y' = b x + d y with y downward; the red quarter moves from the top left to where named.
MATRICES = {
    "top right": ((0, 1, 0, -1, 0, 0, 48, 0, 1), (64, 48)),  # a phone held upright
    "bottom right": ((-1, 0, 0, 0, -1, 0, 64, 48, 1), (48, 64)),
    "bottom left": ((0, -1, 0, 1, 0, 0, 0, 64, 1), (64, 48)),
    "top left": ((1, 0, 0, 0, 1, 0, 0, 0, 1), (48, 64)),
}


@pytest.mark.parametrize("corner", MATRICES)
def test_rotation(video, corner):
    matrix, shape = MATRICES[corner]
    clip = load_video(rotated(video("mp4", frames=3), matrix), 2)
    assert tuple(clip.frames.shape[2:]) == shape
    for name, (row, column) in {"top": (4, 0), "bottom": (-4, 0)}.items():
        for side, column in {"left": 4, "right": -4}.items():
            is_red = bool(clip.frames[0, 0, row, column] > 200)
            assert is_red == (f"{name} {side}" == corner)
    small = load_video(rotated(video("mp4", frames=3), matrix), 2, size=32)
    assert tuple(small.frames.shape[2:]) == (shape[0] // 2, shape[1] // 2)


def test_size_limits_the_longer_side(video):
    data = video("mkv", "ffv1", frames=2, size=(96, 50))
    whole = load_video(data, 1)
    assert tuple(load_video(data, 1, size=200).frames.shape[2:]) == (50, 96)
    small = load_video(data, 1, size=48)
    assert tuple(small.frames.shape[2:]) == (25, 48)
    picture = Image.fromarray(whole.frames[0].permute(1, 2, 0).numpy())
    oracle = np.asarray(picture.resize((48, 25), Image.Resampling.BILINEAR), np.int16)
    assert np.abs(small.frames[0].permute(1, 2, 0).numpy() - oracle).mean() < 4
    assert tuple(load_video(data, 1, size=1).frames.shape[2:]) == (1, 1)


def test_only_the_frames_taken_are_converted(video, monkeypatch):
    converted = []
    original = media.picture_of
    for module in (media, video_seek):
        monkeypatch.setattr(module, "picture_of", lambda *args: converted.append(1) or original(*args))
    load_video(video("mp4", frames=60, rate=30), 4)
    assert len(converted) == 4
    load_video(video("mp4", frames=2), 9)
    assert len(converted) == 6


GROUPS = [
    ("mp4", "libx264", {"g": "12", "bf": "3"}),
    ("mkv", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    ("mp4", "mpeg4", {"g": "9", "bf": "2"} | FINE),
    ("webm", "libvpx-vp9", {"g": "10"} | FAST),
    ("webm", "libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    ("mkv", "ffv1", {}),
    ("ts", "libx264", {"g": "12", "bf": "3"}),
]


@pytest.mark.parametrize(("container", "codec", "options"), GROUPS)
@pytest.mark.parametrize("frames", [1, 3, 40])
def test_frames_found_by_their_key_frames_are_those_of_the_whole_stream(video, container, codec, options, frames):
    data = video(container, codec, frames=61, options=options)
    found, whole = load_video(data, frames), load_video(data, frames, whole=True)
    assert torch.equal(found.times, whole.times)
    assert torch.equal(found.frames, whole.frames)


def test_only_what_leads_to_the_frames_taken_is_decoded(video, monkeypatch):
    decoded = []
    original = media.on_show

    def counted(packets, context, *others):
        counter = SimpleNamespace(
            decode=lambda packet: [decoded.append(1) or frame for frame in context.decode(packet)],
            flush_buffers=context.flush_buffers,
        )
        return original(packets, counter, *others)

    monkeypatch.setattr(media, "on_show", counted)
    load_video(video("mp4", "libx264", frames=200, options={"g": "10", "bf": "0", "sc_threshold": "0"}), 2)
    # Frames 50 and 150 are wanted, both key frames.
    assert len(decoded) == 2


def packet(stamp: int, key: bool = False) -> SimpleNamespace:
    return SimpleNamespace(pts=stamp, is_keyframe=key, size=1)


def test_what_has_to_be_decoded_for_a_frame():
    # Shown 0 1 2 3 | 6 4 5 7 | 10 8 9: 4 and 5 follow the key frame 6 and are shown before it, as 8 and 9 before 10.
    stream = [packet(t, t in (0, 6, 10)) for t in (0, 1, 2, 3, 6, 4, 5, 7, 10, 8, 9)]
    assert video_seek._spans(stream, [2]) == [(0, 2)]
    assert video_seek._spans(stream, [4]) == [(4, 4)]
    assert video_seek._spans(stream, [5]) == [(0, 5)]
    assert video_seek._spans(stream, [2, 7]) == [(0, 2), (4, 7)]
    assert video_seek._spans(stream, [5, 7]) == [(0, 7)]
    assert video_seek._spans(stream, [9]) == [(4, 9)]
    assert video_seek._spans(stream[1:], [0]) is None


def test_frames_that_change_their_size_on_the_way(video):
    joined = video("ts", frames=10) + video("ts", frames=10, size=(32, 32))
    clip = load_video(joined, 10)  # its time stamps begin anew, too
    assert clip.frames.shape == (10, 3, 48, 64)
    right = expected(range(20), 20, 10)
    assert shown(clip) == [index % 10 for index in right]
    assert torch.allclose(clip.times, torch.tensor(right) / 10, atol=1e-3)


def test_transparency_of_a_gif_is_white():
    frames = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(3)]
    for x, frame in enumerate(frames):
        frame.putpixel((x, 0), (255, 0, 0, 255))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    clip = load_video(file.getvalue(), 3)
    assert clip.frames[:, :, 7, 7].unique().tolist() == [255]
    assert [clip.frames[i, :, 0, i].tolist() for i in range(3)] == [[255, 0, 0]] * 3


def test_threads_do_not_disturb_each_other(video):
    datas = [video("mp4", frames=20, size=size) for size in [(64, 48), (32, 80)]]
    alone = [load_video(data, 6) for data in datas]
    same = []

    def work(which):
        for _ in range(5):
            same.append(torch.equal(load_video(datas[which], 6).frames, alone[which].frames))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 20


def reason(source):
    with pytest.raises(MediaError) as caught:
        load_video(source, 4)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {}),
        ("mp4", "libx264", {"movflags": "+faststart"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("mkv", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", FINE),
        ("flv", "libx264", {}),
    ],
)
def test_truncated(video, container, codec, options, part):
    data = video(container, codec, frames=30, options=FAST if codec == "libvpx-vp9" else {}, container_options=options)
    load_video(data, 4)
    reason(data[: int(len(data) * part)])


def test_what_is_no_video_is_a_named_error(video, tmp_path):
    sound = tmp_path / "tone.mp3"
    soundfile.write(sound, 0.5 * np.sin(np.arange(16_000) / 10), 16_000)
    assert reason(sound) == f"{sound}: has no picture track"
    cover = io.BytesIO()
    Image.new("RGB", (16, 16), (255, 0, 0)).save(cover, "JPEG")
    picture = b"\0image/jpeg\0\3\0" + cover.getvalue()
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    synchsafe = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    with_cover = tmp_path / "cover.mp3"
    with_cover.write_bytes(b"ID3\3\0\0" + synchsafe + frame + sound.read_bytes())
    with av.open(str(with_cover)) as file:
        assert len(file.streams.video) == 1
    assert "has no picture track" in reason(with_cover)
    assert "not a file of video" in reason(cover.getvalue())
    for name in ["note.mp4", "note.txt", "note.ans"]:  # libav has a decoder for text by the last two names
        text = tmp_path / name
        text.write_text("plain text, no video\n" * 100)
        assert reason(text).startswith(f"{text}: ")
    assert reason(tmp_path / "none.mp4").endswith("cannot open: No such file or directory")
    assert "directory" in reason(tmp_path)
    assert "is empty" in reason(b"")
    for random in range(5):
        reason(np.random.default_rng(random).bytes(5000))
    with pytest.raises(ValueError, match="frames must be at least 1"):
        load_video(sound, 0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        load_video(sound, 1, size=0)


def test_nothing_that_a_file_refers_to_is_opened(video, tmp_path):
    video("ts")
    target = next(tmp_path.glob("*.ts"))
    for name, content in {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
        "list.mp4": f"ffconcat version 1.0\nfile {target}\n",
    }.items():
        playlist = tmp_path / name
        playlist.write_text(content)
        reason(playlist)


def test_huge_frames_are_refused(video, monkeypatch):
    data = video("mp4", frames=2)
    monkeypatch.setattr(media, "MAX_PIXELS", 1000)
    assert "64 x 48 pixels are too large" in reason(data)


def test_damaged_data_never_escapes_as_another_error(video):
    random = np.random.default_rng(0)
    for container, codec in [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("gif", "gif")]:
        data = video(container, codec, frames=5, pixels="rgb8" if codec == "gif" else "yuv420p")
        data = np.frombuffer(data, np.uint8)
        for _ in range(30):
            broken = data.copy()
            broken[random.integers(0, len(data), 8)] = random.integers(0, 256, 8)
            with contextlib.suppress(MediaError):
                assert len(load_video(broken.tobytes(), 3, size=64).frames) == 3


def test_frames_without_usable_time_stamps_go_on_at_the_customary_rate():
    frames = [SimpleNamespace(pts=stamp) for stamp in [None, 13, 13, None, 40]]
    shown = media._shown([SimpleNamespace(decode=lambda: frames)], [], 3, 10)  # type: ignore[list-item]
    assert [(frame.pts, since, until) for frame, since, until in shown] == [
        (None, 3, 13),
        (13, 13, 23),
        (13, 23, 33),
        (None, 33, 40),
        (40, 40, None),
    ]
