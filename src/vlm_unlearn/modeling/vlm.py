"""A vision-language model: the model of transformers, its processor and its components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.structure import (
    NEVER_SHARED_FAMILIES,
    Component,
    Structure,
    described_family,
    family_of,
    find_structure,
    get_base_model,
)


class VisionLanguageModel:
    """A model of transformers with its processor. It is built once, and all access to components goes through it.

    Args:
        model: A model that ``AutoModelForImageTextToText`` loads, or a PEFT model of it.
        processor: Its processor. None if only the model is used.
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        self.model: Any = model
        self.processor = processor

    def with_model(self, model: nn.Module) -> VisionLanguageModel:
        """Returns the same with another object for the model, such as the PEFT model around it."""
        return VisionLanguageModel(model, self.processor)

    @property
    def base_model(self) -> Any:
        """The model of transformers, inside of PEFT's wrapper. Adapters stay in place."""
        return get_base_model(self.model)

    @property
    def has_adapters(self) -> bool:
        """Whether PEFT wraps the model."""
        return self.model is not self.base_model

    @property
    def family(self) -> str:
        """transformers' name of the model's family, such as ``llava``."""
        return family_of(self.base_model)

    @cached_property
    def structure(self) -> Structure:
        """The paths of the components. Raises a `UserError` if one is not found."""
        return find_structure(self.base_model)

    # Components

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers of the language model, from first to last."""
        layers: nn.ModuleList = self.base_model.get_submodule(self.structure.layers)
        return layers

    @property
    def final_norm(self) -> nn.Module:
        """The normalization between the last decoder layer and the output head.

        Raises:
            UserError: The decoder does not have exactly one such module next to its layers.
        """
        decoder = self.base_model.get_submodule(self.structure.layers.rpartition(".")[0])
        norms = [module for name, module in decoder.named_children() if "norm" in name]
        if len(norms) != 1:
            raise UserError(
                f"the final normalization of the family {self.family} was not found next to {self.structure.layers}.",
                code="unsupported-family",
            )
        norm: nn.Module = norms[0]
        return norm

    @property
    def vision_tower(self) -> nn.Module:
        """The module that encodes images. In some families it contains the projectors."""
        tower: nn.Module = self.base_model.get_submodule(self.structure.vision_tower)
        return tower

    @property
    def projectors(self) -> list[nn.Module]:
        """The projectors, without PEFT's wrappers: the copies that PEFT trains if there are some."""
        projectors = [self.base_model.get_submodule(path) for path in self.structure.projectors]
        copies = [getattr(projector, "modules_to_save", None) for projector in projectors]
        return [
            projector if copy is None else next(iter(copy.values()))
            for projector, copy in zip(projectors, copies, strict=True)
        ]

    def decoder_linears(self) -> dict[str, nn.Linear]:
        """Returns the linear layers of the decoder layers, by their names in `base_model`.

        They are the ones that quantization and pruning change. The output head and fused experts are not among them.
        """
        return {
            f"{self.structure.layers}.{name}": module
            for name, module in self.decoder_layers.named_modules()
            if isinstance(module, nn.Linear)
        }

    def component(self, parameter_name: str) -> Component:
        """Returns the component to which a parameter of `base_model` belongs."""
        return self.structure.component(parameter_name)

    @property
    def projector_is_in_vision_tower(self) -> bool:
        """Whether the features of the vision tower depend on the weights of a projector."""
        return any(path.startswith(f"{self.structure.vision_tower}.") for path in self.structure.projectors)

    # Facts of the family

    @property
    def hidden_size(self) -> int:
        """The width of the language model's hidden states."""
        return int(self.base_model.config.get_text_config().hidden_size)

    @property
    def attn_implementation(self) -> str:
        """transformers' name of the language model's attention implementation."""
        return str(self.base_model.config.get_text_config()._attn_implementation)

    @attn_implementation.setter
    def attn_implementation(self, name: str) -> None:
        self.base_model.config.get_text_config()._attn_implementation = name

    @property
    def image_token_id(self) -> int:
        """The id of the tokens that stand for an image."""
        return int(self.base_model.config.image_token_id)

    @property
    def sliding_window(self) -> int | None:
        """The number of positions that a layer with a sliding window attends to, None if no layer has one."""
        return getattr(self.base_model.config.get_text_config(), "sliding_window", None) or None

    @property
    def supports_prefix_sharing(self) -> bool:
        """Whether questions on one image can share its tokens, with the same results up to rounding."""
        return described_family(self.family).supports_prefix_sharing

    @property
    def prefix_sharing_obstacle(self) -> str | None:
        """The reason why questions on one image cannot share its tokens in this family, None if they can."""
        if self.supports_prefix_sharing:
            return None
        reason = NEVER_SHARED_FAMILIES.get(self.family, "no test has compared its losses")
        return f"not with models of the family {self.family}: {reason}"

    @property
    def cross_attention_layers(self) -> Sequence[int]:
        """The decoder layers that attend to an image and are skipped without one (Llama 3.2 Vision)."""
        return getattr(self.base_model.config.get_text_config(), "cross_attention_layers", None) or []

    def position_ids(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the position ids of a batch: [B, S], or [3, B, S] for families with three position axes.

        Args:
            inputs: The processor's outputs, padded on the right.
        """
        if "image_grid_thw" in inputs:
            names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
            positions: Tensor = self.base_model.model.get_rope_index(**{name: inputs[name] for name in names})[0]
            return positions
        rows, width = inputs["input_ids"].shape
        return torch.arange(width, device=inputs["input_ids"].device).expand(rows, width)

    # Running

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block, no weight requires a gradient, so that only inputs are differentiated."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def run(
        self,
        inputs: Mapping[str, Any],
        positions: Tensor,
        hidden_layers: Sequence[int] = (),
        stop_after_last_hidden_layer: bool = False,
        wrapped: nn.Module | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Runs a batch, and returns the logits [N, V] and the outputs [B, S, H] of the selected decoder layers.

        Args:
            inputs: The inputs of the model's `forward`.
            positions: [N], the positions of the flattened batch whose logits are computed.
            hidden_layers: The decoder layers whose outputs are returned, 0 the first.
            stop_after_last_hidden_layer: Skips the decoder layers above the last of `hidden_layers`.
            wrapped: The model inside the wrapper of DDP, FSDP or DeepSpeed, which is called instead of the model.
        """
        hidden: dict[int, Tensor] = {}

        def capture(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden[layer] = output[0] if isinstance(output, tuple) else output

        def select(_module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (states[0].flatten(0, 1)[positions][None],)

        with ExitStack() as cleanup:
            for layer in hidden_layers:
                hook = self.decoder_layers[layer].register_forward_hook(partial(capture, layer))
                cleanup.callback(hook.remove)
            cleanup.callback(self.base_model.get_output_embeddings().register_forward_pre_hook(select).remove)
            if stop_after_last_hidden_layer:
                cleanup.enter_context(self.truncated_decoder(max(hidden_layers) + 1))
            elif len(self.decoder_layers) - 1 not in hidden_layers:
                cleanup.enter_context(self._selected_positions_of_last_layer(positions))
            logits: Tensor = (self.model if wrapped is None else wrapped)(**inputs, use_cache=False).logits[0]
        return logits, hidden

    @contextmanager
    def _selected_positions_of_last_layer(self, positions: Tensor) -> Iterator[None]:
        """Runs the output projection of attention and the feed-forward block of the last layer on some positions only.

        Nothing reads the outputs of the layer at other positions: they are those of the layer without these blocks.
        With gradient checkpointing the layer runs again in the backward pass, after the block, so that nothing changes.

        Args:
            positions: [N], the positions of the flattened batch whose outputs are used.
        """
        layer: Any = self.decoder_layers[-1]
        attention, feed_forward = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        blocks = [getattr(attention, "o_proj", None), feed_forward if hasattr(feed_forward, "down_proj") else None]
        shapes: list[torch.Size] = []
        positions = torch.unique(positions)  # rows that share a prefix have common ones

        def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            shapes.append(inputs[0].shape)
            return (inputs[0].flatten(0, 1)[positions][None],)

        def scatter(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            rows, width, _ = shapes.pop()
            zeros = output.new_zeros(rows * width, output.shape[-1])
            return zeros.index_copy(0, positions, output[0]).view(rows, width, -1)

        with ExitStack() as cleanup:
            if len(positions) and not getattr(layer, "gradient_checkpointing", False):
                for block in blocks:
                    if isinstance(block, nn.Module):
                        cleanup.callback(block.register_forward_pre_hook(select).remove)
                        cleanup.callback(block.register_forward_hook(scatter).remove)
            yield

    @contextmanager
    def shifted_layers(self, shifts: Mapping[int, Tensor]) -> Iterator[None]:
        """Adds tensors [B, S, H] to the outputs of decoder layers for the duration of the block.

        Passes without gradient, such as those of the reference model, are not shifted. The block must contain the
        backward pass too, since gradient checkpointing runs the layers again.

        Args:
            shifts: The tensors by layer, 0 the first.
        """

        def shift(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return output
            states = output[0] if isinstance(output, tuple) else output
            states = states + shifts[layer].to(states.dtype)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        with ExitStack() as cleanup:
            for layer in shifts:
                hook = self.decoder_layers[layer].register_forward_hook(partial(shift, layer))
                cleanup.callback(hook.remove)
            yield

    @contextmanager
    def truncated_decoder(self, count: int) -> Iterator[None]:
        """Removes all but the first `count` decoder layers for the duration of the block.

        Keeps all layers if FSDP or ZeRO-3 shards them, since each prefetches the parameters of the next layer.
        """
        path, _, name = self.structure.layers.rpartition(".")
        parent, layers = self.base_model.get_submodule(path), self.decoder_layers
        fsdp = hasattr(layers[0], "set_requires_gradient_sync")
        zero3 = any(hasattr(parameter, "ds_id") for parameter in layers.parameters())
        setattr(parent, name, layers if fsdp or zero3 else layers[:count])
        try:
            yield
        finally:
            setattr(parent, name, layers)
