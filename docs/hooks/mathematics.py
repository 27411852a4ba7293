"""A hook of mkdocs: formulas become MathML when the site is built, so that a page needs no script to show them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(page_html: str, **_: Any) -> str:
    """``page_html`` with every formula that pymdownx.arithmatex has marked as MathML."""
    return _FORMULA.sub(_formula, page_html)


def _formula(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    shown = convert(html.unescape(latex).strip(), display="block" if bracket == "[" else "inline")
    return f'<{tag} class="formula">{shown}</{tag}>'
