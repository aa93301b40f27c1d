"""The user's own table of tuned plans: where it lies, what makes it invalid, and processes that write or read it at the
same time."""

import json
import os
import warnings

import pytest
import torch
import torch.multiprocessing as mp

from fused_resnet import plan, tuned, tuning
from fused_resnet.plan import Problem, TileConfig

H100 = plan.Device.default(90)
TILE = TileConfig(32, 16)


def _problems(count=4):
    return [Problem("bn_act", 1, 8, 8, 16 * (i + 1), 16 * (i + 1)) for i in range(count)]


def _write(card, problems, times=None):
    path = tuned.location(90, card)
    entries = [plan.table_entry(p, times or {"library": 2.0, "triton": 1.0}, TILE) for p in problems]
    tuning.save(path, 90, tuned.stamp(card), entries, tuned.stamp(card))
    return path


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_RESNET_PLANS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.folder() == tmp_path / "fused_resnet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.folder().parts[-2:] == (".cache", "fused_resnet")
    monkeypatch.setenv("FUSED_RESNET_PLANS", "/somewhere")
    assert str(tuned.folder()) == "/somewhere"
    monkeypatch.setenv("FUSED_RESNET_PLANS", "")
    assert tuned.folder() is None and tuned.location(90, "card") is None and tuned.load(90, "card") is None


def test_tuned_table_is_found_by_card_and_environment(home, monkeypatch):
    assert tuned.load(90, "H100") is None
    path = _write("H100", _problems(2))
    table = tuned.load(90, "H100")
    assert table.name == str(path) and list(table.measured) == _problems(2)
    assert table.measured[_problems(1)[0]].reason == "measured on H100: triton 1.0 us, library 2.0 us"
    assert tuned.load(90, "H200") is None
    for name, value in (("torch.__version__", "9.9"), ("fused_resnet.tuned._sources", lambda: "edited")):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            assert tuned.load(90, "H100") is None
    path.rename(tuned.location(90, "H200"))
    with pytest.warns(UserWarning, match="measured with card 'H100'; this is 'H200'"):
        assert tuned.load(90, "H200").measured == {}


def test_stamp_changes_with_the_package_files(monkeypatch):
    before = tuned.stamp("card")
    assert set(before) == {"card", "torch", "triton", "fused_resnet"} and before["torch"] == torch.__version__
    tuned._sources.cache_clear()
    read = tuned.Path.read_bytes
    monkeypatch.setattr(tuned.Path, "read_bytes", lambda p: read(p) + (b"#" if p.name == "conv1x1.py" else b""))
    assert tuned.stamp("card")["fused_resnet"] != before["fused_resnet"]
    monkeypatch.undo()
    tuned._sources.cache_clear()
    assert tuned.stamp("card") == before


@pytest.mark.parametrize("text", ["", '{"format": 2, "arch": 90, "ent', "[]", '{"format": 2, "arch": 80}'])
def test_damaged_user_table_warns_with_its_name(home, text):
    path = _write("H100", _problems(1))
    path.write_text(text)
    with pytest.warns(UserWarning, match=path.name):
        assert tuned.load(90, "H100").measured == {}


def test_user_table_with_an_unknown_kernel_keeps_the_rest(home):
    path = _write("H100", _problems(2))
    table = json.loads(path.read_text())
    table["entries"][0]["us"]["winograd"] = 0.1
    path.write_text(json.dumps(table))
    with pytest.warns(UserWarning, match=rf"{path.name}: 1 entries left out, the first: unknown kernel: winograd"):
        assert list(tuned.load(90, "H100").measured) == _problems(2)[1:]


def test_folder_that_cannot_be_read_warns(home):
    _write("H100", _problems(1))
    tuned.location(90, "H200").mkdir()
    with pytest.warns(UserWarning, match=tuned.location(90, "H200").name):
        assert tuned.load(90, "H200") is None


def _fork(function, argument):
    """Two processes of function(rank, argument). They compute nothing, so that a fork does, and need not start anew."""
    context = mp.get_context("fork")
    processes = [context.Process(target=function, args=(rank, argument)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def _tune_beside(rank, path):
    for i in range(15):
        problem = Problem("bn_act", 1, 8, 8, 8 * (i + 1), 8 * (i + 1), groups=rank + 1)
        tuning.save(path, 90, {}, [plan.table_entry(problem, {"library": 1.0})], {})


def test_two_processes_that_tune_lose_nothing(tmp_path):
    _fork(_tune_beside, tmp_path / "sm90.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = plan.load_table(tmp_path / "sm90.json", 90)
    assert {(p.c // 8, p.groups) for p in table} == {(i + 1, rank + 1) for i in range(15) for rank in range(2)}


def _rank(rank, folder):
    """Each rank has a folder of its own; the second one's holds a table at first, and changes later."""
    os.environ["FUSED_RESNET_PLANS"] = f"{folder}/{rank}"
    distributed = torch.distributed
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        if rank == 1:
            _write("H100", _problems(3))
            tables = [tuned.load(90, "H100")]
            _write("H100", _problems(4))
            tables.append(tuned.load(90, "H100"))
            distributed.barrier()
        else:
            distributed.barrier()
            tables = [tuned.load(90, "H100"), tuned.load(90, "H100")]
        other = tuned.load(90, "H200")
        torch.save(([list(t.measured) for t in tables], other), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_ranks_of_a_job_use_one_table(tmp_path):
    _fork(_rank, tmp_path)
    for rank in range(2):
        tables, other = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert tables == [_problems(3)] * 2 and other is None


def test_job_without_a_store_goes_without_tuned_plans(home, monkeypatch):
    _write("H100", _problems(1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: None)
    with pytest.warns(UserWarning, match="no key-value store"):
        assert tuned.load(90, "H100") is None
