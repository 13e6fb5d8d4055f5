"""Claims on the files of a site's assets: on one machine no second home serves the same patients at the same time.

Two homes, as of two federations, would each have a ledger, and the patients would be charged in both without either
knowing of the other. The claim is an advisory lock of the kernel on each file or folder, which ends with its process; a
file system without such locks is let pass.
"""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

from consilium_client.site_config import SiteConfig
from consilium_shared.errors import ConfigurationError

log = logging.getLogger("consilium.agent")


class Claims:
    """Claims of one agent, held until its process ends or ``release`` is called."""

    def __init__(self, config: SiteConfig, root: Path) -> None:
        """Claims every path of every asset that is there.

        Args:
            config: site.yaml.
            root: folder from which its relative paths are read.

        Raises:
            ConfigurationError: another home's agent has one of them.
        """
        self._held: list[int] = []
        for name, asset in sorted(config.assets.items()):
            paths = {value.resolve() for value in vars(asset.at(root)).values() if isinstance(value, Path)}
            for path in sorted(paths):
                self._claim(name, path)

    def _claim(self, asset: str, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # a share that is not mounted, or no right to read: said when a study wants it
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            self.release()
            raise ConfigurationError(
                f"asset {asset!r}: {path} is held by another program, as by the agent of another home on this machine. "
                "Two homes over the same patients, such as of two federations, would each spend the whole budget: stop "
                "one of them, or give each patients of its own (docs/hospital-it.md, One home for one set of patients)"
            ) from None
        except OSError as error:
            os.close(fd)
            log.info("asset %s: its files cannot be claimed (%s)", asset, error.strerror)
        else:
            self._held.append(fd)

    def release(self) -> None:
        """Give all claims up."""
        while self._held:
            with suppress(OSError):
                os.close(self._held.pop())
