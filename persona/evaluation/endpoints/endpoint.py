"""A model behind an OpenAI-compatible HTTP endpoint, as judge, user simulator or the model that is measured.

    endpoint = Endpoint(EndpointConfig(model="judge-7b", base_url="http://localhost:8000/v1"))
    await endpoint.check()                       # a sentence now rather than a thousand failures later
    run_benchmark(benchmark, Cast(model, judges=[endpoint]), ...)

What goes wrong on the way (no answer, a cut connection, half a body, HTTP 429 and 5xx) is tried again; what stays
wrong ends the episode unscored. What cannot come right (no key, no such model, a cap, an outage) ends the run.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from persona import heartbeat
from persona.errors import UserError
from persona.evaluation.endpoints.budget import Account, Pace, estimate_tokens
from persona.evaluation.endpoints.reply_cache import ReplyCache, reply_key
from persona.evaluation.judges.judging import Unscored
from persona.types import Request, Response

if TYPE_CHECKING:  # openai takes half a second to import: only a run that asks an endpoint pays for it
    import openai

    from persona.personalizer import Personalizer

log = logging.getLogger(__name__)

_DOWN_AFTER = 20  # calls that fail in a row, each after all its tries, before the run ends
_LONGEST_BACKOFF = 60.0
_LONGEST_WAIT = 600.0  # a server that wants to be left alone for longer (Retry-After) ends the run
_LANDING = 0.1  # seconds in which episodes whose replies just came write their rows before a cap ends the run
_REPORT_SECONDS = 30.0
_CHECK_SECONDS = 30.0  # for the list of models, before the first sample
_FINISH = {"stop": "eos", "length": "length"}


@dataclass
class EndpointConfig:
    """Where the model is, how fast and how much it may be asked.

    `base_url` may be `file:PATH`: the address stands in that file, where slurm/serve.sbatch has written it. Results
    and the cache go by the file's name, since the same server has another address after every start. The key is read
    from the environment variable `api_key_env` and from nowhere else; a server on this machine, or one that a file
    names, needs none. `timeout` is seconds for one try, `retries` tries after the first. Prices are per million
    tokens; the caps `max_cost` and `max_requests` (every try counts) hold for one process of one command. `cache` is
    an SQLite file of replies that several runs may share, or null.
    """

    model: str = ""
    base_url: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 6
    concurrency: int = 32
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_requests: int | None = None
    cache: str | None = None


class _Failed(Exception):
    """One try failed and the next one may not. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, raw: str = "", wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.raw, self.wait = reason, raw, wait


class _Refused(Exception):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class _Live:
    """What belongs to one event loop: each stack of a run has its own."""

    client: openai.AsyncOpenAI
    slots: asyncio.Semaphore
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    closing: asyncio.Task | None = None


@dataclass(frozen=True)
class _Reply:
    text: str
    finish_reason: str
    model: str


class Endpoint:
    """A `Speaker` over HTTP. `backoff` is the first pause in seconds between two tries of a request; it doubles.

    Raises UserError for settings that cannot be meant and for a cache file that cannot be used; `respond` raises
    UserError where the run has to end and `Unscored` where this question has no reply.
    """

    likelihoods = False

    def __init__(self, config: EndpointConfig, *, backoff: float = 1.0) -> None:
        self.url = _address(config.base_url)
        _check_config(config, self.url)
        self.config, self.name = config, config.model
        self._own = self.url != config.base_url or _is_local(self.url)  # no key, no proxy
        self._backoff, self._random = backoff, random.Random()  # jitter is no part of a result: no seed
        self._cache = ReplyCache(config.cache) if config.cache else None
        self._account = Account(config.price_in, config.price_out, config.max_cost, config.max_requests, self.name)
        self._requests = Pace(config.requests_per_minute) if config.requests_per_minute else None
        self._tokens = Pace(config.tokens_per_minute) if config.tokens_per_minute else None
        self._live: dict[asyncio.AbstractEventLoop, _Live] = {}
        self._resume = 0.0  # on the monotonic clock: until then the server wants no request from anyone
        self._length_name = "max_tokens"
        self._failures, self._answered, self._spoke = 0, False, -math.inf
        self._to_check, self._checked = False, False

    @property
    def usage(self) -> dict[str, float]:
        """Requests, tokens and cost so far, as JSON values (see `Account`)."""
        return self._account.usage()

    # ---- what a Speaker can be asked -------------------------------------------------------------------------------

    async def respond(self, request: Request) -> Response:
        """The reply, from the cache where it holds one. `finish_reason` is "length" or "eos": servers do not tell the
        end of a turn from a stop string."""
        asked = self._asked(request)
        key = reply_key(self.config.model, self.config.base_url, asked)
        if self._cache is not None and (kept := self._cache.get(key)) is not None:
            self._account.cached += 1
            return kept
        if self._to_check:
            async with self._here().checking:
                if self._to_check:
                    await self._check()
        reply = await self._ask(asked)
        if reply.finish_reason == "content_filter":
            raise Unscored(f"endpoint {self.name}: the server's content filter withheld the reply", reply.text)
        response = Response(reply.text, finish_reason=_FINISH.get(reply.finish_reason, "eos"))
        return response if self._cache is None else self._cache.put(key, response)

    async def choose(self, request: Request) -> list[float]:
        """Raises UserError."""
        raise UserError(_no_likelihoods(self.name))

    async def loglikelihood(self, request: Request, target: str) -> tuple[float, int]:
        """Raises UserError."""
        raise UserError(_no_likelihoods(self.name))

    async def check(self) -> None:
        """Raise UserError, in one sentence, for: no key in the environment, nothing that answers at the address, a
        key that is refused, a model that the server does not have (with the nearest name that it has).

        With replies in the cache that waits for the first question which is not in it: what is there can be had
        without server and key.
        """
        self._to_check = not self._checked  # once is enough for all stacks of a run
        if not self._to_check:
            return
        if self._cache is None or not len(self._cache):
            await self._check()

    async def _check(self) -> None:
        url, client = self.url, self._here().client
        names: list[str] | None = None
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                body = await self._send(client.models.with_raw_response.list(timeout=_CHECK_SECONDS))
            names = [str(entry["id"]) for entry in body["data"]]
        except _Refused as refused:
            if refused.status not in (404, 405, 501):
                raise UserError(f"{url} answers with HTTP {refused.status} when asked for its models") from None
        except (_Failed, TimeoutError) as failed:
            reason = failed.reason if isinstance(failed, _Failed) else "no reply in time"
            # Some servers cannot list their models (transformers serve without a cache of models answers 500).
            if not reason.startswith("HTTP"):
                raise UserError(
                    f"nothing answers at {url} ({reason}): start the server there, or correct base_url"
                ) from None
        except (KeyError, TypeError):
            pass
        if names is None or self.config.model not in names:
            await self._probe(names or [])
        self._to_check, self._checked = False, True

    # ---- one question, tried until it is answered ------------------------------------------------------------------

    def _asked(self, request: Request) -> dict[str, Any]:
        """The request as it is sent, without the model's name: what is not needed is left to the server's default."""
        sampling = request.sampling
        if sampling.num_beams > 1:
            raise UserError(f"endpoint {self.name} has no beam search: set num_beams=1")
        asked: dict[str, Any] = {
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0:
            asked |= {"top_p": sampling.top_p, "seed": sampling.seed}
        if sampling.stop:
            asked["stop"] = list(sampling.stop)
        if request.prefill:
            # No part of OpenAI's own interface: vLLM's and SGLang's words for "go on with the last message".
            asked["messages"].append({"role": "assistant", "content": request.prefill})
            asked["extra_body"] = {"add_generation_prompt": False, "continue_final_message": True}
        return asked

    async def _ask(self, asked: Mapping[str, Any]) -> _Reply:
        """The reply; `Unscored` when there is none, UserError when there have been none for a while."""
        try:
            reply = await self._persist(asked)
        except _Refused as refused:
            self._account.failed += 1
            what = f"HTTP {refused.status}{f' {refused.code}' if refused.code else ''}"
            if refused.status == 404:
                raise UserError(
                    f"{self.url} has no model {self.name}, or is not the right address (HTTP 404: "
                    f"{_short(refused.message)})"
                ) from None
            if not self._answered:  # later a refusal is about the one question: too long, say
                self._count_failure(f"{what}: {_short(refused.message)}")
            raise Unscored(f"endpoint {self.name}: refused with {what}", refused.message) from None
        except _Failed as failed:
            self._account.failed += 1
            self._count_failure(failed.reason)
            tries = f"{self.config.retries + 1} {'tries' if self.config.retries else 'try'}"
            raise Unscored(f"endpoint {self.name}: {failed.reason} after {tries}", failed.raw, failed=True) from None
        self._failures, self._answered = 0, True
        return reply

    async def _persist(self, asked: Mapping[str, Any]) -> _Reply:
        """Ask until there is a reply, or no try is left; raises what the last try raised."""
        for tried in range(self.config.retries):
            try:
                return await self._try(asked)
            except _Failed as failed:
                self._account.retries += 1
                pause = min(self._backoff * 2**tried, _LONGEST_BACKOFF) * self._random.uniform(0.5, 1.0)
                self._speak(failed.reason, pause + failed.wait)
                await asyncio.sleep(pause)
        return await self._try(asked)

    def _count_failure(self, reason: str) -> None:
        self._failures += 1
        if self._failures >= _DOWN_AFTER:
            raise UserError(
                f"endpoint {self.name} at {self.url} is down: {self._failures} questions in a row had no "
                f"reply, the last one for {reason}; the same command goes on when it is up again"
            ) from None

    async def _try(self, asked: Mapping[str, Any]) -> _Reply:
        """Ask once, when slot, pace, the server's own wish for a pause and the caps allow it."""
        live = self._here()
        prompt = estimate_tokens([message["content"] for message in asked["messages"]])
        most = prompt + asked["max_tokens"]
        need = self._account.cost(prompt, asked["max_tokens"])
        async with live.slots:
            while (wait := self._resume - time.monotonic()) > 0:
                await asyncio.sleep(wait + self._random.uniform(0.0, self._backoff))
            if self._requests is not None:
                await self._requests.take()
            if self._tokens is not None:
                await self._tokens.take(most)
            await self._admit(need)
            self._account.start(need)
            used = 0
            try:
                with heartbeat.asking(self.name):
                    body = await self._complete(live.client, asked)
                reply, used = self._read(body, prompt)
                return reply
            finally:
                self._account.end(need)
                if self._tokens is not None:
                    self._tokens.give_back(most - (used or prompt))

    async def _admit(self, need: float) -> None:
        """Wait while a cap forbids it: what is under way may cost less than is kept for it, and is not thrown away."""
        while self._account.over(need):
            await asyncio.sleep(_LANDING)
            if not self._account.in_flight and (sentence := self._account.over(need)):
                raise UserError(sentence)

    async def _complete(self, client: openai.AsyncOpenAI, asked: Mapping[str, Any]) -> Any:
        length = self._length_name
        sent = {length if name == "max_tokens" else name: value for name, value in asked.items()}
        try:
            async with asyncio.timeout(self.config.timeout):
                return await self._send(
                    client.chat.completions.with_raw_response.create(model=self.config.model, **sent)
                )
        except TimeoutError:
            raise _Failed(f"no reply within {self.config.timeout:g} s") from None
        except _Refused as refused:
            if length != "max_tokens" or "max_completion_tokens" not in refused.message:
                raise
        self._length_name = "max_completion_tokens"  # what newer models call it
        self._account.requests += 1
        return await self._complete(client, asked)

    async def _send(self, call: Any) -> Any:
        """The JSON body of a call's answer. Raises _Failed, _Refused, or UserError where no call can succeed.

        The client's exceptions stop here: they hold the request with its headers, and the key is one.
        """
        import openai

        url = self.url
        try:
            answer = await call
            text = answer.text
        except openai.APITimeoutError:
            raise _Failed(f"no reply within {self.config.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _Failed(_connection_words(error)) from None
        except openai.APIStatusError as error:
            status, code = error.status_code, str(error.code or "")
            message = self._clean(error.message)[:500]
            wait = _retry_after(error.response.headers)
        except (openai.OpenAIError, OSError, ValueError) as error:
            raise _Failed(f"an answer that cannot be read ({type(error).__name__})") from None
        else:
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                raise _Failed("an answer that is no JSON", self._clean(text)[:500]) from None
        if status in (401, 403):
            key = f"the key in {self.config.api_key_env}" if self._key() else f"a request without {self._key_name()}"
            raise UserError(f"{url} refuses {key} (HTTP {status})") from None
        if status == 402 or code == "insufficient_quota":
            raise UserError(f"the account behind {self.config.api_key_env} has no credit left at {url}") from None
        if wait > _LONGEST_WAIT:
            raise UserError(f"{url} wants no request for the next {wait:.0f} s (HTTP {status}): go on then") from None
        if status in (408, 409, 425, 429) or status >= 500:
            self._resume = max(self._resume, time.monotonic() + wait)
            raise _Failed(f"HTTP {status}", message, wait) from None
        raise _Refused(status, self._clean(code), message) from None

    def _read(self, body: Any, prompt: int) -> tuple[_Reply, int]:
        """The reply in a body, and the tokens that both took; they are put to the account whatever the reply is."""
        try:
            choice = body["choices"][0]
            message = choice["message"]
            text = message.get("content")
            text = message.get("refusal") or "" if text is None else text
            finish = choice.get("finish_reason") or ""
            model = body.get("model") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            text = finish = model = None
        if not (isinstance(text, str) and isinstance(finish, str) and isinstance(model, str)):
            raise _Failed("an answer that is no chat completion", self._clean(json.dumps(body))[:500])
        account, usage = self._account, body.get("usage")
        taken, made = (usage.get(name) if isinstance(usage, dict) else None for name in _COUNTS)
        if not (isinstance(taken, int) and isinstance(made, int) and min(taken, made) >= 0):
            account.unreported += 1
            taken, made = prompt, estimate_tokens([text])
        account.prompt_tokens += taken
        account.completion_tokens += made
        return _Reply(self._clean(text), finish, model), taken + made

    async def _probe(self, names: Sequence[str]) -> None:
        """Ask for one token: servers answer for aliases and folders that they do not list."""
        asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0.0}
        model, url = self.config.model, self.url
        near = get_close_matches(model, names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        if not near and not re.search(r"/v\d", url):
            hint = " (many servers answer below /v1: is it missing in base_url?)"
        try:
            reply = await self._persist(asked)
        except _Refused as refused:
            told = f" (HTTP {refused.status})" if refused.status == 404 else f" ({_short(refused.message)})"
            raise UserError(f"{url} does not answer for the model {model}{told}{hint}") from None
        except _Failed as failed:
            raise UserError(f"{url} does not answer for the model {model} ({failed.reason}){hint}") from None
        if names and not reply.model.casefold().startswith(model.casefold()):
            told = f"answers as {reply.model}" if reply.model else "does not list it"
            raise UserError(f"{url} has no model {model}: it {told}{hint}")
        if names:
            log.warning("%s does not list the model %s, but answers for it", url, model)

    # ---- keys and clients ------------------------------------------------------------------------------------------

    def _key(self) -> str:
        return os.environ.get(self.config.api_key_env, "").strip()

    def _key_name(self) -> str:
        return f"a key ({self.config.api_key_env} is not set)"

    def _clean(self, text: str) -> str:
        """What a server says, without the key: some repeat it."""
        key = self._key()
        return text.replace(key, "[key]") if key else text

    def _here(self) -> _Live:
        """This event loop's client, made at its first request."""
        loop = asyncio.get_running_loop()
        if loop not in self._live:
            self._live[loop] = live = _Live(self._client(), asyncio.Semaphore(self.config.concurrency))
            live.closing = loop.create_task(self._close_with(loop))
        return self._live[loop]

    async def _close_with(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the end of the loop, when `asyncio.run` cancels what is left, and close its connections."""
        try:
            await loop.create_future()
        finally:
            await self._live.pop(loop).client.close()

    def _client(self) -> openai.AsyncOpenAI:
        import openai

        name, key = self.config.api_key_env, self._key()
        if not key and not self._own:
            raise UserError(f"{self.url} needs a key: set the environment variable {name}")
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"the environment variable {name} holds spaces or characters that no key has")
        for library in ("httpx", "httpx2"):  # a line for every request
            logging.getLogger(library).setLevel(logging.WARNING)
        return openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=self.url,
            timeout=self.config.timeout,
            max_retries=0,  # its own retries neither count, nor cover bodies that are no JSON
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not self._own),  # no proxy to this machine
        )

    def _speak(self, reason: str, pause: float) -> None:
        """Say that tries fail, now and then."""
        if time.monotonic() - self._spoke > _REPORT_SECONDS:
            self._spoke = time.monotonic()
            count = self._account.retries
            log.warning("endpoint %s: %s, next try in %.1f s (retry %d)", self.name, reason, pause, count)


_COUNTS = ("prompt_tokens", "completion_tokens")


class PersonalizedEndpoint:
    """Personalizers that act through the prompt, in front of an endpoint, in the order given.

    Raises UserError for a personalizer that acts on embeddings or modules: neither exists over HTTP. Retrieval counts
    its budget in the tokens of the base LM that it was built with.
    """

    likelihoods = False

    def __init__(self, endpoint: Endpoint, personalizers: Sequence[Personalizer]) -> None:
        from persona.personalizer import Personalizer

        for personalizer in personalizers:
            for door in ("embeddings", "modules"):
                if getattr(type(personalizer), door) is not getattr(Personalizer, door):
                    raise UserError(
                        f"personalizer {personalizer.method} acts on {door}, which {endpoint.name}, an endpoint, does "
                        "not give access to: only personalizers of the prompt can stand in front of one"
                    )
        self.endpoint, self.personalizers = endpoint, tuple(personalizers)
        self.name = endpoint.name

    @property
    def usage(self) -> dict[str, float]:
        """The endpoint's."""
        return self.endpoint.usage

    async def check(self) -> None:
        """The endpoint's."""
        await self.endpoint.check()

    async def respond(self, request: Request) -> Response:
        """The endpoint's reply to the request with every personalizer's messages."""
        messages = request.messages
        for personalizer in self.personalizers:
            (changed,) = personalizer.prompt([replace(request, messages=messages)])
            messages = changed.messages
        return await self.endpoint.respond(replace(request, messages=messages))

    async def choose(self, request: Request) -> list[float]:
        """Raises UserError."""
        raise UserError(_no_likelihoods(self.name))

    async def loglikelihood(self, request: Request, target: str) -> tuple[float, int]:
        """Raises UserError."""
        raise UserError(_no_likelihoods(self.name))


def _no_likelihoods(name: str) -> str:
    return f"endpoint {name} gives no log-likelihoods: choose a benchmark that only asks for replies, or a local model"


def _in_file(base_url: str) -> bool:
    return base_url.startswith("file:")


def _address(base_url: str) -> str:
    """`base_url`, or what the file that it names holds. Raises UserError when there is no such file."""
    if not _in_file(base_url):
        return base_url
    path = Path(base_url.removeprefix("file:")).expanduser()
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read(2000).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"base_url={base_url}: no server has written its address there ({type(error).__name__}); "
            "slurm/serve.sbatch does, once it answers"
        ) from None


def key_problems(config: EndpointConfig) -> Iterator[str]:
    """A sentence for each place where a key stands that a config should not hold; none of them repeats it."""
    if not _in_file(config.base_url) and re.search(r"[@?]", config.base_url):
        yield "base_url holds a password or a query: a key belongs into the environment (api_key_env)"
    # Keys have small letters in them; names of environment variables, by custom, have not.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", config.api_key_env):
        yield (
            "api_key_env should be the name of an environment variable, in capitals as OPENAI_API_KEY: the key itself "
            "belongs there and not into a config"
        )


def _check_config(config: EndpointConfig, url: str) -> None:
    if not config.model or not url:
        raise UserError("an endpoint needs a model and a base_url, such as http://localhost:8000/v1")
    for sentence in key_problems(replace(config, base_url=url)):
        raise UserError(sentence)
    # What a file holds is not repeated: it may be another file than was meant, a key's.
    shown = f"what stands in {config.base_url}" if _in_file(config.base_url) else f"base_url={url}"
    try:
        address = urlsplit(url)
        _ = address.port
    except ValueError:
        address = urlsplit("")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"{shown} is no address: it should look like http://localhost:8000/v1")
    positive = ("requests_per_minute", "tokens_per_minute", "timeout", "concurrency", "max_cost", "max_requests")
    for name in positive:
        if (value := getattr(config, name)) is not None and not value > 0:
            raise UserError(f"endpoint {config.model}: {name}={value} has to be greater than 0")
    for name in ("retries", "price_in", "price_out"):
        if not getattr(config, name) >= 0:
            raise UserError(f"endpoint {config.model}: {name}={getattr(config, name)} has to be 0 or more")
    if config.max_cost is not None and not (config.price_in or config.price_out):
        raise UserError(f"endpoint {config.model}: max_cost without price_in and price_out is never reached")


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _connection_words(error: BaseException) -> str:
    cause = error.__cause__
    name = type(cause).__name__ if cause is not None else ""
    return {"ConnectError": "no connection", "ConnectTimeout": "no connection"}.get(name, "the connection was cut")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, given as a number, milliseconds or a date; 0 when it does not."""
    with suppress(ValueError, KeyError):
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(value)) if math.isfinite(float(value)) else 0.0
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
