"""Dynamic batching: while one batch is computed, what arrives waits for the next."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .classifier import Tokens

# Padding is computed like text. A batch takes no text that would make its tokens, padding counted, more than this many
# times those of its texts (`examples/benchmarks/serve.py`).
MOST_PADDING = 1.2


class QueueFullError(Exception):
    """There is no room for more sentences now."""


@dataclass
class Batch:
    """What was computed at once, for metrics: counts, and seconds of wall-clock time."""

    sentences: int
    tokens: int
    padded_tokens: int
    seconds: float


@dataclass(eq=False)
class _Waiting:
    tokens: Tokens
    future: asyncio.Future[np.ndarray]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects sentences of all requests and computes them in batches, one batch at a time.

    A batch begins with the sentence that has waited longest, and takes those nearest to it in length.

    Args:
        compute: a batch of B sentences to an array [B, ...]; runs in a thread of its own.
        max_batch: most sentences of a batch.
        max_wait: seconds that a sentence waits for others while nothing is computed.
        max_queue: most sentences that are accepted and not yet answered.
        observe: called after each batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Tokens]], np.ndarray],
        max_batch: int,
        max_wait: float,
        max_queue: int,
        observe: Callable[[Batch], None],
    ) -> None:
        self.compute, self.max_batch, self.max_wait, self.max_queue = compute, max_batch, max_wait, max_queue
        self.observe = observe
        self.accepted = 0  # sentences that are not yet answered
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "batch")

    def reserve(self, count: int) -> None:
        """Accepts sentences, before any work for them; `release` must follow.

        Raises:
            QueueFullError: there is no room for so many.
        """
        if self.accepted + count > self.max_queue:
            raise QueueFullError
        self.accepted += count

    def release(self, count: int) -> None:
        self.accepted -= count

    async def run_batched(self, sentences: Sequence[Tokens]) -> np.ndarray:
        """What `compute` gives for reserved sentences, [N, ...], in their order."""
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(tokens, loop.create_future()) for tokens in sentences]
        self._waiting += waiting
        self._arrived.set()
        return np.stack(await asyncio.gather(*(each.future for each in waiting)))

    async def work(self) -> None:
        """Computes until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_batch()
            batch = self._take()
            start = time.perf_counter()
            try:
                results = await loop.run_in_executor(self._thread, self.compute, [each.tokens for each in batch])
            except Exception as error:  # whatever the runtime raises belongs to these sentences, not to the server
                for each in batch:
                    if not each.future.done():
                        each.future.set_exception(error)
                continue
            for each, result in zip(batch, results, strict=True):
                if not each.future.done():  # else its request was given up
                    each.future.set_result(result)
            lengths = [len(each.tokens) for each in batch]
            seconds = time.perf_counter() - start
            self.observe(Batch(len(batch), sum(lengths), len(batch) * max(lengths), seconds))

    async def _wait_for_batch(self) -> None:
        """Until a batch is full, or the first sentence has waited long enough."""
        while True:
            self._arrived.clear()
            left = self._waiting[0].since + self.max_wait - time.monotonic() if self._waiting else None
            if len(self._waiting) >= self.max_batch or (left is not None and left <= 0):
                return
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The next batch, which leaves the queue."""
        first = self._waiting[0]
        # `sorted` keeps the order of arrival among equals, so that the first stays first.
        candidates = sorted(self._waiting, key=lambda each: abs(len(each.tokens) - len(first.tokens)))
        batch: list[_Waiting] = []
        tokens = longest = 0
        for each in candidates[: self.max_batch]:
            longest = max(longest, len(each.tokens))
            tokens += len(each.tokens)
            if longest * (len(batch) + 1) > MOST_PADDING * tokens:
                break
            batch.append(each)
        taken = set(map(id, batch))
        self._waiting = [each for each in self._waiting if id(each) not in taken]
        return batch
