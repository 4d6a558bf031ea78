"""Sphinx settings of the site. `make docs` builds it, offline, and turns every warning into an error."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # autodoc imports this checkout, compiled or not

import fastrlhf  # noqa: E402

project = "fastrlhf"
author = "the fastrlhf authors"
version = release = fastrlhf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fastrlhf {release}"
html_show_copyright = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

smartquotes = False  # "[...]" and "mean" are code in docstrings
default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
napoleon_use_param = False  # keeps entries such as "values, old_values, returns:" together
napoleon_use_rtype = False
napoleon_custom_sections = [
    "Returns"
]  # as prose: "PPOLossOutput. loss: ..." has no type before its colon
