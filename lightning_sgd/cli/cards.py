"""Method cards for the terminal: MyST and TeX turned into Markdown that Rich can show."""

from __future__ import annotations

import re
import unicodedata

BLOCK = re.compile(
    r"^(?P<fence>`{3,}|:{3,}|\$\$)(?:\{(?P<directive>[\w-]+)\})?(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
INVISIBLE = re.compile(
    r"\A---\n.*?\n---\n|^\([\w-]+\)=\n|^%[^\n]*\n|^:[\w-]+:[^\n]*\n", re.M | re.S
)
INLINE = re.compile(r"\{(?P<role>[\w:]+)\}`(?P<text>[^`]+)`|`[^`]*`|(?<!\\)\$(?P<math>[^$]+)\$")
IMAGE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")
CODE = {"code", "code-block", "doctest"}

ACCENTS = {"tilde": "\u0303", "hat": "\u0302", "bar": "\u0304"}
PAIRS = """
le=≤ leq=≤ ge=≥ geq=≥ ne=≠ ll=≪ gg=≫ preceq=⪯ approx=≈ sim=∼ equiv=≡ propto=∝ in=∈ to=→ times=× cdot=· pm=±
infty=∞ sum=∑ prod=∏ nabla=∇ partial=∂ sqrt=√ top=ᵀ ell=ℓ ldots=… dots=… lVert=‖ rVert=‖ lambda=λ varepsilon=ε
left= right= quad= qquad=
"""
SYMBOLS = dict(pair.split("=") for pair in PAIRS.split())
LOWERED = dict(zip("0123456789+-=aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", strict=True))
RAISED = dict(zip("0123456789+-=intkᵀ", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼ⁱⁿᵗᵏᵀ", strict=True))


def to_terminal_markdown(card: str) -> str:
    r"""Write Markdown without MyST's directives and roles, and with formulas in Unicode.

    Args:
        card: Text of a card.

    Example:
        >>> print(to_terminal_markdown(r"{class}`~lightning_sgd.MaSS` needs $\eta_1 \le 1$."))
        `MaSS` needs `η₁ ≤ 1`.
    """
    parts: list[str] = []
    end = 0
    for block in BLOCK.finditer(card):
        parts += [_prose(card[end : block.start()]), _block(block)]
        end = block.end()
    return "".join([*parts, _prose(card[end:])])


def formula(tex: str) -> str:
    r"""Write a formula in Unicode, as far as that goes without a typesetter.

    Args:
        tex: The formula in TeX.

    Example:
        >>> print(formula(r"\gamma = \frac{1-\alpha}{1+\alpha},\quad w_{t+1} = u_t - \tilde\kappa^2 g_t"))
        γ = (1-α)/(1+α),  wₜ₊₁ = uₜ - κ̃² gₜ
    """
    text = re.sub(
        r"\\(?:begin|end)\{[\w*]+\}|\\[!,;]|\\\\|&|\\(?:mathrm|mathbb|mathbf|text)\b", "", tex
    )
    text = re.sub(r"\\([A-Za-z]+)", _symbol, text.replace(r"\|", "‖"))
    text = re.sub(r"\\(tilde|hat|bar) ?(?:\{(\w)\}|(\w))", _accented, text)
    text = re.sub(r"([_^])(?:\{([^{}]*)\}|([^\s\\{}]))", _script, text)
    text = re.sub(
        r"\\frac\{([^{}]*)\}\{([^{}]*)\}", lambda m: f"{_group(m[1])}/{_group(m[2])}", text
    )
    lines = (line.strip() for line in re.sub(r"[{}]", "", text).splitlines())
    return "\n".join(line for line in lines if line)


def _prose(text: str) -> str:
    text = IMAGE.sub(r"*Picture: \1.*", INVISIBLE.sub("", text))
    return INLINE.sub(_inline, text)


def _inline(match: re.Match[str]) -> str:
    if match["math"] or match["role"] == "math":
        return f"`{formula(match['math'] or match['text'])}`"
    if match["role"]:
        return f"`{match['text'].partition(' <')[0].rpartition('.')[2]}`"
    return match[0]


def _block(block: re.Match[str]) -> str:
    directive, body = block["directive"], block["body"]
    if block["fence"] == "$$" or directive == "math":
        return f"```text\n{formula(INVISIBLE.sub('', body))}\n```"
    if directive in CODE:
        return f"```{block['info'].strip() or 'python'}\n{INVISIBLE.sub('', body)}```"
    if directive is None and block["fence"].startswith("`"):
        return block[0]
    return f"**{(directive or 'note').capitalize()}.** {to_terminal_markdown(body).strip()}\n"


def _symbol(command: re.Match[str]) -> str:
    name = command[1]
    if name in {"frac", "tfrac", "dfrac"}:
        return r"\frac"
    if name in ACCENTS:
        return command[0]
    size = "CAPITAL" if name[0].isupper() else "SMALL"
    try:
        return SYMBOLS.get(name) or unicodedata.lookup(f"GREEK {size} LETTER {name.upper()}")
    except KeyError:
        return "" if name in SYMBOLS else name


def _accented(match: re.Match[str]) -> str:
    return (match[2] or match[3]) + ACCENTS[match[1]]


def _script(match: re.Match[str]) -> str:
    """Write a small letter where Unicode has all that is needed, else the mark with brackets."""
    text = match[2] or match[3] or ""
    letters = LOWERED if match[1] == "_" else RAISED
    if set(text) <= set(letters):
        return "".join(letters[letter] for letter in text)
    return f"{match[1]}{_group(text)}"


def _group(text: str) -> str:
    return text if text.isalnum() else f"({text})"
