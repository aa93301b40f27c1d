"""The Makefile's targets for a borrowed GPU, without one: what they would run is understood, and ends in time."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import layers, run, tune

ROOT = Path(__file__).parent.parent


def _make(*words, python=sys.executable):
    return subprocess.run(["make", f"PYTHON={python}", *words], cwd=ROOT, capture_output=True, text=True)


def _parsed(module, words):
    """Where the command writes files, and how many."""
    if module == "run":
        options = run._parse(words, "cuda")
        assert run._check_options(options, "cuda") is None and (options.tune == 0 or options.impl == ["none"])
        return options.out, 2
    if module == "layers":
        return layers._parse(words, "cuda").out, 2
    options = tune._parser().parse_args(words)
    return options.out, 0 if options.compile else 1


@pytest.mark.parametrize("target", ["gpu-check", "gpu-tune", "gpu-bench", "gpu-peers"])
def test_commands_of_a_target(target):
    done = _make("-n", target, "OUT=out")
    assert done.returncode == 0
    text = done.stdout.replace("\\\n", " ")
    commands = re.findall(r"-m benchmarks\.(\w+)(.*?)(?:>|;|\n)", text)
    assert commands
    written = [_parsed(module, shlex.split(words)) for module, words in commands]
    logs = {Path(log) for log in re.findall(r"> (out/\S+\.log)", text)}
    assert sum(files for _, files in written) + len(logs) <= 8
    assert all(len(path.parts) <= 2 for path, files in written if files)
    limits = re.findall(r"timeout (?:-s INT -k (\d+) )?(?:\$\(\((\d+) \+ )?(\d+)", text)
    assert len(limits) >= 2 and sum(int(number or 0) for limit in limits for number in limit) < 600
    for path in re.findall(r"(?<!=)tests/\w+\.py", text):
        assert (ROOT / path).exists()


def test_targets_say_that_they_need_a_gpu(tmp_path):
    """`false` in place of a Python that finds none."""
    done = _make("gpu-check", f"OUT={tmp_path / 'out'}", python="false")
    assert done.returncode != 0 and "this target needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
