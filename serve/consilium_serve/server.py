"""The service's process: opens the record, loads the models, listens until it is told to stop."""

from __future__ import annotations

import logging
import ssl
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from consilium_serve.dicom_settings import Dicom
from consilium_serve.home import Home, Settings
from consilium_serve.record import Record
from consilium_serve.rest.app import guarded
from consilium_serve.service import Service, watch
from consilium_shared.errors import ConfigurationError
from consilium_shared.process import logs
from consilium_shared.transport.strangers import Strangers

if TYPE_CHECKING:
    from consilium_serve.dicom.desk import Desk

AT_ONCE = 256
"""Most connections of all clients; one more is told to come again."""
STRANGERS = 128
"""Connections without a request that passed the guard."""
STRANGER_SECONDS = 30.0
"""Seconds after which a connection without a request that passed the guard is closed."""


def serve_forever(home: Home, say: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: nothing may ask, no model is installed, a file is missing, or the port is taken.
        IntegrityError, PeerError: a model or the record does not verify.
    """
    logging.basicConfig(format=logs.FORMAT, level=logging.INFO)
    warnings.simplefilter("ignore")  # pydicom's and highdicom's quote a patient's name, and would stand in the log
    settings = home.settings()
    if not home.tokens() and settings.listen.client_ca is None:
        raise ConfigurationError("nobody may ask yet: consilium-predict token NAME makes a token (or set client_ca)")
    service = Service(home, Record(home.records, home.identity(), settings.retention_days))
    stop, desk = threading.Event(), None
    try:
        if not service.studies:
            raise ConfigurationError("no model is installed: consilium-predict add BUNDLE")
        if settings.dicom is not None:
            desk = _desk(home, service, settings.dicom)
            desk.start()
        threading.Thread(target=watch, args=(service, stop), daemon=True, name="versions").start()
        server = uvicorn.Server(configuration(home, settings, service))
        sort = "https" if settings.listen.certificate else "http"
        say(f"{', '.join(service.studies)}: {sort}://{settings.listen.address}:{settings.listen.port}; Ctrl-C ends")
        try:
            server.run()
        except SystemExit:  # uvicorn's way to say that it cannot listen; its log line has the reason
            raise ConfigurationError(
                f"cannot listen on {settings.listen.address}:{settings.listen.port}; does something else?"
            ) from None
    finally:
        stop.set()
        if desk is not None:
            desk.stop()
        service.close()


def _desk(home: Home, service: Service, settings: Dicom) -> Desk:
    """The DICOM side; raises ConfigurationError where its study's model does not take images."""
    from consilium_serve.dicom.desk import Desk
    from consilium_shared import task

    if settings.study not in service.studies or task.reads(service.model(settings.study).study).image is None:
        raise ConfigurationError(
            f"{home.root}/predict.yaml: dicom: study: no installed model {settings.study} of images"
        )
    return Desk(home, service, settings)


def configuration(home: Home, settings: Settings, service: Service) -> uvicorn.Config:
    """Uvicorn's configuration for the service; raises ConfigurationError where a file of TLS cannot be used."""
    listen = settings.listen
    files = {
        "ssl_certfile": listen.certificate,
        "ssl_keyfile": listen.key,
        "ssl_ca_certs": listen.client_ca,
    }
    tls = {name: str(home.root / file) for name, file in files.items() if file is not None}
    config = uvicorn.Config(
        guarded(service),
        host=listen.address,
        port=listen.port,
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_keep_alive=30,
        limit_concurrency=AT_ONCE,
        http=Strangers(STRANGERS, STRANGER_SECONDS).protocol(),
        ws="none",
        h11_max_incomplete_event_size=2**16,
        timeout_graceful_shutdown=30,
        ssl_cert_reqs=ssl.CERT_REQUIRED if listen.client_ca else ssl.CERT_NONE,
        **tls,  # type: ignore[arg-type]
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"{home.root}/predict.yaml: listen: certificate, key or client_ca: {error}") from error
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return config
