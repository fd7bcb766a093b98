"""The program of a trial: uses untrusted files in a process with limits. `vlm_unlearn.modeling.trial` starts it.

It imports neither torch nor other modules of this package, so that it starts within a second. It reads a request as
JSON from standard input. It writes one line of JSON before each step, so that the step of a killed process is known,
and one line with the outcome at the end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMORY_EXCEEDED = 3  # exit code
SHORT_RUN = 200  # characters: nested repetitions take exponential time for them
LONG_RUN = 2000  # characters: a pattern that takes cubic time needs minutes for them
MAX_PROBE_CHARS = 100
MAX_RENDERED_CHARS = 1_000_000
TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ORDINARY_TEXTS = ("Is this a cat?\nAnswer in 2 words: yes/no.", "¿Qué muestra la imagen? 图里有什么？ 🙂", "")
COMMON_CHARS = "a A1 \n\t!._'é中🙂"


def main() -> None:
    """Runs the request on standard input."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no part of the report
    request = json.load(sys.stdin)

    def report(**values: Any) -> None:
        output.write(json.dumps(values) + "\n")
        output.flush()

    steps = _patterns(request) if "patterns" in request else _model_folder(request)
    try:
        for file, field, action in steps:
            report(file=file, field=field, action=action)
    except MemoryError:
        raise SystemExit(MEMORY_EXCEEDED) from None
    except BaseException as error:
        kind = type(error).__name__
        # A panic of a Rust library derives from BaseException.
        report(outcome="panic" if kind == "PanicException" else "failed", reason=f"{kind}: {str(error)[:300]}")
        return
    report(outcome="passed")


def _set_limits(seconds: float, memory_bytes: int) -> None:
    """Limits the rest of this process. The system ends it even while a library holds the interpreter's lock."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        import resource
    except ImportError:  # on Windows
        return
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        try:
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        except (ValueError, OSError):  # macOS does not limit the address space
            continue


def _patterns(request: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Matches each pattern against each name, with the function of `re` that its user calls."""
    _set_limits(request["seconds"], request["memory_bytes"])
    for file, field, function, pattern in request["patterns"]:
        yield file, field, "matching module names"
        match = getattr(re, function)
        for name in request["names"]:
            match(pattern, name)


def _model_folder(request: dict[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """Loads and uses the tokenizers of a model folder, then renders its chat templates.

    What fails in an ordinary way is skipped. The main process then fails with an error of its own.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging
    from transformers.utils.chat_template_utils import render_jinja_template

    logging.set_verbosity(logging.CRITICAL)
    _set_limits(request["seconds"], request["memory_bytes"])
    folder = Path(request["folder"])
    tokenizer: Any = None
    for subfolder in request["tokenizers"]:
        name = str(Path(subfolder) / TOKENIZER_FILE)
        yield name, None, "loading it"
        try:
            loaded: Any = PreTrainedTokenizerFast.from_pretrained(str(folder / subfolder), local_files_only=True)
        except Exception as error:
            _raise_memory_error(error)
            continue
        tokenizer = tokenizer if subfolder else loaded
        yield name, None, "tokenizing texts"
        _use_tokenizer(loaded, folder / subfolder / TOKENIZER_FILE)
    special_tokens = {} if tokenizer is None else tokenizer.special_tokens_map
    for file, field, template in _templates(folder):
        for messages, add_generation_prompt in _conversations():
            yield file, field, "rendering a conversation"
            try:
                (text,), _ = render_jinja_template(
                    conversations=[messages],
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    **special_tokens,
                )
            except Exception as error:
                _raise_memory_error(error)
                continue
            if len(text) > MAX_RENDERED_CHARS:
                raise MemoryError
            if tokenizer is not None:
                yield file, field, "tokenizing a rendered conversation"
                tokenizer(text)


def _raise_memory_error(error: Exception) -> None:
    if isinstance(error, MemoryError):
        raise error


def _use_tokenizer(tokenizer: Any, file: Path) -> None:
    """Tokenizes ordinary texts, and then runs of characters that the tokenizer's own patterns contain.

    A pattern that panics only on a very long run is harmless for most texts. The main process reports the others.
    """
    chars, words = _probes(file)
    ending = "\0" + "".join(chars)  # a library may skip a pattern if a character of it does not occur later
    for text in (*ORDINARY_TEXTS, *(char * SHORT_RUN + ending for char in chars)):
        tokenizer.decode(tokenizer(text)["input_ids"])
    for text in (*chars, "ab ", *words):
        try:
            tokenizer.decode(tokenizer(text * (LONG_RUN // len(text)) + ending)["input_ids"])
        except Exception as error:
            _raise_memory_error(error)
        except BaseException:  # a panic takes seconds, and each of the other texts may cause one
            return


def _probes(file: Path) -> tuple[list[str], list[str]]:
    """Returns characters and words. On a run of one of them, nested repetitions of a pattern take exponential time."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        settings = [content.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
        texts = list(_strings(settings))
    except (OSError, ValueError, AttributeError, RecursionError):
        texts = []
    chars = dict.fromkeys(COMMON_CHARS + "".join(text[:500] for text in texts))
    words = ["".join(re.findall(r"[^\W_]+", text))[:100] for text in texts[:20]]
    return list(chars)[:MAX_PROBE_CHARS], [word for word in words if word]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)


def _templates(folder: Path) -> Iterator[tuple[str, str | None, str]]:
    """Yields ``(file, key, template)`` of every chat template of a model folder."""
    for file in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if file.is_file():
            yield str(file.relative_to(folder)), None, file.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "processor_config.json", TOKENIZER_CONFIG):
        try:
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(template, dict):
            template = [{"template": text} for text in template.values()]
        for item in template if isinstance(template, list) else [{"template": template}]:
            if isinstance(item, dict) and isinstance(item.get("template"), str):
                yield name, "chat_template", item["template"]


def _conversations() -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Yields messages as this package builds them, and whether the answer is left to the model."""

    def message(role: str, *parts: str) -> dict[str, Any]:
        content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
        return {"role": role, "content": content}

    question, answer = message("user", "image", "What is it?"), message("assistant", "A cat.")
    yield [question], True
    yield [question, answer], False
    yield [question, answer, message("user", "And this?")], True
    yield [question, answer, message("user", "And this?"), answer], False
    yield [message("system", "Be brief."), question], True
    yield [message("user", "What is a cat?")], True
    yield [message("user", "What is a cat?"), answer], False


if __name__ == "__main__":
    main()
