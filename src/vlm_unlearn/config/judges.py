"""Judges of a suite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlm_unlearn import plugins
from vlm_unlearn.config.base import PluginName, Positive, Strict
from vlm_unlearn.errors import UserError
from vlm_unlearn.store import digest_json, user_path

PrefillGrading = Literal["with_answer", "continuation"]


class JudgeConfig(Strict):
    """A judge of answers. `llm` sends them to a language model with a rubric.

    If an entry of a suite's `judges` and the suite's `judge` are both `llm`, the entry inherits the keys that it does
    not set.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {"paper": "paper_compat"}

    name: Annotated[str, PluginName(plugins.JUDGES)]
    """`keyword` detects refusals, `llm` is a language model, `rouge_l` compares answers with references.

    `tiny_world` checks answers against the facts of the demo's world. `function` is a Python function, with which
    `vlm_unlearn.evaluation.evaluate` has graded answers. Other names are those of plug-ins, and `FILE.py:NAME` is a
    class or function of a file.
    """
    paper_compat: bool = False
    """Count as the published implementation, for `keyword`, `rouge_l`, and the rubrics of the two papers."""
    function: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = None
    """For `function`: the name of the judge."""
    options: dict[str, Any] = {}
    """For a plug-in: the arguments of its class."""
    prefill: PrefillGrading = "with_answer"
    """The text that is graded if the beginning of an answer was prefilled.

    `with_answer` grades the beginning and its continuation. The beginning alone never counts as complied.
    `continuation` grades the text of the model only, as judges without labels always do.
    """
    world: Path | None = None
    """For `tiny_world`: the file with the facts of the world."""
    rubric: str | None = None
    """For `llm`: a rubric file, or the name of a shipped rubric. `vlm-unlearn judge rubrics` lists them."""
    model: str | None = None
    """For `llm`: name of the model on the server. Without a server, a model folder or hub name to run locally."""
    server: str | None = None
    """For `llm`: address of an OpenAI-compatible server, such as http://localhost:8000/v1.

    The environment variable OPENAI_API_KEY contains its key.
    """
    images: bool = True
    """For `llm`: whether to send the image if the rubric uses it."""
    max_tokens: Positive = 256
    """For `llm`: maximum length of a reply in tokens."""
    concurrency: Annotated[int, Field(gt=0, le=512)] = 16
    """For `llm` on a server: number of parallel requests."""
    timeout: Annotated[float, Field(ge=0.1, le=3600)] = 60.0
    """For `llm` on a server: timeout of an attempt in seconds."""
    retries: Annotated[int, Field(ge=0, le=100)] = 4
    """For `llm` on a server: number of retries after a failed attempt."""
    request: dict[str, Any] = {}
    """For `llm` on a server: keys to add to each request. A null removes a key."""
    batch_size: Positive = 8
    """For `llm` without a server: number of questions per batch."""
    cache: bool = True
    """For `llm`: reuse saved replies of the same model to the same question."""
    revision: str = ""
    """For `llm` on a server: a version of the served model. Another version does not reuse cached replies."""
    input_price: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """For `llm`: price of a million input tokens in any currency, to report the cost."""
    output_price: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """For `llm`: price of a million output tokens."""

    @model_validator(mode="after")
    def _check_keys_of_judge(self) -> JudgeConfig:
        if (self.name == "llm") != (self.rubric is not None):
            raise UserError(
                "the judge llm needs a `rubric`, such as four_labels, and other judges have none",
                code="conflicting-settings",
            )
        if (self.name == "function") != (self.function is not None):
            raise UserError(
                "the judge function needs the key `function`, and other judges do not have it",
                code="conflicting-settings",
            )
        if self.name != "llm" and (self.model is not None or self.server is not None):
            raise UserError(
                f"`model` and `server` are for the judge llm, but the judge is {self.name}",
                code="conflicting-settings",
            )
        if self.rubric is not None and ("/" in self.rubric or self.rubric.endswith(".txt")):
            object.__setattr__(self, "rubric", str(user_path(self.rubric).absolute()))
        if self.options and self.name in plugins.JUDGES.built_in:
            raise UserError(
                f"`options` are for plug-ins, and {self.name} is a built-in judge", code="conflicting-settings"
            )
        check_no_password(self.server)
        return self

    @property
    def judge_id(self) -> str:
        """The judge's name in files and tables: ``keyword``, ``four_labels@Qwen--Qwen2.5-VL-7B-Instruct``."""
        if self.function is not None:
            return self.function
        continuation = "-continuation" if self.prefill == "continuation" else ""
        if self.name not in plugins.JUDGES.built_in:
            options = f"-{digest_json(self.options)[:8]}" if self.options else ""
            return f"{_file_name(plugins.short_name(self.name))}{options}{continuation}"
        paper = f"{'-paper' if self.paper_compat else ''}{continuation}"
        if self.rubric is None:
            return f"{self.name}{paper}"
        rubric = _file_name(Path(self.rubric).stem if "/" in self.rubric else self.rubric)
        model = "--".join((self.model or "nobody").rstrip("/").split("/")[-2:])
        return f"{rubric}{paper}{'' if self.images else '-blind'}@{_file_name(model)}"

    def fingerprint_fields(self) -> dict[str, Any]:
        """Returns the keys that influence the verdicts."""
        irrelevant = {"concurrency", "timeout", "retries", "batch_size", "cache"}
        irrelevant |= {"input_price", "output_price", "world"}
        # Most judges do not have these keys, so that verdicts of earlier versions stay valid.
        irrelevant |= {"function"} if self.function is None else set()
        irrelevant |= set() if self.options else {"options"}
        irrelevant |= {"prefill"} if self.prefill == "with_answer" else set()
        return self.model_dump(mode="json", exclude=irrelevant)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[-60:]


def check_no_password(server: str | None) -> None:
    if server is not None and "@" in server.partition("://")[2].partition("/")[0]:
        raise UserError(
            "the server's address contains a user or password, which would be saved in files; "
            "put the key into the environment variable OPENAI_API_KEY",
            code="secret-in-setting",
        )
