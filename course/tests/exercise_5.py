"""Exercise 5: metrics."""

import math

import torch

import fid
from course.tests.support import check_close, check_refused


def test_the_covariance_is_that_of_the_features():
    x = torch.randn(400, 10, dtype=torch.float64) + 3
    mean, covariance = fid.mean_and_covariance(x)
    check_close("mean", mean, x.mean(0), 1e-10)
    check_close("covariance", covariance, torch.cov(x.T), 1e-10)


def test_a_large_mean_does_no_harm():
    x = torch.randn(400, 10, dtype=torch.float64) + 1e6
    mean, covariance = fid.mean_and_covariance(x)
    check_close("covariance far from the origin", covariance, torch.cov(x.T), 1e-8)
    mean, covariance = fid.mean_and_covariance(x.float())
    assert covariance.dtype == torch.float64, f"of float32 features it is {covariance.dtype}"


def test_fid_is_the_closed_form_where_covariances_share_eigenvectors():
    for rank in (40, 150, 200):  # of 200: supports that are disjoint, that overlap, that are full
        basis = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64)).Q
        values = torch.rand(2, 200, dtype=torch.float64) * 50
        values[0, rank:] = 0
        values[1, : 200 - rank] = 0
        mean = torch.randn(2, 200, dtype=torch.float64)
        sigma = [(basis * row) @ basis.T for row in values]
        expected = (mean[0] - mean[1]).square().sum()
        expected += (values[0].sqrt() - values[1].sqrt()).square().sum()
        actual = fid.frechet_distance(mean[0], sigma[0], mean[1], sigma[1])
        check_close(f"rank {rank}, relative", actual / expected.item(), 1.0, 1e-10)


def test_fid_of_a_set_with_itself_is_zero():
    for count in (20, 100):  # with fewer images than dimensions, and with more
        x = torch.randn(count, 30, dtype=torch.float64)
        mean = x.mean(0)
        sigma = torch.cov(x.T)
        distance = fid.frechet_distance(mean, sigma, mean, sigma)
        assert 0 <= distance < 1e-9, f"{count} images of 30 numbers: {distance}"


def test_fid_refuses_what_it_cannot_measure():
    mean = torch.zeros(5)
    sigma = torch.eye(5)
    bad = sigma * math.nan
    check_refused("NaN", "NaN or infinite", fid.frechet_distance, mean, sigma, mean, bad)
    check_refused("shapes", "4", fid.frechet_distance, mean, sigma, mean[:4], sigma)


def test_the_inception_score_by_hand():
    check_close("no picture is certain", fid.inception_score(torch.full((10, 7), 1 / 7)), 1.0)
    check_close("each picture is certain of another class", fid.inception_score(torch.eye(7)), 7.0)
    probs = torch.eye(3)[[0, 0, 1, 2, 1]]  # splits: one class, two classes, and one picture
    check_close("splits of 2", fid.inception_score(probs, split_size=2), 4 / 3)


def test_the_inception_score_refuses_logits():
    check_refused("rows of sum 0", "sum 1", fid.inception_score, torch.zeros(10, 7))


def test_precision_and_recall_of_sets_that_overlap():
    a = torch.randn(50, 64)
    b = torch.randn(50, 64) + 1000
    c = torch.randn(50, 64) - 1000
    check_close("a set and itself", torch.tensor(fid.precision_recall(a, a)), [1, 1])
    check_close("two far sets", torch.tensor(fid.precision_recall(a, b)), [0, 0])
    half = fid.precision_recall(torch.cat([a, b]), torch.cat([a, c]))
    check_close("sets that share half", torch.tensor(half), [0.5, 0.5])
    subset = fid.precision_recall(torch.cat([a, b]), a)
    check_close("samples that are half of the reference", torch.tensor(subset), [1, 0.5])


def test_a_ball_reaches_to_the_third_neighbour():
    reference = torch.tensor([[0.0], [1], [2], [4], [100], [101], [102], [104]])
    samples = torch.tensor([[-4.0], [-1004], [1004], [2004]])  # 0's third neighbour, 4, is 4 away
    precision, _ = fid.precision_recall(reference, samples)
    check_close("a sample on the border is inside", precision, 0.25)
    precision, _ = fid.precision_recall(reference, samples * 1.001)
    check_close("a sample beyond it is outside", precision, 0.0)
    precision, _ = fid.precision_recall(reference, samples, k=2)
    check_close("to the second neighbour, k = 2", precision, 0.0)


def test_copies_of_an_image_lie_in_each_others_balls():
    for _ in range(12):  # rounding to either side of 0
        copies = torch.randn(1, 512).expand(20, -1) + 100
        others = torch.randn(30, 512) + 100
        precision, _ = fid.precision_recall(torch.cat([others, copies]), copies[:4])
        check_close("precision of four copies", precision, 1.0)


def test_blocks_do_not_change_the_result():
    reference = torch.randn(200, 16)
    samples = 0.7 * torch.randn(150, 16)
    whole = torch.tensor(fid.precision_recall(reference, samples, block=1000))
    for block in (7, 64):
        actual = torch.tensor(fid.precision_recall(reference, samples, block=block))
        check_close(f"block = {block}", actual, whole, 0)


def test_precision_refuses_what_it_cannot_measure():
    x = torch.randn(10, 5)
    bad = x * math.inf
    check_refused("three samples", "N, M > 3", fid.precision_recall, x, x[:3])
    check_refused("other widths", "[10, 4]", fid.precision_recall, x, x[:, :4])
    check_refused("infinity", "NaN or infinite", fid.precision_recall, x, bad)
