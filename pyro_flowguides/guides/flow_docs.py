"""Descriptions of registered flows, taken from the docstrings of their builders and layers.

The docstrings of the autoguides are made from them, and so are the tables of the documentation.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pyro_flowguides import transforms
from pyro_flowguides.flows import FLOWS, Builder
from pyro_flowguides.transforms import Compose, Flow

__all__ = ["Docstring", "FlowDescription", "describe_flow", "format_sections", "parse_docstring"]

_SECTION = re.compile(r"^(Args|Attributes|Shapes|Returns|Raises|References|Example):$", re.MULTILINE)
_ROLE = re.compile(r" \(:\w+:`[^`]*`\)")
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

    @property
    def costs(self) -> tuple[str, str]:
        """The costs of both directions, from the paragraph that begins with "Cost:".

        It has one of the forms "X in both directions; the inverse adds Y", "forward, X; inverse, Y" and "X forward; Y
        inverse", each with or without further sentences.

        Raises:
            ValueError: if there is no such paragraph or it has another form.
        """
        paragraphs = [" ".join(part.split()) for part in self.body.split("\n\n") if part.startswith("Cost:")]
        sentence = re.split(r"\. |\.$", _ROLE.sub("", "".join(paragraphs)))[0].removeprefix("Cost: ")
        clauses = sentence.split("; ")
        both = [clause.partition("in both directions")[0].rstrip(", ") for clause in clauses if "in both d" in clause]
        if both:
            added = [clause.removeprefix("the inverse adds ") for clause in clauses if "the inverse adds" in clause]
            return both[0], " and ".join(["the same", *added])
        costs = {}
        for direction in ("forward", "inverse"):
            for clause in clauses:
                if clause.startswith(f"{direction}, ") or clause.endswith(f" {direction}"):
                    costs[direction] = clause.removeprefix(f"{direction}, ").removesuffix(f" {direction}")
        if len(costs) < 2:
            raise ValueError(f"the cost of each direction is not in the docstring: {self.summary!r}, {sentence!r}")
        return costs["forward"], costs["inverse"]


def parse_docstring(text: str | None) -> Docstring:
    """Split a docstring in Google style.

    Example:
        >>> from pyro_flowguides.guides.flow_docs import parse_docstring
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


@dataclass(frozen=True)
class FlowDescription:
    """The docstrings of a builder and of the layers that it builds.

    Attributes:
        builder: the builder's docstring.
        layer: the class of the first layer of a flow without a context.
        layer_docs: the docstring of that class.
    """

    builder: Docstring
    layer: type[Flow]
    layer_docs: Docstring

    @property
    def layer_path(self) -> str:
        """The dotted name of the layer's class, the public one if there is one."""
        name = self.layer.__name__
        is_public = getattr(transforms, name, None) is self.layer
        return f"{transforms.__name__ if is_public else self.layer.__module__}.{name}"


def describe_flow(name: str) -> FlowDescription:
    """Describe a registered flow.

    Example:
        >>> from pyro_flowguides.guides.flow_docs import describe_flow
        >>> describe_flow("radial").layer.__name__
        'Radial'
        >>> describe_flow("radial").layer_docs.costs
        ('O(D)', 'the same')
    """
    recipe = FLOWS[name]
    layer = _first_layer(recipe)
    return FlowDescription(parse_docstring(recipe.__doc__), layer, parse_docstring(layer.__doc__))


def _first_layer(builder: Builder) -> type[Flow]:
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        flow = builder(2)
    layer = flow.parts[0] if isinstance(flow, Compose) else flow
    assert isinstance(layer, Flow)
    return type(layer)
