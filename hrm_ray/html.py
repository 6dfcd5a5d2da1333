"""What the pages that we write have in common: one file each, which fetches nothing, readable in light and dark."""


def document(title: str, body: str, *, css: str = "", script: str = "", head: str = "") -> str:
    """A page.

    Args:
        title, body, head: as HTML.
        css: beside `CSS`.
        script: JavaScript that runs when `body` is there.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{head}<title>{title}</title>\n<style>{CSS}{css}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --ground: #ffffff; --card: #f6f8fa;
  --line: #d1d9e0; --best: #fff4d6; --complete: #1a6fb5; --pruned: #a25d00; --failed: #c9302c; --running: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a1aab4; --ground: #12161b; --card: #1d232a;
  --line: #39424c; --best: #3c3415; --complete: #6cb2f0; --pruned: #f0ab52; --failed: #ff8a80; --running: #63d297; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; }
code { font: .875em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--card); padding: .1em .3em;
  border-radius: 4px; overflow-wrap: anywhere; }
"""
