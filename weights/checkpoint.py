"""TensorFlow checkpoints → arrays: what a file declares is checked before TensorFlow, which can abort on it, reads it.

A checkpoint is a LevelDB table: a V1 file holds the tensors themselves, a V2 `.index` says where they lie in `.data`
files. TensorFlow ends the whole process on some shapes, dtypes and lengths; here the table is walked first, in Python.
It is read strictly, so that TensorFlow finds in it exactly what was checked. The checksums are left to TensorFlow.
"""

import contextlib
import glob
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto
from tensorflow.core.util.saved_tensor_slice_pb2 import SavedTensorSlices

from console import UserError, one_line

MAX_BYTES = 8 * 2**30  # VGG19 with two optimiser slots is 1.7 GB in float32
TABLE_FOOTER = bytes.fromhex("57fb808b247547db")  # last bytes of a LevelDB table: V1 checkpoints and V2 indexes

_FOOTER_SIZE, _TRAILER_SIZE = 48, 5  # of the table; of a block: compression and checksum
_MAX_INDEX_BYTES = 16 * 2**20  # 150,000 entries; what is parsed one by one in Python must be small
_MAX_DIMENSIONS = 8
_NUMBERS = (
    *(tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.bool),
    *(tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64),
)
_DTYPES = {dtype.as_datatype_enum: dtype for dtype in (*_NUMBERS, tf.string)}
_V1_FIELDS = {  # where a V1 checkpoint keeps the values of a dtype
    tf.float32.as_datatype_enum: "float_val",
    tf.float64.as_datatype_enum: "double_val",
    tf.int32.as_datatype_enum: "int_val",
    tf.int64.as_datatype_enum: "int64_val",
    tf.bool.as_datatype_enum: "bool_val",
    tf.string.as_datatype_enum: "string_val",
}


class DamagedFile(UserError):
    """A file whose content cannot be used; one that is only not permitted to be read raises a plain UserError."""


def read_checkpoint(prefix: str) -> dict[str, np.ndarray]:
    """All tensors of a V2 checkpoint `prefix`.index, else of the V1 file `prefix`, by name; text comes as bytes.

    Raises DamagedFile, a UserError, for content that is damaged or declares more than `MAX_BYTES` or what no
    checkpoint has; UserError where the file is missing, not permitted to be read or TensorFlow can't take its path.
    """
    is_v2 = os.path.isfile(f"{prefix}.index")
    # TensorFlow takes the path for a pattern; escaped, it finds a V1 file, but then looks for V2 data under that name.
    if is_v2 and re.search(r"[\[\\]", prefix):
        raise UserError(
            f"{prefix}: TensorFlow reads no checkpoint at a path with [ or \\ in it: rename the folder or file"
        )
    with one_line_errors(prefix):
        names = sorted(_check_v2(prefix) if is_v2 else _check_v1(prefix))
        reader = tf.train.load_checkpoint(prefix if is_v2 else glob.escape(prefix))
        return {name: np.asarray(reader.get_tensor(name)) for name in names}


@contextlib.contextmanager
def one_line_errors(path: str) -> Iterator[None]:
    """Turns what parsers of the file at `path` raise into a UserError: DamagedFile, unless reading itself failed."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # parsers over bytes that may be anything: whatever they raise, it is the file's
        if isinstance(error, OSError) and error.errno:
            where, why = one_line(error.filename or path), os.strerror(error.errno)
            raise UserError(f"{where} cannot be read ({why}): check that it is there and its permissions") from error
        reason = one_line(str(error).strip().partition("\n")[0])[:160] or type(error).__name__
        raise DamagedFile(f"{path} is damaged and cannot be read, copy or download it again: {reason}") from error


def check_size(file: str, sizes: Iterable[int]) -> None:
    """Raises DamagedFile when the arrays that `file` declares, of `sizes` bytes, are more than `MAX_BYTES`."""
    if (total := sum(sizes)) > MAX_BYTES:
        raise DamagedFile(
            f"{file} declares {total / 2**30:.0f} GiB of arrays, more than any network here has: give another file"
        )


# -- what is checked --------------------------------------------------------------------------------------------------


def _check_v2(prefix: str) -> list[str]:
    """The names in a V2 index, each of them with a possible shape, dtype, size and place in a data file."""
    with open(f"{prefix}.index", "rb") as file:
        table = file.read(_MAX_INDEX_BYTES + 1)
    if len(table) > _MAX_INDEX_BYTES:
        raise DamagedFile(f"{prefix}.index is larger than the index of any network here: give another file")
    entries = table_entries(memoryview(table))
    if (header := entries.pop(b"", None)) is None:
        raise ValueError("its index has no header")
    shards = _parse(BundleHeaderProto, header).num_shards
    parsed = {key.decode(): _parse(BundleEntryProto, value) for key, value in entries.items()}
    declared = {name: _declared_bytes(name, entry.dtype, entry.shape) for name, entry in parsed.items()}
    check_size(prefix, (max(size, parsed[name].size) for name, size in declared.items()))
    for name, entry in parsed.items():
        if entry.slices:
            raise ValueError(f"{one_line(name)[:80]} is saved in parts: save whole variables")
        data = f"{prefix}.data-{entry.shard_id:05d}-of-{shards:05d}"
        if not os.path.isfile(data):
            raise DamagedFile(f"{prefix} cannot be read without {os.path.basename(data)}: copy all its files")
        fits = entry.offset >= 0 and entry.size >= 0 and entry.offset + entry.size <= os.path.getsize(data)
        with open(data, "rb") as file:
            if fits and entry.dtype == tf.string.as_datatype_enum:
                file.seek(entry.offset)
                fits = _is_text(memoryview(file.read(entry.size)), declared[name])
            elif entry.size != declared[name]:
                fits = False
        if not fits:
            raise ValueError(f"{one_line(name)[:80]} does not fit its place in {os.path.basename(data)}")
    return list(parsed)


def _check_v1(file: str) -> list[str]:
    """The names in a V1 file, each of them with a possible shape and dtype and as many values as the shape has."""
    with open(file, "rb") as stream:
        entries = table_entries(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    if not 0 < len(meta := entries.get(b"", memoryview(b""))) < _MAX_INDEX_BYTES:
        raise ValueError("its list of names is missing, or longer than that of any network here")
    tensors = {tensor.name: tensor for tensor in SavedTensorSlices.FromString(meta).meta.tensor}
    check_size(file, (_declared_bytes(name, one.type, one.shape) for name, one in tensors.items()))
    for name, tensor in tensors.items():
        extents = [extent for part in tensor.slice for extent in part.extent]
        if len(tensor.slice) != 1 or any(extent.start or extent.HasField("length") for extent in extents):
            raise ValueError(f"{one_line(name)[:80]} is saved in parts: save whole variables")
        if tensor.type not in _V1_FIELDS or len(extents) != len(tensor.shape.dim):
            raise ValueError(f"{one_line(name)[:80]} has a dtype or extent that is not read from a V1 checkpoint")
        if (stored := entries.get(_v1_key(name, len(extents)))) is None:
            raise ValueError(f"{one_line(name)[:80]} has no values")
        value = SavedTensorSlices.FromString(stored).data.data
        if len(getattr(value, _V1_FIELDS[tensor.type])) != math.prod(dim.size for dim in tensor.shape.dim):
            raise ValueError(f"{one_line(name)[:80]} has more or fewer values than its shape")
    return list(tensors)


def _v1_key(name: str, dimensions: int) -> bytes:
    """The key of a whole tensor: TensorFlow's OrderedCode of 0, name, rank and (start 0, length -1) per axis."""
    escaped = name.encode().replace(b"\0", b"\0\xff")  # \xff, which it escapes too, is not in UTF-8
    rank = bytes([1, dimensions]) if dimensions else b"\0"
    return b"\0" + escaped + b"\0\1" + rank + b"\x80\x7f" * dimensions


def _declared_bytes(name: str, dtype: int, shape: TensorShapeProto) -> int:
    """The size of a tensor in memory, of text the number of its strings; ValueError if no checkpoint has such one."""
    sizes = [dim.size for dim in shape.dim]
    if dtype not in _DTYPES:
        raise ValueError(f"{one_line(name)[:80]} has dtype number {dtype}, which is neither numbers nor text")
    if shape.unknown_rank or len(sizes) > _MAX_DIMENSIONS or any(size < 0 for size in sizes):
        raise ValueError(f"{one_line(name)[:80]} declares an impossible shape of {len(sizes)} dimensions")
    return math.prod(sizes) * (1 if _DTYPES[dtype] == tf.string else _DTYPES[dtype].size)


def _is_text(stored: memoryview, count: int) -> bool:
    """Whether `stored` has the form of `count` strings: their lengths, 4 bytes of checksum, their bytes."""
    at, total = 0, 0
    for _ in range(min(count, len(stored) + 1)):  # a length takes a byte at least
        length, at = _varint(stored, at)
        total += length
    return count <= len(stored) and at + 4 + total == len(stored)


def _parse(message: Any, value: memoryview) -> Any:
    """The message in `value`; ValueError unless TensorFlow, which aborts on some, would write it in just this form."""
    parsed = message.FromString(value)
    if parsed.SerializeToString(deterministic=True) != value:
        raise ValueError("an entry of its index is not in the form that TensorFlow writes")
    return parsed


# -- LevelDB tables: https://github.com/google/leveldb/blob/main/doc/table_format.md ----------------------------------


def table_entries(table: memoryview) -> dict[bytes, memoryview]:
    """{key: value} of a table, in order; ValueError or IndexError unless it is well-formed and not compressed."""
    if table[-len(TABLE_FOOTER) :] != TABLE_FOOTER:
        raise ValueError("its end is missing")
    footer = table[-_FOOTER_SIZE:]
    *_, at = _block(table, footer, 0)  # of meta data: TensorFlow writes none
    index, _ = _block(table, footer, at)
    entries: dict[bytes, memoryview] = {}
    last, work = None, 0
    for _, handle in _block_entries(index):
        for key, value in _block_entries(_block(table, handle, 0)[0]):
            if last is not None and key <= last:
                raise ValueError("its entries are not in order")
            if (work := work + len(key) + 64) > _MAX_INDEX_BYTES:
                raise ValueError("it has more or longer names than any network here")
            entries[key] = value
            last = key
    return entries


def _block(table: memoryview, handle: memoryview, at: int) -> tuple[memoryview, int]:
    """The block that the two numbers at `at` in `handle` point to, and where in `handle` they end."""
    offset, at = _varint(handle, at)
    size, at = _varint(handle, at)
    if offset + size + _TRAILER_SIZE > len(table) - _FOOTER_SIZE:
        raise ValueError("a block lies outside it")
    if table[offset + size] != 0:
        raise ValueError("a block is compressed, which TensorFlow never writes")
    return table[offset : offset + size], at


def _block_entries(block: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The entries of a block, read from its start; it must allow no other reading.

    An entry is: bytes of the key shared with the one before, bytes that are not, bytes of the value; key and value.
    At the end are the offsets of the entries with nothing shared, from which TensorFlow searches, and their number.
    """
    restart_count = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restart_count
    if end < 0 or restart_count == 0:
        raise ValueError("a block has no table of its entries")
    at, key, unshared_at = 0, b"", {0}
    while at < end:
        start = at
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or at + unshared + size > end:
            raise ValueError("an entry lies outside its block")
        if shared == 0:
            unshared_at.add(start)
        key = key[:shared] + bytes(block[at : at + unshared])
        at += unshared + size
        yield key, block[at - size : at]
    if not unshared_at.issuperset(np.frombuffer(block[end:-4], "<u4").tolist()):
        raise ValueError("a block's table points into an entry")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while data[at] & 0x80 and shift < 63:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
