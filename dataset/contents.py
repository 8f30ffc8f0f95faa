"""What an image file holds, as a hash: so that a resumed run and a cache know the images that they began with."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import xxhash

from dataset.parallel import over_files

CHUNK = 1 << 20  # bytes read at once
# The mark of the hashes of today, XXH3 of 128 bits: no slower than reading the file. It finds every change but those
# that somebody computed to deceive it. Those of earlier versions, BLAKE2b of 128 bits, have no mark.
XXH3 = "xxh3:"


class Fingerprint(NamedTuple):
    """A file's size in bytes, its times of modification and of any change (inode) in ns, and a hash of its bytes.

    content: as `content_hash` gives it; "" for a file that cannot be read.
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
    progress: Callable[..., Iterable[Fingerprint]] | None = None,
    like: str = XXH3,
) -> dict[str, Fingerprint]:
    """The fingerprint of each file; one in `known` whose size and times still hold is not read again.

    `like` is a hash with which, or with whose like, they will be compared: see `content_hash`. `progress` wraps the
    results as they come: `progress(iterable, total=len(paths))`, as tqdm does.
    """
    results: Iterable[Fingerprint] = over_files(lambda path: _look(path, known.get(path), like), paths, threads)
    if progress is not None:
        results = progress(results, total=len(paths))
    return dict(zip(paths, results, strict=True))


def fingerprint(status: os.stat_result, contents: bytes) -> Fingerprint:
    """That of a file of these bytes, whose status was taken before they were read."""
    content = XXH3 + xxhash.xxh3_128_hexdigest(contents)
    return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ctime_ns, content)


def _look(path: str, known: Fingerprint | None, like: str) -> Fingerprint:
    try:
        status = os.stat(path)
        if known is not None and known.same_file(status):
            return known
        return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ctime_ns, content_hash(path, like))
    except OSError:
        return Fingerprint(0, 0, 0, "")


def content_hash(path: str, like: str = XXH3) -> str:
    """A hash of a file's bytes: 32 hex digits, after `XXH3` where `like`, what it is compared with, begins so too.

    Raises OSError.
    """
    mark = XXH3 if like.startswith(XXH3) else ""
    digest = xxhash.xxh3_128() if mark else hashlib.blake2b(digest_size=16)
    # O_NONBLOCK: a FIFO gives nothing instead of waiting for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while chunk := os.read(descriptor, CHUNK):
            digest.update(chunk)
    finally:
        os.close(descriptor)
    return mark + digest.hexdigest()
