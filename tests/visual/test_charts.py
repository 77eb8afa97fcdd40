import io
import itertools
import math

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from parchgrad.errors import InputError
from parchgrad.visual import panel
from parchgrad.visual.charts import (
    DARK,
    LIGHT,
    Curve,
    Interval,
    curve_chart,
    histogram_chart,
    interval_chart,
    scatter_chart,
)

LONG = "integrated gradients with Instance-wise, quantile 0.05, upper 0.3 of the layers, conserve independent"


def drawn(figure):
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=100)
    return np.asarray(Image.open(held).convert("RGBA"))


def test_curves_keep_their_values_colours_and_dashes():
    curves = [
        Curve(label="a", x=[0.1, 0.5], y=[0.2, math.nan]),
        Curve(label="", x=[0.1, 0.5], y=[0.3, 0.4], colour=8, dashed=True),
    ]
    figure = curve_chart(curves, x_label="share", y_label="drop", theme=DARK)
    first, second = figure.axes[0].lines
    np.testing.assert_array_equal(first.get_ydata(), [0.2, math.nan])
    assert second.get_linestyle() == "--"
    assert (first.get_color(), second.get_color()) == (DARK.lines[0], DARK.lines[1])
    assert first.get_marker() != second.get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]


def test_numbers_and_names_share_an_axis():
    figure = curve_chart([Curve(label="", x=[0.5, "all"], y=[1.0, 2.0])], x_label="layers", y_label="score")
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.5", "all"]
    assert not figure.legends


def test_intervals_stand_in_order_in_the_colour_of_their_verdict():
    intervals = [
        Interval(label="up", middle=0.2, low=0.1, high=0.3, verdict="better"),
        Interval(label="down", middle=-0.2, low=-0.3, high=-0.1, verdict="worse"),
        Interval(label="nothing", middle=0.0, low=-0.1, high=0.1, verdict="open"),
    ]
    axes = interval_chart(intervals, x_label="difference", theme=LIGHT).axes[0]
    lines = axes.lines
    assert [text.get_text() for text in axes.texts] == ["up", "down", "nothing"]
    for place, found in enumerate(intervals):
        bar, middle = lines[2 * place : 2 * place + 2]
        assert list(bar.get_xdata()) == [found.low, found.high]
        assert list(middle.get_xdata()) == [found.middle]
        assert list(bar.get_ydata()) == [place, place]
        assert bar.get_color() == {"better": LIGHT.good, "worse": LIGHT.bad, "open": LIGHT.open}[found.verdict]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first stands on top"


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_nothing_touches_the_edge_and_the_paper_is_transparent(theme):
    labels = [f"integrated gradients, energy {number}, all layers" for number in range(9)]
    for figure in (
        curve_chart([Curve(label=name, x=[0, 1], y=[0, 1]) for name in labels], x_label="x", y_label="y", theme=theme),
        scatter_chart(dict.fromkeys(labels, (1.0, 2.0)), x_label="x", y_label="y", theme=theme),
        interval_chart(
            [Interval(label=name, middle=0, low=-1, high=1, verdict="open") for name in labels],
            x_label="difference",
            theme=theme,
        ),
    ):
        opacity = drawn(figure)[..., 3]
        edge = np.concatenate((opacity[0], opacity[-1], opacity[:, 0], opacity[:, -1]))
        assert not edge.any()
        assert opacity.max() == 255


def test_the_text_of_a_chart_on_a_phone_is_at_least_eleven_pixels_high():
    labels = [f"random channels, as Gradient energy, quantile 0.{number}" for number in range(9)]
    labels.append(
        "integrated gradients with Instance-wise, quantile 0.05, upper 0.3 of the layers, conserve independent"
    )
    for figure in (
        curve_chart([Curve(label=name, x=[0, 1], y=[0, 1]) for name in labels], x_label="share", y_label="drop"),
        interval_chart(
            [Interval(label=name, middle=-0.05, low=-0.18, high=0, verdict="open") for name in labels],
            x_label="difference",
        ),
    ):
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        # A page that is 420 pixels wide has a margin of 16 on both sides.
        pixels_per_point = (420 - 2 * 16) / (72 * figure.get_figwidth())
        assert min(text.get_fontsize() for text in texts) * pixels_per_point >= 11
        ticks = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
        visible = [box for box in ticks if box.x1 > figure.axes[0].bbox.x0 and box.x0 < figure.axes[0].bbox.x1]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(visible))
        widest = max(text.get_window_extent().x1 for text in texts)
        assert widest <= figure.bbox.x1
        shown = {" ".join(text.get_text().split()) for text in texts}
        assert shown >= set(labels)


def test_a_label_of_several_lines_stays_clear_of_the_interval_above():
    intervals = [Interval(label=LONG, middle=0, low=-1, high=1, verdict="open") for _ in range(4)]
    figure = interval_chart(intervals, x_label="difference")
    figure.canvas.draw()
    (axes,) = figure.axes
    for text, bar in zip(axes.texts[1:], axes.lines[::2], strict=False):
        assert text.get_text().count("\n") == 1
        assert text.get_window_extent().y1 < bar.get_window_extent().y0


def test_charts_of_nothing_are_refused():
    for draw in (
        lambda: curve_chart([], x_label="", y_label=""),
        lambda: interval_chart([], x_label=""),
        lambda: scatter_chart({}, x_label="", y_label=""),
    ):
        with pytest.raises(InputError, match=r"is empty. Pass at least one"):
            draw()


# Half a formula between dollars, and what steers a terminal.
ODD = "between $x_{$ and \x1b[31m"


@pytest.mark.parametrize(
    "draw",
    [
        lambda name: curve_chart([Curve(label=name, x=[name, 1.0], y=[0, 1])], x_label="share", y_label="drop"),
        lambda name: histogram_chart({name: [1.0, 2.0], "rest": [0.0]}, x_label="GAP", y_label="share", title=name),
        lambda name: interval_chart(
            [Interval(label=name, middle=0.2, low=0.1, high=0.3, verdict="better")], x_label="difference"
        ),
        lambda name: scatter_chart({name: (1.0, 2.0)}, x_label="cost", y_label="quality"),
        lambda name: panel([np.zeros((8, 8, 3))], {name: [np.ones((8, 8))]}, labels=[name]),
    ],
)
def test_names_are_drawn_as_they_are_written(draw):
    figure = draw(ODD)
    # Letters that no font has would be warned of.
    assert drawn(figure).any()
    # Matplotlib takes an escaped dollar for one.
    assert any(r"between \$x_{\$ and  [31m" in text.get_text() for text in figure.findobj(Text))
