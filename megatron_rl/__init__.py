"""megatron_rl: RLVR for large mixture-of-experts models with Megatron-Core and SGLang."""

__version__ = "0.1.0"
