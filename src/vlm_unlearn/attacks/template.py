"""System prompts and role plays around a question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import model_validator

from vlm_unlearn.attacks.base import Attack, register, variant_of
from vlm_unlearn.attacks.texts import read_texts
from vlm_unlearn.config import Strict
from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.records import Prompt

PLACEHOLDER = "{question}"


class Wording(Strict):
    """A system message, and the text around a question."""

    system: str | None = None
    """The system message. It follows the one that the prompt already has."""
    question: str = PLACEHOLDER
    """The text around the question, which replaces `{question}`."""

    @model_validator(mode="after")
    def _check_placeholder(self) -> Wording:
        if self.question.count(PLACEHOLDER) != 1:
            raise UserError(f"`question` must contain {PLACEHOLDER} once", code="invalid-template")
        return self


class NamedTemplate(Wording):
    """A template of an attack."""

    name: str
    """The name."""
    control: Wording | None = None
    """Harmless texts of the same form and length."""


class TemplatesFile(Strict):
    """A file of templates."""

    templates: list[NamedTemplate]
    """The templates."""


class TemplateOptions(Strict):
    """Options of `Template`."""

    templates: tuple[str, ...] = ()
    """Names of the templates to use. Each makes one rewrite. Empty uses all."""
    file: Path | None = None
    """YAML file with the templates, in place of the shipped ones."""
    control: bool = False
    """Use the control of each template instead."""


@register("template")
class Template(Attack):
    """Asks the question in a role play, or under a system prompt that asks for an answer at any cost.

    Judges grade the answer against the question alone.

    Control: a harmless text of the same form and length. It shows the effect of a longer prompt.
    """

    options_type = TemplateOptions

    @cached_property
    def _templates(self) -> list[tuple[str, Wording]]:
        available = {
            item.name: item for item in read_texts(TemplatesFile, "templates.yaml", self.options.file).templates
        }
        wordings = []
        for name in self.options.templates or available:
            if name not in available:
                raise UserError(
                    f"there is no template {quoted(name)}{nearest(name, available) or '.'} "
                    f"Available: {', '.join(available)}.",
                    code="unknown-name",
                    field="attack.templates",
                )
            wording = available[name].control if self.options.control else available[name]
            if wording is None:
                raise UserError(
                    f"the template {quoted(name)} has no `control`. Add one of the same length.",
                    code="missing-setting",
                    file=self.options.file,
                )
            wordings.append((name, wording))
        return wordings

    def apply(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yields each prompt once for every template."""
        name = "template-control" if self.options.control else "template"
        for prompt in prompts:
            for template, wording in self._templates:
                prefix, _, suffix = wording.question.partition(PLACEHOLDER)
                # The image keeps its place in the question, and precedes the text around a question that it precedes.
                moved = prompt.has_image_in_question and prompt.image_offset > 0
                yield variant_of(
                    prompt,
                    f"{name}/{template}",
                    system="\n\n".join(text for text in (prompt.system, wording.system) if text) or None,
                    question=f"{prefix}{prompt.question}{suffix}",
                    image_offset=prompt.image_offset + (len(prefix) if moved else 0),
                    judged_question=prompt.conversation,
                )
