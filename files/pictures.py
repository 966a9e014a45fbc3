"""Pictures, drawn from plain values with matplotlib: the loss curve of a run, and the padding of an epoch's batches."""

import numpy as np

from files.disk import atomic

# What a cell of a picture of batches shows: nothing, a recipe, the next recipe of the row, padding.
NOTHING, RECIPE, NEIGHBOUR, PADDED = range(4)
COLOURS = ["white", "C0", "lightskyblue", "C3"]


def curve(path, history):
    """Draw the training loss and the held-out loss over the steps. history: the lines of metrics.jsonl, as dicts"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    draw_line(axes, history, "loss", color="0.7", label="training (lengths differ)")
    draw_line(axes, history, "val_loss", color="tab:red", label="held out", marker="o")
    axes.set(xlabel="step", ylabel="loss per target token (nats)")
    axes.legend()
    with atomic(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def draw_line(axes, history, key, color, label, marker=""):
    """Draw history[…][key] at the steps that have this key."""
    lines = [line for line in history if line.get(key) is not None]
    if lines:
        steps = [line["step"] for line in lines]
        values = [line[key] for line in lines]
        axes.plot(steps, values, color=color, marker=marker, lw=1, label=label)


def padding(path, panels, lengths, max_len, dropped):
    """Draw up to three panels of batches, padding in red, and a histogram of the lengths of all recipes.

    panels: [(title, rows)]. A row is (lengths of its recipes, its width), in tokens: ([5, 2], 8) has 1 of padding."""
    from matplotlib import colors
    from matplotlib.figure import Figure

    palette = colors.to_rgba_array(COLOURS)
    figure = Figure(figsize=(11, 8), layout="constrained")
    *places, last = figure.subplots(2, 2).flat
    for axes, (title, rows) in zip(places, panels, strict=False):
        cells = cells_of(rows)  # [rows, tokens]
        axes.imshow(palette[cells], aspect="auto", interpolation="nearest")
        axes.set(title=title, xlabel="tokens", ylabel="rows")
    last.hist(lengths.clip(max=2 * max_len), bins=100, color="tab:blue")
    last.axvline(max_len, color="tab:red", label=f"max_len: {dropped} dropped")
    last.set(title="lengths", xlabel="tokens", ylabel="recipes")
    last.legend()
    figure.savefig(path, dpi=120)


def cells_of(rows):
    """What each cell of a picture of batches shows, [rows, tokens]: recipes in two colours by turns, then padding.

    The row ([2, 1, 2], 6) becomes recipe recipe neighbour recipe recipe padding."""
    widest = max(width for _, width in rows)
    cells = np.full((len(rows), widest), NOTHING)
    for row, (lengths, width) in zip(cells, rows, strict=True):
        row[:width] = PADDED
        by_turns = np.where(np.arange(len(lengths)) % 2, NEIGHBOUR, RECIPE)
        recipes = np.repeat(by_turns, lengths)[:width]
        row[: len(recipes)] = recipes
    return cells
