"""Open every page of the site in a browser, at the widths of a desk and of a telephone.

Fail if the browser reports an error or asks for anything that is not a file of the site, if a page
is wider than its window, or if code or a formula is cut at the wide window.
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.progress import track

WIDTHS = {1280: "wide", 420: "narrow"}
#: What is wider than its window, or hides a part of itself at the wide one.
CUT = """wide => {
  const cut = [];
  const sizes = e => `${e.scrollWidth} of ${e.clientWidth} pixels`;
  if (document.documentElement.scrollWidth > window.innerWidth)
    cut.push(`the page: ${sizes(document.documentElement)}`);
  if (wide)
    for (const part of document.querySelectorAll("article pre > code, article .formula"))
      if (part.scrollWidth > part.clientWidth + 1)
        cut.push(`${sizes(part)}: ${part.textContent.trim().slice(0, 60)}`);
  return cut;
}"""


def faults(browser: Browser, path: Path, width: int, picture: Path) -> list[str]:
    """Return what is wrong with a page at this width."""
    found: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda m: found.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: found.append(str(e)))
    files = ("file:", "data:", "blob:")
    page.on(
        "request",
        lambda r: None if r.url.startswith(files) else found.append(f"asks for {r.url}"),
    )
    page.goto(path.resolve().as_uri())
    found += page.evaluate(CUT, WIDTHS[width] == "wide")
    page.screenshot(path=picture, full_page=True)
    page.close()
    return found


def main(site: Path, pictures: Path, executable: str) -> int:
    """Look at all pages; return 1 if something is wrong."""
    pages = sorted(p for p in site.rglob("*.html") if p.name != "404.html")
    wrong: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        for path in track(pages, "looking at the pages"):
            name = path.relative_to(site).with_suffix("").as_posix()
            for width, called in WIDTHS.items():
                picture = pictures / f"{name.replace('/', '-')}-{called}.png"
                found = faults(browser, path, width, picture)
                wrong += [f"{name} at {width} pixels: {fault}" for fault in found]
        browser.close()
    print(*wrong, f"{len(pages)} pages, {len(wrong)} faults; pictures in {pictures}", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
