"""The card's two pictures, drawn as they are for every run; the runs of other tests share one drawing."""
# ruff: noqa: F811 - a fixture that is imported is named again as an argument

from io import BytesIO

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tests.plotted import record, report  # noqa: F401 - two fixtures
from tests.reported import typed
from tmerge.plots.stills import coupling_still, scores_still


def png(figure):
    with BytesIO() as file:
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
        return file.getvalue()


@pytest.mark.parametrize("which", ["scores", "coupling"])
def test_a_still_is_a_picture_on_white_and_the_same_each_time(report, record, which):
    def draw():
        return png(scores_still(typed(report)) if which == "scores" else coupling_still(record))

    first = draw()
    pixels = np.asarray(Image.open(BytesIO(first)).convert("RGB"))
    assert pixels.shape[0] > 200 and pixels.shape[1] > 600
    assert (pixels[0, 0] == 255).all() and (pixels < 200).any()
    assert draw() == first


def test_the_stills_show_every_row_and_every_projection(report, record):
    scores, coupling = scores_still(typed(report)).axes[0], coupling_still(record)
    assert [label.get_text() for label in scores.get_yticklabels()][0] == "fused"
    assert [axes.get_title() for axes in coupling.axes if axes.get_title()] == record.projections
