"""The segments of a JPEG file, which say what a decoder would have to do before it does it.

Source: ITU-T T.81, annex B.
"""

import re
import struct
from collections.abc import Iterator

import numpy as np
import simplejpeg

MAX_SCANS = 200  # encoders write 10, careful ones up to 100; each costs the time of a whole picture
SOF, SOS, EOI = (0xC0, 0xC1, 0xC2), 0xDA, 0xD9  # frames that libjpeg decodes, the start of a scan, the end
# A marker: no stuffed byte (00), fill byte (FF), restart within a scan (D0 to D7) or TEM (01), which have no length.
MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")


def segments(contents: bytes) -> Iterator[tuple[int, int]]:
    """(marker, where its length stands) of each segment of a JPEG up to its end; the data of scans are passed over."""
    at = 2
    while (found := MARKER.search(contents, at)) and found[1][0] != EOI:
        at = found.end()
        yield found[1][0], at
        at += int.from_bytes(contents[at : at + 2], "big")


def check_scans(contents: bytes) -> None:
    """Raises ValueError for a JPEG of very many scans, before libjpeg goes over the whole picture for each."""
    if contents.count(b"\xff\xda") > MAX_SCANS:  # also those in metadata and behind the end
        scans = sum(marker == SOS for marker, _ in segments(contents))
        if scans > MAX_SCANS:
            raise ValueError(f"{scans} scans, more than the limit of {MAX_SCANS}")


def picture_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) by the segments before the first scan; None where they cannot be followed or decoded."""
    sides = None
    for marker, at in segments(head):
        if marker == SOS:
            return sides
        if marker in SOF and at + 8 <= len(head):
            bits, height, width, channels = struct.unpack_from(">BHHB", head, at + 2)
            sides = (width, height) if bits == 8 and channels in (1, 3, 4) and width and height else None
    return None


def decode(contents: bytes) -> np.ndarray | None:
    """The pixels of a JPEG in grey or colour, uint8 [H, W, 3] RGB as stored; None where anything in it is odd.

    By libjpeg-turbo in its default, most accurate way, as Pillow does it and with the same bits, but without Pillow's
    two copies. What is odd is left to Pillow, which tolerates some of it and has the words for the rest.
    """
    try:
        return simplejpeg.decode_jpeg(contents, strict=True)
    except ValueError:
        return None
