"""python -m fused_resnet info | explain | bench."""

import pytest
import torch

from fused_resnet.__main__ import main


def test_info_says_what_is_there_and_what_is_missing(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"].strip() == torch.__version__
    assert lines["CUDA library"].strip() == "loaded" or lines["CUDA library"].strip().startswith("no: ")
    if not torch.cuda.is_available():
        assert lines["CUDA devices"].strip() == "none"


def test_explain_needs_no_gpu(capsys):
    assert main(["explain", "--model", "resnet18", "--batch", "8", "--size", "64", "--arch", "sm90", "--train"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["layer", "operator", "problem", "backend", "reason"]
    assert "layer4.1" in out and "not measured on sm90" in out


def test_explain_names_kernels_that_cannot_run(capsys):
    assert main(["explain", "--model", "resnext50_32x4d", "--size", "64", "--arch", "sm90", "--impl", "cuda"]) == 2
    assert "conv_affine_pool: no kernel in the CUDA library" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--model", "resnet5"], "--model: expected one of resnet18, "),
        (["explain", "--arch", "sm12"], "arch: expected one of sm80"),
    ],
)
def test_bad_values(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["explain", "--batch", "0"], ["explain", "--impl", "fast"], ["info", "--x"]])
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err
