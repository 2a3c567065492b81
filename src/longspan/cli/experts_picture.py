"""The picture of ``longspan experts --png``: a panel for each layer, the load of every expert over the steps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from longspan.cli.layout_picture import LOOK
from longspan.files import write_whole

#: panels beside each other
COLUMNS = 4


def draw(steps: list[int], numbers: list[int], loads: list[list[list[float]]], path: Path) -> None:
    """Writes the picture, whole or not at all.

    Args:
        numbers: of the layers.
        loads: the share of each expert, [step][layer][expert].
    """
    shares = np.array(loads).transpose(1, 2, 0)  # [layers, experts, steps]
    shares = shares * shares.shape[1]
    layers = len(shares)
    rows = -(-layers // COLUMNS)
    with style.context(["default", LOOK]):
        figure = Figure(figsize=(3.2 * min(layers, COLUMNS) + 0.8, 2.2 * rows + 0.8), layout="constrained")
        panels = figure.subplots(rows, min(layers, COLUMNS), squeeze=False).flatten()
        for number, panel, share in zip(numbers, panels, shares):
            image = panel.imshow(
                share,
                aspect="auto",
                cmap="RdBu_r",
                vmin=0,
                vmax=2,
                extent=(steps[0], steps[-1] + 1, len(share) - 0.5, -0.5),
                interpolation="nearest",
            )
            panel.set_title(f"layer {number}: busiest {share[:, -1].max():.2f} x")
            panel.set_xlabel("step")
            panel.set_ylabel("expert")
        for panel in panels[layers:]:
            panel.set_axis_off()
        figure.colorbar(image, ax=panels.tolist(), label="load; 1 is an even one", extend="max")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
    write_whole(path, picture.getvalue())
