"""Folders of files as they are listed, on local disks and object stores: names, sizes and versions."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fsspec import AbstractFileSystem

from deltacache.pipeline.storage.remote_files import (
    filesystem_of,
    host_of,
    info_of,
    is_remote,
    retried,
    url_of,
    version_of,
)
from deltacache.schemas.errors import DeltacacheError

_Inode: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file's size and version (see ``VideoSource``); 0 and "" for a link that leads nowhere."""

    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class ListedFolder:
    """The files directly in one folder.

    Attributes:
        place: path or url.
        uri: relative to the folder searched, "" for that itself.
        files: by name.
        query: what the urls of its files end with, such as a signature; it is no part of a name.
        is_below: whether it lies below the folder searched; names on stores may be empty (``a//b``).
    """

    place: str
    uri: str
    files: dict[str, ListedFile] = field(default_factory=dict)
    query: str = ""
    is_below: bool = False

    def place_of(self, name: str) -> str:
        """Path or url of a file in it."""
        if is_remote(self.place):
            return f"{self.place}/{name}{self.query}"
        return f"{self.place.rstrip('/')}/{name}" if self.place else name

    def uri_of(self, name: str) -> str:
        """Uri of a file in it."""
        return f"{self.uri}/{name}" if self.uri or self.is_below else name


def listed_file(path: str) -> ListedFile:
    """A local file; one that cannot be looked at is not an error of the whole source: fetching refuses it."""
    try:
        return _listed(os.stat(path))  # noqa: PTH116 - 100,000 of them
    except OSError:
        return ListedFile(0, "")


def _listed(about: os.stat_result) -> ListedFile:
    return ListedFile(about.st_size, str(about.st_mtime_ns))


def folder_at(place: str, uri: str, names: set[str] | None, query: str = "") -> ListedFolder:
    """The files directly in one folder, or only those of ``names`` without listing it; hidden ones too.

    A name that is not there is left out on a store and has no version on a local disk.
    """
    folder = ListedFolder(place, uri, query=query)
    if not is_remote(place):
        if names is None:
            with os.scandir(place) as entries:
                names = {entry.name for entry in entries if not entry.is_dir()}
        folder.files.update({name: listed_file(folder.place_of(name)) for name in names})
        return folder
    if names is None:
        fs, path = filesystem_of(place)
        for info in retried(lambda: fs.ls(path, detail=True), host_of(place)):
            if info.get("type") != "directory":
                folder.files[info["name"].rpartition("/")[2]] = _of_info(info)
        return folder
    for name in sorted(names):
        fs, path = filesystem_of(folder.place_of(name))
        with suppress(FileNotFoundError):
            info = retried(lambda fs=fs, path=path: info_of(fs, path), host_of(place))
            if info.get("type") != "directory":
                folder.files[name] = _of_info(info)
    return folder


def _of_info(info: Mapping[str, Any]) -> ListedFile:
    return ListedFile(int(info.get("size") or 0), version_of(info))


def local_folders(place: str, uri: str, seen: set[_Inode]) -> Iterator[ListedFolder]:
    """``place`` and all folders below it, without hidden ones.

    Each is visited once, by its real place if it has one below ``place``, so that links cannot loop.

    Raises:
        DeltacacheError: a folder cannot be listed.
    """
    real, links = [(place, uri)], list[tuple[str, str]]()
    while real or links:
        current, current_uri = real.pop() if real else links.pop()
        folder = ListedFolder(current, current_uri)
        try:
            about = retried(lambda current=current: os.stat(current))  # noqa: PTH116
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            below = retried(lambda folder=folder: _scanned(folder))
        except OSError as error:
            raise DeltacacheError(
                f"{current} cannot be listed ({error.strerror}): make it readable, or move it out of the source"
            ) from error
        yield folder
        for name, is_link in below:
            (links if is_link else real).append((folder.place_of(name), folder.uri_of(name)))


def _scanned(folder: ListedFolder) -> list[tuple[str, bool]]:
    folder.files.clear()
    with os.scandir(folder.place) as entries:
        return sorted(_sort(entries, folder), reverse=True)


def _sort(entries: Iterable[os.DirEntry[str]], folder: ListedFolder) -> Iterator[tuple[str, bool]]:
    """Put files into ``folder``; yield the folders' names and whether they are links."""
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield entry.name, entry.is_symlink()
            continue
        try:
            folder.files[entry.name] = _listed(entry.stat())
        except OSError:
            folder.files[entry.name] = ListedFile(0, "")


def remote_folders(
    fs: AbstractFileSystem, base: str, found: dict[str, dict[str, Any]]
) -> Iterator[ListedFolder]:
    """The objects of one listing, by the prefixes that they lie under; uris are relative to ``base``."""
    base = base.rstrip("/")
    folders: dict[str, ListedFolder] = {}
    for path in sorted(found):
        info = found[path]
        prefix, _, name = path.rpartition("/")
        uri = prefix[len(base) + 1 :]
        hidden = any(part.startswith(".") for part in [*uri.split("/"), name])
        if info.get("type") == "directory" or not name or hidden:
            continue
        if prefix not in folders:
            folders[prefix] = ListedFolder(url_of(fs, prefix), uri, is_below=prefix != base)
        folders[prefix].files[name] = _of_info(info)
    yield from folders.values()
