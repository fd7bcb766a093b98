"""The interface of attacks on the input: an attack takes prompts and returns the prompts that the model answers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from pydantic import ValidationError

from vlm_unlearn import plugins
from vlm_unlearn.config import AttackConfig, Strict, validate
from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.plugins import Registry
from vlm_unlearn.records import Prompt

AttackFunction = Callable[..., Iterable[Prompt]]


class Attack(ABC):
    """Base class of attacks. Subclasses set `options_type` and implement `apply`.

    Args:
        options: The options, an object of `options_type`.
    """

    options_type: ClassVar[type[Strict]] = Strict  # no options

    def __init__(self, options: Any = None) -> None:
        self.options: Any = self.options_type() if options is None else options

    @abstractmethod
    def apply(self, prompts: Sequence[Prompt]) -> Iterable[Prompt]:
        """Returns the attacked prompts.

        All prompts made from one question keep its `group_id`, on which intervals are clustered, and differ in `id`.
        `set` and `kind` stay the same.
        """

    def __call__(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Returns the attacked prompts, checked and numbered.

        Raises:
            UserError: The attack returns something else than prompts with unique ids.
        """
        try:
            attacked = list(self.apply(prompts))
        except UserError:
            raise
        except Exception as error:  # of the code of a plug-in or a notebook
            raise _invalid(
                f"the attack raised {type(error).__name__}: {quoted(str(error).strip() or 'no message', 300)}. "
                "It gets a list of Prompt and returns prompts. A prompt is changed by model_copy(update={...})."
            ) from error
        return checked_prompts(prompts, attacked)


class FunctionAttack(Attack):
    """An attack that calls a function with the prompts.

    Args:
        function: Takes a list of `Prompt` and returns prompts.
        options: Its keyword arguments.
    """

    def __init__(self, function: AttackFunction, options: dict[str, Any]) -> None:
        super().__init__()
        self._function = function
        self._arguments = options

    def apply(self, prompts: Sequence[Prompt]) -> Iterable[Prompt]:
        """Returns the prompts that the function returns."""
        attacked = self._function(list(prompts), **self._arguments)
        if attacked is None:
            raise _invalid("the attack returned nothing. Return the prompts.")
        return attacked


ATTACKS: Registry[type[Attack] | AttackFunction] = plugins.ATTACKS
register = ATTACKS.register


def build_attack(config: AttackConfig) -> Attack:
    """Returns the attack that a config describes.

    A plug-in is a subclass of `Attack`, or a function from prompts to prompts with its options as keyword arguments.

    Raises:
        UserError: There is no such attack, one of its options is unknown, or the value of an option is invalid.
    """
    plugin = ATTACKS.load(config.name, "attack.name")
    options = dict(config.model_extra or {})
    if isinstance(plugin, type) and issubclass(plugin, Attack):
        return plugin(validate(plugin.options_type, options, f"attack {config.name}"))
    if isinstance(plugin, type) or not callable(plugin):
        raise plugins.invalid_plugin("attack", config.name, plugin, "an Attack or a function", "attack.name")
    try:
        inspect.signature(plugin).bind([], **options)
    except TypeError as error:
        raise UserError(
            f"the options do not fit the attack {config.name}: {error}", code="invalid-field", field="attack"
        ) from error
    return FunctionAttack(plugin, options)


def apply_attacks(prompts: Iterable[Prompt], configs: Sequence[AttackConfig]) -> list[Prompt]:
    """Returns the prompts of several attacks, each of which gets the prompts of the one before.

    Raises:
        UserError: An attack or one of its options is unknown or invalid, or an attack returns invalid prompts.
    """
    attacked = list(prompts)
    for attack in [build_attack(config) for config in configs]:
        attacked = attack(attacked)
    return attacked


def variant_of(prompt: Prompt, variant: str, number: int | None = None, **changes: object) -> Prompt:
    """Returns a prompt that an attack has made of another one, with its variant in `id` and `variant`.

    Args:
        prompt: The prompt that the attack got.
        variant: The variant, such as ``prefill/5-words``. It follows the variants of earlier attacks after a ``+``.
        number: A number that is part of the id only, for several prompts of the same variant.
        changes: The new values of fields.
    """
    id = f"{prompt.id}/{variant}" if number is None else f"{prompt.id}/{variant}/{number}"
    label = variant if prompt.variant is None else f"{prompt.variant}+{variant}"
    return prompt.model_copy(update={"id": id, "variant": label, **changes})


def checked_prompts(originals: Sequence[Prompt], attacked: Iterable[Prompt]) -> list[Prompt]:
    """Returns the prompts of an attack. Rewrites of a question that have the same number are numbered from 0.

    The image precedes a rewritten question, unless the attack has set another `image_offset`.

    Args:
        originals: The prompts that the attack got.
        attacked: The prompts that it returned.

    Raises:
        UserError: There is no prompt, an object is not a prompt, two prompts have the same id, a prompt has a set or
            kind that no original has, or a value that its field does not allow.
    """
    prompts = list(attacked)
    sets = {(prompt.set, prompt.kind) for prompt in originals}
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, Prompt):
            raise _invalid(f"the attack returned a {type(prompt).__name__}, not a Prompt.", number)
        if (prompt.set, prompt.kind) not in sets:
            problem = f"the attack has changed the set or kind to {quoted(prompt.set)} and {quoted(prompt.kind)}."
            raise _invalid(problem, number)
        try:
            Prompt.model_validate(prompt.model_dump())  # model_copy checks nothing
        except ValidationError as error:
            details = error.errors()[0]
            field = ".".join(map(str, details["loc"])) or "prompt"
            raise _invalid(f"the attack returned an invalid prompt: {field}: {details['msg']}.", number) from None
    ids = Counter(prompt.id for prompt in prompts)
    if originals and not prompts:
        raise _invalid("the attack returned no prompts.")
    if len(ids) < len(prompts):
        raise _invalid(f"the attack returned several prompts with the id {quoted(ids.most_common(1)[0][0])}.")
    _reset_stale_image_offsets(originals, prompts)
    if _has_equal_numbers(prompts) and not _has_equal_numbers(originals):
        counts: Counter[tuple[str, str]] = Counter()
        for index, prompt in enumerate(prompts):
            question = prompt.set, prompt.group_id
            prompts[index] = prompt.model_copy(update={"rewrite": counts[question]})
            counts[question] += 1
    return prompts


def _reset_stale_image_offsets(originals: Sequence[Prompt], prompts: list[Prompt]) -> None:
    """Resets offsets that attacks have copied from the original of a rewrite, where they mean nothing."""
    questions = {(prompt.question, prompt.image_offset) for prompt in originals}
    groups = {(prompt.group_id, prompt.image_offset) for prompt in originals}
    for index, prompt in enumerate(prompts):
        offset = prompt.image_offset
        is_copied = (prompt.question, offset) not in questions and (prompt.group_id, offset) in groups
        if offset and is_copied and prompt.has_image_in_question:
            prompts[index] = prompt.model_copy(update={"image_offset": 0})


def _has_equal_numbers(prompts: Iterable[Prompt]) -> bool:
    """Returns whether two rewrites of one question have the same number."""
    return any(n > 1 for n in Counter((prompt.set, prompt.group_id, prompt.rewrite) for prompt in prompts).values())


def _invalid(problem: str, record: int | None = None) -> UserError:
    return UserError(problem, code="invalid-attack", record=record, field="attack")
