"""The weight files of a model folder: which files they are, the tensors in them, and the digest of the folder.

Model folders come from third parties and are not trusted. Only safetensors files inside the folder are weights.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store.files import MANIFEST, digest_file, digest_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
DIGEST_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}


def weight_files(folder: Path) -> list[Path]:
    """Returns the files from which transformers loads a model's weights, by name. None has been opened.

    These are the file or index that ``transformers_weights`` of config.json names, ``model.safetensors``, or the files
    that ``model.safetensors.index.json`` names.

    Raises:
        UserError: There is none, or config.json or an index names a file that is not a safetensors file inside the
            folder.
    """
    indices = {file: indexed_files(file) for file in sorted(folder.glob(f"*{INDEX_SUFFIX}"))}
    explicit = _explicit_file(folder)
    if explicit is not None:
        files = indices.get(explicit, [explicit])
    elif (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    else:
        files = indices.get(folder / INDEX_FILE, [])
    if not files:
        raise UserError(
            f"contains no weights ({SINGLE_FILE} or {INDEX_FILE}). Pickled weights are not supported.",
            code="invalid-model",
            file=folder,
        )
    return files


def _explicit_file(folder: Path) -> Path | None:
    """Returns the file that config.json names in ``transformers_weights``, or None."""
    file = folder / "config.json"
    config = read_json(file)
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is None:
        return None
    if isinstance(name, str) and name.endswith(INDEX_SUFFIX) and name == PurePosixPath(name).name:
        if (folder / name).is_file():
            return folder / name
        raise _missing(name, file)
    return _weight_file(folder, name, file)


def indexed_files(index: Path) -> list[Path]:
    """Returns the weight files that an index names, by name.

    Raises:
        UserError: The index is invalid, or names a file that is missing or is not a safetensors file inside the folder.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            "must map the name of each tensor to its file.", code="invalid-model", file=index, field="weight_map"
        )
    names = {name if isinstance(name, str) else repr(name): name for name in weight_map.values()}
    return [_weight_file(index.parent, names[key], index) for key in sorted(names)]


def _weight_file(folder: Path, name: object, file: Path) -> Path:
    """Returns the path of a weight file that `file` names."""
    valid = isinstance(name, str) and name.endswith(".safetensors") and "\0" not in name and "\\" not in name
    path = PurePosixPath(str(name))
    if not valid or path.is_absolute() or PureWindowsPath(str(name)).drive or ".." in path.parts:
        raise UserError(
            f"names {quoted(str(name))}. Weights must be .safetensors files inside the folder.",
            code="unsafe-weights",
            file=file,
        )
    target = folder / path
    # A file may be a link, as in the cache of the hub, since its content is checked. A folder may not lead outside.
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"names {quoted(str(name))}, which is outside the folder. Copy the file into it.",
            code="unsafe-weights",
            file=file,
        )
    if not target.is_file():
        raise _missing(str(name), file)
    return target


def _missing(name: str, file: Path) -> UserError:
    return UserError(f"names {quoted(name)}, which is missing. Copy it again.", code="invalid-model", file=file)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Returns the shapes of the tensors in a safetensors file, by name, from its header.

    Raises:
        UserError: The file is missing or not a valid safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"broken weights: {reason}", code="invalid-model", file=file) from None


def digest_model(path: Path) -> str:
    """Returns the SHA-256 of a model folder in hexadecimal.

    It covers the names and bytes of the weights, configuration, tokenizer and chat template, but not the folder's path.
    Weights in subfolders are covered if an index names them.

    Raises:
        UserError: An index names a file that is missing or is not a safetensors file inside the folder.
    """
    files = {
        file.name: file
        for file in path.iterdir()
        if file.is_file() and file.suffix in DIGEST_SUFFIXES and file.name != MANIFEST
    }
    for index in path.glob(f"*{INDEX_SUFFIX}"):
        files |= {file.relative_to(path).as_posix(): file for file in indexed_files(index)}
    if (path / "config.json").is_file() and (explicit := _explicit_file(path)) is not None:
        files[explicit.relative_to(path).as_posix()] = explicit
    return digest_json({name: digest_file(files[name]) for name in sorted(files)})
