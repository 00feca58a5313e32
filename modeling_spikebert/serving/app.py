"""The HTTP interface: what a request may be, what is answered, what is counted."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .batching import Batch, Batcher, QueueFullError
from .classifier import InputError, OnnxClassifier, Text

LOGGER = logging.getLogger("uvicorn.error")  # the server's log
BODY_SECONDS = 10  # within which a body must arrive
CLASSIFYING = ("/classify", "/predict")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # buckets of the histograms
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ClassifyRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    inputs: str | list[str] = Field(description="One text, or a list of texts.")
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=1, description="How many classes to return, the most likely first; null returns all."
    )
    truncate: bool = Field(default=False, description="Cut texts that are too long, rather than refuse them.")


class PredictRequest(BaseModel):
    model_config = ConfigDict(strict=True)
    inputs: str | list[str] | list[list[str]] = Field(
        description="One text, a pair of texts in a list, or a list of lists of one or two texts."
    )
    raw_scores: bool = Field(default=False, description="Return logits rather than scores.")
    truncate: bool = Field(default=False, description="Cut texts that are too long, rather than refuse them.")


class Score(BaseModel):
    label: str
    score: float


class Failure(BaseModel):
    error: str
    error_type: str


class Metrics:
    """What `/metrics` reports, in a registry of its own."""

    def __init__(self, service: "Service") -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("spikebert_requests", "Answered requests.", ["path", "status"], **own)
        self.latency = Histogram(
            "spikebert_request_seconds", "From the head of a request to the end of its answer.", ["path"],
            buckets=SECONDS, **own,
        )  # fmt: skip
        self.batch_size = Histogram("spikebert_batch_sentences", "Sentences of a batch.", buckets=SIZES, **own)
        self.batch_seconds = Histogram("spikebert_batch_seconds", "Time to compute one.", buckets=SECONDS, **own)
        self.tokens = Counter("spikebert_tokens", "Tokens of all sentences.", **own)
        self.padding = Counter("spikebert_padding_tokens", "Tokens that were computed as padding.", **own)
        Gauge("spikebert_queue_sentences", "Sentences accepted and not yet answered.", **own).set_function(
            lambda: service.batcher.accepted
        )
        Gauge("spikebert_draining", "1 while the server stops.", **own).set_function(lambda: service.draining)

    def observe(self, batch: Batch) -> None:
        self.batch_size.observe(batch.sentences)
        self.batch_seconds.observe(batch.seconds)
        self.tokens.inc(batch.tokens)
        self.padding.inc(batch.padded_tokens - batch.tokens)


class Service:
    """A classifier behind a queue.

    Args:
        classifier: what computes.
        max_batch: most sentences of a batch.
        max_wait: seconds that a sentence waits for others while nothing is computed.
        max_queue: most sentences that are accepted and not yet answered.
    """

    def __init__(self, classifier: OnnxClassifier, max_batch: int, max_wait: float, max_queue: int) -> None:
        self.classifier = classifier
        self.metrics = Metrics(self)
        self.batcher = Batcher(classifier.logits, max_batch, max_wait, max_queue, self.metrics.observe)
        self.draining = False
        self.accepted = self.answered = 0  # requests
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # a long text must not hold up the others' answers

    async def scores(
        self, texts: Sequence[Text], truncate: bool, top_k: int | None, raw: bool = False
    ) -> list[list[dict[str, Any]]]:
        """For each text its `top_k` classes, or all, with the most likely first.

        Raises:
            HTTPException: 4xx for a text that cannot be taken, 503 if the queue is full, 500 if the graph fails.
        """
        if not texts:
            raise HTTPException(422, "inputs is empty. Send at least one text.")
        if len(texts) > self.batcher.max_queue:
            raise HTTPException(413, f"{len(texts)} texts in a request; at most {self.batcher.max_queue} are allowed.")
        try:
            self.batcher.reserve(len(texts))
        except QueueFullError:
            reason = f"The queue is full ({self.batcher.accepted} of {self.batcher.max_queue} sentences). Try again."
            raise HTTPException(503, reason, {"Retry-After": "1"}) from None
        try:
            loop = asyncio.get_running_loop()
            sentences = await loop.run_in_executor(self._tokenizing, self.classifier.encode, texts, truncate)
            logits = await self.batcher.run_batched(sentences)
        except InputError as error:
            raise HTTPException(413 if error.too_long else 422, str(error)) from error
        except Exception as error:  # ONNX Runtime's errors have no public base class
            LOGGER.error("%s failed: %s", self.classifier.path, error)
            raise HTTPException(500, "The model failed on this batch; the server's log says how.") from error
        finally:
            self.batcher.release(len(texts))
        rows = logits if raw else self.classifier.to_scores(logits)
        return [self._best(row.tolist(), top_k) for row in rows]

    def _best(self, row: list[float], top_k: int | None) -> list[dict[str, Any]]:
        best = sorted(zip(self.classifier.labels, row, strict=True), key=lambda each: each[1], reverse=True)[:top_k]
        return [{"label": label, "score": score} for label, score in best]


class Gate:
    """Around the whole app: counts requests, bounds what is read of them, and refuses new ones while stopping."""

    def __init__(self, app: ASGIApp, service: Service, max_bytes: int) -> None:
        self.app, self.service, self.max_bytes = app, service, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, service = time.perf_counter(), self.service
        path = scope["path"] if scope["path"] in (*CLASSIFYING, "/health", "/metrics", "/info") else "other"
        status, complete = 500, False

        async def observed_send(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if service.draining:  # so that the client opens a new connection, elsewhere
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            complete = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        accepted = False
        try:
            if path in CLASSIFYING and scope["method"] == "POST":
                refusal = self._refusal(dict(scope["headers"]))
                if refusal is not None:
                    return await refusal(scope, receive, observed_send)
                accepted = True
                service.accepted += 1
            await self.app(scope, self._bounded(receive), observed_send)
        finally:
            service.answered += accepted and complete
            service.metrics.requests.labels(path, status).inc()
            service.metrics.latency.labels(path).observe(time.perf_counter() - start)

    def _refusal(self, headers: dict[bytes, bytes]) -> Response | None:
        """What can be said before a body is read."""
        if self.service.draining:
            return failure(503, "The server is stopping.", {"Retry-After": "1"})
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            return failure(415, "The body must be JSON: send the header Content-Type: application/json.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_bytes:
            return failure(413, self._too_large())
        return None

    def _too_large(self) -> str:
        return f"The body is larger than {self.max_bytes // 1024} KiB. Send fewer or shorter texts in a request."

    def _bounded(self, receive: Receive) -> Receive:
        size, deadline = 0, asyncio.get_running_loop().time() + BODY_SECONDS
        at_end = False

        async def bounded() -> Message:
            nonlocal size, at_end
            if at_end:  # what still comes is the end of the connection, for which there is no hurry
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The body did not arrive within {BODY_SECONDS} seconds.") from None
            size += len(message.get("body", b""))
            at_end = not message.get("more_body")
            if size > self.max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return bounded


ERROR_TYPES = {413: "Validation", 422: "Validation", 500: "Backend", 503: "Overloaded"}


def failure(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    content = Failure(error=reason, error_type=ERROR_TYPES.get(status, "Request"))
    return JSONResponse(content.model_dump(), status, headers)


def create_app(service: Service, max_bytes: int) -> FastAPI:
    """The app of a service.

    Args:
        service: the classifier and its queue.
        max_bytes: largest body of a request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(service.batcher.work())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(
        title="SpikeBERT", version=version("modeling_spikebert"), lifespan=lifespan, description=__doc__,
        responses={"4XX": {"model": Failure}, "5XX": {"model": Failure}},
    )  # fmt: skip
    app.add_middleware(Gate, service=service, max_bytes=max_bytes)

    @app.exception_handler(AnyHTTPException)
    async def on_http_error(_: Request, error: AnyHTTPException) -> Response:
        return failure(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return failure(400, f"The body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}.")
        where = ".".join(str(part) for part in first["loc"][1:2]) or "The body"
        return failure(422, f"{where}: {first['msg']}.")

    @app.post("/classify", summary="Classify one or several texts", response_model=list[Score] | list[list[Score]])
    async def classify(request: ClassifyRequest) -> Response:
        """Answers like the text-classification pipeline of transformers.

        Without `top_k` the best class of each text, in a list. With it a list of classes: one such list for a text,
        a list of them for a list of texts.
        """
        single = isinstance(request.inputs, str)
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        results = await service.scores(texts, request.truncate, request.top_k)
        if "top_k" not in request.model_fields_set:
            return JSONResponse([classes[0] for classes in results])
        return JSONResponse(results[0] if single else results)

    @app.post("/predict", summary="The same for clients of text-embeddings-inference",
              response_model=list[Score] | list[list[Score]])  # fmt: skip
    async def predict(request: PredictRequest) -> Response:
        """All classes of a text or pair; for a list of lists, such a list for each."""
        batched = isinstance(request.inputs, list) and all(isinstance(each, list) for each in request.inputs)
        texts = request.inputs if batched else [request.inputs]
        results = await service.scores([_text_or_pair(each) for each in texts], request.truncate, None,
                                       request.raw_scores)  # fmt: skip
        return JSONResponse(results if batched else results[0])

    @app.get("/health", summary="200 while requests are accepted, 503 while the server stops")
    async def health() -> Response:
        if service.draining:
            return failure(503, "The server is stopping.")
        return JSONResponse({"status": "ok"})

    @app.get("/info", summary="The model and the limits of a request")
    async def info() -> Response:
        classifier, batcher = service.classifier, service.batcher
        return JSONResponse({
            "model": classifier.path.parent.parent.resolve().name, "file": classifier.path.name,
            "labels": classifier.labels, "max_length": classifier.max_length, "max_batch": batcher.max_batch,
            "max_queue": batcher.max_queue, "max_request_bytes": max_bytes,
        })  # fmt: skip

    @app.get("/metrics", summary="Counters and histograms for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _text_or_pair(value: Any) -> Text:
    if isinstance(value, str):
        return value
    if len(value) not in (1, 2):
        raise HTTPException(422, f"inputs: a text is a string, or a list of one or two; this one has {len(value)}.")
    return value[0] if len(value) == 1 else (value[0], value[1])
