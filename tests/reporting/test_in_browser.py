"""Pages in a real browser, on a desk and on a phone, light and dark: nothing fails to load, nothing is cut off."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import NASTY, full_report
from PIL import Image

from layer_surgery import SurgeryReport
from layer_surgery.records import LayerPlan
from layer_surgery.reporting.compare import comparison_page, result_row
from layer_surgery.reporting.page import report_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]
LIGHT, DARK = 1, 0

#: Shows a page in a frame of a given width, since the window of a headless browser cannot be as narrow as a phone,
#: and writes what it finds there into its own document.
PROBE = """<!DOCTYPE html><body style="margin:0"><iframe src="page.html" style="width:{width}px;height:3000px;border:0">
</iframe><pre id="found"></pre><script>
const round = box => [box.left, box.top, box.right, box.bottom].map(Math.round);
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const found = {{width: page.documentElement.scrollWidth, figures: [], colours: null}};
  for (const svg of page.querySelectorAll("svg")) {{
    const outer = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map(text => [text.textContent, ...round(text.getBoundingClientRect())]);
    found.figures.push({{box: round(outer), texts: boxes, role: svg.getAttribute("role")}});
  }}
  const style = page.defaultView.getComputedStyle(page.body);
  found.colours = [style.color, style.backgroundColor];
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""


def browse(*arguments: str, profile: Path) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", f"--user-data-dir={profile}", "--disable-background-networking"]
    return subprocess.run([BROWSER, *options, *arguments], capture_output=True, text=True, timeout=120)


def complaints(log: str) -> list[str]:
    """Return what the page said on the browser's console: errors, refused loads."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def probed(html: str, folder: Path, *, width: int, scheme: int) -> dict[str, Any]:
    folder.mkdir()
    (folder / "page.html").write_text(html, encoding="utf-8")
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width), encoding="utf-8")
    done = browse(
        "--dump-dom", f"--blink-settings=preferredColorScheme={scheme}", f"file://{probe}", profile=folder / "p"
    )
    assert complaints(done.stderr) == []
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None and match[1], done.stderr[-2000:]
    result: dict[str, Any] = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return result


@pytest.fixture(scope="module")
def pages(result: tuple[Path, SurgeryReport]) -> dict[str, str]:
    report = result[1]
    full = full_report(report)
    rows = [result_row(name, full) for name in ("one", "W" * 200, "three")]
    return {
        "report": report_page(full, "smaller", needs_code=True),
        "hostile": report_page(full_report(report, NASTY), NASTY, needs_code=True),
        "deep": report_page(deep(report), "deep", needs_code=True),
        "comparison": comparison_page(rows),
    }


def deep(report: SurgeryReport) -> SurgeryReport:
    """Return a report on a model of 80 layers, of which every second is low-rank."""
    assert report.scores is not None
    (source, *_) = report.plan.low_rank
    layers = [
        LayerPlan(index=k, action="low_rank", ranks=dict.fromkeys(source.ranks, 4096))
        if k % 2
        else LayerPlan(index=k, action="remove" if k % 8 == 0 else "keep")
        for k in range(80)
    ]
    spectra = [
        replace(spectrum, layer=layer.index)
        for layer in layers
        if layer.action == "low_rank"
        for spectrum in report.spectra
        if spectrum.layer == source.index
    ]
    scores = replace(report.scores, values=[10.0 ** (k % 5) for k in range(80)], removal_order=list(range(80)))
    return replace(report, plan=replace(report.plan, layers=layers), scores=scores, spectra=spectra, refit=[])


@pytest.mark.parametrize(("width", "scheme"), [(1280, LIGHT), (390, DARK)])
@pytest.mark.parametrize("name", ["report", "hostile", "deep", "comparison"])
def test_nothing_is_cut_off_or_overlaps(
    pages: dict[str, str], tmp_path: Path, name: str, width: int, scheme: int
) -> None:
    found = probed(pages[name], tmp_path / "page", width=width, scheme=scheme)
    assert found["width"] <= width  # tables scroll by themselves; the page never sideways
    assert found["figures"]
    for figure in found["figures"]:
        left, top, right, bottom = figure["box"]
        assert figure["role"] == "img" and right - left > 200 and bottom - top > 40
        for text, x0, y0, x1, y1 in figure["texts"]:
            assert x0 >= left - 3 and x1 <= right + 3 and y0 >= top - 3 and y1 <= bottom + 3, text
    ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in found["colours"])
    assert (ink < paper) == (scheme == LIGHT) and abs(ink - paper) > 500


def test_labels_on_one_axis_do_not_overlap(pages: dict[str, str], tmp_path: Path) -> None:
    found = probed(pages["deep"], tmp_path / "page", width=390, scheme=LIGHT)
    importance = found["figures"][2]
    labels = sorted(box[1:] for box in importance["texts"] if re.fullmatch(r"\d+", box[0]) and int(box[0]) < 80)
    on_axis = [box for box in labels if box[1] == max(b[1] for b in labels)]
    assert len(on_axis) > 4
    assert all(a[2] <= b[0] for a, b in itertools.pairwise(on_axis))


def test_the_page_is_painted_and_printed(pages: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(pages["report"], encoding="utf-8")
    address, picture, printed = f"file://{tmp_path / 'page.html'}", tmp_path / "page.png", tmp_path / "page.pdf"
    done = browse(f"--screenshot={picture}", "--window-size=1280,2400", address, profile=tmp_path / "p")
    assert complaints(done.stderr) == []
    colours = Image.open(picture).convert("RGB").getcolors(1 << 20)
    assert colours is not None and len(colours) > 100
    assert (0, 114, 178) in {colour for _, colour in colours}  # the blue of the bars: variables do resolve
    browse(f"--print-to-pdf={printed}", "--no-pdf-header-footer", address, profile=tmp_path / "p")
    assert printed.read_bytes().startswith(b"%PDF") and printed.stat().st_size > 20_000


def test_the_probe_sees_what_is_wrong(tmp_path: Path) -> None:
    html = '<!DOCTYPE html><body style="width:900px"><svg viewBox="0 0 9 9" width="300"></svg></body>'
    assert probed(html, tmp_path / "wide", width=390, scheme=LIGHT)["width"] > 390
    (tmp_path / "bad.html").write_text('<img src="none.png"><script>console.error("x"); none()</script>')
    log = browse("--dump-dom", f"file://{tmp_path / 'bad.html'}", profile=tmp_path / "q").stderr
    assert complaints(log)
