"""Takes the README's two pictures of the demo's report in Debian's chromium.

    make demo
    .venv/bin/python benchmarks/screenshots.py demo/report.html docs/images

Writes `report.png` (the section on classes of tokens) and `journeys.png` (a sequence's grid with its paths).
"""

import shutil
from pathlib import Path

import click
from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1300, 900  # px of the window; each picture is one window
DATASET = "language_manual"  # of the demo: Python's, whose text is mostly prose
SEARCHED = " the "


@click.command()
@click.argument("report", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
def main(report: Path, output_dir: Path) -> None:
    """Take the pictures of REPORT and write them to OUTPUT_DIR."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise click.ClickException("no chromium on this machine; 'make browser' installs Debian's")
    output_dir.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(report.resolve().as_uri())
        page.locator("html[data-ready]").wait_for(state="attached")
        _take(page, "#token_classes h2", output_dir / "report.png")
        prose = page.locator(f"#journey-sequence optgroup[label={DATASET}] option").first
        page.locator("#journey-sequence").select_option(prose.get_attribute("value"))
        page.locator("#journey-note", has_text=DATASET).wait_for()
        page.locator("#journey-search").fill(SEARCHED)
        page.locator("#journey-tokens .match").first.click()
        page.locator("#journey-grid .sheet canvas").first.press("ArrowDown")
        _take(page, "#journey-search", output_dir / "journeys.png")
        browser.close()


def _take(page: Page, selector: str, output: Path) -> None:
    """Write the window, with the element a little below its upper edge."""
    page.locator(selector).evaluate(
        "(each) => scrollTo({ top: scrollY + each.getBoundingClientRect().top - 30, behavior: 'instant' })"
    )
    page.wait_for_timeout(1500)  # figures come near and are drawn
    page.screenshot(path=output)
    click.echo(f"{output}  {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
