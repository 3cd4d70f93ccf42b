"""Features that are not built, and everything by which a user may ask for one.

The server's flags, hints about other engines' flags, the request bodies and the documentation read this table: when a
feature is built, its row is deleted here.
"""

import types
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Feature(NamedTuple):
    name: str  # with its verb: "… not built" completes the sentence
    flags: str = ""  # patterns, `*` for any text: other engines' flags
    fields: str = ""  # request fields, and values of `type` and its like, that are refused with the feature's name
    paths: str = ""  # other engines' and OpenAI's, each with all behind it
    null: Mapping[str, str] = types.MappingProxyType({})  # request body -> fields that may only be null
    off: Mapping[str, str] = types.MappingProxyType({})  # request body -> fields with a value that means "off"


_OF_VECTORS = ("EmbeddingRequest", "ClassifyRequest", "PoolingRequest", "RerankRequest", "ScoreRequest")  # bodies

NOT_BUILT = (
    Feature("tools of other kinds than functions are", flags="--tool-server --tool-parser-plugin", fields="custom mcp"),
    Feature("reasoning parsers of your own are", flags="--reasoning-parser-plugin"),
    Feature(
        "OpenAI's older form of tool calls is",
        fields="functions function_call",
        null={"Message": "function_call"},
        off={"ChatCompletionRequest": "functions function_call"},
    ),
    Feature("drafting all tokens at once (DFlash, DSpark) is", flags="--speculative-dflash-* --speculative-dspark-*"),
    Feature("adapters sent as tensors are", paths="/load_lora_adapter_from_tensors"),
    Feature(
        "images, audio and video are",
        flags="--multimodal --enable-multimodal --limit-mm-per-prompt --mm-*",
        fields="image_url image_data input_audio audio audio_data video_url video_data modalities mm_processor_kwargs",
        paths="/v1/audio /v1/images /v1/videos",
        null={
            "GenerateRequest": "image_data audio_data video_data modalities",
            "ChatCompletionRequest": "audio",
            "Message": "audio",
            "EncodeBody": "image_data audio_data video_data",
            **dict.fromkeys(_OF_VECTORS, "mm_processor_kwargs"),
        },
        off={"ChatCompletionRequest": "modalities"},
    ),
    Feature(
        "vectors of single tokens are",
        flags="--runner --convert --pooler-config",
    ),
    Feature("Ollama's API is", paths="/api"),
    Feature("OpenAI's files, batches and assistants are", paths="/v1/files /v1/batches /v1/assistants /v1/threads"),
    Feature(
        "a KV cache outside the devices' memory is",
        flags="--enable-hierarchical-cache --hicache-* --cpu-offload-gb --swap-space --kv-offloading-*",
    ),
    Feature(
        "prefill and decode on engines of their own are",
        flags="--disaggregation-* --pd-* --kv-transfer-config",
        fields="bootstrap_host bootstrap_port bootstrap_room kv_transfer_params",
        null={"GenerateRequest": "bootstrap_host bootstrap_port bootstrap_room"},
    ),
    Feature("pipeline parallelism is", flags="-pp --pp --pp-size --pipeline-parallel-size"),
    Feature("a server without a tokenizer is", flags="--skip-tokenizer-init"),
    Feature(
        "cutting prompts that are too long is",
        flags="--allow-auto-truncate",
        fields="truncate_prompt_tokens",
        null={"RerankRequest": "truncate_prompt_tokens", "ScoreRequest": "truncate_prompt_tokens"},
    ),
    Feature("HTTPS is", flags="--ssl-*"),
    Feature("a path in front of all others is", flags="--root-path"),
    Feature("web search is", fields="web_search_options", null={"ChatCompletionRequest": "web_search_options"}),
    Feature("beam search is", fields="use_beam_search length_penalty"),
    Feature(
        "prompts as vectors are",
        fields="input_embeds prompt_embeds",
        null={"GenerateRequest": "input_embeds", "EncodeBody": "input_embeds"},
    ),
)


def feature_at(path: str, features: Iterable[Feature] = NOT_BUILT) -> str | None:
    """Return the feature that a path belongs to, with its verb. None: it belongs to none."""
    known = ((start, feature.name) for feature in features for start in feature.paths.split())
    return next((name for start, name in known if f"{path}/".startswith(f"{start}/")), None)
