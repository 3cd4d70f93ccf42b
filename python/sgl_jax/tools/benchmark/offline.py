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
from typing import Any

import jax
import numpy as np

from sgl_jax.engine.engine import Engine
from sgl_jax.engine.generation import EngineFailed
from sgl_jax.engine.messages import EngineInfo, Stats
from sgl_jax.engine.native_params import sampling_params
from sgl_jax.request import InvalidParameter
from sgl_jax.settings.server_args import FLAGS, SERVER, ServerArgs
from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer
from sgl_jax.tools.benchmark.batch_arguments import start_log
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.datasets.source import Framing, IdSource
from sgl_jax.tools.benchmark.machine_limits import limits_of
from sgl_jax.tools.benchmark.records import Prompt
from sgl_jax.tools.benchmark.roofline import MachineLimits, ModelCost, Roofline
from sgl_jax.tools.benchmark.serving_report import append_jsonl, block, check_writable, labelled, shares_block
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, BenchmarkError, say

TOOL = "bench_offline_throughput"
_STATS_TIMEOUT_S = 5.0
_WARM_UP_REQUESTS, _WARM_UP_INPUT, _WARM_UP_OUTPUT = 16, 256, 16  # at most
_TRACED_PROMPTS = 16  # at most


def measure_offline(args: argparse.Namespace, server_args: ServerArgs) -> int:
    """Reads the data, starts an engine and runs. Returns the exit code; raises BenchmarkError."""
    start_log(server_args)
    check_writable(args.result_filename, "--result-filename")
    if (n := args.extra_request_body.get("n", 1)) != 1:
        raise BenchmarkError(f"--extra-request-body has n {n}; one answer to a prompt is measured")
    try:
        path = server_args.tokenizer_path or server_args.model_path
        tokenizer = load_tokenizer(path, server_args.chat_template, server_args.downloads)
        prompts = load_prompts(args, tokenizer, None, args.seed)  # before the model: a mistake should be said at once
        with Engine(**engine_options(server_args)) as engine:
            return run(args, engine, prompts)
    except (TokenizerError, EngineFailed) as error:
        raise BenchmarkError(str(error)) from error


def engine_options(server_args: ServerArgs) -> dict[str, Any]:
    """Arguments for `sgl_jax.Engine`: the flags that differ from their defaults, without the HTTP server's."""
    values = {each: getattr(server_args, each.name) for each in FLAGS if each.about.group != SERVER}
    return {each.name: value for each, value in values.items() if not each.is_default(value)}


def run(
    args: argparse.Namespace,
    engine: Engine,
    prompts: Sequence[Prompt],
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[EngineInfo], MachineLimits] = limits_of,
) -> int:
    """Everything after the start. `clock`, in seconds, is read before the prompts are given and after the last answer.
    Returns the exit code."""
    sampling = {"temperature": 0.0, "ignore_eos": not args.disable_ignore_eos, **args.extra_request_body}
    offline = Offline(engine, prompts, sampling)
    if not args.skip_warmup:
        offline.warm_up()
    roofline = offline.roofline(measure)
    found, shares = offline.run(clock, roofline)
    print("\n" + block("Offline Throughput Benchmark Result", {"Backend": args.backend} | labelled(found)))
    if shares:
        print("\n" + shares_block(shares))
    settings = {
        "backend": args.backend,
        "model_path": engine.info.model_path,
        "dtype": engine.info.dtype,
        "dataset_name": args.dataset_name,
        "num_prompts": len(prompts),
        "seed": args.seed,
        "sampling_params": sampling,
    }
    append_jsonl(args.result_filename, settings | found | shares)
    if args.profile:
        engine.flush_cache()
        with jax.profiler.trace(folder := args.profile_output_dir or "profile_offline"):
            offline.generate(_TRACED_PROMPTS)
        print(f"\nTrace: {folder}")
    return SOME_FAILED if found["successful_requests"] < len(prompts) else 0


class Offline:
    """An engine and a data set. `sampling` are the parameters of every request, beside its output length."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], sampling: Mapping[str, Any]):
        """Raises BenchmarkError when a prompt and its output are longer than a request may be."""
        self._engine = engine
        self._prompts = prompts
        try:
            self._params = [sampling_params({"max_new_tokens": each.output_len, **sampling}).params for each in prompts]
        except InvalidParameter as error:
            raise BenchmarkError(f"--extra-request-body: {error}") from error
        self._limit = min(engine.info.context_length, engine.info.max_total_tokens)
        sizes = [each.prompt_len + (of.max_tokens or 1) for each, of in zip(prompts, self._params, strict=True)]
        if too_long := sum(size > self._limit for size in sizes):
            raise BenchmarkError(
                f"{too_long} of {len(sizes)} prompts and their outputs are longer than the {self._limit} tokens a "
                f"request may have (--context-length, --max-total-tokens), the longest {max(sizes)}; make them shorter"
            )

    def warm_up(self) -> None:
        """A few drawn prompts, which are dropped from the cache again."""
        info = self._engine.info
        output = min(_WARM_UP_OUTPUT, self._limit // 2)
        length = min(_WARM_UP_INPUT, self._limit - output)
        source = IdSource(info.vocab_size, self._engine.tokenizer, np.random.default_rng(0))
        ids = [source.ids(length) for _ in range(min(_WARM_UP_REQUESTS, info.max_running_requests))]
        before = self._engine.stats
        self._answers(input_ids=ids, sampling_params={"max_new_tokens": output, "ignore_eos": True})
        self._settled(before.generated_tokens + output * len(ids))
        self._engine.flush_cache()

    def roofline(self, measure: Callable[[EngineInfo], MachineLimits]) -> Roofline | None:
        """Measured now; None where that cannot be done, which is said."""
        try:
            return Roofline(measure(self._engine.info), ModelCost.of(self._engine.info))
        except ValueError as error:
            say(TOOL, str(error))
            return None

    def run(self, clock: Callable[[], float], roofline: Roofline | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The figures and the shares (none without a roofline or tokens), under the names that scripts know."""
        before = self._engine.stats
        start = clock()
        answers = self.generate(len(self._prompts))
        duration = clock() - start
        metas = [answer["meta_info"] for answer in answers if answer["meta_info"]["finish_reason"]["type"] != "abort"]
        inputs, outputs, cached = (
            sum(meta[f"{which}_tokens"] for meta in metas) for which in ("prompt", "completion", "cached")
        )
        after = self._settled(before.generated_tokens + outputs)
        steps = after.steps - before.steps
        found = {
            "successful_requests": len(metas),
            "total_latency": duration,
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "total_cached_tokens": cached,
            "steps": steps,
            "last_gen_throughput": after.gen_throughput or None,  # over a log interval, which the run may not reach
            "request_throughput": len(metas) / duration,
            "input_throughput": inputs / duration,
            "output_throughput": outputs / duration,
            "total_throughput": (inputs + outputs) / duration,
        }
        if roofline is None or not outputs:
            return found, {}
        # summed over output tokens: its prompt and half of its answer
        context = sum(m["completion_tokens"] * (m["prompt_tokens"] + m["completion_tokens"] / 2) for m in metas)
        computed = inputs - cached + outputs
        return found, roofline.run_shares(outputs / steps, context / outputs, duration / steps, computed, duration)

    def generate(self, count: int) -> list[dict[str, Any]]:
        """The answers to the first `count` prompts: texts are encoded here, within what is timed."""
        prompts, params = [prompt.prompt for prompt in self._prompts[:count]], self._params[:count]
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) == len(prompts):
            return self._answers(prompt=texts, sampling_params=params)
        ids = Framing(self._engine.tokenizer).ids
        return self._answers(input_ids=[ids(prompt) for prompt in prompts], sampling_params=params)

    def _answers(self, **call: Any) -> list[dict[str, Any]]:
        try:
            answers: Any = self._engine.generate(**call)  # of a list of prompts, a list
            return answers
        except InvalidParameter as error:
            raise BenchmarkError(f"a request is refused: {error}") from error

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
