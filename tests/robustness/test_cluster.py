"""What a cluster would stumble over, found without one."""

import datetime

import pytest
import torch
import torch.distributed as dist

import dar
import train_ar
import train_tokenizer
from common.cli import command_line
from common.distributed import start_processes
from common.plan import ar_cost, needed_bytes, refuse_if_too_large, tokenizer_cost


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.slow
def test_v1_recipe_fits_80_gb():
    config = dar.TOKENIZER_PRESETS["v1"]
    recipe = train_tokenizer.RECIPES["v1"]
    cost = tokenizer_cost(config, recipe["times"], lpips=True, repa=True)
    model = on_meta(dar.SequentialDiffusionTokenizer, config)
    assert 1.2e9 < cost.saved < 1.4e9  # 1.305 GB by another count
    assert needed_bytes(model, True, cost, recipe["micro_batch"]) < 70e9
    assert needed_bytes(model, True, cost, 128) > 80e9  # the share of one of 8 GPUs


@pytest.mark.slow
def test_xl_recipe_fits_80_gb():
    config = dar.AR_PRESETS["XL"]
    cost = ar_cost(config)
    model = on_meta(dar.ARTransformer, config)
    assert 0.7e9 < cost.saved < 0.8e9  # 0.75 GB by another count
    assert needed_bytes(model, False, cost, train_ar.RECIPES["XL"]["micro_batch"]) < 70e9
    assert needed_bytes(model, False, cost, 128) > 80e9


def test_products_of_a_linear_model_by_hand():
    config = dar.AR_PRESETS["shapes"]
    model = on_meta(dar.ARTransformer, config)
    tables = model.tok_embeddings.weight.numel() + model.cls_embedding.weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.numel() for p in model.parameters()) - tables - norms
    forward = 2 * matrices * config.num_tokens  # a product and a sum for each weight and token
    assert ar_cost(config).products == pytest.approx(3 * forward, rel=1e-6)


def test_what_does_not_fit_is_refused():
    refuse_if_too_large(needed=70e9, available=80e9, micro_batch=32)
    with pytest.raises(ValueError, match="--micro-batch 64 needs about 90 GB, the GPU has 80"):
        refuse_if_too_large(needed=90e9, available=80e9, micro_batch=64)


def test_processes_wait_for_hours(monkeypatch):
    options = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: options.update(more))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    start_processes("cpu")
    assert options["timeout"] >= datetime.timedelta(hours=1)


@pytest.mark.parametrize("error, destroyed", [(None, True), (ValueError("no"), False)])
def test_only_a_clean_end_waits_for_the_others(monkeypatch, error, destroyed):
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))

    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit):
        command_line(main)
    assert bool(calls) == destroyed


@pytest.mark.parametrize("recipe", [train_tokenizer.RECIPES["v1"], train_ar.RECIPES["XL"]])
def test_large_recipes_save_and_draw_rarely(recipe):
    assert recipe["save_every"] >= 5000
    assert recipe["picture_every"] >= 5000
