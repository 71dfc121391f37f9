"""The client against a scripted server: every way a server can fail is one EngineLost, and no message is lost or counted twice."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from megatron_rl.config.errors import UserError
from megatron_rl.engine.client import SglangEngine
from megatron_rl.types import EngineLost, GenerateRequest, Progress, SamplingParams

Handler = Callable[[web.Request, dict[str, Any], "Reply"], Awaitable[None]]
REQUESTS = [
    GenerateRequest("0:a#1", (3, 4), 5, SamplingParams(temperature=0.7, stop_token_ids=(9,))),
    GenerateRequest("0:a#12", (5,), 4, SamplingParams(temperature=0.7, stop_token_ids=(9,))),
]


class Reply:
    """Streams server-sent events as SGLang does."""

    def __init__(self, request: web.Request, abort_seen: asyncio.Event) -> None:
        self._request, self.abort_seen = request, abort_seen
        self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.sent = [0] * len(REQUESTS)

    async def raw(self, data: bytes) -> None:
        if not self.response.prepared:
            await self.response.prepare(self._request)
        await self.response.write(data)

    def event(self, index: int, tokens: list[int], finish: str | None = None, **meta: Any) -> bytes:
        self.sent[index] += len(tokens)
        info = {
            "finish_reason": finish and {"type": finish, "message": "on request"},
            "weight_version": "7",
            "completion_tokens": self.sent[index],
            "output_token_logprobs": [[-0.1 * token, token, None] for token in tokens],
        }
        if finish:
            info["weight_versions"] = [{"version": "7", "start": 0, "end": self.sent[index]}]
        return b"data: " + json.dumps({"index": index, "output_ids": tokens, "meta_info": info | meta}).encode() + b"\n\n"

    async def done(self) -> None:
        await self.raw(b"data: [DONE]\n\n")


def run(
    handler: Handler,
    *,
    requests: Sequence[GenerateRequest] = REQUESTS,
    abort: tuple[str, ...] | None = (),
    timeout_s: float = 5.0,
    stall_s: float = 5.0,
    is_well: bool = True,
    takes_aborts: bool = True,
) -> tuple[dict[str, list[Progress]], list[Any]]:
    """What each rollout got before the end or the EngineLost (which is re-raised with `.got`), and the bodies of aborts.
    `abort`: rollouts to abort after the first message, None for all."""
    got: dict[str, list[Progress]] = {request.rollout_id: [] for request in requests}
    aborts: list[Any] = []
    abort_seen = asyncio.Event()

    async def generate(request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret"
        reply = Reply(request, abort_seen)
        await handler(request, await request.json(), reply)
        return reply.response

    async def on_abort(request: web.Request) -> web.Response:
        aborts.append(await request.json())
        if not takes_aborts:
            await asyncio.sleep(5)
        abort_seen.set()
        return web.Response()

    async def on_health(request: web.Request) -> web.Response:
        return web.Response(status=200 if is_well else 503)

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/generate", generate)
        app.router.add_post("/abort_request", on_abort)
        app.router.add_get("/health", on_health)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        engine = SglangEngine(
            "engine_3", "127.0.0.1", port, "secret", vocab_size=64, request_timeout_s=timeout_s, stall_timeout_s=stall_s
        )
        try:
            first = True
            async for messages in engine.generate(requests):
                for message in messages:
                    got[message.rollout_id].append(message)
                if first and abort != ():
                    await engine.abort(abort)
                first = False
            assert engine.lost is None
        except EngineLost as error:
            assert engine.lost == str(error)
            assert str(error).startswith(f"engine_3 (127.0.0.1:{port}): ") and "\n" not in str(error)
            error.got = got  # type: ignore[attr-defined]
            raise
        finally:
            await runner.cleanup()

    asyncio.run(main())
    return got, aborts


def test_streams_tokens_logprobs_and_versions_of_a_batch() -> None:
    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        assert body["input_ids"] == [[3, 4], [5]]
        assert body["return_logprob"] is True and body["stream"] is True and body["return_sampling_mask"] == [False, False]
        assert body["sampling_params"] == [
            {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_new_tokens": n, "stop_token_ids": [9], "sampling_seed": seed}
            for n, seed in ((5, REQUESTS[0].seed), (4, REQUESTS[1].seed))
        ]
        data = reply.event(0, [1]) + reply.event(1, [2]) + reply.event(0, [3, 9], "stop") + reply.event(1, [3, 4, 5], "length")
        for cut in range(0, len(data), 7):  # messages that end anywhere
            await reply.raw(data[cut : cut + 7])
        await reply.done()

    got, _ = run(handler)
    first, second = (got[request.rollout_id] for request in REQUESTS)
    assert [m.tokens for m in first] == [(1,), (3, 9)] and [m.finish_reason for m in first] == [None, "stop"]
    assert [m.tokens for m in second] == [(2,), (3, 4, 5)] and [m.finish_reason for m in second] == [None, "length"]
    assert first[1].engine_logprobs == pytest.approx((-0.3, -0.9)) and first[1].versions == (7, 7)


def test_no_request_id_begins_another_and_none_is_used_twice() -> None:
    seen: list[str] = []

    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        seen.extend(body["rid"])
        await reply.raw(reply.event(0, [1], "length") + reply.event(1, [1], "length"))

    run(handler)
    run(handler)  # another client
    assert not any(a != b and b.startswith(a) for a in seen for b in seen) and len(set(seen)) == len(seen) == 2 * len(REQUESTS)


def test_an_aborted_request_delivers_all_it_had_and_ends_unfinished() -> None:
    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        await reply.raw(reply.event(0, [1]) + reply.event(1, [2]))
        await reply.abort_seen.wait()
        await reply.raw(reply.event(0, [3], "abort") + reply.event(1, [], "abort"))
        await reply.done()

    got, aborts = run(handler, abort=None)
    assert [m.tokens for m in got["0:a#1"]] == [(1,), (3,)] and got["0:a#1"][-1].finish_reason is None
    assert [m.tokens for m in got["0:a#12"]] == [(2,)]
    assert aborts == [{"abort_all": True}]


def test_one_request_can_be_aborted_alone() -> None:
    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        await reply.raw(reply.event(0, [1]) + reply.event(1, [2]))
        await reply.abort_seen.wait()
        await reply.raw(reply.event(0, [], "abort") + reply.event(1, [4], "length"))

    got, aborts = run(handler, abort=("0:a#1", "unknown"))
    assert [m.finish_reason for m in got["0:a#12"]] == [None, "length"]
    assert len(aborts) == 1 and aborts[0]["rid"].startswith("0:a#1~")


def test_what_sglang_repeats_of_a_queued_request_is_counted_once() -> None:
    """tokenizer_manager.py:3419: an abort out of the waiting queue repeats the last token and all log-probs."""

    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        await reply.raw(reply.event(0, [1, 2]) + reply.event(1, [5]))
        await reply.abort_seen.wait()
        spans = [{"version": "7", "start": 0, "end": 2}]
        alone = {"completion_tokens": 2, "output_token_logprobs": [[-0.1, 1, None], [-0.2, 2, None]], "weight_versions": None}
        coalesced = {
            "completion_tokens": 2,
            "output_token_logprobs": [[-0.6, 6, None], [-0.5, 5, None], [-0.6, 6, None]],
            "weight_versions": spans,
        }
        await reply.raw(reply.event(0, [2], "abort", **alone))
        await reply.raw(reply.event(1, [6, 6], "abort", **coalesced))

    got, _ = run(handler, abort=None)
    assert [m.tokens for m in got["0:a#1"]] == [(1, 2)]
    assert [m.tokens for m in got["0:a#12"]] == [(5,), (6,)]
    assert got["0:a#12"][1].engine_logprobs == (-0.6,)


async def _answers_500(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    raise web.HTTPInternalServerError(text="out of\nmemory")


async def _sends_garbage(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1]) + b"data: {nonsense\n\n")


async def _sends_a_list(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(b"data: [1, 2]\n\n")


async def _reports_an_error(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(b'data: {"error": {"message": "input is too long"}}\n\n')


async def _misses_a_logprob(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1, 2], output_token_logprobs=[[-0.1, 1, None]]))


async def _has_a_logprob_of_another_token(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1], output_token_logprobs=[[-0.1, 2, None]]))


async def _has_no_logprob(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1], output_token_logprobs=[[None, 1, None]]))


async def _invents_a_token(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [64]))


async def _generates_too_much(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(1, [1, 2, 3, 4, 5]))


async def _skips_a_token(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1], completion_tokens=2))


async def _aborts_by_itself(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1], "abort"))


async def _changes_weights_underway(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1]))
    await reply.raw(reply.event(0, [2], "stop", weight_versions=[{"version": "6", "start": 0, "end": 2}]))


async def _has_a_version_that_is_no_number(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1], weight_version="default"))


async def _ends_early(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1], "stop"))
    await reply.done()


async def _drops_the_connection(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1]))
    assert request.transport is not None
    request.transport.abort()


async def _frames_a_chunk_wrongly(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1]))
    await asyncio.sleep(0.1)  # until it was read
    assert request.transport is not None
    request.transport.write(b"1\r\n{}\r\n")
    await asyncio.sleep(5)


async def _is_silent(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1]))
    await asyncio.sleep(5)


@pytest.mark.parametrize(
    ("handler", "cause"),
    [
        (_answers_500, "answered 500: out of memory"),
        (_sends_garbage, "sent garbage"),
        (_sends_a_list, "nonsense"),
        (_reports_an_error, "input is too long"),
        (_misses_a_logprob, "2 tokens and 1 log-probs"),
        (_has_a_logprob_of_another_token, "token 1 with log-prob -0.1 of token 2"),
        (_invents_a_token, "token 64"),
        (_generates_too_much, "at most 4"),
        (_skips_a_token, "as the next 2"),
        (_aborts_by_itself, "aborted 0:a#1 by itself: on request"),
        (_changes_weights_underway, "weights changed under 0:a#1"),
        (_has_a_version_that_is_no_number, "nonsense"),
        (_ends_early, "the stream ended before 0:a#12"),
        (_drops_the_connection, "/generate: "),
        (_frames_a_chunk_wrongly, "/generate: the connection broke"),
        (_is_silent, "imeout"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_faulty_server_is_an_engine_lost_that_names_the_cause(handler: Handler, cause: str) -> None:
    with pytest.raises(EngineLost) as caught:
        run(handler, timeout_s=0.5)
    assert cause in str(caught.value)
    got = caught.value.got["0:a#1"]  # type: ignore[attr-defined]
    assert [m.tokens for m in got] in ([], [(1,)])  # what came whole before the fault is valid


async def _pauses(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
    await reply.raw(reply.event(0, [1]))
    await asyncio.sleep(0.7)
    await reply.raw(reply.event(0, [2]))
    await asyncio.sleep(0.4)
    await reply.raw(reply.event(0, [3], "stop") + reply.event(1, [1], "stop"))
    await reply.done()


def test_a_silent_server_that_says_it_is_well_is_waited_for() -> None:
    got, _ = run(_pauses, stall_s=0.15)
    assert [m.tokens for m in got["0:a#1"]] == [(1,), (2,), (3,)]


def test_a_silent_server_that_does_not_say_it_is_well_is_wedged() -> None:
    with pytest.raises(EngineLost, match=r"wedged: it sent nothing for engine\.stall_timeout_s=0\.15, and did not answer /health"):
        run(_is_silent, stall_s=0.15, is_well=False)


def test_a_server_that_is_late_and_not_well_but_sends_is_kept() -> None:
    """What arrives while it is asked counts as an answer."""
    got, _ = run(_pauses, stall_s=0.5, is_well=False)
    assert [m.tokens for m in got["0:a#1"]] == [(1,), (2,), (3,)]


def test_an_abort_that_is_not_answered_is_an_engine_lost_within_the_limit() -> None:
    started = time.monotonic()
    with pytest.raises(EngineLost, match=r"/abort_request was not answered for engine\.stall_timeout_s=0\.3"):
        run(_is_silent, abort=None, stall_s=0.3, takes_aborts=False)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("fault", [b"data: {nonsense\n\n", None], ids=["garbage", "abort"])
def test_the_first_fault_ends_every_stream_of_its_server(fault: bytes | None) -> None:
    """Each with the same EngineLost, at once, though a server that stands still leaves their sockets open."""
    second = asyncio.Event()
    causes: list[str] = []

    async def generate(request: web.Request) -> web.StreamResponse:
        reply = Reply(request, second)
        if (await request.json())["rid"][0].startswith("first"):
            await reply.raw(reply.event(0, [1]))
            await second.wait()
            if fault:
                await reply.raw(fault)
        second.set()
        await asyncio.sleep(5)  # without even a status
        return reply.response

    async def stream(engine: SglangEngine, name: str) -> None:
        try:
            async for _ in engine.generate([GenerateRequest(name, (3,), 5, SamplingParams())]):
                pass
        except EngineLost as error:
            causes.append(str(error))

    async def well(request: web.Request) -> web.Response:
        return web.Response()

    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async def main() -> float:
        app = web.Application()
        app.router.add_post("/generate", generate)
        app.router.add_post("/abort_request", silent)
        app.router.add_get("/health", well)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        engine = SglangEngine("engine_3", "127.0.0.1", port, "", vocab_size=64, request_timeout_s=5.0, stall_timeout_s=0.3)
        streams = [asyncio.create_task(stream(engine, name)) for name in ("first", "second")]
        await second.wait()
        started = time.monotonic()
        if fault is None:
            with pytest.raises(EngineLost):
                await engine.abort()
        await asyncio.gather(*streams)
        with pytest.raises(EngineLost):  # and it takes no more
            async for _ in engine.generate(REQUESTS):
                pass
        await runner.cleanup()
        return time.monotonic() - started

    assert asyncio.run(main()) < 2
    assert len(causes) == 2 and len(set(causes)) == 1


def test_a_logprob_that_is_no_number_is_the_policys_fault_not_the_engines() -> None:
    with pytest.raises(UserError, match="under weights 7 are not numbers: training has diverged"):
        run(_has_no_logprob, timeout_s=0.5)


CUT = [replace(request, sampling=replace(request.sampling, top_k=5, report_support=True)) for request in REQUESTS]


def masks(*supports: list[int], logprobs: Sequence[float | None] | None = None) -> dict[str, Any]:
    told = [-0.01 * ids[0] for ids in supports] if logprobs is None else logprobs
    return {"output_token_sampling_mask": supports, "output_token_sampling_logprobs": told}


def test_supports_come_with_the_logprobs_within_them() -> None:
    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        assert body["return_sampling_mask"] == [True, True]
        await reply.raw(reply.event(0, [1, 3], **masks([1], [3, 63, 0])) + reply.event(1, [2], **masks([2, 5])))
        await reply.raw(reply.event(0, [9], "stop", **masks([7, 9], logprobs=[-0.3])))
        await reply.abort_seen.wait()
        queued = {"completion_tokens": 1, "output_token_logprobs": [[-0.2, 2, None]], "weight_versions": None}
        await reply.raw(reply.event(1, [2], "abort", **queued))  # without supports: it repeats what it had sent

    got, _ = run(handler, requests=CUT, abort=None)
    (first, last), (other,) = got["0:a#1"], got["0:a#12"]
    assert [list(array("i", ids)) for ids in (*first.support, *last.support)] == [[1], [3, 63, 0], [7, 9]]
    assert first.engine_logprobs + last.engine_logprobs == pytest.approx((-0.01, -0.03, -0.3))
    assert (other.tokens, list(array("i", other.support[0]))) == ((2,), [2, 5])


@pytest.mark.parametrize(
    ("meta", "cause"),
    [
        ({}, "1 tokens, 0 log-probs within 0 supports"),
        (masks([1], [2]), "1 tokens, 2 log-probs within 2 supports"),
        (masks([1], logprobs=[]), "1 tokens, 0 log-probs within 1 supports"),
        (masks([2, 3]), "token 1 with a support of 2 ids"),
        (masks([], logprobs=[-0.1]), "token 1 with a support of 0 ids"),
        (masks([1, 64]), "token 1 with a support of 2 ids, vocabulary 64: [1, 64]"),
        (masks([1, -1]), "token 1 with a support of 2 ids"),
        (masks([1, 2, 2]), "token 1 with a support of 3 ids"),
        (masks([1, 2.5]), "nonsense"),
        (masks([1], logprobs=[None]), "nonsense"),
        ({**masks([1]), "output_token_sampling_mask": 7}, "nonsense"),
    ],
)
def test_an_impossible_support_is_an_engine_lost(meta: dict[str, Any], cause: str) -> None:
    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        await reply.raw(reply.event(0, [1], **meta))

    with pytest.raises(EngineLost) as caught:
        run(handler, requests=CUT)
    assert cause in str(caught.value) and caught.value.got["0:a#1"] == []  # type: ignore[attr-defined]


def test_a_support_beyond_the_servers_limit_names_the_keys_and_costs_no_engine() -> None:
    """Any engine would refuse it again: batch_result_processor.py:1226."""
    reason = {"type": "abort", "status_code": 400, "message": "Sampling support exceeds --sampling-mask-max-tokens=4."}

    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        await reply.raw(reply.event(0, [], finish_reason=reason))

    with pytest.raises(UserError, match=r"keep_sampling_mask: .* exceeds .*\(rollout\.top_k, engine\.server_args\.") as caught:
        run(handler, requests=CUT)
    assert caught.value.exit_code == 1
    with pytest.raises(EngineLost, match="aborted 0:a#1 by itself"):  # of a request that asked for none
        run(handler)


@pytest.mark.parametrize(
    ("before", "error", "words"), [(0, UserError, "weights 7 are not numbers"), (1, EngineLost, "by itself: The")]
)
def test_no_support_at_the_first_token_is_taken_for_a_diverged_policy(before: int, error: type[Exception], words: str) -> None:
    message = "The sampling backend selected a token outside its captured sampling support."
    reason = {"type": "abort", "status_code": 500, "message": message}

    async def handler(request: web.Request, body: dict[str, Any], reply: Reply) -> None:
        if before:
            await reply.raw(reply.event(0, [1], **masks([1])))
        await reply.raw(reply.event(0, [], finish_reason=reason))

    with pytest.raises(error, match=words):
        run(handler, requests=CUT)


def test_a_server_that_is_not_there_is_an_engine_lost() -> None:
    engine = SglangEngine("engine_0", "127.0.0.1", 1, "secret", vocab_size=64, request_timeout_s=1.0, stall_timeout_s=1.0)

    async def generate() -> None:
        async for _ in engine.generate(REQUESTS):
            pass

    with pytest.raises(EngineLost, match="engine_0"):
        asyncio.run(generate())
    with pytest.raises(EngineLost, match="/generate"):  # the first cause is the one it keeps
        engine.call("/model_info")
    assert not engine.answers()
