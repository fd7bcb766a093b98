"""Plug-ins by name: methods, defenses, judges, attacks, benchmarks, data formats, backends and model families.

A name stands for, in this order:

1. an object that a decorator has registered in this process, such as a method in a notebook,
2. a module of this package: ``methods/npo.py`` is the method ``npo``,
3. an entry point of an installed package, in the group ``vlm_unlearn.methods`` and so on,
4. ``./my_method.py:Mine``, an object in a Python file.

A plug-in is imported when it is first used. The names can be listed without importing any of them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from vlm_unlearn.errors import UserError, nearest, quoted
from vlm_unlearn.store import digest_file, digest_text

T = TypeVar("T")
Plugin = TypeVar("Plugin")
_FILE_NAME = re.compile(r"(?P<file>.+\.py)(:(?P<object>.*))?", re.DOTALL)


class Registry(Mapping[str, T], Generic[T]):
    """The plug-ins of one kind, as a mapping from names to objects. Reading a value imports its plug-in.

    Args:
        kind: The singular noun, such as ``method``, for error messages and for the entry-point group.
        package: The package whose modules are the built-in plug-ins. A module has the name of its plug-in.
        support: The modules of the package that are not plug-ins.
        modules: Built-in plug-ins in other modules, by name.

    Attributes:
        group: The entry-point group of installed packages, such as ``vlm_unlearn.methods``.
    """

    def __init__(
        self, kind: str, package: str, support: tuple[str, ...] = (), modules: Mapping[str, str] | None = None
    ) -> None:
        self.kind = kind
        self.group = f"vlm_unlearn.{f'{kind[:-1]}ies' if kind.endswith('y') else f'{kind}s'}"
        self._package = package
        self._support = support
        self._modules = dict(modules or {})
        self._registered: dict[str, T] = {}

    @cached_property
    def built_in(self) -> Mapping[str, str]:
        """The modules of the plug-ins in this package, by name."""
        spec = importlib.util.find_spec(self._package) if self._package else None
        folders = [] if spec is None else spec.submodule_search_locations
        names = [module.name for module in pkgutil.iter_modules(folders) if not module.ispkg]
        modules = {name: f"{self._package}.{name}" for name in names if name not in self._support}
        return dict(sorted({**modules, **self._modules}.items()))

    @property
    def installed(self) -> Mapping[str, EntryPoint]:
        """The entry points of installed packages, by name."""
        entries = _entry_points(self.group, _search_path())
        return {entry.name: entry for entry in entries if entry.name not in self.built_in}

    def __iter__(self) -> Iterator[str]:
        """Yields all names in alphabetical order. Nothing is imported."""
        return iter(sorted({*self._registered, *self.built_in, *self.installed}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._registered or name in self.built_in or name in self.installed

    def __getitem__(self, name: str) -> T:
        """Returns a plug-in by its name, but never from a file. Use `load` for names that users have written.

        Raises:
            KeyError: There is no plug-in of that name.
            UserError: The plug-in cannot be imported.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self.built_in:
            return self._load_built_in(name)
        if name in self.installed:
            return self._load_installed(self.installed[name])
        raise KeyError(name)

    def load(self, name: str, field: str | None = None) -> T:
        """Returns a plug-in by its name or its file.

        Args:
            name: The name, or ``FILE.py:OBJECT``. A relative path starts at the current folder.
            field: The config key that contains the name, for error messages.

        Raises:
            UserError: There is no such plug-in, or it cannot be imported.
        """
        if is_file_name(name):
            plugin: T = _load_from_file(name, self.kind, field)
            return plugin
        if name in self:
            return self[name]
        raise UserError(
            f"unknown {self.kind} {quoted(name)}{nearest(name, self) or '.'} Available: {', '.join(self)}.",
            code="unknown-name",
            field=field,
        )

    def register(self, name: str) -> Callable[[Plugin], Plugin]:
        """Returns a decorator that registers an object under a name.

        An object that the same module has registered before is replaced, so that a notebook cell can run twice.

        Raises:
            UserError: The name belongs to a built-in plug-in, or to an object of another module.
        """

        def add(plugin: Plugin) -> Plugin:
            module = getattr(plugin, "__module__", "")
            previous = self._registered.get(name)
            other = self.built_in.get(name, module if previous is None else getattr(previous, "__module__", ""))
            if module != other:
                raise UserError(
                    f"the name {quoted(name)} belongs to the {self.kind} of {other}. Choose another name.",
                    code="duplicate-plugin",
                )
            self._registered[name] = plugin  # type: ignore[assignment]
            return plugin

        return add

    def unregister(self, name: str) -> None:
        """Removes an object that `register` has added, such as one of a test."""
        del self._registered[name]

    def built_in_items(self) -> Iterator[tuple[str, T]]:
        """Yields the names and objects of this package's own plug-ins."""
        for name in self.built_in:
            yield name, self[name]

    def working_items(self, on_error: Callable[[UserError], None]) -> Iterator[tuple[str, T]]:
        """Yields all names and objects in alphabetical order. Calls `on_error` for a plug-in that is broken."""
        for name in self:
            try:
                yield name, self[name]
            except UserError as error:
                on_error(error)

    def origin(self, name: str) -> str | None:
        """Returns where a plug-in is from, such as ``some-package 1.2``. None for a plug-in of this package."""
        if is_file_name(name):
            return split_file_name(name)[0]
        if name in self.built_in:
            return None
        if name in self._registered:
            return str(getattr(self._registered[name], "__module__", "this process"))
        distribution = self.installed[name].dist if name in self.installed else None
        return None if distribution is None else f"{distribution.name} {distribution.version}"

    def code_digest(self, name: str) -> str | None:
        """Returns the digest of a plug-in's code, as `code_digest`. None for a plug-in of this package.

        A run whose plug-in has changed is another run.
        """
        if name in self.built_in:
            return None
        plugin: Any = self.load(name)
        return code_digest(plugin if isinstance(plugin, type) or inspect.isfunction(plugin) else type(plugin))

    def _load_built_in(self, name: str) -> T:
        importlib.import_module(self.built_in[name])  # registers the plug-in
        if name not in self._registered:
            raise RuntimeError(f"{self.built_in[name]} does not register the {self.kind} {name}")
        return self._registered[name]

    def _load_installed(self, entry: EntryPoint) -> T:
        origin = "an installed package" if entry.dist is None else entry.dist.name
        try:
            plugin: T = entry.load()
        except (Exception, SystemExit) as error:
            raise _broken(f"{quoted(entry.name)} of {origin}", self.kind, error) from error
        return plugin


def _search_path() -> tuple[tuple[str, int], ...]:
    """Returns the folders of installed packages with the time of their last change, which an installation sets."""
    folders = []
    for folder in sys.path:
        try:
            folders.append((folder, os.stat(folder or ".").st_mtime_ns))
        except OSError:  # a folder of sys.path need not exist
            continue
    return tuple(folders)


@lru_cache(maxsize=32)
def _entry_points(group: str, _search_path: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Returns the entry points of a group. Reading them takes a few milliseconds, and a training step looks names up.

    Args:
        group: The group.
        _search_path: The folders of installed packages, so that the result of a changed folder is not reused.
    """
    return tuple(entry_points(group=group))


def is_file_name(name: str) -> bool:
    """Returns whether a name stands for an object in a file, such as ``./my_method.py:Mine``."""
    return _FILE_NAME.fullmatch(name) is not None


def split_file_name(name: str) -> tuple[str, str]:
    """Returns the absolute path and the name of the object of ``FILE.py:OBJECT``.

    Raises:
        UserError: The name of the object is missing.
    """
    match = _FILE_NAME.fullmatch(name)
    if match is None or not (match["object"] or "").isidentifier():
        raise UserError(
            f"{quoted(name)} does not name an object of the file. Write FILE.py:NAME, such as ./my_method.py:Mine.",
            code="invalid-plugin",
        )
    return os.path.abspath(os.path.expanduser(match["file"])), match["object"]


def absolute_name(name: str) -> str:
    """Returns a name with the absolute path of its file, so that it stays valid in other folders."""
    return ":".join(split_file_name(name)) if is_file_name(name) else name


def short_name(name: str) -> str:
    """Returns a name without its file, for tables and file names: ``Mine`` for ``./my_method.py:Mine``."""
    return split_file_name(name)[1] if is_file_name(name) else name


def code_digest(target: type | Callable[..., object]) -> str:
    """Returns a digest of the code of a class or a function. It never raises an error.

    For a class it covers the file of the class, and in a notebook the source of the class alone. For a function it
    covers the source of the function. If there is no source, such as for a function that `exec` has defined, the
    result differs from every other result, so that no verdict is reused.
    """
    try:
        if isinstance(target, type):
            try:
                return digest_file(Path(inspect.getfile(target)))
            except (OSError, TypeError):  # a class of a notebook or of __main__ has no file
                return digest_text(inspect.getsource(target))
        return digest_text(inspect.getsource(target))
    except Exception:  # inspect raises many types of errors for objects without a source
        return f"unknown source, {uuid.uuid4()}"


def invalid_plugin(kind: str, name: str, plugin: object, expected: str, field: str | None = None) -> UserError:
    """Returns the error of a plug-in that is an object of a wrong type.

    Args:
        kind: The kind of the plug-in.
        name: Its name.
        plugin: The object.
        expected: The expected object, such as ``a subclass of Method``.
        field: The config key that contains the name.
    """
    description = f"the class {plugin.__name__}" if isinstance(plugin, type) else f"a {type(plugin).__name__}"
    return UserError(f"the {kind} {quoted(name)} is {description}, not {expected}.", code="invalid-plugin", field=field)


def _load_from_file(name: str, kind: str, field: str | None) -> Any:
    """Imports a Python file and returns one of its objects. The file is imported once while it does not change."""
    path, attribute = split_file_name(name)
    file = Path(path)
    if not file.is_file():
        raise UserError("no such file", code="file-not-found", file=file, field=field)
    content = file.read_bytes()
    module_name = f"vlm_unlearn_plugin_{hashlib.sha256(path.encode() + content).hexdigest()[:16]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise UserError("is not a Python file", code="invalid-plugin", file=file, field=field)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # pydantic and pickle look the module up
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise _broken(path, kind, error) from error
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        raise UserError(
            f"has no object {quoted(attribute)}{nearest(attribute, public)}",
            code="unknown-name",
            file=file,
            field=field,
        )
    return getattr(module, attribute)


def _broken(origin: str, kind: str, error: BaseException) -> UserError:
    reason = str(error).strip().splitlines()
    return UserError(
        f"the {kind} {origin} cannot be imported: {type(error).__name__}{f': {reason[0]}' if reason else ''}",
        code="broken-plugin",
    )


METHODS: Registry[Any] = Registry("method", "vlm_unlearn.methods", support=("base", "refusals"))
DEFENSES: Registry[Any] = Registry("defense", "vlm_unlearn.methods.wrappers", support=("base", "prompt_decouple"))
JUDGES: Registry[Any] = Registry(
    "judge",
    "vlm_unlearn.judging",
    support=("base", "degenerate", "mirage_scripts", "refusals", "replies", "rubric"),
    modules={
        "tiny_world": "vlm_unlearn.worlds.tiny.judge",
        "tiny_world_requested": "vlm_unlearn.worlds.tiny.judge",
    },
)
ATTACKS: Registry[Any] = Registry("attack", "vlm_unlearn.attacks", support=("base", "files", "image_changes", "search"))
MODEL_ATTACKS: Registry[Any] = Registry(
    "model_attack",
    "vlm_unlearn.robustness",
    support=("base", "halves", "measurement", "recovery", "results", "runner"),
)
BENCHMARKS: Registry[Any] = Registry(
    "benchmark",
    "vlm_unlearn.benchmarks",
    support=("base", "official_files", "prompts", "scoring", "vqa_text"),
    modules={"qbench_zh": "vlm_unlearn.benchmarks.qbench"},
)
FORMATS: Registry[Any] = Registry(
    "format",
    "vlm_unlearn.data.formats",
    support=("base", "fields", "groups", "messages", "questions", "table_rows"),
    modules={
        "figstep_text": "vlm_unlearn.data.formats.figstep",
        "mm_safetybench_sd": "vlm_unlearn.data.formats.mm_safetybench",
        "mm_safetybench_typo": "vlm_unlearn.data.formats.mm_safetybench",
    },
)
ANSWER_FORMATS: Registry[Any] = Registry("answer_format", "vlm_unlearn.data.answer_formats", support=("base",))
BACKENDS: Registry[Any] = Registry(
    "backend",
    "",
    modules={
        "hf": "vlm_unlearn.generation.hf",
        "openai": "vlm_unlearn.generation.server",
        "vllm": "vlm_unlearn.generation.vllm",
    },
)
# Training builds the probe of a recipe, and evaluation, which is built on training, has the code.
PROBES: Registry[Any] = Registry("probe", "", modules={"suite": "vlm_unlearn.evaluation.probe"})
CHECKPOINT_FORMATS: Registry[Any] = Registry("checkpoint_format", "vlm_unlearn.modeling.conversion.formats")
FAMILIES: Registry[Any] = Registry("family", "")  # the families of this package are found by their structure
