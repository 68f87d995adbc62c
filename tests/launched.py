"""The command line in several processes, begun by `torchrun` as a user begins them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

__all__ = ["begun", "begun_on_nodes", "kill_second"]

ROOT = Path(__file__).parents[1]


def begun(words, count=2, launch=("--standalone",), module="tmerge", **environment):
    """The processes of a run of `module`, begun: the launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *launch, "--nproc-per-node", str(count)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*launcher, "-m", module, *words],
        cwd=ROOT,
        env=os.environ | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun_on_nodes(words, nodes=2):
    """The launchers of a run on several machines, a process each: all of them are this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes", str(nodes), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [begun(words, 1, [*meet, "--node-rank", str(node)]) for node in range(nodes)]


def kill_second(launcher):
    """End the process of rank 1 with no word."""
    second = next(
        child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if child.environ().get("RANK") == "1" and "-m" in child.cmdline()
    )
    second.send_signal(signal.SIGKILL)
