"""Images to train on: read, checked and split, and fed in an order that a seed and a step determine."""

from __future__ import annotations

import gzip
import hashlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Feed", "Images", "derive_seed", "load_images"]

#: Part of the training images held out for a split that a data set does not have.
HOLDOUT = 0.1
SPLITS = ("train", "valid", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
#: First four bytes of an IDX file of unsigned bytes in three dimensions.
IDX_IMAGES = bytes([0, 0, 8, 3])
#: Selects the random numbers behind :meth:`Images.binarized`. Published results depend on them: never change it.
BINARIZATION_STREAM = "binarised"


def derive_seed(*parts: int | str) -> int:
    """A seed that is a fixed function of its parts, such as a run's seed, a purpose and a step.

    Example:
        >>> from pyro_flowguides.vae.training.data import derive_seed
        >>> derive_seed(0, "noise", 3) == derive_seed(0, "noise", 3) != derive_seed(0, "noise", 4)
        True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Images:
    """Three splits of one set of images.

    Attributes:
        train, valid, test: pixels ``(N, channels, height, width)``, unsigned bytes in ``0 … levels - 1``.
        levels: number of grey levels of a pixel; 2 for binary images.
        name: where they come from.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    levels: int
    name: str

    def __post_init__(self) -> None:
        for split in SPLITS:
            pixels = getattr(self, split)
            if not len(pixels):
                raise ValueError(f"{self.name}: the split {split!r} is empty")
            if pixels.shape[1:] != self.train.shape[1:]:
                raise ValueError(
                    f"{self.name}: the images of {split!r} have shape {tuple(pixels.shape[1:])}, those of 'train' "
                    f"{self.shape}: all splits must have one shape"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(channels, height, width)``."""
        return tuple(self.train.shape[1:])

    @property
    def fingerprint(self) -> str:
        """A short hash of all pixels, so that a run is not resumed on other data."""
        digest = hashlib.sha256(f"{self.levels} {self.shape}".encode())
        for split in SPLITS:
            digest.update(getattr(self, split).numpy().tobytes())
        return digest.hexdigest()[:16]

    def binarized(self) -> Images:
        """Binary images: each pixel drawn once, its grey value the probability of a 1; always the same draw."""
        train, valid, test = (self._drawn(split) for split in SPLITS)
        return Images(train, valid, test, levels=2, name=self.name)

    def _drawn(self, split: str) -> Tensor:
        pixels: Tensor = getattr(self, split)
        generator = torch.Generator().manual_seed(derive_seed(BINARIZATION_STREAM, split))
        return draw_binary(pixels, self.levels, torch.rand(pixels.shape, generator=generator))


def draw_binary(pixels: Tensor, levels: int, uniform: Tensor) -> Tensor:
    """1 where a uniform draw lies below the grey value, in [0, 1], else 0; binary pixels stay as they are."""
    return (uniform * (levels - 1) < pixels).to(torch.uint8)


# -- reading -----------------------------------------------------------------------------------------------------------


def load_images(source: str | Path = "digits", shape: Sequence[int] = ()) -> Images:
    """Images by name or by path.

    Args:
        source: ``"digits"`` (1,797 digits of 8×8 pixels and 17 grey levels, from scikit-learn), or a path to

            - an ``.npz`` file with the arrays ``train``, ``test`` and, if it has one, ``valid``, each ``(N, H*W)``,
              ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``: bytes, or floats in [0, 1];
            - a folder with the MNIST files in IDX format (``train-images…``, ``t10k-images…``), compressed or not;
            - a folder of images of one size, or of the folders ``train``, ``test`` and, if there is one, ``valid``
              with such images.

            A split that is not there is held out of the training images: a tenth, always the same.
        shape: ``(height, width)`` or ``(channels, height, width)`` of flat rows; square grey images need none.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: for a file that cannot be read, wrong shapes, pixels out of range or a missing split; the message
            names the file and the remedy.
        ImportError: if scikit-learn is needed and missing.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> from pyro_flowguides.vae.training.data import load_images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "blobs.npz")
        ...     np.savez(path, train=np.zeros((50, 36), np.uint8), test=np.full((7, 36), 255, np.uint8))
        ...     images = load_images(path)
        >>> images.shape, len(images.train), len(images.valid), len(images.test)
        ((1, 6, 6), 45, 5, 7)
    """
    if str(source) == "digits":
        return _read_digits()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of images")
    if path.is_dir():
        return _read_idx(path) if _idx_file(path, "train") or _idx_file(path, "t10k") else _read_folder(path)
    if path.suffix == ".npz":
        return _read_npz(path, shape)
    raise ValueError(f"{path}: expected an .npz file, or a folder with IDX files or with images")


def _assemble(name: str, splits: dict[str, np.ndarray], levels: int) -> Images:
    """Tensors of the splits, missing ones held out of the training images."""
    tensors = {split: torch.tensor(pixels) for split, pixels in splits.items()}
    missing = [split for split in ("valid", "test") if split not in tensors]
    train = tensors.pop("train")
    part = math.ceil(len(train) * HOLDOUT)
    if len(train) <= part * len(missing):
        raise ValueError(f"{name}: {len(train)} training images are too few to hold out {' and '.join(missing)}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)) if missing else slice(None)
    train = train[order]
    for split in missing:
        tensors[split], train = train[:part], train[part:]
    return Images(train=train, levels=levels, name=name, **tensors)


def _read_digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'pyro-flowguides[vae]', or name a file (--data PATH)"
        ) from error
    pixels = load_digits().images.astype(np.uint8)[:, None]
    return _assemble("digits", {"train": pixels}, levels=17)


def _read_npz(path: Path, shape: Sequence[int]) -> Images:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {split: file[split] for split in SPLITS if split in file.files}
            found = file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an .npz file that can be read: {error}") from error
    absent = [split for split in ("train", "test") if split not in arrays]
    if absent:
        raise ValueError(
            f"{path}: no array {' and none '.join(map(repr, absent))}; it has {', '.join(found) or 'none'}. "
            "Save the splits as 'train', 'test' and, if there is one, 'valid'"
        )
    levels = 2 if all(array.dtype.kind in "biu" and array.max(initial=0) <= 1 for array in arrays.values()) else 256
    checked = {split: _as_images(f"{path}[{split}]", array, shape, levels) for split, array in arrays.items()}
    return _assemble(str(path), checked, levels)


def _as_images(name: str, array: np.ndarray, shape: Sequence[int], levels: int) -> np.ndarray:
    return _as_bytes(name, _as_channels_first(name, array, shape), levels)


def _as_bytes(name: str, array: np.ndarray, levels: int) -> np.ndarray:
    """Pixels as bytes ``0 … levels - 1``; floats in [0, 1] are rounded to the nearest of 256 levels."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: pixels must be numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: some pixels are not finite")
    top = 1 if array.dtype.kind == "f" else levels - 1
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if low < 0 or high > top:
        raise ValueError(
            f"{name}: pixels lie in [{low:g}, {high:g}]; expected integers in [0, 255] or floats in [0, 1]"
        )
    return (np.rint(array * (levels - 1)) if array.dtype.kind == "f" else array).astype(np.uint8)


def _as_channels_first(name: str, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    if shape and len(shape) not in (2, 3):
        raise ValueError(f"the shape of an image is (height, width) or (channels, height, width), got {tuple(shape)}")
    if array.ndim == 2:
        return _unflatten(name, array, shape)
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array
    if array.ndim == 4 and array.shape[-1] in (1, 3):
        return np.moveaxis(array, -1, 1)
    raise ValueError(
        f"{name}: shape {array.shape} is not that of images; expected (N, H*W), (N, H, W), (N, C, H, W) or "
        "(N, H, W, C) with 1 or 3 channels"
    )


def _unflatten(name: str, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    width = array.shape[1]
    side = math.isqrt(width)
    shape = tuple(shape) or (side, side)
    if math.prod(shape) != width:
        raise ValueError(
            f"{name}: rows of {width} pixels do not make images of {'x'.join(map(str, shape))}; give the shape, such "
            "as --shape 28x20 (height x width) or --shape 3x32x32"
        )
    return array.reshape(-1, *(() if len(shape) == 3 else (1,)), *shape)


def _idx_file(folder: Path, prefix: str) -> Path | None:
    """The images file of one split, under any of its usual names."""
    found = sorted(folder.glob(f"{prefix}-images*idx3-ubyte*"))
    return found[0] if found else None


def _read_idx(folder: Path) -> Images:
    files = {"train": _idx_file(folder, "train"), "test": _idx_file(folder, "t10k")}
    for split, file in files.items():
        if file is None:
            prefix = "train" if split == "train" else "t10k"
            raise ValueError(f"{folder}: the split {split!r} is missing; expected {prefix}-images-idx3-ubyte[.gz]")
    return _assemble(str(folder), {split: _parse_idx(file) for split, file in files.items() if file}, levels=256)


def _parse_idx(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if content[:4] != IDX_IMAGES:
        raise ValueError(f"{path}: not an IDX file of images: it begins with {content[:4].hex() or 'nothing'}")
    count, height, width = (int.from_bytes(content[at : at + 4], "big") for at in (4, 8, 12))
    pixels = np.frombuffer(content, np.uint8, offset=min(16, len(content)))
    if len(pixels) != count * height * width:
        raise ValueError(
            f"{path}: announces {count} images of {height}x{width} but holds {len(pixels)} bytes of pixels: "
            "the file is damaged or incomplete"
        )
    return pixels.reshape(count, 1, height, width)


def _read_folder(folder: Path) -> Images:
    folders = {split: folder / split for split in SPLITS if (folder / split).is_dir()} or {"train": folder}
    if "train" not in folders:
        raise ValueError(f"{folder}: the split 'train' is missing: it has only {', '.join(folders)}")
    color = {split: _read_pictures(path) for split, path in folders.items()}
    grey = all((pixels == pixels[:, :1]).all() for pixels in color.values())
    return _assemble(str(folder), {split: pixels[:, :1] if grey else pixels for split, pixels in color.items()}, 256)


def _read_pictures(folder: Path) -> np.ndarray:
    """All images below a folder, in the order of their paths, as ``(N, 3, H, W)``."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise ValueError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) and no IDX files")
    pictures = [_read_picture(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            height, width = picture.shape[:2]
            first = "x".join(map(str, pictures[0].shape[:2]))
            raise ValueError(
                f"{path}: {height}x{width} pixels, but {paths[0].name} has {first}: bring all images to one size"
            )
    return np.stack(pictures).transpose(0, 3, 1, 2)


def _read_picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"{path}: more than 8 bits a channel (mode {picture.mode}): convert it to 8 bits")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not an image that can be read: {error}") from error


# -- feeding -----------------------------------------------------------------------------------------------------------


class Feed:
    """Minibatches that are a fixed function of a seed and a step, in equal shards.

    Every epoch goes through the training images in a new order; a last incomplete batch is left out. A batch consists
    of ``shards`` parts. Which images are in a part, and how their pixels are binarized, depends on the seed, the step
    and the number of the part alone: not on the process that asks for it, nor on what was asked for before.

    Args:
        images: the data.
        batch_size: images per step, over all processes.
        shards: parts of a batch.
        dynamic: draw the pixels of the training images as 0 or 1 anew every time.
        seed: of the order and the draws.
        device: where batches are wanted. The training images are kept there if they take less than a quarter of its
            free memory, and are copied batch by batch otherwise.

    Raises:
        ValueError: if the batch size is larger than the training set or no multiple of ``shards``.

    Example:
        >>> from pyro_flowguides.vae.training.data import Feed, load_images
        >>> feed = Feed(load_images("digits"), batch_size=100, shards=2, dynamic=True, seed=0)
        >>> feed.shard(step=7, number=1).shape
        torch.Size([50, 1, 8, 8])
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        shards: int = 1,
        dynamic: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= batch_size <= len(images.train):
            raise ValueError(f"the batch size must lie in 1 … {len(images.train)} (training images), got {batch_size}")
        if shards < 1 or batch_size % shards:
            raise ValueError(f"a batch of {batch_size} images cannot be split into {shards} equal shards")
        self.device = torch.device(device)
        self.levels, self.dynamic, self.seed = images.levels, dynamic, seed
        self.batch_size, self.shards = batch_size, shards
        self.pixels = _resident(images.train, self.device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def steps_per_epoch(self) -> int:
        """Complete batches in the training set."""
        return len(self.pixels) // self.batch_size

    def shard(self, step: int, number: int) -> Tensor:
        """Part ``number`` of the batch of a step: bytes ``(batch_size / shards, C, H, W)`` on the device."""
        size = self.batch_size // self.shards
        begin = (step % self.steps_per_epoch) * self.batch_size + number * size
        index = self._order_of(step // self.steps_per_epoch)[begin : begin + size]
        pixels = self.pixels[index.to(self.pixels.device)].to(self.device, non_blocking=True)
        if not self.dynamic:
            return pixels
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "pixels", step, number))
        return draw_binary(pixels, self.levels, torch.rand(pixels.shape, generator=generator, device=self.device))

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.pixels), generator=generator)
        return self._order


def _resident(pixels: Tensor, device: torch.device) -> Tensor:
    """The pixels on the device if they fit there comfortably, else in (pinned) host memory."""
    if device.type != "cuda":
        return pixels.to(device)
    free, _ = torch.cuda.mem_get_info(device)
    return pixels.to(device) if pixels.nbytes < free / 4 else pixels.pin_memory()
