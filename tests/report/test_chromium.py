"""The page in a browser, where one is installed: nothing stands out of it or is requested, and its script works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from megakd.report.writing import write_report
from tests.report.run_folders import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

PROBE = """
<script>
const found = {};
found.inner = window.innerWidth;
found.page = document.documentElement.scrollWidth;
found.outside = [...document.querySelectorAll("body *")].filter((e) => {
  const scrolled = e.closest(".scroll");
  const box = (scrolled || e).getBoundingClientRect();
  return box.width > 0 && (box.right > window.innerWidth + 0.5 || box.left < -0.5);
}).map((e) => `${e.tagName}.${e.className.baseVal ?? e.className}`);
found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
const area = document.querySelector("#chart-loss .area"), box = area.getBoundingClientRect();
const read = () => [...document.querySelectorAll("#chart-loss .value b")].map((b) => b.textContent);
found.rest = read();
const at = box.left + box.width * 0.5;
area.dispatchEvent(new PointerEvent("pointermove", { clientX: at, clientY: box.top + 9, bubbles: true }));
found.hovered = read();
found.at = document.querySelector("#chart-loss .at").textContent;
found.cursors = [...document.querySelectorAll(".cursor")].map((c) => c.style.left);
area.dispatchEvent(new PointerEvent("pointerleave", {}));
found.after = read();
document.querySelector(".legend button").click();
found.hidden = getComputedStyle(document.querySelector("#chart-loss path.line.run-0")).display;
found.shown = getComputedStyle(document.querySelector("#chart-loss path.line.run-1")).display;
parent.postMessage(JSON.stringify(found), "*");
</script>
"""
# Chromium's own windows are at least 500 wide.
FRAME = """<!doctype html><body><script>
addEventListener("message", (event) => document.body.setAttribute("data-found", event.data));
</script><iframe src="{}" style="border: 0; width: {}px; height: 3000px"></iframe></body>
"""


def look(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What the probe finds on a page in a frame of that width."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    framed = folder / "framed.html"
    framed.write_text(FRAME.format(probed.as_uri(), width))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1600,3000", "--virtual-time-budget=10000", "--dump-dom",
        framed.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = re.search(r'data-found="([^"]*)"', result.stdout)
    assert text is not None, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(text.group(1)))
    return found


@pytest.mark.parametrize("width", [390, 1400])
def test_narrow_and_wide(tmp_path: Path, width: int) -> None:
    folders = [write_run(tmp_path / name) for name in ("a_run_with_a_rather_long_name_that_has_no_spaces" * 2, "b")]
    page, _ = write_report(folders, tmp_path / "report.html")
    found = look(page, width, tmp_path)
    assert found["inner"] == width
    assert found["page"] <= width and found["outside"] == []
    assert found["requests"] == []
    # Under the middle of the chart of eight steps is the fourth.
    assert found["rest"] == ["2.125", "2.125"] == found["after"]
    assert found["hovered"] == ["2.25", "2.25"] and found["at"] == "step 4"
    assert set(found["cursors"]) == {"50%"}
    assert found["hidden"] == "none" and found["shown"] != "none"
