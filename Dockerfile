# syntax=docker/dockerfile:1
# The GPU stack with this project in it.
#
#   docker build -t megatron_rl .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/opt/megatron_rl/runs" megatron_rl rl experiment=...
#
# For the code verifier's sandbox add --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined: a
# container may make no namespaces otherwise.
# --ipc=host: NCCL and the weight buckets between trainer and engines go through shared memory.
FROM nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        bubblewrap build-essential git libibverbs1 libnuma1 numactl python3.12-dev python3.12-venv rdma-core \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    CUDA_HOME=/usr/local/cuda
RUN python3.12 -m venv /opt/venv

# A100 and H100. MAX_JOBS bounds the compilers' memory: about 4 GB each.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
ARG NVTE_CUDA_ARCHS="80;90"
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG NVTE_FRAMEWORK=pytorch
ARG MAX_JOBS=8

WORKDIR /opt/megatron_rl
COPY launch/requirements-gpu.txt launch/requirements-gpu.txt
RUN pip install --no-cache-dir \
        torch==2.13.0 setuptools==84.2.1 wheel==0.48.0 packaging==26.3 cmake==4.4.4 ninja==1.13.2 pybind11==3.1.0 \
    && pip install --no-cache-dir --no-build-isolation -r launch/requirements-gpu.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .

ENTRYPOINT ["bash", "launch/torchrun.sh"]
