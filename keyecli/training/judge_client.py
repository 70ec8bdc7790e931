"""A judge behind any OpenAI-compatible endpoint: asked at temperature 0, many questions at once, each answer kept on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from keyecli.errors import KeyeError, KeyeWarning, UsageError
from keyecli.settings import cache_folder
from keyecli.training.judge_prompts import AGAIN, Conversation, object_in

FIRST_WAIT_S = 1.0  # doubled with each further attempt
LONGEST_WAIT_S = 300.0  # a judge that wants more is one that does not answer
FEWEST_ASKED, RECENTLY_ASKED = 20, 100
"""How many questions tell whether a judge is of use, and how far back: one that dies late in a run has earlier answers."""

_FORMAT_REFUSED = (400, 422)
_KEY_VARIABLES = ("KEYE_JUDGE_KEY", "OPENAI_API_KEY")
_SAID_CHARACTERS = 200

Verdict = TypeVar("Verdict")
Reader = Callable[[Mapping[str, Any]], Verdict | None]
"""Makes a verdict of the JSON object that the judge answers; None of one that is not as it was asked for."""


class JudgeError(KeyeError):
    """A judge that cannot be used any more; the message says why and what to do. Verdicts so far are kept."""


class _Refused(JudgeError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Unanswered(Exception):
    """Another attempt may have more luck, but not before `wait_s`."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _NoRedirects(HTTPRedirectHandler):
    """The key is for the address that the user gave; urllib would hand it on to any other."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


def _environment_key() -> str | None:
    found = (os.environ.get(name, "").strip() for name in _KEY_VARIABLES)
    return next(filter(None, found), None)


@dataclass(frozen=True)
class JudgeSettings:
    """Whom to ask and how much. url: the endpoint's base, mostly ending in /v1; budget: requests of a run, retries and second
    questions among them; cache: the folder where verdicts are kept. UsageError for what cannot be."""

    url: str
    model: str
    api_key: str | None = field(default_factory=_environment_key, repr=False)
    budget: int = 10_000
    retries: int = 4
    timeout_s: float = 60.0
    concurrency: int = 8
    cache: Path = field(default_factory=lambda: cache_folder() / "judge")

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.strip().rstrip("/"))
        if not _is_address(self.url):
            raise UsageError(
                f"the judge's address is {self.url!r}: give one such as http://localhost:8000/v1"
            )
        if not self.model.strip():
            raise UsageError("the judge's model has no name: give the one that its server lists")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError(f"the judge's key has characters that no key has: look at {_KEY_VARIABLES[0]}")
        for name, least in (("budget", 1), ("retries", 0), ("timeout_s", 0.1), ("concurrency", 1)):
            if not getattr(self, name) >= least:
                raise UsageError(f"the judge's {name} must be at least {least}, not {getattr(self, name)}")


class Judge:
    """Asks many questions at once, each until there is a verdict or no hope of one.

    calls: requests sent; cached: verdicts that needed none of their own; asked: questions sent; failures: those without a
    verdict; tokens: as the server counts them. All are of this run, except what `cache` remembers of earlier ones.
    """

    def __init__(self, settings: JudgeSettings, sleep: Callable[[float], object] | None = None) -> None:
        self.settings = settings
        self.calls = self.cached = self.asked = self.failures = self.tokens = 0
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait  # an interrupted run does not sit out its waits
        self._lock = threading.Lock()
        self._opener = build_opener(_NoRedirects)
        self._asks_for_json = True
        self._recent: deque[bool] = deque(maxlen=RECENTLY_ASKED)
        self._problem = ""
        self._unkept: OSError | None = None
        self._told = False

    def verdicts(self, conversations: Sequence[Conversation], read: Reader[Verdict]) -> list[Verdict | None]:
        """The verdict on each, in order; None where the judge gave none.

        JudgeError: it refuses, its budget is used up, or most of the latest questions had no verdict.
        """
        keys = [self._key(conversation) for conversation in conversations]
        found = {key: self._remembered(key, read) for key in dict.fromkeys(keys)}
        missing = {
            key: conversation
            for key, conversation in zip(keys, conversations, strict=True)
            if found[key] is None
        }
        self.cached += len(keys) - len(missing)
        self._stop.clear()
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="judge")
        try:
            futures: dict[Future[Verdict | None], str] = {
                pool.submit(self._ask, key, asked, read): key for key, asked in missing.items()
            }
            for future in as_completed(futures):
                found[futures[future]] = future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._tell()
        return [found[key] for key in keys]

    def _ask(self, key: str, conversation: Conversation, read: Reader[Verdict]) -> Verdict | None:
        """A verdict, asking a second time when the first answer cannot be read."""
        answer = self._answer(conversation)
        verdict = _read(answer, read)
        if answer is not None and verdict is None:
            # The same request would get the same answer, so the second shows what was wrong.
            failed = {"role": "assistant", "content": answer or "(nothing)"}  # some refuse an empty one
            answer = self._answer([*conversation, failed, {"role": "user", "content": AGAIN}])
            verdict = _read(answer, read)
        if answer is not None and verdict is not None:
            self._remember(key, answer)
        elif answer is not None:
            self._problem = "its answer is not the JSON object that it was asked for"
        self._settle(verdict is None)
        return verdict

    def _answer(self, conversation: Conversation) -> str | None:
        """What the judge says; None when it does not answer however often it is asked."""
        for attempt in range(self.settings.retries + 1):
            try:
                return self._post(conversation)
            except _Unanswered as unanswered:
                self._problem = str(unanswered)
                wait_s = max(unanswered.wait_s, FIRST_WAIT_S * 2**attempt)
            if attempt == self.settings.retries or wait_s > LONGEST_WAIT_S:
                break
            self._sleep(wait_s)
        return None

    def _post(self, conversation: Conversation) -> str:
        """One answer, asked for as JSON where the server knows how."""
        if not self._asks_for_json:
            return self._send(conversation, as_json=False)
        try:
            return self._send(conversation, as_json=True)
        except _Refused as refused:
            if refused.status not in _FORMAT_REFUSED:
                raise
        answer = self._send(conversation, as_json=False)
        self._asks_for_json = False  # only now it is sure that nothing else was wrong
        return answer

    def _send(self, conversation: Conversation, as_json: bool) -> str:
        settings = self.settings
        body: dict[str, Any] = {"model": settings.model, "messages": list(conversation)}
        body |= {"temperature": 0, "seed": 0}
        if as_json:
            body["response_format"] = {"type": "json_object"}
        headers = {"Content-Type": "application/json", "User-Agent": "keyecli"}
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        request = Request(f"{settings.url}/chat/completions", json.dumps(body).encode(), headers)
        self._spend()
        try:
            with self._opener.open(request, timeout=settings.timeout_s) as response:
                content = response.read()
        except HTTPError as error:
            with error:
                raise self._refusal(error) from error
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise _Unanswered(_one_line(str(reason)) or type(reason).__name__) from error
        answer, tokens = _completion(content)
        with self._lock:
            self.tokens += tokens
        return answer

    def _refusal(self, error: HTTPError) -> Exception:
        """What an error status means: another attempt, or the end."""
        url, status = self.settings.url, error.code
        if status in (408, 429) or status >= 500:
            return _Unanswered(f"error {status}", _retry_after_s(error.headers.get("Retry-After")))
        if status in (401, 403):
            trouble = "does not accept the key" if self.settings.api_key else "wants a key"
            return _Refused(
                f"the judge at {url} {trouble} ({status}): set {_KEY_VARIABLES[0]} to its key", status
            )
        if status == 404:
            return _Refused(
                f"the judge at {url} knows no model {self.settings.model}, or nothing at this address (404): check both, "
                "most addresses end in /v1",
                status,
            )
        said = _error_text(error) or error.reason
        return _Refused(
            f"the judge at {url} refuses the request ({status}: {said}): check its address, its model {self.settings.model} "
            "and the length of its context",
            status,
        )

    def _spend(self) -> None:
        with self._lock:
            if self._stop.is_set():
                raise JudgeError("the judge is not asked any more, for another question stopped the run")
            if self.calls >= self.settings.budget:
                raise JudgeError(
                    f"the judge's budget of {self.settings.budget} calls is used up: give a larger one and go on, "
                    f"the verdicts so far are kept in {self.settings.cache}"
                )
            self.calls += 1

    def _settle(self, failed: bool) -> None:
        """Count a question that is done; JudgeError when most of the latest had no verdict."""
        with self._lock:
            self.asked += 1
            self.failures += failed
            self._recent.append(failed)
            without, recent = sum(self._recent), len(self._recent)
        if recent >= FEWEST_ASKED and without > recent / 2:
            raise JudgeError(
                f"the judge {self.settings.model} at {self.settings.url} gave no verdict on {without} of the last {recent} "
                f"answers ({self._problem}): see to it and go on, or choose another judge"
            )

    def _key(self, conversation: Conversation) -> str:
        content = json.dumps([self.settings.url, self.settings.model, list(conversation)])
        return hashlib.sha256(content.encode()).hexdigest()

    def _place(self, key: str) -> Path:
        return self.settings.cache / key[:2] / f"{key}.json"

    def _remembered(self, key: str, read: Reader[Verdict]) -> Verdict | None:
        """A verdict of before; None also for one that is damaged, which is asked for again."""
        try:
            return _read(json.loads(self._place(key).read_bytes())["answer"], read)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def _remember(self, key: str, answer: str) -> None:
        """Whole or not at all, whoever else writes the same."""
        place = self._place(key)
        unfinished = place.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps({"model": self.settings.model, "answer": answer}))
            unfinished.replace(place)
        except OSError as error:
            self._unkept = error
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _tell(self) -> None:
        if self._unkept is not None and not self._told:
            self._told = True
            reason = self._unkept.strerror or self._unkept
            warnings.warn(
                KeyeWarning(f"the judge's verdicts cannot be kept in {self.settings.cache}: {reason}"),
                stacklevel=2,
            )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and url.isprintable()
            and " " not in url
        )
    except ValueError:  # a port that is no number
        return False


def _read(answer: str | None, read: Reader[Verdict]) -> Verdict | None:
    said = None if answer is None else object_in(answer)
    return None if said is None else read(said)


def _completion(content: bytes) -> tuple[str, int]:
    """Text and tokens of a server's reply; "" when it has no text, which no reader takes for a verdict."""
    try:
        reply = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return "", 0
    usage = reply.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return text if isinstance(text, str) else "", tokens if isinstance(tokens, int) else 0


def _retry_after_s(header: str | None) -> float:
    """Seconds or a date; 0 without."""
    if header is None:
        return 0.0
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0


def _error_text(error: HTTPError) -> str:
    """What the server says is wrong, fit to stand inside a sentence."""
    try:
        content = error.read().decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""
    with suppress(ValueError, LookupError, TypeError):
        content = str(json.loads(content)["error"]["message"])
    return _one_line(content)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SAID_CHARACTERS].rstrip(".")
