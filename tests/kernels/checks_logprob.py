"""The Triton kernel against float64. Run by test_logprob.py: on CPU tensors under TRITON_INTERPRET=1, or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from megatron_rl_kernels.logprob import reference, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# dtype of the logits: (of log-probs and entropies, of gradients). Values are computed in fp32 whatever the logits are; gradients
# are rounded to the logits' type (the interpreter truncates where a GPU rounds to nearest). A gradient's tolerance counts from the
# size of the terms it is made of, [i = y] and p_i (1 + |log p_i| + H), since these may cancel.
TOLERANCES = {
    torch.float32: (3e-6, 1e-5),
    torch.bfloat16: (3e-6, 2**-7 if INTERPRETED else 2**-8),
    torch.float16: (3e-6, 2**-10 if INTERPRETED else 2**-11),
}
SMALLEST = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 2**-23}  # below this a gradient may vanish
SHAPES = [(1, 1), (2, 3), (3, 64), (5, 1000), (2, 4096), (3, 4097), (2, 10_007)]


def check(
    logits_TV: torch.Tensor, tokens_T: torch.Tensor, temperature: float = 1.0, weights: tuple[float, float] = (1.0, 0.5)
) -> None:
    """Values, and the gradient of a weighted sum of log-probs and entropies (weight 0: that output is not used at all)."""
    rows = torch.linspace(-1.0, 1.5, len(tokens_T), dtype=torch.float64, device=DEVICE)

    def run(function, logits_TV):
        logits_TV = logits_TV.detach().requires_grad_()
        outputs = function(logits_TV, tokens_T, temperature)
        total = sum((weight * (output * rows).sum() for weight, output in zip(weights, outputs, strict=True) if weight), start=0.0)
        (gradient_TV,) = torch.autograd.grad(total, logits_TV)
        return *(output.detach() for output in outputs), gradient_TV

    *expected, expected_TV = run(reference.token_logprobs, logits_TV.double())
    *actual, actual_TV = run(triton.token_logprobs, logits_TV)
    values, gradients = TOLERANCES[logits_TV.dtype]
    for name, a, e in zip(("logprobs", "entropy"), actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, atol=values, rtol=values, msg=lambda m, name=name: f"{name}: {m}")
    assert actual_TV.dtype == logits_TV.dtype
    logp_TV = torch.log_softmax(logits_TV.double() / temperature, dim=-1)
    terms_TV = logp_TV.exp() * (1 - logp_TV.clamp_min(-1e3) + expected[1][:, None])
    terms_TV[torch.arange(len(tokens_T)), tokens_T] += 1.0
    error_TV = (actual_TV.double() - expected_TV).abs() / rows.abs()[:, None] * temperature
    worst = (error_TV - gradients * terms_TV - SMALLEST[logits_TV.dtype]).argmax()
    assert (error_TV <= gradients * terms_TV + SMALLEST[logits_TV.dtype]).all(), (
        f"gradient at {divmod(int(worst), logits_TV.shape[1])}: {actual_TV.flatten()[worst]} for {expected_TV.flatten()[worst]}"
    )


def case(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 4.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)
    return logits_TV.to(DEVICE), torch.randint(vocab, (rows,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(*case(*shape, dtype))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.7])
def test_temperature(temperature: float) -> None:
    check(*case(3, 500), temperature)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["logprobs", "entropy"])
def test_gradient_of_one_output_alone(weights: tuple[float, float]) -> None:
    check(*case(3, 5000), weights=weights)


def test_the_first_and_last_token_of_a_large_vocabulary() -> None:
    logits_TV, tokens_T = case(2, 157_184, torch.bfloat16)
    tokens_T[0], tokens_T[1] = 0, 157_183
    check(logits_TV, tokens_T, 0.8)


def test_masked_logits_have_probability_and_gradient_zero() -> None:
    logits_TV, tokens_T = case(4, 9000)
    logits_TV[0, 10:] = -torch.inf  # all later blocks
    logits_TV[1, :8999] = -torch.inf  # all earlier blocks; one token is certain
    logits_TV[2, ::2] = -torch.inf
    tokens_T[:] = torch.tensor([5, 8999, 1, 2])
    check(logits_TV, tokens_T)


def test_a_masked_token_has_logprob_minus_infinity() -> None:
    logits_TV, tokens_T = case(1, 100)
    logits_TV[0, tokens_T[0]] = -torch.inf
    logprobs_T, entropy_T = triton.token_logprobs(logits_TV, tokens_T, 1.0)
    assert logprobs_T.item() == -torch.inf
    torch.testing.assert_close(
        entropy_T.double(), reference.token_logprobs(logits_TV.double(), tokens_T, 1.0)[1], atol=3e-6, rtol=0.0
    )


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_cancels_exactly(offset: float) -> None:
    logits_TV, tokens_T = case(3, 6000)
    check((logits_TV * 8).round() / 8 + offset, tokens_T)  # eighths: exact in fp32 at this offset


def test_a_growing_maximum_rescales_every_block() -> None:
    logits_TV = torch.linspace(-50.0, 50.0, 13_000, device=DEVICE).expand(2, -1).contiguous()
    check(torch.stack([logits_TV[0], logits_TV[0].flip(0)]), torch.tensor([12_999, 12_999], device=DEVICE))


def test_a_token_outside_the_vocabulary_is_nan_not_other_memory() -> None:
    logits_TV, _ = case(3, 50)
    logprobs_T, _ = triton.token_logprobs(logits_TV[:2], torch.tensor([50, -1], device=DEVICE), 1.0)
    assert logprobs_T.isnan().all()


def test_rows_of_a_wider_matrix() -> None:
    logits_TV, tokens_T = case(3, 700)
    check(logits_TV[:, :600], tokens_T % 600)
    with pytest.raises(ValueError, match="contiguous"):
        triton.token_logprobs(logits_TV[:, ::2], tokens_T, 1.0)


def test_rows_beyond_two_to_the_31_elements() -> None:
    stride = 2**30
    memory = torch.empty(2 * stride + 100, dtype=torch.float16, device=DEVICE)  # 4 GiB, of which a few pages are touched
    logits_TV = memory.as_strided((3, 100), (stride, 1))
    values_TV, tokens_T = case(3, 100, torch.float16)
    logits_TV.copy_(values_TV)
    logprobs_T, _ = triton.token_logprobs(logits_TV, tokens_T, 1.0)
    torch.testing.assert_close(
        logprobs_T.double(), reference.token_logprobs(values_TV.double(), tokens_T, 1.0)[0], atol=3e-6, rtol=0.0
    )
