"""examples/imagenet: what it learns, that a killed run continues exactly, what it skips, and what it refuses."""

import ast
import contextlib
import functools
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torchvision
from cuda_stand_in import CUDAGraph, pretended_card
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms import functional as F

import fused_resnet
from examples.imagenet import checkpoint, dali, data, train
from examples.imagenet.__main__ import main

ROOT = Path(__file__).parent.parent
CLASSES = ("disc", "square", "stripes")
SMALL = "--model cifar_resnet8 --size 16 --batch-size 12 --workers 0"


def _arguments(source, output, options):
    return ["--data", str(source), "--output", str(output), "--device", "cpu", *shlex.split(options)]


def _run(source, output, options):
    return main(_arguments(source, output, options))


def _picture(kind, generator):
    def numbers(low, high, n):
        return tuple(torch.randint(low, high, (n,), generator=generator).tolist())

    picture = Image.new("RGB", (40, 36), numbers(0, 60, 3))
    draw, colour, (x, y) = ImageDraw.Draw(picture), numbers(180, 256, 3), numbers(6, 14, 2)
    if kind == "disc":
        draw.ellipse((x, y, x + 18, y + 18), fill=colour)
    elif kind == "square":
        draw.rectangle((x, y, x + 18, y + 18), outline=colour, width=3)
    else:
        for line in range(y - 6, y + 18, 6):
            draw.line((0, line, 40, line), fill=colour, width=2)
    return picture


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """An ImageFolder of drawn shapes: 72 to train on, 24 to validate."""
    root, generator = tmp_path_factory.mktemp("shapes"), torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("val", 8)):
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                _picture(kind, generator).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def broken(shapes, tmp_path):
    """A copy of the shapes that a test may damage."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def _pack(root, target):
    """The same images as tar shards, in the order of the folders, in two shards."""
    for split in ("train", "val"):
        source = data.Folder(root / split)
        (target / split).mkdir(parents=True)
        for shard in range(2):
            with tarfile.open(target / split / f"{shard}.tar", "w") as archive:
                for i in range(shard * len(source) // 2, (shard + 1) * len(source) // 2):
                    for suffix, content in (("png", source.read(i)), ("cls", str(source.label(i)).encode())):
                        member = tarfile.TarInfo(f"./{i:04}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return target


def _newest(output):
    return checkpoint.find(output)[-1]


# What a step, an epoch and a sample are


def test_learning_rate_warms_up_and_follows_the_cosine():
    factors = [train.lr_factor(step, 4, 12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[6] == pytest.approx((1 + 2**-0.5) / 2) and factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0) and sorted(factors[4:], reverse=True) == factors[4:]
    assert train.lr_factor(0, 0, 5) == 1


def test_schedule_reaches_the_optimizer_scaled_to_the_images_of_a_step(shapes, tmp_path):
    recipe = f"{SMALL} --accumulate 2 --epochs 2 --warmup-epochs 1 --lr 0.5 --checkpoint-every 2"
    assert _run(shapes, tmp_path, recipe) == 0
    states = [torch.load(path) for path in checkpoint.find(tmp_path)]
    assert [state["step"] for state in states] == [1, 3]  # of 3 steps an epoch: step 4 of 6, and the end
    peak = 0.5 * 12 * 2 / 256
    rates = [group["lr"] for state in states for group in state["optimizer"]["param_groups"]]
    assert rates == pytest.approx([peak * train.lr_factor(step, 3, 6) for step in (4, 4, 6, 6)])


def test_no_weight_decay_on_norms_and_biases():
    model = fused_resnet.resnet18(num_classes=5)
    with_decay, without = train.parameter_groups(model, 1e-4)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (1e-4, 0.0)
    heavy = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {id(p) for p in with_decay["params"]} == heavy
    assert {id(p) for p in without["params"]} == {id(p) for p in model.parameters()} - heavy


def test_progressive_resizing_gives_each_size_its_share():
    assert [train.size_of_epoch([128, 192, 224], epoch, 7) for epoch in range(7)] == [128, 128, 128, 192, 192, 224, 224]


def test_order_is_one_permutation_that_ranks_share_and_a_resumed_run_continues():
    def steps(world, batch_size, begin=0):
        orders = [data.TrainOrder(50, batch_size, 2, 3, rank, world) for rank in range(world)]
        for order in orders:
            order.start(1, begin, 16)
        batches = [batch for round_ in zip(*orders) for batch in round_]
        return [key for batch in batches for key in batch]

    whole = steps(1, 8)
    assert steps(2, 4) == whole and steps(4, 2) == whole  # in the same micro-batches
    assert steps(2, 4, begin=1) == whole[16:]
    assert len(set(whole)) == len(whole) == 48 and {key[::2] for key in whole} == {(1, 16)}
    assert [key.index for key in whole] != sorted(key.index for key in whole)


def test_a_sample_is_a_function_of_seed_epoch_and_index(shapes):
    def batches(workers, seed=1, epoch=0):
        prepare = functools.partial(data.augmented, augment="trivial", erase=0.5)
        images = data.Images(data.Folder(shapes / "train"), data._decode, prepare, seed, True)
        order = data.TrainOrder(len(images.source), 6, 1, 0, 0, 1)
        order.start(0, 9, 16)
        keys = [[key._replace(epoch=epoch) for key in batch] for batch in order]
        torch.rand(5)  # the state of the global generator does not count
        before = torch.get_rng_state()
        got = torch.cat([images for images, _, _ in data.loader(images, keys, workers, torch.device("cpu"))])
        assert torch.equal(torch.get_rng_state(), before)
        return got

    first = batches(0)
    assert first.shape == (18, 3, 16, 16) and first.dtype == torch.uint8
    assert torch.equal(batches(2), first)
    assert not torch.equal(batches(0, seed=2), first) and not torch.equal(batches(0, epoch=1), first)


def test_shards_hold_what_the_folders_hold(shapes, tmp_path):
    packed = _pack(shapes, tmp_path)
    for split in ("train", "val"):
        folder, shards = data.open_source(shapes / split), data.open_source(packed / split)
        assert isinstance(shards, data.Shards) and len(shards) == len(folder)
        for i in range(len(folder)):
            assert (shards.read(i), shards.label(i)) == (folder.read(i), folder.label(i))
    assert shards.name(23) == "1.tar/./0023.png"


@pytest.mark.parametrize("index", range(4))
def test_dali_is_told_what_torchvision_does(shapes, index):
    """Its windows, sizes and flips, carried out by torchvision, give the images of the CPU path."""
    encoded = data.Folder(shapes / "train").read(index)
    paths = (dali._random_cut, data.augmented), (dali._central_cut, data.centred)
    for make_cut, make_image in paths:
        with data.seeded(index):
            cut = make_cut(dali._open(encoded), 24)
        (top, left), (height, width) = cut.window.tolist(), cut.extent.tolist()
        picture = F.crop(data._decode(cut.encoded.tobytes()), top, left, height, width)
        picture = F.crop(F.resize(picture, cut.resized.astype(int).tolist()), *cut.corner.tolist(), *cut.kept.tolist())
        image = F.pil_to_tensor(F.hflip(picture) if cut.flip else picture)
        with data.seeded(index):
            assert torch.equal(image, make_image(data._decode(encoded), 24))


# Training


def test_learns_shapes_and_its_weights_load(shapes, tmp_path, capsys):
    recipe = "--model cifar_resnet8 --size 32 --batch-size 12 --workers 0 --epochs 12 --warmup-epochs 2 --lr 1"
    assert _run(shapes, tmp_path, recipe) == 0
    assert checkpoint._read(_newest(tmp_path))["best"] > 0.9
    assert "epoch 12/12: top-1 " in capsys.readouterr().out
    assert _run(shapes, tmp_path, f"{recipe} --weights {tmp_path / 'best.pt'} --evaluate") == 0
    top1 = float(capsys.readouterr().out.removeprefix("top-1 ").partition("%")[0])
    assert top1 > 90


@pytest.mark.gpu
def test_captured_steps_learn_shapes(shapes, tmp_path):
    recipe = "--model cifar_resnet8 --size 24 32 --batch-size 12 --workers 0 --epochs 12 --warmup-epochs 2 --lr 1"
    assert _run(shapes, tmp_path, f"{recipe} --device cuda --graph --dtype fp32") == 0
    assert torch.load(_newest(tmp_path), map_location="cpu")["best"] > 0.9


@pytest.mark.parametrize("options", ["--graph --size 16 24", "--dtype fp16 --accumulate 2", "--deterministic"])
def test_steps_on_a_pretended_card(shapes, tmp_path, monkeypatch, options):
    """What runs on CUDA devices alone: a graph for each size, its learning rate in a tensor, the card's generator."""
    recipe = f"{SMALL} --epochs 2 --warmup-epochs 1 --checkpoint-every 2 --ema 0.9 {options} --device cuda"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pretended_card(monkeypatch):
        try:
            with monkeypatch.context() as patch, pytest.raises(_Interrupted):
                _interrupt_after(patch, 2)
                _run(shapes, tmp_path, recipe)
            assert _run(shapes, tmp_path, f"{recipe} --resume") == 0
        finally:
            torch.use_deterministic_algorithms(False)
    # One for each size, and one more for the first in the continued run; a loader's thread may go on meanwhile.
    assert CUDAGraph.modes == ["thread_local"] * (3 if "--graph" in options else 0)
    state = torch.load(_newest(tmp_path))
    assert all(isinstance(group["lr"], float) for group in state["optimizer"]["param_groups"])
    assert all("cuda" in generators for generators in state["generators"])


@pytest.mark.parametrize("options", ["", "--unfused", "--ema 0.5"])
def test_saved_weights_load_in_torchvision(tmp_path, options):
    network = "--synthetic-images 8 --classes 7 --model resnet18 --size 32 --batch-size 4"
    assert _run("synthetic", tmp_path, f"{network} --epochs 1 --warmup-epochs 0 --workers 0 {options}") == 0
    model = torchvision.models.resnet18(num_classes=7)
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.isfinite(model.eval()(torch.rand(1, 3, 32, 32))).all()
    ours = fused_resnet.resnet18(weights=tmp_path / "best.pt")
    assert ours.fc.out_features == 7


def test_fused_chain_trains_as_the_library_does(shapes, tmp_path):
    for impl in ("auto", "reference"):
        recipe = f"{SMALL} --epochs 1 --warmup-epochs 0 --lr 0.02 --impl {impl}"
        assert _run(shapes, tmp_path / impl, recipe) == 0
    library, chain = (torch.load(tmp_path / impl / "weights.pt") for impl in ("auto", "reference"))
    assert not all(torch.equal(library[name], chain[name]) for name in library)  # another implementation ran
    for name in library:
        # An epoch of steps amplifies fp32 rounding.
        torch.testing.assert_close(chain[name], library[name], rtol=1e-3, atol=1e-4)


def test_fine_tuning_keeps_all_but_the_classifier(shapes, tmp_path):
    torch.manual_seed(1)
    donor = torchvision.models.resnet18(num_classes=9)
    torch.save(donor.state_dict(), tmp_path / "donor.pt")
    recipe = "--model resnet18 --size 32 --batch-size 36 --epochs 1 --lr 0 --warmup-epochs 0 --workers 0"
    assert _run(shapes, tmp_path / "out", f"{recipe} --weights {tmp_path / 'donor.pt'}") == 0
    tuned = torch.load(tmp_path / "out" / "weights.pt")
    assert torch.equal(tuned["layer4.1.conv2.weight"], donor.layer4[1].conv2.weight)
    assert tuned["fc.weight"].shape == (3, 512)


@pytest.fixture
def scalars(monkeypatch):
    """A stand-in for TensorBoard that keeps what is written."""
    kept = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            kept.append(("purge", purge_step))

        def add_scalar(self, name, value, step):
            kept.append((name, step))

        def flush(self): ...

        def close(self): ...

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    return kept


def test_tensorboard_scalars(shapes, tmp_path, scalars):
    assert _run(shapes, tmp_path, f"{SMALL} --epochs 1 --warmup-epochs 0 --log-every 4 --tensorboard") == 0
    assert scalars[0] == ("purge", 1)
    assert [entry for entry in scalars if entry[0] == "train/loss"] == [("train/loss", 4), ("train/loss", 6)]
    assert {("train/lr", 4), ("train/images per s", 4), ("val/top1", 6), ("val/top5", 6)} <= set(scalars)


# Killed and continued

KILLED = """
import os, signal, sys
from examples.imagenet import checkpoint, train
from examples.imagenet.__main__ import main

step = train.Trainer._step

def killed_at(number, kill):
    def run(self, batches):
        if self.steps_done == number:
            kill()
        return step(self, batches)
    train.Trainer._step = run

def while_writing():
    def half(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.os.fsync = half

{}
sys.exit(main(sys.argv[1:]))
"""
MIDDLE = "killed_at(7, lambda: os.kill(os.getpid(), signal.SIGKILL))"
WRITING = "killed_at(7, while_writing)"
TERMINATED = "killed_at(7, lambda: os.killpg(0, signal.SIGTERM))"
# Everything that has a state: two sizes, accumulation, averaged weights, a worker, augmentation; 12 steps in 4 epochs.
STATEFUL = (
    "--model cifar_resnet8 --size 16 24 --batch-size 12 --accumulate 2 --epochs 4 --warmup-epochs 1 --lr 1 --ema 0.8 "
    "--augment trivial --erase 0.2 --workers 1 --checkpoint-every 4"
)


@pytest.fixture(scope="module")
def uninterrupted(shapes, tmp_path_factory):
    """The folder of a run that nobody killed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert _run(shapes, output, STATEFUL) == 0
    return output


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _assert_same_end(output, other):
    """Weights, optimizer, averages, schedule, generators and best accuracy, to the last bit."""
    assert _equal(torch.load(_newest(output)), torch.load(_newest(other)))
    for name in ("weights.pt", "best.pt"):
        assert _equal(torch.load(output / name), torch.load(other / name))


@pytest.mark.parametrize(
    ("death", "status", "newest"),
    [(MIDDLE, -signal.SIGKILL, 6), (WRITING, -signal.SIGKILL, 6), (TERMINATED, 0, 8)],
    ids=["kill", "kill while writing", "SIGTERM"],
)
def test_a_stopped_run_continues_to_the_same_bits(shapes, tmp_path, uninterrupted, death, status, newest):
    """Checkpoints are due at steps 4, 8, 12 and at each epoch's end, 3, 6, 9, 12; death comes in step 8."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(death), *_arguments(shapes, tmp_path, STATEFUL)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == status, done.stderr
    assert ("SIGTERM: stopped after step 8; --resume continues" in done.stdout) == (death == TERMINATED)
    assert bool(list(tmp_path.glob("*.tmp"))) == (death == WRITING)
    assert _newest(tmp_path).name.startswith(f"checkpoint-{newest:08d}-")
    assert _run(shapes, tmp_path, f"{STATEFUL} --resume") == 0
    _assert_same_end(tmp_path, uninterrupted)
    assert not list(tmp_path.glob("*.tmp")) and len(checkpoint.find(tmp_path)) == 2


class _Interrupted(Exception):
    pass


def _interrupt_after(monkeypatch, step):
    """Let the run die right after the checkpoint of that step."""
    save = train.Trainer.save

    def dying(self):
        save(self)
        if self.steps_done == step:
            raise _Interrupted

    monkeypatch.setattr(train.Trainer, "save", dying)


def test_loss_scaler_continues_too(shapes, tmp_path, monkeypatch):
    recipe = "--model cifar_resnet8 --size 8 --batch-size 24 --workers 0 --epochs 2 --warmup-epochs 1"
    recipe = f"{recipe} --checkpoint-every 1 --dtype fp16"
    assert _run(shapes, tmp_path / "whole", recipe) == 0
    with monkeypatch.context() as patch, pytest.raises(_Interrupted):
        _interrupt_after(patch, 4)
        _run(shapes, tmp_path / "parts", recipe)
    assert _run(shapes, tmp_path / "parts", f"{recipe} --resume") == 0
    assert torch.load(_newest(tmp_path / "whole"))["scaler"]["_growth_tracker"] == 6
    _assert_same_end(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_used(shapes, tmp_path, uninterrupted, capsys, damage):
    output = Path(shutil.copytree(uninterrupted, tmp_path / "out"))
    before, newest = checkpoint.find(output)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert _run(shapes, output, f"{STATEFUL} --resume") == 0
    said = capsys.readouterr()
    assert f"{newest} is corrupt (its SHA-256 begins with " in said.err
    assert f"continuing from {before}" in said.out
    assert newest.with_suffix(".corrupt").exists()
    _assert_same_end(output, uninterrupted)
    for path in checkpoint.find(output):
        path.write_bytes(b"")
    assert _run(shapes, output, f"{STATEFUL} --resume") == 2
    assert f"every checkpoint in {output} was corrupt" in capsys.readouterr().err


# Several processes


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SYNCED = "--model resnet18 --size 32 --epochs 1 --warmup-epochs 0 --lr 0.2 --sync-bn --workers 0"
THREE = "--model cifar_resnet8 --size 16 --batch-size 8 --epochs 2 --warmup-epochs 1 --workers 0"


def _in_double(patch):
    """Train in fp64: in fp32 a rounding that turns one ReLU on or off hides what is compared."""
    on_device = train.Trainer._on_device

    def in_double(self, images, labels):
        return on_device(self, images, labels)[0].double(), labels

    patch.setattr(train.Trainer, "_on_device", in_double)
    patch.setattr(fused_resnet.models, "resnet18", lambda **options: fused_resnet.resnet18(**options).double())


def _launch(rank, world, port, source, output, options):
    """What torchrun does for a rank; its exit status and what it said on stderr."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = _run(source, output, options)
    return status, said.getvalue()


def _sync_and_disagree(rank, folder, source, ports):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        _in_double(patch)
        assert _launch(rank, 2, ports[0], source, folder / "synced", f"{SYNCED} --batch-size 18") == (0, "")
    outcome = _launch(rank, 2, ports[1], source, folder / "apart", f"{SYNCED} --batch-size 18 --seed {rank}")
    (folder / f"apart.{rank}").write_text(repr(outcome))


def test_two_processes_with_sync_bn_equal_one_on_the_whole_batch(shapes, tmp_path, monkeypatch):
    """And two that were given different arguments are refused."""
    mp.spawn(_sync_and_disagree, (tmp_path, shapes, [_free_port(), _free_port()]), nprocs=2)
    said = [ast.literal_eval((tmp_path / f"apart.{rank}").read_text()) for rank in range(2)]
    assert said == [(2, "rank 1 differs from rank 0: --seed 1 instead of 0\n"), (2, "")]
    _in_double(monkeypatch)
    assert _run(shapes, tmp_path / "one", f"{SYNCED} --batch-size 36") == 0
    one, two = (torch.load(tmp_path / folder / "weights.pt") for folder in ("one", "synced"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-9, msg=name)
    assert one["conv1.weight"].dtype == torch.double and one["bn1.num_batches_tracked"] == 2


def _die_and_continue(rank, folder, source, ports):
    torch.set_num_threads(1)
    assert _launch(rank, 3, ports[0], source, folder / "whole", THREE) == (0, "")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Interrupted):
        _interrupt_after(patch, 3)
        _launch(rank, 3, ports[1], source, folder / "parts", THREE)
    assert _launch(rank, 3, ports[2], source, folder / "parts", f"{THREE} --resume") == (0, "")


def test_three_processes_continue_to_the_same_bits(shapes, tmp_path):
    """Three: a sum of two numbers does not depend on its order, and DDP's buckets settle after a first step."""
    mp.spawn(_die_and_continue, (tmp_path, shapes, [_free_port() for _ in range(3)]), nprocs=3)
    _assert_same_end(tmp_path / "parts", tmp_path / "whole")


# What is skipped, and what is refused


def _damage(root, count):
    """Truncate that many training images and one of the validation set; their names."""
    names = sorted((root / "train").rglob("*.png"))[5 : 5 + count]
    for path in (*names, root / "val" / "disc" / "00.png"):
        path.write_bytes(path.read_bytes()[:60])
    return [str(path.relative_to(root / "train")) for path in names]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_images_are_named_and_skipped(broken, tmp_path, capsys, workers):
    names = _damage(broken, 3)
    recipe = f"{SMALL} --workers {workers} --epochs 1 --warmup-epochs 0"
    assert _run(broken, tmp_path / "out", f"{recipe} --max-unreadable 4") == 0
    said = capsys.readouterr()
    assert all(said.err.count(f"skipped, unreadable: {name}: ") == 1 for name in (*names, "disc/00.png"))
    assert ", 4 images unreadable" in said.out
    assert _run(broken, tmp_path / "training", f"{recipe} --max-unreadable 2") == 1
    assert "3 unreadable images in one epoch; --max-unreadable is 2" in capsys.readouterr().err
    assert _run(broken, tmp_path / "validation", f"{recipe} --max-unreadable 3") == 1
    assert "4 unreadable images in one epoch; --max-unreadable is 3" in capsys.readouterr().err


def test_replacement_is_the_next_readable_image(broken):
    _damage(broken, 2)
    images = data.Images(data.Folder(broken / "train"), data._decode, data.centred, 0, replace=True)
    bad, good = images[data.Key(0, 5, 16)], images[data.Key(0, 7, 16)]
    assert torch.equal(bad[0], good[0]) and bad[1] == good[1]
    assert bad[2].startswith("disc/05.png: ") and good[2] == ""


def test_nothing_readable_stops_the_run(broken, tmp_path, capsys):
    _damage(broken, 72)
    assert _run(broken, tmp_path / "out", SMALL) == 1
    assert "32 images in a row cannot be read, beginning with " in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(shapes, tmp_path, capsys):
    assert _run(shapes, tmp_path, f"{SMALL} --lr 1e30 --warmup-epochs 0") == 1
    assert "the loss is nan at step 6; no checkpoint is written from there" in capsys.readouterr().err
    assert not checkpoint.find(tmp_path)


def _without(folder):
    return lambda root: shutil.rmtree(root / folder)


def _emptied(root):
    for path in (root / "train" / "disc").iterdir():
        path.unlink()


def _shards(change):
    def damage(root):
        packed = _pack(root, root / "packed")
        for split in ("train", "val"):
            shutil.rmtree(root / split)
            (packed / split).rename(root / split)
        change(root / "train" / "0.tar")

    return damage


def _lone_image(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("7.jpg"))


def _nothing(_):
    pass


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (_without("val"), "", "--data: expected the folders train and val in "),
        (_without("train/disc"), "", "--data: train and val have different classes: disc in one of them alone"),
        (_emptied, "", "Found no valid file for the classes disc"),
        (_nothing, "--classes 4", "--classes: 4, but "),
        (_shards(lambda path: path.write_bytes(b"no tar" * 200)), "", "0.tar is no uncompressed tar of KEY.jpg"),
        (_shards(_lone_image), "", "0.tar has 7.jpg, but no .cls beside it"),
        (_shards(_nothing), "--classes 2", "--classes: expected class numbers from 0 to 1, got 0 to 2"),
        (_nothing, "--batch-size 73", "--batch-size: a step takes 73 images"),
        (_nothing, "--model resnet19", "--model: expected resnet18, "),
        (_nothing, "--model cifar_resnet9", "depth: expected 6n + 2"),
        (_nothing, "--weights nowhere.pt", "--weights: cifar_resnet8 has no named weights"),
        (_nothing, "--model resnet18 --weights nowhere.pt", "weights: expected one of IMAGENET1K_V1, "),
        (_nothing, "--graph", "--graph: a CUDA graph needs a CUDA device"),
        (_nothing, "--sync-bn", "--sync-bn: on CPUs only fused blocks have it"),
        (_nothing, "--evaluate", "--evaluate: expected --weights"),
        (_nothing, "--warmup-epochs 91", "--warmup-epochs: at most --epochs 90, got 91"),
        (_nothing, "--loader dali --erase 0.1", "--loader: dali takes no --augment, --erase"),
        (_nothing, "--loader dali", "--loader: dali needs NVIDIA DALI: pip install"),
        (_nothing, "--tensorboard", "--tensorboard: tensorboard is not installed: pip install tensorboard"),
        (_nothing, "--impl cuda", "--impl: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_training(broken, tmp_path, monkeypatch, capsys, damage, options, message):
    for absent in ("tensorboard", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, absent, None)
    damage(broken)
    assert _run(broken, tmp_path / "out", f"{SMALL} {options}") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.parametrize("option", ["--batch-size 0", "--ema 1", "--lr -1", "--dtype int8"])
def test_values_out_of_range_are_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as stop:
        _run("synthetic", tmp_path, option)
    assert stop.value.code == 2
    assert f"argument {option.split()[0]}: " in capsys.readouterr().err


def test_a_folder_with_checkpoints_is_neither_overwritten_nor_continued_by_another_run(shapes, uninterrupted, capsys):
    newest = _newest(uninterrupted)
    assert _run(shapes, uninterrupted, STATEFUL) == 2
    assert f"{uninterrupted} has {newest.name}; use --resume or another folder" in capsys.readouterr().err
    assert _run(shapes, uninterrupted, f"{STATEFUL} --model cifar_resnet14 --lr 2 --resume") == 2
    said = (
        f"--resume: {newest} was written with --model cifar_resnet8 instead of cifar_resnet14, --lr 1.0 instead of 2.0"
    )
    assert said in capsys.readouterr().err
