"""Images in whose pixels a name or a face may stand: set aside with the reason, unless a person permitted the kind.

No program reads the pixels for text. What is known is what the instance says of itself, and which kinds of image
commonly carry text.
"""

from __future__ import annotations

from collections.abc import Collection

from pydicom.dataset import Dataset

from consilium_client.intake.settings import Suspect

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_ULTRASOUND = {"US", "IVUS"}
_ULTRASOUND_IMAGES = {f"1.2.840.10008.5.1.4.1.1.{each}" for each in ("3", "3.1", "6", "6.1", "6.2")}
_PHOTOGRAPHS = {"XC", "GM", "ES", "DMS", "OP"}
_SCREENS = ("SCREEN", "REPORT", "PROTOCOL", "DOSE", "SUMMARY", "RESULT", "CAPTURE", "SNAPSHOT", "PRESENTATION STATE")


def suspicion(dataset: Dataset, permitted: Collection[Suspect]) -> str | None:
    """Reason why text or a face may stand in an instance's pixels, or None.

    Args:
        dataset: the instance as it came.
        permitted: kinds that somebody looked at, and permitted.
    """
    if "YES" in _words(dataset, "BurnedInAnnotation"):
        return "the image says that text stands in its pixels (BurnedInAnnotation)"
    if "YES" in _words(dataset, "RecognizableVisualFeatures"):
        return "the image says that a person can be recognised (RecognizableVisualFeatures)"
    kinds = _words(dataset, "ImageType")
    screen = next((kind for kind in kinds for word in _SCREENS if word in kind), None)
    if screen is not None:
        return "a picture of a screen or a report (ImageType)"
    modality, kind = _word(dataset, "Modality"), str(dataset.get("SOPClassUID", ""))
    if modality in _PHOTOGRAPHS or kind.startswith("1.2.840.10008.5.1.4.1.1.77.1"):
        return f"a photograph (modality {modality if modality in _PHOTOGRAPHS else 'of visible light'})"
    for group in range(0x6000, 0x6100, 2):
        if (group, 0x0010) in dataset and (group, 0x3000) not in dataset:
            return "an overlay in the same bits as the image"
    captured = kind == _SECONDARY_CAPTURE or kind.startswith(_SECONDARY_CAPTURE + ".")
    if "secondary-capture" not in permitted and (captured or modality == "SC" or "ConversionType" in dataset):
        return "a secondary capture (permit: secondary-capture)"
    if "ultrasound" not in permitted and (modality in _ULTRASOUND or kind in _ULTRASOUND_IMAGES):
        return "ultrasound, which commonly has names in its pixels (permit: ultrasound)"
    if "derived-secondary" not in permitted and len(kinds) > 1 and kinds[1] == "SECONDARY":
        return "made from other images after the examination (ImageType SECONDARY; permit: derived-secondary)"
    return None


def _word(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip().upper()


def _words(dataset: Dataset, keyword: str) -> list[str]:
    value = dataset.get(keyword)
    values = [] if value is None else [value] if isinstance(value, str) else list(value)
    return [str(each).strip().upper() for each in values]
