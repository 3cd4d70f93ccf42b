import asyncio

import pytest
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from served import BASE_URL, KEY, MODEL

TEXTS = ["The little dog ran to the park.", "Her ball is red."]


def test_texts_and_queries_have_the_same_vectors_in_a_batch_and_alone():
    model = OpenAILikeEmbedding(model_name=MODEL, api_base=BASE_URL, api_key=KEY, embed_batch_size=2, max_retries=0)
    together = model.get_text_embedding_batch(TEXTS)
    assert together == [pytest.approx(model.get_text_embedding(text), abs=1e-5) for text in TEXTS]
    assert model.get_query_embedding(TEXTS[0]) == pytest.approx(together[0], abs=1e-5)
    assert asyncio.run(model.aget_text_embedding(TEXTS[1])) == pytest.approx(together[1], abs=1e-5)
