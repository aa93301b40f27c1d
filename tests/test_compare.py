"""Results files: what is one, and what got faster or slower between two of them."""

import json

import pytest

from benchmarks import compare, environment
from benchmarks.baselines import Case
from benchmarks.results import NotResults, load

CASE = Case("resnet50", "training", 256, "bf16", 224, "cuda")._asdict()


def _row(contender="fused-auto", median=10.0, spread=0.01, **more):
    times = {"median_ms": median, "q25_ms": median * (1 - spread), "q75_ms": median * (1 + spread), "n": 9}
    return {**CASE, "contender": contender, **times, **more}


def _file(path, *rows, **described):
    described = {"commit": "abc", "card": "H100", "cpu": "a CPU", "torch": "2.11", **described}
    environment.write_json(path, {"environment": described, "parity": [], "rows": list(rows)})
    return str(path)


def _layer(median, problem="256x56x56x64 bfloat16"):
    return _row("triton", median, layer="layer1.0", operator="bn_act", problem=problem)


@pytest.mark.parametrize(
    ("new", "status", "said"),
    [
        (_row(median=10.0), 0, "1.00 x"),
        (_row(median=10.9), 0, "1.09 x"),
        (_row(median=11.5), 1, "1.15 x  SLOWER"),
        (_row(median=11.5, spread=0.2), 0, "1.15 x"),  # within its spread
        (_row(median=8.0), 0, "0.80 x  faster"),
        ({**CASE, "contender": "fused-auto", "error": "out of memory"}, 1, "no longer runs  out of memory"),
    ],
)
def test_verdict_of_one_row(tmp_path, capsys, new, status, said):
    eager = _row("eager", 20.0)
    old, new = _file(tmp_path / "old.json", _row(), eager), _file(tmp_path / "new.json", eager, new)
    assert compare.main([old, new]) == status
    line = next(line for line in capsys.readouterr().out.splitlines() if "fused-auto" in line)
    assert said in line and line.startswith("resnet50 training bf16 256x224 fused-auto")


def test_slowest_first_and_layers_apart(tmp_path, capsys):
    small = "8x56x56x64 bfloat16"
    old = _file(tmp_path / "old.json", _layer(1.0), _layer(1.0, small), _row(), _row("eager", 20.0))
    new = _file(tmp_path / "new.json", _row(), _row("graph"), _layer(0.5), _layer(2.0, small), commit="def")
    assert compare.main([old, new]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "commit: abc -> def"
    assert [line.split(" x ")[0].split()[-1] for line in lines[1:4]] == ["2.00", "1.00", "0.50"]
    assert "layer1.0 bn_act 8x56x56x64 bfloat16 triton" in lines[1]
    assert lines[-1].startswith("3 rows: 1 slower or gone, 1 faster")


def test_what_did_not_run_before_cannot_get_slower(tmp_path):
    failed = {**CASE, "contender": "compile", "error": "no compiler"}
    old = _file(tmp_path / "old.json", failed, _row())
    assert compare.main([old, _file(tmp_path / "new.json", _row("compile"), _row())]) == 0
    assert compare.main([old, old]) == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a results file"),
        ('{"environment": {"commit": "abc"}, "rows": [', "not a results file"),
        ("[]", "not a results file"),
        ('{"format": 2, "arch": 90, "entries": []}', "KeyError: 'environment'"),
        ('{"environment": {"commit": "abc"}, "rows": [{"model": "resnet50"}]}', "a row without mode, batch, dtype"),
        (json.dumps({"environment": {"commit": "a"}, "rows": [_row(median=0.0)]}), "not positive"),
        (json.dumps({"environment": {"commit": "a"}, "rows": [{**CASE, "contender": "x"}]}), "KeyError: 'median_ms'"),
    ],
)
def test_files_that_are_no_results(tmp_path, capsys, content, reason):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(NotResults, match="bad.json: "):
        load(path)
    assert compare.main([_file(tmp_path / "good.json", _row()), str(path)]) == 2
    assert "bad.json" in (said := capsys.readouterr().err) and reason in said


def test_files_that_cannot_be_compared(tmp_path, capsys):
    good = _file(tmp_path / "good.json", _row())
    assert compare.main([good, str(tmp_path / "missing.json")]) == 2
    assert "missing.json: No such file" in capsys.readouterr().err
    assert compare.main([good, _file(tmp_path / "other.json", _row("eager"))]) == 2
    assert "no timed row in common" in capsys.readouterr().err
    assert compare.main([good]) == 2
    assert "usage:" in capsys.readouterr().err
