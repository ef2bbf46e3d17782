"""A thousand faults among ten thousand samples: each reported at its place, nothing else missing, nothing twice."""

import io
import itertools
import json
import random
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from herdkit.data.bad_samples import BadSample, LoaderError
from herdkit.data.dialogs import DialogError, dialog_sample
from herdkit.data.media import MediaError, load_audio, load_image, load_video
from herdkit.data.shards import Sample, ShardError, ShardWriter
from herdkit.data.sources import SHOWN_FAULTS, DataConfig, SourceConfig, open_loader
from PIL import Image

SAMPLES, FAULTS = 10_000, 1_000
UNSAFE = 20
"""Keys that would leave their folder, which is no fault."""
IN_HEADERS = (140, 150)
"""Bytes of the time and the sum. With a wrong size it is not certain that the samples beside it are whole."""


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


def damage_header(content, at, byte):
    content[at + byte] ^= 1


def rename(content, at, key):
    """Gives a header of a member json another key of the same length, and the sum that belongs to it."""
    name = f"{key}.json".encode()
    assert content[at + len(key) : at + len(name) + 1] == b".json\0"
    content[at : at + len(name)] = name
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])


@dataclass
class Injected:
    """Shards, and what is wrong there by key: (shard, member). `good` are the keys of all that is to survive."""

    folder: Path
    good: set[str]
    in_members: dict[str, tuple[str, str | None]]
    in_shards: dict[str, tuple[str, str | None]]
    unsafe: set[str]


@pytest.fixture(scope="module")
def injected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    per_shard = 2500
    texts = [n for n in range(SAMPLES) if n % 50 > 1 and n % per_shard not in (0, per_shard - 1)]
    # No two side by side; and the last of each shard besides.
    chosen = rng.sample(texts[::2], FAULTS + UNSAFE - SAMPLES // per_shard)
    headers, twice, unsafe = chosen[:90], chosen[90:120], chosen[120 : 120 + UNSAFE]
    broken = dict(zip(chosen[120 + UNSAFE :], itertools.cycle(BROKEN), strict=False))
    free = sorted(set(texts) - set(chosen))
    made = Injected(folder, {f"{n:05d}" for n in range(SAMPLES)}, {}, {}, set())

    def shard(number):
        return str(folder / f"{number // per_shard:03d}.tar")

    with ShardWriter(folder / "%03d.tar", max_count=per_shard) as writer:
        for number in range(SAMPLES):
            members = GOOD["image" if number % 50 == 0 else "audio" if number % 50 == 1 else "text"]
            if number in broken:
                _, member, _, members = broken[number]
                made.in_members[f"{number:05d}"] = (shard(number), member)
            writer.write(f"{number:05d}", members)

    contents = {path: bytearray(path.read_bytes()) for path in sorted(folder.glob("*.tar"))}
    at = {}
    for path, content in contents.items():
        at |= {name[:5]: (content, offset) for name, offset in headers_of(path) if name.endswith(".json")}
    for number, byte in zip(headers, itertools.cycle(IN_HEADERS), strict=False):
        damage_header(*at[f"{number:05d}"], byte)
        made.in_shards[f"{number:05d}"] = (shard(number), "json")
    for number in twice:
        first = next(n for n in free if n // per_shard == number // per_shard and abs(n - number) > 1)
        free.remove(first)
        rename(*at[f"{number:05d}"], f"{first:05d}")
        made.in_shards[f"{first:05d}"] = (shard(number), None)
    for place, number in enumerate(unsafe):
        rename(*at[f"{number:05d}"], f"../{place:02d}")
        made.unsafe.add(f"../{place:02d}")
    for number in range(per_shard - 1, SAMPLES, per_shard):
        content, offset = at[f"{number:05d}"]
        del content[offset + 512 + 7 :]
        made.in_shards[f"{number:05d}"] = (shard(number), "json")
    for path, content in contents.items():
        path.write_bytes(content)
    lost = {*headers, *twice, *unsafe, *broken, *range(per_shard - 1, SAMPLES, per_shard)}
    made.good -= {f"{number:05d}" for number in lost}
    made.good |= made.unsafe
    return made


def headers_of(path):
    with tarfile.open(path) as tar:
        return [(member.name, member.offset) for member in tar]


def test_every_fault_is_reported_and_every_good_sample_comes_once(injected, caplog):
    world_size = 3
    data = DataConfig(sources=[SourceConfig(shards=str(injected.folder), name="made", epochs=1)], on_bad="skip")
    data.seed, data.max_bad = 1, FAULTS
    good, found, batches = [], [], []
    for rank in range(world_size):
        one = open_loader(data, decode, 40, rank, world_size)
        batches.append(list(one))
        good += [item for batch in batches[-1] for item in batch]
        found += one.bad
        order, faults = one.mixture, one.faults
        one.close()
    assert len(injected.in_members) + len(injected.in_shards) == len(found) + len(faults) == FAULTS
    assert Counter(key for _, key in good) == Counter(injected.good)
    assert {bad.key: (bad.shard, bad.member) for bad in found} == injected.in_members
    assert {fault.key: (fault.shard, fault.member) for fault in faults} == injected.in_shards
    reader = order.readers[0]
    assert {len(of_rank) for of_rank in batches} == {-(-len(reader) // (40 * world_size))}
    assert {sample.key for sample in reader if sample.leaves_folder} == injected.unsafe
    at = {reader[order.locate(position, 1).index].key: position for position in range(len(reader))}
    assert all(at[bad.key] == bad.position for bad in found)
    assert all(at[key] == position for position, key in good)
    assert all(bad.reason and bad.shard not in bad.reason and "\n" not in bad.reason for bad in [*found, *faults])
    assert f"left out {len(faults) - SHOWN_FAULTS} more" in caplog.text


def test_the_budget_counts_faults_of_shards_of_all_samples(injected):
    data = DataConfig(sources=[SourceConfig(shards=str(injected.folder))], on_bad="skip")
    data.max_bad = (len(injected.in_shards) - 1) / SAMPLES
    with pytest.raises(LoaderError, match=f"{len(injected.in_shards)} bad samples of 9,876 are more than max_bad"):
        open_loader(data, decode, 40)
    data.on_bad, data.max_bad = "raise", None
    with pytest.raises(ShardError, match=r"000.tar: damaged header at byte .* more faults"):
        open_loader(data, decode, 40)


@pytest.mark.parametrize(("kind", "member", "what", "members"), BROKEN)
def test_a_fault_is_blamed_on_its_member(kind, member, what, members):
    sample = Sample("7", "a.tar", {name: bytes(content) for name, content in members.items()})
    with pytest.raises((DialogError, MediaError)) as caught:
        decode([(0, sample)])
    bad = BadSample.of(0, sample, caught.value)
    assert (bad.shard, bad.key, bad.member) == ("a.tar", "7", member)
    assert str(bad) == f"a.tar: sample 7.{member} (position 0): {bad.reason}"
