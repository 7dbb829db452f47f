"""The HTML page of the gallery: one self-contained file without scripts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

PAGE_STYLE = """
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
img { display: block; width: 186px; aspect-ratio: auto 1; border-radius: 8px; background: var(--line); }
th img { width: 96px; margin-bottom: 6px; }
figcaption { color: var(--quiet); font-size: 13px; font-variant-numeric: tabular-nums; }
.note { font-weight: 600; }
"""


@dataclass(frozen=True)
class PageImage:
    """A PNG file and its caption."""

    file: Path
    note: str = ""


@dataclass(frozen=True)
class PageRow:
    """A row of images with a name and an optional photo before the name."""

    name: str
    images: Sequence[PageImage]
    photo: PageImage | None = None


@dataclass(frozen=True)
class PageSection:
    """A table of images under a heading; `note` is the result, in bold."""

    title: str
    text: str
    column_titles: Sequence[str]
    rows: Sequence[PageRow]
    note: str = ""


def render_page(title: str, paragraphs: Sequence[str], sections: Sequence[PageSection]) -> str:
    """The page's HTML, images embedded. Raises OSError if an image file is missing."""
    return "\n".join(_page_lines(title, paragraphs, sections)) + "\n"


def _page_lines(title: str, paragraphs: Sequence[str], sections: Sequence[PageSection]) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n<main>"
    yield f"<h1>{escape(title)}</h1>"
    yield from (f"<p>{escape(text)}</p>" for text in paragraphs)
    links = (f'<a href="#part-{number}">{escape(section.title)}</a>' for number, section in enumerate(sections))
    yield f"<nav>{' '.join(links)}</nav>"
    for number, section in enumerate(sections):
        yield from _section_lines(f"part-{number}", section)
    yield "</main>\n</body>\n</html>"


def _section_lines(key: str, section: PageSection) -> Iterator[str]:
    yield f'<section id="{key}">\n<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>'
    if section.note:
        yield f'<p class="note">{escape(section.note)}</p>'
    if section.rows:
        titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in section.column_titles)
        yield f'<div class="wide"><table>\n<thead><tr><td></td>{titles}</tr></thead>\n<tbody>'
        for row in section.rows:
            photo = "" if row.photo is None else _image_tag(row.photo, "a photo of the person")
            yield f'<tr><th scope="row">{photo}{escape(row.name)}</th>'
            yield from map(_image_cell, row.images, (f"{row.name}: {title}" for title in section.column_titles))
            yield "</tr>"
        yield "</tbody>\n</table></div>"
    yield "</section>"


def _image_cell(image: PageImage, alt_text: str) -> str:
    note = f"<figcaption>{escape(image.note)}</figcaption>" if image.note else ""
    return f"<td><figure>{_image_tag(image, alt_text)}{note}</figure></td>"


def _image_tag(image: PageImage, alt_text: str) -> str:
    data = b64encode(image.file.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt_text)}">'
