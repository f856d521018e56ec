"""Real processes with torch.distributed (gloo) for the tests. Every wait has its end."""

import datetime
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import adagrad_kernels as ak

TIMEOUT = 120  # seconds; a hang is a failure


def run(scenario: Callable[[int, int], dict[str, Any]], world: int, folder: Path) -> list[Any]:
    """What `scenario(rank, world)` returns on each of `world` processes."""
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_process, args=(scenario, rank, world, folder), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + TIMEOUT
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode for p in processes):
                deadline = min(deadline, time.monotonic() + 5)  # the others may say why, too
            time.sleep(0.02)
        codes = [p.exitcode for p in processes]
    finally:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert codes == [0] * world, f"exit codes {codes} (None: hung)\n" + "\n".join(errors)
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]


def torchrun(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node 2 -m adagrad_kernels …`; the port is the system's choice."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ak.__file__).parents[1])}
    command = [*launcher, "--nproc-per-node", "2", "-m", "adagrad_kernels", *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends the processes that it has started
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _process(
    scenario: Callable[[int, int], dict[str, Any]], rank: int, world: int, folder: Path
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; accelerate asks for it
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=TIMEOUT / 2),
        )
        torch.save(scenario(rank, world), folder / f"result{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    # Without the interpreter's own end, in which threads of gloo have aborted a process once
    # ("terminate called without an active exception"), with all results written.
    os._exit(0)
