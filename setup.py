"""Packaging. `kernels/` installs as `megatron_rl_kernels`: the public package `kernels` (used by transformers) keeps its name."""

from setuptools import find_packages, setup

setup(
    name="megatron_rl",
    version="0.1.0",
    description="RLVR for large mixture-of-experts models: Megatron-Core policies, SGLang engines, C3PO++ and IcePop",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_rl", "megatron_rl.*"]), "megatron_rl.conf", "megatron_rl_kernels"],
    package_dir={"megatron_rl.conf": "conf", "megatron_rl_kernels": "kernels"},
    package_data={"megatron_rl.conf": ["*.yaml", "*/*.yaml"]},
    entry_points={
        "console_scripts": ["megatron-rl = megatron_rl.__main__:main"],
    },
)
