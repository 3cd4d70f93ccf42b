"""Names of the formats in which models write tool calls and thoughts, also those by which SGLang and vLLM know them."""

from collections.abc import Mapping

from sgl_jax.settings.flags import Rule

_CALLS = {
    "hermes": "hermes qwen qwen25 qwen3 ling",
    "qwen3_coder": "qwen3_coder qwen3_xml",
    "glm45": "glm45 glm47 glm ling3",
    "llama3": "llama3 llama3_json llama4_json json",
    "pythonic": "pythonic llama4_pythonic llama4",
    "mistral": "mistral",
    "deepseek_v3": "deepseek_v3 deepseekv3 deepseek_v31 deepseekv31",
    "deepseek_v32": "deepseek_v32 deepseekv32 deepseek_v4 deepseekv4",
    "kimi_k2": "kimi_k2",
    "gpt_oss": "gpt_oss gpt-oss openai",
    "gemma4": "gemma4",
    "functiongemma": "functiongemma",
}
_THOUGHTS = {
    "think": "think deepseek_r1 deepseek-r1 deepseek_v3 deepseek-v3 qwen3 qwen3-thinking glm45 kimi_k2 ling",
    "mistral": "mistral magistral",
    "gemma4": "gemma4",
    "gpt_oss": "gpt_oss gpt-oss openai_gptoss",
}


def _by_name(table: Mapping[str, str]) -> Mapping[str, str]:
    return {name: form for form, names in table.items() for name in names.split()}


CALL_PARSERS = _by_name(_CALLS)  # format by name
THOUGHT_PARSERS = _by_name(_THOUGHTS)


def parser_rule(table: Mapping[str, str]) -> Rule:
    return Rule(lambda value: value in (*table, "auto", "none"), f"auto, none, {', '.join(table)}")
