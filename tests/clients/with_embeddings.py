import math

import cohere
import litellm
import pytest
from langchain_openai import OpenAIEmbeddings
from openai import OpenAI
from served import BASE_URL, KEY, MODEL

client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
TEXTS = ["The little dog ran to the park.", "Her ball is red.", "A dog was in the park."]


def test_both_encodings_are_the_same_unit_vectors():
    packed = client.embeddings.create(model=MODEL, input=TEXTS)
    plain = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.hypot(*one.embedding) == pytest.approx(1)
    assert packed.usage.total_tokens == plain.usage.prompt_tokens > 0


def test_dimensions_are_cut_and_divided_by_their_length_again():
    whole, cut = (
        client.embeddings.create(model=MODEL, input="a", **more).data[0].embedding for more in ({}, {"dimensions": 16})
    )
    length = math.hypot(*whole[:16])
    assert cut == pytest.approx([value / length for value in whole[:16]], abs=1e-6)


@pytest.mark.parametrize("kind", [cohere.ClientV2, cohere.Client])
def test_ranked_documents_come_best_first(kind):
    ranking = kind(api_key=KEY, base_url=BASE_URL.removesuffix("/v1"))
    results = ranking.rerank(model=MODEL, query=TEXTS[0], documents=TEXTS, top_n=2).results
    assert (len(results), results[0].index) == (2, 0)
    assert results[0].relevance_score == pytest.approx(1, abs=1e-5)
    assert results[0].relevance_score > results[1].relevance_score


def test_langchain_and_litellm_get_the_same_vectors():
    expected = [each.embedding for each in client.embeddings.create(model=MODEL, input=TEXTS).data]
    # It would send ids of OpenAI's own vocabulary otherwise.
    chain = OpenAIEmbeddings(model=MODEL, base_url=BASE_URL, api_key=KEY, check_embedding_ctx_length=False)
    assert chain.embed_documents(TEXTS) == [pytest.approx(each, abs=1e-6) for each in expected]
    lite = litellm.embedding(f"openai/{MODEL}", input=TEXTS, api_base=BASE_URL, api_key=KEY, encoding_format="float")
    assert [each["embedding"] for each in lite.data] == [pytest.approx(each, abs=1e-6) for each in expected]
