"""What a run keeps to say later that an image is unlike all that it was trained on: known.npz."""

import numpy as np

import data
from console import StopSignals
from dataset.layouts import Examples
from files import replace_file
from reports.neighbours import nearest, strangeness, unit_length
from run import Run

MOST_REFERENCES = 20_000  # training rows that are kept: 20 MB of 512 numbers each
NEIGHBOUR = 10  # whose distance is the score
BATCH_SIZE = 256


def write_known(
    run: Run, train: Examples, train_load: data.Load, views: int, val: Examples, val_load: data.Load, stop: StopSignals
) -> None:
    """Writes the training features and how unlike them held-out known images are.

    The loaders give averaged activations, [B, 1, 1, C]: all views of `train`, the central one of `val`. known.npz has
    `references` float16 [M, C] of length 1, `spreads` float32 [M], the distance of each to its `neighbour`-th nearest,
    and `held_out` float32 [N], `reports.neighbours.strangeness` of each validation image.
    """
    rows = [_rows(train_load, len(train), view, stop) for view in range(views)]
    references = unit_length(np.concatenate(rows)).astype(np.float16)
    if len(references) > MOST_REFERENCES:
        references = references[np.linspace(0, len(references) - 1, MOST_REFERENCES).astype(np.int64)]
    spreads = nearest(references, references, NEIGHBOUR, skip_self=True, each=lambda _: stop.check())[0]
    held_out = strangeness(_rows(val_load, len(val), data.CENTRAL_VIEW, stop), references, spreads, NEIGHBOUR)
    with replace_file(run.path / "known.npz") as aside, open(aside, "wb") as file:
        np.savez(file, references=references, spreads=spreads, held_out=held_out, neighbour=np.int64(NEIGHBOUR))


def _rows(load: data.Load, count: int, view: int, stop: StopSignals) -> np.ndarray:
    parts = []
    for x, *_ in data.ordered_batches(load, np.zeros(count, np.int64), BATCH_SIZE, view):
        parts.append(x.numpy().reshape(len(x), -1))
        stop.check()
    return np.concatenate(parts)
