"""A hook of mkdocs: roles in docstrings (``:class:`~a.B```) are shown as plain code (``B``)."""

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|attr|mod):<code>(~?)([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """``~`` shows the last part of a name, as in Sphinx."""
    return _ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
