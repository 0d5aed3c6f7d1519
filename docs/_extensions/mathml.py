"""Formulas as MathML, written when the site is built: browsers draw it without a script, a font or a network."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def mathml(tex: str, **options: bool) -> str:
    """Return a formula as MathML, in which a double bar between two distributions is no fence that stretches."""
    return tex2mathml(tex, **options).replace("<mo>‖</mo>", '<mo stretchy="false">‖</mo>')


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line of text."""
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula that stands by itself; a reader without a mouse can scroll it."""
    formula = mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="formula" role="group" aria-label="formula" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the renderer to Sphinx, where ``html_math_renderer`` names it."""
    app.add_html_math_renderer("mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
