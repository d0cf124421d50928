"""MyST and TeX become text that a terminal can show."""

from __future__ import annotations

import pytest

from lightning_sgd.cli.cards import formula, to_terminal_markdown

FORMULAS = {
    r"\eta_1": "η₁",
    r"w_{t+1}": "wₜ₊₁",
    r"\tilde\kappa_m": "κ̃ₘ",
    r"\tilde{\kappa}": "κ̃",
    r"x^2 + y^{-1}": "x² + y⁻¹",
    r"\frac{1-\alpha}{1+\alpha}": "(1-α)/(1+α)",
    r"\eta\,\frac{1 - 1/\tilde\kappa}{2}": "η(1 - 1/κ̃)/2",
    r"\Omega \le \lVert x\rVert": "Ω ≤ ‖ x‖",
    r"\log \mathbb{E}[xx^\top]": "log E[xxᵀ]",
    r"L_{\max}": "Lₘₐₓ",
    r"x_{i,j}": "x_(i,j)",
    "a &= b, \\\\\nc &= d": "a = b,\nc = d",
    r"\begin{aligned} a &= b \end{aligned}": "a = b",
}


@pytest.mark.parametrize(("tex", "text"), FORMULAS.items())
def test_formulas(tex, text):
    assert formula(tex) == text


BLOCKS = {
    "```{math}\n:label: step\nu = \\alpha\n```\n": "```text\nu = α\n```\n",
    "$$\nu = \\alpha\n$$\n": "```text\nu = α\n```\n",
    "```yaml\nlr: $1 # {x}`y`\n```\n": "```yaml\nlr: $1 # {x}`y`\n```\n",
    "```{code-block} python\n:linenos:\nx = 1\n```\n": "```python\nx = 1\n```\n",
    "```{doctest}\n>>> 1\n1\n```\n": "```python\n>>> 1\n1\n```\n",
    "```{note}\nUse $\\alpha$.\n```\n": "**Note.** Use `α`.\n\n",
    ":::{warning}\nStop.\n:::\n": "**Warning.** Stop.\n\n",
}


@pytest.mark.parametrize(("myst", "markdown"), BLOCKS.items())
def test_blocks(myst, markdown):
    assert to_terminal_markdown(f"before\n\n{myst}after") == f"before\n\n{markdown}after"


INLINE = {
    "{class}`~lightning_sgd.MaSS`": "`MaSS`",
    "{class}`lightning_sgd.MaSS`": "`MaSS`",
    "{func}`the rule <lightning_sgd.mass_hyperparameters>`": "`the rule`",
    "{math}`\\alpha`": "`α`",
    "costs `$5` or $\\alpha$": "costs `$5` or `α`",
    "costs \\$5, or \\$6": "costs \\$5, or \\$6",
    "(label)=\n# Title": "# Title",
    "% a comment\ntext": "text",
    "---\nkey: value\n---\ntext": "text",
    "[link](other.md)": "[link](other.md)",
    "![Loss](../results/a.svg)": "*Picture: Loss.*",
}


@pytest.mark.parametrize(("myst", "markdown"), INLINE.items())
def test_inline_markup(myst, markdown):
    assert to_terminal_markdown(myst) == markdown
