#!/bin/bash
# A training on nodes of eight GPUs under SLURM; the words that follow are its own command line:
#
#     sbatch experiments/slurm.sh train_tokenizer.py --preset v1 --compile \
#         --data imagenet/train --val imagenet/val --out runs/v1
#     sbatch --nodes=1 experiments/slurm.sh train_ar.py --preset XL --compile \
#         --data imagenet/train --tokenizer runs/v1/last.pt --out runs/xl
#
# Submit it from the repository, on a file system that all nodes share. Where nodes have no internet,
# run "python train_tokenizer.py --prefetch" on the login node first. Ten minutes before its time is
# over the job is told to save; it then goes back into the queue and continues where it stopped.
# In a container, /dev/shm of 64 MB is too small for the processes that decode images: start it with
# 8 GB or more (Docker: --shm-size=8g), or say --workers 0.
#SBATCH --job-name=dar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dar-%j.log
set -euo pipefail

[ $# -gt 0 ] || { echo "which training? e.g. sbatch $0 train_tokenizer.py --preset v1 ..." >&2; exit 2; }
case " $* " in *" --resume never "*)
    echo "--resume never would begin anew whenever the job comes back from the queue; take another --out" >&2
    exit 2 ;;
esac
[ -d .venv ] && source .venv/bin/activate
gpus=${SLURM_GPUS_ON_NODE:-8}
# How long torchrun waits for the last save before it kills: by itself only 30 s. (torch 2.10 may not
# know this variable yet: there "--save-every" is what can be lost.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node do not meet
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a node; the first node's is where they meet. The signal goes to this script, which passes it on to all.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$gpus" --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$host:$port" "$@" &
steps=$!
stopped=0 code=0
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait $steps || code=$?
if [ $stopped = 1 ]; then
    wait $steps || true # the first wait ended with the signal, this one with the training
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
