"""A thousand faults among ten thousand samples: each reported at its place, nothing else missing, nothing twice."""

import io
import itertools
import json
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import soundfile
from herdkit.data.bad_samples import BadSample
from herdkit.data.dialogs import DialogError, dialog_sample
from herdkit.data.loader import Loader
from herdkit.data.media import MediaError, load_audio, load_image, load_video
from herdkit.data.mixture import Mixture
from herdkit.data.shards import Sample, ShardReader, ShardWriter
from PIL import Image

SAMPLES, FAULTS = 10_000, 1_000


def png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def flac():
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 800), 16_000, format="FLAC")
    return file.getvalue()


PNG, FLAC = png(), flac()


def huge_png():
    header = struct.pack(">4sIIBBBBB", b"IHDR", 100_000, 100_000, 8, 2, 0, 0, 0)
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def dialog(*parts):
    user = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    return json.dumps({"messages": [user, {"role": "assistant", "content": "That."}]}).encode()


GOOD = {
    "text": {"json": dialog()},
    "image": {"json": dialog({"type": "image", "image": "png"}), "png": PNG},
    "audio": {"json": dialog({"type": "audio", "audio": "flac"}), "flac": FLAC},
}
IN_JSON = {
    "empty": b"",
    "cut": dialog()[:-7],
    "no JSON": b"What is this?",
    "not UTF-8": dialog().replace(b"What", b"\xff\xfe\xfd"),
    "nested too deeply": b"[" * 100_000,
    "a list": b"[1, 2]",
    "null": b"null",
    "no messages": b'{"text": "What?"}',
    "no list": b'{"messages": "What?"}',
    "a number": b'{"messages": [7]}',
    "an unknown role": dialog().replace(b"user", b"robot"),
    "an unknown part": dialog({"type": "smell", "smell": "png"}),
    "no such member": dialog({"type": "image", "image": "jpg"}),
    "too long a number": b'{"messages": ' + b"7" * 10_000 + b"}",
}
IN_PNG = {
    "empty": b"",
    "cut in the header": PNG[:20],
    "cut in the picture": PNG[: len(PNG) // 2],
    "far too large": huge_png(),
    "text": b"<html>404 Not Found</html>",
    "sound": FLAC,
    "zeros": bytes(5000),
    "damaged": PNG[:50] + bytes(40) + PNG[90:],
}
IN_FLAC = {
    "empty": b"",
    "cut in the header": FLAC[:30],
    "cut in the sound": FLAC[: len(FLAC) // 2],
    "text": b"RIFF is the name of a magazine",
    "a picture": PNG,
    "zeros": bytes(5000),
}
BROKEN = [
    *(("text", "json", kind, {"json": content}) for kind, content in IN_JSON.items()),
    ("text", "json", "missing", {"txt": b"What?"}),
    *(("image", "png", kind, GOOD["image"] | {"png": content}) for kind, content in IN_PNG.items()),
    *(("audio", "flac", kind, GOOD["audio"] | {"flac": content}) for kind, content in IN_FLAC.items()),
    ("image", "json", "no such member", {"json": GOOD["image"]["json"]}),
]


def decode(samples):
    """(position, key) of samples whose dialogs and media have been decoded."""
    for _, sample in samples:
        for message in dialog_sample(sample):
            for part in message.media:
                {"image": load_image, "audio": load_audio, "video": load_video}[part.type](part.media)
    return [(position, sample.key) for position, sample in samples]


@pytest.fixture(scope="module")
def injected(tmp_path_factory):
    """Shards with faults, and what is wrong with which key: (shard, member, kind)."""
    folder = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    faulty = dict.fromkeys(rng.sample(range(SAMPLES), FAULTS))
    kinds = itertools.cycle(BROKEN)
    wrong = {}
    with ShardWriter(folder / "%03d.tar", max_count=3000) as writer:
        for number in range(SAMPLES):
            key = f"{number:05d}"
            if number in faulty:
                _, member, kind, members = next(kinds)
                wrong[key] = (str(folder / f"{number // 3000:03d}.tar"), member, kind)
            else:
                members = GOOD["image" if number % 50 == 0 else "audio" if number % 50 == 1 else "text"]
            writer.write(key, members)
    return ShardReader(folder), wrong


def test_every_fault_is_reported_and_every_good_sample_comes_once(injected):
    reader, wrong = injected
    world_size = 3
    good, found, batches = [], [], []
    order = Mixture([("made", reader, 1)], epochs={"made": 1})
    for rank in range(world_size):
        options = {"seed": 1, "rank": rank, "world_size": world_size, "workers": 2}
        one = Loader(order, decode, 40, on_bad="skip", max_bad=FAULTS, **options)
        batches.append(list(one))
        good += [item for batch in batches[-1] for item in batch]
        found += one.bad
        one.close()
    assert {len(of_rank) for of_rank in batches} == {-(-SAMPLES // (40 * world_size))}
    assert len(wrong) == FAULTS
    assert Counter(key for _, key in good) == Counter(f"{i:05d}" for i in range(SAMPLES) if f"{i:05d}" not in wrong)
    assert {key: (bad.shard, bad.member) for bad in found for key in [bad.key]} == {
        key: (shard, member) for key, (shard, member, _) in wrong.items()
    }
    assert len(found) == FAULTS
    at = {order.readers[0][order.locate(position, 1).index].key: position for position in range(SAMPLES)}
    assert all(at[bad.key] == bad.position for bad in found)
    assert all(at[key] == position for position, key in good)
    assert all(bad.reason and bad.shard not in bad.reason and "\n" not in bad.reason for bad in found)


@pytest.mark.parametrize(("kind", "member", "what", "members"), BROKEN)
def test_a_fault_is_blamed_on_its_member(kind, member, what, members):
    sample = Sample("7", "a.tar", {name: bytes(content) for name, content in members.items()})
    with pytest.raises((DialogError, MediaError)) as caught:
        decode([(0, sample)])
    bad = BadSample.of(0, sample, caught.value)
    assert (bad.shard, bad.key, bad.member) == ("a.tar", "7", member)
    assert str(bad) == f"a.tar: sample 7.{member} (position 0): {bad.reason}"
