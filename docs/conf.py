"""Configuration of the documentation build: `make docs`. It needs no network."""

from importlib.metadata import version as installed_version

project = "pyro_flowguides"
author = "pyro_flowguides developers"
copyright = "2026, pyro_flowguides developers"
release = installed_version("pyro-flowguides")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

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

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"pyro_flowguides {release}"
