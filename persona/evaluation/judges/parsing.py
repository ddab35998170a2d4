"""Parsers of replies: a number on a scale, a choice, yes or no, JSON; exactly one answer, or Unreadable with a reason.

Judges and models wrap their answers in markdown, reasoning, quotes, and full-width characters; these are looked
through. Nothing is guessed: an answer off the scale, two different answers, or none at all raise `Unreadable`. Answers
are looked for in this order, and the first place that holds one decides:

1. the whole reply is the answer ("**4**", "(b)", "4/5");
2. a final answer is announced ("the final score is 4", "最终答案：B", "[[4]]", "\\boxed{B}", "<answer>B</answer>");
3. an answer is announced ("Score: 4", "the answer is B");
4. the reply begins with the choice ("B) because ..."), or a line holds nothing but the answer;
5. running text gives it ("I'd say 4", "I prefer response A", "not B but A") and mentions no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import json_repair

Answer = TypeVar("Answer")


class Unreadable(Exception):
    """Raised by a parser: the reply holds no answer, or more than one; the message says which."""


# --- what is looked through ---------------------------------------------------------------------------------------
# Full-width ASCII, the ideographic space and full stop, typographic quotes, CJK brackets. Not NFKC: it would make "4½"
# into "41⁄2".
_WIDTH: dict[int, int | str] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_WIDTH |= zip(map(ord, "　。“”‘’「」『』《》【】−"), ' .""\'\'""""""[]-', strict=True)
_TAGS = r"think|thinking|thought|reasoning|analysis|scratchpad"


def strip_reasoning(text: str) -> str:
    """`text` without what a reasoning model thinks aloud: `<think>…</think>`, and its like, and other channels.

    An unclosed tag hides everything behind it; a closing tag alone (the prompt held the opening one) all before it.
    """
    text = re.sub(rf"<({_TAGS})>.*?</\1\s*>", "", text, flags=re.S | re.I)
    text = re.split(rf"</(?:{_TAGS})\s*>", text, flags=re.I)[-1]
    text = re.split(rf"<(?:{_TAGS})>", text, flags=re.I)[0]
    if "<|channel|>" in text:
        final = text.rpartition("<|channel|>final<|message|>")
        text = re.split(r"<\|(?:end|return)\|>", final[2])[0] if final[1] else ""
    return text.strip()


def strip_markdown(text: str) -> str:
    """`text` without fences (what they hold stays), emphasis, code marks, headings, quotes, bullets, and bold tags."""
    text = re.sub(r"^[ \t]*(?:```|~~~)[^\n`]*$", "", text, flags=re.M)
    text = re.sub(r"^[ \t]*(?:(?:>|#{1,6}(?=\s)|[-*+•](?=\s))[ \t]*)+", "", text, flags=re.M)
    for _ in range(3):  # one in another
        text = re.sub(r"<(b|i|strong|em|code|u|mark)>((?:(?!<\1>).)*?)</\1>", r"\2", text, flags=re.S)
    text = text.replace("**", "").replace("__", "").replace("`", "").replace("~~", "")
    text = re.sub(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w_])_(?=\S)([^_\n]+?)(?<=\S)_(?![\w_])", r"\1", text)
    return text.strip()


def _clean(text: str) -> str:
    """The visible answer in plain characters. Raises Unreadable when nothing is left."""
    if not text.strip():
        raise Unreadable("the reply is empty")
    text = strip_markdown(strip_reasoning(text).translate(_WIDTH))
    if not text:
        raise Unreadable("the reply holds no answer outside its reasoning")
    return text


# --- where answers are announced ----------------------------------------------------------------------------------
_NOUN = (
    r"(?:scores?|ratings?|grades?|marks?|points|answers?|choices?|options?|selection|selected|verdict|decision|winner"
    r"|preference|preferred|label|stance|judge?ment|conclusion|prediction|result|output"
    r"|评分|得分|分数|打分|答案|选择|选项|结论|判断|结果)"
)
_SAYS = r"""(?:["']?\s*(?:[:=|→]|->|=>|\b(?:is|are|was|were|would\s+be|should\s+be)\b|[为是]))"""
_FINAL = (
    rf"(?:\bfinal\s+(?:{_NOUN}|number)\b|最[终后]的?{_NOUN}"
    r"|\[\[|\\boxed\s*\{|<(?:answer|score|rating|choice|verdict)>)"
)
_ANNOUNCED = rf"(?:(?<![A-Za-z]){_NOUN}\s*(?:\([^()\n]*\))?\s*{_SAYS})"
_CALLED = (
    r"(?:\b(?:option|response|answer|choice|assistant|candidate|letter|model|reply|statement)"
    r"|选项|回答|答案|选择|选|回复)"
)
# What may stand between an announcement and the answer. A dash only before a space, so that -4 keeps its sign.
_GAP_MARKS = r"""[\s:=>|→"'\[\](){}<$\\为是]|[-–—](?=\s)"""
_GAP_WORDS = (
    r"\b(?:is|are|was|were|be|would|should|(?-i:a|an)|the|of|at|therefore|thus|hence|definitely|clearly|exactly|equal|to"
    r"|boxed|text)\b(?=[\s:\"'(\[{<\\])"
)
_GAP = rf"(?:{_GAP_MARKS}|{_GAP_WORDS})"
# "I don't think the answer is B", "if the answer is B"
_DOUBTED = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\bdoubt|\bunlikely|\bif|\bwhether|\bunless|\bsuppose|不是|如果)\s*(?:(?!but\b)\w+\s+){0,5}$",
    re.I,
)


def _announcements(text: str, marker: str, behind: str) -> list[re.Match[str]]:
    """Every place where `marker` and then `behind` stand and nothing before them takes it back."""
    found = re.finditer(marker + behind, text, flags=re.I)
    return [match for match in found if not _DOUBTED.search(text[max(0, match.start() - 60) : match.start()])]


def _agreed(found: Iterable[Any], what: str) -> Any:
    """The one value found. Raises Unreadable when there are several."""
    values = list(dict.fromkeys(found))
    if len(values) > 1:
        shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        raise Unreadable(f"several different {what}: {shown}")
    return values[0]


# --- numbers ------------------------------------------------------------------------------------------------------
_NUMBER_WORDS = {word: value for value, words in enumerate((
    "zero 零", "one 一", "two 二 两", "three 三", "four 四", "five 五", "six 六", "seven 七", "eight 八", "nine 九",
    "ten 十",
)) for word in words.split()}  # fmt: skip
_LATIN = "|".join(word for word in _NUMBER_WORDS if word.isascii())
_CHINESE = "".join(word for word in _NUMBER_WORDS if not word.isascii())
_BARE = r"[-+]?[0-9]+(?:[.,][0-9]+)*"
_BEFORE = r"(?<![0-9A-Za-z_½¼¾])(?<![0-9A-Za-z_][-+.,/])"
_AFTER = r"(?![0-9A-Za-z_½¼¾²³])"
_NUMBER = re.compile(
    rf"{_BEFORE}(?:(?P<number>{_BARE}){_AFTER}|(?P<word>\b(?:{_LATIN})\b|[{_CHINESE}](?=\s*分|\s*[.!]?\s*$)))"
    rf"(?:\s*(?:/|(?:\b(?:points?|stars?)\s+)?\bout\s+of\b|\bof\b)\s*(?P<scale>[0-9]+(?:\.[0-9]+)?){_AFTER})?"
    rf"(?P<more>\s*(?:[-–—~,/&+*=]|\b(?:to|or|and)\b|[至到或])\s*[0-9]+)?",
    flags=re.I,
)
# What makes a number in running text the answer.
_GIVEN = re.compile(
    r"(?:\b(?:say|give|gives|gave|given|rate|rated|score|scored|grade|graded|assign|award|deserves?|earns?|rating|settle\s+(?:on|for))"
    r"\b[^.!?\n]{0,40}|[:=]\s*)$",
    flags=re.I,
)
_UNIT = r"(?:\s*(?:%|分|星|points?|stars?))?"


def _value(match: re.Match[str], low: float, high: float, whole: bool) -> float:
    """The number of a match, if it is one on the scale. Raises Unreadable."""
    shown = match.group().strip()[:40]
    if match["more"]:
        raise Unreadable(f"{shown!r} is more than one number")
    if match["word"]:
        value = float(_NUMBER_WORDS[match["word"].lower()])
    elif re.fullmatch(r"[-+]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?", match["number"]):
        value = float(match["number"].replace(",", ""))
    else:
        raise Unreadable(f"{match['number'][:40]!r} can be read in more than one way")
    if match["scale"] and float(match["scale"]) != high:
        raise Unreadable(f"{shown!r} is on another scale than {low:g} to {high:g}")
    if not low <= value <= high:
        raise Unreadable(f"{value:g} is not on the scale from {low:g} to {high:g}")
    if whole and value != int(value):
        raise Unreadable(f"{value:g} is no whole number")
    return value


def _marker(phrase: str) -> str:
    """A caller's phrase as a pattern: any case and spacing, commas optional, "is" or a colon at its end optional."""
    words = re.sub(r"\s*(?:\bis|[:：=])\s*$", "", phrase.strip(), flags=re.I).split()
    return r"\s+".join(re.escape(word.rstrip(",")) + (",?" if word.endswith(",") else "") for word in words)


def _read_number(text: str, low: float, high: float, after: str | None, whole: bool) -> float:
    text = _clean(text)

    def behind(marker: str) -> list[re.Match[str]]:
        starts = [found.end() for found in _announcements(text, marker, _GAP + "{0,40}+")]
        return [match for match in (_NUMBER.match(text, start) for start in starts) if match]

    def read(matches: Sequence[re.Match[str]]) -> float:
        return _agreed([_value(match, low, high, whole) for match in matches], "scores")

    alone = _NUMBER.fullmatch(re.sub(rf"{_UNIT}\W*$", "", text.strip(" \n\t\"'()[]{}<>$=:")))
    if alone:
        return read([alone])
    if after is not None:
        found = behind(_marker(after)) or behind(r"最[终后]的?(?:评分|得分|分数)")
        if not found:
            raise Unreadable(f"no number stands after {after!r}")
        return read(found)
    scale = rf"{_BEFORE}{low:g}\s*(?:[-–—~]|to|and|至|到)\s*{high:g}{_AFTER}|\b{high:g}[- ](?:point|star)(?=\s+scale)"
    found = behind(_FINAL) or behind(_ANNOUNCED)
    if not found:
        text = re.sub(scale, " ", text, flags=re.I)
        found = list(_NUMBER.finditer(text))
        given = [
            one for one in found if "/" in one.group() or _GIVEN.search(text[max(0, one.start() - 60) : one.start()])
        ]
        if found and not given:
            raise Unreadable("numbers are mentioned, none of them as the answer")
    if not found:
        raise Unreadable("no number")
    return read(found)


def parse_integer(text: str, low: int, high: int, after: str | None = None) -> int:
    """The whole number from `low` to `high` that a reply gives; "4/5", "4 out of 5", "four", "四分", "4.0" are read.

    With `after` ("final score is"; any case, markdown looked through) only a number behind that phrase counts, or a
    reply that is nothing but a number: reasoning that was cut off mentions numbers too. Raises Unreadable for numbers
    off the scale, with a fraction, on another scale ("8/10" for 1 to 5), several different ones, and none.
    """
    return int(_read_number(text, low, high, after, whole=True))


def parse_number(text: str, low: float, high: float, after: str | None = None) -> float:
    """As `parse_integer`, for numbers with a fraction."""
    return _read_number(text, low, high, after, whole=False)


# --- choices ------------------------------------------------------------------------------------------------------
_AUXILIARY = r"(?:is|was|are|were|does|do|did|has|would|can|could|should)"
_NEGATED = re.compile(
    r"(?:(?:\bnot|n't)(?:\s+(?:the|an?|be|to|choose|pick|select|prefer))*|\bnever|\bneither|\bnor|\bcannot|\brather\s+than"
    rf"|\binstead\s+of|\bunlike|不是?|并非|而非|非|不选)\s*(?:{_CALLED}\s*)?[\"'(\[]*$",
    flags=re.I,
)
_DENIED = re.compile(
    rf"[\"')\]]*\s*(?:\b{_AUXILIARY}(?:n't\b|\s+not\b(?!\s+(?:\w+\s+)?better)"
    r"|\s+(?:\w+ly\s+)?(?:wrong|incorrect|false|worse|inferior|weaker|bad)\b)|\bcannot\b|不对|不是|不好|错)",
    flags=re.I,
)
_CHOSEN = re.compile(
    r"(?:\b(?:choose|chose|pick|prefer|select|selected|favou?r|go(?:es|ing)?\s+with|opt\s+for|vote\s+for|say|is|so|thus|therefore|hence)[,:]?\s+"
    r"|选择?|是)"
    rf"\s*(?:the\s+)?(?:{_CALLED}\s*)?[\"'(\[]*$",
    flags=re.I,
)
_BUT = re.compile(rf"(?:\bbut|而是?)\s*(?:{_CALLED}\s*)?[\"'(\[]*$", flags=re.I)
_WINS = re.compile(
    r"[\"')\]]*\s*(?:\bwins\b|\b(?:is|was)\s+(?:(?:\w+ly|the|much|my)\s+)*"
    r"(?:better|best|correct|right|preferable|preferred|superior|stronger|strongest|winner|choice|answer)\b|更好|最好|正确)",
    flags=re.I,
)
_GOES_ON = set("because since as due over rather not for which is was has does but".split())
_ALSO = re.compile(
    rf"[\"')\]]*\s*(?:[,/&+或和与、]|\b(?:and|or)\b)\s*(?:\b(?:also|both)\b\s*)?(?:{_CALLED}\s*)?[\"'(\[]*", flags=re.I
)


class _Choices(Generic[Answer]):
    """Spellings of answers, found in a text in any case, the longest first, never inside a word."""

    def __init__(self, spellings: Mapping[str, Answer]) -> None:
        self.answers = {self._key(spelling): answer for spelling, answer in spellings.items()}
        if not spellings or len(self.answers) != len(spellings):
            raise ValueError(f"choices have to be there, and to differ in more than case: {list(spellings)}")
        longest_first = sorted(self.answers, key=len, reverse=True)
        one = "|".join(r"\s+".join(map(re.escape, key.split())) for key in longest_first)
        whole = r"(?<![A-Za-z0-9_])(?<!\b(?:non|dis)-)(?<!\bun-)(?<![0-9][.,])"
        self.one = rf"{whole}(?P<one>{one})(?![A-Za-z0-9_]|[-']\w|[.,][0-9])"

    @staticmethod
    def _key(text: str) -> str:
        return " ".join(text.translate(_WIDTH).casefold().split())

    def answer(self, match: re.Match[str]) -> Answer:
        return self.answers[self._key(match["one"])]

    def find(self, text: str) -> list[re.Match[str]]:
        return list(re.finditer(self.one, text, flags=re.I))


def _letter(match: re.Match[str]) -> bool:
    """Letters and numbers stand in a text for other reasons as well."""
    return match["one"].isascii() and (len(match["one"]) == 1 or match["one"].isdigit())


def _stands_for_itself(match: re.Match[str], named: bool = False) -> bool:
    """Whether a letter is one: not the article "a", not the pronoun "I"."""
    following = re.match(r"[ \t]+(\w+)", match.string[match.end("one") :])
    if not _letter(match) or not following or following[1].lower() in _GOES_ON:
        return True
    return not match["one"].islower() and (named or match["one"] not in "AI")


def _one_answer(known: _Choices[Answer], matches: Sequence[re.Match[str]]) -> Answer:
    """The answer all matches give. Raises Unreadable when they differ, or one goes on with "or B"."""
    answers = [known.answer(match) for match in matches]
    for match in matches:
        also = _ALSO.match(match.string, match.end("one"))
        other = re.compile(known.one, re.I).match(match.string, also.end()) if also else None
        if other and _stands_for_itself(other) and not (other["one"].islower() and _letter(other)):
            answers.append(known.answer(other))
    return _agreed(answers, "answers")


def _read_choice(text: str, known: _Choices[Answer]) -> Answer:
    called = rf"\W*+(?:{_CALLED}\W*+)?"
    alone = re.fullmatch(rf"{called}{known.one}\W*", text, flags=re.I)
    if alone:
        return known.answer(alone)
    for marker in (_FINAL, _ANNOUNCED):
        found = _announcements(text, marker, rf"(?:{_GAP}|{_CALLED}){{0,40}}?{known.one}")
        announced = [match for match in found if _stands_for_itself(match)]
        if announced:
            return _one_answer(known, announced)
    lines = [line for line in text.splitlines() if line.strip()]
    # "Response A: ..." opens a discussion, not a verdict; of several lines, so does "Option A: ..."
    prefix = r"\W*+(?:(?:\b(?:option|choice|letter)\b|选项|选择|选)\W*+)?" if len(lines) == 1 else r"\W*+"
    opening = rf"{prefix}{known.one}[\"')\]]*\s*(?:[.:;,!)](?=\s|$)|[-–—]\s|$)"
    opened = [re.match(opening, line, flags=re.I) for line in lines]
    whole = [re.fullmatch(rf"{prefix}{known.one}\W*", line, flags=re.I) for line in lines]
    given = [m for m in (opened[0], *whole) if m and not _DENIED.match(m.string[m.end("one") :].lstrip(".:;,!)"))]
    if given:
        # "Yes, but no."
        ending = re.search(rf"{known.one}[.!?]*$", lines[0], flags=re.I) if opened[0] else None
        others = [match for match in (*opened, ending) if match and not (match is ending and _letter(match))]
        return _one_answer(known, [*given, *others])
    if "no" in known.answers:
        raise Unreadable("no answer is announced")
    return _mentioned(text, known)


def _mentioned(text: str, known: _Choices[Answer]) -> Answer:
    """The choice that running text makes, where no other is so much as mentioned. Raises Unreadable.

    A word is made by being said ("I partially agree with that"); a letter or number has to be chosen or win.
    """
    chosen, mentioned, denied = [], [], 0
    for match in known.find(text):
        start = match.start("one")
        before, behind = text[max(0, start - 60) : start], text[match.end("one") :][:60]
        called = re.search(rf"{_CALLED}\s*[\"'(\[]*$", before, flags=re.I)
        stands, opens = _stands_for_itself(match, bool(called)), text[:start].strip()[-1:] in ".!?"
        bracketed = before[-1:] in ("(", "[") and behind[:1] in (")", "]")
        if _NEGATED.search(before) or _DENIED.match(behind):
            denied += 1
        elif not _DOUBTED.search(before) and (
            not _letter(match)
            or (stands and _CHOSEN.search(before))
            or (denied and stands and _BUT.search(before))
            or (_WINS.match(behind) and (called or not match["one"].islower()))
            or (bracketed and not re.search(r"\w", text[match.end("one") :]))  # the last word: "... it is yours (c)."
        ):
            chosen.append(match)
        elif bracketed or (called and stands) or (match["one"].isupper() and match["one"] != "I" and not opens):
            mentioned.append(match)
    if not chosen:
        raise Unreadable("only choices that are not made are named" if denied else "no choice is made")
    return _agreed([known.answer(match) for match in [*chosen, *mentioned]], "answers")


def parse_choice(text: str, choices: Sequence[str]) -> str:
    """The one of `choices` (letters, numbers, words, phrases) that a reply gives, as spelled in `choices`.

    "the answer is not B but A" gives A; "not A" gives nothing; the article "a" is no letter, nor is a letter inside a
    word. Raises Unreadable when no choice, or more than one, is given.
    """
    return _read_choice(_clean(text), _Choices({choice: choice for choice in choices}))


_YES_NO = {
    **dict.fromkeys(("yes", "true", "yeah", "yep", "是", "是的", "对", "正确"), True),
    **dict.fromkeys(("no", "false", "nope", "否", "不是", "不", "不对", "错误"), False),
}


def parse_yes_no(text: str) -> bool:
    """Whether a reply says yes (true, 是) or no (false, 否), where it is announced, begins or stands on its own line.

    A "no" in running text ("there is no doubt") is no answer. Raises Unreadable.
    """
    return _read_choice(_clean(text), _Choices(_YES_NO))


# --- JSON ---------------------------------------------------------------------------------------------------------
_JSON_START = re.compile(r"""\{(?=\s*(?:["'}]|\w+["']?\s*:))|\[(?=\s*(?:["'\[\]{]|-?[0-9]|true|false|null))""")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        if any(key == other and value != different for other, different in pairs):
            raise Unreadable(f"the JSON gives {key!r} twice, differently")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise Unreadable(f"the JSON holds {name}")


def _read_json(text: str, kind: type, called: str) -> Any:
    if not text.strip():
        raise Unreadable("the reply is empty")
    try:
        found = _all_json(strip_reasoning(text))
    except RecursionError:
        raise Unreadable("the JSON is nested too deeply") from None
    if not found:
        raise Unreadable("no JSON")
    fitting = [value for value in found if isinstance(value, kind)]  # "[1]" beside an object is a footnote
    if not fitting:
        raise Unreadable(f"the JSON is not {called}")
    if len(fitting) > 1:
        raise Unreadable(f"{len(fitting)} different pieces of JSON")
    return fitting[0]


def _all_json(text: str) -> list[Any]:
    """Every different object or list in the text, repaired where it has to be."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    found: list[Any] = []
    start = _JSON_START.search(text)
    while start:
        try:
            value, end = decoder.raw_decode(text, start.start())
        except json.JSONDecodeError:
            end = text.rfind("}" if start.group() == "{" else "]") + 1
            if end <= start.start():
                raise Unreadable("the JSON is cut off") from None
            value = json_repair.loads(text[start.start() : end])
        if value not in found:
            found.append(value)
        start = _JSON_START.search(text, end)
    return found


def parse_json(text: str) -> dict[str, Any]:
    """The one JSON object of a reply, in a fence or between sentences; quotes and commas gone wrong are repaired.

    Raises Unreadable for none, for several different ones, for one cut off, for a key given twice, for a list.
    """
    return _read_json(text, dict, "an object")


def parse_json_list(text: str) -> list[Any]:
    """The one JSON list of a reply, as `parse_json`."""
    return _read_json(text, list, "a list")
