"""Takes away the roles of Sphinx before code in docstrings, such as ``:func:``, which Markdown does not know."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Return the page without roles before its code."""
    return ROLE.sub("", html)
