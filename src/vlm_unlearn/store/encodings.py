"""Text encodings of files. The package writes UTF-8, and names the encoding of a file that it cannot read."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from vlm_unlearn.errors import UserError

_BYTE_ORDER_MARKS = (  # the marks of UTF-32 start with those of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_LETTER = re.compile(rb"[\x80-\xfe]")
SCANNED_BYTES = 64 << 20  # of a file whose encoding is unclear


def detect_encoding(head: bytes) -> str:
    """Returns the Python name of the encoding of a text, from its first bytes.

    UTF-16 and UTF-32 have a byte order mark, or a zero byte next to each of the first ASCII characters. Every other
    text is assumed to be UTF-8.
    """
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    sample = head[:8]
    if len(sample) >= 4 and sample.count(0) * 2 >= len(sample) - 1:
        if sample.count(0) > len(sample) / 2:
            return "utf-32-le" if sample[0] else "utf-32-be"
        return "utf-16-le" if sample[0] else "utf-16-be"
    return "utf-8"


def decode_text(raw: bytes, file: Path) -> str:
    """Decodes the content of a file in UTF-8, UTF-16 or UTF-32, without a byte order mark.

    Raises:
        UserError: The content has another encoding. The message names the likely one.
    """
    encoding = detect_encoding(raw)
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-8"):
            raise not_utf8(file, error.start) from None
        raise UserError(
            f"is broken {encoding[:6].upper()} text at byte {error.start}. Save it as UTF-8.",
            code="invalid-encoding",
            file=file,
        ) from None


def is_other_encoding(file: Path) -> bool:
    """Returns whether a file that is not UTF-8 has another encoding altogether, and not just a few damaged bytes.

    A file with at least one valid UTF-8 character beyond ASCII is UTF-8 text with damaged bytes. So is one whose only
    such byte is 0xff, which is hardly a letter in any 8-bit encoding.
    """
    with file.open("rb") as handle:
        content = handle.read(SCANNED_BYTES)
    return _MULTIBYTE.search(content) is None and _LETTER.search(content) is not None


def not_utf8(file: Path, position: int | None = None) -> UserError:
    """Returns the error for a file that is not UTF-8, with its likely encoding.

    Args:
        file: The file.
        position: The position of the first byte that is not UTF-8, from 0.
    """
    with file.open("rb") as handle:
        encoding = detect_encoding(handle.read(16))
    if not encoding.startswith("utf-8"):
        problem = f"is {encoding[:6].upper()}"
    else:
        byte = "" if position is None else f" (byte {position})"
        likely = "Windows-1252 (Latin-1) or another 8-bit encoding" if is_other_encoding(file) else "damaged UTF-8"
        problem = f"is not UTF-8 text{byte}. It looks like {likely}"
    return UserError(f"{problem}. Save it as UTF-8.", code="invalid-encoding", file=file)
