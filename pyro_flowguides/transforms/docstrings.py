"""Docstrings in parts: those of generated classes are made from those of the classes behind them."""

import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Docstring", "format_sections", "parse_docstring"]

_SECTION = re.compile(r"^(Args|Attributes|Shapes|Returns|Raises|References|Example):$", re.MULTILINE)
_ENTRY = re.compile(r"^(?=\S)", re.MULTILINE)


@dataclass(frozen=True)
class Docstring:
    """A docstring in parts.

    Attributes:
        summary: the first paragraph.
        body: the other paragraphs before the first section.
        sections: the text of each section by its title, without indentation.
    """

    summary: str
    body: str
    sections: Mapping[str, str]

    @property
    def arguments(self) -> dict[str, str]:
        """The descriptions of the arguments by name."""
        entries = _ENTRY.split(self.sections.get("Args", ""))
        named = [entry.partition(":") for entry in entries if entry.strip()]
        return {name: text.strip() for name, _, text in named}


def parse_docstring(text: str | None) -> Docstring:
    """Split a docstring in Google style.

    Example:
        >>> from pyro_flowguides.transforms.docstrings import parse_docstring
        >>> parse_docstring("Draw.\\n\\nArgs:\\n    scale: its width,\\n        positive.").arguments
        {'scale': 'its width,\\n    positive.'}
    """
    head, *rest = _SECTION.split(inspect.cleandoc(text or ""))
    summary, _, body = head.strip().partition("\n\n")
    contents = [textwrap.dedent(content).strip("\n") for content in rest[1::2]]
    return Docstring(summary, body, dict(zip(rest[::2], contents, strict=True)))


def format_sections(sections: Mapping[str, str]) -> str:
    """Join sections to the text of a docstring; leave out those without content."""
    return "\n\n".join(f"{title}:\n{textwrap.indent(text, '    ')}" for title, text in sections.items() if text)
