"""Checkpoints made to do harm, and thousands of damaged ones: each must be read or refused, and never end the process.

    python tests/long/fuzz_checkpoints.py [--count 3000] [--seed 0] [--tensorflow]

Checksums are made right again after half of the damage: otherwise TensorFlow would refuse those files unread. Where
they are not, what is read must be what was written. With --tensorflow, TensorFlow reads alone, to see it abort.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.framework.types_pb2 import DataType
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto
from tensorflow.core.util.saved_tensor_slice_pb2 import SavedTensorSlices

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from console import UserError
from weights.checkpoint import read_checkpoint, table_entries

ARRAYS = {
    "n/a/weights": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "n/a/biases": np.arange(4, dtype=np.float32),
    "global_step": np.array(7, np.int64),
    "progress": np.array(b'{"step": 7}'),
    "flag": np.array([True, False]),
}
EXTREMES = (0, 1, -1, 2, 5, 127, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def write_table(path: Path, entries: dict[bytes, bytes]) -> None:
    """A LevelDB table of one block, whose keys share nothing."""
    body = bytearray()

    def add(block: bytes) -> bytes:
        handle = varint(len(body)) + varint(len(block))
        body.extend(block + b"\0" + int(masked_crc32c(block + b"\0")).to_bytes(4, "little"))
        return handle

    def block(items: dict[bytes, bytes]) -> bytes:
        rows = [b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in items.items()]
        return b"".join(rows) + bytes(4) + (1).to_bytes(4, "little")

    data = add(block(entries))
    footer = add(block({})) + add(block({b"\xff": data}))
    path.write_bytes(bytes(body) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db"))


def repaired(content: bytes) -> bytes:
    """`content` with the checksums of its three blocks made right: of entries (the first), of meta data, of handles."""
    changed = bytearray(content)
    footer = content[-48:]
    meta_offset, at = _number(footer, 0)
    meta_size, at = _number(footer, at)
    index_offset, at = _number(footer, at)
    index_size, at = _number(footer, at)
    for offset, size in ((0, meta_offset - 5), (meta_offset, meta_size), (index_offset, index_size)):
        if size >= 0 and offset + size + 5 <= len(changed) - 48:
            crc = int(masked_crc32c(bytes(changed[offset : offset + size + 1])))
            changed[offset + size + 1 : offset + size + 5] = crc.to_bytes(4, "little")
    return bytes(changed)


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) - 1 and data[at] & 128 and shift < 63:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def write_checkpoints(folder: Path) -> None:
    """`v1` and `v2`, as TensorFlow writes them."""
    for name, version in (("v1", tf.compat.v1.train.SaverDef.V1), ("v2", tf.compat.v1.train.SaverDef.V2)):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            variables = [tf.compat.v1.Variable(array, name=key) for key, array in ARRAYS.items()]
            session.run([variable.initializer for variable in variables])
            tf.compat.v1.train.Saver(variables, write_version=version).save(session, str(folder / name))


# -- made to do harm --------------------------------------------------------------------------------------------------


def change_shape(shape: TensorShapeProto, rng: np.random.Generator) -> None:
    kind = rng.integers(5)
    if kind == 0:
        shape.ClearField("dim")
        for _ in range(rng.choice([1, 2, 9, 254, 255, 300])):
            shape.dim.add(size=int(rng.choice([1, 2])))
    elif kind == 1:
        shape.unknown_rank = True
    elif kind == 2:
        shape.dim.add(size=int(EXTREMES[rng.integers(len(EXTREMES))]))
    elif shape.dim:
        shape.dim[int(rng.integers(len(shape.dim)))].size = EXTREMES[rng.integers(len(EXTREMES))]


def change_number(message: Any, field: str, rng: np.random.Generator) -> None:
    for value in rng.permutation(len(EXTREMES)):
        try:
            setattr(message, field, EXTREMES[value])
            return
        except ValueError:  # out of the field's range
            continue


def hostile_v2(entries: dict[bytes, bytes], rng: np.random.Generator) -> dict[bytes, bytes]:
    key = list(entries)[rng.integers(len(entries))]
    if key == b"":
        header = BundleHeaderProto.FromString(entries[key])
        change_number(header, str(rng.choice(["num_shards"])), rng)
        header.endianness = int(rng.integers(3))
        header.version.producer = int(EXTREMES[rng.integers(8)])
        return {**entries, key: header.SerializeToString()}
    entry = BundleEntryProto.FromString(entries[key])
    for _ in range(rng.integers(1, 3)):
        kind = rng.integers(6)
        if kind <= 1:
            change_shape(entry.shape, rng)
        elif kind == 2:
            entry.dtype = int(rng.choice([*DataType.values(), 31, 77, 99, 130, 1000]))
        elif kind == 3:
            change_number(entry, str(rng.choice(["offset", "size", "shard_id"])), rng)
        elif kind == 4:
            entry.slices.add().extent.add(start=int(rng.choice(EXTREMES)), length=int(rng.choice(EXTREMES)))
        else:
            entry.offset, entry.size = int(rng.integers(130)), int(rng.integers(130))
    return {**entries, key: entry.SerializeToString()}


def hostile_v1(entries: dict[bytes, bytes], rng: np.random.Generator) -> dict[bytes, bytes]:
    key = b"" if rng.integers(2) else list(entries)[rng.integers(1, len(entries))]
    record = SavedTensorSlices.FromString(entries[key])
    if key == b"":
        tensor = record.meta.tensor[int(rng.integers(len(record.meta.tensor)))]
        kind = rng.integers(5)
        if kind <= 1:
            change_shape(tensor.shape, rng)
        elif kind == 2:
            tensor.type = int(rng.choice([*DataType.values(), 31, 77, 99, 130, 1000]))
        elif kind == 3 and tensor.slice:
            extent = tensor.slice[0].extent.add()
            change_number(extent, str(rng.choice(["start", "length"])), rng)
        else:
            tensor.name = str(rng.choice([*ARRAYS, "other"]))
    else:
        values = record.data.data
        for field in ("float_val", "int64_val", "bool_val", "string_val"):
            kept = list(getattr(values, field))[: rng.integers(3)]
            values.ClearField(field)
            getattr(values, field).extend(kept)
    return {**entries, key: record.SerializeToString()}


TABLES = {"v1": hostile_v1, "v2.index": hostile_v2}


# -- damaged ----------------------------------------------------------------------------------------------------------


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """A part of `content`, or all of it with two bits changed."""
    if rng.integers(2):
        return content[: rng.integers(len(content))]
    changed = np.frombuffer(content, np.uint8).copy()
    changed[rng.integers(0, len(changed), 2)] ^= np.uint8(1) << rng.integers(0, 8, 2).astype(np.uint8)
    return changed.tobytes()


def forged(content: bytes, rng: np.random.Generator) -> bytes:
    """`content` with up to three bytes changed and the checksums made right."""
    changed = np.frombuffer(content, np.uint8).copy()
    where = rng.integers(0, len(changed) - 48 * int(rng.integers(2)), rng.integers(1, 4))
    changed[where] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)], len(where))
    return repaired(changed.tobytes())


def outcome(prefix: str, with_tensorflow: bool, intact: bool) -> str:
    """`read`, `refused`, or what must not be."""
    try:
        if with_tensorflow:
            reader = tf.train.load_checkpoint(prefix)
            arrays = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
        else:
            arrays = read_checkpoint(prefix)
    except UserError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if intact and not all(np.array_equal(arrays[key], array) for key, array in ARRAYS.items()):
        return "read wrongly"
    return "read"


def main() -> int:
    """Tries `count` files; the exit status is 0 when each was read or refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensorflow", action="store_true")
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoints(folder)
        originals = {part: (folder / part).read_bytes() for part in ("v1", "v2.index", "v2.data-00000-of-00001")}
        entries = {
            part: {k: bytes(v) for k, v in table_entries(memoryview(originals[part])).items()} for part in TABLES
        }
        for number in range(args.count):
            rng = np.random.default_rng([args.seed, number])
            part = str(rng.choice(list(originals)))
            way = int(rng.integers(3)) if part in TABLES else 0
            if way == 0:
                (folder / part).write_bytes(flipped(originals[part], rng))
            elif way == 1:
                (folder / part).write_bytes(forged(originals[part], rng))
            else:
                write_table(folder / part, TABLES[part](entries[part], rng))
            what = f"{part} {('damaged', 'forged', 'hostile')[way]}"
            print(f"{number}: {what}", file=sys.stderr)  # the last one, when the process ends
            found = outcome(str(folder / part.partition(".")[0]), args.tensorflow, intact=way == 0)
            outcomes[f"{what}: {found}"] += 1
            (folder / part).write_bytes(originals[part])
    for line, count in sorted(outcomes.items()):
        print(f"{count:6} {line}")
    return 0 if all(line.endswith((": read", ": refused")) for line in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
