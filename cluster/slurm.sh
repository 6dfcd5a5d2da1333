#!/bin/bash
# Any hrm-ray command on Slurm: on one node or several, continued after preemptions and time limits.
#
# Cost: what your centre charges for --nodes times --time.
#
#   sbatch cluster/slurm.sh train experiment=sudoku_extreme data=/shared/data/sudoku-extreme storage=/shared/runs
#   sbatch --nodes=4 cluster/slurm.sh tune lr_wd_anneal storage=/shared/sweeps
#   tail -f slurm-JOBID.out
#   scancel --signal=USR1 --batch JOBID      # stop with a checkpoint; the same sbatch continues
#
# Change before the first time: the lines with #SBATCH, and how hrm-ray comes into PATH (a module, an environment).
# /shared stands for a folder that all nodes have.
#
#SBATCH --job-name=hrm-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#
# How it ends: two minutes before the time is up, or when another job takes the nodes, Slurm sends TERM to this script
# alone. It passes it on to hrm-ray, which writes a checkpoint and ends with 143. Then the job is put into the queue again,
# at most HRM_RAY_REQUEUES times (100), and continues. Any other exit code is the job's own. A centre that does not give
# preempted jobs a grace time, or lacks SlurmctldParameters=preempt_send_user_signal, cuts this short: then the job
# continues from the last checkpoint that was written in time (checkpoint_interval_s, 5 minutes unless given).
set -u

cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
export SRUN_CPUS_PER_TASK=$cpus # srun does not take it from sbatch
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp} # TMPDIR of a job is often too long for Ray's sockets

start_ray() { # on all nodes of the job, the first one being the head
  local head port ip
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  ip=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | tr ' ' '\n' | grep -v '^127\.\|:' | head -n 1)
  port=$((20000 + SLURM_JOB_ID % 20000))
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
  RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
  srun --overlap --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --block --node-ip-address="$ip" --port="$port" --num-cpus="$cpus" --include-dashboard=false \
    --disable-usage-stats > /dev/null &
  srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --block --address="$ip:$port" --num-cpus="$cpus" --disable-usage-stats > /dev/null &
  export RAY_ADDRESS=$ip:$port
  local tries=0
  until [ "$(ray status --address "$RAY_ADDRESS" 2> /dev/null | grep -c ' node_')" = "$SLURM_NNODES" ]; do
    tries=$((tries + 1))
    if [ $tries -gt 60 ]; then
      echo "error: not all of $SLURM_NNODES nodes have joined Ray after two minutes" >&2
      exit 1
    fi
    sleep 2
  done
}

told=
driver=
trap 'told=yes; [ -n "$driver" ] && kill -TERM "$driver" 2> /dev/null' TERM
trap '[ -n "$driver" ] && kill -TERM "$driver" 2> /dev/null' USR1
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
  start_ray
fi

hrm-ray "$@" &
driver=$!
[ -n "$told" ] && kill -TERM "$driver"
# bash runs a trap only between commands, and a signal ends `wait` early.
while kill -0 "$driver" 2> /dev/null; do
  wait "$driver"
done
wait "$driver"
code=$?

if [ "$code" = 143 ] && [ -n "$told" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${HRM_RAY_REQUEUES:-100}" ]; then
  echo "the job goes back into the queue; restarts so far: ${SLURM_RESTART_COUNT:-0}"
  scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until Slurm ends this
fi
exit "$code"
