"""The two sides of ``benchmarks/released.py``: training processes that run optimizer steps on command.

    python benchmarks/released_sides.py JOB.json

The job's ``side`` is ``ours`` (a recipe, run as `vlm-unlearn train` runs it) or ``released`` (the unedited code of
SafeEraser or Safety Mirage, with the shims of ``tests/golden/record_published.py`` for flash attention and DeepSpeed).
A process reports its first optimizer step without a command. Then it reads commands from standard input: a number runs
that many further steps, with a profile if ``functions`` or ``operators`` follows, and ``stop`` ends the process. Each
report is one line of JSON on standard output. Everything that the code itself prints goes to standard error.

The environments of the released code do not have this package, so nothing here imports it at the top.
"""

from __future__ import annotations

import cProfile
import importlib.util
import io
import json
import os
import pstats
import random
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
# Sizes of the model. 168 / 14 = 12 patches a side: 144 image tokens, a quarter of LLaVA-1.5's.
MODEL = {"WIDTH": 192, "FEED_FORWARD": 672, "LAYERS": 8, "HEADS": 4, "IMAGE_SIZE": 168, "PATCH_SIZE": 14}
TEXT = (
    "red green blue small large old cat dog bird house tree river stone cloud lamp chair table window door street "
    "people walk near light morning table box plate cup hand paper field road boat train horse sheep grass water fire"
)
WORDS = TEXT.split()
SYSTEM_WORDS = "chat between curious human user and an artificial intelligence assistant gives helpful detailed polite"
PROMPT_WORDS = "answers to the questions USER: ASSISTANT: What is it The It Is Yes Sorry cannot answer this"


# Data


def write_inputs(folder: Path, system: str, shape: dict[str, Any]) -> None:
    """Writes the model in the formats of both sides and made-up data in the published format.

    Args:
        folder: Gets ``hf``, ``llava`` (Safety Mirage only) and the data files.
        system: ``safe_eraser`` or ``safety_mirage``.
        shape: ``images``, ``questions`` of each role on an image, and ``contents``: the number of different pictures
            of a role. Files with the same picture have different paths, so that they count as different images.
    """
    tiny = sized_model()
    tiny.CHAT_TEMPLATE = _system_line(system) + tiny.CHAT_TEMPLATE
    tiny.write_hf_model(folder / "hf")
    if system == "safety_mirage":
        tiny.write_llava_model(folder / "llava")
        for role in ("forget", "retain"):
            _write_safety_mirage_role(folder, role, shape)
    else:
        _write_safe_eraser(folder, shape)


def sized_model() -> Any:
    """Returns the module that writes the tests' tiny LLaVA, with the sizes of this benchmark."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    import published_model as tiny

    for name, value in MODEL.items():
        setattr(tiny, name, value)
    tiny.WORD_TOKENS = sorted({*WORDS, *SYSTEM_WORDS.split(), *PROMPT_WORDS.replace(":", "").split()})
    return tiny


def _system_line(system: str) -> str:
    """Returns the system line of the released prompts, so that both sides train on as many tokens."""
    from vlm_unlearn.data.published_text import SAFE_ERASER_SYSTEM, SAFETY_MIRAGE_SYSTEM

    return SAFE_ERASER_SYSTEM if system == "safe_eraser" else SAFETY_MIRAGE_SYSTEM


def _text(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))


def _write_image(file: Path, content: Path) -> None:
    """Makes a file with the picture of another one, which is written if it is missing."""
    import numpy as np
    from PIL import Image

    if not content.is_file():
        content.parent.mkdir(parents=True, exist_ok=True)
        random_state = np.random.RandomState(zlib.crc32(content.name.encode()) & 0x7FFFFFFF)
        small = random_state.randint(0, 256, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(small).resize((240, 180), Image.Resampling.BICUBIC).save(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    os.link(content, file)


def _write_safe_eraser(folder: Path, shape: dict[str, Any]) -> None:
    """Writes SafeEraser's ``dataset`` folder.

    With one question an image, the harmless questions are on images of their own, so that no two samples of the same
    role or of different roles have a common image.
    """
    rows, questions, same = [], shape["questions"], shape.get("same", False)
    for number in range(shape["images"]):
        draw = random.Random(0 if same else number)
        content = number % shape["contents"]
        names = {}
        for kind in ("harm", "safe", "benign"):
            names[kind] = f"dataset/Weapon/{kind}_{number}.png"
            if kind != "safe" or questions == 1:
                _write_image(folder / names[kind], folder / "contents" / f"{kind}_{content}.png")
        pairs = [
            {
                "question": f"What is the {_text(draw, 6, 12)}?",
                "model_response": f"The {_text(draw, 20, 50)}.",
                "sd_response": f"It is {_text(draw, 20, 50)}.",
            }
            for _ in range(questions)
        ]
        harmless = [
            {"Question": f"Is it {_text(draw, 6, 12)}?", "Prediction": f"Yes, {_text(draw, 12, 36)}."}
            for _ in range(questions)
        ]
        keys = ["UnharmPair_text1", "UnharmPair_text2", "UnharmPair_image1", "UnharmPair_image2"]
        row = {"image_path": names["harm"], "SDImage_path": names["benign"], "unsafe_pairs": pairs}
        if questions == 1:
            rows.append(row)
            row = {"image_path": names["safe"], "SDImage_path": names["benign"], "unsafe_pairs": []}
        rows.append({**row, **dict(zip(keys, harmless, strict=False))})
    (folder / "dataset" / "all_train.json").write_text(json.dumps(rows), encoding="utf-8")
    refusals = [f"Sorry, cannot answer this {word}." for word in WORDS[: 1 if same else 8]]
    (folder / "dataset" / "prompt.json").write_text(json.dumps({"idk": refusals}), encoding="utf-8")


def _write_safety_mirage_role(folder: Path, role: str, shape: dict[str, Any]) -> None:
    """Writes one set in LLaVA's format, and the forget set of RMU with the answer in the question."""
    rows, joined = [], []
    for number in range(shape["images"]):
        draw = random.Random(role if shape.get("same") else f"{role} {number}")
        image = f"{role}_{number}.png"
        _write_image(folder / "image" / image, folder / "contents" / f"{role}_{number % shape['contents']}.png")
        question, answer = f"<image>What is {_text(draw, 6, 12)}?", f"It is {_text(draw, 20, 50)}."
        record: dict[str, Any] = {"id": f"{role}_{number}", "image": image}
        last = {"from": "gpt", "value": answer}
        rows.append({**record, "conversations": [{"from": "human", "value": question}, last]})
        joined.append({**record, "conversations": [{"from": "human", "value": f"{question}\n{answer}"}, last]})
    (folder / f"{role}_data.json").write_text(json.dumps(rows), encoding="utf-8")
    if role == "forget":
        (folder / "rmu_forget_data.json").write_text(json.dumps(joined), encoding="utf-8")


# Steps on command


class Gate:
    """Blocks after an optimizer step until the next command, and reports the time of the steps."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever the code prints goes to standard error
        self._steps_left = 1
        self._started, self._processor = time.perf_counter(), time.process_time()
        self._idle_mb = 0.0
        self._profile: Callable[[], str] | None = None
        self.losses: list[float] = []  # of the micro-batches of the first step
        self.extra: dict[str, Any] = {}

    def install(self) -> None:
        """Calls the gate after each step of any optimizer. Memory in use now does not count."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._idle_mb = _memory_mb("VmRSS")
        register_optimizer_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """Counts an optimizer step. After the last one of a command, reports and reads the next command."""
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        report = {
            "seconds": time.perf_counter() - self._started,
            "processor_seconds": time.process_time() - self._processor,
            **self.extra,
        }
        if self._profile is not None:
            report["profile"], self._profile = self._profile(), None
        self._report(report)
        words = sys.stdin.readline().split()
        if not words or words[0] == "stop":  # no words: the benchmark has ended
            loss = sum(self.losses) / len(self.losses)
            self._report({"memory_mb": _memory_mb("VmHWM") - self._idle_mb, "first_loss": loss})
            os._exit(0)
        self._steps_left = int(words[0])
        if len(words) > 1:
            self._profile = {"functions": profile_functions, "operators": profile_operators}[words[1]]()
        self._started, self._processor = time.perf_counter(), time.process_time()

    def _report(self, values: dict[str, Any]) -> None:
        self._replies.write(json.dumps(values) + "\n")
        self._replies.flush()


def profile_functions() -> Callable[[], str]:
    """Starts a profile of Python's functions. Returns a function that ends it and returns it as text."""
    profile = cProfile.Profile()
    profile.enable()

    def end() -> str:
        profile.disable()
        text = io.StringIO()
        for order in ("tottime", "cumtime"):
            pstats.Stats(profile, stream=text).sort_stats(order).print_stats(45)
        return text.getvalue()

    return end


def profile_operators() -> Callable[[], str]:
    """Starts a profile of PyTorch's operators. Returns a function that ends it and returns it as text."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU])
    profiler.start()

    def end() -> str:
        profiler.stop()
        text: str = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40)
        return text

    return end


def _memory_mb(kind: str) -> float:
    """Returns the resident memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{kind}:")).split()[1]) / 1024


def _record_losses(gate: Gate) -> None:
    """Records the loss of each micro-batch of the first step."""
    import accelerate
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    backward = accelerate.Accelerator.backward

    def record_loss(self: Any, loss: Any, *args: Any, **settings: Any) -> None:
        gate.losses.append(float(loss.detach()))
        backward(self, loss, *args, **settings)

    def stop_recording(*_: Any) -> None:
        accelerate.Accelerator.backward = backward

    accelerate.Accelerator.backward = record_loss
    register_optimizer_step_pre_hook(stop_recording)


# Our side


def run_ours(job: dict[str, Any], gate: Gate) -> None:
    """Trains a shipped recipe, of which only the model, the data and the depth of chosen layers differ."""
    from vlm_unlearn.config import Recipe, load
    from vlm_unlearn.data_tools.importers import import_files, import_safe_eraser
    from vlm_unlearn.training import runner

    work, out = Path(job["work"]), Path(job["out"])
    data = work / "imported"
    if not data.is_dir():
        if job["system"] == "safe_eraser":
            import_safe_eraser(work / "dataset" / "all_train.json", work, data, work / "dataset" / "prompt.json")
        else:
            import_files({role: work / f"{role}_data.json" for role in ("forget", "retain")}, work / "image", data)
    gate.install()
    overrides = [
        f"model={work / 'hf'}",
        f"data={data}",
        f"output={out / 'run'}",
        f"training.dataloader_num_workers={job['workers']}",
        *job["overrides"],
    ]

    class Trainer(runner.MethodTrainer):  # type: ignore[misc, valid-type]
        def train(self, *args: Any, **settings: Any) -> Any:
            if job.get("control_vector"):
                import torch

                self.method.control_vector = torch.tensor(job["control_vector"])
            return super().train(*args, **settings)

    runner.MethodTrainer = Trainer

    def on_step(_step: int, _steps: int, terms: Any) -> None:
        gate.losses = gate.losses or [float(terms["loss"])]

    runner.run_recipe(load(Recipe, Path(job["recipe"]), overrides), on_step)


# The released code


def run_safe_eraser(job: dict[str, Any], gate: Gate) -> None:
    """Runs ``forget.py`` of SafeEraser with the settings of its configuration."""
    work, code = Path(job["work"]), Path(job["code"])
    shims = _shims()
    shims.install_flash_attention()
    import transformers

    shims.stub_deepspeed()
    (work / "config").mkdir(exist_ok=True)
    for file in (code / "config").iterdir():
        (work / "config" / file.name).write_bytes(file.read_bytes())
    os.chdir(work)  # the code reads config/model_config.yaml and dataset/prompt.json
    sys.path.insert(0, str(code))
    processor = transformers.CLIPImageProcessor.from_pretrained(work / "hf")
    transformers.CLIPImageProcessor.from_pretrained = lambda *_, **__: processor
    load = transformers.LlavaForConditionalGeneration.from_pretrained

    def load_in_float32(path: str, **settings: Any) -> Any:
        import torch

        return load(path, **{**settings, "torch_dtype": torch.float32})

    transformers.LlavaForConditionalGeneration.from_pretrained = load_in_float32
    import forget

    forget.e_prepare_deepspeed = lambda model, _: model.eval().requires_grad_(False)
    _record_losses(gate)
    gate.install()
    values = {
        # The code chooses the model's class by the text "llava" in the path.
        "model_path": _linked(work / "llava-hf", work / "hf"),
        "data_path": "dataset/all_train.json",
        "forget_loss": job["loss"],
        "workers": job["workers"],
        "report_to": "null",
        "save_dir": job["out"],
        **job["settings"],
    }
    sys.argv = [
        "forget.py",
        "--config-path",
        str(code / "config"),
        *(f"{key}={value}" for key, value in values.items()),
    ]
    sys.argv += [f"hydra.run.dir={job['out']}", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    forget.main()


def run_safety_mirage(job: dict[str, Any], gate: Gate) -> None:
    """Runs ``train_unlearn.py`` (LoRA) or ``train_unlearn_full.py`` of Safety Mirage with the flags of its scripts."""
    work, code = Path(job["work"]), Path(job["code"])
    shims = _shims()
    shims.install_flash_attention()
    shims.stub_deepspeed()
    os.chdir(work)
    sys.path.insert(0, str(code))
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.train import train_unlearn, train_unlearn_full

    CLIPVisionTower.to = lambda self, *_, **__: self  # not to float16, into which the code casts it without bfloat16
    draw = random.sample
    random.sample = lambda population, count: draw(population, min(count, len(population)))  # not 2,000 records
    script = train_unlearn if job["script"] == "lora" else train_unlearn_full
    build = script.LLaVAUnlearnTrainer

    def build_trainer(*args: Any, **settings: Any) -> Any:
        trainer = build(*args, **settings)
        if hasattr(trainer, "control_vector"):
            gate.extra["control_vector"] = trainer.control_vector.flatten().tolist()
        return trainer

    if job.get("report_control_vector"):
        script.LLaVAUnlearnTrainer = build_trainer
    _record_losses(gate)
    gate.install()
    arguments = {
        "model_name_or_path": work / "llava",
        "version": "v1",
        "retain_data_path": "retain_data.json",
        "forget_data_path": "rmu_forget_data.json" if job["settings"]["unlearn_type"] == "rmu" else "forget_data.json",
        "image_folder": "image",
        "vision_tower": work / "llava" / "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "output_dir": job["out"],
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": 2048,
        "gradient_checkpointing": True,
        "lazy_preprocess": True,
        "dataloader_num_workers": job["workers"],
        "report_to": "none",
        "use_cpu": True,
        "verbose": True,
        "loss_dir": Path(job["out"]) / "losses",
        **job["settings"],
    }
    sys.argv = ["train.py", *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))]
    script.train(attn_implementation="flash_attention_2")


def _linked(link: Path, target: Path) -> Path:
    if not link.exists():
        link.symlink_to(target, target_is_directory=True)
    return link


def _shims() -> Any:
    """Returns the module with the stand-ins for flash attention and DeepSpeed."""
    spec = importlib.util.spec_from_file_location("record_published", TESTS / "golden" / "record_published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    gate = Gate()
    import torch

    torch.set_num_threads(1)
    if job["side"] == "ours":
        run_ours(job, gate)
    else:
        {"safe_eraser": run_safe_eraser, "safety_mirage": run_safety_mirage}[job["system"]](job, gate)
    raise SystemExit("The training ended before the benchmark did. Give it more epochs.")


if __name__ == "__main__":
    main()
