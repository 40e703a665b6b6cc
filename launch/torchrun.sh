#!/usr/bin/env bash
# This machine alone:   launch/torchrun.sh RANKS VERB [overrides...]
# One of several:       NODES=2 RENDEZVOUS=host:port launch/torchrun.sh RANKS VERB [overrides...]
#                       NODES=1:2 goes on with one machine when the other is lost.
# `hunyuan-train launch` needs no rendezvous host and tells bad machines from bad code; this script
# is for places where torchrun is a must.
#
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE gives every attempt a store of its own: without it torchrun
# 2.13 hands restarted ranks the keys of dead ones, and most restarts hang. The short timeouts let
# the machines that are left go on within seconds.
set -euo pipefail
ranks=${1:?how many ranks? launch/torchrun.sh RANKS VERB [overrides...]}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
meet=(--standalone)
if [[ -n ${RENDEZVOUS:-} ]]; then
  conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=600,read_timeout=10
  meet=(--nnodes "${NODES:-1}" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS"
    --rdzv-id "${RUN_ID:-hunyuan}" --rdzv-conf "$conf")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$ranks" \
  --max-restarts "${MAX_RESTARTS:-100}" --monitor-interval 0.1 \
  -m "${MODULE:-hunyuan_train}" "$@"
