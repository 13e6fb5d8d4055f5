"""Bundle of a finished model: the files that a hospital needs to use it, and the signed manifest that names each."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from consilium_shared import documents
from consilium_shared.canonical import digest
from consilium_shared.config import Strict
from consilium_shared.errors import ConfigurationError, PeerError, SignatureError
from consilium_shared.fields import Hex32, Name
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.limits import CARD_BYTES, FILE_BYTES, PAYLOAD_BYTES

DOMAIN = "model-bundle"

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
WEIGHTS = "model.safetensors"
CARD = "card.json"
PREPROCESSING = "preprocessing.json"
EXAMPLE = "example.json"
SCRIPT = "predict.py"
LICENSE = "LICENSE"
PAGE = "model.html"

LARGEST = {
    GRAPH: PAYLOAD_BYTES,
    WEIGHTS: PAYLOAD_BYTES,
    CARD: CARD_BYTES,
    PREPROCESSING: 16 * FILE_BYTES,
    EXAMPLE: 64 * FILE_BYTES,
    SCRIPT: FILE_BYTES,
    LICENSE: FILE_BYTES,
    PAGE: 16 * FILE_BYTES,
}
"""Every file that a bundle may have besides its manifest, and the most bytes of each."""

NEEDED = (GRAPH, CARD, PREPROCESSING, EXAMPLE)
"""Files without which nothing can be predicted or checked."""


class File(Strict):
    """A file of a bundle."""

    sha256: Hex32
    bytes: Annotated[int, Field(ge=0, le=PAYLOAD_BYTES)]


class Manifest(Strict):
    """Manifest of a bundle, which the coordinator signs."""

    bundle: Literal[1] = 1
    """Number of the bundle's format."""
    federation: Hex32
    coordinator: Hex32
    """Key that signed, for whoever compares its fingerprint."""
    study: Name
    version: Annotated[int, Field(ge=1)]
    study_digest: Hex32
    model: Hex32
    """SHA-256 of the model's safetensors bytes, as the card has it: the version that a prediction names."""
    files: Annotated[dict[str, File], Field(max_length=len(LARGEST))]


class Bundle:
    """A bundle whose signature and digests were verified.

    Attributes:
        manifest: what the coordinator signed.
        files: bytes of every file but the manifest, by name.
        signed: bytes of the manifest, as they were signed.
        card: body of the model card, verified under the same key.
    """

    def __init__(self, manifest: Manifest, files: Mapping[str, bytes], signed: bytes, card: Mapping[str, Any]) -> None:
        self.manifest = manifest
        self.signed = signed
        self.files = dict(files)
        self.card = card

    def zipped(self) -> bytes:
        """The whole bundle as a zip file's bytes."""
        return zipped({**self.files, MANIFEST: self.signed})


def seal(files: Mapping[str, bytes], coordinator: Identity, **facts: object) -> bytes:
    """The manifest of those files, signed.

    Args:
        files: by name.
        coordinator: the coordinator's key.
        facts: ``federation``, ``study``, ``version``, ``study_digest``, ``model`` of ``Manifest``.

    Raises:
        ConfigurationError: a file is larger than its bound.
    """
    for name, data in files.items():
        if len(data) > LARGEST[name]:
            raise ConfigurationError(f"{name} has {len(data)} bytes, more than the {LARGEST[name]} of a bundle")
    body = Manifest.model_validate(
        {
            **facts,
            "coordinator": coordinator.public.hex(),
            "files": {name: {"sha256": digest(data), "bytes": len(data)} for name, data in sorted(files.items())},
        }
    )
    return documents.seal(body.model_dump(mode="json"), DOMAIN, coordinator)


def open_bundle(path: Path, fingerprint: str) -> Bundle:
    """The bundle in a folder or zip file, verified before anything of it is used.

    Args:
        path: of the folder, or of the zip file.
        fingerprint: the coordinator's, as it was compared by telephone; blanks and case do not matter.

    Raises:
        ConfigurationError: there is no such bundle, or the fingerprint is not one.
        SignatureError: signed by another key, or altered.
        PeerError: damaged, incomplete, or with files that no bundle has.
    """
    from consilium_shared.protocol.records import CARD_DOMAIN

    wanted = plain(fingerprint)
    found = _read_zip(path) if path.is_file() else _read_folder(path)
    raw = found.pop(MANIFEST, None)
    if raw is None:
        raise PeerError(f"{path}: no {MANIFEST}: this is not a model's bundle")
    body, signature = documents.parse(raw)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise PeerError(f"{path}: {MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    key = PublicIdentity.from_hex(manifest.coordinator)
    if plain(key.fingerprint) != wanted:
        raise SignatureError(
            f"{path}: signed by the coordinator with the fingerprint {key.fingerprint}, which is not the one given"
        )
    documents.verify(body, signature, DOMAIN, key)
    if set(found) != set(manifest.files):
        odd = sorted(set(found) ^ set(manifest.files))
        raise PeerError(f"{path}: files missing, or there without being signed: {', '.join(odd)}")
    for name, file in manifest.files.items():
        if len(found[name]) != file.bytes or digest(found[name]) != file.sha256:
            raise SignatureError(f"{path}: {name} is not the file that was signed")
    absent = [name for name in NEEDED if name not in found]
    if absent:
        raise PeerError(f"{path}: no {', '.join(absent)}")
    card, signed = documents.parse(found[CARD], CARD_BYTES)
    documents.verify(card, signed, CARD_DOMAIN, key)
    if card.get("study_digest") != manifest.study_digest or card.get("model", {}).get("sha256") != manifest.model:
        raise PeerError(f"{path}: {CARD} and {MANIFEST} are about different models")
    return Bundle(manifest, found, raw, card)


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Bytes of a zip file of those files; the same files give the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, data)
    return out.getvalue()


def plain(fingerprint: str) -> str:
    """The fingerprint without blanks, in lower case; raises ConfigurationError where it is none."""
    text = "".join(fingerprint.split()).lower()
    if len(text) != 32 or any(c not in "0123456789abcdef" for c in text):
        raise ConfigurationError("a fingerprint is eight groups of four hex digits, as consilium-server provision says")
    return text


def _bound(name: str) -> int:
    bound = {**LARGEST, MANIFEST: FILE_BYTES}.get(name)
    if bound is None:
        raise PeerError(f"{name}: no bundle has such a file")
    return bound


def _read_folder(path: Path) -> dict[str, bytes]:
    try:
        found = {}
        for file in sorted(path.iterdir()):
            bound = _bound(file.name)
            if not file.is_file() or file.stat().st_size > bound:
                raise PeerError(f"{file} is no ordinary file of at most {bound} bytes")
            found[file.name] = file.read_bytes()
        return found
    except OSError as error:
        raise ConfigurationError(f"cannot read the bundle {path}: {error.strerror}") from error


def _read_zip(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) > len(LARGEST) + 1:
                raise PeerError(f"{path}: more files than a bundle has")
            found = {}
            for info in archive.infolist():
                bound = _bound(info.filename)
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise PeerError(f"{path}: {info.filename} is packed as no bundle is")
                with archive.open(info) as member:  # the size that the header says is not believed
                    data = member.read(bound + 1)
                if len(data) > bound or info.filename in found:
                    raise PeerError(f"{path}: {info.filename} is there twice, or larger than {bound} bytes")
                found[info.filename] = data
            return found
    except OSError as error:
        raise ConfigurationError(f"cannot read the bundle {path}: {error.strerror}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error) as error:
        raise PeerError(f"{path}: not a zip file, or a damaged one") from error
