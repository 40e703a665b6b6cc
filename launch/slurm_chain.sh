#!/usr/bin/env bash
# One job per stage: launch/slurm_chain.sh STAGE[,STAGE...] run.dir=FOLDER [overrides...]
# Job k runs the curriculum of the first k stages in the same run folder, where the ledger tells it
# that all but the last are done. It starts once job k-1 has ended well, and is dropped if that
# failed. Options of sbatch go into SBATCH_... variables. Prints the numbers of the jobs.
set -euo pipefail
stages=${1:?which stages? STAGE[,STAGE...] of conf/stage}
shift
script=$(dirname "$0")/slurm.sbatch
after=()
so_far=
for stage in ${stages//,/ }; do
  so_far+=${so_far:+,}$stage
  job=$(sbatch --parsable --job-name="$stage" --kill-on-invalid-dep=yes "${after[@]}" \
    "$script" curriculum "$@" "curriculum.stages=[$so_far]")
  after=(--dependency="afterok:${job%%;*}")
  echo "$job"
done
