"""Groups the members of a tar into samples, and decides which of them are good.

Where bytes were lost nobody knows what they held, so that the samples on both sides of them may lack members. Such a
sample is taken for whole if others of the shard have the same members and none has more, or if what was lost was one
member that makes a sample of its own. No sample is left out
without a fault that names it, or the bytes in which it was.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace

import numpy as np

from .faults import Fault
from .shard_index import META, ShardIndex, Stamp, leaves_folder, narrowed
from .tar_headers import BLOCK, shown
from .tar_scan import Damage, Members, Source, TarScan

_MAX_UNSAFE = 100
_FULL = 99
"""Bytes of a name that may be the start of a longer one."""


def scan_samples(
    source: Source, shard: str, stamp: Stamp, compression: str = "", smallest_read: int = 4096
) -> ShardIndex:
    """Indexes a tar as far as it can be read; what cannot be is in the index's `faults`.

    Args:
        source: its bytes, uncompressed.
        shard: its name, for the faults.
        stamp, compression: of the file as stored, for the index.
        smallest_read: see `TarScan`.
    """
    scan, runs = TarScan(source, smallest_read), _Runs()
    for event in scan:
        if isinstance(event, Damage):
            runs.damages.append((len(runs.extensions), event))
        else:
            runs.add(event)

    extensions = np.array(runs.extensions, np.int64)
    members = np.flatnonzero(extensions >= 0)
    extensions, offsets = extensions[members], np.array(runs.offsets, np.uint64)[members]
    starts = np.searchsorted(members, np.array(runs.firsts, np.int64))
    run_of = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(members)))
    ignored = scan.ignored + Counter({"without a key or an extension": len(runs.extensions) - len(members)})
    keys, faults, order = runs.keys, [], slice(None)
    places = np.sort(run_of * len(runs.names) + extensions)
    twice = bool((places[1:] == places[:-1]).any())
    if runs.damages or twice or len(set(keys)) < len(keys):
        judge = _Judge(runs, members, starts, extensions, offsets)
        sample_of, faults = judge.samples(scan.has_long_names)
        sample_of = sample_of[run_of]
        order = np.argsort(sample_of, kind="stable")
        order = order[sample_of[order] >= 0]
        chosen, starts = np.unique(sample_of[order], return_index=True)
        keys = [keys[run] for run in chosen.tolist()]
    offsets = offsets[order]
    unit = 1 if (offsets % BLOCK).any() else BLOCK
    return ShardIndex(
        stamp=stamp,
        compression=compression,
        extension_names=runs.names,
        unit=unit,
        starts=narrowed(np.append(starts, len(offsets))),
        key_starts=narrowed(np.cumsum([0, *map(len, keys)])),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        offsets=narrowed(offsets // unit),
        sizes=narrowed(np.array(runs.sizes, np.uint64)[members][order]),
        headers=np.array(runs.headers, np.uint32)[members][order],
        extensions=narrowed(extensions[order]),
        ignored=dict(ignored),
        unsafe=_unsafe(keys),
        faults=[replace(fault, shard=shard) for fault in faults],
    )


class _Runs:
    """Members as they come, in runs that share a key."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.firsts = array("Q")
        """Number of each run's first member, among all that were met."""
        self.extensions = array("q")
        """By number; -1 for what belongs to no sample."""
        self.offsets, self.sizes, self.headers = array("Q"), array("Q"), array("L")
        self.names: list[str] = []
        self.damages: list[tuple[int, Damage]] = []
        """With the number of members that were met before."""
        self._numbers: dict[bytes, int] = {}

    def add(self, members: Members) -> None:
        self.offsets.extend(members.offsets)
        self.sizes.extend(members.sizes)
        self.headers.extend(members.headers)
        keys, numbers, extensions = self.keys, self._numbers, []
        prefix = keys[-1] + b"." if keys else b"."
        for count, name in enumerate(members.names, len(self.extensions)):
            if name.startswith(prefix) and (number := numbers.get(name[len(prefix) :])) is not None:
                extensions.append(number)
                continue
            folder = name.rfind(b"/") + 1
            dot = name.find(b".", folder)
            if dot <= folder or (name[:2] == b"__" and META.match(text(name))):
                extensions.append(-1)
                continue
            number = numbers.get(name[dot + 1 :])
            extensions.append(self._new_extension(name[dot + 1 :]) if number is None else number)
            if name[: dot + 1] != prefix:
                prefix = name[: dot + 1]
                keys.append(name[:dot])
                self.firsts.append(count)
        self.extensions.extend(extensions)

    def _new_extension(self, extension: bytes) -> int:
        name = text(extension).lower()
        if name not in self.names:
            self.names.append(name)
        self._numbers[extension] = number = self.names.index(name)
        return number


class _Judge:
    """Which runs make up samples, where keys come again or something is damaged.

    Args:
        runs: of the shard.
        members (m): their numbers among all that were met.
        starts (r): place in `members` of each run's first.
        extensions, offsets (m): of the members.
    """

    def __init__(self, runs: _Runs, members: np.ndarray, starts: np.ndarray, extensions: np.ndarray, offsets):
        self.runs, self.members, self.starts = runs, members, starts
        self.at = (offsets[starts] - np.uint64(BLOCK)).tolist() if len(starts) else []
        """Byte where each run starts."""
        self.offsets, self.all_extensions = offsets, extensions
        self.extensions = [part.tolist() for part in np.split(extensions, starts[1:])] if len(starts) else []
        self.faults: list[Fault] = []
        self.bad: set[bytes] = set()
        """Keys that are left out, each with a fault that says why."""
        self.sample_of = list(range(len(runs.keys)))
        """Of each run: the first run of its sample; -1 for none."""
        self.held: dict[int, frozenset[int]] = {}
        """The extensions of each sample."""

    def samples(self, has_long_names: bool) -> tuple[np.ndarray, list[Fault]]:
        merged = self._merge()
        repeated, self.faults = self.faults, []
        doubtful = self._read_damages(has_long_names)
        self.faults += repeated
        if merged and any(damage.gap for _, damage in self.runs.damages):
            doubtful = set(self.held)
        incomplete = self._incomplete(doubtful, merged)
        self._use_hints(incomplete)
        for sample, reason in incomplete.items():
            key = self.runs.keys[sample]
            self.bad.add(key)
            self._fault(self.at[sample], f"sample {shown(key)} at byte {self.at[sample]} is left out: {reason}", key)
        gone = {sample for sample in self.held if self.runs.keys[sample] in self.bad}
        sample_of = np.array([-1 if sample in gone else sample for sample in self.sample_of], np.int64)
        return sample_of, self.faults

    def _fault(
        self, offset: int, reason: str, key: bytes | None = None, member: str | None = None, skipped: int = 0
    ) -> None:
        self.faults.append(Fault("", offset, reason, None if key is None else text(key), member, skipped))

    def _merge(self) -> bool:
        """Joins runs of one key, unless the later one repeats it; says whether any were joined."""
        first: dict[bytes, int] = {}
        merged = False
        for run, (key, extensions) in enumerate(zip(self.runs.keys, self.extensions, strict=True)):
            own = frozenset(extensions)
            sample = first.setdefault(key, run)
            if len(own) < len(extensions):
                place = next(i for i, extension in enumerate(extensions) if extension in extensions[:i])
                member, at = self.runs.names[extensions[place]], int(self.offsets[self.starts[run] + place]) - BLOCK
                reason = f"sample {shown(key)} has the member '{shown(member)}' twice, again at byte {at}"
                self._fault(at, reason, key, member)
                self.bad.add(key)
            if sample == run:
                self.held[run] = own
            elif self.held[sample] & own:
                at = self.at[run]
                self._fault(at, f"sample {shown(key)} comes again at byte {at}, with members that it has already", key)
                self.sample_of[run] = -1
            else:
                self.held[sample] |= own
                self.sample_of[run] = sample
                merged = True
        return merged

    def _read_damages(self, has_long_names: bool) -> set[int]:
        """Records what the scan found; returns the samples beside it that may lack members."""
        beside: set[int] = set()
        beside_one: dict[int, list[bytes]] = {}
        self.hinted: set[bytes] = set()
        for count, damage in self.runs.damages:
            key, member = split(damage.name)
            self._fault(damage.offset, damage.reason, key, member, damage.skipped)
            if key is not None:
                self.bad.add(key)
            if not damage.gap:
                continue
            if (hinted := split(damage.hint)[0]) is not None:
                self.hinted.add(hinted)
            place = int(np.searchsorted(self.members, count))
            # A member whose name is known lies between what was lost and the one before.
            first = place if damage.name else max(0, place - 1)
            for neighbour in range(first, min(place + 1, len(self.members))):
                sample = self.sample_of[self._run_of(neighbour)]
                if damage.alone:
                    beside_one.setdefault(sample, []).append(damage.hint)
                else:
                    beside.add(sample)
            if place < len(self.members) and self.members[place] == count:
                self._doubt_name(place, has_long_names)
        whole = {held for sample, held in self.held.items() if sample not in beside and sample not in beside_one}
        for sample, lost in beside_one.items():
            if not all(self._makes_sample(name, whole) for name in lost):
                beside.add(sample)
        return beside - {-1}

    def _makes_sample(self, name: bytes, whole: set[frozenset[int]]) -> bool:
        """Whether a member is a sample by itself: no other has its key, and some have just such a member."""
        key, extension = split(name)
        if key is None or extension not in self.runs.names or key in self.runs.keys:
            return False
        return frozenset({self.runs.names.index(extension)}) in whole

    def _run_of(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, "right")) - 1

    def _doubt_name(self, place: int, has_long_names: bool) -> None:
        """Leaves out the member right behind a gap if its own name, in a header of its own, may have been lost."""
        key, at = self.runs.keys[self._run_of(place)], int(self.offsets[place]) - BLOCK
        length = len(key) + 1 + len(self.runs.names[self.all_extensions[place]])
        if (has_long_names or length >= _FULL) and key not in self.bad:
            self._fault(at, f"{shown(key)} at byte {at} may be but a part of a name, whose rest is lost", key)
            self.bad.add(key)

    def _incomplete(self, doubtful: set[int], merged: bool) -> dict[int, str]:
        """Those of the samples that may lack members, and why."""
        whole = {held for sample, held in self.held.items() if merged or sample not in doubtful}
        reasons = {}
        for sample in sorted(doubtful):
            held = self.held[sample]
            key = self.runs.keys[sample]
            whole_here = held in whole and not any(held < other for other in whole) and key not in self.hinted
            if key in self.bad or whole_here:
                continue
            has = ", ".join(sorted(self.runs.names[i] for i in held))
            more = max((other for other in whole if held < other), key=len, default=None)
            if more is None:
                reasons[sample] = f"it lies beside damage, and no other sample has just {shown(has)}"
            else:
                others = ", ".join(sorted(self.runs.names[i] for i in more))
                reasons[sample] = f"it lies beside damage and has {shown(has)}, where others have {shown(others)}"
        return reasons

    def _use_hints(self, incomplete: dict[int, str]) -> None:
        """Names the samples that were lost with their headers: those of which nothing else is good."""
        good = {self.runs.keys[sample] for sample in self.held} - self.bad
        lost = {self.runs.keys[sample]: sample for sample in incomplete}
        hints = {damage.reason: split(damage.hint) for _, damage in self.runs.damages}
        for i, fault in enumerate(self.faults):
            key, member = hints.get(fault.reason, (None, None))
            if fault.key is None and key is not None and (key not in good or key in lost):
                self.faults[i] = replace(fault, key=text(key), member=member)
                if key in lost:
                    incomplete.pop(lost.pop(key))
                self.bad.add(key)


def text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def split(name: bytes) -> tuple[bytes | None, str | None]:
    """Key and extension of a member's name; None for what belongs to no sample."""
    folder = name.rfind(b"/") + 1
    dot = name.find(b".", folder)
    if dot <= folder or META.match(text(name)):
        return None, None
    return name[:dot], text(name[dot + 1 :]).lower()


def _unsafe(keys: list[bytes]) -> list[str]:
    together = b"\n" + b"\n".join(keys)
    if not any(sign in together for sign in (b"..", b"\n/", b"\\", b":", b"\0")):
        return []
    return [key for key in map(text, keys) if leaves_folder(key)][:_MAX_UNSAFE]
