import numpy as np
import pytest

from bnwatch.examples import data


def arrays(**changed):
    images, labels = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28), np.array([3, 1, 4, 1])
    return {"x_train": images, "y_train": labels, "x_test": images[:2], "y_test": labels[:2], **changed}


def test_reads_an_npz_file(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    found = data.load(str(tmp_path / "a.npz"), (28, 28), {}, limit=3)
    assert found.x_train.shape == (3, 28, 28)
    assert found.y_train.tolist() == [3, 1, 4]
    assert found.x_test.dtype == np.uint8


def test_frames_enlarges_and_colours_images_to_the_shape_wanted():
    small = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    grey = data.fit(small, (28, 28))
    assert grey.shape == (1, 28, 28)
    assert grey[0, :2].max() == 0
    assert grey[0, 2, 5] == small[0, 0, 1]
    colour = data.fit(small, (32, 32, 3))
    assert colour.shape == (1, 32, 32, 3)
    assert (colour[..., 0] == colour[..., 2]).all()


def test_labels_move_with_their_images():
    images = np.zeros((2, 8, 8), dtype=np.uint8)
    images[1] = 7
    many, labels = data.shifted(images, np.array([0, 1], dtype=np.int32), 2)
    assert len(many) == 18
    assert ((many.max(axis=(1, 2)) == 7) == (labels == 1)).all()


def test_a_download_that_fails_points_at_the_embedded_data():
    def fetch():
        message = "no route"
        raise OSError(message)

    with pytest.raises(data.DataError, match=r"mnist could not be downloaded \(no route\).*--data digits"):
        data.load("mnist", (28, 28), {"mnist": fetch})


def test_downloads_are_checked_like_files():
    train, test = (
        (np.zeros((3, 32, 32, 3), np.uint8), np.array([[1], [2], [3]])),
        (np.zeros((1, 32, 32, 3), np.uint8), [0]),
    )
    assert data.load("cifar10", (32, 32, 3), {"cifar10": lambda: (train, test)}).y_train.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", None, "there is no file"),
        ("a.npz", b"PK junk", "cannot be read as an .npz file"),
        ("a.npz", b"", "cannot be read as an .npz file"),
        ("a.png", b"", "--data must be digits or the path of an .npz file"),
        ("a.npz", {"x_train": np.zeros((4, 28, 28))}, "x_train must be uint8 images"),
        ("a.npz", {"y_test": np.array([1])}, "x_test must be uint8 images .* and 1 labels"),
        ("a.npz", {"y_train": np.array([1, 2, 3, 10])}, "y_train must hold classes from 0 to 9"),
        ("a.npz", {"y_train": np.array([None] * 4)}, "cannot be read as an .npz file"),
        ("a.npz", {"x_train": np.zeros((4, 32, 32, 3), np.uint8)}, "takes images of shape"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **arrays(**content))
    with pytest.raises(data.DataError, match=message) as caught:
        data.load(str(path), (28, 28), {})
    assert "\n" not in str(caught.value)


def test_a_file_that_lacks_an_array_is_told_what_to_hold(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(data.DataError, match="must hold x_train, y_train, x_test, y_test"):
        data.load(str(tmp_path / "a.npz"), (28, 28), {})


def test_options_name_what_the_example_can_download():
    options = data.parser("An example.", {"mnist": dict}, epochs=3, batch=10)
    assert options.parse_args([]).epochs == 3
    assert "mnist (downloaded)" in " ".join(options.format_help().split())
    with pytest.raises(SystemExit):
        options.parse_args(["--limit", "0"])
