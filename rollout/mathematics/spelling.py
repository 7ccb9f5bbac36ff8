"""One spelling for what people and models write in many: LaTeX's variants, typed formulas, Unicode.

`MARK_OPEN` and `MARK_CLOSE` stand around what was in \\text{}, and `MONEY` for a dollar sign that means money.
"""

# ruff: noqa: RUF001  (characters that people type are the subject)

import re

MARK_OPEN, MARK_CLOSE, MONEY = "\ue001", "\ue002", "\ue003"
CURRENCIES = {MONEY: "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹"}

_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_INLINE = re.compile(r"(?<!\\)\$(?=\S)([^$]*?)(?<=[^\s\\])\$(?!\d)")
_TEXT = re.compile(
    r"\\(?:text|textbf|textrm|textit|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|bf|rm|emph|"
    r"operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_ACCENT = re.compile(r"\\(?:mathbf|mathrm|mathit|bm|boldsymbol|hat|displaystyle)\s*\{([a-zA-Z])\}")
_SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]ig{1,2}[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm)(?![a-zA-Z])\.?"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:!> ]|quad(?![a-z])|qquad(?![a-z])|enspace|thinspace|[hv]space\*?\{[^{}]*\})|~")
_FUNCTION_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|lcm|max|min|det"
_TYPED_NAME = re.compile(
    rf"(?<![\\a-zA-Z])(?:pi(?![a-zA-Z])|(?:{_FUNCTION_NAMES})(?=\s*[(\d^_\\]|\s+[a-z]\b)|(?:sin|cos|tan|ln|log)(?=[a-z]$))"
)
_INFINITE = re.compile(r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])", re.IGNORECASE)
_ROOT_SIGN = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-z]))")
_TYPED_ROOT = re.compile(r"(?<![\\a-zA-Z])(sqrt|cbrt)\s*\(")
_POWER_OF_GROUP = re.compile(r"(?<=[\w)}])\^\s*\(([^()]*)\)")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = re.compile("[₀-₉]+")
_SUPERSCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPT_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CHARACTERS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63", "-"), "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "÷": r"\div ", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "∠": r"\angle ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ",
    "ω": r"\omega ", "…": r"\ldots ", "⟨": r"\langle ", "⟩": r"\rangle ", "−": "-", "′": "'", "“": '"', "”": '"',
    **dict.fromkeys("\xa0\u2009\u202f\u2007\u2002\u2003\u200a\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f", ""),
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
    **{chr(0xFF01 + n): chr(0x21 + n) for n in range(94)},
}  # fmt: skip
_UNIT = rf"{MARK_OPEN}[^{MARK_CLOSE}]*{MARK_CLOSE}(?:\s*\^\s*\{{?-?\d\}}?)?"
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\{?\s*(\w+)\s*\\choose\s*(\w+)\s*\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"\(?\s*\\[pb]?mod\s*\{?\s*(\w+)\s*\}?\s*\)?|\(\s*mod\s+(\w+)\s*\)"), r"\\pmod{\1\2}"),
    (re.compile(rf"\\frac\s*\{{\s*({_UNIT})\s*\}}\s*\{{\s*({_UNIT})\s*\}}"), r" \1/\2"),
    (re.compile(r"\\dbinom|\\tbinom"), r"\\binom"),
    (re.compile(r"\\(?:le|leq|leqslant|leqq)(?![a-zA-Z])|<="), r"\\le "),
    (re.compile(r"\\(?:ge|geq|geqslant|geqq)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:ne|neq)(?![a-zA-Z])|!=|\\not\s*="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])"), r"\\approx "),
    (re.compile(r"\\(?:infin|infinity)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![a-zA-Z])"), "["),
    (re.compile(r"\\rbrack(?![a-zA-Z])"), "]"),
    (re.compile(r"\\(?:land|wedge)(?![a-zA-Z])"), " and "),
    (re.compile(r"\\(?:lor|vee)(?![a-zA-Z])"), " or "),
    (re.compile(r"\\[lr]vert(?![a-zA-Z])"), "|"),
    (re.compile(r"\\(?:varnothing|empty)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\(?:R|Reals|reals)(?![a-zA-Z])|\\mathbf\{R\}|\\mathbb\s*R(?![a-zA-Z])"), r"\\mathbb{R}"),
    (re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree|∘)\s*\}?|\\degrees?(?![a-zA-Z])|\\textdegree"), r"^\\circ "),
    (re.compile(r"\\backslash(?![a-zA-Z])|\\smallsetminus"), r"\\setminus "),
    (re.compile(r"\\lg(?![a-zA-Z])"), r"\\log "),
    (re.compile(r"\\log\s*_\s*\{?\s*e\s*\}?(?![a-zA-Z])"), r"\\ln "),
    (re.compile(r"\\(?:dots|cdots|dotsc)(?![a-zA-Z])|\.\.\."), r"\\ldots "),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"(?<=[\w)}])\s*\*\*\s*(?=[-\w({\\])"), "^"),
    (re.compile(r"(?<=\d)\s*\{\s*([,.])\s*\}\s*(?=\d)"), r"\1"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), r"\\times "),
)
_BOLD = re.compile(r"(?<![\w)}*])\*\*(?=[^\s*])([^*\n]+?)(?<=\S)\*\*(?![\w({*])")
_BRACKETS = re.compile(r"\\[{}]|\\[lr]angle(?![a-zA-Z])|\\(?:begin|end)\{[a-zA-Z]*\*?\}|[()\[\]{}]")
_OPENING = ("(", "[", "{", r"\{", r"\langle")


def normal(text: str) -> str:
    """text in the spelling that `reading` knows, without what stands around the whole and carries no meaning."""
    text = unwrapped(without_bold(text)).replace(r"\$", MONEY)
    text = _INLINE.sub(r" \1 ", text).replace("$", MONEY)
    text = re.sub(r"\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]", " ", text) if "\\begin" not in text else text
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPT_DIGITS)}}}", text)
    text = _SUBSCRIPTS.sub(lambda match: f"_{{{match[0].translate(_SUBSCRIPT_DIGITS)}}}", text)
    text = _ROOT_SIGN.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3]}}}", text)
    text = "".join(_CHARACTERS.get(character, character) for character in text)
    text = _SIZES.sub("", _ACCENT.sub(r"\1", text))
    text = _TEXT.sub(_marked, text)
    text = re.sub(r"(?<=\d)\s*\\!\s*,|(?<=\d),\s*\\!\s*(?=\d)", ",", text)
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", ",", text)
    text = _SPACES.sub(" ", text)
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    text = _typed_roots(text)
    text = _TYPED_NAME.sub(lambda match: f"\\{match[0]} ", _INFINITE.sub(r"\\infty ", text))
    text = _POWER_OF_GROUP.sub(r"^{\1}", text)
    return unwrapped(re.sub(r"\s+", " ", text))


def unwrapped(text: str) -> str:
    """Without delimiters of mathematics, boxes or braces around the whole, and without a full stop."""
    while True:
        before, text = text, text.strip()
        if text.endswith((".", ";", ",")) and not text.endswith(("\\.", "\\;", "\\,", "..")):
            text = text[:-1].rstrip()
        boxed = _BOX.match(text)
        if boxed and end_of_group(text, boxed.end()) == len(text) - 1:
            text = text[boxed.end() : -1]
        if text.startswith("{") and end_of_group(text, 1) == len(text) - 1:
            text = text[1:-1]
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inner and opening not in inner:
                text = inner
                break
        if text == before:
            return text


def without_bold(text: str) -> str:
    """Without Markdown's signs around words and formulas."""
    return _BOLD.sub(r"\1", text)


def plain(text: str) -> str:
    """A normal text without the marks."""
    return re.sub(r"\s+", " ", text.replace(MARK_OPEN, " ").replace(MARK_CLOSE, " ")).strip()


def spelled(text: str) -> str:
    """Of a normal text: what two texts share that differ in spaces alone."""
    return re.sub(r"\s+(?=[^\w\s,.])|(?<=[^\w\s,.])\s+", "", plain(text))


def end_of_group(text: str, start: int) -> int | None:
    """Where the brace closes that was opened before `start`."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.start()
    return None


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between separators that stand in no bracket."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if bracket := _BRACKETS.match(text, position):
            opens = bracket[0] in _OPENING or bracket[0].startswith(r"\begin")
            depth = depth + 1 if opens else max(0, depth - 1)
            position = bracket.end()
        elif depth == 0 and (found := separator.match(text, position)):
            parts.append(text[start:position])
            start = position = max(found.end(), position + 1)
        else:
            position += 1
    return [*parts, text[start:]]


def _marked(match: re.Match[str]) -> str:
    """`and`, `or` and punctuation in \\text{} join mathematics; anything else is text."""
    inner = match[1].strip()
    if inner.casefold() in ("and", "or", ", and", ", or", ",", ";", "if", ""):
        return f" {inner} "
    if match[0].startswith(r"\operatorname") and re.fullmatch(_FUNCTION_NAMES, inner):
        return rf"\{inner} "
    if len(inner) == 1 and inner in "ei" and "math" in match[0]:
        return inner
    return f"{MARK_OPEN}{inner}{MARK_CLOSE}"


def _typed_roots(text: str) -> str:
    while found := _TYPED_ROOT.search(text):
        depth, position = 1, found.end()
        while position < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[position], 0)
            position += 1
        if depth:
            return text
        degree = "[3]" if found[1] == "cbrt" else ""
        inner = text[found.end() : position - 1]
        text = rf"{text[: found.start()]}\sqrt{degree}{{{inner}}}{text[position:]}"
    return text
