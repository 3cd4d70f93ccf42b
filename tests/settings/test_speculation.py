"""Speculative decoding as it is asked for: SGLang's flags, vLLM's JSON, and the checkpoint of a draft model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from messages import says
from sgl_jax.engine.engine import Engine
from sgl_jax.planning.compile_command import compile_for
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.hub import HubError
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.settings.speculation import Speculation
from sgl_jax.settings.speculators import with_verifier
from sgl_jax.tools.benchmark import arguments, offline
from sgl_jax.tools.benchmark.terminal import BenchmarkError


def asked(line: str) -> Speculation | None:
    return ServerArgs.from_cli(shlex.split(f"--model-path m {line}"), {}).speculation


def refusal(line: str) -> str:
    with pytest.raises(FlagError) as caught:
        asked(line)
    assert caught.value.flag.startswith("--speculative-")
    return str(caught.value)


HEAD = "--speculative-draft-model-path d"
FROM_FLAGS = {
    "": None,
    "--speculative-accept-threshold-single 1.0 --speculative-accept-threshold-acc 1": None,
    "--speculative-algorithm NGRAM": Speculation("NGRAM", None, None, None, 1, 4),
    "--speculative-algorithm ngram --speculative-num-draft-tokens 12 --speculative-ngram-max-match-window-size 12": (
        Speculation("NGRAM", None, 11, None, 1, 12)
    ),
    "--speculative-algorithm NGRAM --speculative-ngram-min-match-window-size 5": (
        Speculation("NGRAM", None, None, None, 5, 5)
    ),
    f"--speculative-algorithm EAGLE3 {HEAD}": Speculation("EAGLE3", "d", 3, None),
    "--speculative-algorithm eagle --speculative-draft-model d --speculative-num-steps 5 --speculative-eagle-topk 1": (
        Speculation("EAGLE", "d", 5, None)
    ),
    f"--speculative-algorithm STANDALONE {HEAD} --speculative-num-steps 1 --speculative-num-draft-tokens 2": (
        Speculation("STANDALONE", "d", 1, None)
    ),
    "--speculative-algorithm NEXTN": Speculation("NEXTN", None, 3, None),
    "--speculative-algorithm EAGLE": Speculation("NEXTN", None, 3, None),
    "--speculative-algorithm EAGLE --speculative-draft-model-path m": Speculation("NEXTN", None, 3, None),
    "--speculative-algorithm NEXTN --speculative-disable-by-batch-size 33 --dp-size 2": (
        Speculation("NEXTN", None, 3, 17)
    ),
}


@pytest.mark.parametrize("line", FROM_FLAGS)
def test_sglangs_flags_are_read_together(line: str) -> None:
    assert asked(line) == FROM_FLAGS[line]


NGRAM = "--speculative-algorithm NGRAM"
REFUSED = {
    "--speculative-algorithm DFLASH": "--speculative-algorithm … DFLASH … NGRAM, EAGLE, EAGLE3, NEXTN or STANDALONE",
    "--speculative-algorithm EAGLE3": "--speculative-algorithm … EAGLE3 … --speculative-draft-model-path",
    "--speculative-algorithm STANDALONE": "--speculative-algorithm … STANDALONE … --speculative-draft-model-path",
    f"{NGRAM} {HEAD}": "--speculative-draft-model-path is d … NGRAM … leave it out",
    f"--speculative-algorithm NEXTN {HEAD}": "--speculative-draft-model-path is d … NEXTN … leave it out",
    f"{NGRAM} --speculative-num-steps 0": "--speculative-num-steps … 0 … 1 … 31",
    f"{NGRAM} --speculative-num-draft-tokens 33": "--speculative-num-draft-tokens … 33 … 2 … 32",
    f"{NGRAM} --speculative-num-steps 3 --speculative-num-draft-tokens 5": (
        "--speculative-num-draft-tokens … 5 … --speculative-num-steps … 3 … leave one out"
    ),
    f"{NGRAM} --speculative-eagle-topk 4": "--speculative-eagle-topk … 4 … 1 … chain … tree",
    f"{NGRAM} --speculative-accept-threshold-acc 0.9": "--speculative-accept-threshold-acc … 0.9 … 1 … sampled",
    f"{NGRAM} --speculative-ngram-min-match-window-size 5 --speculative-ngram-max-match-window-size 4": (
        "--speculative-ngram-min-match-window-size … 5 … --speculative-ngram-max-match-window-size … 4"
    ),
    f"--speculative-algorithm EAGLE3 {HEAD} --speculative-ngram-max-match-window-size 4": (
        "--speculative-ngram-max-match-window-size … EAGLE3"
    ),
    f"{NGRAM} --speculative-disable-by-batch-size 0": "--speculative-disable-by-batch-size … 0 … 1",
    f"{NGRAM} --speculative-simulated-acceptance 1.5": "--speculative-simulated-acceptance … 1.5 … 0 … 1",
    "--speculative-simulated-acceptance 0.7": "--speculative-simulated-acceptance … --speculative-algorithm",
    HEAD: "--speculative-draft-model-path … --speculative-algorithm",
    f"{NGRAM} --speculative-ngram-max-trie-depth 18": (
        "--speculative-ngram-max-trie-depth … no trie … --speculative-ngram-max-match-window-size"
    ),
    f"{NGRAM} --speculative-dflash-block-size 8": "--speculative-dflash-block-size … DFlash … not built",
}


@pytest.mark.parametrize("line", REFUSED)
def test_flags_without_effect_or_in_contradiction_are_refused_by_name(line: str) -> None:
    assert says(refusal(line), REFUSED[line])


FROM_JSON = [
    ({"method": "ngram_gpu"}, Speculation("NGRAM", None, None, None, 1, 4)),
    (
        {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 5},
        Speculation("NGRAM", None, 5, None, 2, 5),
    ),
    (
        {"method": "eagle3", "model": "d", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 2},
        Speculation("EAGLE3", "d", 2, None),
    ),
    ({"method": "eagle", "model": "d", "disable_by_batch_size": 30}, Speculation("EAGLE", "d", 3, 30)),
    ({"method": "draft_model", "model": "d", "quantization": None}, Speculation("STANDALONE", "d", 3, None)),
    ({"method": "mtp", "num_speculative_tokens": 1}, Speculation("NEXTN", None, 1, None)),
    ({"method": "glm4_moe_mtp", "model": "m"}, Speculation("NEXTN", None, 3, None)),
]


@pytest.mark.parametrize(("config", "expected"), FROM_JSON)
def test_vllms_config_says_the_same(config: dict, expected: Speculation, tmp_path: Path) -> None:
    text = json.dumps(config)
    assert asked(f"--tp-size 2 --speculative-config '{text}'") == expected
    file = tmp_path / "server.yaml"
    file.write_text(f"tp-size: 2\nspeculative_config: {text}\n")  # JSON is YAML
    assert asked(f"--config {file}") == expected


REFUSED_JSON = {
    "ngram": "--speculative-config … ngram … JSON object",
    "[1]": "--speculative-config … [1] … JSON object",
    "{}": "--speculative-config … method … ngram, eagle, eagle3, mtp, draft_model",
    '{"method": "medusa"}': "--speculative-config … method … medusa … eagle3",
    '{"method": "eagle3"}': "--speculative-config … method is EAGLE3; model",
    '{"method": "ngram", "model": "d"}': "--speculative-config … model is d … NGRAM",
    '{"method": "ngram", "num_speculative_tokens": 64}': "--speculative-config … num_speculative_tokens … 64 … 31",
    '{"method": "ngram", "num_speculative_tokens": "4"}': "--speculative-config … num_speculative_tokens … 4 … number",
    '{"method": "mtp", "prompt_lookup_max": 4}': "--speculative-config … prompt_lookup_max … NEXTN",
    '{"method": "ngram", "revision": "r", "max_model_len": 9}': (
        "--speculative-config … max_model_len, revision … num_speculative_tokens"
    ),
    '{"method": "ngram", "draft_tensor_parallel_size": 2}': (
        "--speculative-config … draft_tensor_parallel_size … 2 … --tp-size, 1"
    ),
}


@pytest.mark.parametrize("text", REFUSED_JSON)
def test_keys_of_vllms_config_that_cannot_be_honoured_are_refused_by_name(text: str) -> None:
    said = refusal(f"--speculative-config '{text}'")
    assert says(said, REFUSED_JSON[text])
    assert said.count("--speculative-") == 1


def test_the_two_ways_to_ask_are_not_mixed() -> None:
    said = refusal('--speculative-config \'{"method": "ngram"}\' --speculative-num-steps 3')
    assert says(said, "--speculative-num-steps … --speculative-config")


def checkpoint(folder: Path, **about: object) -> str:
    """Write the config of a speculators checkpoint, with changes, and return its path."""
    folder.mkdir()
    known = {
        "algorithm": "eagle3",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
        "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
    }
    (folder / "config.json").write_text(json.dumps({"speculators_config": known | about}))
    return str(folder)


def test_the_checkpoint_of_a_draft_model_finds_its_verifier(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "draft")
    args = with_verifier(ServerArgs(model_path=path, page_size=16))
    assert args.speculation == Speculation("EAGLE3", path, 5, None)
    assert (args.model_path, args.served_model_name, args.page_size) == ("org/target", path, 16)
    assert with_verifier(ServerArgs(model_path=path, served_model_name="n")).served_model_name == "n"


@pytest.mark.parametrize("name", ["target", "../target", "{absolute}"])
def test_a_verifier_beside_the_checkpoint_is_a_folder(tmp_path: Path, name: str) -> None:
    (target := tmp_path / "target").mkdir()
    path = checkpoint(
        tmp_path / "draft", verifier={"name_or_path": name.format(absolute=target)}, proposal_methods=None
    )
    args = with_verifier(ServerArgs(model_path=path))
    assert Path(args.model_path).resolve() == target
    assert args.speculation == Speculation("EAGLE3", path, 3, None)


@pytest.mark.parametrize("text", ['{"architectures": []}', "[]", "{", '{"speculators_config": 1}'])
def test_any_other_model_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for path in (str(tmp_path), str(tmp_path / "config.json"), "config:Qwen3-8B"):
        assert with_verifier(args := ServerArgs(model_path=path)) is args


@pytest.mark.parametrize(
    ("about", "flags", "message"),
    [
        ({"algorithm": "dflash"}, {}, "--model-path is {path} … dflash … eagle3"),
        ({"verifier": {"name_or_path": None}}, {}, "--model-path is {path} … --speculative-draft-model-path"),
        ({"verifier": None}, {}, "--model-path is {path} … --speculative-draft-model-path"),
        ({}, {"speculative_algorithm": "NGRAM"}, "--model-path is {path} … --speculative-draft-model-path"),
    ],
)
def test_a_checkpoint_that_cannot_be_launched_alone_is_refused(
    tmp_path: Path, about: dict, flags: dict, message: str
) -> None:
    path = checkpoint(tmp_path / "draft", **about)
    with pytest.raises(FlagError) as caught:
        with_verifier(ServerArgs(model_path=path, **flags))
    assert says(str(caught.value), message.format(path=path))


def test_an_engine_a_compilation_and_an_offline_benchmark_ask_for_the_verifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target here is a folder without a model, which each of them names."""
    (tmp_path / "target").mkdir()
    path = checkpoint(tmp_path / "draft", verifier={"name_or_path": "target"})
    with pytest.raises(HubError, match="target is no model"):
        Engine(path)
    assert compile_for(ServerArgs(model_path=path), "v6e-1", 1024, only_plan=True, json_file=None) == 2
    assert "target is no model" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="target"):
        offline.main(arguments.parse("bench_offline_throughput", [])[0], ["--model-path", path])
