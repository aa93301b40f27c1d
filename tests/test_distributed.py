"""SyncBatchNorm children and data parallelism over two gloo processes, against one process on the whole batch."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import fused_resnet

UNEVEN, ONE_EMPTY = (3, 2), (5, 0)  # images of each rank


def _block(scheme):
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(6, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    block = fused_resnet.FusedBottleneck(6, 4, 2, down).double()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return block


def _run(block, x, gradient, scheme):
    from fused_resnet.modules import conv_bn

    x = x.clone().requires_grad_()
    units = [conv_bn(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3)]
    out = fused_resnet.residual_block(x, units, conv_bn(*block.downsample), scheme=scheme)
    out.backward(gradient)
    return out.detach(), x.grad


def _data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 6, 7, 5, generator=generator, dtype=torch.double)
    return x, torch.randn(5, 16, 4, 3, generator=generator, dtype=torch.double)


def _worker(rank, folder, scheme, compiled, sizes):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        x, gradient = (t.split(sizes)[rank] for t in _data())
        block = nn.SyncBatchNorm.convert_sync_batchnorm(_block(scheme))
        assert type(block.bn1) is nn.SyncBatchNorm and block.unfused_reason() is None
        if compiled:
            run = torch.compile(block, fullgraph=True, backend="aot_eager")
            leaf = x.clone().requires_grad_()
            out = run(leaf)
            out.backward(gradient)
            results = out.detach(), leaf.grad
        else:
            results = _run(block, x, gradient, scheme)
        grads = {name: p.grad for name, p in block.named_parameters()}
        torch.save((results, grads, dict(block.named_buffers())), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("scheme", "compiled", "sizes"),
    [("stored", False, UNEVEN), ("moments", False, UNEVEN), ("auto", True, UNEVEN), ("moments", False, ONE_EMPTY)],
    ids=["stored", "moments", "compiled", "a process without images"],
)
def test_two_processes_equal_one_on_the_whole_batch(tmp_path, scheme, compiled, sizes):
    mp.spawn(_worker, (str(tmp_path), scheme, compiled, sizes), nprocs=2)
    block = _block(scheme)
    x, gradient = _data()
    with fused_resnet.use("reference"):
        out, dx = _run(block, x, gradient, "auto" if compiled else scheme)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([results[0] for results, _, _ in ranks]), out, **close)
    torch.testing.assert_close(torch.cat([results[1] for results, _, _ in ranks]), dx, **close)
    for name, p in block.named_parameters():
        torch.testing.assert_close(sum(grads[name] for _, grads, _ in ranks), p.grad, **close, msg=name)
    for name, value in block.named_buffers():
        for _, _, buffers in ranks:
            torch.testing.assert_close(buffers[name], value, **close, msg=name)


def _data_parallel(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(fused_resnet.FusedBasicBlock(6, 6))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with fused_resnet.use("reference"):
            for step in range(3):
                optimizer.zero_grad()
                x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(10 * step + rank))
                model(x).square().mean().backward()
                optimizer.step()
        torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_keeps_ranks_equal(tmp_path):
    """DDP broadcasts the buffers into each forward: backward must not read them."""
    mp.spawn(_data_parallel, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["bn1.num_batches_tracked"] == 3
    for name in first:
        if "running" not in name:  # rank 0's are broadcast at the next forward
            assert torch.equal(first[name], second[name]), name
