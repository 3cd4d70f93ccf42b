import litellm
import pytest
from served import ANSWER, BASE_URL, CHAT_TOKENS, COMPLETION, KEY, MESSAGES, MODEL, PROMPT, PROMPT_IDS, UP_TO_SAID

SERVER = {"api_base": BASE_URL, "api_key": KEY, "num_retries": 0}


@pytest.fixture(params=["openai", "hosted_vllm", "litellm_proxy"])
def chat(request):
    def ask(**parameters):
        parameters = {"max_tokens": 12, "temperature": 0} | SERVER | parameters
        return litellm.completion(f"{request.param}/{MODEL}", MESSAGES, **parameters)

    return ask


@pytest.fixture(params=["text-completion-openai", "hosted_vllm"])
def complete(request):
    def ask(prompt, **parameters):
        parameters = {"max_tokens": 12, "temperature": 0} | SERVER | parameters
        return litellm.text_completion(prompt, model=f"{request.param}/{MODEL}", **parameters)

    return ask


def test_chat(chat):
    answer = chat()
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (CHAT_TOKENS, 12)


def test_chat_streams_the_same(chat):
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (CHAT_TOKENS, 12)


def test_chat_stops_and_gives_log_probabilities(chat):
    choice = chat(stop=[" said"], logprobs=True, top_logprobs=2).choices[0]
    assert (choice.message.content, choice.finish_reason) == (UP_TO_SAID, "stop")
    assert [one.token for one in choice.logprobs.content[:2]] == ['"', "H"]
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_completions(complete):
    answer = complete(PROMPT, logprobs=2)
    assert answer.choices[0].text == COMPLETION
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT_IDS), 12)
    assert len(answer.choices[0].logprobs.token_logprobs) == 12


def test_a_prompt_of_token_ids():
    asked = {"model": f"text-completion-openai/{MODEL}", "max_tokens": 12, "temperature": 0}  # hosted_vllm sends no ids
    assert litellm.text_completion(PROMPT_IDS, **asked, **SERVER).choices[0].text == COMPLETION


def test_completions_stream_the_same(complete):
    assert "".join(chunk.choices[0].text or "" for chunk in complete(PROMPT, stream=True)) == COMPLETION


def test_several_prompts(complete):
    assert [choice.text for choice in complete([PROMPT, PROMPT]).choices] == [COMPLETION] * 2


def test_errors_have_their_types(chat):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        chat(temperature=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(f"openai/{MODEL}", [{"role": "user", "content": "long " * 600}], **SERVER)
    with pytest.raises(litellm.AuthenticationError):
        chat(api_key="wrong")
    with pytest.raises(litellm.NotFoundError, match="unheard-of"):
        litellm.completion("openai/unheard-of", MESSAGES, **SERVER)


def test_a_time_limit_ends_the_request(chat):
    with pytest.raises(litellm.Timeout):
        chat(timeout=0.001, max_tokens=400)
