"""Load on `spikebert serve`: sentences a second, and how long a request takes.

    python examples/benchmarks/serve.py --folders runs/onnx runs/minilm-onnx --json serve.json

Each folder gets a server process of its own, and wrk (Debian has a package) sends it requests of one sentence over
loopback, from each number of clients, without a pause between an answer and the next request. The servers take turns,
so that a change of the machine's speed meets all of them. Client and server share the cores. An answer other than 200
ends the run.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparing import print_machine, write
from transformers import HfArgumentParser

from modeling_spikebert.data import load_unlabelled
from modeling_spikebert.data.bundled import bundled_tweets

# The bodies in turn, and one line of JSON at the end; wrk counts microseconds.
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local bodies = {}
for line in io.lines(%s) do bodies[#bodies + 1] = line end
local turn = 0
request = function()
    turn = turn %% #bodies + 1
    return wrk.format(nil, nil, nil, bodies[turn])
end
done = function(summary, latency, requests)
    local errors = summary.errors
    local lost = errors.connect + errors.read + errors.write + errors.timeout
    io.write(string.format('\\n{"requests": %%d, "seconds": %%f, "p50_ms": %%f, "p99_ms": %%f, "refused": %%d, "lost": %%d}',
        summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
        errors.status, lost))
end
"""  # noqa: E501


@dataclass
class ServeArguments:
    folders: list[str] = field(metadata={"help": "Folders that `spikebert export --format onnx` has written."})
    clients: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "Clients at once."})
    seconds: int = field(default=10, metadata={"help": "How long each number of clients sends."})
    rounds: int = field(default=3, metadata={"help": "How often; the median of the rounds counts."})
    text_file: str | None = field(default=None, metadata={"help": "Sentences (column text). Default: bundled tweets."})
    options: str = field(default="", metadata={"help": "Options of the server, in one string."})
    json: str | None = field(default=None, metadata={"help": "File for the rows."})


@contextmanager
def serving(folder: str, options: str) -> Iterator[str]:
    """A server process; yields its address."""
    command = [sys.executable, "-m", "modeling_spikebert", "serve", folder, "--port", "0", *options.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None  # for mypy
    try:
        line = process.stdout.readline()
        if not line:
            sys.exit(f"The server of {folder} did not start.")
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def load(address: str, clients: int, seconds: int, script: Path) -> dict[str, Any]:
    """What wrk measured."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout=30s", "-s", str(script), f"{address}/classify"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured = json.loads(output.splitlines()[-1])
    if measured["refused"] or measured["lost"]:
        sys.exit(f"{address}: {measured['refused']} requests were refused, {measured['lost']} lost.")
    return measured


def median_row(name: str, clients: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median number of sentences a second."""
    by_speed = sorted(rounds, key=lambda each: each["requests"] / each["seconds"])
    middle = by_speed[len(by_speed) // 2]
    row = {
        "name": name,
        "clients": clients,
        "sentences_per_second": middle["requests"] / middle["seconds"],
        "p50_ms": middle["p50_ms"],
        "p99_ms": middle["p99_ms"],
    }
    print(
        f"{name:24} {clients:4} clients {row['sentences_per_second']:8.1f} sentences/s, "
        f"p50 {row['p50_ms']:7.1f} ms, p99 {row['p99_ms']:7.1f} ms",
        flush=True,
    )
    return row


def main(args: ServeArguments) -> None:
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt install wrk, or the like.")
    machine = print_machine()
    table = bundled_tweets().validation if args.text_file is None else load_unlabelled(args.text_file, "text")
    rows = []
    with TemporaryDirectory() as folder, ExitStack() as servers:
        bodies, script = Path(folder, "bodies"), Path(folder, "load.lua")
        bodies.write_text("".join(json.dumps({"inputs": text, "truncate": True}) + "\n" for text in table["text"]))
        script.write_text(SCRIPT % json.dumps(str(bodies)))
        addresses = {name: servers.enter_context(serving(name, args.options)) for name in args.folders}
        for clients in args.clients:
            measured: dict[str, list[dict[str, Any]]] = {name: [] for name in addresses}
            for _ in range(args.rounds):
                for name, address in addresses.items():
                    measured[name].append(load(address, clients, args.seconds, script))
            rows += [median_row(name, clients, rounds) for name, rounds in measured.items()]
    write(args.json, machine, rows, options=args.options)


if __name__ == "__main__":
    main(*HfArgumentParser(ServeArguments).parse_args_into_dataclasses())
