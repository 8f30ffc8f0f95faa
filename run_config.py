"""The record of a run, config.json: typed, written once when the run begins, read whatever version wrote it."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from console import UserError, one_line
from data import Preprocessing
from dataset.corrections import Correction
from devices import compute_dtype, use_threads
from model import NETWORKS, Network

FORMAT = 2  # of config.json; 1 had no such number
MOST_THREADS = 4096


@dataclass(frozen=True)
class Phase:
    """Steps [first_step, end_step) of a run, in which the stages from `train_from` on are trained.

    Their input is what enters `input_stage`: images (the network's first stage), or `views` cached views of the
    activations there. `solver`: `sgd`, or `lbfgs` for a head that is solved at once, as if all those steps were done.
    """

    name: str
    train_from: str
    input_stage: str
    views: int
    first_step: int
    end_step: int
    solver: str = "sgd"


@dataclass(frozen=True)
class DataRecord:
    """The data set that a run was begun with.

    path: DATA as given, absolute; root: the folder that the names of images are relative to.
    digest: of every name with its class and split; content: of the content of every image used ("": not recorded).
    """

    root: str
    layout: str
    digest: str
    path: str = ""
    content: str = ""


@dataclass(frozen=True)
class ModelRecord:
    """The arguments of `Network` but for the compute dtype."""

    network: str
    head: str
    class_count: int
    image_size: int
    seed: int


@dataclass(frozen=True)
class WeightsRecord:
    """Where the first values came from, and what became of every name: see `weights.restore.RestoreReport`."""

    source: str
    summary: str
    restored: list[str] = field(default_factory=list)
    new: list[Any] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunConfig:
    """What is decided when a run begins and kept when it is resumed: the content of config.json.

    settings: every field of `training.settings.Settings` by name; counts: images of each split.
    excluded: relative names of bad images that the run leaves out; new_variables: names not restored.
    corrections: labels changed and images dropped by --relabel; `counts` are those after it.
    threads: CPU threads that an operation is divided among, which decides how sums are rounded (0: not recorded).
    """

    command: list[str]
    created: str
    settings: dict[str, Any]
    class_names: tuple[str, ...]
    counts: dict[str, int]
    data: DataRecord
    model: ModelRecord
    head_reason: str
    precision: str
    preprocessing: Preprocessing
    phases: tuple[Phase, ...]
    pretrained: WeightsRecord
    new_variables: list[str]
    versions: dict[str, str]
    excluded: list[str] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    threads: int = 0
    format: int = FORMAT

    @classmethod
    def from_json(cls, value: Any) -> "RunConfig":
        """Of a parsed config.json of this or an earlier version; ValueError says what is wrong with it."""
        version = value.get("format", 1) if isinstance(value, dict) else 0
        if not isinstance(version, int) or version > FORMAT:
            raise ValueError(f"format {version} is of a later version; this one reads up to {FORMAT}: update")
        if version == 1 and isinstance(value.get("phases"), list):
            phases = [
                {**phase, "end_step": phase.get("last_step")} if isinstance(phase, dict) else phase
                for phase in value["phases"]
            ]
            value = {**value, "phases": phases, "format": 1}
        config = typing.cast(RunConfig, _typed(cls, value, ""))
        for name, valid in (
            ("model.network", config.model.network in NETWORKS),
            ("precision", config.precision in ("float32", "bfloat16")),
            ("threads", 0 <= config.threads <= MOST_THREADS),
            ("class_names", len(set(config.class_names)) == len(config.class_names) == config.model.class_count),
            ("preprocessing.image_size", config.preprocessing.image_size == config.model.image_size),
            ("preprocessing.std_rgb", all(0 < std < math.inf for std in config.preprocessing.std_rgb)),
            ("preprocessing.mean_rgb", all(map(math.isfinite, config.preprocessing.mean_rgb))),
        ):
            if not valid:
                raise ValueError(f"{name} can't be so")
        return config


def _typed(kind: Any, value: Any, name: str) -> Any:
    """`value`, parsed from JSON, as `kind`: a dataclass (unknown fields are ignored), a container, or a plain type."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints, found = typing.get_type_hints(kind), {}
        for item in dataclasses.fields(kind):
            place = f"{name}.{item.name}" if name else item.name
            if item.name in value:
                found[item.name] = _typed(hints[item.name], value[item.name], place)
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise ValueError(f"{place} is missing")
        return typing.cast(Any, kind)(**found)
    if kind is Any:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        if origin is tuple and arguments[-1] is not ... and len(value) != len(arguments):
            raise ValueError(f"{name} has {len(value)} values, not {len(arguments)}")
        return origin(_typed(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(origin, type | types.UnionType)
        and isinstance(value, origin)
        and isinstance(value, bool) == (kind is bool)
    ):
        return value
    raise ValueError(f"{name or 'the content'} is {one_line(repr(value)[:60])}, not {getattr(kind, '__name__', kind)}")


def new_network(config: RunConfig, seeded: bool = True) -> Network:
    """A run's network: initial values, or zeros unless `seeded`; UserError where its config describes none.

    All that continues or uses a run comes through here, so it divides its operations among the run's threads first:
    they decide how sums are rounded.
    """
    use_threads(config.threads)
    model = dataclasses.asdict(config.model) | ({} if seeded else {"seed": None})
    try:
        return Network(**model, compute_dtype=compute_dtype(config.precision))
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None
