"""Makes the pictures of the chat page in docs/assets: ``PYTHONPATH=tests python -m support.page_shots docs/assets``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from support.page_lab import ANSWERS, BROWSER, FLAGS, Page, Server
from support.scripted import Reply

QUESTION = "How does the heap keep its order?"
ANSWER = """They ask about a binary heap: parent, children, sift.</think>A **binary heap** is an array. The children of
entry $i$ are $2i+1$ and $2i+2$, and no parent is larger than a child.

```python
def push(heap, item):
    heap.append(item)
    i = len(heap) - 1
    while i and heap[(i - 1) // 2] > heap[i]:  # sift up
        parent = (i - 1) // 2
        heap[i], heap[parent] = heap[parent], heap[i]
        i = parent
```

| operation | cost |
|---|---|
| push, pop | $O(\\log n)$ |
| look at the least | $O(1)$ |
"""


def main(folder: Path) -> None:
    """Makes three pictures: light, dark with the settings, and a telephone's."""
    ANSWERS[QUESTION] = Reply(ANSWER, reused=4)
    with Server(Path(tempfile.mkdtemp())) as server, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = Page(browser, server.url, color_scheme="light")
        page.ask(QUESTION).locator(".katex").nth(3).wait_for()
        page.tab.locator(".hljs-keyword").first.wait_for()
        page.tab.screenshot(path=folder / "page.png")
        page.tab.emulate_media(color_scheme="dark")
        page.tab.click("#toggle-settings")
        page.tab.screenshot(path=folder / "page-settings.png")
        page.tab.click("#toggle-settings")
        page.tab.set_viewport_size({"width": 390, "height": 760})
        page.tab.click("#toggle-history")
        page.tab.screenshot(path=folder / "page-telephone.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
