"""The README's figures, from results files alone."""

import pytest

from benchmarks import environment, figures
from benchmarks.baselines import Case

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "abc123", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0",
    "cudnn": 91900, "driver": None, "card": "NVIDIA H100", "cpu": "a CPU",
}  # fmt: skip
CASE = Case("resnet50", "training", 256, "bf16", 224, "cuda")


def _row(contender, median, case=CASE, **more):
    times = {"median_ms": median, "q25_ms": median, "q75_ms": median, "n": 9, "roofline_share": 10 / median}
    return {**case._asdict(), "contender": contender, **times, **more}


def _whole(contender, median, case=CASE):
    return _row(contender, median, case, images_per_s=1000 * case.batch / median, peak_bytes=5 * 10**9)


def _layer(contender, median, operator="bn_act"):
    return _row(contender, median, layer="layer1.0", operator=operator, problem="256x56x56x64 bfloat16")


@pytest.fixture
def place(tmp_path):
    """A README with marks and an empty folder of results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"# Title\n\n{figures.BEGIN}\nold\n{figures.END}\n\nThe end.\n")
    return tmp_path


def _run(place, **files):
    for name, rows in files.items():
        environment.write_json(
            place / "results" / f"{name}.json", {"environment": ENVIRONMENT, "parity": [], "rows": rows}
        )
    status = figures.main(["--results", str(place / "results"), "--readme", str(place / "README.md")])
    return status, (place / "README.md").read_text()


def test_without_results(place):
    status, text = _run(place)
    assert status == 0
    assert text == f"# Title\n\n{figures.BEGIN}\n{figures.NOTHING}\n{figures.END}\n\nThe end.\n"
    assert _run(place) == (0, text)


def test_cases_against_their_fastest_peer_losses_named(place):
    small = CASE._replace(mode="inference", batch=32)
    rows = [
        _whole("fused-auto", 80.0), _whole("fused-auto-graph", 82.0), _whole("eager", 100.0), _whole("compile", 90.0),
        _whole("fused-auto", 5.0, small), _whole("eager", 6.0, small), _whole("graph", 4.0, small),
        {**CASE._asdict(), "contender": "timm", "error": "timm is not installed"},
    ]  # fmt: skip
    status, text = _run(place, h100=rows)
    assert status == 0 and "old" not in text and text.startswith("# Title") and text.endswith("The end.\n")
    assert "NVIDIA H100; torch 2.11.0, triton 3.6.0, cuda 13.0, cudnn 91900; commit abc123; 2026-01-02." in text
    line = "| resnet50 training bf16 256x224 | 3,200 (fused-auto) | 2,844 (compile) | 1.12 | 5.0 / 5.0 | 12 % |"
    assert line in text.splitlines()
    assert "Slower than the fastest peer: resnet50 inference bf16 32x224 (graph, 1.25 x)." in text
    assert "![h100](results/h100.png)" in text
    assert (place / "results" / "h100.png").read_bytes().startswith(b"\x89PNG")
    assert _run(place) == (0, text)  # again, from the files alone


def test_layers_that_lose_are_a_table(place):
    rows = [
        _layer("library", 2.0),
        _layer("triton", 1.0),
        _layer("library", 2.0, "bn_join"),
        _layer("triton", 3.0, "bn_join"),
    ]
    text = _run(place, layers=[*rows, _layer("library", 1.0, "conv_dgrad")])[1]
    assert "Of 2 operators and blocks of resnet50 training bf16 256x224, 1 are faster fused" in text
    assert "| layer1.0 | bn_join | 256x56x56x64 bfloat16 | triton | 1.50 x |" in text


def test_no_loss_is_said_too(place):
    text = _run(
        place,
        h100=[_whole("fused-auto", 80.0), _whole("eager", 100.0)],
        layers=[_layer("library", 2.0), _layer("triton", 1.0)],
    )[1]
    assert "No case is slower than its fastest peer." in text and "faster fused than the library's." in text


def test_bad_files_are_named_and_the_readme_stays(place, capsys):
    (place / "results" / "cut.json").write_text('{"environment": {"commit": "a"}, "rows": [')
    before = (place / "README.md").read_text()
    status, text = _run(place)
    assert status == 2 and text == before and "cut.json: not a results file" in capsys.readouterr().err
    (place / "results" / "cut.json").unlink()
    for text in ("no marks", f"{figures.END} {figures.BEGIN}"):
        (place / "README.md").write_text(text)
        assert _run(place) == (2, text)
        assert "README.md: expected <!-- figures: begin -->" in capsys.readouterr().err


def test_readme_of_the_project_has_the_marks():
    text = (figures._ROOT / "README.md").read_text()
    assert text.count(figures.BEGIN) == text.count(figures.END) == 1
