"""`python -m sgl_jax.check_env` on this machine, and on worse ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from messages import says
from sgl_jax import __version__, check_env
from sgl_jax.tools.environment import check_command
from sgl_jax.tools.environment.environment_report import render
from sgl_jax.tools.environment.facts import PLATFORMS, Facts, Platform, Report, Verdict

NO_PACKAGES = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
"""
NO_JAX = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""

# As much of a jax as the probe of a CPU needs, so that only one test waits for the real one.
QUICK_JAX = """
from types import SimpleNamespace
__version__ = "0.12.0.1"
config = SimpleNamespace(update=lambda name, value: None)
device = SimpleNamespace(
    id=0, device_kind="cpu", process_index=0, memory_stats=lambda: None, client=SimpleNamespace(platform_version="cpu")
)
devices = lambda platform: [device]
local_devices = lambda backend: [device]
process_index, process_count = lambda: 0, lambda: 1
device_put = lambda array, device: array
jit = lambda function: function
"""


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """A PYTHONPATH with it."""
    folder = tmp_path / "quick"
    folder.mkdir()
    (folder / "jax.py").write_text(QUICK_JAX)
    return str(folder)


def run(*arguments: str, **environ: str) -> SimpleNamespace:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SGL_JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-m", "sgl_jax.check_env", *arguments],
        env={**kept, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, errors=done.stderr)


def test_the_module_is_found_and_loads_neither_jax_nor_numpy() -> None:
    code = (
        "import sys; from sgl_jax import check_env; assert callable(check_env.check_env);"
        "print(sorted({'jax', 'jaxlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_from_python_it_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    report = check_env.check_env()
    assert capsys.readouterr().out == check_command.public(render(report), os.path.expanduser("~")) + "\n"
    assert report.sgl_jax == __version__
    assert [verdict.platform for verdict in report.verdicts] == ["tpu", "gpu", "cpu"]
    assert "cpu" in report.usable
    assert report.facts.version("jax") == report.facts.probe("cpu").jax_version


def test_what_is_printed_has_no_secrets_and_no_home_directory(tmp_path: Path, quick: str) -> None:
    cache = tmp_path / "home" / "cache"
    done = run(
        PYTHONPATH=quick,
        HOME=str(tmp_path / "home"),
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PLATFORMS="cpu",
        HF_TOKEN="hf_averysecretone",
        HF_ENDPOINT="https://me:pw@host/x",
        MODELSCOPE_API_TOKEN="averysecretone",
        SGL_JAX_API_KEY="another",
        AWS_SECRET_ACCESS_KEY="third",
    )
    assert (done.code, done.errors) == (0, "")
    words = " ".join(done.out.split())
    for shown in (
        "JAX_COMPILATION_CACHE_DIR ~/cache",
        "HF_TOKEN (set, hidden)",
        "HF_ENDPOINT https://(hidden)@host/x",
        "MODELSCOPE_API_TOKEN (set, hidden)",
    ):
        assert shown in words
    for secret in ("averysecretone", "another", "third", "me:pw", str(tmp_path / "home")):
        assert secret not in done.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf_abcdefghijkl sk-abcdefgh1", "(hidden) (hidden)"),
        ("/homes/me/y:/homes/me2 /mnt/homes/me/x", "~/y:/homes/me2 /mnt/homes/me/x"),
    ],
)
def test_secrets_and_the_home_directory_are_cut_out_of_any_text(text: str, expected: str) -> None:
    assert check_command.public(text, "/homes/me") == expected
    assert check_command.public("/usr/lib", "/") == "/usr/lib"


@pytest.mark.parametrize(
    ("arguments", "usable", "code"),
    [
        ([], ("cpu",), 0),
        ([], (), 1),
        (["--platform", "cpu"], ("cpu",), 0),
        (["--platform", "tpu"], ("cpu",), 1),
    ],
)
def test_the_exit_code_says_whether_a_platform_or_the_one_required_is_usable(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], usable: tuple[Platform, ...], code: int
) -> None:
    report = Report("0", tuple(Verdict(each, each in usable, "") for each in PLATFORMS), (), Facts())
    monkeypatch.setattr(check_command, "look", lambda environ, timeout_s: report)
    assert check_env.main(arguments) == code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--platfrom", "cpu"], "--platfrom … --platform"),
        (["--platform", "xpu"], "--platform … xpu"),
        *((["--timeout", number], f"--timeout … {number}") for number in ("0", "-1", "inf", "nan")),
        (["--timeout", "soon"], "--timeout … seconds … soon"),
        (["--selftest", "yes"], "--selftest … no value"),
    ],
)
def test_a_mistake_in_the_use_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert check_env.main(arguments) == 2
    error = capsys.readouterr().err
    assert says(error, f"check_env: error: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("sitecustomize", "missing"), [(NO_JAX, ""), (NO_PACKAGES, "jax, jaxlib")], ids=["jax", "every package"]
)
def test_with_packages_hidden_it_says_so(tmp_path: Path, sitecustomize: str, missing: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(sitecustomize)
    done = run(PYTHONPATH=str(tmp_path))
    assert (done.code, done.errors) == (1, "")
    assert done.out.splitlines()[1] == "Usable: no platform"
    assert says(done.out, "CPU  not usable … ModuleNotFoundError: No module named 'jax'\n")
    assert ("not installed" in done.out) == bool(missing)
    assert not missing or says(done.out, f"not installed: {missing}")


def test_a_jax_that_hangs_is_given_up_on(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("import time; time.sleep(100)")
    done = run("--timeout", "1.5", PYTHONPATH=str(tmp_path))
    assert (done.code, done.errors) == (1, "")
    assert says(done.out, "CPU  not usable … 1.5 s … importing jax\n")


def test_stopping_it_ends_the_processes_it_started(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'x').write(str(os.getpid()) + '!'); time.sleep(300)"
    )
    command = [sys.executable, "-m", "sgl_jax.check_env", "--timeout", "300"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("!"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    child = Path("/proc") / (tmp_path / "pid").read_text().rstrip("!") / "stat"
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_platform_that_jax_is_kept_from_is_not_usable(quick: str) -> None:
    done = run("--platform", "cpu", PYTHONPATH=quick, JAX_PLATFORMS="tpu")
    assert done.code == 1
    assert says(" ".join(done.out.split()), "CPU not usable works … JAX_PLATFORMS=tpu … unset JAX_PLATFORMS")


def test_output_that_cannot_hold_a_character_gets_it_escaped(quick: str) -> None:
    done = run(PYTHONPATH=quick, PYTHONIOENCODING="ascii", HF_HOME="/daten/größe")
    assert done.errors == ""
    assert "/daten/gr\\xf6\\xdfe" in done.out
