"""The segments of a JPEG file, which say what a decoder would have to do before it does it.

Source: ITU-T T.81, annex B.
"""

import contextlib
import re
import struct
from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg

MAX_SCANS = 200  # encoders write 10, careful ones up to 100; each costs the time of a whole picture
REDUCTIONS = (1, 2, 4, 8)  # of the sides of a picture, by an inverse transform of fewer frequencies
SOF, PROGRESSIVE = (0xC0, 0xC1, 0xC2), 0xC2  # frames that libjpeg decodes
SOS, EOI = 0xDA, 0xD9  # the start of a scan, the end
FRAMES_AND_SCANS = frozenset((*SOF, SOS))
# A marker: no stuffed byte (00), fill byte (FF), restart within a scan (D0 to D7) or TEM (01), which have no length.
MARKERS = frozenset(range(0x02, 0xD0)) | frozenset(range(0xD8, 0xFF))
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
# What a picture that is to be turned cannot do without: in EXIF, of either byte order, tag 0x0112 and a type, if not
# with one short number that is 0 or 1; in XMP the name. Searched one by one, each by its first bytes, they take a
# quarter of the time of one expression.
TURNED = (
    re.compile(rb"(?s)\x12\x01(?!\x03\0\x01\0\0\0[\0\x01]\0).\0"),
    re.compile(rb"\x01\x12(?!\0\x03\0\0\0\x01\0[\0\x01])\0"),
    re.compile(rb"Orientation"),
)


def segments(contents: bytes, wanted: Container[int]) -> Iterator[tuple[int, int]]:
    """(marker, where its length stands) of the segments of a JPEG that have a `wanted` marker, up to its end.

    The data of scans are passed over.
    """
    at = 2
    with contextlib.suppress(IndexError):  # of a file that is cut off
        while True:
            if contents[at] != 0xFF or contents[at + 1] not in MARKERS:  # after a scan, or after what nobody knows
                if not (found := MARKER.search(contents, at)):
                    return
                at = found.start()
            if (marker := contents[at + 1]) == EOI:
                return
            at += 2
            if marker in wanted:
                yield marker, at
            at += (contents[at] << 8) + contents[at + 1]


def check_scans(contents: bytes) -> None:
    """Raises ValueError for a JPEG of very many scans, before libjpeg goes over the whole picture for each."""
    if contents.count(b"\xff\xda") > MAX_SCANS:  # also those in metadata and behind the end
        scans = sum(1 for _ in segments(contents, {SOS}))
        if scans > MAX_SCANS:
            raise ValueError(f"{scans} scans, more than the limit of {MAX_SCANS}")


class Header(NamedTuple):
    """What the segments before the first scan say; `before` are their bytes.

    one_scan: grey or colour, and all of it in one scan.
    """

    width: int
    height: int
    one_scan: bool
    before: bytes

    @property
    def plain(self) -> bool:
        """Whether it is of one scan and not to be turned."""
        return self.one_scan and not any(turned.search(self.before) for turned in TURNED)


def header(head: bytes) -> Header | None:
    """The header of a JPEG of which these are the first bytes; None where it cannot be followed or decoded."""
    frame, baseline = b"", False
    for marker, at in segments(head, FRAMES_AND_SCANS):
        if marker in SOF:
            frame, baseline = head[at + 2 : at + 8], marker != PROGRESSIVE
        if marker == SOS and len(frame) == 6:
            bits, height, width, channels = struct.unpack(">BHHB", frame)
            if bits != 8 or channels not in (1, 3, 4) or not (width and height):
                return None
            # Of a baseline picture whose first scan has all channels libjpeg reads that scan and refuses any other.
            one_scan = baseline and head[at + 2 : at + 3] == bytes([channels])
            return Header(width, height, one_scan and channels != 4, head[:at])
    return None


def reduction(width: int, height: int, least: int) -> int:
    """The greatest of `REDUCTIONS` that leaves both sides at least `least` pixels; always 1 where `least` is 0."""
    return max(n for n in REDUCTIONS if n == 1 or (least and min(width, height) >= n * least))


def decode(contents: bytes, size: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """The pixels of a JPEG in grey or colour, uint8 [H, W, 3] RGB as stored; None where anything in it is odd.

    With a `size`, (height, width), a half, a quarter or an eighth of its own, rounded up, it is decoded at that size:
    of each block of 8x8 the inverse transform takes the lowest frequencies alone.

    By libjpeg-turbo in its default, most accurate way, as Pillow does it and with the same bits, but without Pillow's
    two copies. What is odd is left to Pillow, which tolerates some of it and has the words for the rest.
    """
    try:
        return simplejpeg.decode_jpeg(contents, strict=True, min_height=size[0], min_width=size[1])
    except (ValueError, MemoryError):
        return None
