"""How the app's tests launch Chromium."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "lending_cookies"]

# The windows below an address bar that nobody sees: two pages loaded for each of ours, a quarter of its cost. Chromium
# reads the last such list alone, so Playwright's own is repeated as far as it touches a page of one's own machine.
_NOT_NEEDED = (
    "WebUIOmniboxPopup,WebUIOmniboxAimPopup,HttpsUpgrades,HttpsFirstBalancedModeAutoEnable,LensOverlay,MediaRouter,"
    "PaintHolding,AvoidUnnecessaryBeforeUnloadCheckSync,DestroyProfileOnBrowserClose,"
    "AvoidCorsURLLoaderRestartOnRedirect,OptimizationHints,NetworkTimeServiceQuerying,AimEnabled,PreconnectToSearch"
)

CHROMIUM: dict[str, Any] = {
    "executable_path": os.environ.get("TMERGE_CHROMIUM", shutil.which("chromium") or "/usr/bin/chromium"),
    "args": ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", f"--disable-features={_NOT_NEEDED}"],
}
"""Options of Playwright's ``launch``."""


def lending_cookies(browser: Any, home: Path) -> Any:
    """A context that lends a page in an iframe its cookies, which Chromium started as it is does not.

    Args:
        browser: Another one, of the same driver.
        home: Its new profile.
    """
    (home / "Default").mkdir(parents=True)
    allowed = {"profile": {"cookie_controls_mode": 0, "block_third_party_cookies": False}}
    (home / "Default" / "Preferences").write_text(json.dumps(allowed))
    return browser.browser_type.launch_persistent_context(str(home), accept_downloads=True, **CHROMIUM)
