"""A program in the place of the one that prepares records: it says to each question what the environment has for it."""

from __future__ import annotations

import json
import os
import struct
import time
from typing import IO


def main() -> None:
    """``HOSTILE``: JSON of (what is written after each question, in hex digits; how): all, drip, deaf."""
    said, how = json.loads(os.environ["HOSTILE"])
    questions, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb", buffering=0)
    question(questions)
    answers.write(struct.pack("<I", 7) + b'"ready"')
    while how == "deaf":
        time.sleep(60)
    while question(questions):
        for number in range(0, len(said), 2 if how == "drip" else len(said)):
            answers.write(bytes.fromhex(said[number:] if how == "all" else said[number : number + 2]))
            time.sleep(0.05 if how == "drip" else 0)


def question(questions: IO[bytes]) -> bytes:
    """The next question; empty at the end."""
    head = questions.read(4)
    return questions.read(struct.unpack("<I", head)[0]) if len(head) == 4 else b""


if __name__ == "__main__":
    main()
