"""Pictures, all in one style. Importing this module sets the style; every function returns its Axes or Figure.

Colours are Okabe and Ito's, which people who see fewer colours can tell apart. One role keeps one colour throughout:
what is frozen is grey, what is trained is orange, data that flows is blue.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
)
FROZEN, TRAINED, DATA, INK = "#D4D7DB", ORANGE, BLUE, "#333333"
MARKERS = "os^Dvp*X"
SIZE = (7.0, 3.2)  # inches: the width of a notebook cell

plt.rcParams.update({
    "figure.figsize": SIZE, "figure.dpi": 110, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.prop_cycle": plt.cycler(color=PALETTE), "axes.edgecolor": INK, "axes.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#E3E3E3", "grid.linewidth": 0.6,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "legend.frameon": False, "lines.linewidth": 1.8,
})


def panels(count=1, height=SIZE[1]):
    """A row of `count` axes side by side, as a list. height in inches."""
    return list(plt.subplots(1, count, figsize=(SIZE[0], height), squeeze=False)[1][0])


def lines(data, *, ax=None, xlabel="", ylabel="", title="", logx=False, logy=False, points=True):
    """Curves. data: {label: (x, y)}; y is (points,), or (seeds, points): their mean, their spread as a band, and dots.

    Few points also get a marker, which tells curves apart without their colour. Returns the Axes.
    """
    ax = ax or panels()[0]
    for i, (label, (x, y)) in enumerate(data.items()):
        y = np.atleast_2d(np.asarray(y, dtype=float))
        color, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)] if points and len(x) <= 20 else ""
        ax.plot(x, y.mean(0), color=color, marker=marker, markersize=5, label=label)
        if len(y) > 1:
            ax.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
            if marker:
                ax.plot(x, y.T, ".", color=color, alpha=0.5, markersize=4)
    if logx:
        ax.set_xscale("log", base=2 if _powers_of_two(data) else 10)
        if _powers_of_two(data):
            ax.xaxis.set_major_formatter("{x:g}")
    if logy:
        ax.set_yscale("log")
    return _finish(ax, xlabel, ylabel, title, legend=len(data) > 1)


def bars(data, *, ax=None, xlabel="", title="", log=False, fmt="{:.3g}"):
    """Horizontal bars, each with its number. data: {label: value}, or {label: values over seeds}: mean, and a dot each.

    Returns the Axes.
    """
    height = 0.9 + 0.34 * len(data)
    ax = ax or panels(height=height)[0]
    for i, (label, value) in enumerate(data.items()):
        values = np.atleast_1d(np.asarray(value, dtype=float))
        ax.barh(label, values.mean(), color=PALETTE[i % len(PALETTE)], height=0.65)
        if len(values) > 1:
            ax.plot(values, [label] * len(values), "o", color="white", markeredgecolor=INK, markersize=4)
        ax.annotate(fmt.format(values.mean()), (values.max(), i), (5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    if log:
        ax.set_xscale("log")
    ax.margins(x=0.12)
    return _finish(ax, xlabel, "", title)


def stacked(data, *, ax=None, xlabel="", title="", fmt="{:.3g}"):
    """Horizontal bars in parts, each with its total. data: {label: {part: value}}. Returns the Axes."""
    ax = ax or panels(height=1.2 + 0.34 * len(data))[0]
    names = list(dict.fromkeys(part for parts in data.values() for part in parts))
    for i, (label, parts) in enumerate(data.items()):
        left = 0.0
        for part, value in parts.items():
            ax.barh(label, value, left=left, color=PALETTE[names.index(part) % len(PALETTE)], height=0.65)
            left += value
        ax.annotate(fmt.format(left), (left, i), (5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.12)
    keys = [Rectangle((0, 0), 1, 1, color=PALETTE[i % len(PALETTE)]) for i in range(len(names))]
    ax.figure.legend(keys, names, loc="outside lower center", ncols=min(len(names), 4))
    return _finish(ax, xlabel, "", title)


def heat(matrix, *, ax=None, xlabel="", ylabel="", title="", notes=None, blocks=(), signed=False, bar=True):
    """A matrix as a picture, rows downward. matrix: (rows, columns) of numbers, or of booleans: trained or not.

    notes: text per entry (a nested list), or a format such as "{:.1f}"; blocks: (row, column, rows, columns, text) of
    parts to frame and name; signed: colours diverge from zero; bar: draw the colour scale. Returns the Axes.
    """
    matrix, yes_no = np.asarray(matrix, dtype=float), np.asarray(matrix).dtype == bool
    ax = ax or panels()[0]
    limit = np.abs(matrix).max() or 1.0
    scale = {"cmap": "Blues", "vmin": min(0, matrix.min())}
    if yes_no:
        scale = {"cmap": ListedColormap([FROZEN, TRAINED]), "vmin": 0, "vmax": 1}
    if signed:
        scale = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit}
    rows, columns = matrix.shape
    aspect = "equal" if 1 / 3 <= rows / columns <= 3 else "auto"  # square entries, unless the picture were a thread
    image = ax.imshow(matrix, aspect=aspect, interpolation="nearest", **scale)
    if notes is not None:
        for (i, j), value in np.ndenumerate(matrix):
            text = notes.format(value) if isinstance(notes, str) else notes[i][j]
            dark = sum(image.cmap(image.norm(value))[:3]) < 1.5
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
    for row, column, rows, columns, text in blocks:
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), columns, rows, fill=False, edgecolor=INK, linewidth=1.5))
        middle = (column + columns / 2 - 0.5, row + rows / 2 - 0.5)
        paper = {"facecolor": "white", "edgecolor": "none"}
        ax.text(*middle, text, ha="center", va="center", weight="bold", bbox=paper)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    if bar and not yes_no:
        ax.figure.colorbar(image, ax=ax, shrink=0.85)
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    return _finish(ax, xlabel, ylabel, title)


def spectrum(values, *, ax=None, rank=None, title="", ylabel="singular value / largest"):
    """Singular values, each curve divided by its largest. values: {label: (k,)}; rank: draw a line there.

    Returns the Axes.
    """
    shares = {label: np.sort(np.asarray(v, dtype=float))[::-1] for label, v in values.items()}
    curves = {label: (np.arange(1, len(v) + 1), v / v[0]) for label, v in shares.items()}
    ax = lines(curves, ax=ax, xlabel="number, from the largest", ylabel=ylabel, title=title, logy=True)
    if rank is not None:
        ax.axvline(rank + 0.5, color=INK, linewidth=1, linestyle="--")
        ax.annotate(f"rank {rank}", (rank + 0.5, 1), (4, 0), textcoords="offset points", va="top",
                    xycoords=("data", "axes fraction"))
    return ax


def timeline(line, phases, *, ax=None, predicted=None, title=""):
    """Live bytes over a step, in MB, one point per operation. line: bytes after each   phases: {name: where it ends}

    predicted: {moment: (where, bytes)}, drawn as marks over the line. Returns the Axes.
    """
    ax = ax or panels()[0]
    ax.fill_between(range(len(line)), np.asarray(line) / 1e6, color=DATA, alpha=0.25, linewidth=0)
    ax.plot(np.asarray(line) / 1e6, color=DATA, linewidth=1.2)
    top, start = 1.12 * max([*line, *(size for _, size in (predicted or {}).values())]) / 1e6, 0
    for name, end in phases.items():
        ax.axvline(end, color=INK, linewidth=0.8, linestyle="--")
        ax.text((start + end) / 2, 1, name, ha="center", va="bottom", fontsize=8, transform=ax.get_xaxis_transform())
        start = end
    for (name, (where, size)), marker in zip((predicted or {}).items(), MARKERS, strict=False):
        ax.plot(where, size / 1e6, marker, color=TRAINED, markeredgecolor=INK, label=name)
    ax.set(xlim=(0, len(line)), ylim=(0, top))
    _finish(ax, "operations", "MB", title)
    ax.set_title(title, pad=16)
    return ax


def lora_picture(d_in=4096, d_out=4096, r=8):
    """The mechanism of LoRA: the wide frozen way through W, and the narrow trained way through A and B."""
    figure, ax = plt.subplots(figsize=(7, 3.6))
    ax.set(xlim=(0, 14), ylim=(-0.35, 7.2), aspect="equal")
    ax.axis("off")
    name = {"ha": "center", "va": "center"}
    small = {**name, "fontsize": 8.5}

    def column(x, low, high, color, **options):
        ax.add_patch(Rectangle((x - 0.14, low), 0.28, high - low, facecolor=color, edgecolor="none", **options))

    def arrow(start, end):
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.2,
                                     shrinkA=0, shrinkB=0))

    column(0.9, 2.2, 5.0, DATA)
    ax.text(0.9, 5.35, "x", **name, fontsize=13, style="italic")
    ax.text(0.9, 1.85, f"{d_in:,}", **small)

    ax.add_patch(Rectangle((4.4, 3.75), 3.2, 3.2, facecolor=FROZEN, edgecolor="none"))
    ax.text(6.0, 5.6, "W", **name, fontsize=20)
    ax.text(6.0, 4.75, "frozen", **small)
    ax.text(6.0, 4.3, f"{d_out:,} × {d_in:,}", **small)

    low, high, thin = 0.55, 3.05, 0.09  # the lower way: as high as the data is wide
    middle = (low + high) / 2
    ax.add_patch(Polygon([(3.0, low), (3.0, high), (5.5, middle + thin), (5.5, middle - thin)], facecolor=TRAINED))
    ax.add_patch(Polygon([(6.5, middle + thin), (6.5, middle - thin), (9.0, low), (9.0, high)], facecolor=TRAINED))
    ax.text(3.85, middle, "A", **name, fontsize=16)
    ax.text(8.15, middle, "B", **name, fontsize=16)
    ax.text(3.6, low - 0.45, f"{r} × {d_in:,}\nrandom at first", **small)
    ax.text(8.4, low - 0.45, f"{d_out:,} × {r}\nzero at first", **small)
    ax.add_patch(Rectangle((5.5, middle - thin), 1.0, 2 * thin, facecolor=DATA, edgecolor="none"))
    ax.text(6.0, middle - 0.42, f"{r}", **small)
    ax.text(6.0, low - 0.45, "trained", **small)

    for x, y, text in ((10.4, middle, "s"), (11.6, 5.35, "+")):
        ax.add_patch(Circle((x, y), 0.38, facecolor="white", edgecolor=INK, linewidth=1.2))
        ax.text(x, y, text, **name, fontsize=12)
    ax.text(10.4, middle - 0.75, r"$\alpha / r$", **name, fontsize=10)

    column(13.1, 3.95, 6.75, DATA)
    ax.text(13.1, 7.05, "y", **name, fontsize=13, style="italic")
    ax.text(13.1, 3.6, f"{d_out:,}", **small)
    arrow((1.2, 4.2), (4.3, 5.35))
    arrow((1.2, 3.0), (2.9, middle))
    arrow((7.7, 5.35), (11.22, 5.35))
    arrow((9.1, middle), (10.02, middle))
    arrow((10.62, middle + 0.33), (11.4, 4.98))
    arrow((11.98, 5.35), (12.86, 5.35))
    return figure


def _finish(ax, xlabel, ylabel, title, legend=False):
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if legend:
        ax.legend()
    return ax


def _powers_of_two(data):
    """Whether every x is a power of two, as ranks are: then an axis marked in powers of two reads best."""
    return all(x > 0 and math.log2(x).is_integer() for xs, _ in data.values() for x in xs)
