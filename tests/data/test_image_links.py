"""Links to images stay inside the image root, unless the hub's cache made them or the user allows them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from helpers import error_code, raises_code, run_in_process
from vlm_unlearn.cli.main import app
from vlm_unlearn.data.images import FOLLOW_LINKS, resolve_image


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """An image root with a link to a file and a link to a folder outside of it."""
    outside, root = tmp_path / "coco", tmp_path / "images"
    outside.mkdir()
    root.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "a.png")
    (root / "file.png").symlink_to(outside / "a.png")
    (root / "coco").symlink_to(outside)
    return root


@pytest.mark.parametrize("name", ["file.png", "coco/a.png"])
def test_link_out_of_the_root_needs_the_switch(linked: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0"):
        monkeypatch.setenv(FOLLOW_LINKS, value)
        with raises_code("image-outside-root") as caught:
            resolve_image(linked, name)
    assert FOLLOW_LINKS in str(caught.value)
    assert "--follow-links" in str(caught.value)
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    assert resolve_image(linked, name) == linked.parent / "coco" / "a.png"
    with raises_code("image-outside-root"):
        resolve_image(linked, "../coco/a.png")  # a path is not a link


def test_links_of_a_hub_snapshot_lead_to_its_own_blobs_only(tmp_path: Path) -> None:
    repository, other = tmp_path / "datasets--a--b", tmp_path / "datasets--c--d"
    snapshot = repository / "snapshots" / "abc" / "train"
    snapshot.mkdir(parents=True)
    for folder in (repository, other):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / "1").write_bytes(b"image")
    (snapshot / "good.png").symlink_to("../../../blobs/1")
    (snapshot / "bad.png").symlink_to(other / "blobs" / "1")
    (snapshot / "worse.png").symlink_to("/etc/hostname")
    assert resolve_image(snapshot, "good.png").read_bytes() == b"image"
    for name in ("bad.png", "worse.png"):
        with raises_code("image-outside-root"):
            resolve_image(snapshot, name)


def commands(command: Any, path: str = "") -> dict[str, set[str]]:
    """The options of each command, by its name."""
    if hasattr(command, "commands"):
        return {
            name: options
            for key, child in command.commands.items()
            for name, options in commands(child, f"{path} {key}".strip()).items()
        }
    return {path: {option for parameter in command.params for option in parameter.opts}}


def test_commands_that_read_image_folders_have_the_switch() -> None:
    options = commands(typer.main.get_command(app))
    assert {name for name, names in options.items() if "--follow-links" in names} == {
        *(name for name, names in options.items() if "--images" in names),  # such as data import
        *(
            "train",
            "generate",
            "evaluate",
            "import-answers",
            "judge run",
            "robustness",
            "sweep",
        ),  # a recipe or a suite names the folder
        *("compare", "report"),  # thumbnails
    }


def test_switch_follows_links_in_its_command_only(linked: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    names = {"forget": "file.png", "retain": "coco/a.png"}
    rows.write_text(
        "".join(
            json.dumps({"image": name, "question": f"What is in the {role} image?", "answer": "A cat.", "set": role})
            + "\n"
            for role, name in names.items()
        )
    )
    imports = ("data", "import", "files", rows, "--images", linked, "--out", tmp_path / "set")
    checks = ("data", "check", tmp_path / "set")
    done = run_in_process(*imports)
    assert (done.returncode, error_code(done)) == (2, "no-records")
    assert "--follow-links" in done.stderr
    assert run_in_process(*imports, "--follow-links").returncode == 0
    assert FOLLOW_LINKS not in os.environ
    assert run_in_process(*checks).returncode == 1
    # Both records have the same image, which the check reports.
    done = run_in_process(*checks, "--follow-links", "--json")
    assert json.loads(done.stdout)["broken"]["count"] == 0
    assert json.loads(done.stdout)["images"]["usable"] == 2
