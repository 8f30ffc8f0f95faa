"""Speed, measured against what people would use instead: python -m tools.benchmark COMMAND [flags].

The candidates take turns in one process, since machines are shared and their speed drifts; medians, spread and ratios
are printed, and with --record FILE appended to a file with the machine, the versions and the command.
"""

import argparse
import dataclasses
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from console import ArgumentParser, StopSignals, UserError, one_line, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
import tensorflow as tf

import data
import devices
from files import check_writable
from model import NETWORKS, Network
from reports.tables import table
from run import Run
from run_config import Phase
from tools import benchmark_processes as processes
from tools.benchmark_input import candidates
from tools.timing import Candidate, comparison, machine, record, take_turns
from training.evaluation import readable_failures
from training.preparation import prepare
from training.settings import Settings, add_flags
from training.step import Optimisation, Trainer, compiled_forward, decay_over

Rounds = tuple[int, int]  # timed, and before them those that are not counted


# -- step, inference -------------------------------------------------------------------------------------------------


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=tuple(NETWORKS), default="vgg_19", help="default: vgg_19")
    parser.add_argument(
        "--head", choices=("fc", "gap", "linear"), help="default: fc, or gap where the size is too small"
    )
    parser.add_argument("--train-from", default="", help="first stage to train; default: all")
    parser.add_argument("--image-size", type=int, default=0, help="pixels; default: as published")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (default: 16)")
    parser.add_argument("--classes", type=int, default=101, help="default: 101")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="default: auto")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="default: auto")
    parser.add_argument("--peers", action="store_true", help="also Keras', the published script's, PyTorch's (VGG19)")


def flops(forward: Callable) -> float:
    """Multiplications and additions of the convolutions and matrix products that one image takes in `forward`."""
    total = 0.0
    for op in forward.get_concrete_function().graph.get_operations():  # type: ignore[attr-defined]
        if op.type in ("Conv2D", "DepthwiseConv2dNative", "MatMul"):
            positions = int(np.prod(op.outputs[0].shape[1:-1]))  # none for a matrix product
            total += 2.0 * positions * int(np.prod(op.inputs[1].shape))
    return total


def matrix_product(dtype: tf.DType, side: int = 2048) -> tuple[Candidate, float]:
    """Products of large matrices, which show how fast the machine multiplies at best, and their operations."""
    a = tf.cast(tf.random.stateless_normal([side, side], [0, 0]), dtype)
    times = 4

    @tf.function(autograph=False)
    def multiply() -> tf.Tensor:
        product = a
        for _ in range(times):
            product = tf.matmul(product, a)
        return tf.reduce_sum(tf.cast(product, tf.float32))

    def work() -> int:
        multiply().numpy()
        return 1

    return work, times * 2.0 * side**3


def ours(network: Network, first: str, compile: str, x: np.ndarray, labels: np.ndarray) -> tuple[Candidate, Candidate]:
    """Our step from stage `first` on and our forward pass; the device's work has ended when they return."""
    phase = Phase("all", first, network.stages[0], 0, 0, 10**6)
    trainer = Trainer(network, Optimisation(compile=compile), [phase], frozenset(), 0)
    step, predict = trainer.train_step(phase, decay_over(phase, trainer.settings)), compiled_forward(network)
    images, of_images = tf.constant(x), tf.constant(labels)

    def train() -> int:
        step(images, of_images)
        trainer.take_sums()
        return len(x)

    def forward() -> int:
        predict(images).numpy()
        return len(x)

    return train, forward


def measure_network(arguments: argparse.Namespace, rounds: Rounds, stop: StopSignals) -> str:
    """The train step, or the forward pass, of a network on images of noise."""
    dtype = devices.compute_dtype(arguments.precision)
    size = arguments.image_size or NETWORKS[arguments.network].image_size
    try:
        head = arguments.head or ("fc" if size >= NETWORKS[arguments.network].fc_min_size else "gap")
        network = Network(arguments.network, head, arguments.classes, size, compute_dtype=dtype)
    except ValueError as error:
        raise UserError(f"--image-size {size}: {error}") from None
    first = arguments.train_from or network.stages[0]
    if first not in network.stages:
        raise UserError(f"--train-from {first}: {arguments.network} has the stages {', '.join(network.stages)}")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 60, (arguments.batch_size, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, arguments.classes, arguments.batch_size)
    pairs = {"ours": ours(network, first, arguments.compile, x, labels)}
    if arguments.peers:
        if (arguments.network, head, first, size) != ("vgg_19", "fc", network.stages[0], 224):
            raise UserError(
                "--peers: they train vgg_19 with the fc head, all stages, at 224 px: leave other flags away"
            )
        from tools import benchmark_peers

        pairs |= benchmark_peers.peers(x, labels, arguments.classes, dtype.name)
    place = 0 if arguments.command == "step" else 1
    product, product_flops = matrix_product(dtype)
    measured = take_turns({**{name: pair[place] for name, pair in pairs.items()}, "product": product}, *rounds, stop)
    text = f"{dtype.name}, batch {arguments.batch_size}\n"
    products = measured.pop("product")
    text += comparison(measured)
    if not arguments.peers:  # whose memory is in it
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        text += f"\nthis process took {peak:.2f} GiB of the host's memory at most"
    if place == 0 and first != network.stages[0]:
        return text  # how much of a backward pass that is, depends on the stage
    # On a shared CPU, by the time of its cores: both use all of them.
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    best = product_flops / float(np.median([r.wall if on_gpu else r.cpu for r in products]))
    seconds = float(np.median([(r.wall if on_gpu else r.cpu) / r.images for r in measured["ours"]]))
    share = (1.0 if place else 3.0) * flops(compiled_forward(network)) / seconds / best
    return f"{text}\nours reaches {share:.0%} of what products of large matrices reach here"


# -- input, cache ----------------------------------------------------------------------------------------------------


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="every *.jpg in and below it is read")
    parser.add_argument("--images", type=int, default=400, help="at most so many files (default: 400)")


def find_jpegs(arguments: argparse.Namespace) -> list[str]:
    paths = [str(path) for path in sorted(arguments.folder.rglob("*.jpg"))[: max(1, arguments.images)]]
    if not paths:
        raise UserError(f"{one_line(arguments.folder)} holds no *.jpg: give a folder of JPEG files")
    return paths


def measure_input(arguments: argparse.Namespace, rounds: Rounds, stop: StopSignals) -> str:
    """`taskset -c 0` in front gives the figures of one core."""
    return comparison(take_turns(candidates(find_jpegs(arguments)), *rounds, stop))


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="as for train.py")
    add_flags(parser, without=("devices", "auto_batch"), train_from="conv5", batch_size=32)


def steps_of(trainer: Trainer, phase: Phase, load: data.Load, labels: np.ndarray, order: data.Order) -> Candidate:
    """A step, the reading of its batch included."""
    step = trainer.train_step(phase, decay_over(phase, trainer.settings))
    order = dataclasses.replace(order, views=phase.views)
    batches: Iterator = iter(data.train_batches(load, labels, order, 0, phase.end_step))

    def work() -> int:
        x, y, _ = next(batches)
        step(x, y)
        trainer.take_sums()
        return len(x)

    return work


def measure_cache(arguments: argparse.Namespace, rounds: Rounds, stop: StopSignals) -> str:
    """The same training on cached activations and on images; computing the cache is not part of it."""
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings.from_dict({name: value for name, value in vars(arguments).items() if name in names})
    prepared = prepare(settings, arguments.data)
    train, images = prepared.examples["train"], prepared.network.stages[0]
    used = train.subset(list(range(min(len(train), settings.batch_size * 4))))
    planned = prepared.config.phases[-1]
    if planned.train_from == images:
        raise UserError(f"--train-from {images}: nothing is frozen, so nothing can be cached; name a later stage")
    order = data.Order(len(used), settings.batch_size, settings.seed)
    phase = dataclasses.replace(planned, first_step=0, end_step=order.epoch_steps * 10**6)
    cached = dataclasses.replace(phase, input_stage=phase.train_from, views=max(1, phase.views))
    uncached = dataclasses.replace(phase, input_stage=images, views=0)
    trainer = prepared.trainer([cached, uncached])
    of_cache = prepared.cached_loads([cached], {"train": used}, stop)[phase.train_from]["train"]
    of_images = data.image_loader(used, prepared.config.preprocessing, settings.seed)
    ways = {
        "cached activations": steps_of(trainer, cached, of_cache, used.labels, order),
        "images": steps_of(trainer, uncached, of_images, used.labels, order),
    }
    return comparison(take_turns(ways, *rounds, stop))


# -- startup, folder -------------------------------------------------------------------------------------------------


def add_startup_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="also one prediction with this run, and with a Keras model of the same layers")
    parser.add_argument("--image", help="the image to predict")


def measure_startup(arguments: argparse.Namespace, rounds: Rounds, stop: StopSignals) -> str:
    """Whole processes, and what their imports consist of."""
    if bool(arguments.run) != bool(arguments.image):
        raise UserError("--run and --image: give both or neither")
    candidates = {
        "TensorFlow alone": processes.process("-c", "import tensorflow"),
        "inference.py --help": processes.process("inference.py", "--help"),
        "train.py --help": processes.process("train.py", "--help"),
    }
    with tempfile.TemporaryDirectory() as folder:
        if arguments.run:
            image = Path(arguments.image).resolve()
            candidates |= processes.predictions(Run(arguments.run), Path(folder), image, 1)
        measured = take_turns(candidates, *rounds, stop)
    imported = [[name, f"{seconds:.3f}"] for name, seconds in processes.imports("inference")]
    return f"{processes.seconds(measured)}\n\n{table(imported, ['import of inference.py', 'seconds'])}"


def add_folder_flags(parser: argparse.ArgumentParser) -> None:
    add_input_flags(parser)
    parser.add_argument("--run", required=True, help="the run to predict with: vgg_19, vgg_16 or small")


def measure_folder(arguments: argparse.Namespace, rounds: Rounds, stop: StopSignals) -> str:
    """Whole processes again, the start included."""
    paths = find_jpegs(arguments)
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder) / "photographs"
        photographs.mkdir()
        for number, path in enumerate(paths):
            (photographs / f"{number:06d}.jpg").symlink_to(Path(path).resolve())
        candidates = processes.predictions(Run(arguments.run), Path(folder), photographs, len(paths))
        return comparison(take_turns(candidates, *rounds, stop))


# --------------------------------------------------------------------------------------------------------------------

Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace, Rounds, StopSignals], str]
]
COMMANDS: dict[str, Command] = {
    "step": ("a training step", add_network_flags, measure_network),
    "inference": ("a forward pass", add_network_flags, measure_network),
    "input": ("from JPEG files to the network's input", add_input_flags, measure_input),
    "cache": ("training on cached activations and on images", add_cache_flags, measure_cache),
    "startup": ("imports, and one prediction in a process of its own", add_startup_flags, measure_startup),
    "folder": ("inference.py and a plain Keras script on a folder", add_folder_flags, measure_folder),
}


def main() -> int:
    parser = ArgumentParser(prog="tools.benchmark", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (help, add, _) in COMMANDS.items():
        of_command = commands.add_parser(name, help=help, description=help)
        of_command.add_argument("--rounds", type=int, default=5, help="timed rounds of each candidate (default: 5)")
        of_command.add_argument("--warm-up", type=int, default=1, help="rounds before those (default: 1)")
        of_command.add_argument("--record", metavar="FILE", help="append the result to this file")
        add(of_command)
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.warm_up < 0:
        raise UserError(f"--rounds {arguments.rounds} --warm-up {arguments.warm_up}: at least 1 and 0")
    if arguments.record:
        check_writable("--record", arguments.record)
    devices.use_threads(devices.default_threads())
    with readable_failures(), StopSignals() as stop:
        text = COMMANDS[arguments.command][2](arguments, (arguments.rounds, arguments.warm_up), stop)
    where = machine({"Python": sys.version.split()[0], "TensorFlow": tf.__version__})
    print(f"{where}\n{text}")
    if arguments.record:
        record(arguments.record, where, text)
    return 0


if __name__ == "__main__":
    run_script(main)
