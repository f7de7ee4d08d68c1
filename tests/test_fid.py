"""fid.py: the network against the TensorFlow graph's port and the pytorch-fid package, the metrics
against ADM's evaluator and against sets whose numbers are known, and the whole as a user runs it.

The weights follow from a seed. The real ones are a download away, and any correct network agrees on
any weights.
"""

import json
import sys

import command_lines
import numpy as np
import pytest
import scipy.linalg
import synthetic
import torch
from PIL import Image

import fid


@pytest.fixture(scope="module")
def golden():
    return synthetic.load_golden("inception_small.npz")


@pytest.fixture(scope="module")
def state_dict(golden):
    return synthetic.synthetic_state_dict(golden, "inception")


@pytest.fixture(scope="module")
def weights(state_dict, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state_dict, path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return fid.load_inception(weights)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def relative_error(a, b):
    return (torch.linalg.norm(a.double() - b.double()) / torch.linalg.norm(b.double())).item()


# The network


def test_keys(golden):
    keys = {name: list(value.shape) for name, value in fid.InceptionV3().state_dict().items()}
    assert keys == golden["shapes"]


@pytest.mark.parametrize("size", [32, 256, 320])
def test_golden_features(golden, network, size):
    images = torch.from_numpy(golden[f"img{size}"]).permute(0, 3, 1, 2)
    for name, features in zip(("pool3", "spatial", "logits_nobias"), network(images)):
        expected = torch.from_numpy(golden[f"{name}_{size}"])
        assert features.shape == expected.shape
        assert relative_error(features, expected) < 1e-5, name


def test_pytorch_fid_agrees(state_dict, network, rng, monkeypatch):
    inception = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state_dict)
    theirs = inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 299, 299), dtype=np.uint8))
    with torch.no_grad():
        expected = theirs((images.float() - 128) / 128)[0].flatten(1)
    assert relative_error(network(images)[0], expected) < 1e-5


def test_resize_has_no_half_pixel_offset():
    row = torch.tensor([0.0, 8.0]).view(1, 1, 1, 2)
    assert fid.resize_tf1(row, 4)[0, 0, 0].tolist() == [0, 4, 8, 8]


def test_resize_does_not_smooth():
    column = torch.arange(6.0).view(1, 1, 6, 1)
    assert fid.resize_tf1(column, 3)[0, 0, :, 0].tolist() == [0, 2, 4]


def test_network_takes_bytes():
    with pytest.raises(ValueError, match="uint8"):
        fid.InceptionV3()(torch.rand(1, 3, 32, 32))


# The metrics: mean and covariance, FID


@pytest.fixture(scope="module")
def adm():
    """Features of two sets, and what ADM's own evaluator said of them."""
    return synthetic.load_golden("adm_small.npz")


@pytest.mark.parametrize("name, features", [("fid", "pool"), ("sfid", "spatial")])
def test_fid_is_adms(adm, name, features):
    reference = fid.mean_and_covariance(adm[f"ref_{features}"])
    samples = fid.mean_and_covariance(adm[f"sample_{features}"])
    assert fid.frechet_distance(*reference, *samples) == pytest.approx(adm[name], rel=1e-5)


def test_covariance_is_unbiased(rng):
    features = rng.standard_normal((5000, 4)) + 100  # more than one block of rows
    mean, covariance = fid.mean_and_covariance(features)
    assert np.allclose(mean, features.mean(0), rtol=1e-12)
    assert np.allclose(covariance, np.cov(features, rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("rank", [40, 150, 200])
def test_fid_of_gaussians_with_common_axes(rng, rank):
    """Then it is the sum of (difference of standard deviations)^2 over the axes. Of 200 dimensions
    the two have `rank` and 200 - rank with no spread: apart, overlapping, and all."""
    axes = np.linalg.qr(rng.standard_normal((200, 200))).Q
    deviations = rng.random((2, 200)) * 7
    deviations[0, rank:] = 0
    deviations[1, : 200 - rank] = 0
    means = rng.standard_normal((2, 200))
    covariances = [(axes * deviation**2) @ axes.T for deviation in deviations]

    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    distance = fid.frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert distance == pytest.approx(expected, rel=1e-10)


def test_fid_to_itself_is_0_with_fewer_images_than_dimensions(rng):
    features = rng.standard_normal((60, 400)) * np.logspace(1, -2, 400)
    gaussian = fid.mean_and_covariance(features)
    assert 0 <= fid.frechet_distance(*gaussian, *gaussian) < 1e-6


def test_fid_refuses_other_shapes(rng):
    mean, covariance = fid.mean_and_covariance(rng.standard_normal((10, 5)))
    with pytest.raises(ValueError, match=r"5\D+5, 5\D+4\D+5, 5\D"):
        fid.frechet_distance(mean, covariance, mean[:4], covariance)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_fid_refuses_what_is_not_finite(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        fid.frechet_distance(np.zeros(2), np.eye(2), np.array([0, value]), np.eye(2))


# The metrics: Inception score


def test_inception_score_is_adms(adm):
    logits = adm["sample_pool"].astype(np.float64) @ adm["softmax_weight"]
    probs = torch.from_numpy(logits).softmax(1)
    assert fid.inception_score(probs) == pytest.approx(adm["inception_score"], rel=1e-5)


def test_inception_score_of_no_idea_is_1():
    assert fid.inception_score(torch.full((10, 7), 1 / 7)) == pytest.approx(1)


def test_inception_score_of_every_class_is_their_number():
    assert fid.inception_score(torch.eye(7)) == pytest.approx(7)


def test_inception_score_is_a_mean_over_splits_in_file_order():
    probs = torch.eye(3)[[0, 0, 1, 2, 1]]  # one class, two classes, and a last split of one image
    assert fid.inception_score(probs, split_size=2) == pytest.approx((1 + 2 + 1) / 3)


def test_inception_score_splits_at_5000():
    classes = torch.arange(6000) // 5500  # one class, then half of the 1000 each
    assert fid.inception_score(torch.eye(2)[classes]) == pytest.approx((1 + 2) / 2)


def test_inception_score_refuses_logits(rng):
    with pytest.raises(ValueError, match="sum 1"):
        fid.inception_score(rng.standard_normal((10, 5)))


# The metrics: precision and recall


def test_precision_and_recall_are_adms(adm):
    numbers = fid.precision_recall(adm["ref_pool"], adm["sample_pool"])
    expected = float(adm["precision"]), float(adm["recall"])
    assert numbers == pytest.approx(expected, abs=0.01)  # ADM's distances are float16.


@pytest.mark.parametrize("block", [37, 1024])
@pytest.mark.parametrize("offset", [0, 1000])
def test_precision_and_recall_are_exact(adm, block, offset):
    """Far from the origin |a|^2 + |b|^2 - 2 ab cancels more digits than float32 has."""
    reference = adm["ref_pool"].astype(np.float64) + offset
    samples = adm["sample_pool"].astype(np.float64) + offset
    numbers = fid.precision_recall(reference, samples, block=block)
    expected = float(adm["precision_float64"]), float(adm["recall_float64"])
    assert numbers == pytest.approx(expected, abs=1e-6)


def test_precision_and_recall_count_what_two_sets_share(rng):
    a, b, c = (rng.standard_normal((50, 64)) + shift for shift in (0, 1000, -1000))
    assert fid.precision_recall(a, a) == (1, 1)
    assert fid.precision_recall(a, b) == (0, 0)
    assert fid.precision_recall(np.concatenate([a, b]), a) == (1, 0.5)
    assert fid.precision_recall(a, np.concatenate([a, b])) == (0.5, 1)
    assert fid.precision_recall(np.concatenate([a, b]), np.concatenate([a, c])) == (0.5, 0.5)


@pytest.mark.parametrize(
    "place, k, is_inside", [(-3.99, 3, 1), (-4, 3, 1), (-4.01, 3, 0), (-4, 2, 0)]
)
def test_ball_ends_at_the_third_neighbour(place, k, is_inside):
    reference = np.array([[0.0], [1], [2], [4]])  # 0's third neighbour is 4 away
    samples = np.full((4, 1), float(place))
    assert fid.precision_recall(reference, samples, k=k)[0] == is_inside


def test_copies_of_an_image_lie_in_their_balls_of_radius_0(rng):
    for _ in range(12):  # Rounding leads to either side of 0.
        copies = np.repeat(rng.standard_normal((1, 64)) + 100, 50, axis=0)
        assert fid.precision_recall(copies, copies[:4], block=7) == (1, 1)


def test_precision_refuses_too_few_images(rng):
    features = rng.standard_normal((10, 5))
    with pytest.raises(ValueError, match="N, M > 3"):
        fid.precision_recall(features, features[:3])


def test_precision_refuses_other_features(rng):
    features = rng.standard_normal((10, 5))
    with pytest.raises(ValueError, match=r"10, 5\D+10, 4\D"):
        fid.precision_recall(features, features[:, :4])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_precision_refuses_what_is_not_finite(rng, value):
    features = rng.standard_normal((10, 5))
    features[3, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        fid.precision_recall(features, features)


# The whole, as a user runs it: 13 references and 11 samples


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs fid.py with arguments, and returns what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments), "--device", "cpu"])
        fid.main()
        return capsys.readouterr()

    return run


def coarse_images(rng, count):
    """Random colours in blocks of 8 x 8: what a picture is to a network with random weights."""
    colours = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return colours.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with reference.npz, the same images in reference/CLASS/, and others in samples/."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    images = {"reference": coarse_images(rng, 13), "samples": coarse_images(rng, 11)}
    np.savez(folder / "reference.npz", arr_0=images["reference"])
    for name, pixels in images.items():
        for i, image in enumerate(pixels):
            path = folder / name / f"class{i // 5}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module")
def features(sets, network):
    """What the network says of the two sets, in float64: pool_3, spatial, logits of each."""
    counts = {"reference": 13, "samples": 11}
    return {
        name: [part.double() for part in network(fid.open_images(sets / name).read(0, count))]
        for name, count in counts.items()
    }


@pytest.fixture(scope="module")
def expected(features):
    """The five numbers from the textbook's formulas, with nothing of fid.py's metrics."""
    pool_a, spatial_a, _ = features["reference"]
    pool_b, spatial_b, logits = features["samples"]

    def frechet(a, b):
        # The trace needs the eigenvalues of sigma_a sigma_b. Those that are not 0 are also those of
        # C C^T with C = A B^T from the centred features, which is only 13 x 13.
        c = (a - a.mean(0)) @ (b - b.mean(0)).T / np.sqrt(12 * 10)
        trace = np.trace(scipy.linalg.sqrtm((c @ c.T).numpy())).real
        return (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * trace

    probs = logits.softmax(1)
    divergences = (probs * (probs / probs.mean(0)).log()).sum(1)
    radii_a = torch.cdist(pool_a, pool_a).kthvalue(4).values
    radii_b = torch.cdist(pool_b, pool_b).kthvalue(4).values
    distances = torch.cdist(pool_a, pool_b)
    numbers = {
        "inception_score": divergences.mean().exp(),
        "fid": frechet(pool_a, pool_b),
        "sfid": frechet(spatial_a, spatial_b),
        "precision": (distances <= radii_a[:, None]).any(0).double().mean(),
        "recall": (distances <= radii_b).any(1).double().mean(),
    }
    return {name: number.item() for name, number in numbers.items()}


def test_five_lines(run, sets, weights, expected):
    printed = run(sets / "reference.npz", sets / "samples", "--weights", weights, "--batch-size", 4)
    lines = dict(line.split(": ") for line in printed.out.splitlines())
    assert list(lines) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    numbers = [float(value) for value in lines.values()]
    assert numbers == pytest.approx(list(expected.values()), rel=1e-5)
    assert 0 < expected["recall"] < 1  # Otherwise it would prove little.
    assert printed.err.count("FID is biased") == 2


def test_saved_statistics_are_those_of_the_images(run, sets, weights, features, tmp_path):
    path = tmp_path / "stats"  # np.savez would add .npz to this name.
    run(sets / "reference", "--save-stats", path, "--weights", weights, "--batch-size", 5)
    pool, spatial, _ = features["reference"]
    with np.load(path) as statistics:
        assert np.allclose(statistics["mu"], pool.mean(0), rtol=1e-4, atol=1e-6)
        assert np.allclose(statistics["sigma"], np.cov(pool, rowvar=False), atol=1e-6)
        assert np.allclose(statistics["mu_s"], spatial.mean(0), rtol=1e-4, atol=1e-6)
        assert np.allclose(statistics["sigma_s"], np.cov(spatial, rowvar=False), atol=1e-6)


@pytest.fixture
def first_numbers(monkeypatch):
    """Puts the first number of its arguments in the place of the Fréchet distance, which takes
    seconds: it tells whose statistics were compared."""

    def frechet_distance(*statistics):
        return [float(np.ravel(array)[0]) for array in statistics]

    monkeypatch.setattr(fid, "frechet_distance", frechet_distance)


@pytest.fixture
def pool_statistics():
    """The mean and covariance that pytorch-fid saves. sFID's are not among them."""
    return {"mu": np.full(2048, 5.0), "sigma": np.full((2048, 2048), 7.0)}


def test_statistics_alone_need_no_network(run, first_numbers, pool_statistics, tmp_path):
    np.savez(tmp_path / "a.npz", **pool_statistics)
    printed = run(tmp_path / "a.npz", tmp_path / "a.npz", "--weights", tmp_path / "missing.pth")
    assert printed.out == "FID: [5.0, 7.0, 5.0, 7.0]\n"
    assert "left out" in printed.err


def test_statistics_in_a_file_go_before_its_images(
    run, first_numbers, pool_statistics, sets, weights, expected, tmp_path
):
    with np.load(sets / "reference.npz") as arrays:
        np.savez(tmp_path / "both.npz", arr_0=arrays["arr_0"], **pool_statistics)
    printed = run(tmp_path / "both.npz", sets / "samples", "--weights", weights, "--json")
    numbers = json.loads(printed.out)
    assert numbers["fid"][:2] == [5, 7]
    assert numbers["precision"] == expected["precision"]
    assert numbers["recall"] == expected["recall"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(sets, weights, expected):
    # Batches of 4 are shared unevenly: 8 and 5 references, 4 and 7 samples.
    arguments = [sets / "reference", sets / "samples", "--weights", weights, "--batch-size", 4]
    done = command_lines.run("fid.py", *arguments, "--device", "cpu", "--json", processes=2)
    last_line = done.stdout.splitlines()[-1]  # Before it gloo may write lines of its own.
    assert json.loads(last_line) == pytest.approx(expected, rel=1e-5)
