"""What a training run starts from: the images that it found, the network with its weights restored, the config."""

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import tensorflow as tf

import data
import devices
from console import StopSignals, UserError, one_line
from dataset import layouts
from dataset.contents import Fingerprint
from dataset.corrections import apply_corrections
from model import NETWORKS, Network
from replicas import ONE_DEVICE, Replicas
from run import Run
from run_config import DataRecord, ModelRecord, Phase, RunConfig, WeightsRecord, new_network
from training import features, plan
from training.evaluation import find_faults, fingerprint_images
from training.settings import Settings
from training.step import Trainer
from weights.names import find_imagenet, load_pretrained
from weights.restore import RestoreReport, restore


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin or to be resumed; train.py and the tools start from it.

    listed: `examples` and the images that --relabel drops. Their activations are kept too, so that what is cached
    serves before and after a correction.
    network: holds the values to start from. prints: of every image in `listed`, by path. images: what images.csv says.
    """

    config: RunConfig
    settings: Settings
    found: layouts.LabelledImages
    examples: dict[str, layouts.Examples]
    listed: dict[str, layouts.Examples]
    prints: dict[str, Fingerprint]
    images: dict[str, plan.Recorded]
    network: Network

    def trainer(self, phases: Sequence[Phase] | None = None, replicas: Replicas = ONE_DEVICE) -> Trainer:
        """The network with its optimiser; on several devices a copy of the network."""
        optimisation = plan.optimisation(self.settings, self.examples["train"])
        new = frozenset(self.config.new_variables)
        network = self.network
        if replicas.strategy:
            with replicas.scope():
                network = new_network(self.config)
            copy_variables(self.network, network)
        return Trainer(network, optimisation, list(phases or self.config.phases), new, self.settings.seed, replicas)

    def cached_loads(
        self,
        phases: Sequence[Phase],
        examples: Mapping[str, layouts.Examples],
        stop: StopSignals,
        worker: int = 0,
        listed: Mapping[str, layouts.Examples] | None = None,
    ) -> dict[str, dict[str, data.Load]]:
        """{stage: {split: loader of what enters the stage}} for the phases that train on cached views.

        The caches hold the `examples`, or the `listed` ones that include them.
        """
        spec, root, listed = self.config.preprocessing, self.settings.cache_dir, listed or examples
        batch, prints = self.settings.images_at_once, self.prints
        return features.cached_loads(self.network, phases, examples, listed, prints, spec, root, stop, worker, batch)


def prepare(settings: Settings, data_path: str, command: Sequence[str] = ()) -> Prepared:
    """Decides all that is decided when a run begins; writes nothing. Raises UserError for what the user can fix."""
    settings = settings.resolved()
    row = NETWORKS[settings.network]
    devices.use_threads(devices.default_threads())
    uncorrected = plan.list_images(settings, data_path)
    corrections = plan.corrections(settings, uncorrected)
    found = apply_corrections(uncorrected, corrections)
    arrays: dict[str, np.ndarray] = {}
    source = settings.pretrained
    if source == "none" and not row.from_scratch:
        raise UserError(
            f"--pretrained none: {settings.network} keeps the statistics of its batch normalisation as pretrained, so "
            "it can't be trained from scratch: give it weights, or take --network small"
        )
    if source != "none":
        source = find_imagenet(settings.network) if source == "imagenet" else source
        arrays = load_pretrained(source, settings.network)
    head, why = _choose_head(settings, arrays)
    model = ModelRecord(settings.network, head, len(found.class_names), settings.image_size, settings.seed)
    dtype = devices.compute_dtype(settings.precision)
    try:
        network = Network(**dataclasses.asdict(model), compute_dtype=dtype)
    except ValueError as error:
        raise UserError(f"--image-size {settings.image_size}: {error}") from None
    report = restore_pretrained(network, arrays, source)
    new = [name for name, _ in report.new]
    prints: dict[str, Fingerprint] = {}
    excluded = _bad_images(settings, found, prints) + _bad_dropped(uncorrected, found, prints)
    examples, listed = _examples(settings, found, uncorrected, excluded)
    prints |= fingerprint_images([path for path in _paths(listed) if path not in prints], {})
    recorded = plan.record_images(found, examples, prints)
    config = RunConfig(
        command=list(command),
        created=datetime.now().astimezone().strftime("%Y-%m-%dT%H:%M:%S.%f%z"),
        settings=settings.as_dict(),
        class_names=found.class_names,
        counts={split: len(kept) for split, kept in examples.items()},
        data=DataRecord(
            found.root, found.layout, found.digest(), os.path.abspath(data_path), plan.content_digest(recorded)
        ),
        model=model,
        head_reason=why,
        precision=dtype.name,
        preprocessing=data.Preprocessing(
            settings.image_size, settings.crop_margin, settings.augment, row.mean_rgb, row.std_rgb, settings.decode
        ),
        phases=plan.make_phases(settings, network, new, len(examples["train"])),
        pretrained=WeightsRecord(
            source, report.summary(), report.restored, [list(n) for n in report.new], report.unused
        ),
        new_variables=new if arrays else [],
        versions={"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__},
        excluded=excluded,
        corrections=corrections,
        threads=devices.default_threads(),
    )
    return Prepared(config, settings, found, examples, listed, prints, recorded, network)


def resume(run: Run, settings: Settings, data_path: str) -> Prepared:
    """What `prepare` decided for a run that exists; UserError, naming what differs, where it would be another run."""
    config = run.config()
    uncorrected = plan.list_images(settings, data_path)
    if settings.auto_batch and config.settings.get("auto_batch"):  # the parts that it found when the run began
        settings = dataclasses.replace(settings, accumulate=config.settings["accumulate"])
    plan.check_settings(run, config, settings)
    plan.check_corrections(run, config, plan.corrections(settings, uncorrected))
    found = apply_corrections(uncorrected, config.corrections)
    examples, listed = _examples(settings, found, uncorrected, config.excluded)
    then = plan.read_images(run)
    prints = fingerprint_images(_paths(listed), plan.known_fingerprints(then, found.root), config.data.content)
    recorded = plan.record_images(found, examples, prints)
    if changes := plan.image_changes(config, found, then, recorded):
        raise UserError(
            f"{run.path} can't be resumed: the images of {found.root} are not those that it began with: "
            f"{', '.join(changes)}; restore them, or name a new --run"
        )
    network = new_network(config)
    if not run.has_checkpoint("latest"):  # killed before its first one
        source = config.pretrained.source
        arrays = {} if source == "none" else load_pretrained(source, settings.network)
        restore_pretrained(network, arrays, source)
    return Prepared(config, settings, found, examples, listed, prints, recorded, network)


def _choose_head(settings: Settings, arrays: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """The head of a new run, and why: `auto` is `fc` where the weights bring its hidden layers."""
    if settings.head != "auto":
        return settings.head, "as asked"
    row = NETWORKS[settings.network]
    hidden = list(row.fc(1))[:-1]
    if not hidden:
        return "gap", f"{settings.network} has no fc6 and fc7"
    has_fc = all(f"{row.scope or settings.network}/{stage}/weights" in arrays for stage in hidden)
    return ("fc", "the weights bring fc6 and fc7") if has_fc else ("gap", "the weights bring no fc6 and fc7")


def restore_pretrained(network: Network, arrays: dict[str, np.ndarray], source: str) -> RestoreReport:
    """Restores everything but the last layer, whose classes are other ones; only the head may be missing in the file.

    Without arrays (`--pretrained none`) nothing is restored.
    """
    last = list(network.variables_from(network.stages[-1]))
    may_be_new = list(network.variables_from(network.head_stages[0]) if arrays else network.variables_by_name)
    return restore(network.variables_by_name, arrays, exclude=last, may_be_new=may_be_new, source=source)


def _examples(
    settings: Settings, found: layouts.LabelledImages, uncorrected: layouts.LabelledImages, excluded: list[str]
) -> tuple[dict[str, layouts.Examples], dict[str, layouts.Examples]]:
    """The examples of each split, and with those that --relabel drops: see `Prepared`."""
    examples = plan.usable_examples(settings, found, excluded)
    if found is uncorrected or settings.examples_per_class:  # which of a class are taken changes with the corrections
        return examples, examples
    return examples, plan.usable_examples(settings, uncorrected, excluded)


def _paths(splits: Mapping[str, layouts.Examples]) -> list[str]:
    return [path for of_split in splits.values() for path in of_split.paths]


def _bad_dropped(
    uncorrected: layouts.LabelledImages, found: layouts.LabelledImages, prints: dict[str, Fingerprint]
) -> list[str]:
    """Relative names of the images that --relabel drops and that can't be decoded, for which they may be dropped.

    `prints` takes the fingerprint of each that was read.
    """
    if found is uncorrected:
        return []
    dropped = set(_paths(uncorrected.splits)).difference(_paths(found.splits))
    faults = find_faults(sorted(dropped), thorough=True, prints=prints)
    return [os.path.relpath(path, found.root) for path in faults]


def _bad_images(settings: Settings, found: layouts.LabelledImages, prints: dict[str, Fingerprint]) -> list[str]:
    """Relative names of the files to train without; raises UserError for the first bad one unless they are skipped.

    `prints` takes the fingerprint of each that was read whole.
    """
    skip = settings.on_bad_image == "skip"
    paths = sorted(set(_paths(found.splits)))
    # Skipping must find every bad image now, by decoding all: the list of examples is fixed when the run begins. Else
    # the ends of a file would do: most files need not be read whole where a few are taken.
    whole = skip or not settings.examples_per_class
    faults = find_faults(paths, thorough=skip, prints=prints if whole else None)
    if not faults:
        return []
    names = {path: os.path.relpath(path, found.root) for path in faults}
    if not skip:
        path, reason = next(iter(faults.items()))
        more = f" (and {len(faults) - 1} more bad files)" if len(faults) > 1 else ""
        raise UserError(
            f"{path}: {reason}{more}; python -m tools.check_data lists all, --on-bad-image skip trains without them"
        )
    for path, reason in faults.items():
        print(f"skipped {one_line(names[path])}: {reason}")
    print(f"skipped {len(faults)} bad files of {len(paths)}")
    return [names[path] for path in faults]


def copy_variables(source: Network, target: Network) -> None:
    """Gives the variables of a network the values of an equal one."""
    for name, variable in target.variables_by_name.items():
        variable.assign(source.variables_by_name[name].numpy())
