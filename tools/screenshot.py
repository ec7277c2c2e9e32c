"""README's picture: the quickstart, run in JupyterLab in a real browser. `python -m
tools.screenshot` makes it anew."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from flexkernel.notebook import demo
from tests.support import chromium as harness

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "notebooks" / "quickstart.png"
FROM, TO = "%flex_hook model.layers.*.mlp", "%flex_show model.layers.3.mlp"  # the cells it shows


def main() -> None:
    os.environ["FLEX_CACHE"] = str(demo.model().parent)
    with tempfile.TemporaryDirectory() as temp, harness.open_browser() as chromium:
        root, home = Path(temp) / "notebooks", Path(temp) / "home"
        home.mkdir()
        shutil.copytree(ROOT / "notebooks", root, ignore=shutil.ignore_patterns("*.png", ".*"))
        with (
            harness.open_lab(root, home) as lab,
            harness.open_page(chromium, viewport={"width": 1000, "height": 4200}) as page,
        ):
            lab.open(page, "quickstart.ipynb")
            harness.command(page, "notebook:run-all-cells")
            seen = "() => document.body.innerText.includes('torch.Size([1, 9, 5, 5])')"
            page.wait_for_function(seen, timeout=120_000)
            page.wait_for_timeout(2000)
            take(page)
    print(PICTURE)


def take(page) -> None:
    """The part of the notebook from one cell to another."""
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    boxes = [
        cells.nth(i).bounding_box()
        for i in range(cells.count())
        if cells.nth(i).inner_text().strip()
    ]
    texts = [cells.nth(i).inner_text() for i in range(cells.count())]
    first = next(i for i, text in enumerate(texts) if FROM in text)
    last = next(i for i, text in enumerate(texts) if TO in text)
    top, bottom = boxes[first], boxes[last]
    clip = {
        "x": top["x"],
        "y": top["y"],
        "width": top["width"],
        "height": bottom["y"] + bottom["height"] - top["y"],
    }
    page.screenshot(path=PICTURE, clip=clip)


if __name__ == "__main__":
    main()
