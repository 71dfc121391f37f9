"""The kernels compile for Ampere and Hopper, ahead of time and without a GPU, with the arguments that a run gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton
from megatron_rl_kernels.logprob.triton import BACKWARD_BLOCK, FORWARD_BLOCK, backward_kernel, forward_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROW = {"tokens": "*i64", "entropies": "*fp32", "maxima": "*fp32", "log_sums": "*fp32"}
SCALARS = {"stride": "i32", "vocab": "i32", "inv_temperature": "fp32"}
BOTH = {"LOGPROB_GRAD": True, "ENTROPY_GRAD": True, "BLOCK": BACKWARD_BLOCK}
KERNELS = {
    "forward": (forward_kernel, ROW | SCALARS | {"logprobs": "*fp32"}, {"BLOCK": FORWARD_BLOCK}),
    "backward": (
        backward_kernel,
        ROW | SCALARS | {"grad_logprobs": "*fp32", "grad_entropies": "*fp32", "grad_logits": "{logits}"},
        BOTH,
    ),
    "backward without entropy": (
        backward_kernel,
        ROW | SCALARS | {"grad_logprobs": "*fp32", "grad_logits": "{logits}"},
        BOTH | {"ENTROPY_GRAD": False, "grad_entropies": None},
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles(kernel: str, logits: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, arguments, constants = KERNELS[kernel]
    types = {"logits": logits} | {name: kind.format(logits=logits) for name, kind in arguments.items()}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
    assert f".target sm_{arch}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
