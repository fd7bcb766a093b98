"""The reference values of a run: computed before the first step, and cached on disk for later runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vlm_unlearn.data.encoding import move
from vlm_unlearn.data.pixels import DECODER_VERSION
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Role
from vlm_unlearn.modeling.attention import without_cudnn_attention
from vlm_unlearn.modeling.forward import forward
from vlm_unlearn.modeling.packing import packing_of
from vlm_unlearn.records import Example
from vlm_unlearn.store import build_atomically, cache_folder, digest_json, package_versions, read_json, write_json
from vlm_unlearn.training.references import (
    NLL,
    AdapterReference,
    CachedReference,
    FrozenCopyReference,
    Reference,
    answer_digest,
    answer_key,
    key_of_digest,
)
from vlm_unlearn.training.setup import TrainingParts

OnReference = Callable[[int, int], None]  # the number of finished examples and of all examples


@dataclass(frozen=True)
class CacheKeys:
    """What identifies the model and the data of a run in caches on disk, such as digests of their files."""

    model: Mapping[str, object]
    data: Mapping[str, object]


def build_reference(
    parts: TrainingParts,
    autocast: Callable[[], AbstractContextManager[None]],
    cache_keys: CacheKeys | None,
    on_reference: OnReference | None,
) -> Reference | None:
    """Returns the reference model of a run, before its first step. None if the method needs none.

    Args:
        parts: The parts of the run. The model is on its device.
        autocast: Returns the context in which the run computes.
        cache_keys: Identify model and data in the cache on disk. None computes the values in any case.
        on_reference: Called after each batch.
    """
    model: nn.Module = parts.vlm.model
    if parts.reference_strategy is None:
        return None
    if parts.reference_strategy == "cache":
        model.eval()
        roles = [requirement.role for requirement in parts.method.requirements.references]
        with _gathered_parameters(model):
            values = {role: _nll_of_role(parts, role, autocast, cache_keys, on_reference) for role in roles}
        return CachedReference(values)
    return AdapterReference() if parts.reference_strategy == "adapter" else FrozenCopyReference(model)


def _nll_of_role(
    parts: TrainingParts,
    role: Role,
    autocast: Callable[[], AbstractContextManager[None]],
    cache_keys: CacheKeys | None,
    on_reference: OnReference | None,
) -> Mapping[int, NLL]:
    """Returns the reference NLLs of a role, from the cache folder or computed now."""
    vlm, args = parts.vlm, parts.args
    examples, batch_size = parts.stream.unique_examples(role), args.per_device_train_batch_size
    dtype = next(vlm.model.parameters()).dtype

    def compute(batch_examples: Sequence[Example]) -> list[NLL]:
        batch = move(parts.collator.encode(role, batch_examples), args.device, dtype)
        with torch.no_grad(), without_cudnn_attention(), autocast():
            output = forward(vlm, batch, packing=packing_of(vlm, batch))
        nll_sum, tokens = output.answer_nll
        return list(zip(nll_sum.tolist(), tokens.tolist(), strict=True))

    file = None
    if cache_keys is not None:
        key = {
            **cache_keys.model,
            "data": cache_keys.data,
            "versions": package_versions(),
            "weights": str(dtype),
            "precision": args.precision,
            "max_length": args.max_length,
            "batch_size": batch_size,
            "rendering": 2,  # version of the conversion of turns to tokens
            **({"decoder": DECODER_VERSION} if any(example.image for example in examples) else {}),
            "examples": [[example.id, example.answer] for example in examples],
        }
        file = cache_folder() / "reference" / f"{digest_json(key)}.json"
    return _load_or_compute(file, examples, compute, batch_size, on_reference)


def _load_or_compute(
    file: Path | None,
    examples: Sequence[Example],
    compute: Callable[[Sequence[Example]], list[NLL]],
    batch_size: int,
    on_done: Callable[[int, int], None] | None = None,
) -> dict[int, NLL]:
    """Returns ``(NLL sum, tokens)`` of each example's answer under the reference model, by `answer_key`.

    Args:
        file: The cache file. Its name must be a digest of everything that the values depend on. If it does not exist,
            the values are computed and written. None always computes them.
        examples: The examples.
        compute: Computes the values of one batch of examples.
        batch_size: The number of examples per batch.
        on_done: Called after each batch with the number of finished examples and of all examples.

    Raises:
        UserError: The cache file is damaged.
    """

    def rows() -> Iterator[tuple[str, float, int]]:
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            for example, (nll, tokens) in zip(batch, compute(batch), strict=True):
                yield answer_digest(example), nll, tokens
            if on_done:
                on_done(start + len(batch), len(examples))

    if file is None:
        return {key_of_digest(digest): (nll, tokens) for digest, nll, tokens in rows()}
    folder = file.with_suffix("")
    with build_atomically(folder) as scratch:
        if scratch is not None:
            write_json(scratch / file.name, list(rows()))
    try:
        saved = read_json(folder / file.name)
        cached = {key_of_digest(digest): (float(nll), int(tokens)) for digest, nll, tokens in saved}
    except (TypeError, ValueError):
        cached = {}
    if not cached.keys() >= {answer_key(example) for example in examples}:
        raise UserError(
            "the cached reference values are damaged. Delete this folder to compute them again.",
            code="invalid-cache",
            file=folder,
        )
    return cached


def _gathered_parameters(model: nn.Module) -> AbstractContextManager[object]:
    """Gathers the parameters that ZeRO-3 sharded at loading. The DeepSpeed engine that does so does not exist yet."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(model.parameters()))
    return gathered
