"""What is shown may be pasted into a public issue."""

from __future__ import annotations

from sgl_jax.environment.facts import CompileCache
from sgl_jax.environment.privacy import HIDDEN, variables, without_secrets

HOME = "/home/someone"


def test_only_variables_that_matter_are_shown_and_no_secret_among_them() -> None:
    environ = {
        "XLA_FLAGS": "--xla_a=1",
        "JAX_PLATFORMS": "cpu",
        "HF_TOKEN": "abc",
        "HF_HUB_TOKEN": "",
        "SGL_JAX_API_KEY": "k",
        "HF_HOME": "/data",
        "TPU_WORKER_HOSTNAMES": "a,b",
        "AWS_SECRET_ACCESS_KEY": "s",
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_ACCOUNT": "us",
    }
    assert variables(environ) == {
        "HF_HOME": "/data",
        "HF_HUB_TOKEN": "",
        "HF_TOKEN": HIDDEN,
        "JAX_PLATFORMS": "cpu",
        "SGL_JAX_API_KEY": HIDDEN,
        "SLURM_JOB_ID": "7",
        "TPU_WORKER_HOSTNAMES": "a,b",
        "XLA_FLAGS": "--xla_a=1",
    }


def test_secrets_inside_values_are_cut_out() -> None:
    hidden = without_secrets("hf_abcdefghijkl sk-abcdefgh1 https://me:pw@host/x", HOME)
    assert hidden == "hf_(hidden) (hidden) https://(hidden)@host/x"


def test_the_home_directory_becomes_a_tilde_everywhere() -> None:
    cache = CompileCache("/home/someone/.cache/x", "by $A=/home/someone", "ready")
    assert without_secrets((cache, {"B": ["--dir=/home/someone:/home/someone2"], "n": 1}), HOME) == (
        CompileCache("~/.cache/x", "by $A=~", "ready"),
        {"B": ["--dir=~:/home/someone2"], "n": 1},
    )


def test_a_home_that_is_the_root_changes_nothing() -> None:
    assert without_secrets("/usr/lib", "/") == "/usr/lib"
    assert without_secrets("/mnt/root/x /root/y", "/root") == "/mnt/root/x ~/y"
