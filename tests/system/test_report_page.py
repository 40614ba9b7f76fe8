"""The published result's page in a real browser, and the verdict's picture in a real Prefect."""

import json
import shutil
import subprocess

import pytest
from browser import find_browser
from PIL import Image
from prefect import flow
from prefect.artifacts import Artifact
from project import ROOT

from flows.artifacts import show_verdict
from fullscale.evaluation.score_files import read_verdict
from fullscale.reporting.results import read_results
from fullscale.workspace import open_workspace
from tasks.report import write_report

pytestmark = pytest.mark.slow

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
MEASURE = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe id="page" src="page.html" style="border:0;width:{width}px;height:2000px"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const page = frame.contentDocument;
  const pictures = [...page.images];
  document.body.textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    pictures: pictures.length,
    broken: pictures.filter((each) => !each.naturalWidth).length,
    outside: pictures.filter((each) => each.getBoundingClientRect().right > {width}).length,
  }});
}};
</script>"""


@pytest.fixture(scope="module")
def browser():
    return find_browser()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of the committed reports; scans and networks need not be there."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    workspace = open_workspace(ROOT)
    params = workspace.load_params()
    write_report(read_results(workspace, params), params, path, with_overlays=False)
    return path


def run_browser(browser, folder, *arguments):
    done = subprocess.run(
        [browser, *QUIET, f"--user-data-dir={folder}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("width_px", [360, 1280])
def test_page_fits_its_window_and_shows_every_picture(browser, page, tmp_path, width_px):
    shutil.copy(page, tmp_path / "page.html")
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width_px))
    shown = run_browser(
        browser,
        tmp_path / "profile",
        "--allow-file-access-from-files",
        "--virtual-time-budget=20000",
        "--dump-dom",
        (tmp_path / "measure.html").as_uri(),
    )
    found = json.loads(shown[shown.index("{") : shown.rindex("}") + 1])
    assert found["width"] <= width_px
    assert found["pictures"] == page.read_text().count("<img ") > 0
    assert (found["broken"], found["outside"]) == (0, 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_colour_scheme(browser, page, tmp_path, scheme):
    picture = tmp_path / "page.png"
    run_browser(
        browser,
        tmp_path / "profile",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--screenshot={picture}",
        "--window-size=1280,3000",
        page.as_uri(),
    )
    grey = Image.open(picture).convert("L")
    histogram = grey.histogram()
    total = sum(histogram)
    bright, dark = sum(histogram[200:]) / total, sum(histogram[:60]) / total
    assert (bright > 0.8) if scheme == "light" else (dark > 0.8)
    ink = sum(histogram[:100] if scheme == "light" else histogram[150:]) / total
    assert ink > 0.01


def test_page_prints(browser, page, tmp_path):
    printed = tmp_path / "page.pdf"
    run_browser(browser, tmp_path / "profile", f"--print-to-pdf={printed}", page.as_uri())
    assert printed.read_bytes().startswith(b"%PDF")


def test_verdict_is_an_image_artifact(prefect):
    verdict = read_verdict(open_workspace(ROOT))
    gain = {
        "mean": 0.1, "low": 0.05, "high": 0.2, "p_value": 0.01, "num_patients": 8, "num_pairs": 17,
    }  # fmt: skip
    pair = {"first": verdict["candidate"], "second": verdict["baseline"]}
    verdict["comparisons"] = [{**pair, "organ": "all", "gain": gain, "p_holm": 0.01}]

    @flow
    def show():
        show_verdict(verdict)

    show()
    found = Artifact.get("differences")
    assert found is not None
    assert found.type == "image"
    assert found.data.startswith("data:image/png;base64,")
    assert "all +0.1000" in found.description
