"""Two processes with four devices each are one engine: its tokens, what it refuses, and how it ends."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from two_hosts import PATIENCE_S, SIZES, flags_of, free_ports, hosts, on_one_device, prompts

import sgl_jax
from checkpoints import DATA
from messages import says
from quick_compiles import XLA_FLAG
from sgl_jax.engine.generation import EngineFailed
from sgl_jax.models.checkpoint import open_checkpoint

TOKEN_OF_LOGS = re.compile(r"--dist-token (\S+)")
NEW_TOKENS = 32
LORA = DATA / "lora" / "qwen3_moe"
PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000  # Linux
# Eight requests do not fit: rows are preempted.
TIGHT = flags_of(**{k: v for k, v in SIZES.items() if k != "dtype"}, page_size=4, max_total_tokens=256)

pytestmark = pytest.mark.timeout(600)


def test_two_processes_answer_as_one_device_and_end_with_a_lost_one(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """They speculate, which changes no token, and take adapters, of which each reads its own files."""
    model, ngrams = (
        checkpoint("lora-qwen3_moe"),
        flags_of(speculative_algorithm="NGRAM", speculative_num_draft_tokens=3),
    )
    adapter = flags_of(lora_paths=f"first={LORA / 'r8-attn'}", max_loras_per_batch=1, max_lora_rank=16)
    with hosts(tmp_path, model, 2, 4, "--tp-size", "4", "--dp-size", "2", *TIGHT, *ngrams, *adapter) as all_hosts:
        leader = all_hosts.lead()
        expected = on_one_device(model, NEW_TOKENS)  # while it starts

        # Hosts that differ are refused and told why, and host 0 goes on waiting.
        refused = [all_hosts.join(1, "--page-size", "8"), all_hosts.join(1, token="another")]
        for host, reason in zip(refused, ("--page-size … 8 on host 1 … 4 on host 0", "tokens differ"), strict=True):
            assert host.wait() == 1
            assert says(host.text(), f"sgl_jax: error: host 0 ({all_hosts.address}) refuses … {reason}")
        assert says(leader.text(), f"1 of 2 hosts … {all_hosts.address} … node rank 1")
        assert leader.process.poll() is None

        follower = all_hosts.join(1, "--log-level", "debug")
        all_hosts.wait_ready()
        for host in (leader, follower):
            assert TOKEN_OF_LOGS.findall(host.text()) == ["'***'"]

        first = all_hosts.ask(prompts(), max_new_tokens=NEW_TOKENS).json()
        assert [answer["output_ids"] for answer in first] == expected
        assert all_hosts.metric("preemptions_total") > 0
        again = all_hosts.ask(prompts(), max_new_tokens=NEW_TOKENS).json()
        assert [answer["output_ids"] for answer in again] == expected
        assert sum(answer["meta_info"]["cached_tokens"] for answer in again) > 0
        assert all_hosts.metric("compiles_after_ready_total") == 0

        load = {"lora_name": "second", "lora_path": str(LORA / "r16-rslora-attn")}
        for body, status in ((load, 200), (load | {"lora_name": "third", "lora_path": str(LORA)}, 400)):
            answer = httpx.post(f"{all_hosts.url}/v1/load_lora_adapter", json=body, timeout=PATIENCE_S)
            assert answer.status_code == status, answer.text
        for case in json.loads((LORA / "mixed.json").read_text())["cases"]:
            ids = {each["adapter"]: each["greedy_ids"] for each in case["requests"]}
            names = {"first": ids["r8-attn"], "second": ids["r16-rslora-attn"], None: ids[None]}
            answers_of = all_hosts.ask([case["prompt_ids"]] * 3, lora_path=[*names], max_new_tokens=12).json()
            assert [each["output_ids"] for each in answers_of] == [*names.values()]
        assert all_hosts.metric("lora_adapter_loads_total") > 2

        # Penalties and logit bias go ahead of a step in programs of their own.
        params = {"max_new_tokens": 8, "repetition_penalty": 1.3, "logit_bias": {"17": 50.0}}
        assert all_hosts.ask(prompts()[0], **params).json()["output_ids"][0] == 17

        answers: list[httpx.Response] = []
        asking = [
            threading.Thread(target=lambda ids=ids: answers.append(all_hosts.ask(ids, max_new_tokens=60)))
            for ids in prompts()
        ]
        for thread in asking:
            thread.start()
        while all_hosts.metric("num_requests_running") == 0:
            pass
        follower.process.kill()
        for thread in asking:
            thread.join(30)
        assert len(answers) == len(asking)
        lost = [answer.json()["error"]["message"] for answer in answers if answer.status_code == 500]
        assert lost
        assert all(re.search(r"host 1 \(127\.0\.0\.1:\d+\) closed", message) for message in lost)
        assert leader.process.wait(30) == 1
        assert re.search(r"sgl_jax: error: host 1 \(127\.0\.0\.1:\d+\) closed", leader.text())


def test_each_process_reads_its_shard_of_the_files(stories260k: Path) -> None:
    port = str(free_ports())
    environment = os.environ | {"XLA_FLAGS": f"{XLA_FLAG} --xla_force_host_platform_device_count=2"}
    script = str(Path(__file__).with_name("loading.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(stories260k), rank, port], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    printed = [process.communicate(timeout=PATIENCE_S)[0].split()[-2:] for process in processes]
    tensors = open_checkpoint(str(stories260k)).tensors.values()
    matrices, vectors = (sum(t.nbytes for t in tensors if len(t.shape) == n) for n in (2, 1))
    # Every matrix is divided by four; norms are whole on each of the two devices, and read once.
    assert [[int(n) for n in each] for each in printed] == [[matrices // 2 + vectors, matrices // 2 + 2 * vectors]] * 2


FEW = {"max_running_requests": 1, "chunked_prefill_size": 1, "context_length": 32, "max_total_tokens": 64}
SMALL = flags_of(**FEW)


def stop_engine_thread(process: subprocess.Popen[bytes]) -> None:
    """Stop the main thread of a process of ours, and no other, as a call to the device does that never returns."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if ptrace(request, process.pid, None, None) != 0:
            pytest.skip(f"this machine allows no ptrace: {os.strerror(ctypes.get_errno())}")
    os.waitpid(process.pid, WALL)  # or it would be taken for the end of the process


def test_a_host_whose_engine_is_stuck_is_named_and_ends_all(stories260k: Path, tmp_path: Path) -> None:
    """Its other threads say that it lives."""
    with hosts(tmp_path, stories260k, 2, 1, "--tp-size", "2", "--watchdog-timeout", "8", *SMALL) as all_hosts:
        leader = all_hosts.lead()
        follower = all_hosts.join(1)
        all_hosts.wait_ready()
        assert len(all_hosts.ask([5, 6, 7], max_new_tokens=4).json()["output_ids"]) == 4
        stop_engine_thread(follower.process)
        answer = all_hosts.ask([5, 6, 7], max_new_tokens=20)
        assert answer.status_code == 500
        assert says(answer.json()["error"]["message"], "host 1 … programs … --watchdog-timeout 8")
        assert leader.wait() == 1
        assert says(leader.text(), "sgl_jax: error: host 1 … programs … --watchdog-timeout 8")
        wait_gone(follower.process.pid)


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_first_ends_the_others(stories260k: Path, tmp_path: Path) -> None:
    """Their KV has eight bits, with scales that both measure."""
    sizes = FEW | {"kv_cache_dtype": "int8"}
    with hosts(tmp_path, stories260k, 2, 1, "--tp-size", "2", *flags_of(**sizes)) as all_hosts:
        all_hosts.lead()
        follower = all_hosts.join(1)
        with sgl_jax.Engine(
            model_path=str(stories260k), device="cpu", dtype="float32", **sizes
        ) as engine:  # while they start
            greedy = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 24}
            expected = engine.generate(input_ids=[5, 6, 7], sampling_params=greedy)["output_ids"]
        all_hosts.wait_ready()
        assert all_hosts.ask([5, 6, 7], max_new_tokens=24).json()["output_ids"] == expected
        for host in all_hosts.all:
            assert says(host.text(), "KV cache … int8 … measured on 256 random tokens")
        all_hosts.leader.process.send_signal(signal.SIGTERM)
        assert all_hosts.leader.wait() == 0
        assert follower.wait() == 0
        assert "Host 0 " in follower.text()


def test_start_up_names_the_missing_hosts_and_gives_up(stories260k: Path, tmp_path: Path) -> None:
    with hosts(tmp_path, stories260k, 4, 1, "--tp-size", "4") as all_hosts:
        leaver, follower = all_hosts.join(1), all_hosts.join(2)
        for host in (leaver, follower):
            host.wait_for(f"host 0 at {all_hosts.address}: Connection refused")
        leader = all_hosts.lead("--dist-timeout", "20")
        leader.wait_for("host 1 (127.0.0.1")
        leader.wait_for("host 2 (127.0.0.1")
        leaver.wait_for(f"host 0 at {all_hosts.address} as node rank 1")
        leaver.process.send_signal(signal.SIGTERM)
        assert leaver.wait() == 0
        assert "SIGTERM" in leaver.text()
        leader.wait_for("SIGTERM")
        line = f"--dist-timeout … 2 of 4 hosts … {all_hosts.address} … node ranks 1, 3"
        assert leader.wait() == 1
        assert says(leader.text(), f"sgl_jax: error: … {line}")
        assert follower.wait() == 1
        assert says(follower.text(), f"sgl_jax: error: host 0 ({all_hosts.address}) ended … {line}")


def test_an_engine_in_a_program_is_on_one_machine(stories260k: Path) -> None:
    with pytest.raises(EngineFailed, match=r"--nnodes .*2.*launch_server"):
        sgl_jax.Engine(model_path=str(stories260k), nnodes=2, tp_size=2, dist_init_addr="127.0.0.1:1")
