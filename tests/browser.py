"""Debian's Chromium without a screen, and what the page in it asks for."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromedriver")
WAIT = 30
"""Seconds; what is waited for takes hundredths of one, on a machine with nothing else to do."""


def open_browser() -> Any:
    """A headless Chromium. Skips the test where there is none, unless NEED_BROWSER=1."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        reason = f"no {', '.join(missing)} here: apt-get install chromium chromium-driver"
        if os.environ.get("NEED_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # CI runs as root
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1240,1000",
        "--force-color-profile=srgb",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = Chrome(options, ChromeService(shutil.which("chromedriver")))
    browser.set_page_load_timeout(WAIT)
    return browser


def requested(browser: Any) -> list[str]:
    """The addresses that pages have asked for since the last call."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
        elif message["method"] == "Network.webSocketCreated":
            found.append(message["params"]["url"])
    return found


def foreign(addresses: list[str], own: str) -> list[str]:
    """Those that are neither the page's own nor part of the page."""
    return [address for address in addresses if not address.startswith((own, "data:", "blob:", "about:"))]


def until(claim: Callable[[], Any], seconds: float = WAIT) -> Any:
    """What `claim` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return value


class Tab:
    """The page as somebody uses it."""

    def __init__(self, browser: Any, address: str):
        self.browser = browser
        browser.switch_to.new_window("tab")
        self.handle = browser.current_window_handle
        browser.get(address)
        until(lambda: self.find("#send").is_displayed())

    def find(self, selector: str) -> Any:
        self.switch()
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
        from selenium.webdriver.common.by import By

        def found() -> Any:
            try:
                return self.browser.find_element(By.CSS_SELECTOR, selector)
            except (NoSuchElementException, StaleElementReferenceException):
                return None

        return until(found)

    def switch(self) -> None:
        if self.browser.current_window_handle != self.handle:
            self.browser.switch_to.window(self.handle)

    def write(self, text: str, box: str = "question") -> None:
        area = self.find(f"#{box} textarea")
        area.clear()
        area.send_keys(text)

    def ask(self, text: str) -> None:
        self.write(text)
        self.click("send")

    def click(self, name: str) -> None:
        until(lambda: self.is_enabled(name))
        self.find(f"#{name}" if name != "compare" else "#compare input").click()

    def is_enabled(self, name: str) -> bool:
        return name == "compare" or self.find(f"#{name}").is_enabled()

    def answer(self, side: int = 0) -> str:
        """The text of an answer to an instruction."""
        return self.find(f"#side{side} textarea").get_attribute("value")

    def said(self, side: int = 0) -> list[str]:
        """The messages of a conversation."""
        self.switch()
        script = "return [...document.querySelectorAll(arguments[0])].map(part => part.innerText.trim())"
        parts = ", ".join(f"#side{side} [data-testid={role}]" for role in ("user", "bot"))
        return self.browser.execute_script(script, parts)

    def message(self) -> str:
        return self.find("#message").text.strip()

    def is_done(self) -> bool:
        return self.is_enabled("send") and not self.is_enabled("stop")

    def close(self) -> None:
        self.switch()
        self.browser.close()
        self.browser.switch_to.window(self.browser.window_handles[0])


def screenshot(tab: Tab, path: Path) -> None:
    tab.switch()
    tab.browser.save_screenshot(str(path))
