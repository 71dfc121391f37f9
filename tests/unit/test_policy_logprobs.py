"""Log-probs and entropies within supports against a masked log-softmax over the whole vocabulary, in one process. The vocabulary
split over ranks: tests/dist/test_policy_ranks.py, tests/dist/test_layouts.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.policy.logprobs import row_logprobs
from megatron_rl.policy.packed import RowSupport

ROWS, VOCABULARY = 12, 20
PLACES = [
    *(("cpu", torch.float64, 1e-12), ("cpu", torch.float32, 1e-5), ("cpu", torch.bfloat16, 0.05)),
    pytest.param("cuda", torch.float32, 1e-5, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 0.05, marks=pytest.mark.gpu),
]


class Alone:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


ALONE: Any = Alone()


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, RowSupport, torch.Tensor]:
    """Logits, tokens, supports of about every other row with 1 to VOCABULARY ids in any order, and the same as a mask."""
    random = torch.Generator().manual_seed(0)
    logits_RV = (5 * torch.randn(ROWS, VOCABULARY, generator=random, dtype=torch.float64)).to(dtype)
    tokens_R = torch.randint(VOCABULARY, (ROWS,), generator=random)
    left_RV = torch.ones(ROWS, VOCABULARY, dtype=torch.bool)
    rows, ids = [], []
    for row, size in zip((1, 2, 4, 6, 7, 11), (1, 2, 5, 11, VOCABULARY, 3), strict=True):
        others = torch.randperm(VOCABULARY, generator=random)
        mine = torch.cat([others[others != tokens_R[row]][: size - 1], tokens_R[row : row + 1]])
        left_RV[row] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, mine, True)
        rows.append(torch.full((size,), row))
        ids.append(mine)
    return logits_RV, tokens_R, RowSupport(torch.cat(ids), torch.cat(rows)), left_RV


def expected(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, left_RV: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p_RV = (logits_RV.double() / temperature).masked_fill(~left_RV, -torch.inf).log_softmax(-1)
    entropy_R = -(log_p_RV.exp() * log_p_RV.masked_fill(~left_RV, 0.0)).sum(-1)
    return log_p_RV.gather(1, tokens_R[:, None])[:, 0], entropy_R


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
def test_values_and_gradients_are_those_of_the_softmax_over_the_support(
    device: str, dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    logits_RV, tokens_R, support, left_RV = case(dtype)
    ours, dense = (logits_RV.clone().requires_grad_() for _ in range(2))
    there = RowSupport(support.ids_K.to(device), support.rows_K.to(device))
    found_there = row_logprobs(ours.to(device), tokens_R.to(device), temperature, ALONE, VOCABULARY, there)
    found = tuple(value.cpu() for value in found_there)
    wanted = expected(dense, tokens_R, left_RV, temperature)
    upstream = [torch.randn(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    torch.autograd.backward(found, [grad_R.to(value.dtype) for grad_R, value in zip(upstream, found, strict=True)])
    torch.autograd.backward(wanted, upstream)
    values = 1e-5 if dtype == torch.bfloat16 else tolerance  # computed in fp32 whatever the logits are; their gradient is theirs
    for value, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), want, atol=values, rtol=0)
    assert ours.grad is not None and dense.grad is not None and ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad.double(), dense.grad.double(), atol=tolerance, rtol=0)
    assert not ours.grad[~left_RV].any(), "what was cut away is pushed nowhere"
    assert found[0][1] == found[1][1] == 0.0, "a support of one"


def test_gradients_by_finite_differences() -> None:
    logits_RV, tokens_R, support, _ = case()
    torch.autograd.gradcheck(
        lambda x: row_logprobs(x, tokens_R, 0.8, ALONE, VOCABULARY, support), logits_RV.requires_grad_(), atol=1e-6
    )


def test_rows_without_a_support_are_untouched_by_those_with_one() -> None:
    logits_RV, tokens_R, support, _ = case(torch.float32)
    without = torch.ones(ROWS, dtype=torch.bool).index_fill(0, support.rows_K, False)
    for cut, whole in zip(
        row_logprobs(logits_RV, tokens_R, 0.7, ALONE, VOCABULARY, support),
        row_logprobs(logits_RV, tokens_R, 0.7, ALONE, VOCABULARY),
        strict=True,
    ):
        assert cut[without].equal(whole[without]) and not cut[~without].equal(whole[~without])


def test_supports_of_no_row_here_change_nothing() -> None:
    """A CP rank that predicts no token with a support."""
    logits_RV, tokens_R, _, _ = case(torch.float32)
    nothing = RowSupport(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    for cut, whole in zip(
        row_logprobs(logits_RV, tokens_R, 0.7, ALONE, VOCABULARY, nothing),
        row_logprobs(logits_RV, tokens_R, 0.7, ALONE, VOCABULARY),
        strict=True,
    ):
        assert cut.equal(whole)


class Sizes(TorchDispatchMode):
    """The tensors of a size that operations make; they are kept, so that no two share an address."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made = numel, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [each for each in (out if isinstance(out, (tuple, list)) else [out]) if _is_tensor(each, self.numel)]
        return out

    @property
    def count(self) -> int:
        return len({tensor.data_ptr() for tensor in self.made})


def _is_tensor(value: Any, numel: int) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == numel


def test_supports_take_memory_by_their_ids_not_by_the_vocabulary() -> None:
    logits_RV, tokens_R, support, _ = case(torch.float32)
    made = []
    for each in (None, support):
        x_RV = logits_RV.clone().requires_grad_()
        with Sizes(logits_RV.numel()) as sizes:
            logprobs_R, entropy_R = row_logprobs(x_RV, tokens_R, 0.7, ALONE, VOCABULARY, each)
            (logprobs_R + entropy_R).sum().backward()
        made.append(sizes.count)
    assert made[1] <= made[0] + 1, "the view of the logits"
