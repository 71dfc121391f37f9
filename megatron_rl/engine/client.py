"""One SGLang server over HTTP: batched streaming generation with log-probs and weight versions, abort, and plain control calls.

All requests of one `generate` call travel in one HTTP request, and the server streams what is new of each
(`--incremental-streaming-output`), every `--stream-interval` tokens: on few cores HTTP and JSON compete with the model.

Invariants:
- whatever a server does wrong (refused or broken connection, status, garbage, impossible tokens, silence as watch.py judges it) is
  an EngineLost that names the engine and the cause in one line, and `lost` says so from then on; what was yielded before is valid;
- with the first fault all streams of a server end, each with that same EngineLost; an abort is answered within `stall_timeout_s` or
  is such a fault;
- tokens, engine log-probs and versions of a Progress are equally many, and a request gets at most `max_new_tokens` in all;
- with `report_support` every token has a support that holds it, of ids of the vocabulary, each once, and its log-prob within it;
- a token's version is the one the server stamped on it; an aborted request delivers all it had and ends unfinished.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import itertools
import json
import math
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn

import aiohttp
import orjson

from megatron_rl.config.errors import UserError
from megatron_rl.engine.expert_rows import expert_rows
from megatron_rl.engine.watch import GivenUp, Watch
from megatron_rl.types import EngineLost, FinishReason, GenerateRequest, Manifest, Progress, RoutingShape, SamplingParams

CONNECT_TIMEOUT_S = 10.0
_serial = itertools.count()  # of all requests: a server may yet abort those of a broken connection when the next ones have come
NOT_A_NUMBER = (
    "the engine's log-probs under weights {version} are not numbers: training has diverged; "
    "remove the newest checkpoints up to a good one and lower optimizer.lr"
)


@dataclass(slots=True)
class Held:
    """What is known of one server process's weights (weights.py keeps it)."""

    updating: bool = False  # between /begin_weight_update and /end_weight_update
    manifest: Manifest | None = None  # the last one it was asked about
    dtypes: Mapping[str, str] = field(default_factory=dict)  # and its answer
    whole: bool = False  # it has taken every tensor since it started


class SglangEngine:
    """Implements `ports.Engine`. One object per server process: a restarted server gets a new one."""

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        api_key: str,
        vocab_size: int,
        request_timeout_s: float,
        stall_timeout_s: float,
        routing: RoutingShape | None = None,
    ) -> None:
        self.name = name
        self.lost: str | None = None  # the first thing that went wrong
        self.held = Held()
        self.host = host
        self._port, self._vocab_size, self._routing = port, vocab_size, routing
        self._request_timeout_s, self.stall_timeout_s = request_timeout_s, stall_timeout_s
        self._watch = Watch(stall_timeout_s, request_timeout_s, self._is_well, self._mark_lost)
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        self._running: dict[str, str] = {}  # rollout id -> request id
        self._aborted: set[str] = set()  # request ids

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[Sequence[Progress]]:
        # SGLang aborts by prefix (scheduler.py:5450): no request id may begin another.
        rids = [f"{request.rollout_id}~{next(_serial)}~" for request in requests]
        self._running |= {request.rollout_id: rid for request, rid in zip(requests, rids, strict=True)}
        streams = [_Stream(request, self._vocab_size, self._routing) for request in requests]
        body = {
            "rid": rids,
            "input_ids": [request.tokens for request in requests],
            "sampling_params": [_sampling(request) for request in requests],
            "return_logprob": True,
            "return_routed_experts": any(request.report_experts for request in requests),  # one answer for all of a call
            "return_sampling_mask": [request.sampling.report_support for request in requests],
            "stream": True,
        }
        try:
            async with aclosing(self._events("/generate", body)) as arriving:
                async for events in arriving:
                    yield [progress for event in events if (progress := self._progress(streams, rids, event))]
            unfinished = [stream.request.rollout_id for stream in streams if not stream.ended]
            if unfinished:
                self.lose(f"the stream ended before {unfinished[0]} and {len(unfinished) - 1} more requests did")
        finally:
            for request, rid in zip(requests, rids, strict=True):
                self._aborted.discard(rid)
                if self._running.get(request.rollout_id) == rid:
                    del self._running[request.rollout_id]

    async def abort(self, rollout_ids: Iterable[str] | None = None) -> None:
        ids = self._running.keys() if rollout_ids is None else rollout_ids
        rids = [self._running[rollout_id] for rollout_id in ids if rollout_id in self._running]
        if not rids:
            return
        self._aborted.update(rids)
        bodies = [{"abort_all": True}] if rollout_ids is None else [{"rid": rid} for rid in rids]
        async with self._session(self.stall_timeout_s) as session:
            await asyncio.gather(*(self._post(session, "/abort_request", body) for body in bodies))

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None, refusable: bool = False
    ) -> Any:
        """Blocking: POST `body`, or GET where it is None; the JSON that came back, {} for an empty or plain-text answer.
        `refusable`: a 400 is an answer as well."""
        connection = http.client.HTTPConnection(self.host, self._port, timeout=timeout_s or self._request_timeout_s)
        try:
            method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
            connection.request(method, path, body=data, headers=self._headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200 and not (refusable and response.status == 400):
                self.lose(f"{path} answered {response.status}: {_shortened(content)}")
            is_json = "json" in (response.headers.get("Content-Type") or "")
            return json.loads(content) if is_json and content else {}
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            self.lose(f"{path}: {_reason(error)}")
        finally:
            connection.close()

    def answers(self) -> bool:
        """Whether the server listens yet; never loses it."""
        connection = http.client.HTTPConnection(self.host, self._port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.request("GET", "/model_info", headers=self._headers)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def warm_up(self, timeout_s: float) -> None:
        """One token through all of the server's processes; then what they have allocated so far leaves the garbage collector."""
        self.call("/generate", {"input_ids": [[0]], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}, timeout_s)
        self.call("/freeze_gc", {}, timeout_s)

    def _session(self, limit_s: float | None = None) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_TIMEOUT_S)
        return aiohttp.ClientSession(f"http://{self.host}:{self._port}", headers=self._headers, timeout=timeout)

    async def _post(self, session: aiohttp.ClientSession, path: str, body: Mapping[str, Any]) -> None:
        try:
            async with session.post(path, data=orjson.dumps(body)) as response:
                if response.status != 200:
                    self.lose(f"{path} answered {response.status}: {_shortened(await response.read())}")
        except TimeoutError:
            self.lose(f"{path} was not answered for engine.stall_timeout_s={self.stall_timeout_s:g}")
        except (aiohttp.ClientError, OSError) as error:
            self.lose(f"{path}: {_reason(error)}")

    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The server-sent events of one POST, as many at a time as have arrived."""
        parts: list[bytes] = []  # of an event that has not come whole: joined once, since experts make it large
        try:
            async with self._watch.stream(), self._session() as session:
                with closing(await self._watch.wait(session.post(path, data=orjson.dumps(body)))) as response:
                    _end_with_its_connection(response)
                    if response.status != 200:
                        content = await self._watch.wait(response.read())
                        self.lose(f"{path} answered {response.status}: {_shortened(content)}")
                    while chunk := await self._watch.wait(response.content.readany()):
                        self._watch.heard()
                        ends = b"\n\n" in (parts[-1][-1:] if parts else b"") + chunk
                        parts.append(chunk)
                        if not ends:
                            continue
                        *lines, rest = b"".join(parts).split(b"\n\n")
                        parts = [rest] if rest else []
                        events = [orjson.loads(line.removeprefix(b"data: ")) for line in lines if line != b"data: [DONE]"]
                        if events:
                            yield events
        except GivenUp:
            raise EngineLost(self.lost) from None
        except orjson.JSONDecodeError as error:
            self.lose(f"{path} sent garbage ({error})")
        except (aiohttp.ClientError, OSError) as error:
            self.lose(f"{path}: {_reason(error)}")

    def _progress(self, streams: Sequence[_Stream], rids: Sequence[str], event: Any) -> Progress | None:
        try:
            if "error" in event:
                self.lose(f"/generate: {event['error']['message']}")
            index = event["index"]
            return streams[index].take(event, aborted=rids[index] in self._aborted)
        except UserError:  # the policy is ill, not the engine: another one would say the same
            raise
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self.lose(f"/generate sent nonsense: {_reason(error)}")

    async def _is_well(self) -> bool:
        try:
            async with self._session() as session, session.get("/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    def lose(self, cause: str) -> NoReturn:
        self._mark_lost(cause)
        raise EngineLost(self.lost)

    def _mark_lost(self, cause: str) -> None:
        self.lost = self.lost or f"{self.name} ({self.host}:{self._port}): {' '.join(cause.split())}"
        self._watch.end()


class _Stream:
    """What one request has been sent so far. `take` raises ValueError, KeyError or TypeError for what cannot be."""

    def __init__(self, request: GenerateRequest, vocab_size: int, routing: RoutingShape | None) -> None:
        self.request = request
        self.ended = False
        self._vocab_size, self._routing = vocab_size, routing
        self._versions: list[int] = []
        self._last: int | None = None  # token

    def take(self, event: Mapping[str, Any], aborted: bool) -> Progress | None:
        meta = event["meta_info"]
        reason = meta["finish_reason"] and meta["finish_reason"]["type"]
        if self.ended or reason not in (None, "stop", "length", "abort"):
            raise ValueError(f"an event with finish_reason={reason!r} for {self.request.rollout_id}, ended={self.ended}")
        if reason == "abort" and not aborted:
            self._explain_abort(meta)
        self.ended = reason is not None

        tokens, pairs = event["output_ids"], meta.get("output_token_logprobs") or []
        count = meta["completion_tokens"] - len(self._versions)
        if reason == "abort":
            # For a request aborted out of the waiting queue SGLang repeats what it had sent (tokenizer_manager.py:3419).
            tokens, pairs = tokens[:count], pairs[:count]
        if not count == len(tokens) == len(pairs) or len(self._versions) + count > self.request.max_new_tokens:
            raise ValueError(
                f"{len(tokens)} tokens and {len(pairs)} log-probs as the next {count} of {self.request.rollout_id}, "
                f"which had {len(self._versions)} of at most {self.request.max_new_tokens}"
            )
        if any(logprob is None for logprob, _, _ in pairs):  # how JSON tells a NaN
            raise UserError(NOT_A_NUMBER.format(version=meta["weight_version"]), exit_code=1)
        logprobs = tuple(logprob for logprob, _, _ in pairs)
        for token, (logprob, told, _) in zip(tokens, pairs, strict=True):
            if token != told or not 0 <= token < self._vocab_size or not math.isfinite(logprob):
                raise ValueError(f"token {token} with log-prob {logprob} of token {told}, vocabulary {self._vocab_size}")
        support: tuple[bytes, ...] = ()
        if self.request.sampling.report_support:
            logprobs, support = self._within_support(tokens, meta)
        versions = (int(meta["weight_version"]),) * count
        self._versions += versions
        self._last = tokens[-1] if tokens else self._last
        if self.ended:
            self._check_versions(meta["weight_versions"] if reason != "abort" else meta.get("weight_versions"))
        experts = self._experts(meta.get("routed_experts"), aborted=reason == "abort") if self.ended else b""
        if not tokens and not experts and reason in (None, "abort"):
            return None
        finish: FinishReason | None = None if reason == "abort" else reason
        return Progress(self.request.rollout_id, tuple(tokens), logprobs, versions, finish, experts, support)

    def _within_support(self, tokens: Sequence[int], meta: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[bytes, ...]]:
        """Log-probs of the distribution that was sampled from, and what of the vocabulary the cut had left of it."""
        logprobs, supports = meta.get("output_token_sampling_logprobs") or [], meta.get("output_token_sampling_mask") or []
        if not len(tokens) == len(logprobs) == len(supports):
            raise ValueError(f"{len(tokens)} tokens, {len(logprobs)} log-probs within {len(supports)} supports")
        for token, logprob, ids in zip(tokens, logprobs, supports, strict=True):
            if token not in ids or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise ValueError(f"token {token} with a support of {len(ids)} ids, vocabulary {self._vocab_size}: {ids[:8]}")
            if not math.isfinite(logprob):
                raise ValueError(f"token {token} with log-prob {logprob} within its support")
        return tuple(logprobs), tuple(array("i", ids).tobytes() for ids in supports)

    def _explain_abort(self, meta: Mapping[str, Any]) -> NoReturn:
        reason, with_support = meta["finish_reason"], self.request.sampling.report_support
        if with_support and reason.get("status_code") == HTTPStatus.BAD_REQUEST:
            # A support beyond the server's limit (batch_result_processor.py:1226), or none: another engine would say the same.
            keys = "rollout.top_k, engine.server_args.sampling_mask_max_tokens"
            raise UserError(f"rollout.keep_sampling_mask: {reason['message']} ({keys})", exit_code=1)
        if with_support and not self._versions and "outside its captured sampling support" in reason["message"]:
            # What is not a number is in no support (sampler.py:536). A sampler that errs hardly does at a first token.
            raise UserError(NOT_A_NUMBER.format(version=meta["weight_version"]), exit_code=1)
        raise ValueError(f"aborted {self.request.rollout_id} by itself: {reason.get('message')}")

    def _experts(self, reported: str | None, aborted: bool) -> bytes:
        at_end = len(self._versions) == self.request.max_new_tokens or self._last in self.request.sampling.stop_token_ids
        if not self.request.report_experts or (aborted and not at_end):  # it will go on, and report again
            return b""
        if reported is None or self._routing is None:
            raise ValueError(f"{self.request.rollout_id} has ended without its routed experts")
        positions = len(self.request.tokens) + len(self._versions) - 1  # the last token was sampled, not computed
        return expert_rows(reported, self._routing, positions)

    def _check_versions(self, spans: Sequence[Mapping[str, Any]] | None) -> None:
        """The server says each token's version when it ends a request; we noted them message by message. No push lies between."""
        if spans is None:
            return
        said = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
        if said != self._versions:
            raise ValueError(f"weights changed under {self.request.rollout_id}: {spans} for versions {sorted(set(self._versions))}")


def _end_with_its_connection(response: aiohttp.ClientResponse) -> None:
    """aiohttp closes a connection whose chunks are framed wrongly, and leaves the body's reader waiting (3.14.5,
    client_proto.py:377). Can go when it tells the reader."""

    def tell(closed: asyncio.Future[None]) -> None:
        if not response.content.is_eof() and response.content.exception() is None:
            response.content.set_exception(aiohttp.ClientPayloadError("the connection was closed"))

    protocol = response.connection.protocol if response.connection is not None else None
    if protocol is not None and protocol.closed is not None:  # else the whole answer is here already
        protocol.closed.add_done_callback(tell)


def _sampling(request: GenerateRequest) -> dict[str, Any]:
    params: SamplingParams = request.sampling
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_new_tokens": request.max_new_tokens,
        "stop_token_ids": params.stop_token_ids,
        "sampling_seed": request.seed,  # without deterministic inference SGLang reads it and goes by its own generator
    }


def _reason(error: BaseException) -> str:
    broken = (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError)
    if isinstance(error, broken) or (isinstance(error, OSError) and error.errno in (errno.ECONNRESET, errno.EPIPE)):
        return "the connection broke"  # whatever the message was in the middle of
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shortened(content: bytes) -> str:
    return content[:300].decode(errors="replace") or "(empty)"
