"""Where the answer stands in a response: in tags, in a box, or at the end of what is said."""

# ruff: noqa: RUF001  (characters that people type are the subject)

import re

from lockstep.engine.text.answer_tags import ANSWER_CLOSE, ANSWER_OPEN

LONGEST = 2000  # characters of an answer; the last ones of a response without tags and boxes
_BOXED_WORD = re.compile(r"\\boxed\s+([^\s$\\{}]+)")
_GROUPS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_HOPE = re.compile(r"\s*I hope (?:it|this) is correct\.?\s*$", re.IGNORECASE)
_FINAL = re.compile(
    r"(?:####|\b(?:answers?|solutions?|results?)\b(?:[^.:\n=]{0,60}?)(?:\bis\b|\bare\b|:|=)(?:\s*:)?|\banswer\b\s*:?)"
    r"[ \t*]*",
    re.IGNORECASE,
)
_ANNOUNCING = re.compile(
    r"(?<![a-zA-Z])(?:is|are|was|were|be|equals?|costs?|gets?|gives?|has|have|makes?|makes|earns?|pays?|needs?|takes?|yields?|"
    r"becomes?|so|thus|hence|therefore|spends?|saves?|sells?|reaches|choose|pick|select)(?![a-zA-Z])(?:\s+(?:equal\s+to|exactly|only|a\s+total\s+of|in\s+total))?[\s:]*|"
    r"(?<![<>!\\:=])=(?!=)|:\s|\\approx|≈"
)
_SENTENCE_END = re.compile(r"(?<=[^\s.][.!?])\s+(?=[A-Z*$\\(])|\n+")
_NEGATED = re.compile(
    r"\b(?:not|never|neither|nor|cannot|or|either|between|except|unless|wrong|incorrect|impossible|unknown|maybe|perhaps|possibly|"
    r"unclear|guess|at\s+least|at\s+most|more\s+than|less\s+than|fewer\s+than|greater\s+than|up\s+to|any|all|no\s+(?:idea|answer|solution))\b|n't\b",
    re.IGNORECASE,
)
_MATHEMATICS = re.compile(r"\$\$.+?\$\$|(?<!\\)\$(?=\S)[^$]+?(?<=\S)\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
_JOINED_MATHEMATICS = re.compile(r"\s*(?:,|,?\s*\b(?:and|or)\b)\s*")
_NUMBER = re.compile(
    r"(?<![\w.,:/\\^_{(|-])(?:-\s*)?(?:\\?[$€£¥₹])?-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.?|\.)(?:(?<=\.)\d+)?(?:/\d+)?"
    r"(?:\s*\\?%)?(?![\w/^_{}\\|)]|[.,:-]\d|\s*[-+*/=<>^×·÷]\s*[\d(a-z\\])"
)
_IN_ROW = re.compile(r"[\d\])}][\s,;]*$")
_ASIDE = re.compile(r",\s+[a-zA-Z]{2}[^\d$\\]*$")  # behind the answer
# Words that make another number of one, or a name.
_CHANGED_BEFORE = re.compile(
    r"\b(?:minus|negative|plus|times|over|by|half|twice|double|triple|root|(?<!total )of|than|log|ln|sin|cos|tan|sqrt|"
    r"problem|question|page|step|chapter|version|example|exercise|case|no|number|to|mod|power|and)\W*$",
    re.IGNORECASE,
)
_CHANGED_AFTER = re.compile(
    r"\W*(?:squared|cubed|factorial|percent|over|minus|plus|times|more|less|fewer|or|out|to|mod|divided|power|th|of)\b",
    re.IGNORECASE,
)
_AT_END = re.compile(r"(?<![\])},])\s((?:[(\[][^()\[\]]*,[^()\[\]]*[)\]])|\d{1,2}:\d\d(?:\s*[aApP]\.?[mM])?)[.!\s]*$")
_RIGHT_CHOICE = re.compile(
    r"^\W*(?:thus|so|hence|therefore|the)?[\s,]*(?:(?:correct|right)\s+)?(?:option|choice|answer)?\s*(\(?[A-J]\)?)\s+is\s+(?:the\s+)?(?:correct|right|answer)\b(?:\s+(?:answer|option|choice|one))?\W*$",
    re.IGNORECASE,
)


def tagged(response: str) -> str | None:
    """As tasks.answers.extract_answer: the text of the last complete <answer>...</answer>."""
    start = response.rfind(ANSWER_OPEN, 0, max(0, response.rfind(ANSWER_CLOSE)))
    if start < 0:
        return None
    start += len(ANSWER_OPEN)
    return response[start : response.index(ANSWER_CLOSE, start)].strip()


def boxed(text: str) -> str | None:
    """What the complete \\boxed{} holds that opens last."""
    open_groups: list[int | None] = []  # where the content of a box begins; None for another group
    last: tuple[int, int] | None = None
    for match in _GROUPS.finditer(text):
        if match[0].endswith("{") and match[0] != r"\{":
            open_groups.append(match.end() if len(match[0]) > 1 else None)
        elif match[0] == "}" and open_groups and (start := open_groups.pop()) is not None:
            last = max(last or (0, 0), (start, match.start()))
    if last is None:
        words = _BOXED_WORD.findall(text)
        return words[-1] if words else None
    return text[slice(*last)]


def closing_parts(text: str) -> tuple[bool, list[str]]:
    """Parts of the last sentence that says something, the likeliest first: each may be the answer as a whole.

    Behind `the answer is`, else behind the last verb, colon or equals sign; then the last formula. Nothing is taken
    out of a sentence that denies or doubts.
    """
    text = _HOPE.sub("", text.strip())
    announced = next(reversed([*_FINAL.finditer(text)]), None)
    tail = _SENTENCE_END.split(text[announced.end() :].strip())[0].strip() if announced else ""
    parts = [tail] if tail else []
    if tail and not _NEGATED.search(tail) and (said := _ASIDE.sub("", tail)) != tail:
        parts.append(said)
    sentence = tail or _last_sentence(text)
    if choice := _RIGHT_CHOICE.match(sentence):
        return True, [choice[1]]
    parts += _announced_parts(sentence)
    return bool(announced and parts), parts


def _last_sentence(text: str) -> str:
    """The last with mathematics in it, else the last with words."""
    sentences = [part.strip() for part in _SENTENCE_END.split(text) if re.search(r"\w", part)]
    last = sentences[-1] if sentences else ""
    return next((part for part in reversed(sentences) if re.search(r"\d|\$|\\|=", part)), last)


def _announced_parts(sentence: str) -> list[str]:
    """What stands behind each verb, colon and equals sign, the last first; behind the last alone of a denial."""
    formulas = [match.span() for match in _MATHEMATICS.finditer(sentence)]
    ends = [
        match.end()
        for match in _ANNOUNCING.finditer(sentence)
        if not any(start < match.start() < end for start, end in formulas)
    ]
    parts = [sentence[end:].strip() for end in (ends[-1:] if _NEGATED.search(sentence) else reversed(ends))]
    return [part for part in parts if part]


def last_expression(text: str) -> str | None:
    """The last formula, or number with what belongs to it, of a sentence that neither denies nor doubts."""
    sentence = next((p for p in reversed(_SENTENCE_END.split(text)) if re.search(r"\d|\$|\\\(", p)), "")
    if _NEGATED.search(sentence):
        return None
    formulas = list(_MATHEMATICS.finditer(sentence))
    if formulas and not re.search(r"\d", sentence[formulas[-1].end() :]):
        return _last_formulas(sentence, formulas)
    if whole := _AT_END.search(sentence):
        return whole[1]
    return _last_number(_MATHEMATICS.sub(" ", sentence))


def _last_formulas(sentence: str, formulas: list[re.Match[str]]) -> str:
    """The last, with those before it that commas or words join to it."""
    first = len(formulas) - 1
    while first and _JOINED_MATHEMATICS.fullmatch(sentence[formulas[first - 1].end() : formulas[first].start()]):
        first -= 1
    return sentence[formulas[first].start() : formulas[-1].end()]


def _last_number(sentence: str) -> str | None:
    """Of a sentence without formulas; None where it is one of many, or words change it."""
    if re.search(r"\\[a-zA-Z]|\^", sentence):
        return None
    numbers = [match for match in _NUMBER.finditer(sentence) if re.search(r"\d", match[0])]
    if not numbers:
        return None
    before, after = sentence[: numbers[-1].start()], sentence[numbers[-1].end() :]
    if re.search(r"\d", after) or _IN_ROW.search(before):
        return None  # not the last, or one of many
    if _CHANGED_BEFORE.search(before) or _CHANGED_AFTER.match(after):
        return None
    return numbers[-1][0].strip()
