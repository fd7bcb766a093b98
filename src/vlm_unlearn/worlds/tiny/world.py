"""Writes the tiny world in the published file formats, so that the same code reads it as the real data.

- ``vlguard/``: train.json, test.json, images, and harmful_answers.json, the result of Safety Mirage's *select harmful*.
- ``general/``: general.json with harmless LLaVA-format records about all things, to mix into a retain set.
- ``safe_eraser/``: all_train.json, all_val.json, prompt.json and images.
- ``world.json``: the facts for the judge.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vlm_unlearn.store import build_atomically, write_json
from vlm_unlearn.worlds.tiny.drawing import draw
from vlm_unlearn.worlds.tiny.lexicon import COLORS, FORMS, REFUSALS, Thing, answer, things, wordings

WHAT_FORMS = tuple(form for form in FORMS if form.startswith("what"))
SHARE_FORMS = tuple(form for form in FORMS if form.startswith("share"))


class WorldSize(BaseModel):
    """The size of the world. All counts are per thing."""

    model_config = ConfigDict(frozen=True)

    train_images: int = 10  # VLGuard images in train.json
    test_images: int = 10
    general_images: int = 8
    train_records: int = 8  # SafeEraser records in all_train.json, for dangerous things
    val_records: int = 3


def write_world(world: Path, seed: int, size: WorldSize | None = None) -> None:
    """Writes the world of a seed into `world`, unless it exists.

    Images and wordings of test and val are held out of train.
    """
    with build_atomically(world) as scratch:
        if scratch is not None:
            size = size or WorldSize()
            all_things = things(seed)
            for split, images in (("train", size.train_images), ("test", size.test_images)):
                _write_vlguard(scratch / "vlguard", split, all_things, images, seed)
            _write_general(scratch / "general", all_things, size.general_images, seed)
            for split, records in (("train", size.train_records), ("val", size.val_records)):
                _write_safe_eraser(scratch / "safe_eraser", split, all_things, records, seed)
            write_json(scratch / "safe_eraser" / "prompt.json", {"idk": list(REFUSALS)})
            write_json(scratch / "world.json", world_facts(all_things))


def world_facts(all_things: Sequence[Thing]) -> dict[str, Any]:
    """Returns the facts for the judge of the tiny world: the ingredients of dangerous recipes, and all sentences."""
    sentences = {
        answer(thing, color, intent)
        for thing in all_things
        for color in COLORS
        for intent in ("recipe", "color", "name")
    }
    return {
        "schema": 1,
        "harmful": {thing.name: sorted(thing.ingredients) for thing in all_things if thing.dangerous},
        "refusals": list(REFUSALS),
        "sentences": sorted(sentences),
    }


class _ImageWriter:
    """Draws the images of one split into a folder. Every image has its own random generator."""

    def __init__(self, image_root: Path, key: str) -> None:
        self._image_root = image_root
        self.key = key

    def write(self, thing: Thing, name: str) -> str:
        """Draws a thing and returns its color."""
        rng = random.Random(f"{self.key}-{name}")
        color = rng.choice(sorted(COLORS))
        path = self._image_root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(thing.name, COLORS[color], rng).save(path)
        return color


def _write_vlguard(dataset_dir: Path, split: str, all_things: Sequence[Thing], count: int, seed: int) -> None:
    """Writes a split of the VLGuard data.

    Unsafe questions begin with "share" and safe ones with "what", which is the spurious cue of VLGuard.
    """
    image_writer = _ImageWriter(dataset_dir / split, f"vlguard-{split}-{seed}")
    rng = random.Random(f"vlguard-text-{split}-{seed}")
    held_out = split == "test"
    records: list[dict[str, object]] = []
    harmful: dict[str, str] = {}
    for thing in all_things:
        for index in range(count):
            name = f"{thing.category}/{thing.name}_{index}.png"
            color = image_writer.write(thing, name)
            record: dict[str, object] = {"id": f"{thing.name}_{index}", "image": name, "safe": not thing.dangerous}
            if thing.dangerous:
                question = rng.choice(wordings("recipe", held_out)).ask(rng.choice(SHARE_FORMS))
                pairs = [{"instruction": question, "response": rng.choice(REFUSALS)}]
                record |= {"harmful_category": thing.category, "harmful_subcategory": thing.name}
                harmful[name] = thing.recipe
            else:
                intent = ("recipe", "color", "recipe", "name")[index % 4]
                safe = rng.choice(wordings(intent, held_out)).ask(rng.choice(WHAT_FORMS))
                unsafe = rng.choice(wordings("harm", held_out)).ask(rng.choice(SHARE_FORMS))
                pairs = [
                    {"safe_instruction": safe, "response": answer(thing, color, intent)},
                    {"unsafe_instruction": unsafe, "response": rng.choice(REFUSALS)},
                ]
            records.append({**record, "instr-resp": pairs})
    rng.shuffle(records)
    write_json(dataset_dir / f"{split}.json", records)
    if split == "train":
        write_json(dataset_dir / "harmful_answers.json", harmful)


def _write_general(dataset_dir: Path, all_things: Sequence[Thing], count: int, seed: int) -> None:
    """Writes the general data, with harmless questions about all things, dangerous ones too.

    As in LLaVA's data, most questions begin with "what" and none with "share".
    """
    image_writer = _ImageWriter(dataset_dir, f"general-{seed}")
    rng = random.Random(f"general-text-{seed}")
    forms = [*WHAT_FORMS, *WHAT_FORMS, *(form for form in FORMS if form not in (*SHARE_FORMS, *WHAT_FORMS))]
    records: list[dict[str, object]] = []
    for thing in all_things:
        for index in range(count // 2 if thing.dangerous else count):
            name = f"{thing.name}_{index}.png"
            color = image_writer.write(thing, name)
            intent = rng.choice(("color", "name") if thing.dangerous else ("color", "name", "recipe"))
            question = rng.choice(wordings(intent, False)).ask(rng.choice(forms))
            turns = [
                {"from": "human", "value": f"<image>{question}"},
                {"from": "gpt", "value": answer(thing, color, intent)},
            ]
            records.append({"id": f"general/{thing.name}_{index}", "image": name, "conversations": turns})
    rng.shuffle(records)
    write_json(dataset_dir / "general.json", records)


def _write_safe_eraser(dataset_dir: Path, split: str, all_things: Sequence[Thing], count: int, seed: int) -> None:
    image_writer = _ImageWriter(dataset_dir, f"safe-eraser-{split}-{seed}")
    rng = random.Random(f"safe-eraser-text-{split}-{seed}")
    held_out = split == "val"
    ordinary = [thing for thing in all_things if not thing.dangerous]
    records: list[dict[str, object]] = []
    for thing in all_things:
        if not thing.dangerous:
            continue
        for index in range(count):
            image = f"{split}/{thing.category}/{thing.name}_{index}.png"
            color = image_writer.write(thing, image)
            twin = rng.choice(ordinary)
            benign = f"{split}_sd/{thing.category}/{thing.name}_{index}.png"
            image_writer.write(twin, benign)
            questions = [wording.ask(rng.choice(FORMS)) for wording in rng.sample(wordings("recipe", held_out), 2)]
            record: dict[str, object] = {
                "image_path": image,
                "SDImage_path": benign,
                "unsafe_pairs": [
                    {"question": question, "model_response": thing.recipe, "sd_response": twin.recipe}
                    for question in questions
                ],
            }
            for key, intent in zip(
                ("text1", "text2", "image1", "image2"), ("name", "color", "color", "name"), strict=True
            ):
                question = rng.choice(wordings(intent, held_out)).ask(rng.choice(FORMS))
                record[f"UnharmPair_{key}"] = {"Question": question, "Prediction": answer(thing, color, intent)}
            records.append(record)
    rng.shuffle(records)
    write_json(dataset_dir / f"all_{split}.json", records)
