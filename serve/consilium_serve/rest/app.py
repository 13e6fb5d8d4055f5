"""REST interface of the service: single and batch, health, pages, and the paths of KServe's protocol."""

from __future__ import annotations

import logging
import traceback
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from consilium_serve import fhir
from consilium_serve.explain import explain
from consilium_serve.home import MOST_RECORDS
from consilium_serve.model import NOTICE, Model
from consilium_serve.rest import kserve
from consilium_serve.rest.guard import Guard
from consilium_serve.service import Case, Service
from consilium_shared.config import Strict
from consilium_shared.errors import ConsiliumError, DataError, PeerError
from consilium_shared.preparation.record import prepare
from consilium_shared.protocol.version import about

log = logging.getLogger("consilium.predict")

Identifier = Annotated[str, Field(min_length=1, max_length=256)]


_DICOM_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/dicom": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class One(Strict):
    """One record to predict on."""

    record: dict[str, Any]
    """Names and values as the study declares them; ``preprocessing.json`` of the bundle lists them."""
    explain: bool = False
    """Request for an explanation: how much each part of the record moved the answer. Takes many times as long."""
    patient: Identifier | None = None
    """Identifier of the patient. The record of predictions keeps a pseudonym of it, no answer has it."""


class Many(Strict):
    """Records to predict on, answered in order."""

    records: Annotated[list[One], Field(min_length=1, max_length=MOST_RECORDS)]


def make_app(service: Service) -> FastAPI:
    """The application, without its guard."""
    app = FastAPI(
        title="consilium-predict", version=about()["consilium"], description=NOTICE, docs_url=None, redoc_url=None
    )

    @app.get("/health/live", tags=["health"])
    def live() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", tags=["health"])
    def ready() -> JSONResponse:
        """Say whether models answer."""
        return JSONResponse({"status": "ready" if service.studies else "no model"}, 200 if service.studies else 503)

    @app.get("/v1/models", tags=["models"])
    def models() -> dict[str, Any]:
        """List what answers."""
        return {"models": [described(service, service.model(study)) for study in service.studies]}

    @app.get("/v1/models/{study}", tags=["models"])
    def one_model(study: str) -> dict[str, Any]:
        """Describe the version of a study's model that answers."""
        return described(service, service.model(study))

    @app.get("/v1/models/{study}/page", tags=["models"])
    def page(study: str) -> Response:
        """Show the model's page, for people."""
        return Response(
            service.model(study).page,
            media_type="text/html; charset=utf-8",
            headers={
                "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
            },
        )

    @app.post("/v1/models/{study}/predict", tags=["predict"])
    def predict(study: str, body: One, request: Request) -> dict[str, Any]:
        """Predict on one record."""
        model = service.model(study)
        case = Case(prepare(model.study, body.record), body.patient)
        told = service.predict(model, [case], client(request))[0]
        if body.explain and told["prediction"] is not None:
            told["explanation"] = explain(model, case.prepared)
        return told

    @app.post("/v1/models/{study}/batch", tags=["predict"])
    def batch(study: str, body: Many, request: Request) -> dict[str, Any]:
        """Predict on several records."""
        model = service.model(study)
        if len(body.records) > service.settings.limits.records:
            raise DataError(f"more than {service.settings.limits.records} records in one request")
        cases = [Case(prepare(model.study, one.record), one.patient) for one in body.records]
        return {"answers": service.predict(model, cases, client(request))}

    @app.post("/v1/models/{study}/fhir", tags=["predict"])
    def of_bundle(
        study: str, body: dict[str, Any], request: Request, start: Annotated[str | None, Query(max_length=64)] = None
    ) -> Response:
        """Predict on a FHIR Bundle of one patient, and answer with a RiskAssessment.

        `start` is the beginning of a series' window; without it the beginning of the Bundle's one Encounter is.
        """
        model, codes = service.model(study), service.settings.fhir.get(study)
        if codes is None:
            raise DataError("predict.yaml has no codes of this study (fhir)")
        try:
            found = fhir.read(model.study, body, codes, None if start is None else fhir.moment(start))
        except (TypeError, AttributeError, ValueError, OverflowError):
            raise DataError("a resource of the Bundle is not as FHIR R4 has it") from None
        case = Case(prepare(model.study, found.record), found.patient[:256])
        told = service.predict(model, [case], client(request))[0]
        assessment = fhir.risk_assessment(told, model.predictions, found, datetime.now(UTC))
        return JSONResponse(assessment, media_type="application/fhir+json")

    @app.post("/v1/models/{study}/dicom", tags=["predict"], openapi_extra=_DICOM_BODY)
    async def dicom(study: str, request: Request) -> dict[str, Any]:
        """Predict on one DICOM file of an image, which is the body."""
        data = await request.body()
        return await run_in_threadpool(of_file, study, data, client(request))

    def of_file(study: str, data: bytes, who: str) -> dict[str, Any]:
        from consilium_serve.images import case_of_bytes

        model = service.model(study)
        case = case_of_bytes(model.study, data, service.home.asked)
        return service.predict(model, [case], who)[0]

    kserve.add(app, service)
    _answer_errors(app)
    return app


def guarded(service: Service) -> Guard:
    """The application behind its guard."""
    limits = service.settings.limits
    return Guard(
        make_app(service),
        service.home.tokens,
        certificates=service.settings.listen.client_ca is not None,
        per_minute=limits.requests_per_minute,
        body_bytes=limits.body_bytes,
        at_once=limits.at_once,
        waiting=limits.waiting,
    )


def client(request: Request) -> str:
    """Name of the client that asks, as the guard found it."""
    return str(request.scope.get("consilium.client", "unknown"))


def described(service: Service, model: Model) -> dict[str, Any]:
    """Description of a model for clients."""
    return {
        "study": model.study.study,
        "version": model.version,
        "sha256": model.sha256,
        "task": model.study.task,
        **model.predictions.declared(),
        "threshold": service.threshold(model.study.study) if model.predictions.thresholds else None,
        "metrics": model.card.get("metrics"),
        "notice": NOTICE,
    }


def _answer_errors(app: FastAPI) -> None:
    """Answer every error in one shape, with nothing of a record or of the program's inside in it."""

    def told(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"status": status, "message": message}}, status)

    async def wrong_body(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101  (registered for it)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        return told(422, f"{where}: {first['msg']}" if first["type"] != "json_invalid" else "the body is not JSON")

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101
        return told(error.status_code, str(error.detail))

    async def ours(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, DataError | PeerError):
            return told(404 if str(error).startswith("no such model") else 422, str(error))
        log.error("%s", error)
        return told(503, "the service cannot answer; its log says why")

    async def defect(_: Request, error: Exception) -> JSONResponse:
        stack = "".join(traceback.format_tb(error.__traceback__))  # the text of an error may quote a record
        log.error("a defect of Consilium: %s\n%s", type(error).__name__, stack)
        return told(500, "a defect of Consilium; the service's log has where")

    app.add_exception_handler(RequestValidationError, wrong_body)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ConsiliumError, ours)

    @app.middleware("http")
    async def last(request: Request, call_next: Any) -> Response:
        try:
            found: Response = await call_next(request)
            return found
        except Exception as error:
            return await defect(request, error)
