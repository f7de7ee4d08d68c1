"""Exercise 4: guidance, and sampling with a KV cache."""

import math
import types

import torch
from torch import Tensor

import dar
from course.tests.support import check_close, check_equal, check_refused

NO_CLASS = 5
LABELS = torch.tensor([0, 3, 1])


class StandInLlama:
    """A Llama of 12 tokens, 8 codes and 5 classes, whose logits are a row of a table, which the
    class and all tokens so far choose. A number 100 + c in its cache is class c."""

    config = types.SimpleNamespace(num_tokens=12, num_classes=NO_CLASS, vocab_size=8, dropout=0.0)
    device = torch.device("cpu")

    def __init__(self):
        self.table = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
        self.reads = []  # [rows, positions] of each call

    def new_caches(self, batch: int, length: int) -> list[Tensor]:
        return [torch.full((batch, length), -1)]

    def embed(self, codes: Tensor, labels: Tensor) -> Tensor:
        return torch.cat((100 + labels[:, None], codes), 1)

    def tok_embeddings(self, codes: Tensor) -> Tensor:
        return codes

    def next_logits(self, x: Tensor, position: Tensor, caches: list[Tensor]) -> Tensor:
        rows, count = x.shape
        assert rows == len(caches[0]), f"{rows} rows are read, the caches have {len(caches[0])}"
        assert count == len(position), f"{count} tokens are read at {len(position)} positions"
        self.reads.append([rows, position.tolist()])
        caches[0][:, position] = x
        read = caches[0][:, : int(position[-1]) + 1]
        assert (read >= 0).all(), f"a position before {int(position[-1])} was never read"
        return self.logits(read)

    def logits(self, read: Tensor) -> Tensor:
        weight = torch.arange(1, read.shape[1] + 1) ** 2
        return self.table[(read * weight).sum(1) % 64]

    def guided(self, label: int, codes: list[int], scale: float) -> Tensor:
        """The logits [V] of the token after codes, computed anew from all of them."""
        with_class = self.logits(torch.tensor([[100 + label, *codes]]))[0]
        without = self.logits(torch.tensor([[100 + NO_CLASS, *codes]]))[0]
        return without + scale * (with_class - without)

    def likeliest(self, label: int, start: float, end: float, prefix: list[int]) -> list[int]:
        codes = list(prefix)
        while len(codes) < 12:
            scale = start + (end - start) * len(codes) / 11
            codes.append(int(self.guided(label, codes, scale).argmax()))
        return codes


def draw(llama, labels=LABELS, group_size=4, **settings) -> Tensor:
    return torch.cat(list(dar.generate_groups(llama, labels, group_size, **settings)), 1)


def test_a_cache_keeps_what_it_is_given():
    k, v = torch.randn(2, 2, 3, 5, 64)
    cache = dar.KVCache(torch.zeros(2, 3, 8, 64), torch.zeros(2, 3, 8, 64))
    memory = cache.k
    for position in (torch.arange(2), torch.tensor([2]), torch.arange(3, 5)):
        keys, values = cache.update(k[:, :, position], v[:, :, position], position)
    check_close("keys 0 to 4", keys[:, :, :5], k)
    check_close("values 0 to 4", values[:, :, :5], v)
    check_close("keys that were never written", keys[:, :, 5:], torch.zeros(2, 3, 3, 64))
    assert cache.k is memory, "the cache has a new tensor; it should be written to in place"


def test_the_guidance_scale_is_constant_or_a_line():
    check_close("one number", torch.tensor(dar.guidance_schedule(1.5, 4)), [1.5] * 4)
    line = torch.tensor(dar.guidance_schedule((1.0, 8.0), 8))
    check_close("from 1 to 8 in 8 tokens", line, [1, 2, 3, 4, 5, 6, 7, 8])
    check_close("falling", torch.tensor(dar.guidance_schedule([9.0, 1.0], 3)), [9, 5, 1])
    check_close("one token", torch.tensor(dar.guidance_schedule((1.1, 8.0), 1)), [1.1])


def test_there_may_be_no_guidance():
    for cfg in (None, 1, (1.0, 1.0)):
        assert dar.guidance_schedule(cfg, 8) is None, f"cfg {cfg} needs no guidance"


def test_guidance_of_another_form_is_refused():
    for cfg in ("4", (1.0, 2.0, 3.0), math.nan, (1.0, math.inf), (None, 4.0)):
        check_refused(f"cfg {cfg}", "guidance", dar.guidance_schedule, cfg, 8)


def test_guide_exaggerates_what_the_class_changes():
    logits = torch.tensor([[3.0, 1.0], [5.0, 0.0], [1.0, 1.0], [5.0, 2.0]])  # two pictures
    check_close("scale 0: without class", dar.guide(logits, 0.0), logits[2:])
    check_close("scale 1: with class", dar.guide(logits, 1.0), logits[:2])
    check_close("scale 3", dar.guide(logits, 3.0), [[7.0, 1.0], [5.0, -4.0]])


def test_the_temperature_divides():
    logits = torch.tensor([[1.0, 3.0]])
    check_close("temperature 2", dar.filter_logits(logits, 2.0), [[0.5, 1.5]])


def test_top_k_keeps_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = dar.filter_logits(logits, 1.0, 2).isfinite()
    check_equal("top_k = 2", kept[0], [False, True, False, True])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.12, 0.5, 0.18, 0.2]]).log()
    for top_p, expected in ((0.01, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (0.89, 4)):
        kept = dar.filter_logits(logits, 1.0, 0, top_p).isfinite()
        check_equal(f"top_p = {top_p}, how many stay", int(kept.sum()), expected)
        assert kept[0, 1], "the likeliest token has to stay"


def test_temperature_comes_first_and_top_p_last():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    kept = dar.filter_logits(logits, 2.0, 0, 0.55).isfinite()  # at 2 the first has 0.47
    check_equal("temperature before top_p", int(kept.sum()), 2)
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = dar.filter_logits(logits, 1.0, 2, 0.5).isfinite()  # of two the first has 0.57
    check_equal("top_k before top_p", int(kept.sum()), 1)


def test_greedy_tokens_are_the_likeliest_of_the_guided_logits():
    llama = StandInLlama()
    for cfg, start, end in ((None, 1, 1), (3.0, 3, 3), ((1.0, 6.0), 1, 6), ((4.0, 0.5), 4, 0.5)):
        codes = draw(llama, cfg=cfg, greedy=True)
        expected = [llama.likeliest(label, start, end, []) for label in LABELS.tolist()]
        check_equal(f"guidance {cfg}", codes, expected)


def test_each_token_is_read_once_and_class_and_prefix_together():
    for cfg, rows in ((None, 3), (2.0, 6)):
        llama = StandInLlama()
        draw(llama, cfg=cfg, greedy=True, prefix=torch.tensor([7, 0, 2, 5, 1]))
        expected = [[rows, [0, 1, 2, 3, 4, 5]]] + [[rows, [i]] for i in range(6, 12)]
        check_equal(f"guidance {cfg}: [rows, positions] of each call", llama.reads, expected)


def test_a_group_is_given_as_soon_as_it_is_full():
    llama = StandInLlama()
    sizes = []
    calls = []
    for group in dar.generate_groups(llama, LABELS, 5, greedy=True):
        sizes.append(group.shape[1])
        calls.append(len(llama.reads))
    check_equal("sizes of groups of 5 of 12 tokens", sizes, [5, 5, 2])
    check_equal("calls of the network before each group", calls, [5, 10, 12])


def test_a_prefix_is_kept_and_goes_on_as_it_would():
    llama = StandInLlama()
    prefix = torch.tensor([[1, 2, 3], [7, 7, 7], [0, 5, 0]])
    codes = draw(llama, cfg=(1.0, 6.0), greedy=True, prefix=prefix)
    pictures = zip(LABELS.tolist(), prefix.tolist())
    expected = [llama.likeliest(label, 1, 6, given) for label, given in pictures]
    check_equal("three given tokens", codes, expected)
    check_equal("all tokens given", draw(llama, greedy=True, prefix=codes), codes)


def test_noise_belongs_to_its_token_and_to_its_picture():
    llama = StandInLlama()
    settings = {"temperature": 3.0, "cfg": 2.0}
    codes = draw(llama, seeds=[4, 9, 2], **settings)
    again = draw(llama, seeds=[4, 9, 2], prefix=codes[:, :5], **settings)
    check_equal("with its own beginning as prefix", again, codes)
    alone = draw(llama, LABELS[1:2], seeds=[9], **settings)
    check_equal("the second picture alone", alone, codes[1:2])
    other = draw(llama, seeds=[5, 8, 3], **settings)
    assert not torch.equal(other, codes), "other seeds give the same tokens"


def test_tokens_are_drawn_from_the_guided_and_filtered_softmax():
    llama = StandInLlama()
    count = 4000
    labels = torch.full((count,), 2)
    settings = {"temperature": 1.5, "top_k": 5}
    codes = draw(llama, labels, num_tokens=1, cfg=1.5, seeds=0, **settings)
    logits = llama.guided(2, [], 1.5) / 1.5
    fifth = logits.sort(descending=True).values[4]
    expected = logits.masked_fill(logits < fifth, -math.inf).softmax(-1)
    share = codes[:, 0].bincount(minlength=8) / count
    check_close("the share of each token in 4000 draws", share, expected, 0.03)
