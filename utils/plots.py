"""Pictures for the chapters, in one style: a colour-blind-safe palette, thin grids, notebook width.

Functions draw on `ax`, or on a new figure if it is None, and return the Axes. Nothing calls plt.show: the notebook does.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

# Okabe and Ito's palette, without its yellow, which is too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FROZEN, TRAINED = "#C9CED6", COLORS[1]
STYLE = {
    "figure.dpi": 110, "font.size": 9.5, "axes.titlesize": 10.5, "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.7, "lines.markersize": 4,
}  # fmt: skip


def axes(ax=None, width=7.0, height=3.2):
    """A new Axes in the course's style, or the one given."""
    if ax is not None:
        return ax
    plt.rcParams.update(STYLE)
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def panels(count, width=10.0, height=3.2, **options):
    """`count` Axes side by side, in the course's style."""
    plt.rcParams.update(STYLE)
    return plt.subplots(1, count, figsize=(width, height), layout="constrained", **options)[1]


def dress(ax, xlabel="", ylabel="", title="", logx=False, logy=False):
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if logx:
        ax.set_xscale("log")
    if logy:
        ax.set_yscale("log")
    return ax


def lines(series, ax=None, **labels):
    """Lines over x. series: {label: (x, y)}; y may be a list of runs (one per seed), drawn as mean and spread.

    labels: xlabel, ylabel, title, logx, logy
    """
    ax = axes(ax)
    for label, (x, y) in series.items():
        x, y = np.asarray(list(x), float), np.asarray(y, float)
        marker = "o" if len(x) <= 25 else None
        if y.ndim == 1:
            ax.plot(x, y, marker=marker, label=label)
            continue
        (line,) = ax.plot(x, y.mean(0), marker=marker, label=label)
        ax.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.18, linewidth=0)
    if len(series) > 1:
        ax.legend()
    dress(ax, **labels)
    if labels.get("logx") and len(x) <= 12:  # the measured points, not powers of ten
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
    return ax


def bars(series, labels, ax=None, stacked=False, **words):
    """Groups of bars. series: {part: one value, or a list of runs, per label}; runs are drawn as mean and dots.

    stacked: parts on top of one another instead of side by side
    """
    ax = axes(ax)
    x, width, floor = np.arange(len(labels)), 0.8 if stacked else 0.8 / len(series), np.zeros(len(labels))
    for i, (part, values) in enumerate(series.items()):
        means = np.array([np.mean(v) for v in values])
        at = x if stacked else x + (i - (len(series) - 1) / 2) * width
        ax.bar(at, means, width * 0.92, bottom=floor if stacked else None, label=part, alpha=0.85)
        if stacked:
            floor = floor + means
            continue
        for position, runs in zip(at, values, strict=True):
            runs = np.atleast_1d(runs)
            if len(runs) > 1:
                ax.plot([position] * len(runs), runs, "o", color="#333333", markersize=3)
    ax.set_xticks(x, labels)
    ax.grid(axis="x", visible=False)
    if len(series) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return dress(ax, **words)


def heat(matrix, ax=None, rows=None, columns=None, write=False, low=None, high=None, **words):
    """A matrix as a picture. rows, columns: tick labels; write: the values into the cells (format string or True)."""
    ax = axes(ax, width=5.2)
    matrix = np.asarray(matrix, float)
    shown = ax.imshow(matrix, cmap="cividis", aspect="auto", vmin=low, vmax=high, interpolation="nearest")
    ax.grid(visible=False)
    for ticks, names in ((ax.set_xticks, columns), (ax.set_yticks, rows)):
        if names is not None:
            ticks(range(len(names)), names)
    if write:
        form = write if isinstance(write, str) else "{:.2f}"
        middle = np.nanmean([shown.norm.vmin, shown.norm.vmax])
        for (i, j), value in np.ndenumerate(matrix):
            text = "-" if np.isnan(value) else form.format(value)
            ax.text(j, i, text, ha="center", va="center", color="white" if value < middle else "black", fontsize=8)
    return dress(ax, **words)


def lora_picture():
    """LoRA's two ways through a layer: the frozen W, and the narrow door of A and B."""
    ax = axes(None, width=8.2, height=3.9)
    ax.set(xlim=(0, 16.4), ylim=(0, 8))
    ax.axis("off")

    def box(x, y, width, height, color, text, shape, below=False):
        ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="#444444", linewidth=1))
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=14, style="italic")
        ax.text(x + width / 2, y - 0.4 if below else y + height + 0.3, shape, ha="center", va="center", fontsize=9)

    def arrow(start, end):
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.2, color="#444444"))

    box(0.6, 2.6, 0.5, 3.2, "#F2F2F2", "x", r"$d_{in}$ numbers")
    box(4.2, 4.3, 3.2, 3.0, FROZEN, "W", r"$(d_{out}, d_{in})$, frozen")
    box(4.2, 1.2, 3.2, 0.5, TRAINED, "A", r"$(r, d_{in})$, trained, starts random", below=True)
    box(8.3, 1.2, 0.5, 0.5, "#F2F2F2", "", "r numbers")
    box(9.9, 0.7, 0.5, 2.4, TRAINED, "B", r"$(d_{out}, r)$, trained, starts at zero", below=False)
    box(14.9, 2.6, 0.5, 3.2, "#F2F2F2", "y", r"$d_{out}$ numbers")
    ax.add_patch(plt.Circle((13.4, 4.2), 0.42, facecolor="white", edgecolor="#444444"))
    ax.text(13.4, 4.2, "+", ha="center", va="center", fontsize=14)
    ax.text(11.75, 2.15, r"$\times\ \alpha / r$", ha="center", fontsize=11)
    arrow((1.2, 4.6), (4.1, 5.8))
    arrow((1.2, 3.8), (4.1, 1.6))
    arrow((7.5, 1.45), (8.2, 1.45))
    arrow((8.9, 1.45), (9.8, 1.7))
    arrow((7.5, 5.8), (13.0, 4.5))
    arrow((10.5, 1.9), (13.1, 3.85))
    arrow((13.9, 4.2), (14.8, 4.2))
    return ax
