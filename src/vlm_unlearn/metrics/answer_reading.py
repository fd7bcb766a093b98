"""Reads the answers of models: the final answer, and in it yes or no, or a short text.

All benchmarks and judges read answers with this module, and option letters with `option_reading`. An answer that names
nothing, or several things, is unread: the functions return None for it. The published evaluators have rules of their
own, which `--official` reproduces.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_TAGS = "think|thinking|thought|thoughts|reasoning|analysis|scratchpad|reflection|summary|caption|seed:think"
# The marks that open and close a model's reasoning, without their first character: tags, Command A, gpt-oss and Gemma
# after "<", Magistral after "[", and Kimi after "◁".
_OPENING = (
    rf"(?<=<)(?:(?:{_TAGS})(?:\s[^<>\n]{{0,80}})?>|\|channel\|>\s*(?:analysis|commentary)\b"
    r"|\|channel>\s*(?:thought|analysis)\b|\|start_thinking\|>|\|begin_of_thought\|>)|(?<=\[)think\]|(?<=◁)think▷"
)
_CLOSING = (
    rf"(?<=<)(?:/(?:{_TAGS})\s*>|\|channel\|>\s*final\b[^<]{{0,40}}<\|message\|>|channel\|>|\|end_thinking\|>"
    r"|\|end_of_thought\|>)|(?<=\[)/think\]|(?<=◁)/think▷"
)
# A mark between backticks is quoted. The pattern starts with a set of characters, which makes the search fast.
_MARK = re.compile(rf"[<\[◁](?<!`.)(?:(?P<opening>{_OPENING})|(?P<closing>{_CLOSING}))", re.IGNORECASE)
# Marks in plain words: those of gpt-oss without its special tokens, and Granite's.
_WORD_MARKS = (
    ("analysis", re.compile(r"\Aanalysis(?=[A-Z])"), re.compile(r"assistantfinal(?=\S)")),
    (
        "here is my thought process:",
        re.compile(r"\Ahere is my thought process:", re.I),
        re.compile(r"here is my response:", re.I),
    ),
)
# Answers that end within an opening mark, such as "<thi".
_OPENING_MARKS = (
    *(f"<{tag}>" for tag in _TAGS.split("|")),
    *("[think]", "◁think▷", "<|channel|>analysis", "<|start_thinking|>", "<|begin_of_thought|>"),
)
MAX_MARK_LENGTH = 40  # characters of an answer that may be an incomplete mark
_END_TOKENS = re.compile(
    r"(?:\s*(?:</s>|<eos>|<pad>|<end_of_turn>|<end_of_utterance>|<\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|end"
    r"|return|eos|END_OF_TURN_TOKEN|END_RESPONSE)\|>|<｜end▁of▁sentence｜>|\[/?INST\]))+\s*\Z"
)
_START_TOKENS = re.compile(
    r"\A(?:\s*(?:<s>|<bos>|<\|im_start\|>(?:assistant)?|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|<\|START_RESPONSE\|>|<\|begin_of_text\|>|<\|message\|>))+"
)
UNFINISHED_REASONING = "the answer ends within the model's reasoning; raise generation.max_new_tokens"


def final_answer(text: str) -> str | None:
    """Returns an answer without the model's reasoning and without special tokens around it.

    Reasoning is the text between marks such as ``<think>`` and ``</think>``. A closing mark without an opening one ends
    reasoning that began in the prompt.

    Returns:
        The final answer, or None if the answer ends within its reasoning. A text without marks is returned unchanged.

    Example:
        ``final_answer("<think>A dog?</think>Yes")`` returns ``"Yes"``, and ``final_answer("<think>A dog")`` None.
    """
    for start, opening, closing in _WORD_MARKS:
        if text[: len(start)].lower() == start and opening.match(text):
            text = closing.sub("</think>", opening.sub("<think>", text))
    if "<" not in text and "[" not in text and "◁" not in text:
        return text
    pieces: list[str] = []
    position = 0
    is_open = False
    has_marks = False
    for match in _MARK.finditer(text):
        has_marks = True
        if match["opening"]:
            pieces += [] if is_open else [text[position : match.start()]]
            is_open = True
        elif is_open:
            is_open = False
        else:  # the opening mark was part of the prompt
            pieces.clear()
        position = match.end()
    head = text.strip().lower() if len(text) < MAX_MARK_LENGTH else ""
    if is_open or (len(head) > 1 and any(mark.startswith(head) and mark != head for mark in _OPENING_MARKS)):
        return None
    answer = "".join([*pieces, text[position:]]) if has_marks else text
    stripped = answer.strip()
    if stripped.endswith((">", "]")):
        stripped = _END_TOKENS.sub("", stripped)
    if stripped.startswith("<"):
        stripped = _START_TOKENS.sub("", stripped).lstrip()
    return stripped if has_marks or len(stripped) < len(answer.strip()) else text


_ANSWER_TAG = re.compile(
    r"<(answer|conclusion|final_answer|verdict)>(.*?)(?:</\1>|\Z)|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|bf|rm)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
_MARKUP = re.compile(
    r"[*`\"“”„«»]|</?(?:b|i|u|em|strong|code|p|span|mark|answer|final_answer|conclusion)>|\\[()\[\]]|\$"
)
_FENCE = re.compile(r"\A\s*```[a-z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_JSON_KEYS = ("final_answer", "answer", "option", "choice", "response", "prediction", "result")


def marked_answers(text: str) -> list[str]:
    """Returns the texts that an answer marks as its result: in a box, in ``<answer>``, or in a JSON object."""
    fenced = _FENCE.match(text)
    value = json_object(fenced[1] if fenced else text)
    if value is not None:
        values = [value[key] for key in _JSON_KEYS if key in value]
        return [str(item) for item in values if isinstance(item, str | int | float) and not isinstance(item, bool)]
    tagged = [next(filter(None, match.groups()[1:]), "") for match in _ANSWER_TAG.finditer(text)]
    inner = "\n".join(tagged) if tagged else text
    boxed = _BOXED.findall(_LATEX_TEXT.sub(r"\1", inner)) if "\\" in inner else []
    return [item.strip() for item in boxed or tagged]


def json_object(text: str) -> dict[str, Any] | None:
    """Returns the JSON object that a text consists of, with keys in lower case. None if a key is duplicate."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = {key.strip().lower(): item for key, item in pairs}
        if len(value) < len(pairs):
            raise ValueError("duplicate key")
        return value

    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# A broken model repeats a few characters for thousands of tokens. Patterns take quadratic time on such a run.
_LONG_RUN = re.compile(r"(\W{1,3}?)\1{19,}")


def plain_text(text: str) -> str:
    """Returns a text without Markdown, LaTeX and quotation marks, and with full-width characters as usual ones.

    More than 20 repetitions of up to three characters other than letters and digits are shortened.
    """
    if len(text) > 200:
        text = _LONG_RUN.sub(lambda match: match[1] * 20, text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("【", "[").replace("】", "]")
        text = text.replace("。", ". ").replace("、", ", ")
    text = _LATEX_TEXT.sub(r"\1", text) if "\\" in text else text
    return re.sub(r"(?<!\w)_+|_+(?!\w)|^[ \t]*(?:#+|>)[ \t]*", "", _MARKUP.sub("", text), flags=re.MULTILINE).strip()


def single(values: Iterable[str | None]) -> str | None:
    """Returns the only distinct value, or None if there is none or several."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


ANSWER_WORD = r"(?:answers?|antwort|réponse|respuesta|resposta|risposta|ответ|答案|回答|答え|答|정답|답)"
IS = r"\s*(?:(?:is|are|was|would be|should be|must be|will be|ist|est|es|é|è)\b|是|为|は|:|=>|=|->|→|⇒|-|–|—)+\s*"
_LABEL = re.compile(
    rf"(?:\b(?:the|my|so|thus|hence|therefore|final|correct|right|best|short)\b,?\s*)*{ANSWER_WORD}"
    rf"(?:\s+(?:choice|option|letter|to the question))?{IS}",
    re.IGNORECASE,
)
FINAL_LABEL = re.compile(rf"\bfinal\s+{ANSWER_WORD}(?:\s+(?:choice|option|letter))?{IS}", re.IGNORECASE)
FIRST_LABEL = re.compile(rf"\s*(?:{_LABEL.pattern}|(?:assistant|model)\s*:\s*)", re.IGNORECASE)
_EXPLANATION = re.compile(
    r"\n\s*\n|\n\s*(?=(?:explanation|reason(?:ing)?|rationale|justification|because|note|this|user|human)\b)",
    re.IGNORECASE,
)
MAX_SHORT_WORDS = 8  # words of a first line that can be a short answer with an explanation below it


def read_short_answer(text: str) -> str | None:
    """Returns a short answer without decoration: ``blue`` for ``Answer: **blue**``, ``blue</s>`` or ``\\boxed{blue}``.

    Words are never changed, so a text without decoration is returned as it is.

    Returns:
        The answer, or None if the answer ends within its reasoning or marks several results.
    """
    answer = final_answer(text)
    if answer is None:
        return None
    marked = marked_answers(answer)
    if marked:
        return single(_without_quotes(item) for item in marked)
    unmarked = re.sub(r"\*\*|__", "", answer).replace("\uff1a", ":")
    label = FIRST_LABEL.match(unmarked)
    if label is not None and (rest := unmarked[label.end() :].strip()):
        return _without_quotes(rest.splitlines()[0])
    labels = [match.end() for match in FINAL_LABEL.finditer(unmarked)]
    if labels and (rest := unmarked[labels[-1] :].strip()):
        return _without_quotes(rest.splitlines()[0])
    head = _EXPLANATION.split(answer.strip(), maxsplit=1)
    if len(head) > 1 and len(head[0].split()) <= MAX_SHORT_WORDS:
        answer = head[0]
    return _without_quotes(answer)


def _without_quotes(text: str) -> str:
    """Returns a text without the marks that enclose it: asterisks, backticks, quotation marks, dollar signs."""
    stripped = text.strip()
    while len(stripped) > 2:
        match = re.fullmatch(r"(\*{1,3}|_{1,3}|`{1,3}|\"|'|\$)(.+?)\1(\.?)|([“«])(.+?)[”»](\.?)", stripped, re.DOTALL)
        if match is None or (match[1] and match[1] in match[2]):
            break
        stripped = (match[2] or match[5] or "").strip() + (match[3] or match[6] or "")
    tagged = re.fullmatch(r"<(b|i|u|em|strong|p|span)>([^<>]+)</\1>", stripped)
    stripped = tagged[2].strip() if tagged else stripped
    bullet = re.fullmatch(r"[-•]\s+(\S[^\n]*)", stripped)
    return bullet[1] if bullet else text if stripped == text.strip() else stripped


_YES = r"(?:yes|yeah|yep|yup|yea|affirmative|indeed|of course|sí|si|oui|ja|sim|да|是的?|有的?|はい|네|예)"
_NO = r"(?:no|nope|nah|not really|negative|neither|none|non|nein|não|нет|否|不是|没有|いいえ|아니요)"
# Words that answer only if nothing but punctuation follows them: "Correct." but not "Correct me".
_YES_ALONE = (
    r"(?:correct|right|true|certainly|definitely|absolutely|sure|it is|there (?:is|are)|it does|i do|i believe so)"
)
_NO_ALONE = (
    r"(?:incorrect|false|wrong|(?:certainly|definitely|absolutely|of course) not|it is not|it isn't|it does not|not)"
)
_END = r"(?=\s*(?:\Z|[.,;:!?)\n–—-]))"
_LEADING_YES_NO = re.compile(
    rf"\s*(?:[-•(\[]\s*|\d+[.)]\s+)*(?:(?:oh|well|so|hmm|okay|ok)[,.!]?\s+|a\s*:\s*)?"
    rf"(?:(?P<yes>{_YES}(?![\w'])|{_YES_ALONE}{_END}|(?:there is |there's )?no (?:doubt|question)\b)"
    rf"|(?P<no>{_NO}(?![\w'])|{_NO_ALONE}{_END}))",
    re.IGNORECASE,
)
_BOTH = re.compile(
    rf"[\s,/]*(?:(?:and|or|/|und|oder|y|o|et|ou)\s*)?(?:{_YES}|{_NO})(?![\w'])\s*(?:\Z|[.,;:!?\n])", re.IGNORECASE
)
_CORRECTION = re.compile(
    rf"(?:[.!?\n]|\b(?:actually|wait|correction|sorry|rather)\b)[\s,:.!]{{0,20}}(?:(?:wait|actually)[\s,:]*)?"
    rf"(?:(?P<yes>{_YES})|(?P<no>{_NO}))\s*[.,!]",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"\b(?:don't|do not|can't|cannot|can not|couldn't|unable to|not able to|not possible to|impossible to|hard to"
    r"|difficult to)\s+(?:\w+ly\s+)?(?:know|tell|say|determine|answer|be (?:sure|certain)|confirm|verify|help|assist"
    r"|provide|discuss|view|access|process|comply"
    r"|(?:see|find) (?:the|this|your|any|an) (?:image|picture|photo|attachment)s?\b)"
    r"|\bnot (?:sure|clear|certain|enough)\b|\bun(?:sure|clear|certain)\b|\b(?:maybe|perhaps|possibly)\b"
    r"|\b(?:might|may|could) (?:or may not )?be\b|\bno (?:image|picture|photo)\b|\bas an ai\b|\byes or no\b"
)
_NEGATION = re.compile(r"\b(?:no|not|nope|none|neither|never|nothing|cannot|unable|absent)\b|n't\b")
# Clauses that say more about an object that has been named: "a dog that is not moving", "but it is not visible".
_FURTHER_CLAUSE = re.compile(
    r",?\s*\b(?:(?:but|although|though|however|and|while|even though),?"
    r"\s+(?:it|it's|its|they|they're|he|she|their|only|partly)"
    r"|which|that|who|whose|with|without|wearing)\b"
)
# "Based on the image, yes" and "I would say no".
_LATE_YES_NO = re.compile(
    r"(?:[,:]|\b(?:say|is|be|that))\s+(?:(?P<yes>yes|yeah)|(?P<no>no|nope))\s*(?=\Z|[,;])"
    r"|\bi (?:think|believe|guess) (?P<so>so)\b"
)
_STATES = re.compile(
    r"\bthere(?:'s|'re| (?:is|are|was|were|appears?|seems?|exists?))\b|\bi (?:can |do |did )?see\b"
    r"|\b(?:image|picture|photo|photograph|scene) (?:does |clearly )?"
    r"(?:shows?|contains?|depicts?|features?|includes?|has|have)\b"
    r"|\b(?:is|are) (?:\w+ly )?(?:visible|present|shown|depicted|pictured)\b"
)


_PERSON = "person|people|man|men|woman|women|boy|girl|child|kid|lady|guy|player|rider|someone|somebody"


def read_yes_no(text: str, subject: str | None = None) -> str | None:
    """Returns whether an answer says yes or no.

    A yes or no at the start decides, whatever follows: ``Yes, but it is not clearly visible.`` is yes. Without one, the
    first sentence decides: ``There is a cat, not a dog.`` is no.

    Args:
        text: The answer.
        subject: The object that the question asks about. A statement without yes or no must then name it to mean yes.

    Returns:
        ``"yes"`` or ``"no"``, or None for an answer that is neither, or that takes its yes or no back.
    """
    answer = final_answer(text)
    if answer is None:
        return None
    marked = marked_answers(answer)
    if marked:
        return single(_yes_or_no(plain_text(item), subject) for item in marked)
    return _yes_or_no(plain_text(answer), subject)


def _yes_or_no(answer: str, subject: str | None) -> str | None:
    final = list(FINAL_LABEL.finditer(answer))
    label = final[-1] if final else FIRST_LABEL.match(answer)
    start = label.end() if label else 0
    match = _LEADING_YES_NO.match(answer, start)
    if match is None:
        return _stated_yes_no(answer[start:].strip(), subject)
    result = match.lastgroup
    rest = answer[match.end() :]
    if _BOTH.match(rest) or any(other.lastgroup != result for other in _CORRECTION.finditer(rest)):
        return None
    # "No, I can't tell." is a refusal to answer, "No, I can't see a dog." is not.
    return None if not final and _UNSURE.match(rest.lower().lstrip(" ,.-i'") if result == "no" else "") else result


def _stated_yes_no(answer: str, subject: str | None) -> str | None:
    sentence = re.split(r"[.!?\n]", answer, maxsplit=1)[0].lower()
    if _UNSURE.search(sentence):
        return None
    if late := {"no" if match.lastgroup == "no" else "yes" for match in _LATE_YES_NO.finditer(sentence)}:
        return single(late)
    clause = _FURTHER_CLAUSE.split(sentence)[0]
    if _NEGATION.search(clause):
        return "no"
    names_subject = subject is None or re.search(rf"\b(?:{_subject_pattern(subject)})", clause) is not None
    return "yes" if names_subject and _STATES.search(clause) else None


def _subject_pattern(subject: str) -> str:
    word = subject.lower()
    return _PERSON if word in ("person", "people") else re.escape(word)
