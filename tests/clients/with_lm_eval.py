"""lm-eval through its `local-completions` model: log-likelihoods of given and of rolling text, and generation.

The values are those of lm-eval 0.4's own `hf` model (torch, float32) for the same tasks.
"""

import json
import os
import subprocess
import sys

import pytest
from served import BASE_URL, KEY, MODEL

TASKS = "tests/clients/lm_eval_tasks"
ENDINGS = [[-0.61712, -53.41006], [-28.83194, -1.23812], [-2.05338, -24.19799], [-24.61530, -3.97574]]
ROLLING = [-9.83131, -24.85808, -34.41480, -39.97958]
CONTINUATIONS = [" girl named Lily", " park", " friends", " ground"]


@pytest.fixture(scope="module", params=[1, 4], ids=["one by one", "batches at once"])
def samples(request, tmp_path_factory):
    """Answers for each line of each task, as lm-eval logs them."""
    folder = tmp_path_factory.mktemp("lm_eval")
    served = f"model={MODEL},base_url={BASE_URL}/completions,tokenizer=tests/data/stories260k,max_length=512"
    served += f",add_bos_token=True,num_concurrent={request.param}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", served]
    command += ["--batch_size", str(request.param), "--include_path", TASKS, "--tasks", "endings,rolling,continuations"]
    environment = os.environ | {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    command += ["--output_path", str(folder), "--log_samples"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = {file.name.split("_")[1]: file for file in folder.glob("*/samples_*.jsonl")}
    return {name: [json.loads(line)["filtered_resps"] for line in file.open()] for name, file in files.items()}


def test_the_likelihood_of_each_ending(samples):
    for answers, expected in zip(samples["endings"], ENDINGS, strict=True):
        assert [float(value) for value, _ in answers] == pytest.approx(expected, abs=1e-3)


def test_greedy_endings_are_known(samples):
    greedy = [[flag == "True" for _, flag in answers] for answers in samples["endings"]]
    assert greedy == [[True, False], [False, True], [False, False], [False, False]]


def test_rolling_likelihoods(samples):
    assert [float(value) for (value,) in samples["rolling"]] == pytest.approx(ROLLING, abs=1e-3)


def test_continuations_up_to_a_stop_string(samples):
    assert [text for (text,) in samples["continuations"]] == CONTINUATIONS
