"""Images: minibatches depend on the seed and the step alone."""

import pytest
import torch

from pyro_flowguides.vae import Images, Minibatches


def numbered(count):
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return Images(pixels, pixels[:3], pixels[:3], levels=256, name="numbers")


def test_an_epoch_shows_every_image_once_in_a_new_order():
    minibatches = Minibatches(numbered(30), batch_size=6, shards=2, seed=3)
    epochs = [
        torch.cat([minibatches.shard(step, part)[:, 0, 0, 0] for step in range(5 * e, 5 * e + 5) for part in range(2)])
        for e in range(2)
    ]
    assert all(epoch.sort().values.tolist() == list(range(30)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_shard_does_not_depend_on_earlier_requests(dynamic):
    images = numbered(200)
    minibatches = Minibatches(images, batch_size=20, shards=4, dynamic=dynamic, seed=1)
    earlier = {(step, part): minibatches.shard(step, part) for step in (0, 7, 23) for part in range(4)}
    fresh = Minibatches(images, batch_size=20, shards=4, dynamic=dynamic, seed=1)
    for step, part in reversed(earlier):
        assert torch.equal(fresh.shard(step, part), earlier[step, part])


def test_dynamic_binarization_draws_again_and_keeps_the_mean():
    pixels = torch.full((50, 1, 40, 40), 64, dtype=torch.uint8)
    minibatches = Minibatches(Images(pixels, pixels, pixels, levels=256, name="grey"), batch_size=50, dynamic=True)
    first, second = minibatches.shard(0, 0), minibatches.shard(1, 0)
    assert set(first.unique().tolist()) == {0, 1}
    assert not torch.equal(first, second)
    assert abs(first.double().mean() - 64 / 255) < 5 * 0.44 / 80000**0.5


def test_the_order_depends_on_the_seed():
    assert not torch.equal(*(Minibatches(numbered(100), batch_size=50, seed=seed).shard(0, 0) for seed in (0, 1)))


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match=r"batch size must lie in 1 … 30 \(training images\), got 31"):
        Minibatches(numbered(30), batch_size=31)
    with pytest.raises(ValueError, match="a batch of 10 images cannot be split into 4 equal shards"):
        Minibatches(numbered(30), batch_size=10, shards=4)
