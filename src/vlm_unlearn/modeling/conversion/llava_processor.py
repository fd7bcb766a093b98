"""Makes the processor of a converted LLaVA: tokenizer with an image and a pad token, image processor, chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_unlearn.data.processor_call import panics_as_errors
from vlm_unlearn.errors import UserError
from vlm_unlearn.modeling.conversion.llava_config import LlavaSettings
from vlm_unlearn.modeling.conversion.tokenizer_model import build_tokenizer
from vlm_unlearn.modeling.trial import check_processor_files

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
IMAGE_MARKS = ("<im_start>", "<im_end>")
ROW_MULTIPLE = 64  # the number of rows of the embeddings is a multiple, as in the models of llava-hf on the hub
SYSTEM_LINE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The texts of an image and a turn. IMAGE is replaced.
_IMAGES = "{% for part in message['content'] if part['type'] == 'image' %}IMAGE\n{% endfor %}"
_HUB_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    f"{_IMAGES}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}SYSTEM {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    f"{_IMAGES}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}"
    "{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with an image and a pad token.

    Attributes:
        tokenizer: The tokenizer.
        ids: The ids of the ``image``, ``pad``, ``bos`` and ``eos`` tokens.
        num_rows: The number of rows that the embeddings need.
    """

    tokenizer: Any
    ids: Mapping[str, int]
    num_rows: int


def read_tokens(folder: Path, vocabulary_size: int) -> Tokens:
    """Loads the tokenizer of a folder, and adds the image and the pad token.

    Args:
        folder: The folder of the language model or of the LLaVA.
        vocabulary_size: The number of rows of the embeddings in the checkpoint.

    Raises:
        UserError: The folder has no tokenizer, or one that cannot be used within limits of time and memory.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    check_processor_files(folder)
    try:
        with panics_as_errors():
            # LLaVA's code uses this file. transformers 5 would tokenize the text after an image in another way.
            if (folder / "tokenizer.model").is_file():
                tokenizer = build_tokenizer(folder)
            elif (folder / "tokenizer.json").is_file():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            else:
                raise UserError(
                    "contains neither tokenizer.json nor tokenizer.model. Download the model again.",
                    code="invalid-model",
                    file=folder,
                )
    except UserError:
        raise
    except Exception as error:  # broken tokenizer files raise many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the tokenizer cannot be loaded: {reason}", code="invalid-model", file=folder) from None
    if None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise UserError("the tokenizer has no bos or eos token.", code="invalid-model", file=folder)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    ids = {
        "image": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "pad": tokenizer.pad_token_id,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }
    if len(tokenizer) > vocabulary_size + 2:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens with the image and the pad token, but the embeddings have "
            f"{vocabulary_size:,} rows. Use the tokenizer of this model.",
            code="invalid-model",
            file=folder,
        )
    num_rows = vocabulary_size
    if max(len(tokenizer), max(ids.values()) + 1) > vocabulary_size:
        num_rows = -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE
    return Tokens(tokenizer, ids, num_rows)


def build_processor(
    tokens: Tokens, settings: LlavaSettings, vision_config: Any, image_settings: Mapping[str, Any] | None, template: str
) -> Any:
    """Returns the processor of a LLaVA.

    Args:
        tokens: The tokenizer.
        settings: The settings of the LLaVA.
        vision_config: The config of the vision tower.
        image_settings: The settings of the tower's image processor, or None for those of CLIP.
        template: ``llava-hf`` or ``vicuna_v1``.

    Raises:
        UserError: The image processor's settings are invalid, or tokens around images are missing.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    edge = vision_config.image_size
    defaults = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    names = ("crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean",
             "image_std", "resample", "rescale_factor", "size")  # fmt: skip
    chosen = {name: image_settings[name] for name in names if name in image_settings} if image_settings else {}
    try:
        images = CLIPImageProcessorPil(**{**defaults, **chosen})
    except Exception as error:  # broken settings raise many types
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers rejects the image processor: {reason}", code="invalid-model", file=settings.file
        ) from None
    image = IMAGE_TOKEN
    if settings.image_marks:
        missing = [mark for mark in IMAGE_MARKS if mark not in tokens.tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"mm_use_im_start_end is set, but the tokenizer has no {missing[0]}. Use the tokenizer of this model.",
                code="invalid-model",
                file=settings.file,
                field="mm_use_im_start_end",
            )
        image = IMAGE_MARKS[0] + IMAGE_TOKEN + IMAGE_MARKS[1]
    text = _HUB_TEMPLATE if template == "llava-hf" else _VICUNA_TEMPLATE.replace("SYSTEM", SYSTEM_LINE)
    return LlavaProcessor(
        images,
        tokens.tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=settings.feature_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=text.replace("IMAGE", image),
    )
