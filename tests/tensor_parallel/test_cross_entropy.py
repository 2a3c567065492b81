"""Cross-entropy over a cut vocabulary against F.cross_entropy on whole logits: loss and gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import pool
from longspan import parallel_state
from longspan.tensor_parallel import linear_cross_entropy, vocab_parallel_cross_entropy
from longspan.tensor_parallel.cross_entropy import plain_cross_entropy

WORLDS = [1, 2, 4]
T, H, WIDTH = 13, 6, 24  # tokens, hidden, columns of all ranks


def random(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=g, dtype=torch.float64)


def labels(shape, vocab, masked=True):
    ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(9))
    flat = ids.view(-1)
    flat[0], flat[1] = 0, vocab - 1
    if masked:
        flat[2::3] = -100
    return ids


def own(x, dim):
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- vocab_parallel_cross_entropy ---------------------------------------------------------


def cut_logits():
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    for shape in ((), (T,), (4, 3), (2, 3, 2)):
        for smoothing in (0.0, 0.1, 0.7):
            for scale in (1.0, 300.0):  # exp(300) is no number
                logits = random(*shape, WIDTH, scale=scale).requires_grad_()
                target = labels(shape, WIDTH) if shape else torch.tensor(WIDTH - 1)
                want = plain_cross_entropy(logits.view(-1, WIDTH), target.view(-1), smoothing).view(shape)
                dloss = random(*shape, seed=1)
                want.backward(dloss)
                x = own(logits.detach(), -1).requires_grad_()
                before = x.detach().clone()
                loss = vocab_parallel_cross_entropy(x, target, smoothing)
                assert loss.shape == shape
                assert loss.dtype == torch.float64
                close(loss, want)
                loss.backward(dloss)
                close(x.grad, own(logits.grad, -1))
                assert torch.equal(x, before)  # the logits stay as they were
                assert (loss[target == -100] == 0).all()
                assert (x.grad[target == -100] == 0).all()


@pytest.mark.parametrize("world", WORLDS)
def test_equals_cross_entropy(world):
    pool.run(world, cut_logits)


def padded_and_smoothed(vocab):
    """Padding columns (-inf) are no classes: the smoothed loss of the real vocabulary, whatever a rank holds of it."""
    logits = random(T, WIDTH)
    logits[:, vocab:] = float("-inf")
    target, dloss = labels((T,), vocab), random(T, seed=1)
    real = logits[:, :vocab].clone().requires_grad_()
    want = plain_cross_entropy(real, target, 0.1)
    want.backward(dloss)
    x = own(logits, -1).requires_grad_()
    loss = vocab_parallel_cross_entropy(x, target, 0.1, dist.group.WORLD)
    close(loss, want)
    loss.backward(dloss)
    close(x.grad, own(F.pad(real.grad, (0, WIDTH - vocab)), -1))


@pytest.mark.parametrize("world", WORLDS)
def test_smoothing_is_over_the_real_vocabulary_at_every_size(world):
    pool.run(world, padded_and_smoothed, 17)  # of 4 ranks the last holds padding alone


def megatron_smoothing(alpha):
    """Megatron-LM's loss at tp 1, as its source computes it: of the log-probabilities' mean over all columns."""
    logits, target = random(T, WIDTH), labels((T,), WIDTH, masked=False)
    logs = logits.log_softmax(-1)
    mass = alpha * WIDTH / (WIDTH - 1)
    theirs = (1 - mass) * -logs.gather(1, target[:, None])[:, 0] - mass * logs.mean(-1)
    ours = vocab_parallel_cross_entropy(logits, target, alpha * WIDTH / (WIDTH - 1), dist.group.WORLD)
    close(ours, theirs)
    plain = vocab_parallel_cross_entropy(logits, target, alpha, dist.group.WORLD)
    assert (plain - theirs).abs().max() > 1e-3


def test_the_factor_that_gives_megatrons_smoothing():
    pool.run(1, megatron_smoothing, 0.1)


def edges():
    group = dist.group.WORLD
    # nothing valid: zero and zero gradients, not NaN, even where the incoming gradient is NaN
    x = random(4, WIDTH // 2).requires_grad_()
    loss = vocab_parallel_cross_entropy(x, torch.full((4,), -100), group=group)
    assert (loss == 0).all()
    loss.backward(torch.full((4,), float("nan"), dtype=torch.float64))
    assert (x.grad == 0).all()
    # no tokens at all
    x = random(0, WIDTH // 2).requires_grad_()
    loss = vocab_parallel_cross_entropy(x, torch.empty(0, dtype=torch.long), group=group)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert x.grad.shape == x.shape
    # the sum's gradient is an expanded tensor; views of a transposed layout come as [s, b]
    x = random(3, 4, WIDTH // 2).transpose(0, 1).requires_grad_()
    vocab_parallel_cross_entropy(x, labels((4, 3), WIDTH), group=group).sum().backward()
    assert x.grad.shape == (4, 3, WIDTH // 2)
    # an id nobody holds is an error here as it is in F.cross_entropy, not a loss
    for wrong in (WIDTH, -1):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            vocab_parallel_cross_entropy(random(2, WIDTH // 2), torch.tensor([0, wrong]), group=group)


def test_edges():
    pool.run(2, edges)


def halves():
    """bf16 logits: the loss of exactly these numbers in float32, the gradient rounded once."""
    group = dist.group.WORLD
    logits = random(T, WIDTH, scale=4.0).bfloat16()
    target = labels((T,), WIDTH)
    for smoothing in (0.0, 0.1):
        exact = logits.double().requires_grad_()
        want = plain_cross_entropy(exact, target, smoothing)
        want.sum().backward()
        x = own(logits, -1).requires_grad_()
        loss = vocab_parallel_cross_entropy(x, target, smoothing, group)
        assert loss.dtype == torch.float32
        close(loss.double(), want, 1e-5)
        loss.sum().backward()
        assert x.grad.dtype == torch.bfloat16
        torch.testing.assert_close(x.grad.double(), own(exact.grad, -1), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_bf16_logits(world):
    pool.run(world, halves)


# --- linear_cross_entropy -----------------------------------------------------------------


def fused(cases):
    group, n = dist.group.WORLD, dist.get_world_size()
    for vocab, chunk in cases:
        hidden, weight = random(T, H, seed=1).requires_grad_(), random(WIDTH, H, seed=2).requires_grad_()
        target, dloss = labels((T,), vocab), random(T, seed=3)
        want = plain_cross_entropy(F.linear(hidden, weight)[:, :vocab], target)
        want.backward(dloss)
        h, w = hidden.detach().clone().requires_grad_(), own(weight.detach(), 0).requires_grad_()
        loss = linear_cross_entropy(h, w, target, vocab_size=vocab, group=group, chunk=chunk)
        assert loss.shape == (T,)
        close(loss, want)
        loss.backward(dloss)
        close(w.grad, own(weight.grad, 0))
        whole = h.grad.clone()  # this rank's part of the gradient; the caller sums
        dist.all_reduce(whole, group=group)
        close(whole, hidden.grad)
        first = dist.get_rank(group) * (WIDTH // n)
        padding = torch.arange(first, first + WIDTH // n) >= vocab
        assert (w.grad[padding] == 0).all()
        for weights in (
            dloss,
            torch.ones(T, dtype=torch.float64),
        ):  # a frozen weight leaves the rest as it is
            one, other = (h.detach().clone().requires_grad_() for _ in range(2))
            for x, used in ((one, w), (other, w.detach())):
                loss = linear_cross_entropy(x, used, target, vocab_size=vocab, group=group, chunk=chunk)
                (loss * weights).sum().backward()
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("world", WORLDS)
def test_linear_cross_entropy(world):
    """Chunks that do and do not divide the tokens; padding columns; at vocab 11 and tp 2, 4 ranks with nothing else."""
    pool.run(world, fused, [(vocab, chunk) for vocab in (24, 19, 11, 3) for chunk in (1, 4, 13, 100, None)])


def fused_edges():
    group = dist.group.WORLD
    w = random(WIDTH // 2, H, seed=2).requires_grad_()
    h = random(T, H, seed=1).requires_grad_()
    loss = linear_cross_entropy(h, w, torch.full((T,), -100), vocab_size=20, group=group, chunk=5)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (h.grad == 0).all()
    assert (w.grad == 0).all()
    h = random(0, H).requires_grad_()
    loss = linear_cross_entropy(h, w, torch.empty(0, dtype=torch.long), vocab_size=20, group=group)
    loss.sum().backward()
    assert h.grad.shape == (0, H)
    for wrong in (20, 24, -1):  # a padding column, beyond all columns, negative
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            linear_cross_entropy(
                random(2, H), w.detach(), torch.tensor([0, wrong]), vocab_size=20, group=group
            )


def test_linear_cross_entropy_edges():
    pool.run(2, fused_edges)


def fused_halves():
    """Errors against fp64, of this and of plain bf16 linear + float32 cross-entropy on one process."""
    group, t, h, vocab = dist.group.WORLD, 64, 32, 100
    hidden, weight = random(t, h, seed=1).bfloat16(), random(128, h, seed=2).bfloat16()
    target = labels((t,), vocab)

    def plain(dtype):
        x, w = (a.to(dtype, copy=True).requires_grad_() for a in (hidden, weight))
        logits = F.linear(x, w)[:, :vocab]
        loss = plain_cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), target)
        loss.sum().backward()
        return [a.detach().double() for a in (loss, x.grad, w.grad)]

    exact, one = plain(torch.float64), plain(torch.bfloat16)
    x, w = hidden.clone().requires_grad_(), own(weight, 0).requires_grad_()
    loss = linear_cross_entropy(x, w, target, vocab_size=vocab, group=group, chunk=24)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    whole = x.grad.float()
    dist.all_reduce(whole, group=group)
    got = [loss.detach().double(), whole.double(), w.grad.double()]
    exact[2], one[2] = own(exact[2], 0), own(one[2], 0)
    return [((g - e).abs().max() / (p - e).abs().max()).item() for g, p, e in zip(got, one, exact)]


@pytest.mark.parametrize("world", [1, 2])
def test_linear_cross_entropy_bf16_is_at_most_twice_as_far_off(world):
    for ratios in pool.run(world, fused_halves):
        assert max(ratios) <= 2.0, ratios


def scaled_by_tokens():
    """The gradient of a mean over so many tokens that 1 / tokens lies between two bfloat16 numbers."""
    group = dist.group.WORLD
    for tokens in (1020, 65281):
        x, w = random(64, 32, seed=1).bfloat16(), random(256, 32, seed=2).bfloat16()
        target = labels((64,), 256)
        norms = []
        for dtype in (torch.float64, torch.bfloat16):
            hidden = x.to(dtype).requires_grad_()
            loss = linear_cross_entropy(hidden, w.to(dtype), target, vocab_size=256, group=group)
            (loss.sum() / tokens).backward()
            norms.append(hidden.grad.double().norm())
        assert abs(norms[1] / norms[0] - 1) < 2e-3, tokens


def test_the_mean_over_tokens_is_not_rounded_to_bfloat16():
    """It once was, before it scaled every gradient of the step: off by up to 0.4 %."""
    pool.run(1, scaled_by_tokens)
