"""Says what your images need, by evidence: which depth of which network, flips, more images, and what a step costs.

One pass of the training images through the frozen network is kept on disk (means over positions, a few MB). On it the
best linear head is fitted out of fold, by cross-validation: each image is judged by a head that did not train on it.
Figures are accuracies ± their standard error over the training images; validation images are not looked at.

  depth      the head on the last stages of the network, each alone, and on all of them together
  flips      the same with mirrored views to train on; judged on the same views that are not mirrored
  images     the head trained on a quarter and a half of the images, judged on all
  seconds    of a training step on this machine, measured

A difference counts where it is more than twice its standard error, which is that of the differences image by image.
The last lines recommend one command of train.py. How far fine-tuning gets is not measured here: it would have to be
done. Give --network several times to compare networks (and --pretrained once, or once for each).
"""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from console import ArgumentParser, StopSignals, UserError, one_line, quiet_tensorflow, run_script

quiet_tensorflow()

import numpy as np
from matplotlib.figure import Figure

from files import check_writable, write_csv
from model import NETWORKS
from reports.pictures import BLUE, GREEN, ORANGE, fit_text, save_figure, text_style
from reports.tables import table
from tools.advise_evidence import SHARES, Evidence, examine, mean_and_error
from training.evaluation import readable_failures
from training.session import refuse_inside
from training.settings import Settings, add_flags, flag_name

FLAGS = (  # of train.py
    *("image_size", "crop_margin", "decode", "augment", "examples_per_class", "val_fraction", "test_fraction"),
    *("image_root", "relabel", "on_bad_image", "cached_views", "cache_dir", "precision", "compile", "batch_size"),
    *("epochs", "seed"),
)
COLUMNS = ("network", "depth", "flips", "images", "accuracy", "± error", "difference", "± its error")
GOOD_ENOUGH = 0.98  # out-of-fold accuracy that no further training is recommended above


def recommend(evidence: Sequence[Evidence], hours: float) -> tuple[Settings, str]:
    """The settings to train with, and why, in a sentence; training may take `hours`."""
    best = max(evidence, key=lambda e: float(e.right[e.last, False].mean()))
    why = []
    if len(evidence) > 1:  # of those not worse by two standard errors, the one whose steps are the shortest
        near = [e for e in evidence if not _better(best.right[best.last, False], e.right[e.last, False])]
        best = min(near, key=lambda e: list(e.seconds.values())[-1])
        why.append(f"{one_line(best.name)} is the best of the networks, or as good as the best and faster")
    settings, right = best.settings, best.right[best.last, False]
    if (best.last, True) in best.right and _better(best.right[best.last, True], right):
        settings = dataclasses.replace(settings, augment=(*settings.augment, "flip"))
        right = best.right[best.last, True]
        why.append("mirrored views help")
    flipped = right is not best.right[best.last, False]
    depth = max((d for d, f in best.right if f == flipped), key=lambda d: best.right[d, flipped].mean())
    accuracy, error = mean_and_error(right)
    known = _better(best.right[depth, flipped], right)
    if known:
        why.append(f"{depth} tells the classes apart better than {best.last} alone, which has to be trained to")
    else:
        why.append(f"the best head on frozen {best.last} is right for {accuracy:.1%} ± {error:.1%} out of fold")
    if accuracy >= GOOD_ENOUGH and not known:
        return settings, f"{'; '.join(why)}: there is little left to gain by training more than the head"
    deeper = list(best.seconds)[1:]
    for stage in reversed(deeper):
        needed = best.hours(stage)
        if needed <= hours:
            why.append(f"{settings.epochs} epochs from {stage} take {_duration(needed)}")
            chosen = dataclasses.replace(
                settings, train_from=stage, head_epochs=min(1, settings.epochs - 1), cached_views=-1
            )
            return chosen, f"{'; '.join(why)}: so train from {stage}, beginning with the best head"
    why.append(f"{settings.epochs} epochs from {deeper[0]} would take {_duration(needed)}, more than --hours {hours:g}")
    return settings, f"{'; '.join(why)}: so train the head alone"


def _better(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a is right more often than b by more than two standard errors of the difference, image by image."""
    mean, error = mean_and_error(a - b)
    return mean > 2 * error


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def train_command(data_path: str, settings: Settings) -> str:
    """The command line of train.py that gives these settings."""
    words = ["python", "train.py", data_path]
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if value != field.default:
            words += [flag_name(field), *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def report(evidence: Sequence[Evidence]) -> tuple[str, list[list[object]]]:
    """The tables as text, and the rows of the first, `COLUMNS`; differences are to the last stage's head."""
    rows: list[list[object]] = []
    steps, lines = [], []
    best = max((e.right[e.last, False] for e in evidence), key=lambda right: float(right.mean()))
    for e in evidence:
        base = e.right[e.last, False]
        judged = [(depth, flips, 1.0, right) for (depth, flips), right in e.right.items()]
        judged += [(e.last, False, share, right) for share, right in e.curve.items() if share < 1]
        for depth, flips, share, right in judged:
            difference = mean_and_error(right - base) if right is not base else (None, None)
            rows.append([e.name, depth, "yes" if flips else "no", share, *mean_and_error(right), *difference])
        gain, error = mean_and_error(e.curve[1.0] - e.curve[0.5])
        verdict = "more would help" if _better(e.curve[1.0], e.curve[0.5]) else "no clear gain from more"
        lines.append(
            f"images     {one_line(e.name)}: all images instead of half brought {gain:+.4f} ± {error:.4f}: {verdict}"
        )
        if base is not best:
            less, error = mean_and_error(base - best)
            lines.append(f"network    {one_line(e.name)}: {less:+.4f} ± {error:.4f} against the best network")
        steps += [[e.name, _part(e, stage), seconds, _duration(e.hours(stage))] for stage, seconds in e.seconds.items()]
    times = table(steps, ["network", "trained from", "seconds a step", f"{evidence[0].settings.epochs} epochs"])
    return "\n\n".join([table(rows, COLUMNS), "\n".join(lines), times]), rows


def _part(evidence: Evidence, stage: str) -> str:
    """What is trained from a stage on, for people."""
    return f"{stage} ({dict(zip(evidence.seconds, ('head, cached', 'last stage', 'end to end'), strict=True))[stage]})"


def draw(path: str, evidence: Sequence[Evidence]) -> None:
    """Accuracies by depth, the learning curve, and the seconds of a step; a colour for each network."""
    figure = Figure(figsize=(15, 2 + 0.3 * sum(len(e.right) for e in evidence)), layout="constrained")
    depths, images, steps = figure.subplots(1, 3, width_ratios=[1.5, 1.2, 1])
    labels: list[str] = []
    parts: list[str] = []
    for index, e in enumerate(evidence):
        colour, name = (BLUE, ORANGE, GREEN)[index % 3], fit_text(one_line(e.name), 1.5)
        for (depth, flips), right in e.right.items():
            mean, error = mean_and_error(right)
            depths.errorbar(mean, len(labels), xerr=error, color=colour, marker="s" if flips else "o", capsize=3)
            labels.append(f"{name} {depth}{', flips' if flips else ''}")
        means, errors = zip(*map(mean_and_error, e.curve.values()), strict=True)
        images.errorbar(list(e.curve), means, errors, color=colour, marker="o", capsize=3, label=name)
        steps.plot(list(e.seconds.values()), range(len(parts), len(parts) + len(e.seconds)), "o", color=colour)
        parts += [f"{name} {_part(e, stage)}" for stage in e.seconds]
    depths.set(title="Out-of-fold accuracy ± standard error", xlabel="accuracy of the best head")
    depths.set_yticks(range(len(labels)), labels, **text_style())
    images.set(title="Fewer training images", xlabel="share of the images", xscale="log", ylabel="accuracy")
    images.set_xticks(SHARES, [f"{share:g}" for share in SHARES])
    images.minorticks_off()
    for text in images.legend().get_texts():
        text.set(**text_style())
    steps.set(title="A training step here", xlabel="seconds", xscale="log")
    steps.set_yticks(range(len(parts)), parts, **text_style())
    steps.margins(0.1, 0.2)
    for axes in (depths, steps):
        axes.invert_yaxis()
    for axes in (depths, images, steps):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, prints and draws."""
    parser = ArgumentParser(
        prog="python -m tools.advise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="a data set in any layout that train.py takes")
    parser.add_argument("--network", action="append", choices=tuple(NETWORKS), help="may be repeated; default: vgg_19")
    parser.add_argument("--pretrained", action="append", help="as for train.py: once, or for each network in turn")
    parser.add_argument("--no-flips", action="store_true", help="do not try mirrored views: half the time")
    parser.add_argument("--hours", type=float, default=1.0, help="that training may take (default: %(default)s)")
    parser.add_argument("--output", default="advice.png", help="picture to write; the numbers go beside it")
    add_flags(parser, without=tuple(f.name for f in dataclasses.fields(Settings) if f.name not in FLAGS))
    values = vars(parser.parse_args(argv))
    path, output, hours, no_flips = (values.pop(name) for name in ("data", "output", "hours", "no_flips"))
    networks, weights = (values.pop(name) or [default] for name, default in
                         (("network", "vgg_19"), ("pretrained", "imagenet")))  # fmt: skip
    if len(weights) not in (1, len(networks)):
        raise UserError(f"--pretrained is given {len(weights)} times: give it once, or for each --network in turn")
    if "none" in weights or values["cached_views"] == 0 or not hours > 0:
        raise UserError("advice needs --pretrained weights, a --cached-views of 1 or more and --hours more than 0")
    weights *= len(networks) // len(weights)
    if len(set(zip(networks, weights, strict=True))) < len(networks):
        raise UserError("--network names the same network and weights twice: give each once")
    every = [
        Settings.from_dict({**values, "network": n, "pretrained": w, "head": "gap", "train_from": "head"})
        for n, w in zip(networks, weights, strict=True)
    ]
    refuse_inside(path, {"--cache-dir": Path(every[0].cache_dir)})
    check_writable("--output", output)
    with StopSignals() as stop, readable_failures():
        evidence = [examine(settings, path, not no_flips, stop) for settings in every]
    text, rows = report(evidence)
    csv_path = os.path.splitext(output)[0] + ".csv"
    write_csv(csv_path, COLUMNS, rows)
    draw(output, evidence)
    settings, why = recommend(evidence, hours)
    print(f"{text}\n\nadvice     {one_line(train_command(path, settings))}\nbecause    {why}")
    print(f"picture    {one_line(output)}, numbers in {one_line(csv_path)}")
    return 0


if __name__ == "__main__":
    run_script(main)
