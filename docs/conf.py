"""Configuration of the documentation build: `make docs`. It needs no network."""

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
from flow_tables import flow_tables
from measured_numbers import read_numbers

project = "pyro_flowguides"
author = "pyro_flowguides developers"
copyright = "2026, pyro_flowguides developers"
release = installed_version("pyro-flowguides")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
# The tables are included by other pages.
exclude_patterns = ["_build", "costs_table.md", "posteriordb_table.md"]

# Each page documents what its package lists in `__all__`, in that order. A method is shown where it is documented:
# docstrings that overridden methods would inherit from torch.nn.Module or torch.distributions are left out.
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {**read_numbers(), **flow_tables()}

html_theme = "furo"
html_title = f"pyro_flowguides {release}"


def escape_stars(app, what, name, obj, options, lines):
    """Escape the stars of "*args, **kwargs:" in docstrings, of which Napoleon escapes the first only."""
    lines[:] = [re.sub(r"^( *)\*args, \*\*kwargs:", r"\1\\*args, \\*\\*kwargs:", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape_stars, priority=400)  # before Napoleon
