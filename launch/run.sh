#!/usr/bin/env bash
# Start a training script under a launcher, on one machine or several (docs/launching.md):
#
#   LAUNCHER=torchrun NPROC=2 bash launch/run.sh examples/pretrain_llama.py --steps 100
#
# All arguments belong to the script; what concerns the launcher comes from the environment:
#
#   LAUNCHER       deepspeed (default), torchrun, mpirun, srun (inside a SLURM job) or python (one process)
#   NPROC          processes on each machine; default all visible GPUs, without a GPU 2
#   HOSTFILE       deepspeed and mpirun on several machines: a file with lines "HOST slots=PROCESSES"
#   NNODES         torchrun on several machines: how many; deepspeed reads it from HOSTFILE
#   NODE_RANK      this machine's number from 0, when the script is started on every machine by hand: always with
#                  torchrun; with deepspeed instead of ssh
#   MASTER_ADDR    address of machine 0 that the others reach; needed with NODE_RANK
#   MASTER_PORT    free port there; on one machine one is found
#   LAUNCHER_ARGS  further options of the launcher, split at spaces
#   MAX_RESTARTS   how often a run that failed is started again, default 0; the script has to go on where it stopped,
#                  as examples/pretrain_llama.py does with --save-every N --resume auto
#
# SIGTERM goes on to every process of the training on this machine, which may save before it ends
# (ds_fira.Termination); then this script exits with 143 and starts nothing again.
set -euo pipefail

fail() {
  echo "launch/run.sh: error: $*" >&2
  exit 2
}

launcher=${LAUNCHER:-deepspeed}
[[ $launcher =~ ^(deepspeed|torchrun|mpirun|srun|python)$ ]] ||
  fail "LAUNCHER=$launcher is none of deepspeed, torchrun, mpirun, srun, python"
[[ $# -gt 0 ]] || fail "no script given, as in: bash launch/run.sh examples/pretrain_llama.py --steps 100"
[[ -f $1 ]] || fail "the script $1 does not exist"
for name in NPROC NNODES NODE_RANK MASTER_PORT MAX_RESTARTS; do
  [[ ${!name:-0} =~ ^[0-9]+$ ]] || fail "$name=${!name} is not a number"
done
[[ ${NPROC:-1} -ge 1 ]] || fail "NPROC must be at least 1"
if [[ -n ${HOSTFILE:-} ]]; then
  [[ $launcher == deepspeed || $launcher == mpirun ]] || fail "$launcher reads no HOSTFILE; unset it"
  [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE does not exist"
  [[ -z ${NPROC:-} ]] || fail "the slots in $HOSTFILE and NPROC=$NPROC both set the number of processes; unset NPROC"
fi
if [[ ${NNODES:-1} -gt 1 ]]; then
  [[ $launcher == torchrun ]] || fail "NNODES=$NNODES is for torchrun; $launcher takes HOSTFILE or a SLURM job"
  [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} ]] ||
    fail "torchrun on NNODES=$NNODES machines needs NODE_RANK, MASTER_ADDR and MASTER_PORT on each"
  [[ $NODE_RANK -lt $NNODES ]] || fail "NODE_RANK=$NODE_RANK is not below NNODES=$NNODES"
fi

if [[ ${MAX_RESTARTS:-0} -gt 0 ]]; then
  # The same again, in a process of its own: free ports and visible GPUs are looked up anew.
  trap 'trap "" TERM INT; kill -TERM "$run" 2>/dev/null; wait "$run"; exit 143' TERM
  trap 'trap "" TERM INT; kill -INT "$run" 2>/dev/null; wait "$run"; exit 143' INT
  for ((restart = 1; ; restart++)); do
    # In the background, or a signal would wait for the training to end.
    set -m # or it would not see SIGINT
    MAX_RESTARTS=0 bash "${BASH_SOURCE[0]}" "$@" </dev/null &
    run=$!
    set +m
    status=0
    wait "$run" || status=$?
    # 2 is a wrong setting or option, which would be as wrong the next time.
    [[ $status -ne 0 && $status -ne 2 && $restart -le $MAX_RESTARTS ]] || exit "$status"
    echo "launch/run.sh: the run ended with status $status: restart $restart of $MAX_RESTARTS" >&2
    sleep 1
  done
fi

# Programs of the active environment, else of the one that launch/setup.sh made, else of PATH.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-$repository/.venv}}
export PATH="$environment/bin:$PATH"
[[ $launcher == srun ]] || command -v python >/dev/null || fail "python was not found; run bash launch/setup.sh"
command -v "$launcher" >/dev/null || fail "$launcher was not found in $environment/bin or PATH"

read -ra command <<<"$launcher ${LAUNCHER_ARGS:-}"

# The processes of the training below a process: the first with a rank on each branch, not what they started themselves,
# such as workers that load data.
ranks_below() {
  local child
  # shellcheck disable=SC2013  # one word a process
  for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
    if tr '\0' '\n' 2>/dev/null <"/proc/$child/environ" | grep -qE '^(RANK|OMPI_COMM_WORLD_RANK|PMI_RANK)='; then
      echo "$child"
    else
      ranks_below "$child"
    fi
  done
}

tree_below() {
  local child
  # shellcheck disable=SC2013  # one word a process
  for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
    echo "$child"
    tree_below "$child"
  done
}

# Tell the training to end. Launchers would pass the signal on to one rank after the other (deepspeed) or not at all
# (deepspeed's first process), would kill after half a minute (torchrun) or a few seconds (mpirun), or would start the
# ranks again; so it goes to the ranks, and what is left of the launcher follows them.
end_run() {
  trap '' TERM USR1
  local ranks=
  case $launcher in
    srun) ;;
    python) ranks=$run ;;
    *)
      ranks=$(ranks_below "$run")
      [[ -n $ranks ]] || ranks=$(tree_below "$run") # none has started yet
      ;;
  esac
  # srun passes this signal on to its tasks, and ends them at once on SIGTERM; they are this script on every machine.
  if [[ $launcher == srun ]]; then kill -USR1 "$run" 2>/dev/null || true; fi
  # shellcheck disable=SC2086  # one word a process
  [[ -z $ranks ]] || kill -TERM $ranks 2>/dev/null || true
  # shellcheck disable=SC2086
  while [[ -n $ranks ]] && kill -0 $ranks 2>/dev/null; do sleep 0.2; done
  if [[ $launcher != srun ]]; then
    for ((tenth = 0; tenth < 50; tenth++)); do
      kill -0 "$run" 2>/dev/null || break
      sleep 0.1
    done
    # shellcheck disable=SC2046
    kill -TERM "$run" $(tree_below "$run") 2>/dev/null || true
  fi
  wait "$run" || true
  exit 143
}

# Start a launcher, in the background and in a process group of its own, so that a signal is this script's to pass on.
start() {
  # As a task of srun this script gets SIGUSR1 (above), and so may all below it, which it would kill.
  [[ -z ${SLURM_JOB_ID:-} || $launcher == srun ]] || trap '' USR1
  set -m
  "$@" </dev/null &
  run=$!
  set +m
  trap end_run TERM
  [[ -z ${SLURM_JOB_ID:-} ]] || trap end_run USR1
  trap 'kill -INT -- "-$run" 2>/dev/null' INT
  local status
  while :; do
    status=0
    wait "$run" || status=$?
    kill -0 "$run" 2>/dev/null || exit "$status"
  done
}

if [[ $launcher == srun ]]; then
  # One task a machine, which starts torchrun: that sees all GPUs of its machine, whatever srun binds tasks to.
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "LAUNCHER=srun works inside a SLURM job: sbatch launch/slurm.sbatch, or salloc"
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  # The same on every machine, and another for the next job on the same ones.
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  export MASTER_ADDR MASTER_PORT NNODES=$SLURM_JOB_NUM_NODES LAUNCHER=torchrun
  unset LAUNCHER_ARGS
  # srun does not take --cpus-per-task over from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # shellcheck disable=SC2016  # expanded on each machine
  start "${command[@]}" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' task "$repository/launch/run.sh" "$@"
fi

if [[ ${DS_ACCELERATOR:-} == cpu ]]; then
  gpus=0
else
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || fail "torch cannot be imported by $(command -v python)"
fi
if [[ $gpus -eq 0 ]]; then
  export DS_ACCELERATOR=cpu # or DeepSpeed warns in every process that it found no GPU
  nproc=${NPROC:-2}
else
  nproc=${NPROC:-$gpus}
  [[ $nproc -le $gpus ]] || fail "NPROC=$nproc exceeds the $gpus visible GPUs"
fi
[[ $launcher != python ]] || nproc=1
# Otherwise every process starts a thread for each core, and all of them wait for one another.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
if [[ -z ${HOSTFILE:-} && ${NNODES:-1} -eq 1 && -z ${MASTER_PORT:-} ]]; then
  # So that a second run on the same machine does not meet the first one.
  MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
python=$(command -v python)
# What processes on other machines do not inherit.
names=$(compgen -e | grep -E '^(OMP_NUM_THREADS|DS_ACCELERATOR|PYTHONPATH|GLOO_.*|NCCL_.*)$')

case $launcher in
  deepspeed)
    command+=(--log_level warning --master_port "${MASTER_PORT:-29500}")
    if [[ -z ${HOSTFILE:-} ]]; then
      if [[ $gpus -eq 0 ]]; then
        command+=(--num_gpus "$nproc")
      elif [[ -n ${NPROC:-} ]]; then
        # --num_gpus would make it forget which GPUs CUDA_VISIBLE_DEVICES names.
        all=${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}
        CUDA_VISIBLE_DEVICES=$(cut -d , -f "1-$nproc" <<<"$all")
        export CUDA_VISIBLE_DEVICES
      fi
      command+=("$@")
    else
      command+=(--hostfile "$HOSTFILE")
      [[ -z ${MASTER_ADDR:-} ]] || command+=(--master_addr "$MASTER_ADDR")
      if [[ -n ${NODE_RANK:-} ]]; then
        [[ -n ${MASTER_ADDR:-} ]] || fail "NODE_RANK=$NODE_RANK needs MASTER_ADDR, the address of machine 0"
        command+=(--no_ssh --node_rank "$NODE_RANK" "$@")
      else
        # It exports few variables over ssh; env, as the program to start, brings the others.
        command+=(--no_python --no_local_rank env)
        for name in $names; do command+=("$name=${!name}"); done
        command+=("$python" -u "$@")
      fi
    fi
    ;;
  torchrun)
    # The same with another status where the training ends with 2.
    command=("$python" "$repository/launch/torchrun.py" "${command[@]:1}")
    if [[ ${NNODES:-1} -gt 1 ]]; then
      # Ranks follow NODE_RANK, and no machine needs to know itself by the name of MASTER_ADDR, as with c10d.
      command+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    else
      command+=(--master_addr 127.0.0.1 --master_port "$MASTER_PORT")
    fi
    # Behind -- it looks for no beginnings of its own options among the script's.
    command+=(--nproc_per_node "$nproc" -- "$@")
    # Seconds that it gives its processes where a signal reaches it directly; saving may need more than its 30.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
    ;;
  mpirun)
    # By its path, so that Open MPI looks for its daemon at the same place on the other machines.
    command[0]=$(command -v mpirun)
    if [[ -n ${HOSTFILE:-} ]]; then
      # "HOST slots=2" as HOST:2, which both kinds of mpirun read.
      hosts=$(sed -nE 's/^([^#[:space:]]+)[[:space:]]+slots=([0-9]+).*/\1:\2/p' "$HOSTFILE" | paste -sd ,)
      nproc=$(tr , '\n' <<<"$hosts" | awk -F : '{ total += $NF } END { print total }')
      command+=(--host "$hosts")
    fi
    if mpirun --version | grep -q "Open MPI"; then
      # Not bound, or a process with all its threads gets one core, and ranks beyond the cores hang.
      command+=(--bind-to none)
      if [[ -n ${HOSTFILE:-} ]]; then
        for name in $names; do command+=(-x "$name"); done
      else
        command+=(--oversubscribe)
      fi
      # Open MPI refuses root unless told twice; containers often have no other user.
      [[ $EUID -ne 0 ]] || command+=(--allow-run-as-root)
    fi
    command+=(-n "$nproc" "$python" -u "$@")
    ;;
  python) command+=(-u "$@") ;;
esac

echo "+ ${command[*]}" >&2
start "${command[@]}"
