"""What may be wrong with a request to a server of a foundation model, and whether it passes."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2
import openai
from pydantic import ValidationError

from cirloop.captioning.backends.bounded_transport import UnreadableAnswer
from cirloop.captioning.server_settings import KEY_VARIABLE, ServerFoundation
from cirloop.io.redact import sanitize


class Failure(Exception):
    """A request without an answer that can be used.

    `passes`: the same request may succeed later. `away`: the server itself seems to be away.
    `unreadable`: an answer came that is none. `wait_s`: seconds that the server asks to wait.
    """

    def __init__(
        self,
        problem: str,
        *,
        passes: bool = True,
        away: bool = False,
        unreadable: bool = False,
        wait_s: float = 0.0,
    ) -> None:
        super().__init__(problem)
        self.passes = passes
        self.away = away
        self.unreadable = unreadable
        self.wait_s = wait_s


def explain(error: Exception, settings: ServerFoundation) -> Failure:
    """Say what is wrong with a request, and whether it is worth another one."""
    if isinstance(error, openai.APIStatusError):
        return _refused(error.response, settings)
    causes = [*_causes(error)]
    certificate = next((e for e in causes if isinstance(e, ssl.SSLCertVerificationError)), None)
    if certificate is not None:
        return Failure(
            f"its certificate is not trusted ({certificate.verify_message}). If it is of an"
            " authority of your own, give that one's file as the environment variable"
            " SSL_CERT_FILE",
            passes=False,
        )
    unreadable = next((e for e in causes if isinstance(e, UnreadableAnswer)), None)
    if unreadable is not None:
        return Failure(f"an answer cannot be read: {unreadable}", unreadable=True)
    if isinstance(error, ValidationError):
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        shown = sanitize(repr(wrong["input"]))[:200]
        problem = f"an answer is none of a chat ({f'{where}: ' if where else ''}{wrong['msg']})"
        return Failure(f"{problem}: {shown}", unreadable=True)
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        problem = f"no answer within foundation.timeout_s {settings.timeout_s:g}"
        return Failure(problem, away=True)
    return Failure(f"no connection ({sanitize(str(causes[-1]))[:200]})", away=True)


def _refused(response: httpx2.Response, settings: ServerFoundation) -> Failure:
    """Say what a status other than success stands for."""
    status = response.status_code
    reply = sanitize(" ".join(response.text.split()))[:300]
    if status in (408, 409, 429) or status >= 500:
        wait_s = _retry_after(response.headers)
        asks = f"; it asks to wait for {wait_s:,.0f} s" if wait_s else ""
        return Failure(
            f"status {status}: {reply}{asks}", wait_s=wait_s, away=status in (502, 503, 504)
        )
    if 300 <= status < 400:
        goal = sanitize(response.headers.get("location", "nowhere"))
        problem = f"redirects to {goal}. Redirects are not followed: give that address, if it is"
        return Failure(f"{problem} yours", passes=False)
    ways = {
        401: f"Give its key as the environment variable {KEY_VARIABLE}",
        403: f"Give its key as the environment variable {KEY_VARIABLE}",
        404: f"Is it the address with its /v1, and {settings.path!r} a model it has?",
    }
    way = ways.get(status, "Settings under foundation say what is sent")
    return Failure(f"status {status}: {reply}. {way}", passes=False)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After, which may be a date; 0 where there is none."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # no date, or one far beyond all years
        return 0.0
    zoned = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (zoned - datetime.now(UTC)).total_seconds())


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what caused it, the last cause last."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return causes
