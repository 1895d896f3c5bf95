"""A hook of mkdocs: docstrings have roles, as in :meth:`Plan.dump`, which Markdown does not know. Shows their names."""

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(?:~[\w.]*\.)?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """The page with `Plan.dump` in the place of :meth:`Plan.dump`, and `Plan` in that of :class:`~plan.Plan`."""
    return ROLE.sub(r"<code>\1</code>", html)
