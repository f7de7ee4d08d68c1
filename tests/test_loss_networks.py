"""The terms of eq. 7 that look through trained networks (common/frozen.py): LPIPS and REPA, on
random weights laid out as the real ones."""

import functools
from pathlib import Path

import pytest
import torch
from command_lines import TOKENIZER, call, log

import dar
from common import frozen

HUBCONF = '''
import torch


class StandIn(torch.nn.Module):
    """Shaped as DINOv2 ViT-B/14: 768 features for each patch of 14 pixels a side."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 768, 14, stride=14)

    def forward_features(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.nn.functional.layer_norm(x, (768,))
        return {"x_norm_clstoken": x.mean(1), "x_norm_patchtokens": tokens}


def dinov2_vitb14(pretrained=True):
    assert not pretrained
    return StandIn()
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with VGG-16 weights under torchvision's names (vgg.pth), a repository that
    torch.hub takes for DINOv2's (dinov2/), and weights for that (dinov2.pth)."""
    import lpips

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    vgg = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.state_dict()
    weights = {"features." + name.split(".", 1)[1]: value for name, value in vgg.items()}
    torch.save(weights, folder / "vgg.pth")
    (folder / "dinov2").mkdir()
    (folder / "dinov2" / "hubconf.py").write_text(HUBCONF)
    net = torch.hub.load(str(folder / "dinov2"), "dinov2_vitb14", source="local", pretrained=False)
    torch.save(net.state_dict(), folder / "dinov2.pth")
    return folder


@pytest.fixture
def dinov2(files) -> torch.nn.Module:
    return frozen.load_dinov2(str(files / "dinov2"), str(files / "dinov2.pth"))


def gradient(module: torch.nn.Module) -> float:
    return module.weight.grad.abs().max().item()


def test_lpips_gradients_stop_at_vgg(files, make_tokenizer):
    net = frozen.load_lpips(str(files / "vgg.pth"))
    weights = torch.load(files / "vgg.pth", weights_only=True)
    assert torch.equal(net.net.slice5[-2].weight, weights["features.28.weight"])
    assert not net.training

    tokenizer = make_tokenizer()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = tokenizer(images, torch.tensor([[0.2, 0.9], [0.7, 0.1]]))
    terms = dar.tokenizer_loss(out, images, net, lpips_weight=0.25)
    expected = net(out["pred_image"], images[[0, 0, 1, 1]]).mean()
    assert terms["lpips"].item() == pytest.approx(expected.item() / 4, rel=1e-5)
    assert net(images, images).abs().max() < 1e-6 < expected
    terms["lpips"].backward()
    assert gradient(tokenizer.diffusion.patch_out) > 0
    assert gradient(tokenizer.decoder_layers[0].mlp.fc1) > 0
    assert gradient(tokenizer.encoder_layers[0].mlp.fc1) > 0
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_repa_gradients_stop_at_dinov2(dinov2, make_tokenizer):
    tokenizer = make_tokenizer(repa_layer=1)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = tokenizer(images, torch.rand(2, 3))
    target = frozen.dinov2_features(dinov2, 8, images)
    assert target.shape == (2, 64, 768)
    assert not target.requires_grad
    dar.tokenizer_loss(out, images, repa_target=target)["repa"].backward()
    assert gradient(tokenizer.diffusion.repa_head[0]) > 0
    assert gradient(tokenizer.diffusion.blocks[0].mlp.fc1) > 0
    assert gradient(tokenizer.encoder_layers[0].mlp.fc1) > 0
    assert tokenizer.diffusion.blocks[1].mlp.fc1.weight.grad is None  # behind where REPA reads
    assert all(p.grad is None and not p.requires_grad for p in dinov2.parameters())


def test_dinov2_sees_normalised_pixels(dinov2):
    seen = []
    dinov2.patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    frozen.dinov2_features(dinov2, 8, torch.full((1, 3, 32, 32), -1.0))
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    assert seen[0].shape == (1, 3, 112, 112)
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), black, rtol=1e-4, atol=1e-4)


def test_networks_compare_in_float32():
    def network(*images):
        assert not torch.is_autocast_enabled("cpu")
        assert all(x.dtype == torch.float32 for x in images)
        return images[0] @ images[0]

    x = torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = frozen.in_float32(network)(x, x.bfloat16())
    assert torch.equal(found, x @ x)


def test_training_with_the_whole_loss(files, tmp_path):
    words = "repa_layer=0 --steps 2 --lpips 0.5 --repa 0.5 --times 2 --precision bfloat16 --out run"
    words += f" --vgg {files}/vgg.pth --dinov2-repo {files}/dinov2 --dinov2 {files}/dinov2.pth"
    call(*TOKENIZER, *words.split(), cwd=tmp_path)
    for row in log(tmp_path / "run"):
        terms = [float(row[name]) for name in ("fm", "vq", "commit", "lpips", "repa")]
        assert sum(terms) == pytest.approx(float(row["loss"]), rel=1e-4)
        assert terms[3] > 0
        assert 0 < terms[4] < 1


def test_without_the_terms_nothing_is_loaded_or_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "load_lpips", functools.partial(pytest.fail, "loaded"))
    monkeypatch.setattr(frozen, "load_dinov2", functools.partial(pytest.fail, "loaded"))
    words = "repa_layer=0 --lpips 0 --repa 0 --out run --steps"
    heads = []
    for steps in (1, 3):
        call(*TOKENIZER, *words.split(), steps, cwd=tmp_path)
        model = dar.read_checkpoint(tmp_path / "run" / "last.pt")["model"]
        heads.append(model["diffusion.repa_head.0.weight"].clone())
    assert torch.equal(*heads)


def test_damaged_downloads_are_named(files, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    vgg = cache / "vgg16-397923af.pth"
    vgg.write_bytes((files / "vgg.pth").read_bytes()[:1000])
    with pytest.raises(OSError, match=f"VGG-16 cannot be loaded .*delete {vgg} .*--prefetch"):
        frozen.load_lpips(None)
    file = cache / "dinov2_vitb14_pretrain.pth"
    with pytest.raises(OSError, match=f"DINOv2 cannot be loaded .*delete {file} .*--prefetch"):
        frozen.load_dinov2(str(files / "dinov2"), None)  # the stand-in has none to fetch


@pytest.mark.parametrize(
    "words, named",
    [
        ("--lpips 0.5 --vgg nowhere.pth", "nowhere.pth"),
        ("--lpips 0.5 --vgg other.pth", "other.pth: not the weights"),
        ("--lpips 0.5 --vgg text.pth", "text.pth: no weights"),
        ("--lpips 0.5", "--vgg FILE"),
        ("--repa 0.5", "repa_layer"),
        ("--repa 0.5 --set repa_layer=0 --dinov2-repo nowhere", "nowhere"),
        ("--repa 0.5 --set repa_layer=0", "--dinov2-repo DIR"),
        ("--prefetch", "--prefetch"),
    ],
)
def test_missing_networks_are_one_line(tmp_path, monkeypatch, words, named):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no internet
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    start = "train_tokenizer.py --device cpu --data shapes --out run"
    with pytest.raises((ValueError, OSError)) as refused:
        call(*start.split(), *words.split(), cwd=tmp_path)
    assert named in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
