"""Tile2Vec: tiles are what the raster has, triplets are near and far, the loss is the paper's, and the script runs."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[2] / "examples" / "tile2vec.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("tile2vec", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def landscape(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("raster") / "landscape.npy"
    return path, example.landscape(path, side=384)


def test_the_landscape_has_its_classes_and_two_pairs_that_differ_in_texture_alone(example, landscape):
    path, classes = landscape
    raster = np.load(path)
    assert raster.shape == (example.CHANNELS, 384, 384) and raster.dtype == np.float32
    assert set(np.unique(classes)) == set(range(example.CLASSES))
    spectra = [raster[:, classes == c].mean(1) for c in range(example.CLASSES)]
    between = np.linalg.norm(spectra[0] - spectra[2])
    assert max(np.linalg.norm(spectra[0] - spectra[1]), np.linalg.norm(spectra[2] - spectra[3])) < 0.5 * between
    steps = [np.abs(np.diff(raster.mean(0)))[classes[:, 1:] == c].mean() for c in range(4)]
    assert max(steps[0], steps[2]) < 0.9 * min(steps[1], steps[3]), "furrows do not change along a row, trees do"


def test_textures_are_photographs_that_brightness_and_contrast_do_not_tell_apart(example, tmp_path):
    data = pytest.importorskip("skimage.data")
    classes = example.textures(tmp_path / "textures.npy")
    raster = np.load(tmp_path / "textures.npy")
    assert raster.shape == (1, 512, 512) and set(np.unique(classes)) == {0, 1, 2}
    brick = data.brick().astype(np.float32)
    np.testing.assert_allclose(raster[0][classes == 1], ((brick - brick.mean()) / brick.std())[classes == 1], atol=1e-5)
    assert all(abs(raster[0][classes == c].mean()) < 0.2 for c in range(3))
    assert example.in_colours(raster).shape == example.in_colours(np.zeros((2, 512, 512))).shape == (512, 512, 3)


def test_tiles_are_windows_of_the_file_normalised_by_channel(example, landscape):
    tiles = example.Tiles(landscape[0])
    corners = np.array([[0, 0], [17, 300], [352, 5]])
    found = tiles.at(corners)
    assert found.shape == (3, example.CHANNELS, example.TILE, example.TILE)
    raster = np.load(landscape[0])
    expected = (raster[:, 17 : 17 + example.TILE, 300 : 300 + example.TILE] - tiles.mean) / tiles.std
    torch.testing.assert_close(found[1], torch.from_numpy(expected.astype(np.float32)))
    assert isinstance(tiles.raster, np.memmap)


def test_neighbours_are_near_and_distant_tiles_far(example, landscape):
    tiles = example.Tiles(landscape[0])
    anchors, neighbours, distant = tiles.triplets(np.random.default_rng(0), 500, near=40)
    assert np.abs(anchors - neighbours).max() <= 40 < np.abs(anchors - distant).max(1).min()
    for corners in (anchors, neighbours, distant):
        assert corners.min() >= 0 and corners.max() <= 384 - example.TILE


def test_the_loss_is_the_papers(example):
    a, n, d = (torch.tensor(rows) for rows in ([[3.0, 4.0]] * 2, [[0.0, 0.0], [3.0, 4.0]], [[3.0, 4.0], [63.0, 84.0]]))
    margin = [5 - 0 + example.MARGIN, 0.0]  # the second triplet is further apart than the margin
    norms = [5 + 0 + 5, 5 + 5 + 105]
    expected = sum(m + example.NORM * l2 for m, l2 in zip(margin, norms, strict=True)) / 2
    assert example.triplet_loss(a, n, d).item() == pytest.approx(expected)


def test_a_raster_that_is_none_is_refused(example, tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((500, 500), np.float32))
    with pytest.raises(SystemExit, match=r"needs an array \[C, H, W\] of at least 128 pixels, got \(500, 500\)"):
        example.Tiles(tmp_path / "flat.npy")


def test_analogies_are_right_where_spectrum_and_texture_add_up(example):
    classes = np.arange(100) % example.CLASSES
    spectrum, texture = np.eye(3)[classes // 2], np.eye(2)[classes % 2]
    found, right = example.analogy(np.concatenate([spectrum, texture], 1), classes, np.random.default_rng(0), n=100)
    assert (classes[found[:, 3]] == right).all() and set(right) == {0, 1, 2, 3}
    assert all(len(set(line)) == 4 for line in found)
    found, right = example.analogy(spectrum, classes, np.random.default_rng(0), n=100)
    assert (classes[found[:, 3]] == right).mean() < 0.8


@pytest.mark.parametrize("source", ["generated", "textures", "a file of one's own"])
def test_the_script_ends_in_numbers_and_a_picture(example, landscape, tmp_path, monkeypatch, source):
    np.save(tmp_path / "classes.npy", landscape[1])
    file = [f"--raster={landscape[0]}", f"--classes={tmp_path / 'classes.npy'}"]
    own = {"generated": [], "textures": ["--textures"]}.get(source, file)
    if source == "textures":
        pytest.importorskip("skimage")
    short = "--seeds=1 --steps=2 --batch=4 --labels=40 --features=8"
    monkeypatch.setattr(example, "landscape", functools.partial(example.landscape, side=640))
    monkeypatch.setattr("sys.argv", ["tile2vec.py", *own, f"--output={tmp_path / 'out'}", *short.split()])
    example.main()
    (row,) = json.loads((tmp_path / "out" / "tile2vec.json").read_text())["rows"]
    probes = {"mean spectrum", "raw pixels", "PCA", "untrained encoder", "Tile2Vec"}
    assert probes < row.keys() and all(0 <= row[name] <= 100 for name in probes)
    assert row.get("analogies", {}).keys() == (probes if source == "generated" else set())
    assert (tmp_path / "out" / "tile2vec.png").read_bytes()[:4] == b"\x89PNG"
