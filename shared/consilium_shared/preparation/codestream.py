"""The size of a picture as its own code stream says it, which a decoder obeys whatever the DICOM header says."""

from __future__ import annotations

_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}

_BOXES = b"\0\0\0\x0cJXL \r\n\x87\n"
_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def picture_size(stream: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG, JPEG-LS, JPEG 2000, HTJ2K or JPEG XL stream, or None where it says none."""
    at = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at >= 0:
        right, bottom, left, top = (int.from_bytes(stream[at + n : at + n + 4], "big") for n in (8, 12, 16, 20))
        return bottom - top, right - left
    if stream.startswith((b"\xff\x0a", _BOXES)):
        return _of_jpeg_xl(stream)
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


def _of_jpeg_xl(stream: bytes) -> tuple[int, int] | None:
    """The size header of ISO 18181-1, bit by bit, from a bare stream or the first piece of one in boxes."""
    at = 0
    if stream.startswith(_BOXES):
        at = 12
        while at + 12 <= len(stream):
            length, kind = int.from_bytes(stream[at : at + 4], "big"), stream[at + 4 : at + 8]
            if kind in (b"jxlc", b"jxlp"):
                at += 8 if kind == b"jxlc" else 12
                break
            if length < 8:
                return None
            at += length
    if stream[at : at + 2] != b"\xff\x0a":
        return None
    bits, used = int.from_bytes(stream[at + 2 : at + 18], "little"), 0

    def take(count: int) -> int:
        nonlocal used
        found = (bits >> used) & ((1 << count) - 1)
        used += count
        return found

    def side() -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    small = take(1)
    rows = side()
    ratio = take(3)
    if ratio == 0:
        return rows, side()
    across, down = _RATIOS[ratio - 1]
    return rows, rows * across // down
