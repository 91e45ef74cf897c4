"""Sphinx's roles in docstrings, such as :class:`Recipe`, as code in the API reference."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`([^`]+)`")


class Roles(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Of every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_code, obj.docstring.value).replace("``", "`")


def _code(role: re.Match[str]) -> str:
    """As Sphinx shows it: ``~`` leaves out all but the last name."""
    name = role[1]
    return f"`{name.rsplit('.', 1)[-1] if name.startswith('~') else name}`"
