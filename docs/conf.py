"""Configuration of the site: `make docs` builds it, and `docs/README.md` says how it is made."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_extensions"), str(Path(__file__).parents[1])]

project = "drrho"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "mathml",
    "reference",
    "repository",
]
exclude_patterns = ["README.md", "_extensions"]
myst_enable_extensions = ["dollarmath", "deflist", "attrs_block"]
myst_heading_anchors = 4
smartquotes_action = "D"  # dashes alone
highlight_language = "text"
default_role = "py:obj"

html_theme = "pydata_sphinx_theme"
html_title = "drrho"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in ("choose", "examples", "start", "conventions", "architecture", "glossary", "faq")}
html_math_renderer = "mathml"
html_copy_source = False
html_domain_indices = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": "drrho"},
    "navbar_persistent": ["search-button"],
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "back_to_top_button": False,
}

# What the modules of drrho.integrations steer, and what runs on a GPU, need not be installed to read their docstrings.
autodoc_mock_imports = ["datasets", "sentence_transformers", "transformers", "triton"]
autosummary_mock_imports = autodoc_mock_imports
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "Group")}
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
napoleon_use_ivar = True

# Two classes may have a field of one name: what a docstring says of its own field leads to the first.
suppress_warnings = ["ref.python"]
