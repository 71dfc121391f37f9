"""A rollout as one line of rollouts/step_N.jsonl: text for people, and beside it the numbers it was made of, exactly.

    prompt, response, answer, reward, status, reason, finish_reason     what was asked, said and judged
    tokens, versions                         how many; [weight version, how many of them in a row] from first to last
    pieces                                   the response again, cut where the version changes, if it does
    engine_logprob_mean                      nats
    prompt_ids, response_ids                 token ids: base64 of little-endian int32
    engine_logprobs                          of each response token, nats: base64 of little-endian float32
    support_sizes, support_ids               where top-p and top-k cut and log-probs are within what they left: of how many ids
                                             that was, for the first so many tokens (0: the whole vocabulary), and all those ids

In Python: numpy.frombuffer(base64.b64decode(row["engine_logprobs"]), "<f4").

Invariant (tests/unit/test_observability_tracker.py): ids, versions, log-probs and supports come back, to the last bit.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from statistics import fmean
from typing import Any

import numpy as np

from megatron_rl.types import Group, Rollout, Score

INTS, FLOATS = "<i4", "<f4"


def rollout_row(group: Group, rollout: Rollout, score: Score, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    spans = version_spans(rollout.versions)
    ends = list(accumulate(length for _, length in spans))
    pieces = [decode(rollout.tokens[start:end]) for start, end in pairwise([0, *ends])]
    return {
        "group": group.id,
        "sample": rollout.sample,
        "prompt": group.prompt.text,
        "response": decode(rollout.tokens),
        "answer": group.prompt.answer,
        "reward": score.value,
        "status": score.status,
        "reason": score.reason,
        "tokens": len(rollout.tokens),
        "versions": spans,
        "pieces": pieces if len(pieces) > 1 else [],
        "finish_reason": rollout.finish_reason,
        "engine_logprob_mean": fmean(rollout.engine_logprobs) if rollout.engine_logprobs else None,
        "prompt_ids": packed(group.prompt.tokens, INTS),
        "response_ids": packed(rollout.tokens, INTS),
        "engine_logprobs": packed(rollout.engine_logprobs, FLOATS),
        **(_support_columns(rollout.support) if rollout.support else {}),
    }


def _support_columns(support: Sequence[bytes]) -> dict[str, str]:
    sizes, ids = [len(ids) // 4 for ids in support], base64.b64encode(b"".join(support))
    return {"support_sizes": packed(sizes, INTS), "support_ids": ids.decode()}


def support_of_row(row: Mapping[str, Any]) -> tuple[bytes, ...]:
    """`Rollout.support`. Raises ValueError if it is not that of the row's response."""
    if "support_sizes" not in row:
        return ()
    sizes, ids, response = (np.array(unpacked(row, key, INTS), INTS) for key in ("support_sizes", "support_ids", "response_ids"))
    if len(sizes) > len(response) or (sizes < 0).any() or sizes.sum() != len(ids):
        raise ValueError(f"supports of {len(sizes)} tokens with {sizes.sum()} ids, for {len(response)} tokens and {len(ids)} ids")
    parts = np.split(ids, sizes.cumsum())[:-1]
    for token, part in zip(response, parts, strict=False):
        if len(part) and token not in part:
            raise ValueError(f"token {token} is not in its support")
        if len(set(part.tolist())) < len(part):
            raise ValueError(f"an id is twice in the support of token {token}")
    return tuple(part.tobytes() for part in parts)


def tokens_of_row(row: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    """(prompt ids, response ids, engine log-probs, weight versions), the last three one for each response token. Raises ValueError
    saying what is missing or does not fit together."""
    for key in ("prompt_ids", "response_ids", "engine_logprobs", "versions"):
        if key not in row:
            raise ValueError(f"no {key!r}: a dump without the tokens and log-probs of its rollouts")
    prompt, response = (unpacked(row, key, INTS) for key in ("prompt_ids", "response_ids"))
    logprobs = unpacked(row, "engine_logprobs", FLOATS)
    try:
        versions = tuple(int(version) for version, length in row["versions"] for _ in range(length))
    except (TypeError, ValueError):
        raise ValueError("'versions' is no list of [version, number of tokens]") from None
    if not len(response) == len(logprobs) == len(versions):
        raise ValueError(f"{len(response)} response tokens, {len(logprobs)} engine log-probs and {len(versions)} versions")
    return tuple(map(int, prompt)), tuple(map(int, response)), logprobs, versions


def packed(values: Sequence[float], dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def unpacked(row: Mapping[str, Any], key: str, dtype: str) -> tuple[float, ...]:
    try:
        return tuple(np.frombuffer(base64.b64decode(row[key], validate=True), dtype).tolist())
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise ValueError(f"{key!r} is not base64 of 4-byte numbers") from None


def version_spans(versions: Sequence[int]) -> list[tuple[int, int]]:
    """(weight version, number of tokens), in order."""
    return [(version, len(list(run))) for version, run in groupby(versions)]
