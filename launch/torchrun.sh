#!/usr/bin/env bash
# One node's ranks of a run. On one machine nothing else is needed; on several, start it on each with its own NODE_RANK.
#
#   bash launch/torchrun.sh rl experiment=quickstart                                       all GPUs here, or 2 CPU ranks
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/torchrun.sh rl experiment=... key=value
#
# NNODES          machines of the run (1)
# NODE_RANK       which of them this is, from 0 (0)
# MASTER_ADDR     the host of node 0 (needed when NNODES > 1)
# MASTER_PORT     a free port there (29500; on one machine the system picks one)
# NPROC_PER_NODE  ranks on each machine (its GPUs; 2 where it has none)
# PYTHON          the interpreter (.venv/bin/python, else python3)
#
# SIGTERM or Ctrl-C reaches every rank; the run saves a checkpoint and ends, and the same command goes on from it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nnodes="${NNODES:-1}"
if [ $# -eq 0 ] || { [ "$nnodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; }; then
  sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus="$(nvidia-smi --list-gpus | wc -l)"
fi
nproc="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}"
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"

if [ "$nnodes" -eq 1 ]; then
  meet=(--standalone)
else
  meet=(--nnodes "$nnodes" --node-rank "${NODE_RANK:-0}" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
if [ "$gpus" -eq 0 ]; then
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_COMPILE_DISABLE=1
else
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron-Core's overlap of TP communication needs one queue
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-290}" # seconds to save before SIGKILL; torchrun's own 30 are few
exec "$python" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$nproc" --max-restarts 0 -m megatron_rl "$@"
