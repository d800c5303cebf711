"""Texts a second by a server of a foundation model: one request at a time, and many in flight.

Without `--url` a server of this file, which answers at once (or after `--delay_ms`), takes the
model's place: what is left is what the client costs. With `--url` it is a real one, such as vLLM's
(docs/servers.md), asked about drawn images; `--in_process PATH` times the captioner of this
process on the same questions too. Every side is timed in turn, as often as `--repeats`, about
pairs of images that no other turn has, so that nothing is answered from a cache of the server.
Prints texts a second, milliseconds a text, those in which this process had the processor, and
ratios to the first side, with standard errors; and the tokens that were written.

    python benchmarks/server_throughput.py
    python benchmarks/server_throughput.py --url http://127.0.0.1:8000/v1 --in_process tiny
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from cirloop.captioning.backends.server import ServerCaptioner
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner, CaptionClient
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import Qwen2VLFoundation, ServerFoundation
from cirloop.captioning.journal import Journal
from cirloop.captioning.prompts import REWRITE
from cirloop.data import ShapesSettings
from cirloop.data.paths import DataPaths
from cirloop.monitoring import profiling
from cirloop.monitoring.console import table

CHOICE = {"message": {"content": "has more dots"}, "finish_reason": "stop"}
ANSWER = json.dumps(
    {"choices": [CHOICE], "usage": {"prompt_tokens": 70, "completion_tokens": 4}}
).encode()


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
    """Answer the requests of one connection with the same text."""
    with suppress(asyncio.IncompleteReadError, ConnectionResetError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            await asyncio.sleep(delay_s)
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (len(ANSWER), ANSWER)
            )
    writer.close()


def serve(port: Connection, delay_s: float) -> None:
    """Be a server until the process is ended; its port goes through `port`."""

    async def run() -> None:
        server = await asyncio.start_server(
            lambda reader, writer: answer(reader, writer, delay_s), "127.0.0.1", 0, limit=1 << 22
        )
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def quiet(items: Any, title: str = "") -> Any:
    return items


class Work:
    """The questions of one turn, and who answers them."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args, self.directory = args, directory
        self.train = ShapesSettings().build(DataPaths(None, directory, quiet)).train
        self.turns = 0

    def questions(self) -> list[CaptionRequest]:
        """As many as asked for, about references and targets of the embedded set; no two turns
        have one in common, until all have been asked."""
        triplets = self.train.triplets
        first = self.turns * self.args.questions
        self.turns += 1
        chosen = [triplets[(first + n) % len(triplets)] for n in range(self.args.questions)]
        return [CaptionRequest(t.query.reference, t.target, t.query.text) for t in chosen]

    def server(self, url: str, in_flight: int) -> CaptionClient:
        settings = ServerFoundation(path=self.args.model, url=(url,), max_in_flight=in_flight)
        journal = Journal(self.directory / f"answers_{self.turns}_{in_flight}")
        return ServerCaptioner(settings, self.train.images, journal, quiet)

    def in_process(self) -> CaptionClient:
        captioner = Qwen2VLFoundation(path=self.args.in_process, dtype="float32").build()
        size = CaptioningSettings().batch_size
        return BatchedCaptioner(captioner, self.train.images, self.directory, size, quiet)

    def seconds(self, client: CaptionClient) -> tuple[float, float, int]:
        """Seconds of a turn, those of this process's processor, and the tokens written in it."""
        requests = self.questions()
        with profiling.metering() as spent:
            began, busy = time.perf_counter(), time.process_time()
            client.generate(REWRITE, requests, self.args.new_tokens, [0.0], 0, "benchmark")
            taken = time.perf_counter() - began
            return taken, time.process_time() - busy, spent.tokens_written


def mean(values: list[float], digits: int = 2) -> str:
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def measure(args: argparse.Namespace, url: str, directory: Path) -> None:
    work = Work(args, directory)
    work.seconds(work.server(url, 4))  # what is only slow once
    here = work.in_process() if args.in_process else None
    taken: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    for _ in range(args.repeats):
        sides = {f"{n} in flight": work.server(url, n) for n in args.in_flight}
        if here is not None:
            sides["in this process"] = here
        for name, client in sides.items():
            seconds, own, tokens[name] = work.seconds(client)
            taken.setdefault(name, []).append(1000 * seconds / args.questions)
            busy.setdefault(name, []).append(1000 * own / args.questions)
    first = next(iter(taken.values()))
    rows = []
    for name, each in taken.items():
        rates = [1000 / ms for ms in each]
        ratios = [one / other for one, other in zip(first, each, strict=True)]
        shown = [mean(rates, 1), mean(each), mean(busy[name]), mean(ratios)]
        rows.append([name, *shown, tokens[name]])
    columns = ["side", "texts/s", "ms a text", "ms here", "times the first side", "tokens"]
    table(f"{args.questions} texts, {args.repeats} repeats, at {url}", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a server's address, up to and with the /v1")
    parser.add_argument("--model", default="tiny", help="its name at the server")
    parser.add_argument("--in_process", help="a Qwen2-VL, such as tiny, to time here")
    parser.add_argument("--in_flight", default="1,4,16,64", help="requests at once")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--delay_ms", type=float, default=0.0, help="of the server without --url")
    args = parser.parse_args()
    args.in_flight = [int(number) for number in args.in_flight.split(",")]
    with TemporaryDirectory() as directory:
        if args.url:
            measure(args, args.url, Path(directory))
            return
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.Process(target=serve, args=(theirs, args.delay_ms / 1000))
        server.start()
        try:
            measure(args, f"http://127.0.0.1:{ours.recv()}/v1", Path(directory))
        finally:
            server.terminate()
            server.join()


if __name__ == "__main__":
    main()
