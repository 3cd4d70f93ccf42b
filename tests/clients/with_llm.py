"""`llm` as people use it: a model in extra-openai-models.yaml, and the command line."""

import json
import os
import subprocess
import sys

import pytest
from served import ANSWER, BASE_URL, CHAT_TOKENS, COMPLETION, KEY, MODEL, PROMPT, PROMPT_IDS, UP_TO_SAID

MODELS = "".join(
    f"- {{model_id: {name}, model_name: {MODEL}, api_base: '{BASE_URL}', api_key_name: {key}{more}}}\n"
    for name, key, more in (("chat", "right", ""), ("locked", "wrong", ""), ("text", "right", ", completion: true"))
)


@pytest.fixture
def llm(tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS)
    (tmp_path / "keys.json").write_text(json.dumps({"right": KEY, "wrong": "wrong"}))

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess:
        options_given = [word for name, value in options.items() for word in ("-o", name, str(value))]
        command = [sys.executable, "-m", "llm", *arguments, *options_given]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("more", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_chat(llm, more):
    assert llm("Hello", "-m", "chat", *more, temperature=0, max_tokens=12, seed=1).stdout.strip() == ANSWER
    logged = json.loads(llm("logs", "--json", "-n", "1").stdout)[0]
    assert (logged["input_tokens"], logged["output_tokens"]) == (CHAT_TOKENS, 12)


@pytest.mark.parametrize("more", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_completions(llm, more):
    assert llm(PROMPT, "-m", "text", *more, temperature=0, max_tokens=12).stdout.strip() == COMPLETION


def test_a_conversation_goes_on(llm):
    for more in ([], ["-c"]):
        assert llm("Hello", "-m", "chat", *more, temperature=0, max_tokens=12).returncode == 0
    assert json.loads(llm("logs", "--json", "-n", "1").stdout)[0]["input_tokens"] > CHAT_TOKENS


def test_stop_and_bias(llm):
    assert llm("Hello", "-m", "chat", temperature=0, max_tokens=12, stop=" said").stdout.strip() == UP_TO_SAID
    biased = llm("Hello", "-m", "chat", temperature=0, max_tokens=3, logit_bias=f'{{"{PROMPT_IDS[1]}": 100}}')
    assert biased.stdout.strip() == "Once Once Once"


def test_errors_are_told(llm):
    for arguments, options, named in (
        (["Hello", "-m", "chat"], {"max_tokens": -3}, "max_tokens"),
        (["long " * 600, "-m", "chat"], {}, "context"),
        (["Hello", "-m", "locked"], {}, "key"),
    ):
        answer = llm(*arguments, **options)
        assert answer.returncode == 1
        assert named in answer.stderr
        assert "Traceback" not in answer.stderr
