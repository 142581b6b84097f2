"""Images from every source, their fixed binarization, and errors that name the file."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_flowguides.vae import Images, load_images
from pyro_flowguides.vae.training import image_files


def grey(count, height=6, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width), dtype=np.uint8)


def idx(array):
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def npz(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "images.npz", **arrays)
        return tmp_path / "images.npz"

    return save


def pictures(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number:03}.png")


# -- sources -----------------------------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap_and_always_the_same():
    images = load_images()
    assert (images.shape, images.levels) == ((1, 8, 8), 17)
    assert [len(images.train), len(images.valid), len(images.test)] == [1437, 180, 180]
    assert int(torch.cat([images.train, images.valid, images.test]).max()) == 16
    assert images.fingerprint == load_images("digits").fingerprint


@pytest.mark.parametrize("layout", ["flat", "plain", "channels_first", "channels_last", "floats"])
def test_every_layout_of_an_npz_file_gives_the_same_pixels(npz, layout):
    train, test = grey(20), grey(5, seed=1)
    arrange = {
        "flat": lambda a: a.reshape(len(a), -1),
        "plain": lambda a: a,
        "channels_first": lambda a: a[:, None],
        "channels_last": lambda a: a[..., None],
        "floats": lambda a: a / 255,
    }[layout]
    images = load_images(npz(train=arrange(train), valid=arrange(test), test=arrange(test)))
    assert images.levels == 256
    assert torch.equal(images.train, torch.from_numpy(train)[:, None])
    assert torch.equal(images.valid, images.test)


def test_flat_rows_of_images_that_are_not_square_need_a_shape(npz):
    path = npz(train=grey(20, 7, 5).reshape(20, -1), test=grey(5, 7, 5).reshape(5, -1))
    with pytest.raises(ValueError, match=r"rows of 35 pixels do not make images of 5x5; give the shape"):
        load_images(path)
    assert load_images(path, shape=(7, 5)).shape == (1, 7, 5)


def test_a_missing_validation_split_is_held_out_of_the_training_images(npz):
    train = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)
    images = load_images(npz(train=train, test=train[:3]))
    values = torch.cat([images.train, images.valid])[:, 0, 0, 0]
    assert (len(images.train), len(images.valid)) == (45, 5)
    assert values.sort().values.tolist() == list(range(50))


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(tmp_path, compressed):
    train, test = grey(30), grey(4, seed=1)
    for name, array in {"train-images-idx3-ubyte": train, "t10k-images-idx3-ubyte": test}.items():
        content = idx(array)
        (tmp_path / (name + ".gz" * compressed)).write_bytes(gzip.compress(content) if compressed else content)
    images = load_images(tmp_path)
    assert (len(images.train), len(images.valid), images.levels) == (27, 3, 256)
    assert torch.equal(images.test, torch.from_numpy(test)[:, None])


def test_a_folder_of_grey_images(tmp_path):
    pictures(tmp_path, grey(20))
    images = load_images(tmp_path)
    assert (images.shape, len(images.train), len(images.valid), len(images.test)) == ((1, 6, 6), 16, 2, 2)


def test_a_folder_of_splits_with_one_color_image(tmp_path):
    pictures(tmp_path / "train", grey(20))
    color = np.stack([grey(2), grey(2, seed=1), grey(2, seed=2)], axis=-1)
    pictures(tmp_path / "test", color)
    images = load_images(tmp_path)
    assert images.shape == (3, 6, 6)
    assert torch.equal(images.test, torch.from_numpy(color).permute(0, 3, 1, 2))


def test_binary_images_are_recognized_and_binarizing_changes_nothing(npz):
    train = grey(20) % 2
    images = load_images(npz(train=train, test=train))
    assert images.levels == 2
    assert torch.equal(images.binarized().train, images.train)


def test_binarization_is_a_fixed_draw_with_the_grey_value_as_probability():
    ramp = torch.arange(256, dtype=torch.uint8).expand(4000, 1, 1, 256)
    images = Images(ramp, ramp[:9], ramp[:9], levels=256, name="ramp")
    drawn = images.binarized()
    frequency = drawn.train.double().mean((0, 1, 2))
    expected = torch.arange(256).double() / 255
    assert drawn.levels == 2
    assert (frequency - expected).abs().max() < 5 * 0.5 / 4000**0.5
    assert frequency[0] == 0
    assert frequency[-1] == 1
    assert torch.equal(drawn.train, images.binarized().train)


def test_the_binarized_digits_are_those_of_published_results():
    images = load_images("digits")
    assert images.fingerprint == "1e0457b5e7599578"
    assert images.binarized().fingerprint == "c89347f6f8c896ae"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_of_npz_files(npz, tmp_path):
    good = grey(20)
    with pytest.raises(ValueError, match=r"images.npz: no array 'test'; it has train, labels. Save the splits as"):
        load_images(npz(train=good, labels=np.zeros(20)))
    with pytest.raises(ValueError, match=r"images.npz\[test\]: pixels lie in \[-3, 2\]; expected integers in"):
        load_images(npz(train=good, test=np.full((3, 6, 6), -3) + 5 * np.eye(6, dtype=int)))
    with pytest.raises(ValueError, match=r"pixels lie in \[0, 1.5\]"):
        load_images(npz(train=good / 255, test=1.5 * np.eye(6)[None]))
    with pytest.raises(ValueError, match=r"\[train\]: some pixels are not finite"):
        load_images(npz(train=np.full((5, 4), np.nan), test=np.zeros((5, 4))))
    with pytest.raises(ValueError, match=r"\[train\]: an array of shape \(20,\) holds no images"):
        load_images(npz(train=good[:, 0, 0], test=good))
    with pytest.raises(ValueError, match=r"images of 'test' have shape \(1, 5, 5\), those of 'train' \(1, 6, 6\)"):
        load_images(npz(train=good, test=grey(3, 5, 5)))
    with pytest.raises(ValueError, match="the split 'test' is empty"):
        load_images(npz(train=good, test=good[:0]))
    with pytest.raises(ValueError, match="pixels must be numbers"):
        load_images(npz(train=good.astype("U3"), test=good))
    with pytest.raises(ValueError, match="1 training images are too few to hold out valid"):
        load_images(npz(train=good[:1], test=good))
    with pytest.raises(FileNotFoundError, match=r"nothing.npz: no such file or folder"):
        load_images(tmp_path / "nothing.npz")


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_damaged_npz_file_is_named(npz, part):
    path = npz(train=grey(20), test=grey(5))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"images.npz: not a readable .npz file"):
        load_images(path)


def test_a_flipped_byte_in_an_npz_file_is_found(npz):
    path = npz(train=grey(20), test=grey(5))
    content = bytearray(path.read_bytes())
    content[400] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable .npz file"):
        load_images(path)


def test_errors_of_idx_files(tmp_path):
    train = tmp_path / "train-images-idx3-ubyte"
    train.write_bytes(idx(grey(30)))
    with pytest.raises(ValueError, match=r"the split 'test' is missing; expected t10k-images-idx3-ubyte\[.gz\]"):
        load_images(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey(4)))[:-20])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz: cannot be read"):
        load_images(tmp_path)
    train.write_bytes(idx(grey(30))[:-1])
    with pytest.raises(ValueError, match="announces 30 images of 6x6, but 1079 bytes"):
        load_images(tmp_path)
    train.write_bytes(b"\x00\x00\x08\x01" + bytes(40))
    with pytest.raises(ValueError, match="not an IDX file of images: its first bytes are 00000801"):
        load_images(tmp_path)


def test_errors_of_folders(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        load_images(tmp_path)
    pictures(tmp_path, [*grey(20)])
    Image.fromarray(grey(1, 6, 7)[0]).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match=r"odd.png: 6x7 pixels, but 000.png has 6x6"):
        load_images(tmp_path)
    (tmp_path / "odd.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"odd.png: not a readable image"):
        load_images(tmp_path)
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        load_images(tmp_path)
    only = tmp_path / "splits"
    pictures(only / "test", grey(3))
    with pytest.raises(ValueError, match="the split 'train' is missing; there is only test"):
        load_images(only)
    (tmp_path / "odd.txt").write_text("text")
    with pytest.raises(ValueError, match=r"odd.txt: expected an .npz file, or a folder"):
        load_images(tmp_path / "odd.txt")


def test_an_archive_that_unpacks_to_far_more_than_images_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGE_ARCHIVE", 10**7)
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, train=np.zeros((2000, 1, 100, 100), np.uint8), test=np.zeros((5, 1, 100, 100), np.uint8))
    with pytest.raises(ValueError, match=r"bomb.npz: 0 MB that unpack to 0.0 GB are no images"):
        load_images(path)


def test_a_picture_that_unpacks_to_far_more_than_memory_is_refused(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large.png: not a readable image: .*decompression bomb"):
        load_images(tmp_path)
