"""Read images from files; every error names the file and the remedy."""

import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pyro_flowguides.nn.arguments import check_path
from pyro_flowguides.vae.training.images import SPLITS, Images

__all__ = ["load_images"]

#: An archive that unpacks to more bytes than this, and to this many times its own size, is refused.
LARGE_ARCHIVE, MAX_COMPRESSION = 2**30, 200
#: Fraction of the training images held out for a split that the data set lacks.
HELD_OUT = 0.1
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
#: First four bytes of an IDX file with a three-dimensional array of unsigned bytes.
IDX_MAGIC = bytes([0, 0, 8, 3])


def load_images(source: str | Path = "digits", shape: Sequence[int] = ()) -> Images:
    """Read images by name or by path.

    Args:
        source: ``"digits"`` (1,797 digits of 8×8 pixels and 17 grey levels, from scikit-learn), or a path to

            - an ``.npz`` file with the arrays ``train``, ``test`` and optionally ``valid``, each ``(N, H*W)``,
              ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``: bytes, or floats in [0, 1];
            - a folder with the MNIST files in IDX format (``train-images…``, ``t10k-images…``), compressed or not;
            - a folder of images of one size, or a folder with the subfolders ``train``, ``test`` and optionally
              ``valid`` of such images.

            A missing split is a tenth of the training images, always the same.
        shape: ``(height, width)`` or ``(channels, height, width)`` of flat rows; square grey images need none.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if a file cannot be read, a shape is wrong, pixels are out of range or a split is missing; the
            message names the file and the remedy.
        ImportError: if the digits are requested and scikit-learn is missing.

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> from pyro_flowguides.vae import load_images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "blobs.npz")
        ...     np.savez(path, train=np.zeros((50, 36), np.uint8), test=np.full((7, 36), 255, np.uint8))
        ...     images = load_images(path)
        >>> images.shape, len(images.train), len(images.valid), len(images.test)
        ((1, 6, 6), 45, 5, 7)
    """
    if str(source) == "digits":
        return _read_digits()
    check_path("load_images", "source", source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of images")
    if path.is_dir():
        return _read_idx(path) if _idx_file(path, "train") or _idx_file(path, "t10k") else _read_folder(path)
    if path.suffix == ".npz":
        return _read_npz(path, shape)
    raise ValueError(f"{path}: expected an .npz file, or a folder with IDX files or with images")


def _assemble(name: str, splits: dict[str, np.ndarray], levels: int) -> Images:
    """Convert the splits to tensors, holding missing ones out of the training images."""
    tensors = {split: torch.tensor(pixels) for split, pixels in splits.items()}
    missing = [split for split in ("valid", "test") if split not in tensors]
    train = tensors.pop("train")
    size = math.ceil(len(train) * HELD_OUT)
    if len(train) <= size * len(missing):
        raise ValueError(f"{name}: {len(train)} training images are too few to hold out {' and '.join(missing)}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)) if missing else slice(None)
    train = train[order]
    for split in missing:
        tensors[split], train = train[:size], train[size:]
    return Images(train=train, levels=levels, name=name, **tensors)


def _read_digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'pyro-flowguides[vae]', or train on a file (--data PATH)"
        ) from error
    pixels = load_digits().images.astype(np.uint8)[:, None]
    return _assemble("digits", {"train": pixels}, levels=17)


def _read_npz(path: Path, shape: Sequence[int]) -> Images:
    try:
        _check_size(path)
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {split: file[split] for split in SPLITS if split in file.files}
            names = file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
    absent = [split for split in ("train", "test") if split not in arrays]
    if absent:
        raise ValueError(
            f"{path}: no array {' and none '.join(map(repr, absent))}; it has {', '.join(names) or 'none'}. "
            "Save the splits as 'train', 'test' and optionally 'valid'"
        )
    levels = 2 if all(array.dtype.kind in "biu" and array.max(initial=0) <= 1 for array in arrays.values()) else 256
    for split, array in arrays.items():
        name = f"{path}[{split}]"
        arrays[split] = _as_bytes(name, _as_channels_first(name, array, shape), levels)
    return _assemble(str(path), arrays, levels)


def _check_size(path: Path) -> None:
    """Refuse an archive that is small on the disk and unpacks to more than memory is likely to hold."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if Path(member.filename).stem in SPLITS]
    unpacked = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if unpacked > LARGE_ARCHIVE and unpacked > MAX_COMPRESSION * packed:
        raise ValueError(
            f"{path}: {packed / 1e6:.0f} MB that unpack to {unpacked / 1e9:.1f} GB are no images, which shrink less. "
            "Save them without compression, by numpy.savez, if they are"
        )


def _as_bytes(name: str, array: np.ndarray, levels: int) -> np.ndarray:
    """Convert pixels to bytes ``0 … levels - 1``, rounding floats in [0, 1] to the nearest of 256 levels."""
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
        width = array.shape[1]
        shape = tuple(shape) or (math.isqrt(width),) * 2
        if math.prod(shape) != width:
            raise ValueError(
                f"{name}: rows of {width} pixels do not make images of {'x'.join(map(str, shape))}; give the shape, "
                "for example --shape 28x20 (height x width) or --shape 3x32x32"
            )
        return array.reshape(-1, *(() if len(shape) == 3 else (1,)), *shape)
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array
    if array.ndim == 4 and array.shape[-1] in (1, 3):
        return np.moveaxis(array, -1, 1)
    raise ValueError(
        f"{name}: an array of shape {array.shape} holds no images; expected (N, H*W), (N, H, W), (N, C, H, W) or "
        "(N, H, W, C) with 1 or 3 channels"
    )


def _idx_file(folder: Path, prefix: str) -> Path | None:
    """Return the file of images of one split, under any of its usual names."""
    return next(iter(sorted(folder.glob(f"{prefix}-images*idx3-ubyte*"))), None)


def _read_idx(folder: Path) -> Images:
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        file = _idx_file(folder, prefix)
        if file is None:
            raise ValueError(f"{folder}: the split {split!r} is missing; expected {prefix}-images-idx3-ubyte[.gz]")
        arrays[split] = _parse_idx(file)
    return _assemble(str(folder), arrays, levels=256)


def _parse_idx(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if content[:4] != IDX_MAGIC:
        raise ValueError(f"{path}: not an IDX file of images: its first bytes are {content[:4].hex() or 'missing'}")
    count, height, width = (int.from_bytes(content[begin : begin + 4], "big") for begin in (4, 8, 12))
    pixels = np.frombuffer(content, np.uint8, offset=min(16, len(content)))
    if len(pixels) != count * height * width:
        raise ValueError(
            f"{path}: the header announces {count} images of {height}x{width}, but {len(pixels)} bytes of pixels "
            "follow: the file is damaged or incomplete"
        )
    return pixels.reshape(count, 1, height, width)


def _read_folder(folder: Path) -> Images:
    folders = {split: folder / split for split in SPLITS if (folder / split).is_dir()} or {"train": folder}
    if "train" not in folders:
        raise ValueError(f"{folder}: the split 'train' is missing; there is only {', '.join(folders)}")
    color = {split: _read_pictures(path) for split, path in folders.items()}
    grey = all((pixels == pixels[:, :1]).all() for pixels in color.values())
    return _assemble(str(folder), {split: pixels[:, :1] if grey else pixels for split, pixels in color.items()}, 256)


def _read_pictures(folder: Path) -> np.ndarray:
    """Read all images below a folder, in the order of their paths, as ``(N, 3, H, W)``."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise ValueError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) and no IDX files")
    pictures = [_read_picture(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            height, width = picture.shape[:2]
            first = "x".join(map(str, pictures[0].shape[:2]))
            raise ValueError(
                f"{path}: {height}x{width} pixels, but {paths[0].name} has {first}: resize all images to one size"
            )
    return np.stack(pictures).transpose(0, 3, 1, 2)


def _read_picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"{path}: more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error
