"""The policy losses on CPU: blocks, threads and layouts change no bit; the raw ops check their settings."""

import pytest
import torch

import fastrlhf
from _support import sequence_cases as cases
from _support.ppo_cases import batch
from fastrlhf.ops import _backend, _checks, _policy

ops = torch.ops.fastrlhf
pytestmark = pytest.mark.skipif(
    bool(_backend.unavailable_reason("ppo_loss", "cpu")), reason="the C++ extension is not built"
)
LENGTHS = (1500, 0, 1, 1023, 40_000, 700, 3)
PLAIN = (0.8, 1.2, _checks.UNLIMITED, 0.2, 0.5, 0.01)  # low ... entropy_coef
DEFAULTS = [0.0, 0.0, 1.0, 1.05, 0.0, 2.0, 1.0, 0.0, 0.0, 0.0, _checks.UNLIMITED, 0.0]
SETTINGS = {
    "ppo": {"clip": (0.2, 0.3), "dual_clip": 1.5, "aggregation": "seq-mean-token-sum"},
    "cispo": {"clip": (None, 0.3), "value_aggregation": "seq-mean-token-mean"},
    "gspo": {"aggregation": "seq-mean-token-mean", "rollout_level": "sequence_mean"},
    "sapo": {"aggregation": "token-sum", "kl_estimator": "k1", "rollout_level": "sequence"},
    "reinforce": {"aggregation": "seq-mean-token-sum-norm", "length": 9.0},
}


@pytest.fixture(scope="module")
def tokens():
    """fp32 tokens of sequences that begin inside of blocks of 1024, and cu_seqlens."""
    found = batch((sum(LENGTHS),), torch.float32)
    found |= {
        "ref_logprob": found["old_logprob"] + 0.1,
        "rollout_logprob": found["old_logprob"] - 0.1,
    }
    ends = torch.tensor((0, *LENGTHS)).cumsum(0)
    return found, ends.to(torch.int32)


def call(objective, tensors, **where):
    """[loss, gradients, metrics] of ppo_loss with settings of every kind."""
    given = dict(tensors)
    leaves = [given[n].clone().requires_grad_() for n in ("logprob", "values", "entropy")]
    given |= dict(zip(("logprob", "values", "entropy"), leaves, strict=True))
    more = {
        "objective": objective,
        "kl_coef": 0.3,
        "entropy_coef": 0.1,
        "rollout_bounds": (0.5, 1.1),
    }
    out = fastrlhf.ppo_loss(**given, **more, **SETTINGS[objective], **where, backend="cpu")
    return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves), *out.metrics.values()]


def same(found, expected):
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("objective", SETTINGS)
def test_threads_and_layouts_change_no_bit(tokens, objective, restore_threads):
    tensors, cu_seqlens = tokens
    mask = cases.random_mask((sum(LENGTHS),), 1)
    torch.set_num_threads(1)
    expected = call(objective, tensors, cu_seqlens=cu_seqlens, mask=mask)
    assert all(x.isfinite().all() for x in expected)
    torch.set_num_threads(3)
    same(call(objective, tensors, cu_seqlens=cu_seqlens, mask=mask), expected)
    square = {name: x[:4800].view(4, 1200) for name, x in tensors.items()}
    packed = {name: x.reshape(-1) for name, x in square.items()}
    ends = torch.arange(0, 4801, 1200, dtype=torch.int32)
    same(call(objective, packed, cu_seqlens=ends), call(objective, square))


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_plain_ppo_is_the_same_with_options(tokens):
    tensors = [*tokens[0].values()][:7]
    mask = cases.random_mask(tensors[0].shape, 1)
    plain = ops.ppo_loss_fwd(*tensors, mask, None, None, *PLAIN, None, True)
    for more in (None, [], [None] * 4):
        same(ops.ppo_loss_fwd(*tensors, mask, None, more, *PLAIN, DEFAULTS, True), plain)
    same(ops.ppo_loss_fwd(*tensors, mask, None, [], *PLAIN, [], True), plain)
    sequence = torch.tensor(
        [[1.0], [1.0], [7.0], [7.0], [7.0]]
    )  # of weight 1: sums round otherwise
    whole = [None, None, torch.tensor([0, mask.numel()], dtype=torch.int32), sequence]
    loss, metrics, grads = ops.ppo_loss_fwd(*tensors, mask, None, whole, *PLAIN, DEFAULTS, True)
    found = (loss, metrics[:14], grads)  # the others are those of rollout weights, here 1
    for a, b in zip(found, (plain[0], plain[1][:14], plain[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_sums_of_sequences_do_not_see_masked_tokens(tokens):
    """Bitwise those of the compacted tokens: each is added in order, in fp64."""
    tensors, cu_seqlens = tokens
    x, y = tensors["logprob"], tensors["old_logprob"]
    mask = cases.random_mask(x.shape, 1)
    count, total = ops.sequence_sums(x, y, mask, cu_seqlens)
    ends = torch.cat((torch.zeros(1), mask.cumsum(0)))[cu_seqlens.long()].to(torch.int32)
    assert torch.equal(count, ends.diff().double())
    same(ops.sequence_sums(x[mask], y[mask], None, ends), (count, total))
    poisoned = x.masked_fill(~mask, torch.nan)
    same(ops.sequence_sums(poisoned, y, mask, cu_seqlens), (count, total))
    exact = sum(a - b for a, b in zip(x[:1500].tolist(), y[:1500].tolist(), strict=True))
    assert ops.sequence_sums(x, y, None, cu_seqlens)[1, 0].item() == exact
    padded = x[:4800].view(4, 1200).double()
    rows = torch.arange(0, 4801, 1200, dtype=torch.int32)
    torch.testing.assert_close(
        ops.sequence_sums(padded, None, None, rows)[1], padded.sum(1), rtol=1e-12, atol=1e-12
    )


def test_a_row_finds_its_sequence(tokens):
    """From FIRST_ROW on, also where sequences are empty."""
    tensors, cu_seqlens = tokens
    sequences = torch.ones(5, len(LENGTHS))
    sequences[_policy.Sequence.WEIGHT] = torch.arange(1.0, 8.0)
    of_row = torch.arange(1.0, 8.0).repeat_interleave(torch.tensor(LENGTHS))
    first, logits = 2520, torch.zeros(9, 5)
    targets, more = torch.zeros(9, dtype=torch.int64), [None, None, cu_seqlens, sequences]
    options = [1.0, *DEFAULTS[1:-1], float(first)]
    loss, *_ = ops.token_loss_fwd(
        logits, targets, None, None, more, *PLAIN[:3], options, None, 1.0, 0.0, None, None, 1.0
    )
    torch.testing.assert_close(loss, of_row[first : first + 9] * torch.log(torch.tensor(5.0)))
    assert of_row[first : first + 9].unique().numel() == 2


def test_raw_ops_refuse_settings_that_do_not_fit(tokens):
    tensors = [x[:9] for x in tokens[0].values()][:7]
    cu, rows = torch.tensor([0, 4, 9], dtype=torch.int32), torch.ones(5, 2)

    def refused(match, more=None, options=DEFAULTS, tensors=tensors, factors=None):
        with pytest.raises(RuntimeError, match=match):
            ops.ppo_loss_fwd(*tensors, None, factors, more, *PLAIN, options, True)

    change = lambda place, value: [*DEFAULTS[:place], value, *DEFAULTS[place + 1 :]]  # noqa: E731
    refused("more needs options", [None] * 4, [])
    refused("options must have 12 numbers, got 11", options=DEFAULTS[1:])
    refused("more must have 4 tensors, got 3", [None] * 3)
    for place in (0, 1, 5, 6, 7, 8):
        refused(rf"options\[{place}\] must be a whole number", options=change(place, 7.0))
        refused(rf"options\[{place}\] must be a whole number", options=change(place, 0.5))
    refused("first_row must be >= 0", options=change(11, -1.0))
    refused("expected 9 tokens, got 8", [tensors[0][:8], None, None, None])
    refused("float64 only with float64", [tensors[0].double(), None, None, None])
    refused("must come together", [None, None, cu, None])
    refused("cu_seqlens must be int32", [None, None, cu.long(), rows])
    refused(r"sequences must be \[5, 2\]", [None, None, cu, rows[:4]])
    refused(r"sequences must be \[5, 2\]", [None, None, cu, rows.double()])
    refused("a sequence's ratio needs sequences", options=change(1, 1.0))
    refused("a rollout correction needs", options=change(8, 2.0))
    refused(r"factors must be \[2\]", factors=torch.ones(3))
    refused("may only be absent with options", None, None, [tensors[0], None, *tensors[2:]])
