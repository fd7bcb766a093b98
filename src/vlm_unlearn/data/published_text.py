"""The texts on which the released code of both papers trains, which `paper_compat: full` reproduces.

They apply to LLaVA-1.5. Both codes write its prompt themselves, with the system line of Vicuna, instead of using the
chat template. For other families the chat template stays, and only SafeEraser's capitalization is reproduced.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_unlearn.data.encoding import Rendering, Turn, neutralized
from vlm_unlearn.data.processor_call import Processor
from vlm_unlearn.data.special_tokens import special_tokens
from vlm_unlearn.errors import UserError, quoted

SAFE_ERASER_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)
SAFETY_MIRAGE_SYSTEM = SAFE_ERASER_SYSTEM.replace("human", "user")
ANSWER_TAG = " ASSISTANT: "


def safe_eraser_turn(turn: Turn, processor: Processor) -> Turn:
    """Returns a turn as SafeEraser's code trains on it.

    Question and answer are capitalized: their first letter becomes upper case, and all others lower case. The answer is
    neither stripped nor closed by an end-of-sequence token. The labels start after as many tokens as the stripped
    prompt has, so that they start too early if a question ends in a blank.
    """
    answer = (turn.answer or "").capitalize()
    turn = replace(turn, question=turn.question.capitalize(), answer=answer)
    if not is_llava(processor):
        return turn
    turn = neutralized(turn, special_tokens(processor))
    _require_answer(turn)
    image = "" if turn.image is None else "<image>\n"
    text = f"{SAFE_ERASER_SYSTEM}USER: {image}{turn.question}{ANSWER_TAG}{turn.answer}"
    prompt = text.split(ANSWER_TAG)[0].strip(" ") + ANSWER_TAG.rstrip()
    return replace(turn, rendering=Rendering((prompt,), (text,), labels_by_length=True))


def safety_mirage_turn(turn: Turn, processor: Processor) -> Turn:
    """Returns a turn as Safety Mirage's code trains on it.

    Each round is ``USER: question ASSISTANT: answer</s>``. Answers are not stripped.
    """
    if not is_llava(processor):
        return turn
    turn = neutralized(turn, special_tokens(processor))
    _require_answer(turn)
    text, before_answer, with_answer = SAFETY_MIRAGE_SYSTEM, [], []
    for number, (question, answer) in enumerate([*turn.history, (turn.question, turn.answer)]):
        if turn.image is not None and number == turn.image_round:
            question = f"<image>\n{question.strip()}"
        before_answer.append(f"{text}USER: {question}{ANSWER_TAG.rstrip()}")
        text = f"{text}USER: {question}{ANSWER_TAG}{answer}{processor.tokenizer.eos_token}"
        with_answer.append(text)
    return replace(turn, rendering=Rendering(tuple(before_answer), tuple(with_answer)))


PUBLISHED_TURNS = {"safe_eraser": safe_eraser_turn, "safety_mirage": safety_mirage_turn}


def is_llava(processor: Processor) -> bool:
    """Returns whether a processor is that of LLaVA-1.5."""
    return type(processor).__name__ == "LlavaProcessor"


def _require_answer(turn: Turn) -> None:
    if not (turn.answer or "").strip():
        raise UserError("the answer is empty", code="empty-answer", record=quoted(turn.id))
