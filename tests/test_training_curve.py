"""A long training run through the kernels on a GPU: its loss curve lies on torchvision's."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits

import fused_resnet

STEPS, BATCH, SIZE, WINDOW = 300, 64, 64, 25


def digits(device):
    """scikit-learn's handwritten digits as images [1797, 3, SIZE, SIZE] and their labels."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    return x.contiguous(memory_format=torch.channels_last).to(device), torch.from_numpy(bunch.target).to(device)


def curve(model, x, target, seed, steps=STEPS):
    """Mean loss of each WINDOW steps of SGD on batches drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator).to(x.device)
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x[rows]).float(), target[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().view(-1, WINDOW).mean(1).cpu()


def network(build, seed, device):
    torch.manual_seed(seed)
    return build(num_classes=10).to(device, memory_format=torch.channels_last).train()


@pytest.mark.gpu
def test_the_loss_curve_lies_within_the_spread_of_two_seeds():
    x, target = digits("cuda")
    theirs = curve(network(torchvision.models.resnet50, 0, "cuda"), x, target, 0)
    other = curve(network(torchvision.models.resnet50, 1, "cuda"), x, target, 1)
    with fused_resnet.use("triton"):
        ours = curve(network(fused_resnet.resnet50, 0, "cuda"), x, target, 0)
    assert ours[-1] < 0.2 * ours[0], f"it does not learn: {ours.tolist()}"
    assert (ours - theirs).norm() <= (other - theirs).norm(), f"{ours.tolist()}\n{theirs.tolist()}\n{other.tolist()}"
