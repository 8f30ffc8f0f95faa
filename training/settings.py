"""Every setting of a training run: name, default, range and help; `train.py` makes its flags of them."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from console import UserError
from data import AUGMENTATIONS, DECODE
from model import HEADS, NETWORKS

IMAGES_AT_ONCE = 32  # of a pass without gradients, where memory is not short
MANY = 1_000_001  # above what anybody means; larger numbers overflow somewhere in TensorFlow


def _setting(
    default: Any, help: str, choices: tuple[str, ...] = (), least: float | None = None, below: float | None = None
) -> Any:
    """A field; numbers are in [least, below)."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "least": least, "below": below}
    )


@dataclass(frozen=True)
class Settings:
    """The defaults are the published recipe: end to end, 20 epochs, momentum SGD, learning rate 1e-3 to 1e-7."""

    pretrained: str = _setting(
        "imagenet",
        "weights to start from: a file (TF-Slim checkpoint, Keras HDF5, TensorFlow.js, safetensors, npz), a run "
        "directory, 'imagenet' (a file of the network's name in data/, for vgg_19 else the pip-installed convolution "
        "weights), or 'none'",
    )
    network: str = _setting("vgg_19", "architecture", choices=tuple(NETWORKS))
    head: str = _setting(
        "auto",
        "what follows the convolutions: the published layers (VGG: fc6, fc7, fc8); a linear layer on globally averaged "
        "features; a linear layer on all features; 'auto': fc if the weights bring fc6 and fc7, else gap",
        choices=("auto", *HEADS),
    )
    train_from: str = _setting(
        "",
        "first stage to train, such as conv5; 'head': the new layers alone; default: the network's first, end to end",
    )
    head_solver: str = _setting(
        "auto",
        "how a linear head is trained alone: 'lbfgs' finds the optimum of the convex problem on cached activations and "
        "the strength of its penalty by cross-validation; 'auto': that, unless settings ask for what only SGD does",
        choices=("auto", "lbfgs", "sgd"),
    )
    head_epochs: int = _setting(0, "of the epochs, the first N train the new layers alone", least=0, below=MANY)
    cached_views: int = _setting(
        -1,
        "compute the activations below the trained stages once, for N random views of each training image, and train "
        "on those; 0: never; default: 2 where the head alone is trained, else 0",
        least=-1,
        below=MANY,
    )
    cache_dir: str = _setting("features", "folder of the cached activations, shared between runs")
    epochs: int = _setting(20, "passes over the training images", least=1, below=MANY)
    batch_size: int = _setting(64, "images a step", least=1, below=MANY)
    accumulate: int = _setting(
        1, "compute a batch in N parts, to fit a large batch in little memory", least=1, below=MANY
    )
    auto_batch: bool = _setting(
        False,
        "try a step when a run begins, and compute a batch that does not fit the device's memory in 2, 4, 8, ... parts",
    )
    learning_rate: float = _setting(1e-3, "learning rate at the first step", least=0)
    end_learning_rate: float = _setting(1e-7, "learning rate that the linear decay ends at", least=0)
    new_layer_rate: float = _setting(1.0, "factor on the learning rate of newly initialised layers", least=0)
    momentum: float = _setting(0.9, "momentum of SGD", least=0, below=1)
    weight_decay: float = _setting(5e-4, "L2 penalty on weights, not on biases", least=0)
    clip_norm: float = _setting(0.0, "scale the gradient down to this global norm; 0: never", least=0)
    dropout: float = _setting(0.5, "fraction of the outputs of fc6 and fc7 dropped while training", least=0, below=1)
    label_smoothing: float = _setting(0.0, "probability moved from the true class to all classes", least=0, below=1)
    class_weights: str = _setting(
        "none", "'balanced': every class weighs the same, however few its images", choices=("none", "balanced")
    )
    patience: int = _setting(
        0, "stop after N epochs without a better validation accuracy or loss; 0: never", least=0, below=MANY
    )
    image_size: int = _setting(0, "side of the network's input, pixels; default: as published", least=0, below=2049)
    crop_margin: int = _setting(10, "the crop is a square of side min(h, w) - 2 * margin, pixels", least=0, below=MANY)
    decode: str = _setting(
        "full",
        "'scaled': a JPEG whose short side is over about 8 times the network's is decoded at 1/2, 1/4 or 1/8 of it, "
        "in half the time; grey levels then differ by 0.1 on average",
        choices=DECODE,
    )
    augment: tuple[str, ...] = _setting((), "random changes of training images beside the crop", choices=AUGMENTATIONS)
    examples_per_class: int = _setting(0, "train on N images of each class; 0: all", least=0, below=MANY)
    val_fraction: float = _setting(0.2, "share of images to validate on where DATA has no such split", below=1, least=0)
    test_fraction: float = _setting(0.0, "share of images to keep for a test split", least=0, below=1)
    image_root: str = _setting("", "folder that the paths of a CSV are relative to; default: the CSV's own")
    relabel: str = _setting(
        "",
        "CSV with the columns image and action ('drop' or another class), such as label-issues.csv of "
        "tools.clean_data: train on the labels that it corrects; no file is changed",
    )
    on_bad_image: str = _setting(
        "fail", "a file that can't be decoded: stop before training, or go on without it", choices=("fail", "skip")
    )
    precision: str = _setting(
        "auto",
        "type of the convolutions and fc products; 'auto': bfloat16 where the hardware computes in it",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: str = _setting(
        "auto", "XLA compiles the training step; 'auto': on a GPU, not on a CPU", choices=("auto", "on", "off")
    )
    devices: int = _setting(
        0,
        "GPUs of this machine that divide each batch among them; 0: all; without a GPU, parts of the CPU, for tests",
        least=0,
        below=1025,
    )
    deterministic: bool = _setting(False, "the same result on every run on one GPU, slower; a CPU always gives it")
    seed: int = _setting(0, "of initial values, order, crops, augmentation and dropout", least=0, below=2**31)

    def __post_init__(self) -> None:
        """Raises UserError for a value that is out of range, or for values that contradict each other."""
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), flag_name(field)
            least, below = field.metadata["least"], field.metadata["below"]
            if least is not None and not value >= least:  # `not >=` so that NaN is refused too
                raise UserError(f"{flag} {value}: must be at least {least}")
            if (below is not None and not value < below) or value == float("inf"):
                raise UserError(f"{flag} {value}: must be less than {below or 'infinity'}")
        if self.head_epochs > self.epochs:
            raise UserError(
                f"--head-epochs {self.head_epochs}: more than --epochs {self.epochs}, of which they are part"
            )
        if self.accumulate > self.batch_size:
            raise UserError(
                f"--accumulate {self.accumulate}: more parts than --batch-size {self.batch_size} has images"
            )
        if self.compile == "on" and (self.accumulate > 1 or self.auto_batch or self.deterministic):
            other = "--deterministic: XLA chooses its algorithms by timing them"
            if self.accumulate > 1 or self.auto_batch:
                flag = "--auto-batch" if self.auto_batch else f"--accumulate {self.accumulate}"
                other = f"{flag}: XLA can't compile the parts of a batch"
            raise UserError(f"--compile on: not together with {other}")

    def resolved(self) -> "Settings":
        """With the network's own image size and first stage where none is given."""
        row = NETWORKS[self.network]
        return dataclasses.replace(
            self, image_size=self.image_size or row.image_size, train_from=self.train_from or next(iter(row.stages))
        )

    @property
    def part_size(self) -> int:
        """Images that are computed at once: a batch, or a part of it with `accumulate`."""
        return -(-self.batch_size // self.accumulate)

    @property
    def images_at_once(self) -> int:
        """Images that a pass without gradients computes at once: fewer only where `accumulate` says memory is short."""
        return min(IMAGES_AT_ONCE, self.part_size) if self.accumulate > 1 else IMAGES_AT_ONCE

    def solves_heads(self) -> bool:
        """Whether a linear head that is trained alone may be solved; `auto` leaves it to SGD where SGD is adjusted."""
        of_sgd = ("learning_rate", "end_learning_rate", "momentum", "weight_decay", "clip_norm", "new_layer_rate")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        adjusted = self.patience or any(getattr(self, name) != defaults[name] for name in of_sgd)
        return self.head_solver == "lbfgs" or (self.head_solver == "auto" and not adjusted)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**dataclasses.asdict(self), "augment": list(self.augment)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Of parsed flags, or of what `as_dict` gave."""
        if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise UserError(f"the setting {min(unknown)} is of a later version: update")
        return cls(**{**values, "augment": tuple(values.get("augment", ()))})


GROUPS = {  # of flags in --help; all others are of the training
    "data": (
        *(
            "image_size",
            "crop_margin",
            "decode",
            "augment",
            "examples_per_class",
            "val_fraction",
            "test_fraction",
            "image_root",
        ),
        *("on_bad_image", "relabel"),
    ),
    "network": ("pretrained", "network", "head", "train_from"),
    "hardware": ("precision", "deterministic", "accumulate", "auto_batch", "cache_dir", "devices", "compile"),
}


def add_flags(parser: argparse.ArgumentParser, without: tuple[str, ...] = (), **other_defaults: Any) -> None:
    """Gives `parser` a flag for each setting but those named in `without`; `other_defaults` by field name."""
    groups = {title: parser.add_argument_group(title) for title in (*GROUPS, "training")}
    title_of = {name: title for title, names in GROUPS.items() for name in names}
    for field in dataclasses.fields(Settings):
        if field.name in without:
            continue
        group = groups[title_of.get(field.name, "training")]
        default, help = other_defaults.get(field.name, field.default), field.metadata["help"]
        choices = field.metadata["choices"] or None
        if isinstance(default, bool):
            group.add_argument(flag_name(field), action="store_true", help=help)
            continue
        shape: dict[str, Any] = {"nargs": "*"} if isinstance(default, tuple) else {"type": type(default)}
        shown = " ".join(default) if isinstance(default, tuple) else str(default)
        if not help.count("default:") and shown:
            help += f" (default: {shown})"
        group.add_argument(flag_name(field), default=default, choices=choices, help=help, **shape)


def flag_name(field: dataclasses.Field) -> str:
    """The command-line flag of a setting."""
    return "--" + field.name.replace("_", "-")
