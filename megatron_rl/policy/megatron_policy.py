"""The policy under training: Megatron-Core's model, schedules and optimizer behind `ports.Policy`.

Invariants:
- gradients of `LossOutput.loss` are summed over microbatches, CP ranks and replicas, and divided by nothing;
- the result of a step does not depend on the layout, nor on how sequences are packed into microbatches;
- metrics and the log-probs of a replica's tokens are the same on all its ranks;
- log-probs (old, new, reference) and entropies of a token with a support are those of the softmax over it (logprobs.py);
- the forward passes of an update take the experts that were recorded for a token, if `replay` says so (replay.py);
- a gradient that is not finite changes no weight: the step is skipped, and `policy/skipped` says so;
- reference log-probs are those of the weights the policy was built with, whatever was trained or restored since.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.algorithms.batch import LossOutput, PackedBatch
from megatron_rl.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rl.policy.logprobs import row_logprobs
from megatron_rl.policy.model import build_chunks, dtype_of, has_transformer_engine, initialise, weights
from megatron_rl.policy.optimizer import build_optimizer, loss_scale_of, update, wrap
from megatron_rl.policy.packed import RankInputs, rank_inputs
from megatron_rl.policy.ranks import MegatronRanks
from megatron_rl.policy.replay import ForwardPass, ReplayKind, RoutingReplay
from megatron_rl.policy.router_terms import RouterTerms
from megatron_rl.policy.schedule import lr_at
from megatron_rl.ports import Occupied, TokenLoss

Load = Callable[[Sequence[torch.nn.Module]], None]
"""Fills the live weights of this rank's chunks of the model."""
LastStage = Callable[[RankInputs, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]
"""(inputs, logprobs_N, entropy_N) -> (what to differentiate, what to keep)"""


@dataclass(frozen=True)
class Prepared:
    """A microbatch in the form that this rank computes on."""

    inputs: RankInputs
    packed_seq_params: Any
    experts_LRK: torch.Tensor | None  # recorded for the rows of this rank's sequence-parallel share, in all MoE layers


class MegatronPolicy:
    """`ports.Policy`. Without `load` (an import, say) the weights are random, from `seed`."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        seed: int,
        ranks: MegatronRanks,
        load: Load | None = None,
        with_reference: bool = False,
        replay: ReplayKind = "off",
        router_z_loss: float = 0.0,
        load_balance: float = 0.0,
    ) -> None:
        from megatron.core import parallel_state as mpu
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.device, self.dtype = ranks.device, dtype_of(model, ranks.device)
        self._occupied: Occupied = "all"
        self.vocab_size = model.vocab_size
        self.updates = 0  # optimizer steps taken; the learning rate follows from it
        self._model, self._parallel, self._optimizer_config, self._total_steps = model, parallel, optimizer, total_steps
        bare = build_chunks(model, parallel, ranks.device)
        if load:
            load(bare)
        else:
            initialise(bare, model, seed)
        self.chunks = wrap(bare, parallel)
        self.optimizer = build_optimizer(self.chunks, optimizer, parallel, self.dtype)
        self._reference = {name: tensor.to("cpu", copy=True) for name, tensor in self.weights().items()} if with_reference else None
        self._tp, self._cp, self._pp = (
            mpu.get_tensor_model_parallel_group(),
            mpu.get_context_parallel_group(),
            mpu.get_pipeline_model_parallel_group(),
        )
        self._replicas = mpu.get_data_parallel_group(with_context_parallel=True)
        self._run_schedule = get_forward_backward_func()
        self._routing: RoutingReplay | None = None
        self._router_terms: RouterTerms | None = None
        if model.moe:
            layers, dense = model.num_layers, model.moe.first_dense_layers
            self._routing = RoutingReplay(self.chunks, replay, layers - dense, dense, parallel.recompute in ("mlp", "full"))
            if router_z_loss or load_balance:
                self._router_terms = RouterTerms(self.chunks, router_z_loss, load_balance, layers - dense)

    def weights(self) -> Mapping[str, torch.Tensor]:
        return weights(self.chunks)

    def logprobs(self, microbatches: Sequence[PackedBatch], temperature: float) -> list[torch.Tensor]:
        return self._logprobs(microbatches, temperature, "old")

    def reference_logprobs(self, microbatches: Sequence[PackedBatch], temperature: float) -> list[torch.Tensor]:
        with self._reference_weights():
            return self._logprobs(microbatches, temperature, "free")

    @torch.no_grad()
    def _logprobs(self, microbatches: Sequence[PackedBatch], temperature: float, forward_pass: ForwardPass) -> list[torch.Tensor]:
        def keep(inputs: RankInputs, logprobs_N: torch.Tensor, entropy_N: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return logprobs_N.sum(), (inputs.tokens_N, logprobs_N)

        lengths = [len(batch.tokens_T) for batch in microbatches]
        kept = self._forward_backward(microbatches, temperature, keep, forward_pass, forward_only=True)
        all_tokens = torch.zeros(sum(lengths), device=self.device)
        logprobs = list(all_tokens.split(lengths))
        for logprobs_T, (tokens_N, logprobs_N) in zip(logprobs, kept, strict=False):  # kept: empty but on the last stage
            logprobs_T[tokens_N] = logprobs_N
        if kept and self._cp.size() > 1:
            dist.all_reduce(all_tokens, group=self._cp)
        if self._pp.size() > 1:
            dist.broadcast(all_tokens, group_src=self._pp.size() - 1, group=self._pp)
        return logprobs

    def train_step(self, microbatches: Sequence[PackedBatch], loss: TokenLoss, temperature: float) -> dict[str, Any]:
        from megatron.core.distributed import finalize_model_grads

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._forward_backward(microbatches, temperature, _output_of(loss), "new", forward_only=False)
        biases = self._moving_biases()
        finalize_model_grads(self.chunks)  # which moves them
        lr = lr_at(self.updates, self._optimizer_config, self._total_steps)
        grad_norm = update(self.optimizer, lr, self._optimizer_config.grad_clip)
        skipped = not math.isfinite(grad_norm)
        self.updates += not skipped
        if skipped:
            for bias, before in biases:
                bias.copy_(before)
        step = {"policy/grad_norm": grad_norm, "policy/lr": lr, "policy/skipped": float(skipped)}
        if scale := loss_scale_of(self.optimizer):
            step["policy/loss_scale"] = scale.scale.item()
        agreement = self._routing.agreement(self.device) if self._routing else {}
        router_terms = self._router_terms.metrics(self.device) if self._router_terms else {}
        return self._totals(outputs) | agreement | router_terms | step

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[PackedBatch], loss: TokenLoss, temperature: float) -> dict[str, Any]:
        """*Collective*: what `loss` adds up to under the present weights. Trains nothing."""
        return self._totals(self._forward_backward(microbatches, temperature, _output_of(loss), "free", forward_only=True))

    def _moving_biases(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Expert biases that are not frozen, with copies."""
        if not (self._model.moe and self._model.moe.expert_bias_update_rate):
            return []
        return [(tensor, tensor.clone()) for name, tensor in self.weights().items() if name.endswith("expert_bias")]

    def occupy(self, what: Occupied) -> None:
        if self.device.type == "cpu" or what == self._occupied:
            return
        self._occupied = what
        states, params = what == "all", what != "nothing"
        if not states:
            self.optimizer.offload_to_cpu()
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                buffer.offload_to_cpu(move_params=not params, move_grads=not states)
                buffer.reload_from_cpu(move_params=params, move_grads=states)
        torch.cuda.synchronize()
        if states:
            self.optimizer.restore_from_cpu()
        else:
            torch.cuda.empty_cache()

    def _forward_backward(
        self,
        microbatches: Sequence[PackedBatch],
        temperature: float,
        last: LastStage,
        forward_pass: ForwardPass,
        forward_only: bool,
    ) -> list[Any]:
        """What `last` kept of each microbatch; empty but on the last pipeline stage."""
        prepared = self._prepare(microbatches)
        if self._routing:
            self._routing.start(forward_pass, len(prepared))
        if self._router_terms and not forward_only:
            self._router_terms.start([len(batch.inputs.input_ids_R) for batch in prepared], self.device)

        def forward(data: Iterator[tuple[int, Prepared]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            number, batch = next(data)
            inputs = batch.inputs
            if self._routing:
                self._routing.enter(chunk, number, batch.experts_LRK)
            half = {"fp32_output": False} if self.dtype != torch.float32 else {}  # row_logprobs computes in fp32 row by row
            output = chunk(
                input_ids=inputs.input_ids_R[None],
                position_ids=inputs.segments.positions_R[None],
                attention_mask=None,
                packed_seq_params=batch.packed_seq_params,
                **half,
            )

            def finish(logits_1RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                values = row_logprobs(
                    logits_1RV[0], inputs.successors_R, temperature, self._tp, self._model.vocab_size, inputs.support
                )
                scalar, keep = last(inputs, *(inputs.tokens_of_rows(values_R) for values_R in values))
                return scalar, torch.zeros((), dtype=torch.int, device=self.device), keep

            return output, finish

        kept: list[Any] = self._run_schedule(
            forward_step_func=forward,
            data_iterator=[iter(enumerate(prepared)) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(prepared),
            seq_length=1,  # read by no schedule where lengths vary
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return kept[: len(microbatches)]

    def _prepare(self, microbatches: Sequence[PackedBatch]) -> list[Prepared]:
        batches = list(microbatches)
        if self._parallel.vpp > 1:  # interleaving takes whole groups of `pp` microbatches (schedules.py:1007)
            batches += [_nothing_like(batches[0])] * (-len(batches) % self._parallel.pp)
        tp = self._tp.size() if self._parallel.sequence_parallel else 1
        prepared = []
        for batch in batches:
            inputs = rank_inputs(batch, tp=tp, cp=self._cp.size(), cp_rank=self._cp.rank(), over_cp=self._sum_over_cp)
            recorded = batch.experts_TLK
            experts_LRK = None if recorded is None else inputs.experts_of_rows(recorded, self._tp.rank() if tp > 1 else 0, tp)
            prepared.append(Prepared(inputs, self._packed_seq_params(inputs), experts_LRK))
        return prepared

    def _sum_over_cp(self, values: torch.Tensor) -> torch.Tensor:
        summed = values.clone()
        dist.all_reduce(summed, group=self._cp)
        return summed

    def _packed_seq_params(self, inputs: RankInputs) -> Any:
        from megatron_rl.policy import attention

        if has_transformer_engine(self.device):
            return attention.for_transformer_engine(inputs.segments)
        rotary_dim = int(self._model.head_dim * self._model.rotary_percent)
        return attention.make_plan(inputs.segments, rotary_dim, self._model.rotary_base)

    def _totals(self, outputs: Sequence[LossOutput]) -> dict[str, Any]:
        """Over all microbatches, CP ranks and replicas, on every rank: numbers, and tables as nested lists."""
        totals: dict[str, Any] = {}
        if outputs:
            totals = self._reduced([output.sums | output.tables for output in outputs], dist.ReduceOp.SUM)
            totals |= self._reduced([output.maxima for output in outputs], dist.ReduceOp.MAX)
        if self._pp.size() > 1:  # the other stages know neither the values nor their names
            box = [totals]
            dist.broadcast_object_list(box, group_src=self._pp.size() - 1, group=self._pp, device=self.device)
            totals = box[0]
        return totals

    def _reduced(self, values: Sequence[Mapping[str, torch.Tensor]], how: Any) -> dict[str, Any]:
        if not values[0]:
            return {}
        shapes = {name: value.shape for name, value in values[0].items()}
        flat = torch.stack([torch.cat([value[name].double().flatten() for name in shapes]) for value in values])
        reduced = flat.sum(0) if how == dist.ReduceOp.SUM else flat.amax(0)
        dist.all_reduce(reduced, how, self._replicas)
        parts = reduced.cpu().split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape).tolist() for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        if self._reference is None:
            raise ValueError("this policy was built without a reference")
        self._exchange(self._reference)
        try:
            yield
        finally:
            self._exchange(self._reference)

    @torch.no_grad()
    def _exchange(self, others: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.weights().items():
            current = tensor.to("cpu", copy=True)
            tensor.copy_(others[name])
            others[name].copy_(current)


def _output_of(loss: TokenLoss) -> LastStage:
    def last(inputs: RankInputs, logprobs_N: torch.Tensor, entropy_N: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output = loss(logprobs_N, entropy_N, inputs.batch)
        return output.loss, output

    return last


def _nothing_like(batch: PackedBatch) -> PackedBatch:
    """One token, masked out."""
    return PackedBatch(
        tokens_T=batch.tokens_T[:1],
        cu_seqlens=batch.cu_seqlens.new_tensor([0, 1]),
        loss_mask_T=torch.zeros_like(batch.loss_mask_T[:1]),
        fields={name: torch.zeros_like(values_T[:1]) for name, values_T in batch.fields.items()},
        experts_TLK=None if batch.experts_TLK is None else torch.full_like(batch.experts_TLK[:1], -1),
    )
