"""Pictures, drawn from plain values with matplotlib: the loss curve of a run, and the padding of an epoch's batches."""

import numpy as np

from files.disk import atomic

# Of a cell in a picture of batches: nothing, a recipe, its neighbour, padding.
NOTHING, RECIPE, NEIGHBOUR, PADDED = range(4)
COLOURS = ["white", "C0", "lightskyblue", "C3"]


def curve(path, history):
    """The losses in the lines of metrics.jsonl, over the steps."""
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
    """One value of the history, at the steps that have it."""
    lines = [line for line in history if line.get(key) is not None]
    if lines:
        steps = [line["step"] for line in lines]
        values = [line[key] for line in lines]
        axes.plot(steps, values, color=color, marker=marker, lw=1, label=label)


def padding(path, panels, lengths, max_len, dropped):
    """Batches in up to three ways, padding in red; and the lengths of all recipes.

    panels: [(title, rows)], and of each row (lengths of the recipes in it, its width) in tokens."""
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
    """What each cell of a picture of batches shows: recipes end to end, in two colours by turns, then padding."""
    widest = max(width for _, width in rows)
    cells = np.full((len(rows), widest), NOTHING)
    for row, (lengths, width) in zip(cells, rows, strict=True):
        row[:width] = PADDED
        by_turns = np.where(np.arange(len(lengths)) % 2, NEIGHBOUR, RECIPE)
        recipes = np.repeat(by_turns, lengths)[:width]
        row[: len(recipes)] = recipes
    return cells
