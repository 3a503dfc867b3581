"""docs/paper.md and its pictures are the code's; no text of a picture covers another."""

import itertools
import re
from pathlib import Path

import pytest
from PIL import Image

from hf_llama_repro.paper import page, pictures
from hf_llama_repro.paper.pictures import DATA_KEY, PICTURES, data_text, drawn

DOCS = Path(__file__).parent.parent / "docs"
AGAIN = "write it again: python -m hf_llama_repro.paper --page docs"


def test_page_is_the_codes():
    assert (DOCS / page.PAGE).read_text(encoding="utf-8") == page.page(), AGAIN


def test_page_shows_every_picture():
    assert set(re.findall(r"\]\((paper-[^)]*png)\)", page.page())) == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_picture_shows_the_codes_data(name):
    with Image.open(DOCS / name) as image:
        assert image.text[DATA_KEY] == data_text(PICTURES[name]), AGAIN


def test_a_changed_figure_would_be_seen(monkeypatch):
    """The negative control of the two tests above."""
    scores = pictures.BENCHMARKS["mmlu"].scores
    monkeypatch.setitem(scores, "LLaMA 65B", (63.5,))
    assert (DOCS / page.PAGE).read_text(encoding="utf-8") != page.page()
    with Image.open(DOCS / "paper-mmlu.png") as image:
        assert image.text[DATA_KEY] != data_text(PICTURES["paper-mmlu.png"])


def boxes(figure):
    """Where each text of a figure lies, in pixels."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    found = {}
    for number, text in enumerate(texts):
        box = text.get_window_extent()
        if box.width and figure.bbox.contains((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) and _drawn(figure, text):
            found[f"{number}: {text.get_text()}"] = box
    return found


def _drawn(figure, text):
    """Ticks outside of the axes' limits exist and are not drawn."""
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        for tick in [*axis.majorTicks, *axis.minorTicks]:
            if text in (tick.label1, tick.label2):
                low, high = sorted(axis.get_view_interval())
                return low <= tick.get_loc() <= high
    return True


def covered(figure):
    return [(one, other) for (one, a), (other, b) in itertools.combinations(boxes(figure).items(), 2) if a.overlaps(b)]


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_covers_another_or_is_cut(name):
    figure = drawn(PICTURES[name])
    assert covered(figure) == []
    width, height = figure.bbox.width, figure.bbox.height
    assert not [
        text for text, box in boxes(figure).items() if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]


def test_a_covered_text_would_be_seen():
    figure = drawn(PICTURES["paper-humaneval.png"])
    figure.axes[0].text(0.5, 0.5, "one", transform=figure.axes[0].transAxes)
    figure.axes[0].text(0.5, 0.505, "two", transform=figure.axes[0].transAxes)
    assert len(covered(figure)) == 1
