"""common/speed.py: models that were made fast draw the same, and stay models: they can be saved,
trained, copied, moved, loaded into and cast."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dar
from common import speed

LABELS = torch.tensor([3, 7])
ROOT = Path(dar.__file__).resolve().parent


@pytest.fixture
def models(make_ar, make_tokenizer) -> list[dar.ARTransformer]:
    """Two Llamas with tokenizers, of the same weights. One is for comparison."""
    models = [make_ar(num_tokens=8), make_ar(num_tokens=8)]
    for ar in models:
        ar.attach_tokenizer(make_tokenizer(num_tokens=8, num_groups=2))
    return models


@pytest.fixture
def plain(models):
    return models[0]


@pytest.fixture(params=["packed", "compiled", "packed, then compiled"])
def prepared(models, request, monkeypatch):
    """In each way; a compiled step is left as it is, so that no compiler is needed."""
    monkeypatch.setattr(speed, "quiet_compile", lambda function, **options: function)
    ar = models[1]
    if request.param != "compiled":
        assert speed.prepare_for_sampling(ar) is ar
    if request.param != "packed":
        assert speed.prepare_for_sampling(ar, compile=True) is ar
    return ar


def draw(ar) -> torch.Tensor:
    *_, last = dar.stream(ar, ar.tokenizer, LABELS, seeds=0)
    return last.x


def assert_draw_alike(a, b):
    torch.testing.assert_close(draw(a), draw(b), rtol=1e-3, atol=1e-3)


def assert_alike(a, b):
    """But for the rounding of bfloat16."""
    assert (a - b).norm() < 0.05 * b.norm()


def change(module: torch.nn.Module) -> None:
    """As a step of a training does."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.9)


# A prepared model stays a model


def test_it_draws_the_same(plain, prepared):
    assert_draw_alike(prepared, plain)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(prepared.tokenizer.encode(images), plain.tokenizer.encode(images))


def test_to_prepare_it_twice_changes_nothing(plain, prepared):
    speed.prepare_for_sampling(prepared)
    speed.prepare_for_sampling(prepared, compile=True)
    speed.prepare_for_sampling(prepared, compile=True)
    assert_draw_alike(prepared, plain)


def test_it_can_be_saved(plain, prepared, tmp_path):
    draw(prepared)
    dar.save_checkpoint(tmp_path / "x.pt", prepared)
    assert torch.equal(draw(dar.load_ar(tmp_path / "x.pt")), draw(plain))


def test_it_can_be_loaded_into(make_ar, prepared):
    draw(prepared)
    other = make_ar(seed=2, num_tokens=8)
    other.attach_tokenizer(prepared.tokenizer)
    prepared.load_state_dict(other.state_dict())
    assert_draw_alike(prepared, other)


def test_its_weights_can_be_changed(plain, prepared):
    for ar in (plain, prepared):
        draw(ar)
        change(ar)
        change(ar.tokenizer)
    assert_draw_alike(prepared, plain)


def test_its_weights_can_be_replaced(plain, prepared):
    for ar in (plain, prepared):
        draw(ar)
        output = ar.output
        output.weight = torch.nn.Parameter(2 * output.weight.detach())
    assert_draw_alike(prepared, plain)


def test_it_can_be_trained(plain, prepared):
    codes = torch.randint(64, (2, 8))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    s = torch.tensor([0.3, 0.9])
    noise = torch.randn(2, 3, 32, 32)
    for ar in (plain, prepared):
        draw(ar)
        dar.ar_loss(ar, codes, LABELS).backward()
        ar.tokenizer(images, s, noise)["fm"].backward()
    for ours, theirs in zip(prepared.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(prepared.tokenizer.parameters(), plain.tokenizer.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ar: pickle.loads(pickle.dumps(ar))])
def test_a_copy_uses_its_own_weights(plain, prepared, copied):
    draw(prepared)
    twin = copied(prepared)
    change(twin)
    change(twin.tokenizer)
    assert_draw_alike(prepared, plain)
    change(plain)
    change(plain.tokenizer)
    assert_draw_alike(twin, plain)


def test_it_can_be_cast_and_back(plain, prepared):
    draw(prepared)
    for ar in (plain, prepared):
        ar.bfloat16()
        ar.tokenizer.bfloat16()
    codes = torch.randint(64, (2, 8))
    with torch.no_grad():
        assert_alike(prepared(codes, LABELS), plain(codes, LABELS))
    assert prepared.generate(LABELS, seeds=0).shape == (2, 8)
    for ar in (plain, prepared):
        ar.float()
        ar.tokenizer.float()
    assert_draw_alike(prepared, plain)


def test_rounded_weights_are_used_wherever_they_lie(plain, prepared):
    """A cast and back may put new weights at the old ones' address."""
    draw(prepared)
    for ar in (plain, prepared):
        ar.bfloat16().float()
        ar.tokenizer.bfloat16().float()
    assert_draw_alike(prepared, plain)


def test_it_can_be_moved(prepared):
    draw(prepared)
    prepared.to("meta")
    codes = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    assert prepared(codes, LABELS.to("meta")).device.type == "meta"


def test_inference_mode_may_come_and_go(plain, prepared):
    with torch.inference_mode():
        inside = draw(prepared).clone()
    assert torch.equal(draw(prepared), inside)
    with torch.inference_mode():
        made_inside = copy.deepcopy(plain)
        speed.prepare_for_sampling(made_inside)
        assert_draw_alike(made_inside, plain)


def test_autocast_reaches_it(plain, prepared):
    codes = torch.randint(64, (2, 8))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_alike(prepared(codes, LABELS), plain(codes, LABELS))


# Packed weights


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 300])
def test_a_packed_linear_multiplies_alike(rows, bias, dtype, tolerance):
    linear = torch.nn.Linear(64, 96, bias=bias, dtype=dtype)
    x = torch.randn(2, rows, 64, dtype=dtype)
    with torch.no_grad():
        expected = linear(x)
        packed = speed.prepare_for_sampling(linear)(x)
    torch.testing.assert_close(packed, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed here")
def test_weights_are_packed_once_and_without_gradients():
    linear = speed.prepare_for_sampling(torch.nn.Linear(64, 96))
    linear(torch.randn(1, 64)).sum().backward()
    assert linear.packed is None
    with torch.no_grad():
        linear(torch.randn(1, 64))
        packed = linear.packed
        linear(torch.randn(1, 64))
    assert packed is not None
    assert linear.packed is packed


# Compiled steps, as CUDA graphs run them


def test_a_step_may_write_over_what_the_last_one_returned(models, monkeypatch):
    memory = {}

    def same_memory(function, **options):
        def call(*inputs):
            result = function(*inputs)
            kept = memory.setdefault((function.__name__, result.shape), torch.empty_like(result))
            return kept.copy_(result)

        return call

    monkeypatch.setattr(speed, "quiet_compile", same_memory)
    plain, ar = models
    speed.prepare_for_sampling(ar, compile=True)
    ours = list(dar.stream(ar, ar.tokenizer, LABELS, seeds=0))
    theirs = list(dar.stream(plain, plain.tokenizer, LABELS, seeds=0))
    for a, b in zip(ours, theirs):
        assert torch.equal(a.codes, b.codes)
        torch.testing.assert_close(a.x, b.x)
        torch.testing.assert_close(a.previews, b.previews)
    assert len(memory) == 2  # a step of each model


@pytest.fixture
def compiled(models, monkeypatch):
    monkeypatch.setattr(speed, "quiet_compile", lambda function, **options: function)
    return speed.prepare_for_sampling(models[1], compile=True)


def test_caches_are_used_again(compiled):
    caches = compiled.new_caches(2, 8)
    memory = caches[0].k.data_ptr()
    caches[0].k.fill_(torch.inf)
    del caches
    caches = compiled.new_caches(2, 8)
    assert caches[0].k.data_ptr() == memory
    assert not caches[0].k.any()


def test_two_streams_share_no_caches(plain, compiled):
    streams = [dar.generate_groups(compiled, LABELS, 4, seeds=seed) for seed in (0, 9)]
    together = list(zip(*streams))  # a group of each in turn
    for i, seed in enumerate((0, 9)):
        codes = torch.cat([groups[i] for groups in together], 1)
        assert torch.equal(codes, plain.generate(LABELS, seeds=seed))


@pytest.mark.slow
@pytest.mark.parametrize("packed_before", [False, True])
def test_compiled_models_draw_the_same(models, packed_before):
    plain, ar = models
    if packed_before:
        draw(speed.prepare_for_sampling(ar))
    speed.prepare_for_sampling(ar, compile=True)
    for settings in ({"greedy": True}, {"cfg": None}, {"prefix": torch.arange(3), "top_k": 9}):
        expected = plain.generate(LABELS, seeds=0, **settings)
        assert torch.equal(ar.generate(LABELS, seeds=0, **settings), expected)
    assert_draw_alike(ar, plain)
    assert_draw_alike(copy.deepcopy(ar), plain)


@pytest.mark.slow
def test_compiling_says_nothing():
    program = (
        "import torch, dar\n"
        "from common import speed\n"
        "ar = dar.ARTransformer(dar.ARConfig(64, 1, 16, 2, 4)).eval()\n"
        "speed.prepare_for_sampling(ar, compile=True).generate(torch.tensor([0]), seeds=0)\n"
    )
    command = [sys.executable, "-W", "ignore:Guards may run slower", "-c", program]  # Python 3.13.0
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's compiled dropout has other numbers")
def test_a_compiled_training_step_drops_the_same(make_ar):
    ar = make_ar(dropout=0.5).train()
    codes = torch.randint(64, (4, 32))
    losses = []
    for model in (ar, speed.quiet_compile(ar)):
        torch.manual_seed(1)
        losses.append(dar.ar_loss(model, codes, torch.arange(4)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Attention in bfloat16 on a CPU


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 8, 300])
def test_bfloat16_attends_as_float32_does(n, masked, grad):
    """300 queries are taken in three parts."""
    q = torch.randn(2, 2, n, 64).bfloat16()
    k, v = torch.randn(2, 2, 2, 300, 64).bfloat16()
    mask = None
    if masked:
        mask = torch.rand(n, 300) < 0.5
        mask[:, 0] = True
    with torch.set_grad_enabled(grad):
        out = speed.attend_on_any_device(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    expected = dar.attend(q.float(), k.float(), v.float(), mask)
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.02)


def test_fast_attention_reaches_the_models(plain, monkeypatch):
    monkeypatch.setattr(dar, "attend", dar.attend)  # is put back in the end
    before = draw(plain)
    speed.use_fast_attention()
    assert dar.attend is speed.attend_on_any_device
    assert torch.equal(draw(plain), before)  # in float32 nothing changes


def test_a_precision_is_picked():
    cpu = torch.device("cpu")
    assert speed.pick_dtype("float32", cpu) == torch.float32
    assert speed.pick_dtype("float16", cpu) == torch.float16
    fast = speed.has_fast_bfloat16(cpu)
    assert speed.pick_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32)
    assert speed.pick_dtype("auto", torch.device("mps")) == torch.float32
