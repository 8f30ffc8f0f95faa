"""What an image file holds, as a hash: so that a resumed run and a cache know the images that they began with."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

CHUNK = 1 << 20  # bytes read at once
FILES_AT_ONCE = 64  # by one thread: a task for each file would cost more than the file


@dataclass(frozen=True)
class Fingerprint:
    """A file's size in bytes, its times of modification and of any change (inode) in ns, and a hash of its bytes.

    content: BLAKE2b, 16 bytes in hex; "" for a file that cannot be read.
    """

    size: int
    modified: int
    changed: int
    content: str

    def same_file(self, status: os.stat_result) -> bool:
        """Whether a file of that status has not been touched since: no program can set the time of change."""
        return (self.size, self.modified, self.changed) == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def fingerprints(
    paths: Sequence[str],
    known: Mapping[str, Fingerprint],
    threads: int,
    progress: Callable[..., Iterable[list[Fingerprint]]] | None = None,
) -> dict[str, Fingerprint]:
    """The fingerprint of each file; one in `known` whose size and times still hold is not read again.

    `progress` wraps the results, lists of up to `FILES_AT_ONCE`, as they come, as tqdm does.
    """

    def look(start: int) -> list[Fingerprint]:
        return [_look(path, known.get(path)) for path in paths[start : start + FILES_AT_ONCE]]

    def results() -> Iterator[Fingerprint]:
        with ThreadPoolExecutor(threads) as pool:
            lists: Iterable[list[Fingerprint]] = pool.map(look, range(0, len(paths), FILES_AT_ONCE))
            for found in progress(lists) if progress else lists:
                yield from found

    return dict(zip(paths, results(), strict=True))


def _look(path: str, known: Fingerprint | None) -> Fingerprint:
    try:
        status = os.stat(path)
        if known is not None and known.same_file(status):
            return known
        return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ctime_ns, content_hash(path))
    except OSError:
        return Fingerprint(0, 0, 0, "")


def content_hash(path: str) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits; raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    # O_NONBLOCK: a FIFO gives nothing instead of waiting for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while chunk := os.read(descriptor, CHUNK):
            digest.update(chunk)
    finally:
        os.close(descriptor)
    return digest.hexdigest()
