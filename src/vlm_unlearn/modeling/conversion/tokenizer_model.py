"""Reads ``tokenizer.model`` of SentencePiece without the sentencepiece package.

The models of the two papers have only this file. It is a message of protocol buffers, of which a tokenizer needs the
list of pieces.

Source: ``sentencepiece_model.proto`` of google/sentencepiece, and the wire format of protocol buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_unlearn.errors import UserError, quoted
from vlm_unlearn.store import read_json

MAX_FILE_BYTES = 16 << 20  # Llama's has 0.5 MB for 32,000 pieces
MAX_PIECES = 500_000
_PIECES, _PIECE, _TYPE = 1, 1, 3  # field numbers of ModelProto.pieces, SentencePiece.piece and SentencePiece.type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
NORMAL = 1  # the type of pieces that are neither special tokens nor bytes
_SPECIAL_TOKENS = (("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>"))


class Piece(NamedTuple):
    """A piece of the vocabulary."""

    text: str
    type: int


def read_pieces(file: Path) -> list[Piece]:
    """Returns the pieces of a SentencePiece model, in the order of their ids.

    Raises:
        UserError: The file is broken or too large.
    """
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(
            f"has {size:,} bytes, more than {MAX_FILE_BYTES:,}. Use the model's original file.",
            code="file-too-large",
            file=file,
        )
    pieces: list[Piece] = []
    try:
        for number, content in _fields(file.read_bytes()):
            if number == _PIECES and isinstance(content, bytes):
                fields = dict(_fields(content))
                text, kind = fields[_PIECE], fields.get(_TYPE, NORMAL)
                if not isinstance(text, bytes) or not isinstance(kind, int):
                    raise ValueError
                pieces.append(Piece(text.decode(), kind))
    except (ValueError, KeyError, IndexError):
        pieces = []
    if not pieces or len(pieces) > MAX_PIECES or len({piece.text for piece in pieces}) < len(pieces):
        raise UserError(
            "is not a model of SentencePiece. Use the model's original file.", code="invalid-model", file=file
        )
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the number and the content of each field of a message.

    Raises:
        ValueError: The message is broken.
        IndexError: It is truncated.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError
        if position + length > len(data):
            raise IndexError
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns a number of variable length, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError


def build_tokenizer(folder: Path) -> Any:
    """Returns the Llama tokenizer of a folder with ``tokenizer.model``.

    A space precedes each text between special tokens. LLaVA's code tokenizes the text after an image on its own, which
    has the same result.

    Args:
        folder: The folder, with the added tokens of added_tokens.json or tokenizer_config.json.

    Raises:
        UserError: A file is broken, or the ids of added tokens have gaps.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    pieces = read_pieces(folder / "tokenizer.model")
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    unknown, begin, end = (_special_token(folder, *names) for names in _SPECIAL_TOKENS)
    missing = [token for token in (unknown, begin, end) if token not in vocabulary]
    if missing:
        raise UserError(
            f"tokenizer_config.json names the token {quoted(missing[0])}, which tokenizer.model does not contain.",
            code="invalid-model",
            file=folder,
        )
    merges = generate_merges(vocabulary, skip_tokens={piece.text for piece in pieces if piece.type != NORMAL})
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
    )
    # A LlamaTokenizer would forget, when it is saved, that a space precedes each text between special tokens.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )
    for text, index in sorted(_added_tokens(folder).items(), key=lambda item: item[1]):
        if text in vocabulary:
            continue
        if index != len(tokenizer):
            raise UserError(
                f"the added tokens have a gap before the id {index}. Restore added_tokens.json.",
                code="invalid-model",
                file=folder,
            )
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def _special_token(folder: Path, name: str, default: str) -> str:
    """Returns a special token of tokenizer_config.json, which is a text or an object with its content."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    value = config.get(name) if isinstance(config, dict) else None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else default


def _added_tokens(folder: Path) -> dict[str, int]:
    """Returns the ids of the tokens that are not in ``tokenizer.model``.

    Raises:
        UserError: A file does not map texts to ids.
    """
    tokens: dict[str, int] = {}
    try:
        if (folder / "added_tokens.json").is_file():
            tokens |= {str(text): int(index) for text, index in read_json(folder / "added_tokens.json").items()}
        if (folder / "tokenizer_config.json").is_file():
            listed = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
            tokens |= {str(token["content"]): int(index) for index, token in listed.items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            "the added tokens must be texts with ids. Use the model's original files.",
            code="invalid-model",
            file=folder,
        ) from None
    return tokens
