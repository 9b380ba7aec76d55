"""The HTTP interface of a served model: what may be asked, what is answered, what is counted. It knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from raydistill.serving.answers import Asked
from raydistill.serving.served import Served

PREDICT = "/predict"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BYTES_PER_CHARACTER = 12  # that JSON may take for one: two escapes of six
SPARE_BYTES = 4096  # of a body, for all but its texts


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    texts: int
    characters: int  # of a text


@dataclass(frozen=True)
class Reply:
    """What a model answered to a request, and the size of a batch where that is not counted yet."""

    records: list[dict[str, Any]]
    batch_texts: int | None


Ask = Callable[[list[str], Asked], Awaitable[Reply]]


class Question(BaseModel):
    """One text, or several; of a classifier also how much of each answer is wanted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"text": "where is my parcel?"}, {"texts": ["a", "b"], "top": 2}]},
    )
    text: str | None = Field(default=None, description="one text")
    texts: list[str] | None = Field(default=None, description="or several")
    top: int = Field(default=0, ge=0, le=10_000, description="list so many classes, the likeliest first")
    all: bool = Field(default=False, description="the probability of every class")


class Unanswerable(ValueError):
    """A question that is not answered, and why in one line."""


def texts_of(question: Question, limits: Limits, served: Served) -> list[str]:
    """The texts of a question without the space around them. Raises Unanswerable."""
    if (question.text is None) == (question.texts is None):
        raise Unanswerable("give either text or texts")
    if served.task == "causal_lm" and (question.top or question.all):
        raise Unanswerable("top and all are for classifiers; leave them out")
    if question.texts is not None and not 1 <= len(question.texts) <= limits.texts:
        raise Unanswerable(f"texts: found {len(question.texts)}; a request may have 1 to {limits.texts}")
    texts = [question.text] if question.text is not None else question.texts or []
    return [_checked(f"texts[{n}]" if question.text is None else "text", t, limits) for n, t in enumerate(texts)]


def _checked(name: str, text: str, limits: Limits) -> str:
    if len(text) > limits.characters:
        raise Unanswerable(f"{name}: found {len(text)} characters; a text may have {limits.characters}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unanswerable(f"{name}: is not Unicode text (half of a pair of surrogates)") from None
    if not text.strip():
        raise Unanswerable(f"{name}: is empty")
    return text.strip()


class Metrics:
    """Counts for Prometheus, of this process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("raydistill_requests", "Requests to /predict by status.", ["status"], **named)
        self.texts = Counter("raydistill_texts", "Texts that were answered.", **named)
        self.seconds = Histogram("raydistill_request_seconds", "Of a request to /predict.", buckets=SECONDS, **named)
        self.batches = Histogram("raydistill_batch_texts", "Texts computed together.", buckets=BATCHES, **named)


def make_api(served: Served, limits: Limits, ask: Ask, busy: Sequence[type[Exception]] = ()) -> FastAPI:
    """The application; `ask` answers texts, and raises one of `busy` when too many wait."""
    api = FastAPI(
        title="raydistill", description=f"Answers of a distilled model; its task is {served.task}.", version="1"
    )
    metrics, largest = Metrics(), limits.texts * limits.characters * BYTES_PER_CHARACTER + SPARE_BYTES

    @api.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path.rpartition("/")[2] != PREDICT[1:]:
            return await call_next(request)
        started, said = time.perf_counter(), request.headers.get("content-length", "")
        if request.method == "POST" and not (said.isdigit() and int(said) <= largest):
            response: Response = _error(413, f"the body must say its length, at most {largest} bytes")
        else:
            response = await call_next(request)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.seconds.observe(time.perf_counter() - started)
        return response

    @api.post(PREDICT, responses={422: {"description": "What is wrong with the question, in one line"}})
    async def predict(question: Question) -> dict[str, Any]:
        """The answer to a text, or of several {"answers": [one for each, in their order]}."""
        texts = texts_of(question, limits, served)
        reply = await ask(texts, Asked(top=question.top, all_classes=question.all))
        metrics.texts.inc(len(texts))
        if reply.batch_texts is not None:
            metrics.batches.observe(reply.batch_texts)
        return reply.records[0] if question.text is not None else {"answers": reply.records}

    @api.get("/health")
    async def health() -> dict[str, Any]:
        """That a model answers, and what it is for."""
        await ask([], Asked())
        return {"status": "ok", "task": served.task, "labels": list(served.labels), "max_length": served.max_length}

    @api.get("/metrics")
    async def numbers() -> Response:
        """Requests, their seconds and the sizes of batches, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    _answer_errors(api, busy)
    return api


def _answer_errors(api: FastAPI, busy: Sequence[type[Exception]]) -> None:
    """Each error as {"error": one line}."""

    async def wrong(_: Request, error: Exception) -> JSONResponse:
        return _error(422, str(error))

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(
            str(part) for part in first["loc"][1:] if not isinstance(part, int) or first["type"][:4] != "json"
        )
        return _error(422, f"{place}: {first['msg'].lower()}" if place else f"the body is {first['msg'].lower()}")

    async def overloaded(_: Request, error: Exception) -> JSONResponse:
        return _error(503, "too many requests wait; ask again later")

    api.add_exception_handler(Unanswerable, wrong)
    api.add_exception_handler(RequestValidationError, malformed)
    for kind in busy:
        api.add_exception_handler(kind, overloaded)


def _error(status: int, line: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(line.split())}, status)
