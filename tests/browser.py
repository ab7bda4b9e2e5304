"""A real browser without a window, for tests of pages: Debian's Chromium, which Playwright drives.

The program is the one on PATH; .ci/run installs it. Without it, or without Playwright, the tests skip with a word.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def program() -> str | None:
    """Path of the program; None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of Playwright."""
    path = program()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: Playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=120_000)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def opened(chromium: Any, url: str, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A page that has been opened. At the end it must have made no error and no request beyond its own address."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(60_000)
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    try:
        yield page
        assert not troubles, troubles
        assert all(each.startswith((url, "data:")) for each in asked), asked
    finally:
        context.close()
