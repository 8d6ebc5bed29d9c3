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

from support.distributed import checks

SECONDS = 180  # a process that waits longer for another one fails


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("suite")
    parser.add_argument("names", nargs="*", help="checks; all by default")
    parser.add_argument("--out", type=Path, help="folder for the results; printed without it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = datetime.timedelta(seconds=SECONDS)
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    results = {}
    available = checks(arguments.suite)
    for name in arguments.names or available:
        torch.manual_seed(0)
        began = time.perf_counter()
        # a group for each check: after a failure in one process, the other one's collectives fail at once
        own = dist.PrefixStore(name, store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=processes, timeout=timeout)
        try:
            available[name]()
            results[name] = ""
        except Exception:  # noqa: BLE001 - reported
            results[name] = traceback.format_exc()
        finally:
            torch._dynamo.reset()
            dist.destroy_process_group()
        if arguments.out is None and (rank == 0 or results[name]):
            print(f"{time.perf_counter() - began:5.1f} s rank {rank} {name} {results[name] or 'ok'}", flush=True)
    store.set(f"done {rank}", "")
    store.wait([f"done {each}" for each in range(processes)])  # none leaves while another still connects
    if arguments.out is not None:
        (arguments.out / f"rank{rank}.json").write_text(json.dumps(results))


main()
