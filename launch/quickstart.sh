#!/usr/bin/env bash
# The whole job on a machine without a GPU: set-up, data, SFT warm-up, RL with Megatron-Core and SGLang, evaluation, report.
#
#   bash launch/quickstart.sh [OUT_DIR] [Hydra overrides for the RL run ...]
#
# OUT_DIR is runs/quickstart unless given. Interrupted at any moment, the same command goes on where it was. SEED=1 picks another seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  "" | *=*) out=runs/quickstart ;;
  *) out="$1"; shift ;;
esac
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$here"
seed="${SEED:-0}"

start=$(date +%s)
bash launch/setup.sh
[ -f "$out/seconds_setup" ] || echo $(($(date +%s) - start)) >"$out/seconds_setup"
python=.venv/bin/python

[ -f "$out/data/tokenizer.model" ] || $python tools/quickstart_data.py --out "$out/data" --seed "$seed"
[ -f "$out/sft/hf/config.json" ] || $python -m megatron_rl sft experiment=quickstart_sft run.dir="$out/sft" run.seed="$seed"
$python -m megatron_rl rl experiment=quickstart run.dir="$out" run.seed="$seed" "$@"
$python tools/quickstart_summary.py "$out"
