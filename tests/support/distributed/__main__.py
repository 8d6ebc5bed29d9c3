"""One of the processes of a launch (``support.distributed.launch``)."""

import argparse
import datetime
import json
import os
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from support.distributed import Check, checks

TIMEOUT = datetime.timedelta(seconds=180)  # a process that waits longer for another one fails


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suites", nargs="+")
    parser.add_argument("--only", nargs="+", help="names of checks; all by default")
    parser.add_argument("--out", type=Path, help="folder for the results; printed without it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for suite in arguments.suites:
        results[suite] = {}
        for name, check in checks(suite).items():
            if arguments.only is not None and name not in arguments.only:
                continue
            began = time.perf_counter()
            # a group for each check: after a failure in one process, the other one's collectives fail at once
            own = dist.PrefixStore(f"{suite} {name}", store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=processes, timeout=TIMEOUT)
            failure = results[suite][name] = failure_of(check)
            dist.destroy_process_group()
            if arguments.out is None and (rank == 0 or failure):
                print(f"{time.perf_counter() - began:5.1f} s rank {rank} {name} {failure or 'ok'}", flush=True)
    store.set(f"done {rank}", "")
    store.wait([f"done {each}" for each in range(processes)])  # none leaves while another still connects
    if arguments.out is not None:
        (arguments.out / f"rank{rank}.json").write_text(json.dumps(results))


def failure_of(check: Check) -> str:
    """The traceback of a check's failure, or an empty text."""
    torch.manual_seed(0)
    try:
        check()
    except Exception:  # noqa: BLE001 - reported
        return traceback.format_exc()
    finally:
        torch._dynamo.reset()
    return ""


main()
