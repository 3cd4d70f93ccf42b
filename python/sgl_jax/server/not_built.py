"""Parameters of OpenAI's, vLLM's and SGLang's APIs that ask for something that is not built, and what that is."""

from __future__ import annotations

import re

_FEATURES = {
    "structured output is": "response_format json_schema json_object structural_tag regex ebnf grammar structured_outputs "
    "guided_json guided_regex guided_choice guided_grammar guided_decoding_backend",
    "tool calls are": "tools tool_choice functions function_call",
    "images, audio and video are": "image_url image_data input_audio audio audio_data video_url video_data modalities "
    "mm_processor_kwargs",
    "LoRA is": "lora_path lora_id lora_request",
    "splitting the reasoning from the answer is": "separate_reasoning stream_reasoning include_reasoning",
    "web search is": "web_search_options",
    "beam search is": "use_beam_search length_penalty",
    "prompts as vectors are": "input_embeds prompt_embeds",
    "cutting long prompts is": "truncate_prompt_tokens",
    "prefill and decode on engines of their own are": "bootstrap_host bootstrap_port bootstrap_room kv_transfer_params",
    "scheduling by priority is": "priority",
}
_FEATURE_OF = {name: feature for feature, names in _FEATURES.items() for name in names.split()}


def feature_of(field: str) -> str | None:
    """What is not built, with its verb: "tool calls are" for `tools` or `messages[0].function_call`. The innermost name
    that is known counts."""
    found = (_FEATURE_OF.get(name) for name in reversed(re.findall(r"\w+", field)))
    return next((feature for feature in found if feature), None)
