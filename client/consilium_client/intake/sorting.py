"""Sorting of the inbox: instances become an asset's files, de-identified, or are set aside with the reason.

    TO/P…/2.25.….dcm     by pseudonym and new UID

A file of the inbox is deleted when its new form is on the disk and the journal says so. Run again at any moment, it
does what is left, with the same names.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset

from consilium_client.intake.deidentify import deidentify
from consilium_client.intake.inbox import Inbox, Instance
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.settings import Deidentify
from consilium_client.intake.suspects import suspicion
from consilium_shared.errors import ConfigurationError, DataError
from consilium_shared.files import write_atomically
from consilium_shared.preparation.foreign import Unusable, read_whole


def sort(
    inbox: Inbox, names: Pseudonyms, settings: Deidentify, again: bool, on_progress: Callable[[int], None]
) -> Counter[str]:
    """De-identify what waits in the inbox.

    Args:
        inbox: where instances wait.
        names: the site's new names.
        settings: where to, and what stays; paths are absolute.
        again: look at what was set aside before, too: the settings may permit it now.
        on_progress: called with the number of instances done.

    Returns:
        how many were done (``done``), and set aside by reason.

    Raises:
        ConfigurationError: the folder cannot be written.
    """
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # its warnings quote values
    warnings.simplefilter("ignore", UserWarning)
    counts: Counter[str] = Counter()
    if settings.originals == "delete":
        for left in list(inbox.left_behind()):
            left.unlink(missing_ok=True)
    states = ("inbox", "aside") if again else ("inbox",)
    for number, instance in enumerate(inbox.instances(*states), start=1):
        path = inbox.path(instance.digest)
        try:
            target, content = _new_form(instance, path, names, settings)
        except DataError as error:
            inbox.settle(instance.digest, "aside", str(error))
            counts[str(error)] += 1
        else:
            try:
                write_atomically(target, content)
            except OSError as error:
                raise ConfigurationError(f"cannot write to {settings.to}: {error.strerror}") from error
            inbox.settle(instance.digest, "done")
            counts["done"] += 1
            if settings.originals == "delete":
                path.unlink(missing_ok=True)
        on_progress(number)
    return counts


def _new_form(instance: Instance, path: Path, names: Pseudonyms, settings: Deidentify) -> tuple[Path, bytes]:
    source = _read(path)
    if str(source.get("SOPInstanceUID", "")) != instance.uid:
        raise DataError("its SOP instance UID is another than its sender said")
    why = suspicion(source, settings.permit)
    if why is not None:
        raise DataError(why)
    made, pseudonym = deidentify(source, names, settings.retain)
    written = BytesIO()
    try:
        made.save_as(written, enforce_file_format=True)
    except Exception as error:  # whatever pydicom raises over values that do not fit together
        raise DataError(f"cannot be written anew ({type(error).__name__})") from error
    return settings.to / pseudonym / f"{made.SOPInstanceUID}.dcm", written.getvalue()


def _read(path: Path) -> Dataset:
    try:
        return read_whole(path)
    except Unusable as error:
        raise DataError(str(error)) from None
