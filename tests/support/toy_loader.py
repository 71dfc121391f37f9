"""A model that loads as SGLang's do, small enough to think about: one tensor-parallel rank's share of fused, stacked, padded, tied,
concatenated, normalised and one-element parameters."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch.nn.functional import normalize

H, VOCAB, PADDED, EXPERTS, WIDTH, LAYERS = 4, 6, 8, 2, 6, 1
SHAPES = {
    "embed.weight": (VOCAB, H), "q.weight": (4, H), "k.weight": (2, H), "v.weight": (2, H), "down_a.weight": (3, H),
    "down_b.weight": (2, H), "router.bias": (EXPERTS,), "scale": (1,), "norm.weight": (H,), "head.weight": (VOCAB, H),
    **{f"experts.{e}.{w}.weight": (WIDTH, H) for e in range(EXPERTS) for w in ("gate", "up")},
    **{f"experts.{e}.down.weight": (H, WIDTH) for e in range(EXPERTS)},
}  # fmt: skip


class ToyModel(torch.nn.Module):
    """`tp`: q, the vocabulary and the experts' width are cut; k and v, too few heads to cut, are on every rank."""

    def __init__(self, rank: int = 0, tp: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rank, self.tp = rank, tp
        self.config = SimpleNamespace(num_hidden_layers=LAYERS)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.full(shape, float("nan"), dtype=dtype), requires_grad=False)

        self.embed = parameter(PADDED // tp, H)
        self.qkv = parameter(4 // tp + 4, H)
        self.down = parameter(5, H)
        self.scale = parameter(1)
        self.norm = parameter(H)
        self.head = parameter(VOCAB, H)
        self.w13 = parameter(EXPERTS, 2 * WIDTH // tp, H)
        self.w2 = parameter(EXPERTS, H, WIDTH // tp)
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("cosines", torch.zeros(9), persistent=False)
        self.tied = self.embed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            part, kind = name.split(".")[0], name.split(".")[-2] if "." in name else ""
            if part == "experts":
                self._expert(int(name.split(".")[1]), kind, tensor)
            elif part in "qkv":
                start, length = {"q": (0, 4 // self.tp), "k": (4 // self.tp, 2), "v": (4 // self.tp + 2, 2)}[part]
                first = self.rank * length if part == "q" else 0
                self.qkv.data.narrow(0, start, length).copy_(tensor.narrow(0, first, length))
            elif part == "embed":
                rows = min(PADDED // self.tp, VOCAB - self.rank * PADDED // self.tp)
                self.embed[:rows].data.copy_(tensor.narrow(0, self.rank * PADDED // self.tp, rows))
                self.embed[rows:].data.fill_(0)
            elif part in ("down_a", "down_b"):
                waiting[part] = tensor
                if len(waiting) == 2:  # as DeepSeek's fused_qkv_a_proj_with_mqa
                    self.down.data.copy_(torch.cat([waiting["down_a"], waiting["down_b"]], dim=0))
            elif part == "head":  # as BailingMoE's norm_head
                self.head.data.copy_(normalize(tensor, dim=0, p=2, eps=1e-7))
            elif part == "scale":
                self.scale.data.fill_(tensor.item())
            elif part == "router":
                self.bias.copy_(tensor)
            elif part == "norm":
                assert tensor.shape == self.norm.shape, f"{tuple(tensor.shape)} into {tuple(self.norm.shape)}"
                self.norm.data.copy_(tensor)

    def _expert(self, expert: int, kind: str, tensor: torch.Tensor) -> None:
        width = WIDTH // self.tp
        if kind == "down":
            self.w2.data[expert].copy_(tensor.narrow(1, self.rank * width, width))
        else:
            into = self.w13.data[expert].narrow(0, width * (kind == "up"), width)
            into.copy_(tensor.narrow(0, self.rank * width, width))


def random_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
