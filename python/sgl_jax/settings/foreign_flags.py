"""Flags of vLLM and SGLang that are not ours, with an answer each for error messages and docs/features/coming_from.md.

Names are patterns: `*` stands for any text.
"""

from collections.abc import Iterable

from sgl_jax.settings.not_built import NOT_BUILT, Feature

RENAMED = {
    "--max-model-len --max-seq-len": "--context-length",
    "--gpu-memory-utilization": "--mem-fraction-static",
    "--max-num-seqs": "--max-running-requests",
    "--max-num-batched-tokens": "--chunked-prefill-size",
    "--block-size": "--page-size",
    "--no-enable-prefix-caching": "--disable-radix-cache",
    "--no-async-scheduling": "--disable-overlap-schedule",
    "--scheduling-policy": "--schedule-policy",
    "--tokenizer": "--tokenizer-path",
    "--seed": "--random-seed",
    "-tp": "--tp-size",
    "-dp": "--dp-size",
    "-ep --enable-expert-parallel": "--ep-size",
    "--load-balance-method": "--dp-schedule-policy",
    "--master-addr --nccl-init-addr": "--dist-init-addr",
    "--log-level-http --uvicorn-log-level": "--log-level",
    "-sc": "--speculative-config",
    "--guided-decoding-backend": "--grammar-backend",
    "--spec-method": "--speculative-algorithm",
    "--spec-model --speculative-model": "--speculative-draft-model-path",
    "--spec-tokens --num-speculative-tokens": "--speculative-num-steps",
    "--ngram-prompt-lookup-min": "--speculative-ngram-min-match-window-size",
    "--ngram-prompt-lookup-max": "--speculative-ngram-max-match-window-size",
}

OTHERWISE = {
    "--enable-metrics*": "/metrics is always there",
    "--enable-cache-report --enable-prompt-tokens-details": "answers always say how many tokens were cached",
    "--enable-auto-tool-choice": "tools are always taken; --tool-call-parser says how the model calls them",
    "--enable-priority-scheduling": "--schedule-policy priority is that",
    "--priority-scheduling-preemption-threshold": "any request of a lower priority makes way",
    "--enable-reasoning": "thoughts are always split off; --reasoning-parser says how the model writes them",
    "--enable-prefix-caching": "prefixes are shared unless --disable-radix-cache is given",
    "--enable-chunked-prefill": "prompts are always computed in chunks, of --chunked-prefill-size",
    "--async-scheduling": "steps overlap unless --disable-overlap-schedule is given",
    "--disable-precompile --precompile-* --enforce-eager --disable-cuda-graph* --cuda-graph-* --enable-torch-compile "
    "--compilation-config": "programs are compiled before the server is ready, after it with --skip-server-warmup, and kept in "
    "--compilation-cache-dir",
    "--enable-dp-attention": "--dp-size is that, and --tp-size then counts the devices of one group",
    "--headless": "the machine with --node-rank 0 alone has an HTTP server",
    "--num-gpu-blocks-override": "--max-total-tokens says it in tokens",
    "--schedule-conservativeness": "when the KV cache is full, requests are preempted; --max-running-requests limits them",
    "--quantization-param-path --quantization-config --modelopt-*": "the files of the checkpoint say how it is quantised",
    "--moe-backend --sampling-backend": "it is chosen for the device",
    "--model-impl": "models run on our own code only",
    "--tokenizer-mode --tokenizer-backend": "the model's files decide",
    "--generation-config --override-generation-config --preferred-sampling-params": "what a request leaves out has the "
    "defaults of docs/features/sampling.md, for every model",
    "--enable-deterministic-*": "a request's seed makes its draws repeatable",
    "--max-logprobs": "a request gets 20 at most",
    "--allow-credentials --allowed-methods --allowed-headers": "--allowed-origins alone decides which pages may call",
    "--log-requests* --enable-log-requests --disable-log-requests --max-log-len": "of a request only one line is logged, "
    "with its path, status, id, tokens and seconds",
    "--disable-log-stats": "--log-level and --decode-log-interval say what is logged",
    "--sleep-on-idle": "an idle engine always sleeps",
    "--speculative-ngram-*-bfs-breadth --speculative-ngram-match-type --speculative-ngram-max-trie-depth "
    "--speculative-ngram-branch-length --speculative-ngram-capacity --speculative-ngram-external-*": "there is no trie: drafts "
    "follow the longest n-gram, up to --speculative-ngram-max-match-window-size, that a request's own tokens repeat",
    "--speculative-use-rejection-sampling --speculative-use-block-verification --spec-decoding-acceptance-method": "a draft is "
    "accepted where it is the token that is sampled, so the output is the same without drafts",
    "--speculative-adaptive*": "drafting pauses by itself while too few drafts are accepted",
    "--structured-outputs-config --constrained-json-* --guided-decoding-disable-*": "white space in JSON is always bounded, "
    "and a keyword of a schema that cannot be enforced is always refused",
    "--speculative-token-map": "the draft model's files say which tokens it can draft",
    "--speculative-draft-load-format --speculative-draft-kv-cache-dtype --speculative-draft-attention-backend "
    "--speculative-attention-mode --speculative-moe-*": "the draft model runs in the model's own step, as the model does",
    "--lora-backend --max-lora-chunk-size": "adapters are two matrix products of the step, on every device",
    "--lora-eviction-policy": "the adapter used longest ago leaves the devices first",
    "--enable-lora-overlap-loading": "adapters are always loaded while requests run",
    "--lora-strict-loading": "an adapter with a tensor that finds no place is always refused",
    "--lora-drain-wait-threshold": "a request whose adapter waits for a slot lets a bounded number of others pass",
    "--lora-dtype": "adapters have the type of activations, --dtype",
    "--fully-sharded-loras": "an adapter is divided over the devices as the matrices are that it changes",
    "--experts-shared-outer-loras --lora-use-virtual-experts --enable-mixed-moe-lora-format": "adapters of experts are refused",
    "--enable-lora-bias --lora-extra-vocab-size --lora-vocab-padding-size --long-lora-scaling-factors": "an adapter with "
    "biases, new tokens or a longer context is refused when it is loaded",
    "--default-mm-loras --enable-tower-connector-lora": "adapters change the language model only",
    "--specialize-active-lora": "one program serves any number of adapters",
    "--revision --code-revision --tokenizer-revision --speculative-draft-model-revision": "a hub model is taken in its newest revision; give a folder with "
    "another one",
    "--json-model-override-args --hf-overrides": "change config.json in a folder of your own",
}


def elsewhere(features: Iterable[Feature] = NOT_BUILT) -> dict[str, str]:
    """Return the ends of the sentence "… is not a flag: …", by patterns of flags."""
    said = {names: f"here it is {ours}" for names, ours in RENAMED.items()} | OTHERWISE
    found = {name: text for names, text in said.items() for name in names.split()}
    return found | {pattern: f"{each.name} not built" for each in features for pattern in each.flags.split()}


ELSEWHERE = elsewhere()
