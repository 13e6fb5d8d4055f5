"""The size of a picture as its own code stream says it, which a decoder obeys whatever the DICOM header says."""

from __future__ import annotations

_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def picture_size(stream: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG, JPEG-LS, JPEG 2000 or HTJ2K stream, or None where it says none."""
    at = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at >= 0:
        right, bottom, left, top = (int.from_bytes(stream[at + n : at + n + 4], "big") for n in (8, 12, 16, 20))
        return bottom - top, right - left
    if not stream.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _FRAMES:
            return int.from_bytes(stream[at + 5 : at + 7], "big"), int.from_bytes(stream[at + 7 : at + 9], "big")
        elif marker in _NO_LENGTH:
            at += 2
        else:
            at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None
