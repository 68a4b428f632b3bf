"""The report in a real browser: it comes up without errors, shows hostile tokens as text, and every control works."""

import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from analysis.report import write_report
from speculation.predictor import Predictor
from traces.reader import TraceDataset

pytestmark = pytest.mark.browser

CLICK_THROUGH = """
<script>
const wait = setInterval(async () => {
  if (!document.documentElement.dataset.ready) return;
  clearInterval(wait);
  const pause = () => new Promise((go) => setTimeout(go, 60));
  const find = (id) => document.getElementById(id);
  const say = (name, value) => { document.documentElement.dataset[name] = value; };
  const drawn = (place) => place.querySelector(".heatmaplayer image, .scatterlayer .trace") !== null;
  say("figures", [...document.querySelectorAll("[data-figure]")].filter(drawn).length);
  for (const details of document.querySelectorAll("details")) details.open = true;
  await pause();
  say("tables", document.querySelectorAll("details .scroll tbody tr").length > 20);
  find("transition-on").click();
  find("transition-kind").value = "tokens";
  find("transition-kind").dispatchEvent(new Event("change"));
  say("transition", find("transition-name").textContent);
  const before = find("journey-tokens").textContent.length + find("journey-sequence").value;
  find("journey-on").click();
  await pause();
  say("moved", before !== find("journey-tokens").textContent.length + find("journey-sequence").value);
  const tokens = find("journey-tokens").querySelectorAll(".token");
  tokens[0].click();
  say("chips", find("journey-chips").children.length);
  for (const key of ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"])
    tokens[0].dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  say("status", find("journey-status").textContent.slice(0, 8));
  say("layer", /layer 1:/.test(find("journey-status").textContent));
  find("journey-right").click();
  say("right", /% of this sequence/.test(find("journey-legend").textContent));
  find("journey-right").click();
  find("journey-legend").querySelectorAll("button")[3].click();
  find("journey-zoom").value = 5;
  find("journey-zoom").dispatchEvent(new Event("input"));
  find("journey-predictor").value = "1";
  find("journey-predictor").dispatchEvent(new Event("change"));
  const canvas = document.querySelector("#journey-grid .window canvas"), box = canvas.getBoundingClientRect();
  const at = { clientX: box.left + 8, clientY: box.bottom - 8, bubbles: true };
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  say("tip", document.querySelector("#journey-grid .tip").textContent);
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  say("painted", new Set(new Uint32Array(pixels.buffer)).size > 5);
  window.dispatchEvent(new Event("beforeprint"));
  window.dispatchEvent(new Event("afterprint"));
  await pause();
  say("done", "true");
}, 50);
</script></body>"""


def dumped(chromium: str, page: Path, profile: Path) -> tuple[dict[str, str], str]:
    """Return the attributes of the page's root element after its scripts ran, and the page as the browser sees it."""
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    root = re.search(r"<html[^>]*>", dom)
    assert root, dom[:500]
    return {name: unescape(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', root.group())}, dom


def test_every_control_works_without_an_error(
    chromium: str,
    dataset: TraceDataset,
    predictors: dict[str, Predictor],
    evaluation: dict[str, Any],
    tmp_path: Path,
) -> None:
    page = tmp_path / "report.html"
    write_report(dataset, predictors, page, evaluation=evaluation, journeys=6)
    html = page.read_text("utf-8")
    # the policy would rightly refuse the test's own script
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    page.write_text(html.replace("</body>", CLICK_THROUGH), "utf-8")
    found, _ = dumped(chromium, page, tmp_path / "profile")
    tip = found.pop("tip")
    assert found == {
        "ready": "true", "figures": "8", "tables": "true", "transition": "layer 1", "moved": "true", "chips": "3",
        "status": "Token 1 ", "layer": "true", "right": "true", "painted": "true", "done": "true",
    }  # fmt: skip
    assert re.search(r"layer 2.*repeat guessed: \d of 2 right", tip)


def test_the_smallest_model_comes_up_under_its_own_policy_with_hostile_tokens_as_text(
    chromium: str, make_run: Any, tmp_path: Path
) -> None:
    run = make_run(layers=1, top_k=1, experts=2, datasets=("code",), store=(), order="unknown", sequences=3)
    page = tmp_path / "report.html"
    write_report(run, {}, page)
    found, dom = dumped(chromium, page, tmp_path / "profile")
    assert found == {"ready": "true"}
    assert "one layer only" in dom
    shown = dom[dom.index('id="journey-tokens"') :]
    assert "&lt;img src=x onerror=document.documentElement.dataset.hacked=2&gt;</span>" in shown
    assert "a⟨202E⟩b⟨2066⟩c</span>" in shown
