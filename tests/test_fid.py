"""fid.py against ADM's own evaluator (adm_small.npz), against the TensorFlow graph's port (inception_small.npz) and the
pytorch-fid package, against closed forms, and as a user runs it. The weights are synthetic: the real ones are a
download away, and any correct network must agree on any weights."""

import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
import urllib.error
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from PIL import Image

import dar
import fid

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def golden():
    return synthetic.load_golden("inception_small.npz")


@pytest.fixture(scope="module")
def adm():
    return synthetic.load_golden("adm_small.npz")


@pytest.fixture(scope="module")
def state(golden):
    return synthetic.synthetic_state_dict(golden, "inception")


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return fid.load_inception(weights)


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs fid.py's main with arguments as the command line does: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            dar.command_line(fid.main)
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def some_images(count, size=32, seed=0):
    """Coarse random colours: what a picture is to a network with random weights."""
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (count, 4, 4, 3)), np.ones((1, size // 4, size // 4, 1))).astype(np.uint8)


def save_folder(folder, images):
    for i, pixels in enumerate(images):
        path = folder / f"class{i // 5}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def covariance(features):
    count, mean, square = fid.moments(torch.as_tensor(features))
    return mean, square / (count - 1)


def relative_error(a, b):
    return (torch.linalg.norm(a.double() - b.double()) / torch.linalg.norm(b.double())).item()


# The network


def test_a_fresh_network_has_exactly_the_public_keys(golden):
    keys = {name: list(value.shape) for name, value in fid.InceptionV3().state_dict().items()}
    assert keys == golden["shapes"]


@pytest.mark.parametrize("size", [32, 256, 320])
def test_features_agree_with_the_golden_ones(golden, state, size):
    model = fid.InceptionV3()
    model.load_state_dict(state)
    images = torch.from_numpy(golden[f"img{size}"]).permute(0, 3, 1, 2)
    for name, features in zip(("pool3", "spatial", "logits_nobias"), model(images)):
        expected = torch.from_numpy(golden[f"{name}_{size}"])
        assert features.shape == expected.shape and features.dtype == torch.float32 and not features.requires_grad
        assert relative_error(features, expected) < 1e-5, name


def test_folding_batchnorm_changes_nothing(golden, network):
    images = torch.from_numpy(golden["img32"]).permute(0, 3, 1, 2)
    for name, features in zip(("pool3", "spatial", "logits_nobias"), network(images)):
        assert relative_error(features, torch.from_numpy(golden[f"{name}_32"])) < 1e-5, name


def test_features_agree_with_pytorch_fid(state, network, monkeypatch):
    inception = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: state)
    theirs = inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs((images.float() - 128) / 128)[0].flatten(1)
    assert relative_error(network(images)[0], expected) < 1e-5


def test_the_resize_is_tensorflow_1s():
    row = torch.tensor([[[[0.0, 8.0]]]])
    assert fid.resize_tf1(row, 4)[0, 0, 0].tolist() == [0, 4, 8, 8]  # i / 2, and nothing right of the last pixel
    column = torch.arange(6.0)[:, None].expand(1, 1, 6, 3)
    assert torch.allclose(fid.resize_tf1(column, 4)[0, 0, :, 0], torch.tensor([0, 1.5, 3, 4.5]))
    assert torch.equal(fid.resize_tf1(column, 3)[0, 0, :, 0], torch.tensor([0.0, 2, 4]))  # no antialiasing


def test_the_network_takes_bytes_only():
    with pytest.raises(ValueError, match="uint8"):
        fid.InceptionV3()(torch.rand(1, 3, 32, 32))


# The weights file


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_weights_file_that_is_none_is_refused_in_one_line(state, tmp_path):
    def save(value):
        torch.save(value, tmp_path / "weights.pth")

    cases = {
        "fc.bias": lambda: save({k: v for k, v in state.items() if k != "fc.bias"}),
        "AuxLogits": lambda: save({**state, "AuxLogits.fc.bias": torch.zeros(1)}),
        r"fc.weight.*\[1000, 2048\]": lambda: save({**state, "fc.weight": torch.zeros(1000, 2048)}),
        "list": lambda: save([1, 2]),
        "no PyTorch weights file": lambda: save({**state, "fc.bias": Attack(tmp_path / "ran")}),
        "no PyTorch weights": lambda: (tmp_path / "weights.pth").write_text("<!DOCTYPE html><html>Not found</html>"),
        "No such file": lambda: (tmp_path / "weights.pth").unlink(),
    }
    for message, make in cases.items():
        make()
        with pytest.raises(ValueError, match=message) as error:
            fid.load_inception(tmp_path / "weights.pth")
        assert "weights.pth" in str(error.value) and fid.URL in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_download_is_verified_and_its_failure_says_what_to_do(state, monkeypatch, capsys):
    asked = {}

    def download(url, **options):
        asked.update(options, url=url)
        print("Downloading")  # as torch.hub does
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    fid.load_inception()
    assert asked["url"].endswith("pt_inception-2015-12-05-6726825d.pth")
    assert asked["check_hash"] is True and asked["weights_only"] is True
    assert capsys.readouterr().out == ""  # the numbers stay alone there, for scripts

    def fail(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match="no route to host.*https://.*--weights FILE"):
        fid.load_inception()


# The metrics


def test_every_number_is_adms(adm):
    reference, samples = torch.from_numpy(adm["ref_pool"]), torch.from_numpy(adm["sample_pool"])
    assert fid.frechet_distance(*covariance(reference), *covariance(samples)) == pytest.approx(
        float(adm["fid"]), rel=1e-5
    )
    spatial = [*covariance(adm["ref_spatial"]), *covariance(adm["sample_spatial"])]
    assert fid.frechet_distance(*(x.numpy() for x in spatial)) == pytest.approx(adm["sfid"], rel=1e-5)
    probs = (samples @ torch.from_numpy(adm["softmax_weight"]).double()).softmax(1)
    assert fid.inception_score(probs.numpy()) == pytest.approx(adm["inception_score"], rel=1e-5)
    precision, recall = fid.precision_recall(adm["ref_pool"], adm["sample_pool"])
    assert precision == pytest.approx(adm["precision"], abs=0.01) and recall == pytest.approx(adm["recall"], abs=0.01)


@pytest.mark.parametrize("block", [37, 256, 2048])
@pytest.mark.parametrize("dtype, offset", [(torch.float32, 0), (torch.float32, 1000), (torch.float64, 1e6)])
def test_precision_and_recall_are_exact(adm, dtype, offset, block):
    # Far from the origin |a|^2 + |b|^2 - 2ab cancels most of its digits.
    reference, samples = (torch.from_numpy(adm[key] + offset).to(dtype) for key in ("ref_pool", "sample_pool"))
    expected = (float(adm["precision_float64"]), float(adm["recall_float64"]))
    assert fid.precision_recall(reference, samples, block=block) == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall_of_equal_disjoint_and_half_overlapping_sets():
    a, b, c = (torch.randn(50, 64) + shift for shift in (0, 1000, -1000))
    assert fid.precision_recall(a, a) == (1, 1)
    assert fid.precision_recall(a, b) == (0, 0)
    assert fid.precision_recall(torch.cat([a, b]), torch.cat([a, c])) == (0.5, 0.5)
    assert fid.precision_recall(torch.cat([a, b]), a) == (1, 0.5)
    assert fid.precision_recall(a, torch.cat([a, b, c[:25]])) == (50 / 125, 1)


def test_the_ball_ends_at_the_third_neighbour():
    reference = torch.tensor([[0.0], [1], [2], [4], [100], [101], [102], [104]], dtype=torch.float64)
    sample = torch.tensor([[-4.0], [-1004], [1004], [2004]], dtype=torch.float64)  # 0's third neighbour is 4 away too
    assert fid.precision_recall(reference, sample)[0] == 0.25  # the edge is part of the ball
    assert fid.precision_recall(reference, sample * (1 - 1e-9))[0] == 0.25
    assert fid.precision_recall(reference, sample * (1 + 1e-9))[0] == 0
    assert fid.precision_recall(reference, sample, k=2)[0] == 0


@pytest.mark.parametrize("copies, others, block", [(20, 30, 16), (7, 77, 64), (9, 64, 7), (100, 3, 2048)])
def test_copies_of_one_image_lie_in_each_others_balls_of_radius_0(copies, others, block):
    for _ in range(12):  # rounding to either side of 0
        x = torch.randn(1, 2048, dtype=torch.float64).expand(copies, -1) + 100
        other = torch.randn(others, 2048, dtype=torch.float64) + 100
        assert fid.precision_recall(torch.cat([other, x]), x[:4], block=block)[0] == 1
        assert fid.precision_recall(x, x[:4], block=block) == (1, 1)


def test_fid_of_a_set_with_itself_is_0_with_fewer_images_than_dimensions():
    features = torch.randn(300, 2048) * torch.logspace(1, -2, 2048)
    mean, sigma = covariance(features)
    assert fid.frechet_distance(mean, sigma, mean, sigma) < 1e-6
    for _ in range(20):  # rounding to either side of 0
        mean, sigma = covariance(torch.randn(20, 30))
        assert 0 <= fid.frechet_distance(mean, sigma, mean, sigma) < 1e-10


@pytest.mark.parametrize("rank", [40, 150, 200])  # of 200 dimensions: disjoint, overlapping and full supports
def test_fid_is_the_closed_form_for_gaussians_that_share_eigenvectors(rank):
    basis = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64)).Q
    values = torch.rand(2, 200, dtype=torch.float64) * 50
    values[0, rank:], values[1, : 200 - rank] = 0, 0
    mean = torch.randn(2, 200, dtype=torch.float64)
    sigma = [(basis * v) @ basis.T for v in values]
    expected = (mean[0] - mean[1]).square().sum() + (values[0].sqrt() - values[1].sqrt()).square().sum()
    assert fid.frechet_distance(mean[0], sigma[0], mean[1], sigma[1]) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("cuts", [[], [1], [100], [7, 8, 300], list(range(1, 400, 3)), list(range(1, 400))])
def test_moments_do_not_depend_on_how_the_set_was_cut(cuts):
    x = torch.randn(400, 30, dtype=torch.float64) * torch.logspace(-2, 2, 30) + 1000
    parts = [fid.moments(part) for part in x.tensor_split(cuts)]

    def streamed(parts):
        total = None
        for part in parts:
            total = fid.moments(part, total)
        return total

    for count, mean, square in (
        fid.merge_moments(*parts),
        streamed(x.tensor_split(cuts)),
        streamed(x.tensor_split(cuts)[::-1]),
    ):
        assert count == 400
        assert torch.allclose(mean, x.mean(0), rtol=1e-10, atol=0)
        expected = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
        scale = expected.diag().sqrt()
        assert ((square / 399 - expected) / (scale[:, None] * scale)).abs().max() < 1e-10


def test_inception_score():
    assert fid.inception_score(torch.full((10, 7), 1 / 7)) == pytest.approx(1)
    assert fid.inception_score(torch.eye(7)) == pytest.approx(7)  # and 0 log 0 is 0
    # Splits in file order: two images of one class, two of two, and the last alone.
    assert fid.inception_score(torch.eye(3)[[0, 0, 1, 2, 1]], split_size=2) == pytest.approx((1 + 2 + 1) / 3)
    # By default 5000 a split: one class, then both, half of the 1000 each.
    assert fid.inception_score(torch.eye(2)[torch.arange(6000) // 5500]) == pytest.approx((1 + 2) / 2)


def test_metrics_refuse_what_cannot_be_measured():
    x = torch.randn(10, 5)
    nan = torch.where(x == x[3, 2], float("nan"), x)
    mean, sigma = covariance(x)
    for bad in (nan, torch.where(nan.isnan(), float("inf"), x)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            fid.precision_recall(x, bad)
        with pytest.raises(ValueError, match="NaN or infinite"):
            fid.frechet_distance(mean, sigma, *covariance(bad))
    with pytest.raises(ValueError, match="N, M > 3"):
        fid.precision_recall(x, x[:3])
    with pytest.raises(ValueError, match=r"10, 5\D+10, 4\D"):
        fid.precision_recall(x, x[:, :4])
    with pytest.raises(ValueError, match=r"5\D+5, 5\D+4\D+5, 5\D"):
        fid.frechet_distance(mean, sigma, mean[:4], sigma)
    with pytest.raises(ValueError, match="softmax"):
        fid.inception_score(x)


# Files


def test_npz_images_are_read_in_batches_and_skip_ahead(tmp_path):
    images = some_images(11)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(11))
        found = fid.ImageSet(tmp_path / "images.npz")
        assert (found.count, tuple(found.shape), found.statistics) == (11, (32, 32, 3), {})
        for start, stop in ((0, 4), (4, 8), (8, 11), (10, 11), (2, 3)):
            assert torch.equal(found.read(start, stop), torch.from_numpy(images[start:stop]).permute(0, 3, 1, 2))


def test_an_npz_may_be_larger_than_the_memory(tmp_path):
    np.savez_compressed(tmp_path / "images.npz", arr_0=np.zeros((10000, 64, 64, 3), np.uint8))  # 123 MB
    tracemalloc.start()
    images = fid.ImageSet(tmp_path / "images.npz")
    assert not any(images.read(i, i + 100).any() for i in range(8000, 10000, 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # zipfile skips in steps of 16 MB


def test_arrays_of_any_order_and_header_hold_the_same_images(tmp_path):
    images = some_images(6)
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(images))
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, images, version=(2, 0))
    for name in ("columns.npz", "header.npz"):
        found = fid.ImageSet(tmp_path / name).read(1, 5).permute(0, 2, 3, 1)
        assert np.array_equal(found, images[1:5]), name


def test_a_zip_of_pictures_is_refused_in_a_short_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for i in range(3000):
            archive.writestr(f"picture-{i:05d}.png", b"")
    with pytest.raises(ValueError, match="picture-00000.png") as error:
        fid.ImageSet(tmp_path / "x.npz")
    assert len(str(error.value)) < 500


def save_promise(path, name, shape, columns_first=False):
    """An archive whose header promises more than is in it, as a zip bomb does."""
    with zipfile.ZipFile(path, "w") as archive, archive.open(f"{name}.npy", "w") as file:
        head = dict(descr="|u1" if name == "arr_0" else "<f8", fortran_order=columns_first, shape=shape)
        np.lib.format.write_array_header_1_0(file, head)
        file.write(bytes(8 * 32 * 32 * 3))


BAD_FILES = {
    "float": (lambda path: np.savez(path, arr_0=some_images(8) / 255), "float64.*uint8"),
    "objects": (lambda path: np.savez(path, arr_0=np.array([None, 1], dtype=object)), "object.*uint8"),
    "channels first": (lambda path: np.savez(path, arr_0=some_images(8).transpose(0, 3, 1, 2)), r"\(8, 3, 32, 32\)"),
    "another name": (lambda path: np.savez(path, images=some_images(8)), "arr_0.*images"),
    "nothing": (lambda path: np.savez(path), "arr_0"),
    "no images": (lambda path: np.savez(path, arr_0=some_images(8)[:0]), r"\(0, 32, 32, 3\)"),
    "one image": (lambda path: np.savez(path, arr_0=some_images(1)), "1 image"),
    "mu alone": (lambda path: np.savez(path, mu=np.zeros(2048)), "sigma"),
    "no sigma_s": (lambda path: np.savez(path, arr_0=some_images(8), mu_s=np.zeros(2023)), "sigma_s"),
    "other features": (lambda path: np.savez(path, mu=np.zeros(64), sigma=np.eye(64)), r"\(64, 64\).*\(2048, 2048\)"),
    "object mu": (lambda path: np.savez(path, mu=np.array([None]), sigma=np.eye(2048)), "allow_pickle"),
    "text": (lambda path: path.write_text("not a zip " * 100), "not a zip file"),
    "single array": (lambda path: np.save(path.open("wb"), some_images(8)), "not a zip file"),
    "truncated": (lambda path: (np.savez(path, arr_0=some_images(8)), os.truncate(path, 9000)), "not a zip file"),
    "missing": (lambda path: None, "No such file"),
    "NaN": (lambda path: np.savez(path, mu=np.full(2048, np.nan), sigma=np.eye(2048)), "not all finite"),
    "complex": (lambda path: np.savez(path, mu=np.zeros(2048, complex), sigma=np.eye(2048)), "not all finite"),
    "words": (lambda path: np.savez(path, mu=np.array(["x"] * 2048), sigma=np.eye(2048)), "not all finite"),
    "a billion pictures": (lambda path: save_promise(path, "arr_0", (10**9, 32, 32, 3)), "cut off"),
    "columns of a billion": (lambda path: save_promise(path, "arr_0", (10**9, 32, 32, 3), True), "cut off"),
    "fewer than none": (lambda path: save_promise(path, "arr_0", (-8, 32, 32, 3)), "expected uint8"),
    "an endless mean": (lambda path: save_promise(path, "mu", (10**13,)), "allocate|mu"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_npz_is_one_line_and_exit_code_2(command, tmp_path, case):
    make, message = BAD_FILES[case]
    make(tmp_path / "bad.npz")
    np.savez(tmp_path / "good.npz", arr_0=some_images(8))
    for order in (("bad.npz", "good.npz"), ("good.npz", "bad.npz")):
        code, out, err = command(*(tmp_path / name for name in order))
        assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
        assert "bad.npz" in err
        assert re.search(message, err), err


def test_a_flipped_byte_in_the_pixels_is_noticed(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=some_images(8))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="images.npz.*CRC"):
        fid.ImageSet(path).read(0, 8)


def test_an_npz_that_promises_more_pixels_than_it_has(tmp_path):
    path = tmp_path / "images.npz"
    np.save(tmp_path / "images.npy", some_images(8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "images.npy").read_bytes()[:-3072])
    with pytest.raises(ValueError, match="images.npz.*cut off"):  # before the network looks at any
        fid.ImageSet(path)


def test_images_of_different_sizes_are_refused(command, tmp_path):
    save_folder(tmp_path / "small", some_images(6))
    np.savez(tmp_path / "large.npz", arr_0=some_images(6, size=48))
    code, out, err = command(tmp_path / "large.npz", tmp_path / "small")
    assert code == 2 and "large.npz (48, 48, 3)" in err and "small (32, 32, 3)" in err and err.count("\n") == 1
    Image.fromarray(some_images(1, size=40)[0]).save(tmp_path / "small" / "class1" / "003.png")
    with pytest.raises(ValueError, match=r"class1.003.png is \(40, 40, 3\)"):  # before the network looks at any
        fid.ImageSet(tmp_path / "small")


def test_arguments_that_make_no_sense(command, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=some_images(8))
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "a.npz"], "SAMPLES"),
        ([tmp_path / "a.npz", tmp_path / "empty"], "no images"),
        ([tmp_path / "a.npz", tmp_path / "a.npz", "--batch-size", 0], "--batch-size 0"),
        ([tmp_path / "a.npz", tmp_path / "a.npz", "--half", "--device", "cpu"], "--half"),
        ([tmp_path / "a.npz", "--save-stats", tmp_path / "a.npz"], "new file"),
        ([tmp_path / "a.npz", "--save-stats", tmp_path / "none" / "s.npz"], "existing folder"),
        ([tmp_path / "a.npz", tmp_path / "a.npz", "--weights", tmp_path / "none.pth"], "none.pth"),
    ):
        code, out, err = command(*arguments, *([] if "--device" in arguments else ["--device", "cpu"]))
        assert code == 2 and out == "" and err.count("\n") == 1 and message in err, err


def test_damaged_weights_are_named_by_the_set_that_shows_them(command, state, tmp_path):
    torch.save({**state, "Conv2d_1a_3x3.bn.weight": torch.full((32,), torch.nan)}, tmp_path / "nan.pth")
    np.savez(tmp_path / "a.npz", arr_0=some_images(4))
    code, out, err = command(
        tmp_path / "a.npz", tmp_path / "a.npz", "--weights", tmp_path / "nan.pth", "--device", "cpu"
    )
    assert code == 2 and out == "" and "a.npz" in err and "NaN" in err and "Traceback" not in err


# The whole, as a user runs it


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    reference, samples = some_images(13), some_images(11, seed=1)
    np.savez(folder / "reference.npz", arr_0=reference)
    save_folder(folder / "reference", reference)
    save_folder(folder / "samples", samples)
    return folder


@pytest.fixture(scope="module")
def by_hand(two_sets, network):
    """The five numbers of two_sets from textbook formulas and scipy, none of fid.py's metrics."""
    from scipy.linalg import sqrtm

    pool, spatial, logits = zip(
        *(network(fid.ImageSet(two_sets / name).read(0, n)) for name, n in (("reference", 13), ("samples", 11)))
    )
    numbers = {}
    probs = logits[1].double().softmax(1)
    numbers["inception_score"] = (probs * (probs / probs.mean(0)).log()).sum(1).mean().exp().item()
    for name, (a, b) in (("fid", pool), ("sfid", spatial)):
        # The nonzero eigenvalues of sigma_a sigma_b are those of C C^T with C = A B^T from the centred features.
        a, b = a.double(), b.double()
        c = (a - a.mean(0)) @ (b - b.mean(0)).T / np.sqrt(12 * 10)
        trace = a.var(0).sum() + b.var(0).sum() - 2 * np.trace(sqrtm((c @ c.T).numpy())).real
        numbers[name] = ((a.mean(0) - b.mean(0)).square().sum() + trace).item()
    (a, b), inside = pool, torch.cdist(*(x.double() for x in pool))
    radius_a, radius_b = (torch.cdist(x.double(), x.double()).kthvalue(4).values for x in (a, b))
    numbers["precision"] = (inside <= radius_a[:, None]).any(0).double().mean().item()
    numbers["recall"] = (inside <= radius_b).any(1).double().mean().item()
    return numbers


def test_the_five_lines_of_adm(command, two_sets, weights, by_hand):
    options = ["--weights", weights, "--device", "cpu"]
    code, out, err = command(two_sets / "reference.npz", two_sets / "samples", "--batch-size", 4, *options)
    assert code == 0 and "Traceback" not in err
    lines = dict(line.split(": ") for line in out.splitlines())
    assert list(lines) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    values = [float(value) for value in lines.values()]
    assert values == pytest.approx(
        [by_hand[name] for name in ("inception_score", "fid", "sfid", "precision", "recall")], rel=1e-5
    )
    assert 0 < values[3] < 1 or 0 < values[4] < 1  # else precision and recall would prove little
    assert err.count("FID is biased") == 2 and "has 13" in err and "has 11" in err


def test_saved_statistics_stand_for_the_reference(command, two_sets, weights, network, tmp_path, monkeypatch):
    options = ["--weights", weights, "--device", "cpu"]
    stats = tmp_path / "stats"  # written under this very name, without .npz
    assert command(two_sets / "reference", "--save-stats", stats, "--batch-size", 5, *options)[:2] == (0, "")
    with np.load(stats) as saved:
        assert {name: saved[name].shape for name in saved.files} == fid.STATISTICS
        for features, end in zip(network(fid.ImageSet(two_sets / "reference.npz").read(0, 13)), ("", "_s")):
            assert np.allclose(saved[f"mu{end}"], features.double().mean(0), rtol=1e-4, atol=1e-6)
            assert np.allclose(saved[f"sigma{end}"], np.cov(features.double().numpy(), rowvar=False), atol=1e-6)
        traces = [float(np.trace(saved[name])) for name in ("sigma", "sigma_s")]
    monkeypatch.setattr(fid, "frechet_distance", lambda mu1, sigma1, mu2, sigma2: float(np.trace(sigma1)))  # quicker
    code, out, err = command(stats, two_sets / "samples", *options)
    lines = dict(line.split(": ") for line in out.splitlines())
    assert code == 0 and list(lines) == ["Inception Score", "FID", "sFID"]
    assert [float(lines["FID"]), float(lines["sFID"])] == traces
    assert "left out" in err and "Precision, Recall" in err


def test_statistics_in_the_file_go_before_those_of_its_images(
    command, two_sets, weights, by_hand, tmp_path, monkeypatch
):
    monkeypatch.setattr(fid, "frechet_distance", lambda *statistics: [float(x.flat[0]) for x in statistics])
    with np.load(two_sets / "reference.npz") as images:
        np.savez(tmp_path / "both.npz", mu=np.full(2048, 5.0), sigma=np.full((2048, 2048), 7.0), **images)
    code, out, err = command(tmp_path / "both.npz", two_sets / "samples", "--weights", weights, "--json")
    numbers = json.loads(out)
    assert numbers["fid"][:2] == [5, 7] and 5 not in numbers["fid"][2:] + numbers["sfid"]
    assert (numbers["precision"], numbers["recall"]) == (by_hand["precision"], by_hand["recall"])
    assert err.count("FID is biased") == 1 and "left out" not in err

    # Statistics alone (pytorch-fid's files lack the spatial ones) need no network and no weights.
    np.savez(tmp_path / "pair.npz", mu=np.full(2048, 5.0), sigma=np.full((2048, 2048), 7.0))
    code, out, err = command(tmp_path / "pair.npz", tmp_path / "pair.npz")
    assert code == 0 and out == "FID: [5.0, 7.0, 5.0, 7.0]\n" and "sFID" in err


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(two_sets, weights, by_hand):
    # In batches of 4, 13 and 11 images are 4 and 3 batches: 8 + 5 images for the two processes, and 4 + 7.
    arguments = [two_sets / "reference", two_sets / "samples", "--weights", weights, "--batch-size", "4", "--json"]
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "fid.py"]
        + [*arguments, "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = run.communicate(timeout=300)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, err
    last = out.splitlines()[-1]  # the gloo of torch 2.10 writes lines of its own before
    assert json.loads(last) == pytest.approx(by_hand, rel=1e-5)


# What users report


@pytest.mark.parametrize("content", [b"", b"half"])
def test_a_damaged_download_is_named_with_the_advice_to_delete_it(command, state, tmp_path, monkeypatch, content):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "hub" / "checkpoints" / Path(fid.URL).name
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:50_000] if content else b"")
    np.savez(tmp_path / "a.npz", arr_0=some_images(4))
    code, out, err = command(tmp_path / "a.npz", tmp_path / "a.npz", "--device", "cpu")
    assert code == 2 and out == "" and err.count("\n") == 1 and f"{path} (" in err and "delete it" in err
    with pytest.raises(ValueError) as error:  # but not a file that the user names
        fid.load_inception(path)
    assert str(path) in str(error.value) and "delete it" not in str(error.value)


def save_bomb(path):
    """A PNG whose head says 60,000 x 60,000 pixels."""
    png = bytearray(path.with_name("000.png").read_bytes())
    png[16:24] = 2 * (60_000).to_bytes(4, "big")
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    path.write_bytes(png)


BAD_PICTURES = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no picture"),
    "half a head": lambda path: path.write_bytes(path.with_name("000.png").read_bytes()[:20]),
    "a bomb": save_bomb,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("bad", BAD_PICTURES)
def test_a_picture_that_cannot_be_read_is_named_before_the_network_looks(command, tmp_path, bad):
    save_folder(tmp_path / "folder", some_images(6))
    BAD_PICTURES[bad](tmp_path / "folder" / "class0" / "bad.png")
    code, out, err = command(tmp_path / "folder", tmp_path / "folder", "--device", "cpu")
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and "bad.png" in err
    assert bad == "a link to nothing" or "bad.png: not a readable image" in err


@pytest.mark.parametrize("name", ["folder", "none/stats.npz", "images.npz", ""])
def test_statistics_that_cannot_be_saved_are_refused_at_once(command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    np.savez("images.npz", arr_0=some_images(4))
    code, out, err = command("images.npz", "--save-stats", name, "--weights", "none.pth", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "--save-stats" in err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    code, out, err = command("images.npz", "--save-stats", "new.npz", "--weights", "none.pth", "--device", "cpu")
    assert code == 2 and "--save-stats new.npz" in err
