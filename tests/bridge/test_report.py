"""The report: what it says, and in headless Chromium how it looks: narrow, readable, without network."""

import base64
import io
import json
import math
from html.parser import HTMLParser

import pytest
import torch

from bridge import report
from bridge.diagnostics import Diagnostics
from bridge.job import Example, Job
from bridge.run import Explained, Ranked, Settings, Solved
from lissa import Status
from tests.bridge import chromium

NASTY = "<script>document.title = 'run'</script> & 'quotes' \"here\" " + "longword" * 30 + "\nsecond line \u05e9\u05dc"


def solved(found, residuals=(1e-3, 3e-3, 0.4), cosines=(0.5, 0.999999, 0.2)):
    count = len(residuals)
    return Solved(
        found,
        Diagnostics(
            solver="cg", damping=0.01, scale=math.nan, steps=12, num_samples=1, examples=40, batch_size=40,
            status=torch.full((count,), int(Status.CONVERGED)), relative_residual=torch.tensor(residuals),
            cosine_with_gradient=torch.tensor(cosines), correlation_with_plain=torch.full((count,), math.nan),
            largest_eigenvalue=3.0,
        ),
    )  # fmt: skip


def job():
    return Job(torch.nn.Linear(2, 2), list(range(40)), [0], lambda role, i, x: Example(i, "a"), place="line")


def ranked(score, text=NASTY, image=None):
    return Ranked(Example(12345, "a_label_without_any_break_in_it_that_goes_on", text, image), 0.123, score)


def explained():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 8, 8, generator=generator)
    helpful = [ranked(12.5), ranked(3.0, "short"), ranked(1e-7, "", image)]
    harmful = [ranked(-8.0), ranked(-0.5, "word " * 400)]
    return [
        Explained(Example(3, "good", "A fine film."), "bad", 1.25, helpful, harmful),
        Explained(Example(4, "7", "", torch.rand(8, 8, generator=generator)), "7", 0.01, helpful[::-1], []),
    ]


@pytest.fixture
def page(tmp_path):
    found = solved(explained())
    settings = report.repeatable("simple-influence run --model 'a dir' --out x", job(), Settings(), found.diagnostics)
    return report.write(tmp_path / "report.html", job(), found, settings)


class Addresses(HTMLParser):
    """Every attribute that may load something, and the elements there are."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_nothing_is_loaded_and_texts_stay_texts(page):
    parser = Addresses()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.found
    assert all(address.startswith("data:image/png;base64,") for address in parser.found)
    assert "script" not in parser.tags
    assert "link" not in parser.tags
    assert "url(" not in page.read_text(encoding="utf-8")


def test_the_page_says_what_was_found(page):
    text = page.read_text(encoding="utf-8")
    for expected in ("A fine film.", "taken for", "(wrong)", "+12.5", "\N{MINUS SIGN}8", "word word", "With care"):
        assert expected in text
    assert "Test line 3" in text
    assert text.count(" ...") == 1  # the one long text is cut
    assert "longword" * 30 in text


def test_the_best_solves_are_not_distrusted(tmp_path):
    found = solved(explained(), residuals=(1e-3,), cosines=(0.5,))
    settings = report.repeatable("x", job(), Settings(), found.diagnostics)
    text = report.write(tmp_path / "report.html", job(), found, settings).read_text(encoding="utf-8")
    assert "No reason was found" in text
    assert "With care" not in text


def test_self_influence_shows_as_many_as_asked_for(tmp_path):
    found = solved([ranked(float(score), f"text {score}") for score in range(9, 0, -1)])
    settings = report.repeatable("x", job(), Settings(), found.diagnostics)
    text = report.write_self(tmp_path / "r.html", job(), found, settings, most=4).read_text(encoding="utf-8")
    assert "text 6" in text
    assert "text 5" not in text


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_png_keeps_the_pixels(shape, dtype):
    image_module = pytest.importorskip("PIL.Image")
    pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = pixels if dtype == torch.uint8 else pixels / 255
    data = base64.b64decode(report.png(given).removeprefix("data:image/png;base64,"))
    read = image_module.open(io.BytesIO(data))
    assert read.size == (6, 4)
    expected = pixels if pixels.ndim == 2 else pixels[0] if shape[0] == 1 else pixels.permute(1, 2, 0)
    assert list(read.tobytes()) == expected.flatten().tolist()


def test_png_refuses_what_is_no_image():
    with pytest.raises(ValueError, match=r"must have shape \(h, w\)"):
        report.png(torch.zeros(2, 3, 4))


def test_plots_put_bad_solves_on_the_bad_side():
    residuals, cosines = report.plots(solved([]).diagnostics)
    assert [dot.x > residuals.threshold for dot in residuals.dots] == [False, False, True]
    assert [dot.x < cosines.threshold for dot in cosines.dots] == [False, True, False]
    assert report.plots(solved([], residuals=(math.nan,), cosines=(0.5,)).diagnostics)[0].title.startswith("Cosine")


# ---------------------------------------------------------------------- in a browser

in_chromium = pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs Chromium: apt-get install chromium")

OVERFLOW = """
const right = view.innerWidth;
const out = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > right + 0.5);
return {width: right, scroll: page.documentElement.scrollWidth, beyond: out.map(e => e.outerHTML.slice(0, 120)),
  title: page.title, loaded: view.performance.getEntriesByType("resource").map(e => e.name),
  columns: view.getComputedStyle(page.querySelector(".sides")).gridTemplateColumns.split(" ").length,
  bars: [...page.querySelectorAll(".bar")].map(e => e.getBoundingClientRect().width)};
"""

CONTRAST = """
const rgb = s => (s.match(/[\\d.]+/g) || []).map(Number);
const light = c => { const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(view.getComputedStyle(e).backgroundColor);
  if (c.length == 3 || c[3] > 0) return c; } return [255, 255, 255]; };
const words = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), found = [];
while (words.nextNode()) { const e = words.currentNode.parentElement, text = words.currentNode.data.trim();
  if (!text || e.closest("title")) continue;
  const style = view.getComputedStyle(e), svg = e.closest("svg");
  const colour = rgb(svg ? style.fill : style.color);
  const fills = svg ? [...svg.querySelectorAll("rect")].map(r => rgb(view.getComputedStyle(r).fill)) : [];
  const grounds = svg ? [[255, 255, 255], ...fills] : [behind(e)];
  found.push([Math.min(...grounds.map(g => ratio(colour, g))), text.slice(0, 30), parseFloat(style.fontSize)]); }
const edge = e => rgb(view.getComputedStyle(e).borderTopColor);
const bars = [...page.querySelectorAll(".bar")].map(e => ratio(edge(e), behind(e.parentElement)));
return {texts: found, bars: bars};
"""


@in_chromium
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (320, 1), (1200, 2)])
def test_nothing_sticks_out_and_nothing_is_requested(page, tmp_path, width, columns):
    found, requests = chromium.run(page, OVERFLOW, width, tmp_path)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["beyond"] == []
    assert found["columns"] == columns
    assert max(found["bars"]) > 0.2 * width / columns
    assert [name for name in found["loaded"] if not name.startswith("data:")] == []
    assert requests == set()
    assert found["title"].startswith("Which training examples")  # the text's script did not run


@in_chromium
def test_a_request_would_be_seen(tmp_path):
    other = tmp_path / "other.html"
    other.write_text('<body><div class="sides"></div><img src="http://example.invalid/x.png"></body>', encoding="utf-8")
    _, requests = chromium.run(other, OVERFLOW, 390, tmp_path)
    assert requests == {"http://example.invalid/x.png"}


@in_chromium
def test_colours_are_far_enough_apart(page, tmp_path):
    found, _ = chromium.run(page, CONTRAST, 390, tmp_path)
    assert len(found["texts"]) > 20
    # Web Content Accessibility Guidelines 2.1: 4.5 for text (1.4.3), 3 for graphics (1.4.11).
    assert [text for text in found["texts"] if text[0] < 4.5] == []
    assert found["bars"]
    assert min(found["bars"]) >= 3


def test_settings_are_json_that_can_be_read_back(tmp_path):
    found = solved([])
    settings = report.repeatable("command", job(), Settings(params=("a",)), found.diagnostics)
    path = report.write_settings(tmp_path / "settings.json", settings)
    assert json.loads(path.read_text()) == json.loads(json.dumps(settings))
    assert settings["used"]["scale"] is None
