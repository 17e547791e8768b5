"""Sphinx: how the documentation is built. Warnings are errors (`-W` on the command line)."""

from __future__ import annotations

import sys
from pathlib import Path

import curvlab

sys.path.insert(0, str(Path(__file__).resolve().parent / "_ext"))

project = "curvlab"
author = "The curvlab developers"
copyright = "2026, The curvlab developers"
version = release = curvlab.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "curvlab_tables",
]
exclude_patterns = ["_build", "_ext"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# Markdown and notebooks. The notebooks are run by the tests; what they print is in them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

smartquotes_action = "D"  # dashes alone: tables and options stand as they are typed

# API reference
default_role = "literal"  # docstrings set names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = f"curvlab {release}"
html_static_path = ["_static"]
html_css_files = ["curvlab.css"]
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_theme_options = {
    "logo": {"text": "curvlab"},
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "start": [], "search": []}
html_show_sourcelink = False
