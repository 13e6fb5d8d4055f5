"""Installed versions of each study's model: which answers, which only shadows, and which answered before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from consilium_serve.home import Home
from consilium_shared.config import Strict
from consilium_shared.errors import ConfigurationError, IntegrityError
from consilium_shared.files import write_atomically
from consilium_shared.protocol.bundle import Bundle, open_bundle

Version = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class State(Strict):
    """Versions of one study, by the first 12 digits of the model's SHA-256."""

    active: Version | None = None
    before: tuple[Version, ...] = ()
    """Versions that answered before, the latest last."""
    shadow: Version | None = None
    """Version whose answers are recorded and not shown."""


@dataclass(frozen=True)
class Versions:
    """Versions of one study at a home."""

    home: Home
    study: str

    @property
    def folder(self) -> Path:
        """Folder with a zip file of each version."""
        return self.home.models / self.study

    @property
    def installed(self) -> tuple[str, ...]:
        """Every version that is here."""
        return tuple(sorted(file.stem for file in self.folder.glob("*.zip")))

    def state(self) -> State:
        """Role of each version; raises IntegrityError where the file is damaged."""
        file = self.folder / "state.json"
        try:
            return State.model_validate(json.loads(file.read_bytes())) if file.exists() else State()
        except (OSError, ValueError, ValidationError) as error:
            raise IntegrityError(f"{file} is damaged; consilium-predict activate writes it anew") from error

    def bundle(self, version: str) -> Bundle:
        """An installed bundle, verified anew under the fingerprint of predict.yaml.

        Raises:
            IntegrityError: the file has another study's or version's bundle.
            ConfigurationError, PeerError, SignatureError: as ``open_bundle``.
        """
        file = self.folder / f"{version}.zip"
        found = open_bundle(file, self.home.settings().coordinator)
        if (found.manifest.study, found.manifest.model[:12]) != (self.study, version):
            raise IntegrityError(f"{file} has {found.manifest.study} {found.manifest.model[:12]}; add the bundle again")
        return found

    def activate(self, version: str) -> State:
        """Let a version answer; what answered until now can be rolled back to. A damaged state is written anew."""
        version = self._of(version)
        try:
            state = self.state()
        except IntegrityError:
            state = State()
        if version == state.active:
            return state
        before = state.before if state.active is None else (*state.before, state.active)
        shadow = None if state.shadow == version else state.shadow
        return self._write(State(active=version, before=before[-20:], shadow=shadow))

    def rollback(self) -> State:
        """Let the version answer that did before; raises ConfigurationError where there is none."""
        state = self.state()
        if not state.before:
            raise ConfigurationError(f"no other version of {self.study} has answered here")
        *before, last = state.before
        return self._write(State(active=self._of(last), before=tuple(before), shadow=state.shadow))

    def let_shadow(self, version: str | None) -> State:
        """Let a version answer for the record alone, beside the active one; None ends that."""
        state = self.state()
        if version is not None and self._of(version) == state.active:
            raise ConfigurationError(f"{version} is the version that answers")
        return self._write(state.model_copy(update={"shadow": None if version is None else self._of(version)}))

    def _of(self, version: str) -> str:
        found = [each for each in self.installed if version and each.startswith(version[:12])]
        if len(found) != 1:
            have = ", ".join(self.installed) or "none"
            raise ConfigurationError(f"no version {version} of {self.study}; there are: {have}")
        return found[0]

    def _write(self, state: State) -> State:
        write_atomically(
            self.folder / "state.json", json.dumps(state.model_dump(mode="json"), indent=2).encode() + b"\n"
        )
        return state


def studies(home: Home) -> tuple[str, ...]:
    """Studies of which a model is installed."""
    return tuple(sorted({file.parent.name for file in home.models.glob("*/*.zip")}))


def add(home: Home, path: Path) -> tuple[Versions, str, bool]:
    """Verify a bundle and install it; the first version of a study answers at once.

    Returns:
        the study's versions, the new one's number, and whether it was installed before.

    Raises:
        ConfigurationError, PeerError, SignatureError: as ``open_bundle``; nothing is installed then.
        IntegrityError: it does not answer on this machine as its example says.
    """
    from consilium_serve.model import Model

    bundle = open_bundle(path, home.settings().coordinator)
    Model(bundle)
    versions, version = Versions(home, bundle.manifest.study), bundle.manifest.model[:12]
    there = version in versions.installed
    if not there:
        write_atomically(versions.folder / f"{version}.zip", bundle.zipped())
    if versions.state().active is None:
        versions.activate(version)
    return versions, version, there
