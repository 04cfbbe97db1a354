"""The images the examples train on, and the options they share.

The default needs no download: the 8x8 digits that come with scikit-learn, enlarged to the size the network takes.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Images = NDArray[np.uint8]
    Labels = NDArray[np.int32]
    Arrays = tuple[tuple[Any, Any], tuple[Any, Any]]
    Download = Callable[[], Arrays]

KEYS = ("x_train", "y_train", "x_test", "y_test")


class DataError(ValueError):
    """The images asked for cannot be had; the message says why in a sentence."""


class Dataset(NamedTuple):
    """Images with values from 0 to 255 and labels from 0 to 9, for training and for evaluation."""

    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels


def parser(
    description: str | None, downloads: Mapping[str, Download], *, epochs: int, batch: int
) -> argparse.ArgumentParser:
    """Return a parser with the options that every example has."""
    names = " or ".join(downloads)
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--epochs", type=positive, default=epochs, metavar="N", help="default: %(default)s")
    options.add_argument("--batch", type=positive, default=batch, metavar="N", help="batch size, default: %(default)s")
    options.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    options.add_argument(
        "--data",
        default="digits",
        metavar="NAME",
        help=f"digits (embedded), {names} (downloaded), or an .npz file with {', '.join(KEYS)}",
    )
    options.add_argument("--limit", type=positive, metavar="N", help="train on the first N images only")
    options.add_argument("--log-dir", default="runs/example", metavar="DIR", help="default: %(default)s")
    options.add_argument("--no-watch", action="store_true", help="train without bnwatch")
    return options


def positive(text: str) -> int:
    """Return the whole number above zero that ``text`` spells."""
    number = int(text)
    if number < 1:
        message = f"must be 1 or more, got {number}"
        raise argparse.ArgumentTypeError(message)
    return number


def load(
    source: str,
    shape: tuple[int, ...],
    downloads: Mapping[str, Download],
    *,
    limit: int | None = None,
    shifts: int = 0,
) -> Dataset:
    """Return the images called ``source``, each of ``shape``.

    Args:
        source: ``digits``, a name in ``downloads``, or the path of an ``.npz`` file.
        shape: height and width, and 3 for colour.
        downloads: functions of the framework in use that fetch a data set.
        limit: how many training images to keep.
        shifts: make the digits many by moving each up to so many pixels in every direction.

    Raises:
        DataError: there are no such images, or they cannot be brought to ``shape``.
    """
    if source == "digits":
        raw = digits()
    elif source in downloads:
        raw = download(source, downloads[source])
    elif source.endswith(".npz"):
        raw = read(Path(source))
    else:
        names = ", ".join(["digits", *downloads])
        message = f"--data must be {names} or the path of an .npz file, got {source!r}"
        raise DataError(message)
    x_train, y_train = fit(raw.x_train, shape), raw.y_train
    if source == "digits" and shifts:
        x_train, y_train = shifted(x_train, y_train, shifts)
    return Dataset(x_train[:limit], y_train[:limit], fit(raw.x_test, shape), raw.y_test)


def digits() -> Dataset:
    """Return scikit-learn's digits, one in five of them for evaluation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        message = "the embedded digits need scikit-learn: pip install scikit-learn"
        raise DataError(message) from None
    bunch = load_digits()
    images = np.minimum(bunch.images * 16, 255).astype(np.uint8)
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    evaluation, training = np.split(order, [len(order) // 5])
    return Dataset(images[training], labels[training], images[evaluation], labels[evaluation])


def download(name: str, fetch: Download) -> Dataset:
    """Return what the framework downloads."""
    try:
        (x_train, y_train), (x_test, y_test) = fetch()
    except Exception as error:
        message = f"{name} could not be downloaded ({error}); the default, --data digits, needs no network"
        raise DataError(message) from error
    return checked(name, {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test})


def read(path: Path) -> Dataset:
    """Return the images of an ``.npz`` file."""
    try:
        with np.load(path) as file:
            return checked(str(path), {key: file[key] for key in KEYS})
    except KeyError:
        message = f"{path} must hold {', '.join(KEYS)}"
    except FileNotFoundError:
        message = f"there is no file {path}"
    except DataError:
        raise
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile):
        message = f"{path} cannot be read as an .npz file"
    raise DataError(message)


def checked(name: str, arrays: Mapping[str, Any]) -> Dataset:
    """Return the arrays as a data set, or say which of them is wrong."""
    found = {key: np.asarray(array) for key, array in arrays.items()}
    for part in ("train", "test"):
        x, y = found[f"x_{part}"], found[f"y_{part}"].reshape(-1)
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) != len(y) or not len(x):
            message = (
                f"{name}: x_{part} must be uint8 images of shape (n, height, width) or (n, height, width, 3) with one "
                f"label each, got {x.dtype} of shape {x.shape} and {len(y)} labels"
            )
            raise DataError(message)
        if not np.isin(y, np.arange(10)).all():
            message = f"{name}: y_{part} must hold classes from 0 to 9"
            raise DataError(message)
        found[f"y_{part}"] = y.astype(np.int32)
    return Dataset(*(found[key] for key in KEYS))


def fit(images: Images, shape: tuple[int, ...]) -> Images:
    """Return the images enlarged by a whole factor, framed in black and repeated over colours to have ``shape``."""
    size, wanted = images.shape[1:3], shape[:2]
    colours = images.shape[3:]
    if size[0] > wanted[0] or size[1] > wanted[1] or (colours and colours != shape[2:]):
        message = f"this example takes images of shape {shape}, got {images.shape[1:]}"
        raise DataError(message)
    factor = min(wanted[0] // size[0], wanted[1] // size[1])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    missing = [whole - part for whole, part in zip(wanted, large.shape[1:3], strict=True)]
    frame = [(0, 0), *((gap // 2, gap - gap // 2) for gap in missing), *((0, 0) for _ in colours)]
    large = np.pad(large, frame)
    return large if large.shape[1:] == shape else np.repeat(large[..., None], shape[2], axis=3)


def shifted(images: Images, labels: Labels, pixels: int) -> tuple[Images, Labels]:
    """Return every image moved by ``-pixels``, 0 and ``pixels`` along both sides, in one fixed order."""
    moves = [(down, right) for down in (0, -pixels, pixels) for right in (0, -pixels, pixels)]
    many = np.concatenate([np.roll(images, move, axis=(1, 2)) for move in moves])
    order = np.random.default_rng(0).permutation(len(many))
    return many[order], np.tile(labels, len(moves))[order]
