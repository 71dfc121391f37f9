"""Losses: hand-computed values, finite differences, packing invariance, broken log-probs."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.algorithms.correction import Correction, CorrectionKind
from megatron_rl.algorithms.loss import TokenLoss, policy_loss, sft_loss, summarise
from megatron_rl.algorithms.surrogates import Surrogate, SurrogateKind

LOG = math.log
CLIPS = Surrogate("ppo", clip_low=0.2, clip_high=0.3)
FULL = policy_loss(surrogate=CLIPS, kl_weight=0.1, entropy_weight=0.01)
NONE = Correction("none")
KINDS: list[SurrogateKind] = ["ppo", "gspo", "cispo", "gmpo", "reinforce"]
CORRECTIONS: list[CorrectionKind] = ["icepop", "tis", "clip", "kpop", "none"]
ALL_MASKS = Correction("icepop", sequence_band=(0.3, 3.0), off_policy_delta=0.05)


def packed(lengths: list[int], mask: list[float], **fields: list[float] | torch.Tensor) -> PackedBatch:
    values = {"age": torch.zeros(len(mask))} | {name: torch.as_tensor(value) for name, value in fields.items()}
    return PackedBatch(
        tokens_T=torch.zeros(len(mask), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        loss_mask_T=torch.tensor(mask),
        fields=values,
    )


def hand_batch() -> tuple[torch.Tensor, torch.Tensor, PackedBatch]:
    """Six tokens, the first a prompt's, with garbage in its fields. Ratios r = new / old and k = old / engine:

    token       1     2     3     4     5
    engine    0.25  0.5   0.1   0.5   0.5
    old       0.5   0.2   0.1   0.5   0.25
    k         2     0.4   1     1     0.5     -> M = 2, 0, 1, 1, 0.5
    new       0.75  0.4   0.2   0.25  0.25
    r         1.5   2     2     0.5   1
    A         1     1    -2    -2     4
    """
    engine, old, new = [0.25, 0.5, 0.1, 0.5, 0.5], [0.5, 0.2, 0.1, 0.5, 0.25], [0.75, 0.4, 0.2, 0.25, 0.25]
    batch = packed(
        [6],
        [0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        engine_logprobs=[math.nan, *map(LOG, engine)],
        old_logprobs=[math.inf, *map(LOG, old)],
        ref_logprobs=[math.nan, *map(LOG, new[:-1]), LOG(0.5)],  # equal to new, but 2 x new at the last token
        advantages=[math.nan, 1.0, 1.0, -2.0, -2.0, 4.0],
        weight=[math.nan, 0.1, 0.1, 0.1, 0.2, 0.2],
        age=[math.nan, 0.0, 0.0, 0.0, 0.0, 2.0],
    )
    new_T = torch.tensor([math.nan, *map(LOG, new)], requires_grad=True)
    entropy_T = torch.tensor([math.nan, 1.0, 2.0, 0.0, 0.0, 1.0], requires_grad=True)
    return new_T, entropy_T, batch


def test_policy_loss_by_hand() -> None:
    new_T, entropy_T, batch = hand_batch()
    output = FULL(new_T, entropy_T, batch)
    # min(r A, clip(r, 0.8, 1.3) A): 1: min(1.5, 1.3) = 1.3; 3: min(-4, -2.6) = -4; 4: min(-1, -1.6) = -1.6; 5: 4.
    # weight x M x that: 0.1 x 2 x 1.3 = 0.26; 0; 0.1 x -4 = -0.4; 0.2 x -1.6 = -0.32; 0.2 x 0.5 x 4 = 0.4. Sum -0.06.
    policy = 0.06
    # k3 at the last token: ref / new = 2, 2 - log 2 - 1 = 0.306853; x weight 0.2 x coefficient 0.1.
    kl = 0.1 * 0.2 * (1 - LOG(2))
    # Entropy: 0.1 x 1 + 0.1 x 2 + 0.2 x 1 = 0.5, x 0.01.
    entropy = -0.005
    expected = {
        "loss/policy": policy,
        "loss/kl": kl,
        "loss/entropy": entropy,
        "tokens": 5.0,
        "mismatch/masked": 1.0,
        "mismatch/masked_low": 1.0,  # k = 0.4
        "mismatch/masked_high": 0.0,
        "mismatch/nonfinite": 0.0,
        "mismatch/k_sum": 2 + 0.4 + 1 + 1 + 0.5,
        "mismatch/k_square_sum": 4 + 0.16 + 1 + 1 + 0.25,
        "mismatch/k1_sum": -LOG(2 * 0.4 * 0.5),
        "mismatch/k3_sum": 4.9 - 5 - LOG(2 * 0.4 * 0.5),
        "policy/clipped": 2.0,  # tokens 1 and 4; 2 would be, but is masked; at 3 the minimum is the unclipped one
        "policy/entropy_sum": 4.0,
        # r - 1 - log r: 0.5 - log 1.5, twice 1 - log 2, -0.5 - log 0.5, 0
        "policy/kl_old_new_sum": 0.5 - LOG(1.5) + 2 * (1 - LOG(2)) - 0.5 - LOG(0.5),
        "policy/old_logprob_sum": LOG(0.5 * 0.2 * 0.1 * 0.5 * 0.25),
    }
    assert {name: value.item() for name, value in output.sums.items()} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert output.maxima["mismatch/logprob_gap_max"].item() == pytest.approx(LOG(2.5))
    assert output.maxima["mismatch/stale_gap_max"].item() == pytest.approx(LOG(2))
    assert output.loss.item() == pytest.approx(policy + kl + entropy, rel=1e-5)

    output.loss.backward()
    # d(r A)/d new = r A where unclipped. Token 3: -0.1 x -4; 5: -0.2 x 0.5 x 4 and KL 0.1 x 0.2 x (1 - ref / new) = -0.02.
    torch.testing.assert_close(new_T.grad, torch.tensor([0.0, 0.0, 0.0, 0.4, 0.0, -0.42]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropy_T.grad, torch.tensor([0.0, -0.001, -0.001, -0.001, -0.002, -0.002]))


def test_what_is_not_asked_for_is_not_in_the_loss() -> None:
    new_T, entropy_T, batch = hand_batch()
    del batch.fields["ref_logprobs"]
    output = policy_loss(surrogate=CLIPS)(new_T, entropy_T, batch)
    assert [name for name in output.sums if name.startswith("loss/")] == ["loss/policy"]
    assert output.loss.item() == pytest.approx(0.06, rel=1e-5)
    output.loss.backward()
    assert entropy_T.grad is None or not entropy_T.grad.any()
    # Without the correction token 2 counts: 1.3 at weight 0.1; the others at 1 instead of M: 0.13 + 0.13 - 0.4 - 0.32 + 0.8.
    plain = policy_loss(correction=NONE, surrogate=CLIPS)(new_T, entropy_T, batch)
    assert plain.loss.item() == pytest.approx(-0.34, rel=1e-6)
    assert plain.sums["mismatch/masked"].item() == 0


def test_reused_old_logprobs_are_the_new_ones_detached() -> None:
    new_T, entropy_T, batch = hand_batch()
    del batch.fields["old_logprobs"], batch.fields["ref_logprobs"]
    output = policy_loss(old_logprobs="reuse")(new_T, entropy_T, batch)
    # k = new / engine = 3, 0.8, 2, 0.5, 0.5; r = 1: 0.1 x 3 x 1, 0.1 x 0.8, 0.1 x 2 x -2, 0.2 x 0.5 x -2, 0.2 x 0.5 x 4.
    terms = [0.3, 0.08, -0.4, -0.2, 0.4]
    assert output.loss.item() == pytest.approx(-sum(terms), rel=1e-5)
    output.loss.backward()
    torch.testing.assert_close(new_T.grad, torch.tensor([0.0, *(-term for term in terms)]), atol=1e-6, rtol=1e-5)
    assert output.sums["policy/clipped"].item() == 0 and output.sums["policy/kl_old_new_sum"].item() == 0


def test_summarise() -> None:
    new_T, entropy_T, batch = hand_batch()
    output = FULL(new_T, entropy_T, batch)
    totals = {name: value.tolist() for name, value in (output.sums | output.maxima | output.tables).items()}
    metrics = summarise(totals | {"policy/grad_norm": 3.0})
    assert metrics["mismatch/masked_fraction"] == pytest.approx(1 / 5)
    assert metrics["mismatch/logprob_gap_mean"] == pytest.approx((LOG(2) + LOG(2.5)) / 4)
    assert metrics["mismatch/stale_gap_mean"] == pytest.approx(LOG(2))
    assert metrics["mismatch/logprob_gap_max"] == pytest.approx(LOG(2.5))
    assert metrics["policy/clip_fraction"] == pytest.approx(2 / 5)
    assert metrics["policy/entropy"] == pytest.approx(4 / 5)
    assert metrics["loss/total"] == pytest.approx(output.loss.item())
    assert metrics["policy/grad_norm"] == 3.0 and metrics["policy/tokens"] == 5.0
    assert {"policy/kl_old_new", "policy/old_logprob", "loss/policy", "loss/kl", "loss/entropy"} <= set(metrics)
    assert not any(name.endswith("_sum") for name in metrics)
    with pytest.raises(ValueError, match="no token"):
        summarise({"tokens": 0.0})


def random_case(lengths: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, PackedBatch]:
    draw, total = torch.Generator().manual_seed(7), sum(lengths)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(total, generator=draw, dtype=torch.float64)

    old_T = -normal(1.0).abs() - 0.1
    fields = {
        "old_logprobs": old_T,
        "engine_logprobs": old_T + normal(0.6),
        "ref_logprobs": old_T + normal(0.3),
        "advantages": normal(1.0),
        "weight": normal(1.0).abs() / total,
    }
    new_T, entropy_T, mask_T = old_T + normal(0.3), normal(1.0).abs(), (normal(1.0) > -1).double()
    batch = packed(lengths, mask_T.tolist(), **{name: value.to(dtype) for name, value in fields.items()})
    return new_T.to(dtype).requires_grad_(), entropy_T.to(dtype).requires_grad_(), batch


def test_gradients_against_finite_differences() -> None:
    new_T, entropy_T, batch = random_case([40], torch.float64)
    sums = FULL(new_T, entropy_T, batch).sums
    assert sums["mismatch/masked"] > 0 and sums["policy/clipped"] > 0  # all branches are there
    assert gradcheck(lambda new, entropy: FULL(new, entropy, batch).loss, (new_T, entropy_T), eps=1e-7, atol=1e-7)
    assert gradcheck(lambda new: sft_loss(new, entropy_T.detach(), batch).loss, (new_T,), eps=1e-7, atol=1e-7)


def share(batch: PackedBatch, chosen: list[int], lengths: list[int]) -> tuple[torch.Tensor, PackedBatch]:
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    at_T = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in chosen])
    fields = {name: value[at_T] for name, value in batch.fields.items()}
    return at_T, packed([lengths[i] for i in chosen], batch.loss_mask_T[at_T].tolist(), **fields)


LOSSES = {
    "full": FULL,
    "reuse": policy_loss(old_logprobs="reuse"),
    "sft": sft_loss,
    "all masks": policy_loss(correction=ALL_MASKS, kl_weight=0.1, kl_estimator="unbiased"),
} | {kind: policy_loss(correction=ALL_MASKS, surrogate=Surrogate(kind, 0.1, 0.1)) for kind in KINDS}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_packing_and_splitting_change_nothing(loss: TokenLoss) -> None:
    lengths = [5, 17, 1, 30, 8, 12]
    new_T, entropy_T, batch = random_case(lengths, torch.float32)
    whole = loss(new_T, entropy_T, batch)
    (whole_grad_T,) = torch.autograd.grad(whole.loss, new_T)
    for split in ([[0, 1, 2, 3, 4, 5]], [[3], [5, 0], [4, 2, 1]], [[i] for i in range(6)]):
        outputs: list[LossOutput] = []
        grad_T = torch.zeros_like(new_T)
        for chosen in split:
            at_T, part = share(batch, chosen, lengths)
            outputs.append(loss(new_T[at_T], entropy_T[at_T], part))
            grad_T += torch.autograd.grad(outputs[-1].loss, new_T)[0]
        assert sum(output.loss.item() for output in outputs) == pytest.approx(whole.loss.item(), abs=1e-6)
        torch.testing.assert_close(grad_T, whole_grad_T, atol=1e-6, rtol=0)
        for name, value in whole.sums.items():
            assert sum(output.sums[name].item() for output in outputs) == pytest.approx(value.item(), rel=1e-6, abs=1e-5), name
        for name, value in whole.maxima.items():
            assert max(output.maxima[name].item() for output in outputs) == value.item(), name


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_padding_changes_nothing(loss: TokenLoss) -> None:
    """Masked tokens at the end of a sequence, and a sequence of nothing else, full of garbage."""
    lengths, padding = [5, 17, 8], 3
    new_T, entropy_T, batch = random_case(lengths, torch.float32)
    whole = loss(new_T, entropy_T, batch)
    gradient_T = torch.autograd.grad(whole.loss, new_T)[0]
    keep_T = torch.cat([torch.cat([torch.arange(n) < n, torch.zeros(padding, dtype=torch.bool)]) for n in (*lengths, 0)])

    def padded(values_T: torch.Tensor, garbage: float = math.nan) -> torch.Tensor:
        return torch.full((len(keep_T),), garbage).masked_scatter(keep_T, values_T)

    fields = {name: padded(value_T) for name, value_T in batch.fields.items()}
    longer = packed([n + padding for n in (*lengths, 0)], padded(batch.loss_mask_T, 0.0).tolist(), **fields)
    padded_T = padded(new_T.detach()).requires_grad_()
    output = loss(padded_T, padded(entropy_T.detach()), longer)
    assert output.loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(output.loss, padded_T)[0][keep_T], gradient_T, atol=1e-6, rtol=0)
    assert {n: v.item() for n, v in output.sums.items()} == pytest.approx({n: v.item() for n, v in whole.sums.items()}, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["engine_logprobs", "old_logprobs"])
@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
def test_broken_logprobs_weigh_nothing_and_leave_gradients_finite(
    kind: SurrogateKind, correction: CorrectionKind, name: str, bad: float
) -> None:
    new_T, entropy_T, batch = random_case([10, 7], torch.float32)
    batch.loss_mask_T.fill_(1.0)
    batch.fields[name][3] = bad
    batch.fields["advantages"].abs_()  # else the clip may take the token's gradient, whatever its weight
    for band, delta in ((None, None), ((0.2, 5.0), 0.01)):
        settings = Correction(correction, phi=0.5, sequence_band=band, off_policy_delta=delta)
        output = policy_loss(correction=settings, surrogate=Surrogate(kind))(new_T, entropy_T, batch)
        (grad_T,) = torch.autograd.grad(output.loss, new_T)
        assert output.loss.isfinite() and grad_T.isfinite().all()
        assert grad_T[3] == 0 or (correction == "none" and name == "engine_logprobs" and not band)  # there nothing reads it
        assert output.sums["mismatch/nonfinite"].item() == 1
        assert all(value.isfinite() for value in (output.sums | output.maxima).values())
        if band:
            assert not grad_T[:10].any()  # the sequence's geometric mean is undefined, too
        assert grad_T[10:].any()


@pytest.mark.parametrize("old_logprobs", ["reuse", "recompute"])
def test_an_impossible_token_and_a_huge_ratio_leave_gradients_finite(old_logprobs: str) -> None:
    loss = policy_loss(correction=NONE, old_logprobs=old_logprobs, kl_weight=0.1)  # type: ignore[arg-type]
    batch = packed(
        [3],
        [1.0, 1.0, 1.0],
        engine_logprobs=[-1.0, -1.0, -1.0],
        old_logprobs=[-1.0, -500.0, -500.0],
        ref_logprobs=[-1.0, -1.0, -1.0],
        advantages=[1.0, 1.0, -1.0],
        weight=[1.0, 1.0, 1.0],
    )
    new_T = torch.tensor([-math.inf, -1.0, -1.0], requires_grad=True)
    output = loss(new_T, torch.zeros(3), batch)
    output.loss.backward()
    assert output.loss.isfinite() and new_T.grad is not None and new_T.grad.isfinite().all()


def test_masked_tokens_stay_in_the_divisor() -> None:
    # Four tokens of weight 1/4; masking one must not raise the weight of the rest.
    fields = {"advantages": [1.0] * 4, "weight": [0.25] * 4, "old_logprobs": [0.0] * 4}
    batch = packed([4], [1.0] * 4, engine_logprobs=[0.0, 0.0, 0.0, -9.0], **fields)
    new_T = torch.zeros(4, requires_grad=True)
    policy_loss()(new_T, torch.zeros(4), batch).loss.backward()
    torch.testing.assert_close(new_T.grad, torch.tensor([-0.25, -0.25, -0.25, 0.0]))


def test_sft_loss_by_hand() -> None:
    batch = packed([4], [0.0, 1.0, 1.0, 1.0], weight=[math.nan, 0.5, 0.25, 0.25])
    output = sft_loss(torch.tensor([math.nan, -1.0, -2.0, -4.0]), torch.tensor([math.nan, 1.0, 0.5, 0.0]), batch)
    assert output.loss.item() == output.sums["loss/sft"].item() == 2.0  # 0.5 x 1 + 0.25 x 2 + 0.25 x 4
    metrics = summarise({name: value.item() for name, value in output.sums.items()})
    assert metrics == {"loss/sft": 2.0, "sft/nll": 7 / 3, "policy/entropy": 0.5, "policy/tokens": 3.0, "loss/total": 2.0}


def test_a_filler_segment_adds_nothing() -> None:
    fields = {name: torch.zeros(1) for name in ("advantages", "engine_logprobs", "old_logprobs", "ref_logprobs", "weight")}
    new_T = torch.tensor([-1.0], requires_grad=True)
    output = FULL(new_T, torch.ones(1), packed([1], [0.0], **fields))
    output.loss.backward()
    assert output.loss.item() == 0.0 and new_T.grad is not None and new_T.grad.item() == 0.0
    assert not any(value.item() for value in (output.sums | output.maxima).values())


def test_the_off_policy_mask_takes_policy_gradients_only() -> None:
    # Two sequences left behind by log 2 > 0.5; the one with A < 0 has no policy gradient, but its KL and its place in the divisor.
    fields = {"advantages": [-1.0, -1.0, 1.0, 1.0], "weight": [0.25] * 4, "old_logprobs": [LOG(0.5)] * 4}
    batch = packed([2, 2], [1.0] * 4, engine_logprobs=[LOG(0.5)] * 4, ref_logprobs=[LOG(0.5)] * 4, **fields)
    new_T = torch.full((4,), LOG(0.25), requires_grad=True)
    output = policy_loss(correction=Correction(off_policy_delta=0.5), kl_weight=0.1)(new_T, torch.zeros(4), batch)
    # k3' = 1 - ref / new = -1: 0.1 x 0.25 x -1; the policy term of the others: -0.25 x r A = -0.125.
    assert output.sums["policy/off_policy_masked"].item() == 2 and output.sums["mismatch/masked"].item() == 0
    torch.testing.assert_close(torch.autograd.grad(output.loss, new_T)[0], torch.tensor([-0.025, -0.025, -0.15, -0.15]))


def test_masked_tokens_are_counted_by_the_side_of_their_k() -> None:
    old = [LOG(k) for k in (0.4, 0.8, 6.0)] + [math.nan]
    batch = packed([4], [1.0] * 4, engine_logprobs=[0.0] * 4, old_logprobs=old, advantages=[1.0] * 4, weight=[0.25] * 4)
    sums = policy_loss()(torch.tensor([*old[:3], -1.0]), torch.zeros(4), batch).sums
    assert [sums[f"mismatch/masked{side}"].item() for side in ("", "_low", "_high")] == [3.0, 1.0, 1.0]


def test_a_part_without_tokens_adds_nothing() -> None:
    """Of a short sequence a CP rank may hold no token."""
    fields = {name: torch.zeros(0) for name in ("advantages", "engine_logprobs", "old_logprobs", "ref_logprobs", "weight")}
    output = FULL(torch.zeros(0, requires_grad=True), torch.zeros(0), packed([0], [], **fields))
    output.loss.backward()
    assert not any(value.item() for value in (output.sums | output.maxima).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_nothing_waits_for_the_device(kind: SurrogateKind, correction: CorrectionKind) -> None:
    """Tensors on the meta device have no values: reading one, or a shape that depends on one, raises."""
    names = ("advantages", "engine_logprobs", "old_logprobs", "ref_logprobs", "weight", "age")
    batch = PackedBatch(
        tokens_T=torch.zeros(9, dtype=torch.int64, device="meta"),
        cu_seqlens=torch.zeros(4, dtype=torch.int32, device="meta"),
        loss_mask_T=torch.ones(9, device="meta"),
        fields={name: torch.zeros(9, device="meta") for name in names},
    )
    settings = Correction(correction, phi=0.5, sequence_band=(0.3, 3.0), off_policy_delta=0.05)
    loss = policy_loss(correction=settings, surrogate=Surrogate(kind), kl_weight=0.1, entropy_weight=0.01)
    loss(torch.zeros(9, device="meta", requires_grad=True), torch.zeros(9, device="meta"), batch).loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        bool(batch.loss_mask_T.sum() > 0)


def test_algorithms_need_torch_alone() -> None:
    program = (
        "import sys, pkgutil, importlib\n"
        "for name in ('megatron', 'sglang', 'transformers', 'pydantic', 'hydra', 'omegaconf', 'transformer_engine', 'triton'):\n"
        "    sys.modules[name] = None\n"  # an import of it raises ImportError
        "import megatron_rl.algorithms as room\n"
        "for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'): importlib.import_module(module.name)\n"
        "assert 'megatron_rl.algorithms.loss' in sys.modules\n"
        "others = {name.split('.')[1] for name in sys.modules if name.startswith('megatron_rl.')} - {'algorithms'}\n"
        "assert not others, others"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
