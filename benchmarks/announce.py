"""Measure the engine thread's time to announce a step to other hosts: its vector over loopback TCP, with the receivers in
processes of their own.

    python benchmarks/announce.py

Prints, for 1, 3 and 7 receivers, the median and the 90th percentile of 500 announcements, in us.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import numpy as np

from sgl_jax.multihost.address import Address
from sgl_jax.multihost.follower import Follower, connect
from sgl_jax.multihost.leader import Leader
from sgl_jax.multihost.wire import Identity
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.layout import PlanLayout

IDENTITY = Identity({}, {}, {})
ROWS = 256
COUNT = 500


def receive(port: int, rank: int) -> None:
    follower = Follower(connect(Address("127.0.0.1", port), rank, IDENTITY, "", 60), sys.exit)
    follower.wait_start()
    for _ in follower.runs():
        pass
    follower.close()


def measure(num_receivers: int) -> dict[str, float]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    receivers = [
        subprocess.Popen([sys.executable, __file__, str(port), str(rank + 1)]) for rank in range(num_receivers)
    ]
    leader = Leader(Address("127.0.0.1", port), num_receivers + 1, IDENTITY, "", sys.exit)
    leader.gather(60)
    vector = np.arange(PlanLayout(Bucket(ROWS, ROWS), 16, ROWS).size, dtype=np.int32)
    times = []
    for _ in range(COUNT):
        time.sleep(0.002)  # as between steps
        start = time.perf_counter()
        leader.announce("tokens=256 rows=256", vector)
        times.append(time.perf_counter() - start)
    leader.close()
    for receiver in receivers:
        receiver.wait()
    median, p90 = np.percentile(times, [50, 90]) * 1e6
    return {"receivers": num_receivers, "bytes": vector.nbytes, "median_us": round(median), "p90_us": round(p90)}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        receive(int(sys.argv[1]), int(sys.argv[2]))
    else:
        for number in (1, 3, 7):
            print(json.dumps(measure(number)), flush=True)
