"""Packaging. `kernels/` is a folder that holds the package `megatron_rl_kernels` and no package itself: with the repository root on
sys.path (as `python -m` puts it there) a package here would shadow the public `kernels`, which transformers and SGLang look for."""

from setuptools import find_packages, setup

setup(
    name="megatron_rl",
    version="0.1.0",
    description="RLVR for large mixture-of-experts models: Megatron-Core policies, SGLang engines, C3PO++ and IcePop",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_rl", "megatron_rl.*"]), "megatron_rl.conf", *find_packages("kernels")],
    package_dir={"megatron_rl.conf": "conf", "megatron_rl_kernels": "kernels/megatron_rl_kernels"},
    package_data={"megatron_rl.conf": ["*.yaml", "*/*.yaml"]},
    entry_points={
        "console_scripts": ["megatron-rl = megatron_rl.__main__:main"],
    },
)
