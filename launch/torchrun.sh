#!/usr/bin/env bash
# One machine: launch/torchrun.sh NUM_PROCESSES VERB [overrides...]
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE: a restarted worker must not read the keys of the dead attempt.
set -euo pipefail
processes=$1; shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --nproc-per-node "$processes" -m hunyuan_train "$@"
