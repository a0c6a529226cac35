#!/usr/bin/env bash
#SBATCH --job-name=lslora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# The fine-tuning of examples/flores12 as a batch job of SLURM, one task for each GPU. Settings and
# data are those of examples/flores12, whose download.sh and prepare.sh come first. In the clone:
#   sbatch examples/cluster/slurm.sh
#   UPDATE_FREQ=8 sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 examples/cluster/slurm.sh
# Three minutes before the time limit SLURM sends SIGUSR1, and SIGTERM to a job that it preempts: the
# run saves and stops, and the job is queued again, which goes on from the last checkpoint.
set -euo pipefail
# SLURM runs a copy of this file
source "${SLURM_SUBMIT_DIR:?start this script with sbatch}/examples/cluster/common.sh"

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" # reads to the end
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

begin_on "$SLURM_NTASKS"
train_on srun --kill-on-bad-exit=1 || {
    scontrol requeue "$SLURM_JOB_ID"
    exit "$STOPPED"
}
end_run
