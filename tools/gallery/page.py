"""The gallery's page: one HTML file that needs no other, no script and no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #22201d; --quiet: #6d675f; --line: #e2ddd5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #171614; --ink: #ece8e1; --quiet: #a39c91; --line: #37332e; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0 0 8px; font-size: 32px; line-height: 1.2; }
h2 { margin: 0; font-size: 22px; }
p { max-width: 76ch; margin: 4px 0 12px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; }
a { color: inherit; text-underline-offset: 3px; }
section { margin-top: 36px; padding-top: 20px; border-top: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-spacing: 10px 6px; margin-left: -10px; table-layout: fixed; }
th { width: 120px; color: var(--quiet); font-size: 14px; font-weight: 400; line-height: 1.3; text-align: left; }
thead th { width: 186px; vertical-align: bottom; }
thead td { width: 120px; padding: 0; }
td { padding: 0; vertical-align: top; }
tbody th { vertical-align: middle; color: var(--ink); font-size: 16px; }
figure { margin: 0; }
img { display: block; width: 186px; aspect-ratio: 1; border-radius: 8px; background: var(--line); }
th img { width: 96px; margin-bottom: 6px; }
figcaption { color: var(--quiet); font-size: 13px; font-variant-numeric: tabular-nums; }
.note { font-weight: 600; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what stands below it."""

    file: Path
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A row of pictures, its name and perhaps a photo in front."""

    name: str
    pictures: Sequence[Picture]
    front: Picture | None = None


@dataclass(frozen=True)
class Section:
    """Lines under a heading, their columns headed; `note` is what came out."""

    title: str
    text: str
    heads: Sequence[str]
    lines: Sequence[Line]
    note: str = ""


def html(title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> str:
    """The page. Raises OSError where a picture is not there."""
    return "\n".join(_page(title, paragraphs, sections)) + "\n"


def _page(title: str, paragraphs: Sequence[str], sections: Sequence[Section]) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>"
    yield f"<h1>{escape(title)}</h1>"
    yield from (f"<p>{escape(text)}</p>" for text in paragraphs)
    links = (f'<a href="#part-{number}">{escape(one.title)}</a>' for number, one in enumerate(sections))
    yield f"<nav>{' '.join(links)}</nav>"
    for number, section in enumerate(sections):
        yield from _section(f"part-{number}", section)
    yield "</main>\n</body>\n</html>"


def _section(key: str, section: Section) -> Iterator[str]:
    yield f'<section id="{key}">\n<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>'
    if section.note:
        yield f'<p class="note">{escape(section.note)}</p>'
    if section.lines:
        heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in section.heads)
        yield f'<div class="wide"><table>\n<thead><tr><td></td>{heads}</tr></thead>\n<tbody>'
        for line in section.lines:
            front = "" if line.front is None else _image(line.front, "a photo of the person")
            yield f'<tr><th scope="row">{front}{escape(line.name)}</th>'
            yield from map(_cell, line.pictures, (f"{line.name}: {head}" for head in section.heads))
            yield "</tr>"
        yield "</tbody>\n</table></div>"
    yield "</section>"


def _cell(picture: Picture, shows: str) -> str:
    note = f"<figcaption>{escape(picture.note)}</figcaption>" if picture.note else ""
    return f"<td><figure>{_image(picture, shows)}{note}</figure></td>"


def _image(picture: Picture, shows: str) -> str:
    data = b64encode(picture.file.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(shows)}">'
