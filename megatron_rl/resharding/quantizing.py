"""Takes the policy's tensors and hands on what is sent in their place (fp8.py). A scale needs its whole block, so that a tensor is
quantized where it has been put together: on the policy's side, in the thread that hands buckets over.

Invariants: the other sink never sees a projection in the policy's type; its checksums are of what it was given; the destination
needs room for a bucket's FP8 form beside the two buckets of execute.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron_rl_kernels.fp8 import quantize

from megatron_rl.checksum import checksum
from megatron_rl.ports import WeightSink
from megatron_rl.resharding.fp8 import SCALE, is_quantized, quantized
from megatron_rl.resharding.gather import plain_memory
from megatron_rl.types import Intake, Manifest


class QuantizingSink:
    """A `ports.WeightSink` before another."""

    memory = staticmethod(plain_memory)  # the other sink copies what is made of it

    def __init__(self, sink: WeightSink, verify: bool = False) -> None:
        self._sink, self._verify = sink, verify
        self._quantized: dict[str, str] = {}  # the policy's type
        self._checksums: dict[str, torch.Tensor] = {}  # of what this push has made

    def begin(self, manifest: Manifest) -> Intake:
        self._quantized = {spec.name: spec.dtype for bucket in manifest for spec in bucket if is_quantized(spec.name, spec.shape)}
        self._checksums = {}
        intake = self._sink.begin(quantized(manifest))
        names = (spec.name for bucket in manifest for spec in bucket if spec.name in intake.dtypes)
        return Intake({name: self._quantized.get(name, intake.dtypes[name]) for name in names}, intake.has_all)

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        sent: list[tuple[str, torch.Tensor]] = []
        for name, tensor in bucket:
            if name in self._quantized:
                made = list(zip((name, name + SCALE), quantize(tensor), strict=True))
                sent += made
                if self._verify:
                    self._checksums |= {made_name: checksum(of) for made_name, of in made}
            else:
                sent.append((name, tensor))
        self._sink.send(sent)

    def end(self, version: int, checksums: Mapping[str, int] | None = None) -> None:
        if checksums is not None:
            kept = {name: value for name, value in checksums.items() if name not in self._quantized}
            checksums = kept | {name: int(value) for name, value in self._checksums.items()}
        self._sink.end(version, checksums)
