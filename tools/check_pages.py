# SPDX-License-Identifier: Apache-2.0
"""Whether the pages that make docs builds are whole: links, formulas, console, widths and search, without internet.

    python tools/check_pages.py out/docs                           # what is wrong, a line each; exit status 1 if any
    python tools/check_pages.py out/docs --pictures out/pictures   # each page as a picture besides, wide and narrow

Links and formulas are read from the files. The rest is seen by Chromium, which opens every page in a wide and in a
narrow frame; where there is no Chromium, that part is left out, with a line that says so.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from output import say
from program import exit_status

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (1400, 420)
WORDS = ("density", "GradScaler", "Lipschitz")  # that the search must find
# TeX, or a row of a table that Markdown has taken for text.
RAW = re.compile(r"\$\$|\$[^$\n]*[\\^_{][^$]*\$|\\[()\[\]]|\\[a-zA-Z]{2,}|[_^]\{|^\|.*\|$", re.MULTILINE)
# A page may load its own files, and nothing from another host: Chromium says so on the console.
POLICY = "default-src 'self' 'unsafe-inline' data:"

# Opens pages in a frame, one after the other, and writes what is wrong with them, and their heights, into its own text.
HARNESS = """<!doctype html><pre></pre><iframe height=900></iframe><script>
const [pages, widths, words] = PLAN, faults = [], heights = {}, frame = document.querySelector("iframe");
const open = address => new Promise(done => { frame.onload = done; frame.src = address; });
const pause = () => new Promise(done => setTimeout(done, 50));
(async () => {
  for (const width of widths) for (const page of pages) {
    frame.width = width;
    await open(page);
    const html = frame.contentDocument.documentElement;
    heights[page + " " + width] = html.scrollHeight;
    if (html.scrollWidth > width) faults.push(`${page}: ${html.scrollWidth} pixels wide in a window of ${width}`);
  }
  if (pages.includes("search.html")) for (const word of words) {
    await open(`search.html?q=${word}`);
    let found = null;
    for (let tries = 0; tries < 100 && !found; ++tries) {
      await pause();
      found = frame.contentDocument.querySelector("#search-results li a");
    }
    if (!found) faults.push(`search.html: finds nothing for ${word}`);
  }
  document.querySelector("pre").textContent = JSON.stringify([faults, heights]);
})();
</script>"""


class Page(HTMLParser):
    """What a file says of itself: where links can lead, where its own lead, what it loads, and its text but code."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self._code = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.update(filter(None, (attributes.get("id"), attributes.get("name") if tag == "a" else None)))
        if "src" in attributes:
            self.loads.append(attributes["src"])
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(attributes["href"])
        elif "href" in attributes:
            self.links.append(attributes["href"])
        self._code += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag):
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self._code:
            self.text += data


def faults_of_files(site: Path) -> list[str]:
    """Links that lead nowhere, what would be loaded from a server, and source where a formula or a table should be."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    faults = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loads:
            if urlsplit(address).netloc:
                faults.append(f"{name}: loads {address} from a server")
        for address in page.links + page.loads:
            if urlsplit(address).scheme or urlsplit(address).netloc:
                continue
            file, anchor = urldefrag(address)
            target = path.parent / unquote(urlsplit(file).path) if file else path
            if not target.is_file():
                faults.append(f"{name}: {address} leads to no file")
            elif anchor and target.suffix == ".html" and unquote(anchor) not in pages[target.resolve()].anchors:
                faults.append(f"{name}: {address} leads to no heading")
        faults += [f"{name}: shows its source: {raw[0][:80]!r}" for raw in RAW.finditer(page.text)]
    return faults


@contextmanager
def served(site: Path, plan: list):
    """Serves a site on this machine; yields its address and a list to which what is missing is added."""
    missing: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/harness":
                return super().do_GET()
            body = HARNESS.replace("PLAN", json.dumps(plan)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def end_headers(self):
            self.send_header("Content-Security-Policy", POLICY)
            super().end_headers()

        def send_error(self, code, *rest):
            if self.path != "/favicon.ico":  # which browsers load from every server
                missing.append(f"a page loads {self.path}, which is not there (status {code})")
            super().send_error(code, *rest)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", missing
        finally:
            server.shutdown()


def browse(address: str, *options: str) -> tuple[str, list[str]]:
    """What Chromium prints when it opens a page, and the messages on the console."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Its sandbox works neither in most containers nor for root, and the pages are our own.
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "--virtual-time-budget=120000", *options, address]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        except subprocess.TimeoutExpired:
            sys.exit(f"check_pages.py: error: {CHROMIUM} has not opened {address} in 300 s; start it again")
    return done.stdout, re.findall(r":CONSOLE[^\]]*\] (.*)", done.stderr)


def faults_in_browser(site: Path, pictures: Path | None = None) -> list[str]:
    """What Chromium sees: messages on the console, what is missing, pages wider than the window, a search in vain."""
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    with served(site, [pages, WIDTHS, WORDS]) as (address, missing):
        output, console = browse(f"{address}/harness", "--dump-dom")
        report = re.search(r"<pre>(.+?)</pre>", output, re.DOTALL)
        if report is None:
            return [f"{CHROMIUM} has not opened all pages; it printed {output[-500:]!r}", *console]
        faults, heights = json.loads(html.unescape(report[1]))
        for name, height in heights.items() if pictures else ():
            page, width = name.split(" ")
            file = (pictures / f"{page.replace('/', '-').removesuffix('.html')}-{width}.png").absolute()
            browse(f"{address}/{page}", f"--window-size={width},{height}", f"--screenshot={file}")
        return [*faults, *console, *missing]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("site", type=Path, help="the folder of the pages")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="a folder for pictures of the pages")
    args = p.parse_args()
    site = args.site.resolve()
    if not (site / "index.html").is_file():
        p.error(f"{args.site} has no index.html: run make docs, or name the folder with the pages")

    def check() -> bool:
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
        faults = faults_of_files(site)
        if CHROMIUM is None:
            say("Chromium not found: the pages are not opened, and only links and formulas are checked")
        else:
            faults += faults_in_browser(site, args.pictures)
        say("\n".join([*faults, f"{len(faults)} faults in {len(list(site.rglob('*.html')))} pages"]))
        return not faults

    return exit_status("check_pages", "no page was changed", check)


if __name__ == "__main__":
    sys.exit(main())
