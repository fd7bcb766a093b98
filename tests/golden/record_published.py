"""Runs the released training code of both papers on a tiny model, and records its losses and weights.

The code runs unchanged. Flash attention, which needs a GPU, is replaced by the same attention in PyTorch, and DeepSpeed
is left out. Each system needs an environment of its own, with numpy, safetensors, Pillow and

- SafeEraser (yuu250/SafeEraser at 9e96612): ``transformers==4.46.3 accelerate==1.1.1 peft==0.13.2 hydra-core datasets
  matplotlib debugpy``,
- Safety Mirage (OPTML-Group/VLM-Safety-Unlearn at 1f89239): ``transformers==4.37.2 accelerate==0.21.0 peft==0.10.0
  datasets einops``.

Run ``python record_published.py safe_eraser|safety_mirage CODE WORK OUT.json``. ``CODE`` is a clone of the repository
and ``WORK`` a scratch folder. ``ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 record_published.py ...`` records
one run on two processes, each of which writes a file.
"""

from __future__ import annotations

import json
import os
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import published_model as tiny


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention of [B, S, heads, width], as flash attention computes it."""
    q, k, v = (value.transpose(1, 2) for value in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def install_flash_attention() -> None:
    """Puts a module ``flash_attn`` in place that runs on a CPU, in the precision of its inputs."""
    from importlib.machinery import ModuleSpec

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        **_: Any,
    ) -> Tensor:
        return _attention(q, k, v, causal, softmax_scale)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: Any = None,
        causal: bool = False,
        **_: Any,
    ) -> Tensor:
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist()
        rows = [
            _attention(q[None, start:end], k[None, start:end], v[None, start:end], causal, softmax_scale)[0]
            for start, end in pairwise(bounds)
        ]
        return torch.cat(rows)

    def index_first_axis(values: Tensor, indices: Tensor) -> Tensor:
        return values[indices]

    def pad_input(values: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
        padded = values.new_zeros((batch * length, *values.shape[1:]))
        return padded.index_copy(0, indices, values).view(batch, length, *values.shape[1:])

    def unpad_input(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        lengths = mask.sum(dim=-1, dtype=torch.int32)
        indices = torch.nonzero(mask.flatten()).flatten()
        starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return values.flatten(0, 1)[indices], indices, starts, int(lengths.max())

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.__dict__.update(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func, __version__="2.5.8", __path__=[]
    )
    padding.__dict__.update(index_first_axis=index_first_axis, pad_input=pad_input, unpad_input=unpad_input)
    package.__spec__, padding.__spec__ = ModuleSpec("flash_attn", None), ModuleSpec("flash_attn.bert_padding", None)
    sys.modules.update({"flash_attn": package, "flash_attn.bert_padding": padding})
    import transformers.utils
    import transformers.utils.import_utils

    for module in (transformers.utils, transformers.utils.import_utils):
        module.is_flash_attn_2_available = lambda: True
        module.is_flash_attn_greater_or_equal = lambda version: True
        module.is_flash_attn_greater_or_equal_2_10 = lambda: True
    from transformers import modeling_utils

    def enable(_: Any, config: Any, *__: Any, **___: Any) -> Any:
        config._attn_implementation = "flash_attention_2"
        return config

    modeling_utils.PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(enable)


def arrays(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the trainable weights."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name: value.detach().float().numpy().copy() for name, value in trained.items()}


def set_adapters(model: torch.nn.Module) -> None:
    """Gives adapters the initial values of the comparison."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.from_numpy(tiny.adapter_values(name, tuple(parameter.shape))))


def stub_deepspeed() -> None:
    """Puts empty modules in place of DeepSpeed's, of which the code imports two names when it saves."""
    from importlib.machinery import ModuleSpec

    parameters = "deepspeed.runtime.zero.partition_parameters"
    for name in ("deepspeed", "deepspeed.zero", "deepspeed.runtime", "deepspeed.runtime.zero", parameters):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["deepspeed"].zero = sys.modules["deepspeed.zero"]
    sys.modules[parameters].ZeroParamStatus = None


# SafeEraser


def record_safe_eraser(code: Path, work: Path) -> dict[str, Any]:
    """Returns the records of all losses of SafeEraser."""
    install_flash_attention()
    import accelerate
    import transformers

    stub_deepspeed()
    model_folder = tiny.write_hf_model(work / "llava")
    tiny.write_safe_eraser(work)
    (work / "config").mkdir(exist_ok=True)
    for file in (code / "config").iterdir():
        (work / "config" / file.name).write_bytes(file.read_bytes())
    os.chdir(work)  # the code reads config/model_config.yaml and dataset/prompt.json
    sys.path.insert(0, str(code))
    processor = transformers.CLIPImageProcessor.from_pretrained(model_folder)
    transformers.CLIPImageProcessor.from_pretrained = lambda *_, **__: processor
    load = transformers.LlavaForConditionalGeneration.from_pretrained

    def load_in_float32(path: str, **settings: Any) -> Any:
        return load(path, **{**settings, "torch_dtype": torch.float32})

    transformers.LlavaForConditionalGeneration.from_pretrained = load_in_float32
    import forget

    forget.e_prepare_deepspeed = lambda model, _: model.eval().requires_grad_(False)
    build_adapters = forget.get_peft_model
    state: dict[str, Any] = {}

    def get_peft_model(model: Any, config: Any) -> Any:
        state["model"] = build_adapters(model, config)
        set_adapters(state["model"])
        return state["model"]

    forget.get_peft_model = get_peft_model
    draw, backward = torch.randint, accelerate.Accelerator.backward
    make_optimizer = forget.get_optimizer

    def randint(low: int, high: int, size: Any, **settings: Any) -> Tensor:
        value = draw(low, high, size, **settings)
        if size == (1,):
            state["draws"].append(int(value))
        return value

    def record_loss(self: Any, loss: Tensor, **settings: Any) -> None:
        state["losses"].append(float(loss.detach()))
        backward(self, loss, **settings)

    def get_optimizer(config: Any, model: Any) -> Any:
        optimizer = make_optimizer(config, model)
        state["first"] = arrays(model)

        def record_step(*_: Any) -> None:
            state["rates"].append(optimizer.param_groups[0]["lr"])
            state["micro_batches"].append(len(state["losses"]))

        optimizer.register_step_pre_hook(record_step)
        return optimizer

    accelerate.Accelerator.backward = record_loss
    accelerate.Accelerator.end_training = lambda self: (
        None
    )  # accelerate 0.27, of the paper, leaves the processes joined
    forget.get_optimizer = get_optimizer
    torch.randint = randint
    runs = {}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for loss in ("ga", "gapd", "gd", "gdpd", "kl", "klpd", "idk", "idkpd") if processes == 1 else ("gdpd",):
        for batch_size, accumulation, epochs in ((1, 4, 4), (2, 2, 4)):
            if batch_size == 2 and (processes > 1 or loss not in ("gdpd", "klpd")):
                continue
            state.update(draws=[], losses=[], rates=[], micro_batches=[])
            overrides = {
                "model_path": str(model_folder),
                "data_path": "dataset/all_train.json",
                "LoRA.r": 4,
                "LoRA.alpha": 32,
                "LoRA.dropout": 0.0,
                "lr": 1e-3,
                "forget_loss": loss,
                "batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "num_epochs": epochs,
                "workers": 0,
                "report_to": "null",
                "save_dir": str(work / "out"),
            }
            sys.argv = [
                "forget.py",
                "--config-path",
                str(code / "config"),
                *(f"{key}={value}" for key, value in overrides.items()),
            ]
            sys.argv += [f"hydra.run.dir={work}/hydra", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
            _reset_accelerate()
            forget.main()
            last = arrays(state["model"])
            name = loss if batch_size == 1 else f"{loss}_batch_2"
            keys = ("draws", "losses", "rates", "micro_batches")
            runs[name] = {key: list(state[key]) for key in keys} | tiny.measure_change(state["first"], last)
    return runs


def record_safety_mirage(code: Path, work: Path) -> dict[str, Any]:
    """Returns the records of both methods of Safety Mirage, with the full and the LoRA script."""
    install_flash_attention()
    import random

    import accelerate
    import peft

    stub_deepspeed()
    model_folder = tiny.write_llava_model(work / "llava")
    tiny.write_safety_mirage(work)
    os.chdir(work)
    sys.path.insert(0, str(code))
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.train import llava_unlearn_full_trainer, llava_unlearn_trainer, train_unlearn, train_unlearn_full

    CLIPVisionTower.to = lambda self, *_, **__: self  # not to float16, into which the code casts it without bfloat16
    draw = random.sample
    random.sample = lambda population, count: draw(population, min(count, len(population)))  # not 2,000 records
    build_adapters, backward = peft.get_peft_model, accelerate.Accelerator.backward
    state: dict[str, Any] = {}

    def get_peft_model(model: Any, config: Any) -> Any:
        adapted = build_adapters(model, config)
        set_adapters(adapted)
        return adapted

    def record_loss(self: Any, loss: Tensor, **settings: Any) -> None:
        state["losses"].append(float(loss.detach()))
        backward(self, loss, **settings)

    def recorded(sampler: type) -> None:
        iterate = sampler.__iter__

        def record_order(self: Any) -> Any:
            order = list(iterate(self))
            state["orders"].setdefault(id(self), []).append(order)
            state["samplers"].append(self)  # so that no id occurs twice
            return iter(order)

        sampler.__iter__ = record_order

    def recorded_trainer(trainer: type) -> type:
        class Recorded(trainer):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(*args, **settings)
                state["first"] = arrays(self.model)
                state["trainer"] = self

            def create_optimizer(self) -> Any:
                optimizer = super().create_optimizer()
                optimizer.register_step_pre_hook(lambda *_: state["rates"].append(optimizer.param_groups[0]["lr"]))
                return optimizer

        return Recorded

    prepare = accelerate.Accelerator.prepare_model

    def prepare_model(self: Any, model: Any, *args: Any, **settings: Any) -> Any:
        """Does not wrap the reference model, which DeepSpeed accepts and PyTorch's DDP does not."""
        trained = any(parameter.requires_grad for parameter in model.parameters())
        return prepare(self, model, *args, **settings) if trained else model

    accelerate.Accelerator.prepare_model = prepare_model
    peft.get_peft_model = get_peft_model
    accelerate.Accelerator.backward = record_loss
    recorded(torch.utils.data.RandomSampler)
    for module, train in ((llava_unlearn_full_trainer, train_unlearn_full), (llava_unlearn_trainer, train_unlearn)):
        recorded(module.LengthGroupedSampler)
        train.LLaVAUnlearnTrainer = recorded_trainer(module.LLaVAUnlearnTrainer)

    runs = {}
    names = ["npo_full_batch_4"] if "RANK" in os.environ else list(SAFETY_MIRAGE_RUNS)
    for name in names:
        script, batch_size, epochs, flags = SAFETY_MIRAGE_RUNS[name]
        state.update(losses=[], rates=[], orders={}, samplers=[])
        forget = "rmu_forget_data.json" if flags["unlearn_type"] == "rmu" else "forget_data.json"
        arguments = {
            "model_name_or_path": model_folder,
            "version": "v1",
            "retain_data_path": "retain_data.json",
            "forget_data_path": forget,
            "image_folder": "image",
            "vision_tower": model_folder / "clip",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "group_by_modality_length": True,
            "output_dir": work / "out" / name,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "warmup_ratio": 0.03,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "model_max_length": 2048,
            "lazy_preprocess": True,
            "report_to": "none",
            "use_cpu": True,
            "ddp_find_unused_parameters": False,
            "disable_tqdm": True,
            "verbose": False,
            "loss_dir": work / "out" / name / "losses",
            **flags,
        }
        if script == "lora":
            arguments |= {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
            arguments |= {"mm_projector_lr": 1e-3}
        sys.argv = ["train.py", *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))]
        _reset_accelerate()
        (train_unlearn if script == "lora" else train_unlearn_full).train(attn_implementation="flash_attention_2")
        trainer = state["trainer"]
        orders = {}
        roles = {
            "forget": trainer.forget_dataloaders,
            "retain_reference": getattr(trainer, "retain_dataloaders", None) or [],
        }
        for role, loaders in roles.items():
            for loader in loaders:
                batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)  # of several processes
                orders[role] = state["orders"].pop(id(batches.sampler))
        (orders["retain"],) = state["orders"].values()
        records = trainer.train_dataset.list_data_dict
        last = arrays(trainer.model)
        runs[name] = {
            "retain_ids": [record["id"] for record in records],
            "orders": orders,
            "losses": state["losses"],
            "rates": state["rates"],
            **tiny.measure_change(state["first"], last),
        }
        if flags["unlearn_type"] == "rmu":
            runs[name]["control_vector"] = trainer.control_vector.flatten().tolist()
    return runs


RMU = {"unlearn_type": "rmu", "rmu_steering_coeffs": "10"}
FULL_RMU = {**RMU, "rmu_layer_id": 1, "rmu_layer_ids": "0,1", "rmu_param_ids": "6", "rmu_retain_alpha": 1.0}
NPO = {"unlearn_type": "npo", "npo_forget_alpha": 1.0, "npo_llava_loss_weight": 1.0}
# name -> script, batch size, epochs, flags
SAFETY_MIRAGE_RUNS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "npo_full": ("full", 1, 1, {**NPO, "npo_beta": 0.9, "npo_retain_alpha": 1.0}),
    "npo_full_batch_4": ("full", 4, 4, {**NPO, "npo_beta": 0.9, "npo_retain_alpha": 1.0}),
    "npo_generic": ("full", 1, 1, {**NPO, "npo_beta": 0.1}),
    "npo_lora": ("lora", 4, 4, {**NPO, "npo_beta": 0.7}),
    "rmu_full": ("full", 1, 2, FULL_RMU),
    "rmu_full_batch_4": ("full", 4, 4, FULL_RMU),
    "rmu_lora": ("lora", 4, 4, {**RMU, "rmu_layer_id": 2, "rmu_llava_loss_weight": 1.2, "rmu_retain_alpha": 0.0}),
}


def _reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


if __name__ == "__main__":
    system, code_folder, work_folder, out_file = sys.argv[1], *map(Path, sys.argv[2:5])
    work_folder.mkdir(parents=True, exist_ok=True)
    target = out_file.resolve()
    recorded = globals()[f"record_{system}"](code_folder.resolve(), work_folder.resolve())
    if "RANK" in os.environ:
        target = target.with_suffix(f".{os.environ['RANK']}.json")
    target.write_text(json.dumps(recorded, indent=1), encoding="utf-8")
