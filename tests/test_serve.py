"""`spikebert serve`: what it answers, what it refuses, and that no request is lost when it stops."""

import asyncio
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_onnx import LABELS, expected_logits, weights, write_folder, write_graph
from tiny_training import VOCABULARY, tiny_tokenizer
from torch import nn
from transformers import BertConfig, BertPreTrainedModel, pipeline
from transformers.modeling_outputs import SequenceClassifierOutput

from modeling_spikebert.commands import main
from modeling_spikebert.commands.options.serve import NUMBERS
from modeling_spikebert.serving import app
from modeling_spikebert.serving.batching import MOST_PADDING, Batch, Batcher, QueueFullError
from modeling_spikebert.serving.classifier import OnnxClassifier, Tokens

ROOT = Path(__file__).parent.parent
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
TEXTS = ["word1 word2", "word7", "word3 word4 word5 word6", "word58 word1", "word9 word9 word9"]


@dataclass
class Served:
    """A process of `spikebert serve`."""

    process: subprocess.Popen
    first_line: str
    port: int

    def connect(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] = JSON) -> tuple[int, Any]:
        """Status and content of an answer; a body that is not bytes goes as JSON."""
        connection = self.connect()
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, headers)
            return answer_of(connection)
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        _, text = self.ask("/metrics")
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and the last line that was printed."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=30)
        assert errors == ""
        return self.process.returncode, output.splitlines()[-1]


def answer_of(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    content = response.read()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(content) if is_json else content.decode()


def serve(folder: Path, *options: str) -> Served:
    return start([sys.executable, "-m", "modeling_spikebert", "serve", str(folder), "--port", "0", *options])


def start(command: list[str]) -> Served:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    assert process.stdout.readline().startswith("Ask it: curl http")
    return Served(process, line, int(line.rpartition(":")[2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    served = serve(folder, "--threads", "1", "--max-queue", "64", "--max-request-kb", "16")
    yield served
    status, last_line = served.stop()
    assert status == 0
    accepted, answered = map(int, re.findall(r"\d+", last_line))
    assert accepted == answered > 0


# Answers


class MeanClassifier(BertPreTrainedModel):
    """The tiny graph in torch, for a pipeline."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embeddings, self.classifier = (nn.Parameter(torch.from_numpy(each)) for each in weights())
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        mask = attention_mask[..., None].float()  # [B, L, 1]
        mean = (self.embeddings[input_ids] * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=mean @ self.classifier)


@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS[:1], TEXTS], ids=["text", "list of one", "list"])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": 9}, {"top_k": None}], ids=str)
def test_answers_like_the_pipeline(server, inputs, options):
    model = MeanClassifier(BertConfig(id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)}))
    model.__class__.__name__ = "BertForSequenceClassification"  # a pipeline warns of names that it does not know
    expected = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())(inputs, **options)
    status, answer = server.ask("/classify", {"inputs": inputs, **options})
    assert status == 200
    assert without_scores(answer) == without_scores(expected)
    np.testing.assert_allclose(scores_of(answer), scores_of(expected), rtol=1e-5)


def without_scores(answer: Any) -> Any:
    if isinstance(answer, list):
        return [without_scores(each) for each in answer]
    return answer["label"]


def scores_of(answer: Any) -> list[float]:
    return [score for each in answer for score in scores_of(each)] if isinstance(answer, list) else [answer["score"]]


def test_scores_follow_the_problem_type(folder, tmp_path):
    """By the pipeline's rule; the server itself has softmax."""
    logits = np.array([[0.0, 1.0, -1.0]], np.float32)
    expected = {
        "single_label_classification": np.exp(logits) / np.exp(logits).sum(),
        "multi_label_classification": 1 / (1 + np.exp(-logits)),
        "regression": logits,
    }
    for problem, scores in expected.items():
        classifier = OnnxClassifier(write_folder(tmp_path / problem, problem_type=problem))
        np.testing.assert_allclose(classifier.to_scores(logits), scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "texts"),
    [("word1 word2", 0), (["word1 word2"], 0), ([["word1 word2"], ["word7"]], 2), ([], 422), ([["a", "b", "c"]], 422)],
)
def test_predict_answers_like_text_embeddings_inference(server, inputs, texts):
    """All classes, sorted; a list of lists is a batch. `raw_scores` are logits."""
    status, answer = server.ask("/predict", {"inputs": inputs, "raw_scores": True})
    if texts == 422:
        assert status == 422
        return
    assert status == 200
    rows = answer if texts else [answer]
    assert len(rows) == max(texts, 1)
    for row, text in zip(rows, TEXTS, strict=False):
        logits = dict(zip(LABELS, expected_logits(tiny_tokenizer()(text)["input_ids"]), strict=True))
        assert [each["label"] for each in row] == sorted(logits, key=logits.get, reverse=True)
        assert {each["label"]: each["score"] for each in row} == pytest.approx(logits, rel=1e-5)


def test_a_pair_is_refused_where_the_graph_takes_no_token_types(server):
    status, answer = server.ask("/predict", {"inputs": ["word1", "word2"]})
    assert status == 422
    assert "takes no token_type_ids. Send single texts." in answer["error"]


def test_many_requests_at_once_get_their_own_answers(server):
    """Batches mix requests and lengths; each sentence gets the logits that it has alone."""
    tokenizer = tiny_tokenizer()
    texts = [" ".join(f"word{(i * j) % 59}" for j in range(1, 2 + i % 12)) for i in range(60)]
    answers: dict[int, Any] = {}

    def ask(start: int) -> None:
        for i in range(start, len(texts), 6):
            answers[i] = server.ask("/predict", {"inputs": texts[i], "raw_scores": True})

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, text in enumerate(texts):
        status, answer = answers[i]
        assert status == 200
        logits = expected_logits(tokenizer(text)["input_ids"])
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(
            dict(zip(LABELS, logits, strict=True)), rel=1e-5, abs=1e-6
        )


def test_health_info_metrics_and_openapi(server, folder):
    assert server.ask("/health") == (200, {"status": "ok"})
    status, info = server.ask("/info")
    assert status == 200
    assert info["model"] == folder.name
    assert info["labels"] == LABELS
    assert (info["file"], info["max_length"], info["max_queue"]) == ("model.onnx", 16, 64)
    before = server.metric("spikebert_batch_sentences_sum")
    server.ask("/classify", {"inputs": TEXTS})
    assert server.metric("spikebert_batch_sentences_sum") == before + len(TEXTS)
    assert server.metric("spikebert_queue_sentences") == 0
    assert 'spikebert_requests_total{path="/classify",status="200"}' in server.ask("/metrics")[1]
    assert set(server.ask("/openapi.json")[1]["paths"]) == {"/classify", "/predict", "/health", "/info", "/metrics"}
    assert server.ask("/docs")[0] == 200
    assert "http://127.0.0.1:" in server.first_line


def test_the_process_has_no_torch(folder):
    code = """
import sys
from modeling_spikebert.commands import main
main(sys.argv[1:])
print("torch" in sys.modules)
"""
    served = start([sys.executable, "-c", code, "serve", str(folder), "--port", "0"])
    assert served.stop(signal.SIGINT) == (0, "False")


# Limits


def test_a_long_text_is_refused_or_cut(server):
    text = " ".join(["word1"] * 30)
    status, answer = server.ask("/classify", {"inputs": ["word1", text]})
    assert status == 413
    assert answer["error"] == ('inputs[1] has 32 tokens; at most 16 are allowed. Shorten it, or pass "truncate": true.')
    status, answer = server.ask("/predict", {"inputs": text, "truncate": True, "raw_scores": True})
    logits = expected_logits(tiny_tokenizer()(text, truncation=True)["input_ids"])
    assert status == 200
    assert {each["label"]: each["score"] for each in answer} == pytest.approx(
        dict(zip(LABELS, logits, strict=True)), rel=1e-5
    )


def test_a_large_body_is_refused_with_its_length_or_without(server):
    body = json.dumps({"inputs": ["word1 " * 3000]}).encode()
    chunks = (body[i : i + 1000] for i in range(0, len(body), 1000))
    for content, headers in ((body, {}), (chunks, {"Transfer-Encoding": "chunked"})):
        connection = server.connect()
        connection.request("POST", "/classify", content, JSON | headers, encode_chunked=bool(headers))
        status, answer = answer_of(connection)
        connection.close()
        assert status == 413
        assert answer["error"] == "The body is larger than 16 KiB. Send fewer or shorter texts in a request."


def test_a_body_that_does_not_arrive(folder, monkeypatch):
    """The app alone, with less patience."""
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        service = app.Service(OnnxClassifier(folder), max_batch=4, max_wait=0.0, max_queue=4)

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", b"20")]
        scope = {"type": "http", "method": "POST", "path": "/classify", "headers": headers, "query_string": b""}
        await app.create_app(service, max_bytes=100)(scope, receive, send)

    asyncio.run(run())
    assert [message.get("status") for message in sent] == [408, None]
    assert json.loads(sent[1]["body"])["error"] == "The body did not arrive within 0.05 seconds."


def test_more_texts_than_the_queue_holds(server):
    status, answer = server.ask("/classify", {"inputs": ["word1"] * 65})
    assert status == 413
    assert answer["error"] == "65 texts in a request; at most 64 are allowed."


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b'{"inputs": "word1"', 400, "The body is not JSON: Expecting ',' delimiter at character 18."),
        (b'{"inputs": "\xff"}', 400, "There was an error parsing the body"),
        (b"", 422, "The body: Field required."),
        ({"inputs": []}, 422, "inputs is empty. Send at least one text."),
        ({"inputs": ["word1", "  "]}, 422, "inputs[1] is empty. Write at least one word."),
        ({"inputs": "\ud800"}, 422, "inputs[0] is not valid Unicode: it has half of a surrogate pair."),
        ({"inputs": 7}, 422, "inputs: Input should be a valid string."),
        ({"input": "word1"}, 422, "inputs: Field required."),
        ({"inputs": "word1", "topk": 2}, 422, "topk: Extra inputs are not permitted."),
        ({"inputs": "word1", "top_k": 0}, 422, "top_k: Input should be greater than or equal to 1."),
        ({"inputs": "word1", "top_k": True}, 422, "top_k: Input should be a valid integer."),
    ],
)
def test_an_error_says_what_is_wrong(server, body, status, error):
    got, answer = server.ask("/classify", body)
    assert (got, answer["error"]) == (status, error)
    assert set(answer) == {"error", "error_type"}


def test_a_body_that_is_not_json_by_its_header(server):
    status, answer = server.ask("/classify", {"inputs": "word1"}, {"Content-Type": "text/plain"})
    assert status == 415
    assert "Content-Type: application/json" in answer["error"]
    assert server.ask("/clasify", {"inputs": "word1"})[0] == 404
    assert server.ask("/classify")[0] == 405


def malformed(generator: random.Random) -> bytes:
    """A body that no server may take: damaged JSON, or JSON of another shape."""
    valid = json.dumps({"inputs": [f"word{generator.randrange(59)}" for _ in range(generator.randrange(1, 5))]})
    wrong: list[Any] = [None, True, 1.5, -1, 10**400, [], {}, [[]], [None], ["a", 1], {"a": "b"}, "", "\t", "\ud800"]

    def damaged() -> bytes:
        content = bytearray(valid.encode())
        content[generator.randrange(len(content))] = generator.choice(b'\x00\xff\xc3\x1f"\\')
        return bytes(content)

    choice = generator.randrange(6)
    if choice == 0:
        return valid[: generator.randrange(len(valid))].encode()
    if choice == 1:
        return damaged()
    if choice == 2:
        return generator.randbytes(generator.randrange(1, 200))
    if choice == 3:
        return b"[" * generator.choice([1, 100, 5000]) + valid.encode()
    if choice == 4:
        return json.dumps(generator.choice([*wrong, [valid]])).encode()
    name = generator.choice(["inputs", "top_k", "truncate", "other"])
    valid_ones = {"top_k": [None, 10**400], "truncate": [True]}.get(name, [])
    value = generator.choice([each for each in wrong if each not in valid_ones])
    return json.dumps({"inputs": "word1", name: value}).encode()


def is_valid(body: bytes) -> bool:
    """A single changed byte may leave a request that is fine."""
    try:
        content = json.loads(body.decode())
        texts = content["inputs"] if isinstance(content["inputs"], list) else [content["inputs"]]
        return set(content) == {"inputs"} and all(text.strip() and text.encode() for text in texts) and bool(texts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def test_a_thousand_malformed_requests_get_4xx(server):
    """Bodies, seeded; then the server still answers."""
    generator = random.Random(0)
    statuses: Counter[int] = Counter()
    connection = server.connect()
    while statuses.total() < 1000:
        body = malformed(generator)
        if is_valid(body):
            continue
        connection.request("POST", "/classify", body, JSON)
        status, answer = answer_of(connection)
        assert 400 <= status < 500, (status, body)
        assert set(answer) == {"error", "error_type"}, body
        statuses[status] += 1
    connection.close()
    assert set(statuses) == {400, 422}
    assert server.ask("/classify", {"inputs": "word1"})[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"nonsense\r\n\r\n",
        b"POST /classify HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: -4\r\n\r\n",
        HEAD + b"Content-Length: x\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
    ids=["nonsense", "version", "negative length", "length", "chunk", "long path", "TLS"],
)
def test_malformed_http(server, head):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head + b"\r\n\r\n")
        answer = connection.recv(100)
    assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer


def test_a_client_that_leaves_or_stalls_does_not_hold_up_others(server):
    head = HEAD + b"Content-Length: 20\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", server.port)) as stalled,
        socket.create_connection(("127.0.0.1", server.port)) as gone,
    ):
        stalled.sendall(head + b'{"inp')
        gone.sendall(head + b'{"inputs": "word1"}\n')
        gone.close()
        assert server.ask("/classify", {"inputs": "word1"})[0] == 200
        stalled.sendall(b'uts": "word2"}\n')
        assert stalled.recv(100).startswith(b"HTTP/1.1 200")


def test_a_graph_that_fails_is_an_answer_and_a_line_in_the_log(tmp_path):
    folder = write_folder(tmp_path)
    write_graph(folder / "onnx" / "model.onnx", vocab_size=20)
    served = serve(folder)
    status, answer = served.ask("/classify", {"inputs": "word50"})
    assert (status, answer["error_type"]) == (500, "Backend")
    assert answer["error"] == "The model failed on this batch; the server's log says how."
    assert served.ask("/classify", {"inputs": "word1"})[0] == 200
    served.process.send_signal(signal.SIGTERM)
    output, errors = served.process.communicate(timeout=30)
    assert output == "Stopped. 2 requests accepted, 2 answered.\n"
    assert f"{folder}/onnx/model.onnx failed: " in errors
    assert "out of data bounds" in errors
    assert "Traceback" not in errors


# The queue


def tokens(length: int) -> Tokens:
    return Tokens([length] * length, [0] * length)


def run_batcher(lengths: Sequence[int], max_batch: int = 4, max_wait: float = 0.0) -> tuple[list[list[int]], Any]:
    """The lengths in each batch, and the results of one request; the batcher's results are the first ids."""
    batches: list[list[int]] = []

    def compute(batch: Sequence[Tokens]) -> np.ndarray:
        batches.append([len(each) for each in batch])
        return np.array([[each.ids[0]] for each in batch])

    async def run() -> np.ndarray:
        observed: list[Batch] = []
        batcher = Batcher(compute, max_batch, max_wait, 1000, observed.append)
        worker = asyncio.create_task(batcher.work())
        results = await batcher.run_batched([tokens(length) for length in lengths])
        await asyncio.sleep(0)
        worker.cancel()
        assert [each.sentences for each in observed] == [len(batch) for batch in batches]
        assert all(each.padded_tokens <= MOST_PADDING * each.tokens for each in observed)
        return results

    return batches, asyncio.run(run())


def test_batches_take_what_is_near_in_length_and_the_oldest_first():
    lengths = [10, 100, 11, 99, 9, 98, 10, 97, 10]
    batches, results = run_batcher(lengths)
    assert results[:, 0].tolist() == lengths
    assert batches[:3] == [[10, 10, 10, 11], [100, 99, 98, 97], [9]]


def test_a_batch_waits_until_it_is_full_or_the_time_is_over():
    start = time.perf_counter()
    batches, _ = run_batcher([5] * 8, max_wait=10.0)
    assert batches == [[5] * 4] * 2
    assert time.perf_counter() - start < 5
    batches, _ = run_batcher([5] * 3, max_wait=0.2)
    assert batches == [[5] * 3]


def test_an_error_of_the_runtime_belongs_to_its_sentences():
    def compute(batch: Sequence[Tokens]) -> np.ndarray:
        if len(batch[0]) == 7:
            raise RuntimeError("no")
        return np.zeros((len(batch), 1))

    async def run() -> list[Any]:
        batcher = Batcher(compute, 1, 0.0, 10, lambda _: None)
        worker = asyncio.create_task(batcher.work())
        results = await asyncio.gather(
            *(batcher.run_batched([tokens(length)]) for length in (7, 8)), return_exceptions=True
        )
        worker.cancel()
        return results

    failed, answered = asyncio.run(run())
    assert isinstance(failed, RuntimeError)
    assert answered.shape == (1, 1)


def test_the_queue_is_bounded():
    batcher = Batcher(lambda batch: np.zeros((len(batch), 1)), 4, 0.0, 10, lambda _: None)
    batcher.reserve(7)
    with pytest.raises(QueueFullError):
        batcher.reserve(4)
    batcher.reserve(3)
    batcher.release(7)
    batcher.reserve(7)


# The end


def test_what_was_accepted_is_answered_and_what_is_new_refused(folder):
    """Forty requests wait for their batch when the process is told to stop."""
    served = serve(folder, "--max-wait-ms", "1000", "--max-batch", "100", "--max-queue", "41")
    connections = [served.connect() for _ in range(40)]
    for i, connection in enumerate(connections):
        connection.request("POST", "/classify", json.dumps({"inputs": f"word{i}"}), JSON)
    idle = served.connect()
    idle.request("GET", "/health")
    assert answer_of(idle)[0] == 200
    while served.metric("spikebert_queue_sentences") < 40:
        time.sleep(0.01)
    status, answer = served.ask("/classify", {"inputs": ["word1", "word2"]})
    assert status == 503
    assert answer == {"error": "The queue is full (40 of 41 sentences). Try again.", "error_type": "Overloaded"}

    served.process.send_signal(signal.SIGTERM)
    while served.metric("spikebert_draining") == 0:
        time.sleep(0.01)
    assert served.ask("/classify", {"inputs": "word1"})[0] == 503
    idle.request("POST", "/classify", '{"inputs": "word1"}', JSON)  # on a connection from before
    response = idle.getresponse()
    assert (response.status, response.headers["Connection"]) == (503, "close")
    assert [answer_of(connection)[0] for connection in connections] == [200] * 40
    output, errors = served.process.communicate(timeout=30)
    assert (served.process.returncode, errors) == (0, "")
    assert output == "Stopped. 41 requests accepted, 41 answered.\n"  # one of them with 503: the queue was full
    with pytest.raises(ConnectionRefusedError):
        served.ask("/health")
    for connection in [*connections, idle]:
        connection.close()


def test_no_request_is_lost_under_load(folder):
    """Clients that keep their connections and send without a pause, until they are told that the server stops."""
    served = serve(folder, "--threads", "1")
    statuses: Counter[int] = Counter()
    lock = threading.Lock()

    def client(number: int) -> None:
        connection, status, own = served.connect(), 200, Counter()
        while status == 200:
            connection.request("POST", "/classify", json.dumps({"inputs": TEXTS[number % 5]}), JSON)
            status = answer_of(connection)[0]  # raises if the connection is closed without an answer
            own[status] += 1
        connection.close()
        with lock:
            statuses.update(own)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    status, last_line = served.stop()
    for thread in threads:
        thread.join()
    assert status == 0
    assert statuses[503] == len(threads)
    assert set(statuses) == {200, 503}
    assert last_line == f"Stopped. {statuses[200]} requests accepted, {statuses[200]} answered."


# Options and files


def refused(*arguments: str | Path) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *map(str, arguments)])
    return stopped.value.code


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_bounds(capsys, name):
    least, most, default, _ = NUMBERS[name]
    assert default is None or least <= default <= most
    for value in (least - 1, most + 1):
        assert refused("folder", f"--{name}", f"{value}") == 2
        expected = f"spikebert serve: --{name} must be between {least} and {most}, got {value}.\n"
        assert capsys.readouterr().err == expected


def test_the_guide_lists_the_options():
    guide = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    for name, (_, _, default, text) in NUMBERS.items():
        shown = "" if default is None else f"`{default}`"
        assert f"| `--{name}` | {shown} | {text} |\n" in guide


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    def message(*arguments: str | Path) -> str:
        code = refused(*arguments, "--port", "0")
        assert isinstance(code, str)
        assert "\n" not in code
        return code.removeprefix("spikebert serve: ")

    assert message(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such folder; `spikebert export")
    assert message(tmp_path).startswith(f"{tmp_path / 'config.json'} is missing; ")
    assert message(folder, "--file", "other.onnx") == (
        f"{folder}/onnx/other.onnx is missing; --file is one of model.onnx."
    )
    assert message(folder, "--max-length", "17") == f"--max-length 17 exceeds the 16 tokens that {folder} takes."

    copy = write_folder(tmp_path / "copy")
    write_graph(copy / "onnx" / "model_int8.onnx", num_labels=2)
    assert message(copy) == (
        f"{copy}/onnx/model_int8.onnx gives logits of shape [1, 2] for one text, but config.json names 3 labels. "
        "Do they belong together?"
    )
    (copy / "onnx" / "model_int8.onnx").write_bytes(b"damaged")
    assert message(copy).startswith(f"{copy}/onnx/model_int8.onnx is damaged or no ONNX file: ")
    (copy / "tokenizer.json").write_text("{}")
    assert message(copy).startswith(f"{copy}/tokenizer.json is not a tokenizer: ")
    (copy / "config.json").write_text('{"id2label": {"1": "a"}}')
    assert message(copy) == f"{copy}/config.json: id2label must name the classes 0, 1, ... of a classifier."
    (copy / "config.json").write_text("{")
    assert message(copy).startswith(f"{copy}/config.json is not JSON: ")


def test_without_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "modeling_spikebert.serving.app", None)
    assert refused(folder).endswith('Install what serves: pip install -c constraints.txt ".[serve]".')


def test_a_port_that_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(folder, "--port", f"{port}")
    assert message.startswith(f"spikebert serve: 127.0.0.1:{port} cannot be used (")
    assert message.endswith("Choose another --host or --port.")


def test_the_int8_graph_is_preferred(tmp_path):
    folder = write_folder(tmp_path)
    write_graph(folder / "onnx" / "model_int8.onnx", scale=2.0)
    ids = [2, 6, 3]
    for file, scale in ((None, 2), ("model.onnx", 1)):
        logits = OnnxClassifier(folder, file).logits([Tokens(ids, [0] * 3)])
        np.testing.assert_allclose(logits, [scale * expected_logits(ids)], rtol=1e-5)


def test_every_token_of_the_vocabulary_gives_the_ids_of_the_tokenizer(folder):
    texts = [" ".join(VOCABULARY[i : i + 12]) for i in range(5, len(VOCABULARY), 12)]
    encoded = OnnxClassifier(folder).encode(texts)
    assert [each.ids for each in encoded] == tiny_tokenizer()(texts)["input_ids"]
