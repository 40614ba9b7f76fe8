"""Take the pictures of MLflow's and Prefect's pages that the README shows.

`python docs/screenshots.py` needs running services, a registered model and a completed run; see
CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).parent / "pictures"
WIDTH_PX = 1280
TIMEOUT_MS = 60_000


def take_version(browser: Browser, mlflow_url: str, model_name: str) -> Image.Image:
    """Return the page of the newest version that passed the promotion gate."""
    answer = httpx.get(
        f"{mlflow_url}/api/2.0/mlflow/registered-models/alias",
        params={"name": model_name, "alias": "challenger"},
    )
    answer.raise_for_status()
    version = answer.json()["model_version"]["version"]
    page = open_page(browser, f"{mlflow_url}/#/models/{model_name}/versions/{version}", 1090)
    page.get_by_role("heading", name="PASS").wait_for()
    page.get_by_role("button", name="Close").click()  # MLflow's assistant
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll(\"main img[src^='get-artifact']\")];"
        " return all.length > 0 && all.every((each) => each.complete && each.naturalWidth > 0); }"
    )
    return take(page)


def take_run(browser: Browser, prefect_url: str, flow: str) -> Image.Image:
    """Return the page of the newest completed run of a flow, with its artifacts."""
    answer = httpx.post(
        f"{prefect_url}/api/flow_runs/filter",
        json={
            "flows": {"name": {"any_": [flow]}},
            "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
            "sort": "START_TIME_DESC",
            "limit": 1,
        },
    )
    answer.raise_for_status()
    (run,) = answer.json()
    page = open_page(browser, f"{prefect_url}/runs/flow-run/{run['id']}", 1165)
    page.get_by_role("listitem").filter(has_text="Artifacts").click()
    page.get_by_text("verdict", exact=True).wait_for()
    options = page.get_by_role("button", name="Run Graph Options")
    options.click()
    for each in ("Hide artifacts", "Hide events"):  # they are listed below
        page.get_by_role("checkbox", name=each).check(force=True)
    options.click()
    page.get_by_role("button", name="Recenter graph (c)").click()
    page.mouse.move(0, 0)
    return take(page)


def open_page(browser: Browser, url: str, height_px: int) -> Page:
    """Open a page as wide as the pictures."""
    page = browser.new_page(viewport={"width": WIDTH_PX, "height": height_px})
    page.set_default_timeout(TIMEOUT_MS)
    page.add_init_script("localStorage.setItem('color-scheme', '\"light\"')")  # Prefect's
    page.goto(url)
    return page


def take(page: Page) -> Image.Image:
    """Return what the window shows once it no longer changes, with all fonts loaded."""
    page.evaluate("() => document.fonts.ready")
    before = b""
    for _ in range(20):  # a canvas, such as Prefect's graph, moves by itself for a while
        shown = page.screenshot(animations="disabled")
        if shown == before:
            break
        before = shown
        page.wait_for_timeout(500)
    return Image.open(io.BytesIO(shown))


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG with 256 colours."""
    path.parent.mkdir(exist_ok=True)
    # Without dithering, thin outlines keep their colour.
    small = picture.convert("RGB").quantize(
        256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    )
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlflow", default="http://127.0.0.1:5000")
    parser.add_argument("--prefect", default="http://127.0.0.1:4200")
    parser.add_argument("--model", default="fullscale-organs")
    parser.add_argument("--flow", default="reproduce")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        save(take_version(browser, arguments.mlflow, arguments.model), FOLDER / "registry.png")
        save(take_run(browser, arguments.prefect, arguments.flow), FOLDER / "run.png")
        browser.close()


if __name__ == "__main__":
    main()
