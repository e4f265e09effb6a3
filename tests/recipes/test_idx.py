"""IDX files: read as written, refused with a reason when damaged; and the digits recipe on a folder of them."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from recipes.__main__ import main
from recipes.data import Digits
from recipes.digits import ConvNet
from recipes.idx import read_idx, read_mnist
from tests.recipes.conftest import curves

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
NAMES = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def idx(array):
    """The bytes of an IDX file, written independently of the reader."""
    header = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def folder(tmp_path):
    """The digits enlarged to 28 x 28, in four files under MNIST's names, the last two compressed."""
    images, labels = load_digits(return_X_y=True)
    images = np.pad((images.reshape(-1, 8, 8) * 15.9).astype("u1").repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    labels = labels.astype("u1")
    folder = tmp_path / "mnist"
    folder.mkdir()
    parts = images[:1200], labels[:1200], images[1200:], labels[1200:]
    for name, array in zip(NAMES, parts, strict=True):
        if name.startswith("train"):
            (folder / name).write_bytes(idx(array))
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return folder


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 2)], ids=str)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_read_as_written(code, shape, compressed, tmp_path):
    array = np.random.default_rng(0).uniform(-100, 100, shape).astype("i1").astype(code)
    data = idx(array)
    (tmp_path / "x").write_bytes(gzip.compress(data) if compressed else data)
    read = read_idx(tmp_path / "x")
    assert read.dtype == torch.from_numpy(array).dtype
    assert np.array_equal(read.numpy(), array)


WHOLE = idx(np.arange(6, dtype="i2").reshape(2, 3))
ZIPPED = gzip.compress(WHOLE, mtime=0)  # without the time: the bytes are the test's name, the same in every worker


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no IDX file: it starts with nothing"),
        (b"\x89PNG\r\n", "no IDX file: it starts with 89 50 4e 47"),
        (b"\0\0\x07\x01\0\0\0\0", "no IDX file: it starts with 00 00 07 01"),
        (b"\0\0\x08\0", "no IDX file"),
        (WHOLE[:7], "truncated: 7 bytes, its header alone needs 12"),
        (WHOLE[:-1], r"truncated: 23 bytes, its shape \(2, 3\) needs 24"),
        (WHOLE + b"\0", r"too long: 25 bytes, its shape \(2, 3\) needs 24"),
        (ZIPPED[:-9], "damaged gzip file"),
        (ZIPPED[:-8] + bytes(8), "damaged gzip file"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 20, "damaged gzip file"),
    ],
)
def test_damaged_file(data, says, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x: .*{says}"):
        read_idx(tmp_path / "x")


def test_mnist_as_unpacked_by_others(folder):
    before = read_mnist(folder)
    (folder / NAMES[0]).rename(folder / "train-images.idx3-ubyte")
    after = read_mnist(folder)
    for part in ("train", "test"):
        assert all(torch.equal(a, b) for a, b in zip(before[part], after[part], strict=True))
    assert [tuple(images.shape) for images, _ in after.values()] == [(1200, 28, 28), (597, 28, 28)]


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def other(array):
    return lambda path: path.write_bytes(idx(array))


REFUSED = [  # file, what happens to it, what the recipe says
    (NAMES[0], lambda path: path.unlink(), f"are no {NAMES[0]}"),
    (NAMES[1], shorten, f"{NAMES[1]}: truncated: 1207 bytes"),
    (NAMES[0], lambda path: path.write_text("<html>"), f"{NAMES[0]}: no IDX file: it starts with 3c 68 74 6d"),
    (NAMES[1], other(np.zeros(1199, "u1")), "as many labels as"),
    (NAMES[0], other(np.zeros((1200, 784), "u1")), "uint8 images (N, H, W), got torch.uint8 (1200, 784) images"),
    (NAMES[0], other(np.zeros((1200, 28, 28), "f4")), "got torch.float32 (1200, 28, 28) images"),
]


@pytest.mark.parametrize(("name", "damage", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_recipe_refuses_before_training(name, damage, says, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage(folder / name)
    with pytest.raises(SystemExit) as end:
        main(["digits", f"--data.folder={folder}"])
    assert end.value.code == 2
    *others, error = capsys.readouterr().err.splitlines()
    assert all("Seed set to 0" in line for line in others)
    assert error.startswith("error: recipes.data.Digits: ") and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


def test_recipe_names_every_missing_file(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["digits", "--data.folder=nowhere"])
    assert f"there is no folder 'nowhere', for {', '.join(NAMES)}" in capsys.readouterr().err


def test_split(folder):
    data = Digits(folder=folder)
    assert [len(split) for split in (data.train, data.val, data.test)] == [1000, 200, 597]
    images, labels = load_digits(return_X_y=True)
    x, y = data.test.tensors
    assert y.tolist() == labels[1200:].tolist()
    pixels = torch.from_numpy((images[1200:] * 15.9).astype("u1")).view(-1, 8, 8)
    torch.testing.assert_close(x[:, 0, 3:-3:3, 3:-3:3], pixels.float() / 255, rtol=0, atol=0)
    count = torch.bincount(data.val.tensors[1])
    assert (count - torch.bincount(torch.from_numpy(labels[:1200])) / 6).abs().max() < 1


def test_recipe_trains_on_28_by_28(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["digits", f"--data.folder={folder}", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"])
    assert curves(tmp_path / "runs/digits/version_0")["accuracy/test"][-1][1] > 0.8


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (28, 28), (20, 31)])
def test_net_takes_images_of_any_size(size):
    assert ConvNet(width=4)(torch.rand(2, 1, *size)).shape == (2, 10)
