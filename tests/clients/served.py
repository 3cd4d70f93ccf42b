"""The server that clients are checked against, and a few of its answers at temperature 0."""

import os

URL = os.environ["SERVER_URL"]
BASE_URL = f"{URL}/v1"
KEY = os.environ["SERVER_KEY"]
MODEL = "stories260k"

PROMPT = "Once upon a time"
PROMPT_IDS = [1, 403, 407, 261, 378]
COMPLETION = ", there was a little girl named Lily. She"  # 12 tokens

MESSAGES = [{"role": "user", "content": "Hello"}]
ANSWER = '"Here," said his mom.\nT'  # 12 tokens
UP_TO_SAID = '"Here,"'  # the answer with the stop string " said"
CHAT_TOKENS = 43  # tokens of the rendered messages

CLOSING_BRACE = 128  # the token "}": a bias for it makes an object {} where that is allowed
