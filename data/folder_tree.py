"""Files in a folder and below it as samples, by webdataset's rule: those of one folder whose names agree up to the
first dot are one sample; its key is that part of the path, and what stands after the dot are its members.

    photos/paris/0017.jpg  photos/paris/0017.txt      the members jpg and txt of the sample paris/0017
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .drafts import Draft, Problem, reason_of
from .shard_index import MEMBER, META


class FolderTree:
    """The samples of a folder: those in it, by key, then those of each folder in it, by name.

    Links are followed. Files without an extension, hidden ones and whatever lies in a hidden folder or, at the top, in
    a `__folder__` belong to no sample. Memory is taken for the names in one folder at a time.

    Raises:
        NotADirectoryError: there is no such folder.

    Attributes:
        ignored: files and folders that belonged to no sample when it was last gone through.
        first_ignored: one of them, or "".
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: no such folder")
        self.ignored = 0
        self.first_ignored = ""

    def __iter__(self) -> Iterator[Draft | Problem]:
        self.ignored, self.first_ignored = 0, ""
        return self._walk(self.path, "", ())

    def _walk(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Draft | Problem]:
        """`prefix` is what keys begin with here; `above` are the folders around it, as device and inode."""
        try:
            status = folder.stat()
            if (here := (status.st_dev, status.st_ino)) in above:
                yield Problem(str(folder), "", "a link that leads back to a folder around it")
                return
            with os.scandir(folder) as found:
                entries = sorted((entry.name, _is_folder(entry)) for entry in found)
        except OSError as error:
            yield Problem(str(folder), "", f"cannot list the folder: {reason_of(error)}")
            return
        samples: dict[str, Draft | Problem] = {}
        folders = []
        for name, is_folder in entries:
            match = MEMBER.match(name)
            if is_folder and not name.startswith(".") and not META.match(prefix + name):
                folders.append(name)
            elif is_folder or match is None or META.match(prefix + name):
                self.ignored += 1
                self.first_ignored = self.first_ignored or str(folder / name)
            else:
                stem, extension = match.group(1), match.group(2).lower()
                sample = samples.setdefault(stem, Draft(str(folder), prefix + stem))
                if isinstance(sample, Draft) and extension in sample.members:
                    reason = f"two files for the member {extension!r}, which differ in upper and lower case"
                    samples[stem] = Problem(sample.where, sample.key, reason)
                elif isinstance(sample, Draft):
                    sample.members[extension] = folder / name
        for stem in sorted(samples):
            yield samples[stem]
        for name in folders:
            yield from self._walk(folder / name, f"{prefix}{name}/", (*above, here))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link without an end is found when its file is looked at
        return False
