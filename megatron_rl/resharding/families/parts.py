"""What families have in common: the rules of usual layers, and the reading and writing of config.json by a table of keys.

`L` and `M` begin the names of a layer, Hugging Face's and Megatron's. Layer norms before a linear sit inside it under Transformer
Engine, which gives them a second spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config.model import ModelConfig, YarnConfig
from megatron_rl.resharding.names import Rule, Where, always

L, M = "model.layers.{layer}.", "decoder.layers.{layer}."
When = Callable[[ModelConfig], bool]


def embeddings(embedding: str) -> tuple[Rule, ...]:
    """Word embeddings, the last norm and the output layer. A tied model's last pipeline stage holds a copy of its own."""
    word, out = "embedding.word_embeddings.weight", "output_layer.weight"
    return (
        Rule((embedding,), (word,), ("vocab hidden",), "vocab", "model", lambda model: not model.tie_embeddings),
        Rule((embedding,), (word, out), ("vocab hidden",), "vocab", "model", lambda model: model.tie_embeddings),
        Rule(("model.norm.weight",), ("decoder.final_layernorm.weight",), ("hidden",), "replicated", "model"),
        Rule(("lm_head.weight",), (out,), ("vocab hidden",), "vocab", "model", lambda model: not model.tie_embeddings),
    )


def layer_norms(fused_into: str = "linear_qkv") -> tuple[Rule, ...]:
    before, after = "input_layernorm", "post_attention_layernorm"
    te = (M + f"self_attention.{fused_into}.layer_norm_weight",) if fused_into else ()
    mlp = (M + "pre_mlp_layernorm.weight", M + "mlp.linear_fc1.layer_norm_weight")
    return (
        Rule((L + f"{before}.weight",), (M + "input_layernorm.weight", *te), ("hidden",), "replicated"),
        Rule((L + f"{after}.weight",), mlp, ("hidden",), "replicated"),
    )


def attention(q_k_v: tuple[str, ...], out: str, q_norm: str = "", k_norm: str = "") -> tuple[Rule, ...]:
    """`q_k_v`: one tensor of all three, or three. Norms of queries and keys, and biases, where the model has them."""
    separate, mg = len(q_k_v) == 3, M + "self_attention."
    widths = ("q", "kv", "kv") if separate else ("q+k+v",)
    weights, biases = (tuple(f"{L}{name}.{kind}" for name in q_k_v) for kind in ("weight", "bias"))
    rules = [
        Rule(weights, (mg + "linear_qkv.weight",), tuple(f"{width} hidden" for width in widths), "column", grouped=True),
        Rule(biases, (mg + "linear_qkv.bias",), widths, "column", when=lambda model: model.qkv_bias, grouped=True),
        Rule((L + f"{out}.weight",), (mg + "linear_proj.weight",), ("hidden q",), "row"),
    ]
    for norm, which in ((q_norm, "q"), (k_norm, "k")):
        if norm:
            weight = mg + f"{which}_layernorm.weight"
            rules.append(Rule((L + f"{norm}.weight",), (weight,), ("head",), "replicated", when=lambda model: model.qk_norm))
    return tuple(rules)


def swiglu(hf: str, megatron: tuple[str, ...], width: str, where: Where, when: When = always) -> tuple[Rule, ...]:
    """FC in a spelling of `megatron` stands for linear_fc1, gate over up, and linear_fc2."""
    fc1, fc2 = (tuple(spelling.replace("FC", fc) for spelling in megatron) for fc in ("linear_fc1", "linear_fc2"))
    return (
        Rule((hf + "gate_proj.weight", hf + "up_proj.weight"), fc1, (f"{width} hidden",) * 2, "column", where, when),
        Rule((hf + "down_proj.weight",), fc2, (f"hidden {width}",), "row", where, when),
    )


def dense_mlp() -> tuple[Rule, ...]:
    return swiglu(L + "mlp.", (M + "mlp.FC.weight",), "ffn", "dense")


def experts(bias: str = "", shared: bool = True) -> tuple[Rule, ...]:
    """A router, its bias (a buffer), the routed experts, and the shared ones as one."""
    mg = M + "mlp."
    rules: tuple[Rule, ...] = (Rule((L + "mlp.gate.weight",), (mg + "router.weight",), ("experts hidden",), "replicated", "moe"),)
    if bias:
        name, megatron = (L + f"mlp.gate.{bias}",), (mg + "router.expert_bias",)
        rules += (Rule(name, megatron, ("experts",), "replicated", "moe", lambda model: bool(model.moe and model.moe.expert_bias)),)
    spellings: tuple[str, ...] = (mg + "experts.local_experts.{expert}.FC.weight", mg + "experts.FC.weight{expert}")
    rules += swiglu(L + "mlp.experts.{expert}.", spellings, "expert_ffn", "moe")
    if shared:
        spellings, has = (mg + "shared_experts.FC.weight",), lambda model: bool(model.moe and model.moe.num_shared_experts)
        rules += swiglu(L + "mlp.shared_experts.", spellings, "shared_ffn", "moe", has)
    return rules


def multi_token_prediction(norm: str) -> tuple[Rule, ...]:
    """What such a layer has beside a usual one; `norm`: its last."""
    return (
        Rule((L + "enorm.weight",), (M + "enorm.weight",), ("hidden",), "replicated", "mtp"),
        Rule((L + "hnorm.weight",), (M + "hnorm.weight",), ("hidden",), "replicated", "mtp"),
        Rule((L + "eh_proj.weight",), (M + "eh_proj.weight",), ("hidden 2hidden",), "column", "mtp"),
        Rule((L + f"{norm}.weight",), (M + "final_layernorm.weight",), ("hidden",), "replicated", "mtp"),
    )


@dataclass(frozen=True)
class ConfigTable:
    """How a family's config.json says what a ModelConfig says. Our keys with a dot lie in that part of ModelConfig. A default or a
    value that is a function is given config.json. A MoE family's model with no experts is a dense one.
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str | tuple[str, ...]]  # have to be there; of several spellings the first is written
    optional: Mapping[str, tuple[str, Any]] = field(default_factory=dict)  # with their defaults
    same: Mapping[str, Any] = field(default_factory=dict)  # known in this form only: may be absent, but not different
    implied: Mapping[str, Any] = field(default_factory=dict)  # what the family is without saying it
    yarn: bool = False

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values of ModelConfig; ValueError naming what is missing, or what we do not have."""
        if self.architecture not in (config.get("architectures") or ()):
            raise ValueError(f"architectures={config.get('architectures')}: not a {self.architecture} checkpoint")
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        config = {**rope, **config}  # transformers 5 keeps the rope keys there
        flat = {ours: _given(value, config) for ours, value in self.implied.items()}
        missing = []
        for ours, theirs in self.keys.items():
            found = [config[key] for key in _spellings(theirs) if config.get(key) is not None]
            missing += [] if found else [_spellings(theirs)[0]]
            flat[ours] = found[0] if found else None
        if dense := not flat.get("moe.num_experts", True):
            missing = [
                key for key in missing if key not in {_spellings(self.keys[ours])[0] for ours in self.keys if "moe." in ours}
            ]
        if missing:
            raise ValueError(f"missing {', '.join(sorted(missing))}")
        for ours, (key, default) in self.optional.items():
            flat[ours] = config[key] if config.get(key) is not None else _given(default, config)
        kind = rope.get("rope_type", rope.get("type", "default"))
        same = {"hidden_act": "silu", "rope_scaling.rope_type": "yarn" if self.yarn and kind == "yarn" else "default", **self.same}
        config = {**config, "rope_scaling.rope_type": kind}
        wrong = [f"{key}={config[key]!r}" for key, value in same.items() if config.get(key) not in (None, _given(value, config))]
        if wrong:
            raise ValueError(f"{', '.join(sorted(wrong))}: not supported")
        if kind == "yarn":
            flat |= {f"rope_scaling.{key}": rope[key] for key in YarnConfig.model_fields if key in rope}
        values = _nested(flat)
        return values | {"moe": None} if dense else values

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """config.json, without what names the tokens and the data type."""
        ours = model.model_dump()
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type, "hidden_act": "silu"}
        config |= {key: value for key, value in self.same.items() if not callable(value)}
        for path, theirs in (*self.keys.items(), *((path, key) for path, (key, _) in self.optional.items())):
            part: Any = ours
            for name in path.split("."):
                part = part[name] if part else None
            config[_spellings(theirs)[0]] = part
        if "moe.num_experts" in self.keys and model.moe is None:
            config |= {_spellings(self.keys["moe.num_experts"])[0]: 0, "first_k_dense_replace": model.num_layers}
        yarn = {"rope_type": "yarn"} | model.rope_scaling.model_dump() if model.rope_scaling else None
        rope = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_percent}
        config |= {"rope_scaling": yarn and yarn | {"type": "yarn"}, "rope_parameters": (yarn or {"rope_type": "default"}) | rope}
        return config | {"initializer_range": model.init_std, "attention_dropout": 0.0, "use_cache": True}


def _spellings(theirs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (theirs,) if isinstance(theirs, str) else theirs


def _given(value: Any, config: Mapping[str, Any]) -> Any:
    return value(config) if callable(value) else value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, value in flat.items():
        *parts, last = path.split(".")
        place = values
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return values


def head_dim(config: Mapping[str, Any]) -> int:
    """The usual one, where config.json does not say."""
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


SIZES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "rotary_base": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
TIED = {"tie_embeddings": ("tie_word_embeddings", False)}
