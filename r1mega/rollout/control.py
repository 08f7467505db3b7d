"""Small JSON calls to engines and router: one at a time, or the same one to many at once.

Control calls go to each engine itself; the router only forwards /generate.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

API_KEY = "R1MEGA_API_KEY"  # the environment variable; launcher, learner, engines, router share it


def api_key() -> str | None:
    """The secret that engines and router ask for, if there is one; never an argument or a setting,
    which logs and process lists show."""
    return os.environ.get(API_KEY) or None


def authorization() -> dict[str, str]:
    """The header of every request to engines and router."""
    key = api_key()
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class CallFailed(Exception):
    """One sentence: which call to which server failed, and what the server said."""


def get(url: str, *, timeout_s: float) -> dict[str, Any]:
    return _call(urllib.request.Request(url), timeout_s)


def delete(url: str, *, timeout_s: float) -> dict[str, Any]:
    return _call(urllib.request.Request(url, method="DELETE"), timeout_s)


def post(url: str, body: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """POST; an answer with ``"success": false`` counts as a failure, as SGLang's do."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    answer = _call(request, timeout_s)
    if answer.get("success") is False:
        raise CallFailed(f"{url} answered {answer.get('message')!r}")
    return answer


def answers(url: str, *, timeout_s: float) -> bool:
    """Whether GET ``url`` succeeds."""
    try:
        get(url, timeout_s=timeout_s)
    except CallFailed:
        return False
    return True


def post_each(
    bases: Sequence[str], route: str, body: Mapping[str, Any], *, timeout_s: float
) -> dict[str, str]:
    """POST ``body`` to every ``base + route``, all at once; what failed, by base."""

    def failure(base: str) -> str | None:
        try:
            post(base + route, body, timeout_s=timeout_s)
        except CallFailed as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, len(bases))) as pool:
        found = list(pool.map(failure, bases))
    return {base: why for base, why in zip(bases, found, strict=True) if why is not None}


# A proxy from the environment must not stand between the processes of one job.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _call(request: urllib.request.Request, timeout_s: float) -> dict[str, Any]:
    url = request.full_url
    for name, value in authorization().items():
        request.add_header(name, value)
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode(errors="replace").strip()
        raise CallFailed(f"{url} answered {error.code}: {text or error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise CallFailed(f"{url} did not answer: {error}") from error
    return _json_object(url, content)


def _json_object(url: str, content: bytes) -> dict[str, Any]:
    """Health routes answer with text or nothing; what is no object is an empty one here."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
