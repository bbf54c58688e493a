"""A page in headless Chromium: what a script finds in it, and which requests were made."""

import html
import json
import shutil
import subprocess
from pathlib import Path

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The page stands in a frame, since no window of Chromium is as narrow as a phone.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre>
<iframe id="frame" style="border:0" width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const found = (() => {{ {script} }})();
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>"""


def run(page, script, width, tmp_path):
    """What the body of a function of `page` (a document) and `view` (its window) returns, and the net log's requests.

    Args:
        page: The HTML file.
        script: JavaScript.
        width: Of the page, in pixels.
        tmp_path: For the profile and the log.
    """
    framed = tmp_path / "framed.html"
    content = html.escape(page.read_text(encoding="utf-8"), quote=True)
    framed.write_text(FRAME.format(width=width, page=content, script=script), encoding="utf-8")
    log = tmp_path / "net.json"
    dom = _chromium(tmp_path, f"--log-net-log={log}", "--dump-dom", framed.as_uri())
    found = dom.split('<pre id="found">')[1].split("</pre>")[0]
    return json.loads(html.unescape(found)), requests(log)


def requests(log: Path):
    """The addresses in Chromium's net log that a page asked for; what the browser wants for itself has no initiator."""
    starts = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {p["url"] for p in starts if "url" in p and p.get("initiator", "not an origin") != "not an origin"}
    return {address for address in asked if not address.startswith(("file:", "data:", "about:"))}


def screenshot(page, path, width, height, tmp_path):
    """A picture of the top of the page."""
    framed = tmp_path / "framed.html"
    content = html.escape(page.read_text(encoding="utf-8"), quote=True)
    framed.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><iframe style="border:0" width="{width}" '
        f'height="{height}" srcdoc="{content}"></iframe>',
        encoding="utf-8",
    )
    _chromium(tmp_path, f"--screenshot={path}", f"--window-size={max(width, 500)},{height}", framed.as_uri())


def _chromium(tmp_path, *arguments):
    command = [
        EXECUTABLE, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
