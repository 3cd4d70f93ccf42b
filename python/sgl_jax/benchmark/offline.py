"""A data set worked off by an engine in this process, all of it given at once.

throughputs             tokens or requests / duration, from giving the prompts to having all the answers
decode bandwidth share  (steps x weight bytes + sum over output tokens of context x KV bytes per token)
                        / duration / memory bandwidth
matmul share            2 x parameters per token x (uncached input + output tokens) / duration / matmul rate
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sgl_jax.benchmark.datasets import load_prompts
from sgl_jax.benchmark.datasets.framing import Framing
from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.engine_flags import engine_options, start_log
from sgl_jax.benchmark.errors import SOME_FAILED, BenchmarkError, say
from sgl_jax.benchmark.figures import Roofline, roofline_json
from sgl_jax.benchmark.records import Prompt
from sgl_jax.benchmark.roofline import ModelCost, decode_bandwidth_share, matmul_share
from sgl_jax.benchmark.serving_report import append_jsonl, check_writable, footer, heading, line, roofline_block
from sgl_jax.engine.engine import Engine
from sgl_jax.engine.generation import Conflict, EngineFailed
from sgl_jax.engine.messages import EngineInfo, MachineLimits, Stats
from sgl_jax.engine.native import sampling_params
from sgl_jax.request import InvalidParameter
from sgl_jax.server_args import ServerArgs
from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer

TOOL = "bench_offline_throughput"
_STATS_TIMEOUT_S = 5.0
_WARM_UP_REQUESTS, _WARM_UP_INPUT, _WARM_UP_OUTPUT = 16, 256, 16  # at most


_TRACED_PROMPTS = 16  # at most


def measure_offline(args: argparse.Namespace, server_args: ServerArgs) -> int:
    """Reads the data, starts an engine and runs. Returns the exit code; raises BenchmarkError."""
    start_log(server_args)
    if args.result_filename:
        check_writable(Path(args.result_filename), "--result-filename")
    if args.extra_request_body.get("n", 1) != 1:
        raise BenchmarkError(
            f"--extra-request-body has n {args.extra_request_body['n']}; one answer to a prompt is measured"
        )
    try:
        path = server_args.tokenizer_path or server_args.model_path
        tokenizer = load_tokenizer(path, server_args.chat_template, server_args.downloads)
        prompts = load_prompts(args, tokenizer, None, args.seed)  # before the model: a mistake should be said at once
        with Engine(**engine_options(server_args)) as engine:
            return run(args, engine, prompts)
    except (TokenizerError, EngineFailed) as error:
        raise BenchmarkError(str(error)) from error


def run(
    args: argparse.Namespace,
    engine: Engine,
    prompts: Sequence[Prompt],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Everything after the start. Returns the exit code."""
    sampling = {"temperature": 0.0, "ignore_eos": not args.disable_ignore_eos, **args.extra_request_body}
    offline = Offline(engine, prompts, sampling)
    if not args.skip_warmup:
        offline.warm_up()
    limits = offline.limits()
    found = offline.run(clock)
    info = engine.info
    roofline = None
    if limits is not None and found.output_tokens:
        cost = ModelCost(info.weight_bytes, info.kv_bytes_per_token, info.parameters_per_token)
        roofline = found.roofline(cost, limits)
    print(f"\n{block(record(found), args.backend)}")
    if roofline is not None:
        print(f"\n{roofline_block(roofline)}")
    if args.result_filename:
        settings = {
            "backend": args.backend,
            "model_path": info.model_path,
            "dtype": info.dtype,
            "dataset_name": args.dataset_name,
            "num_prompts": len(prompts),
            "seed": args.seed,
            "sampling_params": sampling,
        }
        shares = {} if roofline is None else roofline_json(roofline)
        append_jsonl(Path(args.result_filename), settings | record(found) | shares)
    if args.profile:
        engine.flush_cache()
        with jax.profiler.trace(folder := args.profile_output_dir or "profile_offline"):
            offline.generate(_TRACED_PROMPTS)
        print(f"\nTrace: {folder}")
    return SOME_FAILED if found.successful < len(prompts) else 0


@dataclass(frozen=True)
class OfflineRun:
    """What came of a run. Formulas at the top of this file."""

    successful: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int  # of the input, found in the prefix cache
    context_tokens: float  # summed over output tokens: its prompt and half of its answer
    steps: int
    last_gen_throughput: float | None  # over the last decode log interval; None when the run was shorter

    def roofline(self, cost: ModelCost, limits: MachineLimits) -> Roofline:
        rows = self.output_tokens / self.steps
        context = self.context_tokens / self.output_tokens
        computed = self.input_tokens - self.cached_tokens + self.output_tokens
        return Roofline(
            limits=limits,
            cost=cost,
            decode_rows=rows,
            decode_context=context,
            decode_bandwidth_share=decode_bandwidth_share(cost, limits, rows, context, self.duration_s / self.steps),
            matmul_share=matmul_share(cost, limits, computed, self.duration_s),
        )


class Offline:
    """An engine and a data set. `sampling` are the parameters of every request, beside its output length."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], sampling: Mapping[str, Any]):
        """Raises BenchmarkError when a prompt and its output are longer than a request may be."""
        self._engine = engine
        self._prompts = prompts
        try:
            each = [sampling_params({"max_new_tokens": prompt.output_len, **sampling})[0] for prompt in prompts]
        except InvalidParameter as error:
            raise BenchmarkError(f"--extra-request-body: {error}") from error
        self._params = each
        self._check_fits(engine.info)

    def warm_up(self) -> None:
        """A few drawn prompts, which are dropped from the cache again."""
        info = self._engine.info
        limit = min(info.context_length, info.max_total_tokens)
        output = min(_WARM_UP_OUTPUT, limit // 2)
        length = min(_WARM_UP_INPUT, limit - output)
        source = IdSource(info.vocab_size, self._engine.tokenizer, np.random.default_rng(0))
        ids = [source.ids(length) for _ in range(min(_WARM_UP_REQUESTS, info.max_running_requests))]
        before = self._engine.stats
        self._answers(input_ids=ids, sampling_params={"max_new_tokens": output, "ignore_eos": True})
        self._settled(before.generated_tokens + output * len(ids))
        self._engine.flush_cache()

    def limits(self) -> MachineLimits | None:
        """The machine's, measured now; None where that cannot be done, which is said."""
        try:
            return self._engine.measure_limits()
        except Conflict as error:
            say(TOOL, str(error))
            return None

    def run(self, clock: Callable[[], float] = time.perf_counter) -> OfflineRun:
        """`clock`, in seconds, is read before the prompts are given and after the last answer."""
        before = self._engine.stats
        start = clock()
        answers = self.generate(len(self._prompts))
        duration = clock() - start
        metas = [answer["meta_info"] for answer in answers if answer["meta_info"]["finish_reason"]["type"] != "abort"]
        output = sum(meta["completion_tokens"] for meta in metas)
        after = self._settled(before.generated_tokens + output)
        return OfflineRun(
            successful=len(metas),
            duration_s=duration,
            input_tokens=sum(meta["prompt_tokens"] for meta in metas),
            output_tokens=output,
            cached_tokens=sum(meta["cached_tokens"] for meta in metas),
            context_tokens=sum(
                meta["completion_tokens"] * (meta["prompt_tokens"] + meta["completion_tokens"] / 2) for meta in metas
            ),
            steps=after.steps - before.steps,
            last_gen_throughput=after.gen_throughput or None,
        )

    def generate(self, count: int) -> list[dict[str, Any]]:
        """The answers to the first `count` prompts: texts are encoded here, within what is timed."""
        prompts, params = [prompt.prompt for prompt in self._prompts[:count]], self._params[:count]
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) == len(prompts):
            return self._answers(prompt=texts, sampling_params=params)
        return self._answers(input_ids=[self._ids(prompt) for prompt in prompts], sampling_params=params)

    def _answers(self, **call: Any) -> list[dict[str, Any]]:
        try:
            return self._engine.generate(**call)
        except InvalidParameter as error:
            raise BenchmarkError(f"a request is refused: {error}") from error

    def _ids(self, prompt: Any) -> list[int]:
        tokenizer = self._engine.tokenizer
        match prompt:
            case str():
                return tokenizer.encode(prompt)
            case [int(), *_]:
                return prompt
        return tokenizer.encode(Framing(tokenizer).render(prompt))

    def _check_fits(self, info: EngineInfo) -> None:
        limit = min(info.context_length, info.max_total_tokens)
        sizes = [
            prompt.prompt_len + (params.max_tokens or 1)
            for prompt, params in zip(self._prompts, self._params, strict=True)
        ]
        if too_long := sum(size > limit for size in sizes):
            raise BenchmarkError(
                f"{too_long} of {len(sizes)} prompts and their outputs are longer than the {limit} tokens a request may "
                f"have (--context-length, --max-total-tokens), the longest {max(sizes)}; make them shorter"
            )

    def _settled(self, generated_tokens: int) -> Stats:
        """The engine's totals, when they count so many tokens: they come a moment after the answers."""
        deadline = time.monotonic() + _STATS_TIMEOUT_S
        while (stats := self._engine.stats).generated_tokens < generated_tokens or stats.num_running:
            if time.monotonic() > deadline:
                raise BenchmarkError(
                    f"the engine counts {stats.generated_tokens} generated tokens, its answers {generated_tokens}"
                )
            time.sleep(0.001)
        return stats


def record(run: OfflineRun) -> dict[str, Any]:
    """The figures under the names that scripts know, for a line of JSON."""
    return {
        "successful_requests": run.successful,
        "total_latency": run.duration_s,
        "total_input_tokens": run.input_tokens,
        "total_output_tokens": run.output_tokens,
        "total_cached_tokens": run.cached_tokens,
        "steps": run.steps,
        "last_gen_throughput": run.last_gen_throughput,
        "request_throughput": run.successful / run.duration_s,
        "input_throughput": run.input_tokens / run.duration_s,
        "output_throughput": run.output_tokens / run.duration_s,
        "total_throughput": (run.input_tokens + run.output_tokens) / run.duration_s,
    }


_LABELS = {
    "successful_requests": "Successful requests",
    "total_latency": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_output_tokens": "Total generated tokens",
    "total_cached_tokens": "Total cached tokens",
    "last_gen_throughput": "Last generation throughput (tok/s)",
    "request_throughput": "Request throughput (req/s)",
    "input_throughput": "Input token throughput (tok/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "total_throughput": "Total token throughput (tok/s)",
}


def block(found: Mapping[str, Any], backend: str) -> str:
    """A `record` for people. Labels, order and widths are those that existing parsers of such blocks know."""
    lines = [line(label, found[name]) for name, label in _LABELS.items()]
    return "\n".join([heading("Offline Throughput Benchmark Result"), line("Backend", backend), *lines, footer()])
