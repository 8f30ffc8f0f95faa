"""Mutates images of every format and feeds them to the reader: `python tests/fuzz_images.py --count 20000 --seed 0`.

With `--inference` they go the whole way of inference.py instead, as files, in batches, through a tiny trained network.
Every mutation is a pure function of (seed, index); a failing one is printed and replayed with `--replay INDEX`.
"""

import argparse
import faulthandler
import io
import multiprocessing
import os
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.images import ImageError, decode_image

LIMIT_SECONDS = 1.0
KILL_SECONDS = 20.0  # a worker that is still busy then will not end
LIMIT_BYTES = 2 << 30  # beyond what the worker holds at its start
OUTCOMES = ("decoded", "refused", "other exception", "crashed", "slow", "memory")
SIZES = ((7, 5), (64, 48), (300, 200))
# Where each format keeps a width or a height: (offset, struct format). TIFF's are values in its table, found by tag.
SIZE_FIELDS = {
    "PNG": [(16, ">L"), (20, ">L")],
    "GIF": [(6, "<H"), (8, "<H")],
    "BMP": [(18, "<l"), (22, "<l")],
    "WEBP": [(24, "<H"), (26, "<H"), (27, "<H"), (28, "<H")],
}
EXTREMES = (
    0,
    1,
    2,
    255,
    256,
    4095,
    9000,
    11_000,
    16_383,
    32_767,
    32_768,
    65_535,
    1 << 20,
    (1 << 31) - 1,
    (1 << 32) - 1,
)


def make_seeds() -> list[tuple[str, bytes]]:
    """(format, file contents) of every format, mode, compression and size that the mutations start from."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    variants: list[tuple[str, str, dict]] = [
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "RGB", {"progressive": True, "comment": b"words"}),
        ("JPEG", "RGB", {"subsampling": 0, "optimize": True, "restart_marker_rows": 1}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {"exif": exif}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {"transparency": bytes(range(256))}),
        ("PNG", "1", {"transparency": 1}),
        ("PNG", "LA", {}),
        ("PNG", "I;16", {}),
        ("PNG", "RGB", {"save_all": True, "append_images": 2}),
        ("GIF", "P", {"transparency": 3}),
        ("GIF", "RGB", {"save_all": True, "append_images": 2, "comment": b"words"}),
        ("GIF", "L", {"interlace": 0}),
        *(("BMP", mode, {}) for mode in ("RGB", "P", "L", "1", "RGBA")),
        ("WEBP", "RGB", {"exif": exif.tobytes()}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"save_all": True, "append_images": 2}),
        *(("TIFF", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")),
        *(
            ("TIFF", "RGB", {"compression": compression})
            for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")
        ),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"big_tiff": True, "tiffinfo": {0x0112: 5}}),
        ("TIFF", "L", {"save_all": True, "append_images": 2}),
    ]
    seeds = []
    for width, height in SIZES:
        smooth = np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((-(-height // 3), -(-width // 4), 1)))
        picture = Image.fromarray((smooth[:height, :width] + rng.integers(0, 3, (height, width, 3))).astype(np.uint8))
        for kind, mode, options in variants:
            image = picture.convert("L").convert(mode) if mode in ("I", "I;16", "F") else picture.convert(mode)
            if "append_images" in options:
                options = {**options, "append_images": [image.rotate(180)] * options["append_images"]}
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            seeds.append((kind, buffer.getvalue()))
    # Pillow writes no run-length BMP: literal runs, a delta and the end mark.
    rows = b"".join(bytes([7, row, 0, 0]) for row in range(5))
    header = struct.pack("<LllHHLLllLL", 40, 7, 5, 1, 8, 1, len(rows) + 6, 0, 0, 256, 0)
    palette = bytes(value for level in range(256) for value in (level, 255 - level, 0, 0))
    body = header + palette + rows[:-2] + b"\0\2\1\1" + b"\0\1"
    seeds.append(("BMP", b"BM" + struct.pack("<LLL", 14 + len(body), 0, 14 + 40 + 1024) + body))
    return seeds


def mutate(seeds: list[tuple[str, bytes]], seed: int, index: int) -> bytes:
    """The file number `index` of the run `seed`: one or two mutations of a seed file."""
    rng = np.random.default_rng((seed, index))
    kind, contents = seeds[rng.integers(len(seeds))]
    data = bytearray(contents)
    for _ in range(rng.integers(1, 3)):
        # Half of the places are in the first 200 bytes, where the headers are.
        reach = min(len(data), 200) if rng.random() < 0.5 else len(data)
        if reach < 2:
            break
        place = int(rng.integers(reach))
        match rng.integers(7):
            case 0:  # bit flips
                for at in rng.integers(reach, size=rng.integers(1, 9)):
                    data[at] ^= 1 << int(rng.integers(8))
            case 1:  # a range of bytes replaced, by one value or by noise
                length = int(rng.integers(1, 65))
                fill = bytes([(0, 255, int(rng.integers(256)))[rng.integers(3)]]) * length
                data[place : place + length] = rng.bytes(length) if rng.random() < 0.5 else fill
            case 2:  # truncation
                del data[place:]
            case 3:  # insertion
                data[place:place] = rng.bytes(int(rng.integers(1, 65)))
            case 4:  # a part left out
                del data[place : place + int(rng.integers(1, 65))]
            case 5:  # the header of one file on the body of another
                other = seeds[rng.integers(len(seeds))][1]
                cut = int(rng.integers(1, min(len(other), 1000)))
                data[: cut if rng.random() < 0.5 else place] = other[:cut]
            case 6:
                rewrite_sizes(kind, data, rng)
    if kind == "PNG" and rng.random() < 0.5:
        fix_checksums(data)  # otherwise Pillow refuses nearly all of them at the first chunk
    return bytes(data)


def rewrite_sizes(kind: str, data: bytearray, rng: np.random.Generator) -> None:
    """Declares another width or height, wherever this format keeps them."""
    if kind == "JPEG":
        frames = [data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2")]
        fields = [(at + skip, ">H") for at in frames if at >= 0 for skip in (5, 7)]
    elif kind == "TIFF":  # the values of tags 256 and 257 (size), 258, 277, 278, 322, 323: all small tables
        order = "<" if data[:2] == b"II" else ">"
        names = [struct.pack(order + "H", tag) for tag in (256, 257, 258, 273, 277, 278, 279)]
        fields = [(data.find(name, 8) + skip, order + "L") for name in names for skip in (4, 8)]
    else:
        fields = SIZE_FIELDS[kind]
    fields = [(at, form) for at, form in fields if 0 <= at <= len(data) - 4]
    for at, form in fields:
        if rng.random() < 0.6:
            size = struct.calcsize(form)
            struct.pack_into(form.upper(), data, at, EXTREMES[rng.integers(len(EXTREMES))] & (256**size - 1))


def fix_checksums(data: bytearray) -> None:
    """Writes the right checksum into every PNG chunk that can still be walked to."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">L", data, at)
        if at + 12 + length > len(data):
            break
        struct.pack_into(">L", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_one(contents: bytes) -> tuple[str, str]:
    """(decoded | refused | other exception, what it says)."""
    try:
        pixels = decode_image(contents, "fuzz")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.flags.c_contiguous:
            return "other exception", f"a wrong array: {pixels.dtype} {pixels.shape}"
        return "decoded", f"{pixels.shape[1]}x{pixels.shape[0]}"
    except ImageError as error:
        return ("refused" if "\n" not in str(error) else "other exception"), str(error)
    except BaseException as error:
        return "other exception", repr(error)


def work(connection: Connection, seed: int) -> None:
    """A worker: receives indices, sends (outcome, words, seconds, peak bytes beyond the start)."""
    faulthandler.enable()
    seeds = make_seeds()
    start = peak_bytes()
    while (index := connection.recv()) is not None:
        contents = mutate(seeds, seed, index)
        begin = time.process_time()  # not the wall clock: the machine may be busy with other things
        outcome, words = try_one(contents)
        connection.send((outcome, words, time.process_time() - begin, peak_bytes() - start))


def run(count: int, seed: int, workers: int = 2) -> Counter[str]:
    """How many of `count` mutated files came to each of `OUTCOMES`; those to look into are printed."""
    context = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    indices = iter(range(count))
    busy: dict[Connection, tuple[multiprocessing.process.BaseProcess, int, float]] = {}

    def report(outcome: str, index: int, words: str) -> None:
        counts[outcome] += 1
        if outcome not in ("decoded", "refused"):
            print(f"{outcome}: --seed {seed} --replay {index}: {words}", flush=True)

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, seed), daemon=True)
        process.start()
        theirs.close()
        feed(ours, process)

    def feed(connection: Connection, process: multiprocessing.process.BaseProcess) -> None:
        index = next(indices, None)
        connection.send(index)
        if index is None:
            process.join()
        else:
            busy[connection] = (process, index, time.monotonic())

    for _ in range(min(workers, count)):
        start()
    while busy:
        ready = wait(list(busy), timeout=1)
        for connection, (process, index, begin) in list(busy.items()):
            stuck = time.monotonic() - begin > KILL_SECONDS
            if connection not in ready and not stuck:
                continue
            del busy[connection]
            try:
                if connection not in ready:
                    process.kill()
                    raise TimeoutError
                outcome, words, seconds, peak = connection.recv()
            except (EOFError, TimeoutError, ConnectionResetError) as error:
                process.join()
                stopped = f"worker ended with {process.exitcode}"
                report("slow" if isinstance(error, TimeoutError) else "crashed", index, stopped)
                start()
                continue
            report(outcome, index, words)
            if seconds > LIMIT_SECONDS:
                report("slow", index, f"{seconds:.2f} s, {outcome} {words}")
            if peak > LIMIT_BYTES:
                report("memory", index, f"{peak / 2**20:.0f} MiB, {outcome} {words}")
                process.kill()  # a peak stays a peak: go on with a fresh worker
                process.join()
                start()
            else:
                feed(connection, process)
    return counts


def run_inference(count: int, seed: int, folder: Path) -> tuple[Counter[str], float]:
    """How many of `count` mutated files were predicted and refused, and the longest time of a batch in seconds."""
    from console import quiet_tensorflow

    quiet_tensorflow()
    from predictor import Predictor
    from run import Run
    from tests import kill_run
    from training import session
    from training.settings import Settings

    images = kill_run.make_data(folder / "data", {"train": 6, "val": 6})
    settings = Settings(pretrained="none", network="small", image_size=32, epochs=1, batch_size=6)
    session.train(settings, str(images), Run(folder / "run"), [])
    files = [folder / f"{index} .jpg" for index in range(count)]
    seeds = make_seeds()
    for index, file in enumerate(files):
        file.write_bytes(mutate(seeds, seed, index))
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    longest, begin = 0.0, time.monotonic()
    names = [str(file) for file in files]
    predictor = Predictor(Run(folder / "run"), batch_size=16)
    for number, prediction in enumerate(predictor.predict(names)):
        if number % 16 == 0 and number:  # the first one compiles
            longest = max(longest, time.monotonic() - begin)
        begin = time.monotonic()
        refused = bool(prediction.error)
        sane = prediction.name == names[number] and (refused or 0 < prediction.top(1)[0][1] <= 1)
        counts[("refused" if refused else "decoded") if sane else "other exception"] += 1
    return counts, longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inference", action="store_true", help="through inference.py's path")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, metavar="INDEX", help="try this one in this process, and write it")
    parser.add_argument("--output", default="mutated.bin", help="where --replay writes the file")
    args = parser.parse_args()
    if args.replay is not None:
        contents = mutate(make_seeds(), args.seed, args.replay)
        Path(args.output).write_bytes(contents)
        begin = time.process_time()
        print(*try_one(contents), f"{time.process_time() - begin:.2f} s, peak {peak_bytes() >> 20} MiB")
        return 0
    begin = time.monotonic()
    if args.inference:
        with tempfile.TemporaryDirectory() as folder:
            counts, longest = run_inference(args.count, args.seed, Path(folder))
        print(f"longest batch {longest:.2f} s, peak {peak_bytes() >> 20} MiB")
    else:
        counts = run(args.count, args.seed)
    print(f"{args.count} files in {time.monotonic() - begin:.0f} s:", ", ".join(f"{counts[k]} {k}" for k in OUTCOMES))
    return int(any(counts[outcome] for outcome in OUTCOMES[2:]))


if __name__ == "__main__":
    os.environ.pop("PYTHONWARNINGS", None)
    sys.exit(main())
