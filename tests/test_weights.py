"""weights=: enum members, names, files; damaged and foreign checkpoints are named and change nothing."""

import subprocess
import sys

import pytest
import torch
import torchvision

import fused_resnet
from fused_resnet import weights


@pytest.fixture
def state():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=6).state_dict()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "_orig_mod.module."])
def test_file(tmp_path, state, wrap, prefix):
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap({prefix + key: value for key, value in state.items()}), path)
    for source in (path, str(path)):
        model = fused_resnet.resnet18(weights=source)
        assert model.fc.out_features == 6
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_truncated_file(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights: .*checkpoint.pt is not a readable checkpoint"):
        fused_resnet.resnet18(weights=path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {0: torch.ones(2)}, torch.ones(2), {"model": {}}])
def test_file_without_state(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"checkpoint.pt holds no state_dict"):
        fused_resnet.resnet18(weights=path)


def test_pickled_module_and_text_are_refused_in_one_line(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for write in (lambda: torch.save(torch.nn.Linear(2, 2), path), lambda: path.write_text("not a checkpoint")):
        write()
        with pytest.raises(ValueError, match=r"checkpoint.pt is not a readable checkpoint: it is damaged or"):
            fused_resnet.resnet18(weights=path)


def test_classes_that_do_not_fit_the_file(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"checkpoint.pt does not fit ResNet: mis-shaped fc.weight \(6, 512\)"):
        fused_resnet.resnet18(weights=path, num_classes=7)


def test_foreign_checkpoint_is_described_and_nothing_changes(tmp_path, state):
    model = fused_resnet.resnet18(num_classes=6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    foreign = {key: value for key, value in state.items() if key != "bn1.bias"}
    foreign["head.weight"] = torch.zeros(2)
    foreign["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(ValueError) as error:
        weights.load(model, foreign, "file.pt")
    for part in (
        "file.pt does not fit ResNet",
        "missing bn1.bias",
        "unexpected head.weight",
        "conv1.weight (64, 1, 7, 7)",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_checkpoint_of_another_depth(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"does not fit ResNet: missing layer1.2.conv1.weight"):
        fused_resnet.resnet34(weights=path)


def test_old_checkpoint_without_batch_counters(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)
    assert fused_resnet.resnet18(weights=path).bn1.num_batches_tracked == 0


def test_frozen_batch_norm_takes_a_plain_checkpoint(tmp_path, state):
    """As detectors build their backbones: FrozenBatchNorm2d has no num_batches_tracked, the checkpoint does."""
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    model = fused_resnet.resnet18(weights=path, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.save({**state, "bn9.num_batches_tracked": torch.tensor(0)}, path)
    with pytest.raises(ValueError, match="unexpected bn9.num_batches_tracked"):
        fused_resnet.resnet18(weights=path)


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2"])
def test_names_resolve_to_torchvisions_members(name):
    expected = torchvision.models.ResNet50_Weights[name.rpartition(".")[2]]
    assert weights.resolve("resnet50", name) is expected
    assert weights.resolve("resnet50", expected) is expected


def test_unknown_name_lists_the_allowed_ones():
    with pytest.raises(
        ValueError, match=r"weights: expected one of IMAGENET1K_V1, .*path of an existing file, got 'V3'"
    ):
        fused_resnet.resnet50(weights="V3")
    with pytest.raises(ValueError, match="ResNet18_Weights.IMAGENET1K_V1"):
        fused_resnet.resnet50(weights="ResNet18_Weights.IMAGENET1K_V1")
    with pytest.raises(TypeError, match="weights: expected a ResNet50_Weights, a name or a path"):
        fused_resnet.resnet50(weights=torchvision.models.ResNet18_Weights.DEFAULT)


def test_member_loads_its_state_and_fixes_the_classes(monkeypatch):
    member = torchvision.models.ResNet18_Weights.DEFAULT
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(type(member), "get_state_dict", lambda self, **_: state)
    model = fused_resnet.resnet18(weights="DEFAULT", progress=False)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    with pytest.raises(ValueError, match=r"num_classes: .*has 1000 classes, got 10"):
        fused_resnet.resnet18(weights=member, num_classes=10)


def test_without_torchvision_files_load_and_names_are_refused(monkeypatch, tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert fused_resnet.resnet18(weights=path).fc.out_features == 6
    with pytest.raises(ImportError, match=r"weights: 'DEFAULT' is no existing file, and torchvision.* of resnet18"):
        fused_resnet.resnet18(weights="DEFAULT")


def test_import_does_not_import_torchvision():
    code = "import sys, fused_resnet; fused_resnet.resnet18(num_classes=2); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
