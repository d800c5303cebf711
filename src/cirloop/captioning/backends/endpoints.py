"""The servers of a foundation model: one question to one of them, again where that may help.

What may pass is tried again, first at another server: a refused or broken connection, a time-out,
the statuses 408, 409, 429 and 5xx, an answer that cannot be read. A server that sends Retry-After
is left alone until then; otherwise the waits double. What will not pass (a key, a name, a
certificate, a redirect, a request that is refused) ends at once. Each ends in an error that names
the address and the way out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from itertools import count
from typing import Any, TypeVar

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from cirloop.captioning.backends.bounded_transport import BoundedTransport
from cirloop.captioning.backends.server_errors import Failure, explain
from cirloop.captioning.server_settings import KEY_VARIABLE, ServerFoundation
from cirloop.io.redact import sanitize
from cirloop.monitoring import preemption
from cirloop.types import UserError

logger = logging.getLogger(__name__)
R = TypeVar("R", bound=BaseModel)
T = TypeVar("T")
FIRST_WAIT_S = 0.5
"""Seconds before the second request of a question; each wait is twice the one before."""
MAX_WAIT_S = 30.0
AWAY_S = 30.0
"""Seconds for which a server that did not answer is asked only if no other is there."""
MAX_UNREADABLE = 3
"""Answers to a question that cannot be read, after which no better one is expected."""
CONNECT_S = 10.0
"""Seconds that a server has to take up a connection."""
CHECK_S = 15.0
"""Seconds that a server has to say which models it has, before a run."""
POLL_S = 0.5
"""Seconds of a wait after which it looks for SIGTERM."""
NO_KEY = "none"


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


class Interrupted(Exception):
    """A question given up between two requests, since another one has failed for good."""


def _key() -> str:
    """Return the key for the servers. Raises UserError where no header can hold it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError(
            f"the environment variable {KEY_VARIABLE} is no key: it has a space, a line break or"
            " another character than ASCII. Give the key alone"
        )
    return key or NO_KEY


class Endpoint:
    """One server, with the requests it has at the moment."""

    def __init__(self, url: str, settings: ServerFoundation) -> None:
        self.url = url
        self.in_flight = 0
        self.away_until = 0.0
        """Until then it is asked only if no other server is there."""
        self.busy_until = 0.0
        """Until then it asked not to be asked, by Retry-After."""
        seconds = settings.timeout_s
        timeout = httpx2.Timeout(seconds, connect=min(seconds, CONNECT_S))
        key = _key()
        self.client = openai.AsyncOpenAI(
            api_key=key,
            base_url=url,
            max_retries=0,
            timeout=timeout,
            http_client=httpx2.AsyncClient(
                transport=BoundedTransport(settings.max_in_flight, key),
                follow_redirects=False,
                trust_env=False,
                timeout=timeout,
            ),
        )


class Endpoints:
    """All servers of one model. To be made and closed within one event loop."""

    def __init__(self, settings: ServerFoundation) -> None:
        self._settings = settings
        self._endpoints = [Endpoint(url, settings) for url in settings.url]
        self._stopped = asyncio.Event()

    async def close(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.client.close()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        """Let requests in flight end, and make none again."""
        self._stopped.set()

    async def ask(self, body: Mapping[str, Any], form: type[R]) -> R:
        """Return the answer to a chat request in the form `form`.

        Raises UserError where none comes within the settings' limits, Interrupted after `stop`.
        """
        problem = f"{', '.join(self._settings.url)}: no answer"
        unreadable = 0
        failures: Counter[str] = Counter()
        try:
            async with asyncio.timeout(self._settings.time_limit_s):
                for attempt in count():
                    if attempt:
                        preemption.raise_if_requested()
                    endpoint = self._next(failures)
                    await self._sleep(endpoint.busy_until - time.monotonic())
                    try:
                        return await self._request(endpoint, body, form)
                    except Failure as failure:
                        problem = f"{endpoint.url}: {failure}"
                        failures[endpoint.url] += 1
                        unreadable += failure.unreadable
                        if not failure.passes or unreadable >= MAX_UNREADABLE:
                            raise UserError(f"foundation.url {problem}") from None
                        await self._sleep(self._backoff(failure, attempt))
        except TimeoutError:
            pass
        limit = self._settings.time_limit_s
        raise UserError(
            f"foundation.url {problem}; for {limit:g} s, which is foundation.time_limit_s. Look at"
            " the server, or give another address or a higher limit"
        )

    def _next(self, failures: Counter[str]) -> Endpoint:
        """Return the server with the fewest requests, of those that seem to be there and have
        failed this question least."""
        now = time.monotonic()

        def order(endpoint: Endpoint) -> tuple[bool, float, int, int]:
            busy_s = max(0.0, endpoint.busy_until - now)
            away = busy_s > 0 or endpoint.away_until > now
            return away, busy_s, failures[endpoint.url], endpoint.in_flight

        return min(self._endpoints, key=order)

    async def _request(self, endpoint: Endpoint, body: Mapping[str, Any], form: type[R]) -> R:
        endpoint.in_flight += 1
        try:
            async with asyncio.timeout(self._settings.timeout_s):  # also for one that trickles
                # By `post`, since the typed method takes longer over a body than all else.
                response = await endpoint.client.post(
                    "/chat/completions", body=body, cast_to=httpx2.Response
                )
            answer = form.model_validate_json(response.content)
        except (openai.OpenAIError, ValidationError, TimeoutError) as error:
            failure = explain(error, self._settings)
            now = time.monotonic()
            if failure.away:
                endpoint.away_until = now + AWAY_S
            endpoint.busy_until = max(endpoint.busy_until, now + failure.wait_s)
            if min(e.busy_until for e in self._endpoints) > now + self._settings.time_limit_s:
                failure.passes = False
            raise failure from error
        finally:
            endpoint.in_flight -= 1
        endpoint.away_until = 0.0
        return answer

    def _backoff(self, failure: Failure, attempt: int) -> float:
        """Return the seconds before the next request: none where another server is there, or this
        one said how long."""
        now = time.monotonic()
        others = any(max(e.away_until, e.busy_until) <= now for e in self._endpoints)
        if failure.wait_s or (failure.away and others):
            return 0.0
        # Unlike waits, so that requests that failed together do not return together.
        return min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt, 10)) * random.uniform(0.5, 1)

    async def _sleep(self, seconds: float) -> None:
        """Wait. Raises Interrupted after `stop`, and GracefulStop after SIGTERM."""
        end = time.monotonic() + seconds
        while not self.stopped and (left := end - time.monotonic()) > 0:
            preemption.raise_if_requested()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), min(left, POLL_S))
        if self.stopped:
            raise Interrupted


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end: here, or in a thread where a loop runs already, as in a
    notebook."""
    loop = None
    with suppress(RuntimeError):
        loop = asyncio.get_running_loop()
    if loop is None:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, work).result()


def check_servers(settings: ServerFoundation) -> None:
    """Ask each server which models it has; warn of those that are away.

    Raises UserError where all are away, or one refuses or does not have the model.
    """
    problems, away = run(_look_at(settings.model_copy(update={"timeout_s": CHECK_S})))
    if len(away) == len(settings.url):
        problems += away
    if problems:
        raise UserError("; ".join(f"foundation.url {problem}" for problem in problems))
    for problem in away:
        logger.warning("foundation.url %s; the other addresses do its part", problem)


async def _look_at(settings: ServerFoundation) -> tuple[list[str], list[str]]:
    """Return what is wrong with servers that are there, and with those that are away."""
    problems: list[str] = []
    away: list[str] = []
    for url in settings.url:
        client = Endpoint(url, settings).client
        try:
            async with asyncio.timeout(CHECK_S):
                response = await client.get("/models", cast_to=httpx2.Response)
            names = [model.id for model in _Models.model_validate_json(response.content).data]
        except (openai.OpenAIError, ValidationError, TimeoutError) as error:
            # 404: not every server lists its models
            if not (isinstance(error, openai.APIStatusError) and error.status_code == 404):
                failure = explain(error, settings)
                (away if failure.passes else problems).append(f"{url}: {failure}")
        else:
            if settings.path not in names:
                has = sanitize(", ".join(sorted(names)[:10])) or "none"
                problems.append(f"{url}: has no model {settings.path!r}; it has {has}")
        finally:
            await client.close()
    return problems, away
