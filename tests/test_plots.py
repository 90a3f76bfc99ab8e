"""The pictures: what they draw, not how it looks."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from utils import plots  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts(thing):
    return [t.get_text() for t in thing.findobj(matplotlib.text.Text) if t.get_text()]


def test_lines_draw_the_mean_and_the_spread():
    ax = plots.lines({"a": ([1, 2, 4], [[1, 2, 3], [3, 2, 1]]), "b": ([1, 2, 4], [5, 5, 5])}, xlabel="rank",
                     ylabel="loss", title="A title", logx=True)
    assert ax.lines[0].get_ydata().tolist() == [2, 2, 2] and ax.lines[-1].get_ydata().tolist() == [5, 5, 5]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 3) and len(ax.collections) == 1
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("rank", "loss", "A title")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.get_xscale() == "log" and ax.get_xticks()[1] / ax.get_xticks()[0] == 2


def test_long_curves_have_no_markers_and_one_curve_no_legend():
    ax = plots.lines({"a": (range(100), range(100))}, logy=True)
    assert ax.lines[0].get_marker() in ("", "None") and ax.get_legend() is None and ax.get_yscale() == "log"


def test_bars_print_their_numbers():
    ax = plots.bars({"LoRA": [0.5, 0.7], "base": 0.25}, xlabel="accuracy", log=True)
    assert [p.get_width() for p in ax.patches] == pytest.approx([0.6, 0.25])
    assert {"0.6", "0.25"} <= set(texts(ax)) and ax.get_xscale() == "log"
    assert ax.lines[0].get_xdata().tolist() == [0.5, 0.7]


def test_stacked_adds_the_parts_up():
    ax = plots.stacked({"full": {"weights": 2, "moments": 4}, "LoRA": {"weights": 2, "inputs": 1}}, xlabel="MB")
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(0, 2), (2, 4), (0, 2), (2, 1)]
    assert ax.patches[0].get_facecolor() == ax.patches[2].get_facecolor() != ax.patches[3].get_facecolor()
    assert {"6", "3"} <= set(texts(ax)) and {"weights", "moments", "inputs"} <= set(texts(ax.figure))


def test_heat_writes_entries_and_frames_blocks():
    ax = plots.heat(np.eye(2), notes="{:.0f}", blocks=[(0, 1, 2, 1, "k")], signed=True)
    assert ax.images[0].get_clim() == (-1, 1)
    assert sorted(t.get_text() for t in ax.texts) == ["0", "0", "1", "1", "k"]
    assert ax.patches[0].get_bbox().bounds == (0.5, -0.5, 1, 2)
    assert [t.get_text() for t in plots.heat([[1, 2]], notes=[["a", "b"]]).texts] == ["a", "b"]


def test_heat_of_booleans_shows_trained_and_frozen():
    ax = plots.heat([[True, False]])
    colors = [matplotlib.colors.to_hex(c) for c in ax.images[0].cmap([1.0, 0.0])]
    assert colors == [plots.TRAINED.lower(), plots.FROZEN.lower()] and len(ax.figure.axes) == 1


def test_spectrum_is_sorted_and_relative():
    ax = plots.spectrum({"full": [1.0, 4.0, 2.0]}, rank=2)
    assert ax.lines[0].get_ydata().tolist() == [1, 0.5, 0.25]
    assert ax.lines[1].get_xdata()[0] == 2.5 and "rank 2" in texts(ax)


def test_lora_picture_names_every_shape():
    shown = " ".join(texts(plots.lora_picture(d_in=512, d_out=1024, r=4)))
    for text in ("W", "A", "B", "4 × 512", "1,024 × 4", "1,024 × 512", "frozen", "trained"):
        assert text in shown


def test_pictures_fit_together_in_one_figure():
    left, right = plots.panels(2)
    assert plots.lines({"a": ([1], [1])}, ax=left) is left and plots.heat([[1]], ax=right) is right
    left.figure.canvas.draw()
    assert tuple(left.figure.get_size_inches()) == plots.SIZE


def test_palette_is_distinct():
    assert len(set(plots.PALETTE)) == len(plots.PALETTE) == len(plots.MARKERS) == 8


def test_a_timeline_shows_phases_and_predictions():
    line = [1e6, 3e6, 2e6, 1e6]
    ax = plots.timeline(line, {"forward": 2, "backward": 4}, predicted={"loss": (1, 4e6)}, title="A step")
    assert ax.lines[0].get_ydata().tolist() == [1, 3, 2, 1]
    assert ax.lines[-1].get_label() == "loss" and ax.lines[-1].get_ydata()[0] == 4 < ax.get_ylim()[1]
    assert {"forward", "backward", "A step", "MB"} <= set(texts(ax))
