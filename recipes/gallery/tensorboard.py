"""TensorBoard on a free port of this machine, and what a headless browser sees of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

from recipes.gallery.browser import Browser

# What is drawn on the page, by tag: of a line chart the last value of each run, in the table below it; of a picture its size.
DRAWN = """Object.fromEntries([...document.querySelectorAll('scalar-card, image-card')].map(card => [
  card.querySelector('tb-truncated-path')?.title,
  card.localName == 'image-card'
    ? [...card.querySelectorAll('img')].map(img => img.naturalWidth * img.naturalHeight).filter(size => size > 1)
    : card.querySelector('line-chart canvas, line-chart path')
      && [...card.querySelectorAll('tb-data-table-content-row')].map(row => row.innerText.trim().split(/\\s*\\n\\s*/))
]).filter(([tag, drawn]) => drawn?.length))"""

# By title the curves of each chart in the tab Custom Scalars, each as "tag (run)".
CHARTS = """(() => {
  const all = (root, found) => [...root.querySelectorAll('*')].flatMap(
    each => [...(found(each) ? [each] : []), ...(each.shadowRoot ? all(each.shadowRoot, found) : [])]);
  return Object.fromEntries(all(document, each => each.localName == 'tf-custom-scalar-multi-line-chart-card').map(card => [
    card.title,
    all(card.shadowRoot, each => each.className.toString().includes('match-list-entry')).map(
      each => each.textContent.trim().replace(/^\\S+\\s+/, ''))]));
})()"""


@contextmanager
def serve(logdir: Path, patience: float = 60) -> Iterator[str]:
    """Run TensorBoard over ``logdir`` and give its address, once it has read everything.

    Raises:
        RuntimeError: it does not come up, or finds nothing, within ``patience`` seconds.
    """
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", "--host=localhost", "--port=0"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            deadline, found = time.monotonic() + patience, None
            while not found:
                time.sleep(0.2)
                said.seek(0)
                text = said.read().decode()
                found = re.search(r"http://localhost:\d+/", text)
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"TensorBoard does not come up: {text}")
            expected = {str(file.parent.relative_to(logdir)) for file in logdir.rglob("events.out.tfevents*")}
            while expected - set(ask(found[0], "runs")):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"TensorBoard found {ask(found[0], 'runs')} and not {expected}")
                time.sleep(0.2)
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)


def ask(url: str, what: str) -> Any:
    """Return the answer of TensorBoard's server below ``data/``."""
    with urlopen(f"{url}data/{what}", timeout=30) as answer:
        return json.load(answer)


def photograph(
    page: Browser, url: str, tags: Iterable[str], picture: Path, *, card_width: int = 335, timeout: float = 60
) -> dict[str, list]:
    """Open the cards of ``tags`` in the time series tab, wait until they are drawn, and save what the page shows.

    Returns:
        By tag, the rows of the table below a chart, one per run, or the sizes in pixels of the pictures.

    Raises:
        TimeoutError: a card is missing or stays empty.
    """
    tags = list(tags)
    settings = {
        "timeSeriesCardMinWidth": card_width,
        "timeSeriesSettingsPaneOpened": False,
        "sideBarWidthInPercent": 24,
    }
    page.open(f"{url}data/environment")  # any page of this origin, to whose storage the settings belong
    page.evaluate(f"localStorage.setItem('_tb_global_settings', {json.dumps(json.dumps(settings))})")
    pattern = quote("|".join(f"^{re.escape(tag)}$" for tag in tags))
    page.open(f"{url}?tagFilter={pattern}&smoothing=0#timeseries")
    deadline = time.monotonic() + timeout
    while missing := set(tags) - set(drawn := page.evaluate(DRAWN)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not on the page after {timeout} s: {sorted(missing)}; there are {sorted(drawn)}")
        time.sleep(0.2)
    time.sleep(1)  # the lines' animation
    page.screenshot(picture)
    return drawn


def charts(page: Browser, url: str, titles: Iterable[str], timeout: float = 60) -> dict[str, list[str]]:
    """Open the tab Custom Scalars, and wait until the charts of these titles, and no others, have curves.

    Returns:
        The curves of each chart, as "tag (run)".

    Raises:
        TimeoutError: a chart is missing, stays empty, or is one too many.
    """
    titles = sorted(titles)
    page.open(f"{url}#custom_scalars")
    deadline = time.monotonic() + timeout
    while sorted(drawn := page.evaluate(CHARTS)) != titles or not all(drawn.values()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in the dashboard after {timeout} s: {titles}; there is {drawn}")
        time.sleep(0.2)
    return drawn
