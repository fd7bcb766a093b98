"""Checkpoints that are incomplete, broken or malicious, and destinations in use: one error, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreign_checkpoints import (
    Exploit,
    OriginalLlava,
    Tensors,
    random_lora,
    sentence_pieces,
    write_clip,
    write_language_model,
    write_llava,
    write_llava_lora,
)
from helpers import error_code, raises_code, run, run_in_process
from vlm_unlearn.modeling.conversion import tensor_files, writer
from vlm_unlearn.modeling.conversion.base import ConversionOptions
from vlm_unlearn.modeling.conversion.run import RECORD, convert, plan_conversion, write_conversion
from vlm_unlearn.modeling.conversion.tensor_files import PickleFile, ending_processes, open_tensor_file
from vlm_unlearn.modeling.conversion.tokenizer_model import build_tokenizer
from vlm_unlearn.plugins import CHECKPOINT_FORMATS

pytestmark = [pytest.mark.timeout(180), pytest.mark.multiprocess]
VOCABULARY = len(sentence_pieces())


@pytest.fixture(scope="module")
def model() -> OriginalLlava:
    return OriginalLlava(VOCABULARY)


@pytest.fixture(scope="module")
def clip(model: OriginalLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", model, pickled=False)


@pytest.fixture(scope="module")
def source(model: OriginalLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model without its vision tower."""
    return write_llava(tmp_path_factory.mktemp("source") / "source", model, pickled=False, with_tower=False)


@pytest.fixture(scope="module")
def base(source: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in the format of transformers."""
    return convert(str(source), tmp_path_factory.mktemp("base") / "base", ConversionOptions(vision_tower=str(clip)))


def plan(source: Path, clip: Path | None = None, **options: Any) -> None:
    with ending_processes():
        plan_conversion(str(source), ConversionOptions(vision_tower=clip and str(clip), **options))


def set_key(key: str, value: object) -> Callable[[Tensors, dict[str, Any]], None]:
    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        config[key] = value

    return edit


def drop(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[name]

    return edit


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors, dict[str, Any]], None]:
    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = tensor

    return edit


NORM = "model.norm.weight"
BROKEN_MODELS = {
    "no layer": (drop("model.layers.1.mlp.up_proj.weight"), "missing-tensors", None),
    "no projector": (drop("model.mm_projector.2.bias"), "missing-tensors", None),
    "no embeddings": (drop("model.embed_tokens.weight"), "missing-tensors", None),
    "a further layer": (put("model.layers.7.mlp.up_proj.weight", torch.ones(2)), "unexpected-tensors", None),
    "a tensor of another code": (put("model.image_newline", torch.ones(2)), "unexpected-tensors", None),
    "another shape": (put(NORM, torch.ones(3)), "invalid-model", None),
    "embeddings of another size": (put("lm_head.weight", torch.ones(9, 32)), "invalid-model", None),
    "integers": (put(NORM, torch.ones(32, dtype=torch.int8)), "unsupported-setting", None),
    "another architecture": (set_key("architectures", ["LlavaMptForCausalLM"]), "unsupported-setting", "architectures"),
    "another projector": (set_key("mm_projector_type", "mlp3x_gelu"), "unsupported-setting", "mm_projector_type"),
    "images in tiles": (set_key("image_aspect_ratio", "anyres"), "unsupported-setting", "image_aspect_ratio"),
    "quantized": (set_key("quantization_config", {"bits": 4}), "unsupported-setting", "quantization_config"),
    "no size": (set_key("hidden_size", None), "invalid-model", "hidden_size"),
    "heads that do not fit": (set_key("num_attention_heads", 3), "invalid-model", None),
    "gigantic": (set_key("num_hidden_layers", 10**9), "invalid-model", "num_hidden_layers"),
    "many layers": (set_key("num_hidden_layers", 25_000), "invalid-model", None),
    "marks without tokens": (set_key("mm_use_im_start_end", True), "invalid-model", "mm_use_im_start_end"),
    "a rope that is text": (set_key("rope_scaling", "linear"), "invalid-model", "rope_scaling"),
    "a rope of an unknown type": (set_key("rope_scaling", {"type": "round"}), "invalid-model", "rope_type"),
    "a layer that is text": (set_key("mm_vision_select_layer", "-2"), "unsupported-setting", "mm_vision_select_layer"),
}


@pytest.mark.parametrize("problem", BROKEN_MODELS)
def test_broken_model(problem: str, model: OriginalLlava, clip: Path, tmp_path: Path) -> None:
    edit, code, field = BROKEN_MODELS[problem]
    architecture = {} if problem != "another architecture" else {"model_type": "llava_mpt"}

    def both(tensors: Tensors, config: dict[str, Any]) -> None:
        config |= architecture
        edit(tensors, config)

    source = write_llava(tmp_path / "source", model, pickled=False, with_tower=False, edit=both)
    with raises_code(code, field=field):
        plan(source, clip)


def test_files_of_a_folder(source: Path, clip: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    missing = copy("missing")
    (missing / "model-00002-of-00002.safetensors").unlink()
    with raises_code("invalid-model", field="weight_map"):
        plan(missing, clip)
    truncated = copy("truncated")
    file = truncated / "model-00001-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with raises_code("invalid-model", file=file):
        plan(truncated, clip)
    outside = copy("outside")
    index = outside / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../source/model-00001"))
    with raises_code("invalid-model", file=index):
        plan(outside, clip)
    no_tokenizer = copy("no-tokenizer")
    (no_tokenizer / "tokenizer.model").unlink()
    with raises_code("invalid-model", file=no_tokenizer):
        plan(no_tokenizer, clip)
    broken_tokenizer = copy("broken-tokenizer")
    (broken_tokenizer / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0fno")
    with raises_code("invalid-model", file=broken_tokenizer / "tokenizer.model"):
        plan(broken_tokenizer, clip)


def test_added_tokens_with_a_gap(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "added_tokens.json").write_text(json.dumps({"<im_patch>": VOCABULARY}))
    assert build_tokenizer(folder).convert_tokens_to_ids("<im_patch>") == VOCABULARY
    (folder / "added_tokens.json").write_text(json.dumps({"<im_patch>": VOCABULARY + 1}))
    with raises_code("invalid-model"):
        build_tokenizer(folder)
    (folder / "added_tokens.json").write_text("[1]")
    with raises_code("invalid-model"):
        build_tokenizer(folder)


def test_vision_tower_is_missing_or_of_another_kind(source: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    with raises_code("model-not-found", file="openai/clip-vit-tiny"):
        plan(source)
    with raises_code("unsupported-setting", field="model_type"):
        plan(source, base)
    local = Path(shutil.copytree(source, tmp_path / "source"))
    config = local / "config.json"
    config.write_text(config.read_text().replace("openai/clip-vit-tiny", str(clip)))
    with raises_code("missing-base", field="--vision-tower"):  # a path in a file of somebody else is not followed
        plan(local)


def test_unknown_formats(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (base, tmp_path / "empty"):
        with raises_code("unknown-format", file=path):
            plan(path)
    with raises_code("model-not-found"):
        plan(tmp_path / "nowhere" / "at" / "all")
    with raises_code("unknown-name", field="--format"):
        plan_conversion(str(base), ConversionOptions(), "llama")
    with raises_code("unknown-name", field="--template"):
        plan(base, template="vicuna")


def test_adapter_problems(model: OriginalLlava, source: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    adapter = write_llava_lora(tmp_path / "adapter", OriginalLlava(VOCABULARY), model)
    with raises_code("missing-base", field="--base"):
        plan(adapter, clip)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key, value in (("use_dora", True), ("bias", "all"), ("r", 0), ("peft_type", "IA3"), ("lora_alpha", None)):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with raises_code("unsupported-setting", field=key):
            plan(adapter, clip, base=str(source))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    matrices = torch.load(adapter / "adapter_model.bin")
    name = next(key for key in matrices if "lora_A" in key)
    changed = {
        "one side": {key: tensor for key, tensor in matrices.items() if key != name},
        "another rank": {**matrices, name: torch.ones(3, 32)},
        "another width": {**matrices, name: torch.ones(4, 31)},
        "another layer": {key.replace("layers.1", "layers.5"): tensor for key, tensor in matrices.items()},
        "none": {},
    }
    for number, tensors in enumerate(changed.values()):
        torch.save(tensors or {"a": torch.ones(1)}, adapter / "adapter_model.bin")
        with raises_code("adapter-mismatch"):
            plan(adapter, clip, base=str((source, base)[number % 2]))


def checkpoint(tmp_path: Path, tensors: Any) -> Path:
    file = tmp_path / "checkpoint.pt"
    torch.save(tensors, file)
    return file


def test_safe_eraser_problems(base: Path, tmp_path: Path) -> None:
    layer = "base_model.model.language_model.model.layers.0.mlp.up_proj"
    matrices, _ = random_lora({layer: torch.zeros(64, 32)}, rank=4, alpha=8)
    tensors = {f"{name}.default.weight": tensor for name, tensor in matrices.items()}
    file = checkpoint(tmp_path, tensors)
    with raises_code("missing-base", field="--base"):
        plan(file)
    (tmp_path / "cfg.yaml").write_text("LoRA: {r: 8, alpha: 16}")
    with raises_code("run-mismatch", file=tmp_path / "cfg.yaml"):
        plan(file, base=str(base))
    plan(file, base=str(base), lora_alpha=16)
    with raises_code("invalid-field", field="--lora-alpha"):
        plan(file, base=str(base), lora_alpha=-1)
    for name, code in ((str(base), "missing-base"), ("nobody/nothing", "model-not-found")):
        (tmp_path / "cfg.yaml").write_text(f"model_path: {name}")  # a path in a file of somebody else is not followed
        with raises_code(code):
            plan(file)
    (tmp_path / "cfg.yaml").write_text("LoRA: {r: 8, alpha")
    with raises_code("invalid-yaml"):
        plan(file, base=str(base))
    (tmp_path / "cfg.yaml").unlink()
    wrong = {
        "unexpected": {"base_model.model.vision_tower.head.weight": torch.ones(1)},
        "shape": {"base_model.model.multi_modal_projector.linear_1.bias": torch.ones(5)},
        "lora of another width": {name: torch.ones(4, 4) for name in tensors},
    }
    for more in wrong.values():
        with raises_code("adapter-mismatch"):
            plan(checkpoint(tmp_path, {**tensors, **more}), base=str(base))


@pytest.mark.parametrize("content", [[1], {}, {"state_dict": {"a": torch.ones(1)}}, {1: torch.ones(1)}, {"a": None}])
def test_content_that_is_no_dict_of_tensors(content: Any, tmp_path: Path) -> None:
    with raises_code("invalid-model"), ending_processes():
        open_tensor_file(checkpoint(tmp_path, content))


@pytest.mark.parametrize("protocol", ["zip", "plain"])
def test_pickle_with_code_does_not_run(protocol: str, tmp_path: Path) -> None:
    target, file = tmp_path / "ran", tmp_path / "checkpoint.pt"
    if protocol == "zip":
        torch.save({"a": torch.ones(1), "b": Exploit(target)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Exploit(target)}))
    with raises_code("unsafe-pickle", file=file), ending_processes():
        open_tensor_file(file)
    assert not target.exists()


def test_files_that_claim_more_than_they_contain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ending_processes():
        with raises_code("invalid-model"):
            open_tensor_file(checkpoint(tmp_path, {"a": torch.ones(1).expand(1 << 20, 1 << 14)}))
        storage = torch.ones(1 << 12)
        with raises_code("invalid-model"):
            open_tensor_file(checkpoint(tmp_path, {str(number): storage[:4000] for number in range(9)}))
        plain = checkpoint(tmp_path, {"a": torch.ones(4)})
        with zipfile.ZipFile(plain) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(plain, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in records.items():
                archive.writestr(name, data)
        with raises_code("invalid-model"):
            open_tensor_file(plain)
        os.truncate(checkpoint(tmp_path, {"a": torch.ones(1000)}), 2000)
        with raises_code("invalid-model"):
            open_tensor_file(plain)
        monkeypatch.setattr(tensor_files, "MAX_PICKLE_BYTES", 100)
        with raises_code("file-too-large"):
            open_tensor_file(plain)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="without limits of memory")
def test_limits_of_memory_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads a pickle before it looks at it, so that a large one takes the time and the memory of its objects."""
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(b"\x80\x02" + b"]" * 3_000_000 + b".")
    monkeypatch.setattr(tensor_files, "MEMORY_BYTES", 1 << 20)
    with ending_processes():
        with raises_code("resource-limit", file=file):
            open_tensor_file(file)
        monkeypatch.setattr(tensor_files, "MEMORY_BYTES", 2 << 30)
        monkeypatch.setattr(tensor_files, "LOAD_SECONDS", 0.01)
        with raises_code("resource-limit", file=file):
            open_tensor_file(file)


def test_process_that_dies_while_it_is_read(tmp_path: Path) -> None:
    with ending_processes():
        source: Any = open_tensor_file(checkpoint(tmp_path, {"a": torch.arange(1000.0), "b": torch.ones(3).bool()}))
        assert isinstance(source, PickleFile)
        source._process.kill()
        with raises_code("resource-limit"):
            source.read("a")
        assert torch.equal(source.read("a"), torch.arange(1000.0))  # another process reads it
        assert source.read("b").tolist() == [True] * 3


def test_no_more_than_three_processes_are_open(tmp_path: Path) -> None:
    with ending_processes():
        files = []
        for number in range(4):
            (tmp_path / str(number)).mkdir()
            files.append(open_tensor_file(checkpoint(tmp_path / str(number), {"a": torch.full((2,), number)})))
        assert len(tensor_files._OPEN) == 3
        for number, file in enumerate(files):
            assert file.read("a").tolist() == [number, number]
    assert not tensor_files._OPEN


def write(source: Path, clip: Path, out: Path, shard_bytes: int = 30_000, **arguments: Any) -> Path:
    options = ConversionOptions(vision_tower=str(clip))
    with ending_processes():
        conversion = plan_conversion(str(source), options)
        return write_conversion(conversion, out, options, shard_bytes=shard_bytes, **arguments)


def content(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_destinations(source: Path, clip: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with raises_code("output-exists", file=mine):
            write(source, clip, mine, overwrite=overwrite)
    for inside in (source, source.parent):
        with raises_code("output-exists"):
            write(source, clip, inside, overwrite=True)
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with raises_code("output-exists"):
            write(source, clip, tmp_path / name, overwrite=True)
    with raises_code("output-not-writable"):
        write(source, clip, tmp_path / "file" / "out")
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "notes.txt").touch()
    with raises_code("output-exists"):
        write(source, clip, tmp_path / "out")
    assert {path.name for path in mine.iterdir()} == {"thesis.txt"}
    assert not list(tmp_path.glob("*.lock"))


def test_repeated_and_changed_conversions(source: Path, clip: Path, tmp_path: Path) -> None:
    copied, out = Path(shutil.copytree(source, tmp_path / "source")), tmp_path / "out"
    (tmp_path / "out").mkdir()
    write(copied, clip, out)
    first = content(out)
    write(copied, clip, out)  # complete
    assert content(out) == first
    os.utime(copied / "config.json")
    write(copied, clip, out)  # another conversion replaces the result of the first
    assert content(out) != first
    (out / "chat_template.jinja").write_text("mine")
    os.utime(copied / "config.json")
    with raises_code("output-exists", file=out):
        write(copied, clip, out)
    assert (out / "chat_template.jinja").read_text() == "mine"
    write(copied, clip, out, overwrite=True)
    assert (out / "chat_template.jinja").read_text() != "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    (out / "model.safetensors.index.json").rename(out / "notes.xlsx")
    with raises_code("output-exists", file=out):  # a file that is not the model's
        write(copied, clip, out, overwrite=True, shard_bytes=40_000)


def test_interrupted_conversion_resumes(
    source: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, scratch = tmp_path / "out", tmp_path / ".out.part"
    complete = write(source, clip, tmp_path / "complete")
    written: list[str] = []
    original = writer._write_shard

    def interrupted(file: Path, *arguments: Any) -> None:
        if len(written) == 2:
            file.with_name(f"{file.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file.name)
        original(file, *arguments)

    monkeypatch.setattr(writer, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source, clip, out)
    assert not out.exists()
    assert len(list(scratch.glob("*.safetensors"))) == 2
    monkeypatch.setattr(writer, "_write_shard", lambda file, *rest: (written.append(file.name), original(file, *rest)))
    write(source, clip, out)
    assert sorted(set(written)) == sorted(written)  # no shard was written twice
    assert not scratch.exists()
    names = {path.name for path in complete.iterdir()}
    assert names == {path.name for path in out.iterdir()}
    assert all((complete / name).read_bytes() == (out / name).read_bytes() for name in names)


PROGRAM = """
import sys
from pathlib import Path
from vlm_unlearn.modeling.conversion.base import ConversionOptions
from vlm_unlearn.modeling.conversion.run import plan_conversion, write_conversion
source, clip, out = sys.argv[1:]
options = ConversionOptions(vision_tower=clip)
write_conversion(plan_conversion(source, options), Path(out), options, shard_bytes=30_000)
"""


def test_killed_conversion_resumes(source: Path, clip: Path, tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / ".out.part"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(source), str(clip), str(out)])
    while not list(scratch.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    write(source, clip, out)
    complete = write(source, clip, tmp_path / "complete")
    assert all(file.read_bytes() == (out / file.name).read_bytes() for file in complete.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "complete"}


def test_command(model: OriginalLlava, source: Path, clip: Path, tmp_path: Path) -> None:
    arguments = ["convert", source, tmp_path / "out", "--vision-tower", clip, "--json"]
    done = run_in_process(*arguments, "--plan")
    planned = json.loads(done.stdout)
    assert (done.returncode, planned["format"], planned["dtypes"]) == (0, "llava", ["float32"])
    assert not (tmp_path / "out").exists()
    done = run_in_process(*arguments)
    assert json.loads(done.stdout) == {**planned, "model": str(tmp_path / "out")}
    assert json.loads((tmp_path / "out" / RECORD).read_text())["format"] == "llava"
    done = run_in_process("convert", write_language_model(tmp_path / "vicuna", model), tmp_path / "other")
    assert (done.returncode, error_code(done), done.stdout) == (2, "unknown-format", "")
    done = run("convert", source, tmp_path / "text", "--vision-tower", clip, "--precision", "bf16")
    assert "in bfloat16" in done.stdout
    assert str(tmp_path / "text") in done.stdout


def test_formats_have_summaries() -> None:
    assert list(CHECKPOINT_FORMATS) == ["llava", "llava_lora", "llava_projector", "safe_eraser"]
    assert all(checkpoint_format.summary for _, checkpoint_format in CHECKPOINT_FORMATS.built_in_items())
