#!/usr/bin/env bash
# One job per stage: launch/slurm_chain.sh [--from STAGE] [--until STAGE] curriculum=NAME run.dir=FOLDER
# [overrides...]. Each runs its stage in the same run folder, once the job of the stage it comes
# after has ended well, and is dropped if that failed. Branches run beside each other. Options of
# sbatch go into SBATCH_... variables. Prints the number and the stage of each job.
set -euo pipefail
script=$(dirname "$0")/slurm.sbatch
overrides=()
selection=()
while (($#)); do
  case $1 in
    --from | --until) selection+=("$1" "${2:?which stage? $1 STAGE}") && shift ;;
    --from=* | --until=*) selection+=("$1") ;;
    *) overrides+=("$1") ;;
  esac
  shift
done
listed=$(python -m hunyuan_train curriculum --list "${selection[@]}" "${overrides[@]}")
: "${listed:?the curriculum has no stages; name one: curriculum=...}"
declare -A jobs
while read -r stage after; do
  first=()
  [[ -z ${jobs[$after]-} ]] || first=(--dependency="afterok:${jobs[$after]}")
  job=$(sbatch --parsable --job-name="$stage" --kill-on-invalid-dep=yes "${first[@]}" \
    "$script" curriculum "${overrides[@]}" --from "$stage" --until "$stage")
  jobs[$stage]=${job%%;*}
  echo "${jobs[$stage]} $stage"
done <<<"$listed"
