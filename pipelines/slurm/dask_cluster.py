"""Stage one on Slurm by dask-jobqueue: each job is one worker with one GPU.

pip install 'logitcache[cluster]' dask-jobqueue
python pipelines/slurm/dask_cluster.py pipelines/imagenet/precompute.yaml --jobs 8 --queue gpu

Run it where it may stay: it is client and scheduler. Killed, the same command continues.
"""

import argparse

from dask_jobqueue import SLURMCluster

from logitcache.config.recipe import load_recipe
from logitcache.runtime.console import configure
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute

CPUS = 8
"""Of each job: for the processes that render, and for torch where there is no GPU."""


def main() -> None:
    """Ask Slurm for workers, and let them fill the cache as they come."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--queue")
    parser.add_argument("--walltime", default="04:00:00")
    arguments = parser.parse_args()
    configure()
    cluster = SLURMCluster(
        queue=arguments.queue,
        walltime=arguments.walltime,
        processes=1,
        cores=1,  # Dask's threads: a worker has one device
        job_cpu=CPUS,
        memory="32GB",
        job_extra_directives=["--gres=gpu:1"],
        nanny=False,  # it would let the worker start no processes that render
        job_script_prologue=[f"export OMP_NUM_THREADS={CPUS}"],
        worker_extra_args=["--resources", "GPU=1"],
    )
    with cluster:
        cluster.scale(jobs=arguments.jobs)
        recipe = load_recipe(arguments.recipe, PrecomputeRecipe)
        print(precompute(recipe, scheduler=cluster.scheduler_address))


if __name__ == "__main__":
    main()
