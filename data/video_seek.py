"""Frames of a video by time without decoding what lies between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import av
import torch
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from torch import Tensor


def on_show(
    packets: Sequence[av.Packet],
    context: Any,
    targets: Sequence[int],
    scale: int,
    reformatter: VideoReformatter,
    size: int | None,
) -> list[tuple[Tensor, int]] | None:
    """The frames on show at some times, each (3, H, W) uint8 with the time from which it is shown.

    Of each group of pictures in which a frame is wanted, what lies between its key frame and the last one wanted is
    decoded, so that this is never more than the stream from its start.

    Args:
        packets: all of a video stream, in the order of decoding.
        context: its decoder.
        targets: ascending, in the stream's time base times `scale`.
        reformatter, size: see `picture_of`.

    Returns:
        None where the times of packets do not tell, or what was decoded is not what they told; the decoder is then as
        at the start.
    """
    framed = [(i, packet) for i, packet in enumerate(packets) if packet.size and not packet.is_discard]
    shown = sorted((packet.pts, i) for i, packet in framed if packet.pts is not None)
    if not shown or len({stamp for stamp, _ in shown}) < len(framed):
        return None
    stamps = [scale * stamp for stamp, _ in shown]
    wanted = [shown[max(bisect_right(stamps, target) - 1, 0)] for target in targets]
    spans = _spans(packets, sorted({place for _, place in wanted}))
    if spans is None:
        return None
    left = {stamp for stamp, _ in wanted}
    pictures: dict[int, Tensor] = {}
    try:
        for first, last in spans:
            for packet in (*packets[first : last + 1], None):
                for frame in context.decode(packet):
                    if frame.pts is not None and frame.pts in left and not frame.is_corrupt:
                        left.discard(frame.pts)
                        like = next(iter(pictures.values()), None)
                        pictures[frame.pts] = picture_of(frame, reformatter, size, like)
            context.flush_buffers()
    except FFmpegError:
        # Perhaps not damaged, but no stream that can be entered at its key frames; from its start it will show.
        context.flush_buffers()
        return None
    if left:
        return None
    return [(pictures[stamp], stamp) for stamp, _ in wanted]


def _spans(packets: Sequence[av.Packet], places: Sequence[int]) -> list[tuple[int, int]] | None:
    """The first and the last packet of each stretch that has to be decoded for the packets at these places, in the
    order of decoding; None where no key frame comes before one of them."""
    keys = [
        (i, packet.pts)
        for i, packet in enumerate(packets)
        if packet.is_keyframe and packet.size and packet.pts is not None
    ]
    spans: list[tuple[int, int]] = []
    for place in places:
        # Pictures that follow a key frame and are shown before it may need the group before.
        stamp = packets[place].pts or 0
        before = [key for key, begins in keys if key <= place and begins <= stamp]
        if not before:
            return None
        if spans and before[-1] <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(place, spans[-1][1]))
        else:
            spans.append((before[-1], place))
    return spans


def picture_of(frame: av.VideoFrame, reformatter: VideoReformatter, size: int | None, like: Tensor | None) -> Tensor:
    """(3, H, W) uint8, upright; of the size of `like`, since a stream may change its size on the way."""
    turns = round(frame.rotation / 90) % 4
    width, height = frame.width, frame.height
    if like is not None:
        height, width = like.shape[1:] if turns % 2 == 0 else (like.shape[2], like.shape[1])
    elif size is not None and max(width, height) > size:
        scale = size / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
    frame = reformatter.reformat(frame, width=width, height=height, format="rgb24")
    return torch.rot90(torch.from_numpy(frame.to_ndarray()), turns, (0, 1)).permute(2, 0, 1).contiguous()
