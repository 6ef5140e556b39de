"""Tests of diffusevae.py against independent truth: closed forms, numerical integration, textbook formulas, files.

    python -m pytest test_diffusevae.py

Offline and on the CPU, but for one test that wants CUDA. "5 SE" in a comment is five standard errors of a Monte Carlo
mean: a right program misses that once in two million draws, and the seeds are fixed besides.
"""
import collections, copy, csv, inspect, itertools, json, math, os, re, shutil, subprocess, sys, types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributions as D

import diffusevae
from diffusevae import (VAE, Config, DiffuseVAE, GaussianDiffusion, GaussianMixture, UNet, new_state, randn,
                        timesteps_for, train_ddpm, train_vae)

torch.set_num_threads(1)    # networks this small are slower on two threads, and far slower beside other work
SPACINGS = ("uniform", "trailing", "quad")
TINY = dict(image_size=8, unet_width=4, unet_mults=(1, 2), res_blocks=1, heads=1, vae_width=2, z_dim=2, vae_steps=4,
            ddpm_steps=4, batch_size=4, vae_batch=4, steps=2, num_samples=4, device="cpu")


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, from one seed, and the big `shapes` are few."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    draw = diffusevae.draw_shapes
    few = lambda n, size, seed: draw(n // (500 if n > 5000 else 1), size, seed)
    monkeypatch.setattr(diffusevae, "draw_shapes", few)


def double(*shape):
    """Standard-normal float64."""
    return torch.randn(*shape, dtype=torch.float64)


def perturbed(net, scale=0.2):
    """The network with noise on every parameter, so that nothing is zero as initialised."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))
    return net


def exact(d):
    """The diffusion with float64 tables, for tests at 1e-9: those of float32 are rounded at 6e-8."""
    d.sqrt_alpha_bar, d.sqrt_one_minus_alpha_bar = d.alpha_bar.sqrt(), (1 - d.alpha_bar).sqrt()
    return d


def each_seeded(*seeds):
    """A list of generators, one for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def jump(T, steps, spacing="quad"):
    """(t, s) of each sampling step, as ints, from noise to image."""
    kept = timesteps_for(T, steps, spacing).tolist()
    return list(zip(kept[::-1], [*kept[-2::-1], -1]))


# --------------------------------------------------------------------------------------------------------
# VAE
# --------------------------------------------------------------------------------------------------------


def test_vae_kl():
    """The KL term is that of torch.distributions, and the mean of log q(z) - log p(z) over draws of z."""
    vae, x = perturbed(VAE(8, 3, 5, 4)), torch.rand(4, 3, 8, 8) * 2 - 1
    kl = vae.loss(x)[2].item()
    mu, logvar = (v.detach().double() for v in vae.encode(x))
    q, p = D.Normal(mu, (logvar / 2).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    assert kl == pytest.approx(D.kl_divergence(q, p).sum(1).mean().item(), rel=1e-5)    # float32 sums
    z = q.sample((100_000,))
    draws = (q.log_prob(z) - p.log_prob(z)).sum(2).mean(1)
    assert abs(draws.mean() - kl) < 5 * draws.std() / len(draws)**0.5    # 5 SE


def test_vae_squared_error():
    """The squared error is that of images in [0, 1], summed over pixels, averaged over images; loss = error + w KL."""
    vae, x, x_hat = VAE(8, 3, 2, 2), torch.rand(5, 3, 8, 8) * 2 - 1, torch.rand(5, 3, 8, 8) * 2 - 1
    vae.decode = lambda z: x_hat
    loss, error, kl = vae.loss(x, 0.3)
    a, b = ((v.double().numpy() + 1) / 2 for v in (x, x_hat))
    assert error.item() == pytest.approx(((a - b)**2).sum((1, 2, 3)).mean(), rel=1e-5)
    assert loss.item() == pytest.approx(error.item() + 0.3 * kl.item(), rel=1e-5)
    vae.decode = lambda z: torch.ones(5, 3, 8, 8)
    assert vae.loss(-torch.ones(5, 3, 8, 8))[1].item() == 3 * 8 * 8    # black against white: 1 a pixel and channel


def test_vae_draws_z_from_q():
    """The z that the loss decodes has the mean and standard deviation that encode gives."""
    vae, seen, n = perturbed(VAE(8, 1, 3, 2)), [], 20_000
    decode = vae.decode
    vae.decode = lambda z: seen.append(z) or decode(z)
    x = torch.rand(1, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        vae.loss(x.expand(n, -1, -1, -1))
        mu, logvar = vae.encode(x)
    sd = (logvar[0] / 2).exp()
    assert ((seen[0].mean(0) - mu[0]).abs() < 5 * sd / n**0.5).all()    # 5 SE
    assert ((seen[0].std(0) / sd - 1).abs() < 5 / (2 * n)**0.5).all()    # 5 SE of a standard deviation


def test_vae_keeps_logvar_within_20():
    """An encoder far off has its logvar cut to -20 and 20, so that exp() of it and the loss stay finite."""
    vae, x = VAE(8, 3, 2, 2), torch.rand(4, 3, 8, 8) * 2 - 1
    mu, logvar = vae.encode(x)
    assert torch.equal(vae.encoder(x), torch.cat([mu, logvar], dim=1))    # otherwise they are the encoder's output
    with torch.no_grad():
        vae.encoder[-1].bias[2:] = torch.tensor([1000.0, -1000.0])
    mu, logvar = vae.encode(x)
    assert torch.equal(logvar, torch.tensor([[20.0, -20.0]]).expand(4, 2)) and vae.loss(x)[0].isfinite()


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("size", (8, 9, 16, 24, 32))
def test_vae_shapes(size, channels):
    """Images of any size and channels have codes of z_dim and come back in their shape, within [-1, 1]."""
    vae, x = VAE(size, channels, 7, 4), torch.rand(2, channels, size, size) * 2 - 1
    assert [v.shape for v in vae.encode(x)] == [(2, 7), (2, 7)]
    x_hat = vae.decode(100 * torch.randn(2, 7))
    assert x_hat.shape == x.shape and x_hat.abs().max() <= 1


# --------------------------------------------------------------------------------------------------------
# Diffusion: schedules and the forward process
# --------------------------------------------------------------------------------------------------------


def betas_of(d):
    """1 - a_t / a_{t-1}, numpy [T]."""
    a = d.alpha_bar.numpy()
    return 1 - a / np.concatenate([[1.0], a[:-1]])


def test_linear_schedule():
    """Linear betas have the asked ends and one difference."""
    linear = betas_of(GaussianDiffusion(1000))
    np.testing.assert_allclose(linear[[0, -1]], [1e-4, 0.02], rtol=1e-9)
    np.testing.assert_allclose(np.diff(linear), (0.02 - 1e-4) / 999, rtol=1e-6)    # a difference of rounded numbers


@pytest.mark.parametrize("T", (10, 1000))
def test_cosine_schedule(T):
    """a_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 * pi / 2)^2, betas up to 0.999 (2102.09672, eq. 17)."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2)**2 for t in range(T + 1)]
    a, expected = 1.0, []
    for before, after in zip(f, f[1:]):
        expected.append(a := a * (1 - min(0.999, 1 - after / before)))
    np.testing.assert_allclose(GaussianDiffusion(T, schedule="cosine").alpha_bar.numpy(), expected, rtol=1e-9)


def test_geometric_schedule():
    """Geometric betas run from 1e-4 to 0.05 at T = 1000, each a constant multiple of the one before."""
    geometric = betas_of(GaussianDiffusion(1000, schedule="geometric"))
    np.testing.assert_allclose(geometric[[0, -1]], [1e-4, 0.05], rtol=1e-9)    # 1 - a_t / a_s: 1e-16 in 1e-4
    np.testing.assert_allclose(geometric[1:] / geometric[:-1], 500**(1 / 999), rtol=1e-9)
    wide = betas_of(GaussianDiffusion(50, 0.01, 0.64, "geometric"))
    np.testing.assert_allclose(wide[[0, 49]], [0.01, 0.64], rtol=1e-9)


def test_default_betas_scale_with_T():
    """Without betas they are those of T = 1000 times 1000 / T, but 0.999 at most."""
    for schedule, end in (("linear", 0.02), ("geometric", 0.05)):
        for T in (1000, 100, 10):
            ends = np.minimum(0.999, np.array([1e-4, end]) * 1000 / T)
            np.testing.assert_allclose(betas_of(GaussianDiffusion(T, schedule=schedule))[[0, -1]], ends, rtol=1e-9)


def test_float32_tables():
    """What q_sample multiplies with is the float64 table rounded to float32, and no part of a checkpoint."""
    d = GaussianDiffusion(1000)
    assert torch.equal(d.sqrt_alpha_bar, d.alpha_bar.sqrt().float())
    assert torch.equal(d.sqrt_one_minus_alpha_bar, (1 - d.alpha_bar).sqrt().float())
    names = {"sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"}
    assert not d.state_dict() and {name for name, _ in d.named_buffers()} == names


@pytest.mark.parametrize("t", (-1, 20, 21))
def test_q_sample_refuses_other_timesteps(t):
    """t outside 0..T-1 is an error in every method, not the image at another t."""
    d, x = GaussianDiffusion(20, 0.01, 0.6, predict="v"), double(3, 2)
    for bad in (torch.full((3,), t), torch.tensor([0, t, 19])):
        for method in (d.q_sample, d.target, d.predict_x0):
            with pytest.raises((IndexError, RuntimeError)):
                method(x, bad, x)


@pytest.mark.parametrize("schedule", ("linear", "cosine", "geometric"))
def test_alpha_bar_ends(schedule):
    """alpha_bar is float64 and falls from nearly 1 to nearly 0; at t = -1, the clean image, it is exactly 1."""
    d = GaussianDiffusion(1000, 1e-4, 0.05, schedule)
    a = d.alpha_bar
    assert a.dtype == torch.float64 and a.shape == (1000,) and d.alpha_bar_at(-1) == 1
    assert (a.diff() < 0).all() and 0.999 < a[0] < 1 and 0 < a[999] < 0.01
    assert [d.alpha_bar_at(t) for t in (0, 7, 999)] == a[[0, 7, 999]].tolist()


def test_q_sample_is_many_single_steps():
    """One jump to x_t has the moments of the chain x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps."""
    T, n = 20, 100_000
    d, x, x0 = GaussianDiffusion(T, 0.01, 0.6), torch.full((n,), 0.7, dtype=torch.float64), 0.7
    for t, beta in enumerate(np.linspace(0.01, 0.6, T)):
        x = (1 - beta)**0.5 * x + beta**0.5 * double(n)
        if t in (0, 3, 9, T - 1):
            jumped = d.q_sample(torch.full((n,), x0, dtype=torch.float64), torch.full((n,), t), double(n))
            spread = x.std()
            assert abs(x.mean() - jumped.mean()) < 5 * spread * (2 / n)**0.5    # 5 SE of a difference
            assert abs(x.var() / jumped.var() - 1) < 5 * (4 / n)**0.5    # variance of a variance: 2 / n, twice


@pytest.mark.parametrize("shift", (0.0, 0.4))
@pytest.mark.parametrize("t, s", ((1, 0), (9, 8), (9, 3), (15, 1), (19, 0)))
def test_q_posterior_is_bayes(t, s, shift):
    """Mean and variance of q(x_s | x_t, x_0) are those of q(x_s | x_0) q(x_t | x_s), normalised on a fine grid."""
    betas, x0, x_t = np.linspace(0.01, 0.6, 20), 0.6, -0.3
    a_t, a_s = np.prod(1 - betas[:t + 1]), np.prod(1 - betas[:s + 1])
    y = np.linspace(-8, 8, 400_001)    # a density far below 1e-12 at its ends, smooth: the sum is exact to rounding
    b = 1 - a_t / a_s
    log = -(y - a_s**0.5 * x0)**2 / (2 * (1 - a_s)) - (x_t - shift - (1 - b)**0.5 * y)**2 / (2 * b)
    p = np.exp(log - log.max())
    p /= p.sum()
    mean, like = (p * y).sum(), torch.full((1, 1), x_t, dtype=torch.float64)
    got = GaussianDiffusion(20, 0.01, 0.6).q_posterior(like * 0 + x0, like, t, s, like * 0 + shift)
    assert got[0].item() == pytest.approx(mean + shift, abs=1e-9)
    assert got[1] == pytest.approx((p * (y - mean)**2).sum(), rel=1e-8)


def test_q_posterior_ends():
    """s = -1 is x_0 itself, with no variance and no shift; s is t - 1 by default."""
    d, x0, x_t, shift = GaussianDiffusion(20, 0.01, 0.6), double(3, 2), double(3, 2), double(3, 2)
    for t in (0, 7):
        mean, variance = d.q_posterior(x0, x_t, t, -1, shift)
        assert torch.allclose(mean, x0, atol=1e-14) and variance == 0
    for t in (0, 4, 19):
        (mean, variance), (one, its) = d.q_posterior(x0, x_t, t, shift=shift), d.q_posterior(x0, x_t, t, t - 1, shift)
        assert torch.equal(mean, one) and variance == its


@pytest.mark.parametrize("predict", ("eps", "v"))
def test_target_round_trip(predict):
    """From the true target predict_x0 finds x_0 and eps again; v is sqrt(a) eps - sqrt(1 - a) x_0."""
    d, x0, eps, shift = exact(GaussianDiffusion(1000, predict=predict)), double(4, 6), double(4, 6), double(4, 6)
    t = torch.tensor([0, 10, 500, 999])
    target, a = d.target(x0, t, eps), d.alpha_bar[t, None]
    assert torch.allclose(target, eps if predict == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0, atol=1e-15)
    found = d.predict_x0(d.q_sample(x0, t, eps, shift), t, target, shift)
    # 1e-16 of rounding is divided by sqrt(a_999) = 0.006
    assert torch.allclose(found[0], x0, atol=1e-12) and torch.allclose(found[1], eps, atol=1e-12)


# --------------------------------------------------------------------------------------------------------
# Diffusion: sampling
# --------------------------------------------------------------------------------------------------------


def wavy(x, t):
    """Some smooth network, of no special form."""
    return torch.tanh(1.3 * x + 0.2) + 0.1 * torch.sin(t.to(x).view(-1, *[1] * (x.dim() - 1)))


def test_formulation_2_is_formulation_1_shifted():
    """With a network that sees x_t - shift: x_t and means move by the shift, the clean image and the noise do not."""
    d, x0, noise, shift = GaussianDiffusion(50, 2e-3, 0.4), double(3, 4), double(3, 4), double(3, 4)
    t, net = torch.tensor([0, 20, 49]), lambda x, t: wavy(x - shift, t)
    near = lambda a, b: torch.allclose(a, b, rtol=1e-9, atol=1e-10)    # (y + shift) - shift rounds; steps add that up
    plain = d.q_sample(x0, t, noise)
    assert near(d.q_sample(x0, t, noise, shift), plain + shift)
    for i, s in ((0, -1), (20, 19), (20, 3), (49, -1)):
        one, two = d.q_posterior(x0, plain, i, s), d.q_posterior(x0, plain + shift, i, s, shift)
        assert near(two[0], one[0] + (shift if s >= 0 else 0)) and one[1] == two[1]
    for steps, eta, clip in ((1, 0.0, True), (7, 0.0, False), (10, 0.5, True), (50, 1.0, True), (50, 1.0, False)):
        one, two = (d.sample(f, noise, steps, eta, shift=by, clip=clip, generator=torch.Generator().manual_seed(3))
                    for f, by in ((wavy, 0), (net, shift)))
        assert near(one, two), (steps, eta, clip)
    assert near(d.invert(wavy, x0, 20, clip=False), d.invert(net, x0, 20, shift=shift, clip=False))


@pytest.mark.parametrize("predict", ("eps", "v"))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", (1, 2, 7, 10, 60, 100))
def test_ddim_with_true_eps_returns_x0(steps, spacing, predict):
    """An oracle that knows x_0 leads to x_0 from any noise; at any eta, for the last step adds no noise."""
    d, x0, shift = GaussianDiffusion(100, 1e-3, 0.2, predict=predict), double(2, 5), double(2, 5)

    def oracle(x, t):
        a = d.alpha_bar[t, None]
        eps = (x - shift - a.sqrt() * x0) / (1 - a).sqrt()
        return eps if predict == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0

    for eta, variance in ((0.0, "small"), (0.6, "small"), (1.0, "small"), (1.0, "large"))[:4 if steps == 100 else 3]:
        x = d.sample(oracle, double(2, 5), steps, eta, spacing=spacing, shift=shift, clip=False, variance=variance)
        assert torch.allclose(x, x0, atol=1e-10)    # rounding over sqrt(a_T) = 0.004


@pytest.mark.parametrize("clip", (False, True))
def test_eta_1_is_ancestral_sampling(clip):
    """All T steps at eta 1 are DDPM's algorithm 2, written with betas, from the same noise."""
    T, betas = 50, torch.linspace(2e-3, 0.4, 50, dtype=torch.float64)
    x = noise = double(2, 4)
    g = torch.Generator().manual_seed(5)
    got = GaussianDiffusion(T, 2e-3, 0.4).sample(wavy, noise, T, 1.0, clip=clip, generator=g)
    g, bar = torch.Generator().manual_seed(5), (1 - betas).cumprod(0)
    for t in reversed(range(T)):
        eps, beta, previous = wavy(x, torch.full((2,), t)), betas[t], bar[t - 1] if t else torch.tensor(1.0)
        mean = (x - beta / (1 - bar[t]).sqrt() * eps) / (1 - beta).sqrt()    # equation 11
        if clip:    # equation 7, with x_0 from equation 15
            x0 = ((x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()).clamp(-1, 1)
            mean = (previous.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - previous) * x) / (1 - bar[t])
        spread = beta * (1 - previous) / (1 - bar[t])
        x = mean + (spread.sqrt() * torch.randn(2, 4, dtype=torch.float64, generator=g) if t else 0)
    assert torch.allclose(got, x, rtol=1e-9, atol=1e-9)    # rounding, grown over 50 steps


def test_clip_recomputes_eps():
    """Two DDIM steps worked out by hand: x_0 is cut to 1, eps follows, the next step starts from there."""
    d, e, y, shift = GaussianDiffusion(100, 1e-3, 0.2), -0.5, 0.9, 0.3
    net = lambda x, t: torch.full_like(x, e)
    start = torch.full((1, 1), y, dtype=torch.float64)
    for clip in (True, False):
        (s, x, x0), (_, end, _) = d.trajectory(net, start, 2, shift=shift, clip=clip)
        a_t, a_s = d.alpha_bar[99].item(), d.alpha_bar[24].item()
        clean = (y - (1 - a_t)**0.5 * e) / a_t**0.5    # far above 1
        clean, eps = (1, (y - a_t**0.5) / (1 - a_t)**0.5) if clip else (clean, e)
        y_s = a_s**0.5 * clean + (1 - a_s)**0.5 * eps
        last = (y_s - (1 - a_s)**0.5 * e) / a_s**0.5
        assert (s, x0.item(), x.item()) == (24, pytest.approx(clean), pytest.approx(y_s + shift))
        assert end.item() == pytest.approx(min(1, last) if clip else last)


def gaussian_eps(d, mean, variance, shift=0):
    """The best eps at x_t for data N(mean, variance): (x_t - sqrt(a) mean) sqrt(1 - a) / (a variance + 1 - a)."""
    def net(x, t):
        a = d.alpha_bar[t].view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - shift - a.sqrt() * mean) / (a * variance + 1 - a)
    return net


@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("steps", (1, 3, 10, 1000))
def test_gaussian_data_recursion(steps, eta):
    """For data N(m, c) each step is linear: the samples have the mean and variance of the exact recursion."""
    m, c, n, T = 0.5, 0.04, 10_000, 1000
    d, spacing = GaussianDiffusion(T), "uniform" if steps == 3 else "trailing"
    bar = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, T)), 1.0)
    mean, var = 0.0, 1.0    # of the noise
    for t, s in jump(T, steps, spacing):
        a, b = bar[t], bar[s]
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        total = a * c + 1 - a    # variance of y_t, by which both best guesses are linear in y_t
        slope = b**0.5 * a**0.5 * c / total + (1 - b - sigma2)**0.5 * (1 - a)**0.5 / total
        mean, var = b**0.5 * m + slope * (mean - a**0.5 * m), slope**2 * var + sigma2 * (s >= 0)
    x = d.sample(gaussian_eps(d, m, c), double(n, 1), steps, eta, spacing=spacing, clip=False)
    assert abs(x.mean() - mean) < 5 * (var / n)**0.5 + 1e-9    # 5 SE
    assert abs(x.var() - var) < 5 * var * (2 / n)**0.5 + 1e-9
    if steps == T:    # and those are nearly the data's: the rest is the error of finite steps
        assert mean == pytest.approx(m, abs=1e-3) and var == pytest.approx(c, rel=0.05)


@pytest.mark.parametrize("T", (50, 200))
def test_large_variance_recursion(T):
    """With variance large every step of ancestral sampling adds noise of variance beta_t, and the last step none."""
    m, c, n = 0.5, 0.04, 10_000
    betas = np.linspace(1e-4, 0.02, T) * 1000 / T
    bar = np.append(np.cumprod(1 - betas), 1.0)
    mean, var = 0.0, 1.0
    for t in reversed(range(T)):    # DDPM's equation 11 with the exact eps, linear in x_t
        a, beta = bar[t], betas[t]
        gain = beta / (a * c + 1 - a)    # sqrt(1 - a) eps = (1 - a) (x_t - sqrt(a) m) / (a c + 1 - a)
        mean = (mean - gain * (mean - a**0.5 * m)) / (1 - beta)**0.5
        var = (1 - gain)**2 * var / (1 - beta) + beta * (t > 0)
    d = GaussianDiffusion(T)
    x = d.sample(gaussian_eps(d, m, c), double(n, 1), T, 1.0, clip=False, variance="large")
    assert abs(x.mean() - mean) < 5 * (var / n)**0.5    # 5 SE
    assert abs(x.var() - var) < 5 * var * (2 / n)**0.5    # at T = 50 variance small ends at half of it


def test_large_variance_by_hand():
    """One step from t to t - 1: the noise has standard deviation sqrt(beta_t), the mean is as with variance small."""
    d, noise = GaussianDiffusion(50, 2e-3, 0.4), double(4, 3)
    seeded = lambda: torch.Generator().manual_seed(5)
    drawn = torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    first = [next(d.trajectory(wavy, noise, 50, 1.0, variance=v, generator=seeded()))[1] for v in ("small", "large")]
    bar = np.cumprod(1 - np.linspace(2e-3, 0.4, 50))
    small, large = (0.4 * (1 - bar[48]) / (1 - bar[49]))**0.5, 0.4**0.5
    assert torch.allclose(first[0] - small * drawn, first[1] - large * drawn, atol=1e-12)
    assert torch.allclose(first[1] - first[0], (large - small) * drawn, atol=1e-12)


@pytest.mark.parametrize("variance", (0.05, 1.0))
def test_invert_then_sample(variance):
    """With the exact eps of Gaussian data the noise leads back to x_0; a single iteration errs less with more steps."""
    d, shift = GaussianDiffusion(1000), double(50, 3)
    x0, net = 0.2 + variance**0.5 * double(50, 3), gaussian_eps(d, 0.2, variance, shift)
    error = lambda steps, n: (d.sample(net, d.invert(net, x0, steps, shift=shift, clip=False, iterations=n),
                                       steps, shift=shift, clip=False) - x0).abs().max().item()
    assert error(100, 5) < 1e-3
    once = [error(steps, 1) for steps in (20, 50, 100, 200)]
    assert once == sorted(once, reverse=True) and once[-1] < once[0] / 3 and once[-1] > error(200, 5)
    noise = d.invert(net, x0, 1000, shift=shift, clip=False)    # the flow carries quantiles of N(m, c) to N(0, 1)
    assert torch.allclose(noise, (x0 - 0.2) / variance**0.5, atol=0.05)    # a_T is 4e-5, and the steps are finite


def test_invert_with_clipping():
    """A network whose x_0 leaves [-1, 1] at much noise: the inverse of clipped sampling is found only with clipping."""
    d, x0 = GaussianDiffusion(1000), torch.rand(200, 3, dtype=torch.float64) * 1.6 - 0.8
    best = gaussian_eps(d, 0.0, 2.25)
    net = lambda x, t: best(x, t) + 0.05 * torch.sin(3 * x)    # divided by sqrt(a_t) = 0.006 in x_0
    error = {clip: (d.sample(net, d.invert(net, x0, 10, clip=clip), 10, clip=clip) - x0).abs().max().item()
             for clip in (True, False)}
    # a clipped x_0 does not depend on y_t, so 5 iterations suffice; without clipping they leave a hundredfold
    assert error[True] < 1e-3 and error[False] > 20 * error[True]


# --------------------------------------------------------------------------------------------------------
# Diffusion: the bound, noise, timesteps, refusals
# --------------------------------------------------------------------------------------------------------


def bound_by_hand(betas, x0, calls):
    """DDPM's bound in bits per dimension, from its formulas in numpy, at the x_t that the network was shown."""
    bar, bits = np.cumprod(1 - betas), lambda nats: nats.reshape(len(x0), -1).mean(1) / math.log(2)
    cdf = np.vectorize(lambda v: 0.5 * (1 + math.erf(v / 2**0.5)))
    prior = D.kl_divergence(D.Normal(bar[-1]**0.5 * torch.tensor(x0), (1 - bar[-1])**0.5), D.Normal(0.0, 1.0))
    terms = dict(L_T=bits(prior.numpy()), L_t=0)
    for t, y, eps in calls:
        guess = np.clip((y - (1 - bar[t])**0.5 * eps) / bar[t]**0.5, -1, 1)
        if t:
            var = betas[t] * (1 - bar[t - 1]) / (1 - bar[t])
            c0, c_t = bar[t - 1]**0.5 * betas[t], (1 - betas[t])**0.5 * (1 - bar[t - 1])
            mean = lambda x: (c0 * x + c_t * y) / (1 - bar[t])
            terms["L_t"] = terms["L_t"] + bits((mean(x0) - mean(guess))**2 / (2 * var))
        else:
            sd = (betas[1] * (1 - bar[0]) / (1 - bar[1]))**0.5
            high = np.where(x0 == 1, np.inf, (x0 + 1 / 255 - guess) / sd)
            low = np.where(x0 == -1, -np.inf, (x0 - 1 / 255 - guess) / sd)
            terms["L_0"] = bits(-np.log(cdf(high) - cdf(low)))
    return terms


@pytest.mark.parametrize("shifted", (False, True))
def test_bits_per_dim(shifted):
    """Term by term the bound is DDPM's formulas in numpy, at the same noise; a shift the net sees changes nothing."""
    T, betas = 40, np.linspace(1e-3, 0.4, 40)
    d = GaussianDiffusion(T, 1e-3, 0.4)
    levels = torch.tensor([[0, 255, 128], [7, 200, 255]], dtype=torch.uint8).view(2, 1, 1, 3)
    x0, calls = diffusevae.to_float(levels).double(), []
    x0[levels == 0], x0[levels == 255] = -1, 1    # as float32 arithmetic has it
    shift = double(2, 1, 1, 3) if shifted else 0

    def net(x, t):    # nearly right, so that no bin's mass vanishes; off by a little in a wavy way
        y, a = x - shift, d.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (y - a.sqrt() * x0) / (1 - a).sqrt() + 0.1 * torch.sin(3 * y)
        calls.append((int(t[0]), y.numpy(), eps.numpy()))
        return eps

    got = d.bits_per_dim(net, x0, shift, torch.Generator().manual_seed(2))
    expected = bound_by_hand(betas, x0.numpy(), calls)
    assert sorted(t for t, *_ in calls) == list(range(T))
    for name, value in expected.items():    # erf in the tails of a bin loses a few digits
        np.testing.assert_allclose(got[name].numpy(), value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(got["total"].numpy(), sum(expected.values()), rtol=1e-6)
    noises = np.concatenate([(y - (b := np.prod(1 - betas[:t + 1]))**0.5 * x0.numpy()) / (1 - b)**0.5
                             for t, y, _ in calls]).ravel()
    assert abs(noises.mean()) < 5 / len(noises)**0.5 and abs(noises.var() - 1) < 5 * (2 / len(noises))**0.5    # 5 SE


def test_bits_per_dim_bounds_the_truth():
    """For grey levels from a Gaussian the bound with the best eps exceeds their true -log2 p, and by little."""
    d, g, n = GaussianDiffusion(1000), torch.Generator().manual_seed(4), 4000
    truth, (m, sd) = D.Normal(0.1, 0.2), (0.1, 0.2)
    x0 = diffusevae.to_float(diffusevae.to_uint8(m + sd * torch.randn(n, 1, generator=g))).double()
    exact = -(truth.cdf(x0 + 1 / 255) - truth.cdf(x0 - 1 / 255)).log2().mean()
    bound = d.bits_per_dim(gaussian_eps(d, m, sd**2), x0, generator=g)["total"]
    se = bound.std() / n**0.5
    # E bound >= E -log2 p. The small variance is too narrow at the first few t: its ratio to the true one is 1.9 at
    # t = 0 and 1, 1.4 at t = 2, falling, and costs (r - 1 - ln r) / 2 nats at each: some 0.7 bits in all
    assert exact - 5 * se < bound.mean() < exact + 1


def test_randn_with_a_list_does_not_depend_on_the_batch():
    """Image i gets torch.randn of its own generator, whatever else is in its batch; shape and dtype are as asked."""
    like = torch.empty(0, dtype=torch.float64)
    batch = randn((3, 2, 2), like, each_seeded(7, 8, 9))
    for i, seed in enumerate((7, 8, 9)):
        alone = torch.randn(2, 2, dtype=torch.float64, generator=each_seeded(seed)[0])
        assert torch.equal(batch[i], alone) and torch.equal(randn((1, 2, 2), like, each_seeded(seed))[0], alone)
    d, y = GaussianDiffusion(100, 1e-3, 0.2), double(3, 2, 2)
    together = d.sample(wavy, y, 10, 1.0, generator=each_seeded(1, 2, 3))
    alone = torch.cat([d.sample(wavy, y[i:i + 1], 10, 1.0, generator=each_seeded(i + 1)) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-12)


def test_randn_wants_one_generator_per_image():
    """Too few or too many generators are a ValueError, not repeated or dropped noise; none for no image is fine."""
    like = torch.empty(0)
    for count in (0, 1, 2, 4):
        with pytest.raises(ValueError):
            randn((3, 2), like, each_seeded(*range(count)))
    assert randn((0, 2), like, []).shape == (0, 2) and randn((0, 2), like).shape == (0, 2)


def test_generators_and_stream():
    """A seed is a function of run, name and index in 32 bits; generators() has one generator for each index."""
    seeds = {(seed, name, i): diffusevae.stream(seed, name, i)
             for seed in (0, 1) for name in ("vae", "sample") for i in range(500)}
    assert len(set(seeds.values())) == len(seeds) and all(0 <= s < 2**32 for s in seeds.values())
    drawn = randn((2, 3), torch.empty(0), diffusevae.generators(1, "sample", [7, 4]))
    for row, i in zip(drawn, (7, 4)):
        assert torch.equal(row, torch.randn(3, generator=each_seeded(seeds[1, "sample", i])[0]))


def test_discretized_log_prob():
    """Bins of 2 / 255 under torch.distributions' normal, the outermost open, so that the 256 levels sum to 1."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.2), (-0.98, 0.01), (0.9, 0.5)):
        truth = D.Normal(torch.tensor(mean, dtype=torch.float64), std)
        edges = truth.cdf(x[:-1] + 1 / 255)
        p = torch.cat([edges, torch.ones(1)]) - torch.cat([torch.zeros(1), edges])
        got = diffusevae.discretized_log_prob(x, torch.full_like(x, mean), std)
        seen = p > 1e-9    # a difference of numbers near 1 is exact to 1e-16, a bin with less mass is not told apart
        assert torch.allclose(got[seen], p[seen].log(), atol=1e-6)
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-9)    # 256 bins of at least 1e-12


def test_extract():
    """values[t] with as many dimensions as the images."""
    values, t = double(10), torch.tensor([3, 0, 9])
    got = diffusevae.extract(values, t, (3, 2, 4, 4))
    assert got.shape == (3, 1, 1, 1) and got.flatten().tolist() == [values[i].item() for i in (3, 0, 9)]


@pytest.mark.parametrize("T", (1, 2, 10, 100, 1000))
def test_timesteps_for_all_counts(T):
    """Any n of T steps is n rising values of 0..T-1, up to T-1 but for uniform; all of them if n = T."""
    for spacing in SPACINGS:
        for n in range(1, T + 1):
            kept = timesteps_for(T, n, spacing).tolist()
            assert len(kept) == n and 0 <= kept[0] and kept[-1] < T and all(a < b for a, b in zip(kept, kept[1:]))
            assert spacing == "uniform" and n > 1 or kept[-1] == T - 1
    assert timesteps_for(T, 1).tolist() == [T - 1]


@pytest.mark.parametrize("spacing, steps, expected", (
    ("uniform", 10, list(range(0, 1000, 100))), ("quad", 10, [9, 39, 89, 159, 249, 359, 489, 639, 809, 999]),
    ("quad", 3, [110, 443, 999]), ("quad", 1000, list(range(1000))),
    ("trailing", 10, list(range(99, 1000, 100))), ("trailing", 3, [332, 665, 999]),
    ("uniform", 1, [999]), ("quad", 1, [999]), ("trailing", 1, [999])))
def test_timesteps_for_known_lists(spacing, steps, expected):
    """Lists of 1000 steps worked out by hand."""
    assert timesteps_for(1000, steps, spacing).tolist() == expected


@pytest.mark.parametrize("words, call", (
    ("steps", lambda: timesteps_for(10, 0)), ("steps", lambda: timesteps_for(10, -1)),
    ("steps", lambda: timesteps_for(10, 11)), ("spacing", lambda: timesteps_for(10, 3, "even")),
    ("0.60", lambda: GaussianDiffusion(100, 1e-4, 0.02)), ("betas", lambda: GaussianDiffusion(100, 0.0, 0.2)),
    ("0.15", lambda: GaussianDiffusion(1000, 1e-4, 0.02, "geometric")),
    ("betas", lambda: GaussianDiffusion(100, 1e-3, 1.0)), ("schedule", lambda: GaussianDiffusion(schedule="sine")),
    ("predict", lambda: GaussianDiffusion(predict="x0")),
    ("steps", lambda: GaussianDiffusion(100, 1e-3, 0.2).sample(wavy, double(1, 1), 101)),
    ("variance large needs", lambda: GaussianDiffusion(100).sample(wavy, double(1, 1), 100, 0.5, variance="large")),
    ("variance large needs", lambda: GaussianDiffusion(100).sample(wavy, double(1, 1), 99, 1.0, variance="large"))))
def test_diffusion_refuses(words, call):
    """What would sample wrongly is a ValueError that names the argument (0.60 and 0.15 of the image are left)."""
    with pytest.raises(ValueError, match=words):
        call()


# --------------------------------------------------------------------------------------------------------
# U-Net
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, channels, cond, options", (
    (8, 3, 3, dict(width=4, mults=(1,), heads=1)), (8, 1, 1, dict(width=6, mults=(1, 2), heads=2, res_blocks=1)),
    (12, 3, 0, dict(width=5, mults=(1, 2), heads=5)), (16, 3, 3, dict(width=7, mults=(2, 1, 3), heads=1, z_dim=4)),
    (24, 2, 5, dict(width=4, mults=(1, 1, 2, 2), heads=4, res_blocks=3, attention=(12, 3)))))
def test_unet_shapes_and_gradients(size, channels, cond, options):
    """The output has x_t's shape and is zero at first; once no weight is zero, a loss reaches every one of them."""
    net = UNet(size, channels, cond, **options)
    x, x_hat, z = (torch.randn(2, n, size, size) if n else None for n in (channels, cond, 0))
    z, t = torch.randn(2, options["z_dim"]) if "z_dim" in options else None, torch.tensor([3, 900])
    out = net(x, t, x_hat, z)
    assert out.shape == x.shape and (out == 0).all()
    perturbed(net)(x, t, x_hat, z).square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle


def test_unet_sees_its_inputs():
    """Another x_t, t, x_hat or z of one image changes the output of that image, and of no other."""
    net, generator = perturbed(UNet(8, 3, 3, 8, (1, 2), heads=2, z_dim=4)).eval(), torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), torch.randn(2, 3, 8, 8), torch.randn(2, 4)]
    with torch.no_grad():
        before = net(*inputs)
        for i, value in enumerate(inputs):
            other = value.clone()
            other[0] = 500 if i == 1 else torch.randn(value.shape[1:], generator=generator)
            after = net(*inputs[:i], other, *inputs[i + 1:])
            assert (after[0] - before[0]).abs().mean() > 1e-2, i    # outputs are of order 1
            assert torch.allclose(after[1], before[1], atol=1e-5), i


@pytest.mark.parametrize("size, mults, asked, expected", (
    (32, (1, 1, 1), (16,), {16: 5, 8: 1}), (32, (1, 1), (16,), {16: 6}), (16, (1, 1, 1), (8,), {8: 5, 4: 1}),
    (16, (1, 1, 1), (16, 4), {16: 5, 4: 6}), (16, (1, 1, 1), (), {4: 1})))
def test_attention_is_where_it_is_asked_for(size, mults, asked, expected):
    """Hooks count the maps that attend: 2 down and 3 up at each asked size, 1 in the middle."""
    net, seen = UNet(size, 1, 0, 4, mults, 2, asked, heads=1), collections.Counter()
    for module in net.modules():
        if isinstance(module, diffusevae.Attention):
            module.register_forward_hook(lambda m, inputs, out: seen.update([inputs[0].shape[2]]))
    net(torch.randn(1, 1, size, size), torch.tensor([5]))
    assert seen == expected


def test_attention_is_softmax_attention():
    """One Attention is x + W softmax(q k / sqrt(d)) v of its normalised input, written out with einsum."""
    layer, x = perturbed(diffusevae.Attention(8, 2), 0.5).double(), double(2, 8, 3, 4)
    flat = F.group_norm(x, 2, layer.norm.weight, layer.norm.bias).flatten(2) if layer.norm.num_groups == 2 \
        else layer.norm(x).flatten(2)
    q, k, v = (torch.einsum("oc,bcn->bon", w[:, :, 0, 0], flat) + b[:, None]
               for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)))
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = (torch.einsum("bcn,bcm->bnm", q[:, h], k[:, h]) / 4**0.5).softmax(2)
        heads.append(torch.einsum("bnm,bcm->bcn", weights, v[:, h]))
    out = torch.einsum("oc,bcn->bon", layer.out.weight[:, :, 0, 0], torch.cat(heads, 1)) + layer.out.bias[:, None]
    assert torch.allclose(layer(x), x + out.view_as(x), atol=1e-12)


def test_block_is_scaled_and_shifted_by_the_embedding():
    """A ResBlock is skip(x) + conv(silu(norm(conv(silu(norm(x)))) (1 + scale) + shift)), written out."""
    block, x, emb = perturbed(diffusevae.ResBlock(4, 8, 6, 0.0), 0.5).double(), double(2, 4, 5, 5), double(2, 6)
    norm = lambda h, layer: F.group_norm(h, layer.num_groups, layer.weight, layer.bias, layer.eps)
    conv = lambda h, layer: F.conv2d(h, layer.weight, layer.bias, padding=1)
    scale, shift = F.linear(emb, block.scale_shift.weight, block.scale_shift.bias)[:, :, None, None].split(8, dim=1)
    h = norm(conv(F.silu(norm(x, block.first[0])), block.first[2]), block.norm)
    out = F.conv2d(x, block.skip.weight, block.skip.bias) + conv(F.silu(h * (1 + scale) + shift), block.second[2])
    assert torch.allclose(block(x, emb), out, atol=1e-12)


def test_timestep_embedding():
    """Cosines of t / 10000^(2 i / dim), then the sines (1706.03762, section 3.5); an odd last number is 0."""
    t = torch.tensor([0, 1, 500, 999])
    for dim in (2, 8, 9):
        rates = [10_000**(-i / (dim // 2)) for i in range(dim // 2)]
        expected = [[f(s * rate) for f in (math.cos, math.sin) for rate in rates] + [0] * (dim % 2) for s in t.tolist()]
        # angles up to 999 have 6e-8 of that as rounding, and the rates another
        got = diffusevae.timestep_embedding(t, dim).double()
        assert torch.allclose(got, torch.tensor(expected).double(), atol=3e-4)


def test_unet_refuses_the_wrong_x_hat():
    """x_hat for a U-Net without conditioning, and none for one with: ValueErrors, not an image ignored."""
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    for cond, x_hat in ((0, x), (3, None)):
        with pytest.raises(ValueError, match="x_hat"):
            UNet(8, 3, cond, 4, (1,), heads=1)(x, t, x_hat)


@pytest.mark.parametrize("words, size, options", (
    ("image_size 18 must be divisible by 4", 18, dict(mults=(1, 2, 2))),
    ("image_size 9 must be divisible by 2", 9, dict(mults=(1, 1))),
    ("no 5x5 feature maps", 8, dict(attention=(5,))), ("no 16x16 feature maps", 8, dict(attention=(8, 16))),
    ("heads must divide", 8, dict(heads=3)),
    ("heads must divide", 8, dict(mults=(1, 1), heads=4, width=6, attention=(8,)))))
def test_unet_refuses(words, size, options):
    """Sizes that do not halve, attention that never occurs and heads that do not divide are ValueErrors by name."""
    with pytest.raises(ValueError, match=words):
        UNet(size, **{**dict(width=8, mults=(1, 2), heads=2), **options})


# --------------------------------------------------------------------------------------------------------
# Mixture
# --------------------------------------------------------------------------------------------------------

MEANS = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-5.0, 7.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SCALE_TRIL = torch.tensor([[[1.0, 0], [0.5, 0.8]], [[0.4, 0], [-0.3, 1.2]], [[1.5, 0], [0, 0.5]]], dtype=torch.float64)


def known_mixture():
    """The mixture above as torch.distributions has it."""
    return D.MixtureSameFamily(D.Categorical(WEIGHTS), D.MultivariateNormal(MEANS, scale_tril=SCALE_TRIL))


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_separate_clusters(seed):
    """Eight clusters of 1 to some 80 points at the corners of a cube are found exactly; every point has one owner."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(8, (200,), generator=g).square() // 8
    label = torch.cat([torch.arange(8), label])    # corners 5 and 7 once each
    corner = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))    # 2 apart or more, their points within 0.1
    owner = diffusevae.k_means(corner[label] + 0.2 * torch.rand(208, 3, generator=g) - 0.1, 8, g)
    assert owner.shape == (208, 8) and ((owner == 0) | (owner == 1)).all() and (owner.sum(1) == 1).all()
    met = F.one_hot(label).T @ owner.long() > 0    # which true cluster shares points with which found one
    assert (met.sum(0) == 1).all() and (met.sum(1) == 1).all()


def test_k_means_without_clusters():
    """On evenly spread points it comes to rest, each with the nearest mean; equal points have one owner each, too."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand(60, 2, dtype=torch.float64, generator=g)
    owner = diffusevae.k_means(z, 4, g)
    means = (owner.T @ z / owner.sum(0)[:, None]).numpy()
    nearest = np.linalg.norm(z.numpy()[:, None] - means, axis=2).argmin(1)
    assert torch.equal(owner, F.one_hot(torch.tensor(nearest), 4).double()) and owner.dtype == torch.float64
    same = diffusevae.k_means(torch.ones(5, 2), 3, g)
    assert same.shape == (5, 3) and ((same == 0) | (same == 1)).all() and (same.sum(1) == 1).all()


def test_mixture_recovers_a_known_one():
    """EM on draws of three well separated Gaussians finds their weights, means and covariances."""
    n = 20_000
    found = GaussianMixture(3, 2).fit(known_mixture().sample((n,)), generator=torch.Generator().manual_seed(0))
    order = torch.cdist(MEANS, found.means).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    truth, got = SCALE_TRIL @ SCALE_TRIL.mT, (found.scale_tril @ found.scale_tril.mT)[order]
    variances = truth.diagonal(dim1=1, dim2=2)
    count = (n * WEIGHTS)[:, None]
    # 5 SE of each, as if every point's component were known: they are 6 standard deviations apart
    assert ((found.weights[order] - WEIGHTS).abs() < 5 * (WEIGHTS * (1 - WEIGHTS) / n).sqrt()).all()
    assert ((found.means[order] - MEANS).abs() < 5 * (variances / count).sqrt()).all()
    se = ((variances[:, :, None] * variances[:, None] + truth**2) / count[:, :, None]).sqrt()
    assert ((got - truth).abs() < 5 * se).all()


def test_mixture_likelihood_never_falls():
    """On overlapping clusters, with too many components, history rises, and ends at the mean of log_prob."""
    z = torch.cat([double(300, 3), double(300, 3) * 0.5 + 1, double(5, 3) * 3])
    mixture = GaussianMixture(8, 3).fit(z, iterations=60, tolerance=0.0, generator=torch.Generator().manual_seed(1))
    steps = np.diff(mixture.history)
    assert mixture.fitted
    assert len(steps) > 5 and steps[:-1].min() > -1e-6 and steps.min() > -1e-6    # slack: the covariances' floor
    assert mixture.history[-1] == pytest.approx(mixture.log_prob(z).mean().item(), abs=1e-9)
    assert mixture.weights.sum().item() == pytest.approx(1)


def known_as_ours():
    """The known mixture as a GaussianMixture."""
    mixture = GaussianMixture(3, 2)
    mixture.weights, mixture.means, mixture.scale_tril = WEIGHTS, MEANS, SCALE_TRIL
    return mixture


def test_mixture_log_prob():
    """log_prob is that of torch.distributions.MixtureSameFamily, far out too."""
    z = double(500, 2) * 10
    assert torch.allclose(known_as_ours().log_prob(z), known_mixture().log_prob(z), atol=1e-9)


def test_mixture_samples():
    """Draws have the mixture's moments and its components in random order; lists of generators as in randn."""
    n = 40_000
    z = known_as_ours().sample(n, torch.Generator().manual_seed(2))
    mean = WEIGHTS @ MEANS
    second = SCALE_TRIL @ SCALE_TRIL.mT + MEANS[:, :, None] * MEANS[:, None]
    cov = (WEIGHTS[:, None, None] * second).sum(0) - mean[:, None] * mean
    assert ((z.mean(0) - mean).abs() < 5 * (cov.diagonal() / n).sqrt()).all()    # 5 SE
    products = (z - mean)[:, :, None] * (z - mean)[:, None]
    assert ((products.mean(0) - cov).abs() < 5 * products.std(0) / n**0.5).all()
    k = torch.cdist(z, MEANS).argmin(1)    # the component, but for one point in thousands
    same, p = (k[1:] == k[:-1]).double().mean(), (WEIGHTS**2).sum()
    # neighbours are alike by chance; 5 SE, and 3 for overlapping pairs
    assert abs(same - p) < 8 * (p * (1 - p) / n)**0.5
    for i in range(3):    # within a component: its own covariance, 5 SE
        one = known_as_ours()
        one.weights = F.one_hot(torch.tensor(i), 3).double()
        z, truth = one.sample(n, torch.Generator().manual_seed(3)), SCALE_TRIL[i] @ SCALE_TRIL[i].T
        se = ((truth.diagonal()[:, None] * truth.diagonal() + truth**2) / n).sqrt()
        assert ((z.T.cov() - truth).abs() < 5 * se).all()
    g = [torch.Generator().manual_seed(i) for i in range(4)]
    together, alone = known_as_ours().sample(4, g), known_as_ours().sample(1, [torch.Generator().manual_seed(2)])
    assert torch.allclose(together[2], alone[0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name, components", (
    ("few", 3), ("one", 1), ("same", 4), ("constant", 3), ("as many", 6), ("far", 2)))
def test_mixture_degenerate_data(name, components, dtype):
    """Fewer points than dimensions, duplicates, constant dimensions, one component: finite, and can be drawn from."""
    z = dict(few=double(5, 20), one=double(50, 3), same=torch.ones(30, 4, dtype=torch.float64), far=1e4 + double(60, 2),
             constant=torch.cat([double(40, 2), torch.full((40, 1), 3.0)], 1)).get(name, double(6, 2)).to(dtype)
    mixture = GaussianMixture(components, z.shape[1]).fit(z, generator=torch.Generator().manual_seed(0))
    draws = mixture.sample(20, torch.Generator().manual_seed(1))
    assert mixture.log_prob(z).isfinite().all() and draws.isfinite().all() and draws.dtype == dtype
    if components == 1:    # the maximum-likelihood Gaussian
        assert torch.allclose(mixture.means[0], z.mean(0), atol=1e-5)
        assert torch.allclose(mixture.scale_tril[0] @ mixture.scale_tril[0].T, z.T.cov(correction=0), atol=1e-5)


def test_mixture_of_few_points_in_many_dimensions():
    """The codes of a folder with 100 images, 512 numbers each: the covariances, of rank 9 and a floor, have a condition
    beyond float32, the fit does not. What is drawn keeps the mean squared length of the codes, 512."""
    z = torch.randn(100, 512, generator=torch.Generator().manual_seed(0))
    mixture = GaussianMixture(10, 512).fit(z, generator=torch.Generator().manual_seed(0))
    lengths = mixture.sample(500, torch.Generator().manual_seed(1)).square().sum(1)
    assert mixture.log_prob(z).isfinite().all()
    assert lengths.mean().item() == pytest.approx(z.square().sum(1).mean().item(), rel=0.1)    # 5 SE: sd is some 220


@pytest.mark.parametrize("z", (torch.zeros(3, 2), torch.full((9, 2), math.nan)))
def test_mixture_refuses(z):
    """More components than points, and points that are not finite, are ValueErrors."""
    with pytest.raises(ValueError, match=f"4 gmm_components need at least 4 finite points, got {len(z)}"):
        GaussianMixture(4, 2).fit(z)


# --------------------------------------------------------------------------------------------------------
# Both stages
# --------------------------------------------------------------------------------------------------------


def tiny(**options):
    """A Config that trains in a blink."""
    return Config.preset("shapes", **{**TINY, "hflip": True, "log_every": 2, "save_every": 3, **options})


def finish(config, images):
    """A model built from the seed and trained through its stages; returns it and all rows."""
    torch.manual_seed(config.seed)
    model, state = DiffuseVAE(config), new_state()
    stages = (train_vae, train_ddpm) if model.vae else (train_ddpm,)
    return model, [row for stage in stages for row in stage(model, images, state)]


@pytest.mark.parametrize("formulation, predict", (("1", "v"), ("2", "eps"), ("none", "v")))
def test_both_stages_overfit_one_batch(formulation, predict):
    """On the same four images the VAE's squared error falls to a tenth, the U-Net's loss below a quarter of 1."""
    c = tiny(formulation=formulation, predict=predict, vae_steps=300, ddpm_steps=300, vae_lr=1e-2, lr=1e-2, z_dim=8,
             vae_width=8, unet_width=16, kl_weight=0.0, hflip=False, log_every=50, batch_size=16)
    rows = finish(c, diffusevae.draw_shapes(4, 8, 0)[0])[1]
    first, last = ([r for r in rows if r["stage"] == "vae"][i] for i in (0, -1)) if formulation != "none" else (0, 0)
    assert formulation == "none" or last["recon"] < 0.1 * diffusevae.draw_shapes(4, 8, 0)[0].numel() / 4 * 0.1
    assert rows[-1]["loss"] < 0.25    # the target, eps or v, has a variance near 1


def test_formulation_2_loss_is_that_of_formulation_1():
    """With a network that sees x_t - x_hat in formulation 2, both formulations have one loss."""
    losses = []
    for formulation in ("1", "2"):
        torch.manual_seed(3)
        model = DiffuseVAE(tiny(formulation=formulation))
        probe = lambda x_t, t, x_hat, z: torch.tanh(x_t - (x_hat if formulation == "2" else 0)) * 0.3
        torch.manual_seed(4)
        losses.append(model.loss(torch.rand(4, 3, 8, 8) * 2 - 1, probe).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)    # float32, summed in another order


def test_stage_2_is_shown_draws_and_every_t():
    """The network sees decode(z) with z ~ q(z|x) (mean and spread of q), and t evenly in 0..T-1, the last included."""
    model, n = DiffuseVAE(tiny(z_cond=True, timesteps=50)), 4000
    perturbed(model.vae, 0.3)
    x, seen = (torch.rand(1, 3, 8, 8) * 2 - 1).expand(n, -1, -1, -1), {}

    def probe(x_t, t, x_hat, z):
        seen.update(t=t, x_hat=x_hat, z=z)
        return x_t

    model.loss(x, probe)
    mu, logvar = model.vae.encode(x[:1])
    sd = (logvar[0] / 2).exp()
    assert ((seen["z"].mean(0) - mu[0]).abs() < 5 * sd / n**0.5).all()    # 5 SE
    assert ((seen["z"].std(0) / sd - 1).abs() < 5 / (2 * n)**0.5).all()    # 5 SE of a standard deviation
    assert torch.equal(seen["x_hat"], model.vae.decode(seen["z"]))
    counts = torch.bincount(seen["t"], minlength=50)
    assert len(counts) == 50 and (counts - n / 50).abs().max() <= 1    # spread evenly, so each t comes up 80 times


@pytest.mark.parametrize("formulation", ("1", "2", "none"))
@pytest.mark.parametrize("predict", ("eps", "v"))
def test_stage_2_loss_by_hand(formulation, predict):
    """From the x_t and t that the network was shown the noise follows, from that the target, and from that the loss."""
    model, seen = DiffuseVAE(tiny(formulation=formulation, predict=predict)), {}

    def probe(x_t, t, x_hat, z):
        seen.update(x_t=x_t.double(), t=t, x_hat=x_hat)
        return 0.3 * x_t

    x = torch.rand(50, 3, 8, 8) * 2 - 1
    loss = model.loss(x, probe).item()
    a = model.diffusion.alpha_bar[seen["t"]].view(-1, 1, 1, 1)
    y = seen["x_t"] - (seen["x_hat"] if formulation == "2" else 0)
    noise = (y - a.sqrt() * x) / (1 - a).sqrt()
    target = noise if predict == "eps" else a.sqrt() * noise - (1 - a).sqrt() * x
    expected = (0.3 * seen["x_t"] - target).square().mean().item()
    assert loss == pytest.approx(expected, rel=1e-3)    # float32 / sqrt(1 - a_0)


def test_ema_and_learning_rate_by_hand():
    """The average and the rates follow their closed forms: (1 + n) / (10 + n) up to `ema`; warm-up, then a cosine."""
    c = tiny(ddpm_steps=40, warmup=4, ema=0.7, log_every=1)    # the warm-up ends in the middle, at step 20
    torch.manual_seed(0)
    model, images, state = DiffuseVAE(c), diffusevae.draw_shapes(8, 8, 0)[0], new_state()
    average = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    for n, row in enumerate(train_ddpm(model, images, state)):
        decay = min(0.7, (1 + n) / (10 + n))
        assert state["weights"].keys() == average.keys()
        for name, weights in state["weights"].items():
            average[name] = decay * average[name] + (1 - decay) * weights
        rate = c.lr * min(1, (n + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * max(0, n - 4) / 36))
        assert row["lr"] == pytest.approx(rate)
        for name, p in model.unet.named_parameters():    # at every step: a wrong start would wash out
            assert torch.allclose(average[name], p, atol=1e-6), (n, name)


@pytest.mark.parametrize("stage, train, option", (("vae", train_vae, "vae_lr"), ("ddpm", train_ddpm, "lr")))
def test_each_stage_has_its_own_learning_rate(stage, train, option):
    """The rate is in the row, and Adam's first step moves every weight by it: m / sqrt(v) is the gradient's sign."""
    c = tiny(warmup=0, log_every=1, vae_lr=3e-3, lr=2e-4)
    model, state = perturbed(DiffuseVAE(c), 0.1), new_state()
    network = model.vae if stage == "vae" else model.unet
    before = [p.detach().clone() for p in network.parameters()]
    row, rate = next(train(model, diffusevae.draw_shapes(8, 8, 0)[0], state)), getattr(c, option)
    after = network.parameters() if stage == "vae" else state["weights"].values()
    moved = torch.cat([(one - two).abs().flatten() for one, two in zip(after, before)]) / rate
    assert row["lr"] == pytest.approx(rate) and "images_per_s" not in row
    # weights near 1 are rounded at 6e-8; a gradient of 1e-6 or less is held back by Adam's epsilon of 1e-8
    assert moved.max() < 1.002 and moved.median() > 0.998 and (moved > 0.99).double().mean() > 0.9


def test_half_of_the_images_are_mirrored():
    """With hflip a training image comes as it is or with left and right exchanged, each half of the time."""
    c, seen = tiny(vae_steps=10, vae_batch=100), []
    model, image = DiffuseVAE(c), torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    loss = model.vae.loss
    model.vae.loss = lambda x, kl_weight: seen.append(x) or loss(x, kl_weight)
    list(train_vae(model, image, new_state()))
    x, plain = torch.cat(seen), diffusevae.to_float(image)
    mirrored = (x == plain.flip(3)).flatten(1).all(1)
    assert (mirrored | (x == plain).flatten(1).all(1)).all()
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / 1000**0.5    # 5 SE


def test_options_reach_the_model():
    """kl_weight reaches the VAE's loss, T and the schedule reach the betas; noise is standard normal."""
    rows = finish(tiny(kl_weight=7.0), diffusevae.draw_shapes(8, 8, 0)[0])[1]
    assert all(r["loss"] == pytest.approx(r["recon"] + 7 * r["kl"], rel=1e-5) for r in rows if r["stage"] == "vae")
    noise = DiffuseVAE(tiny()).noise(200)
    assert abs(noise.std() - 1) < 5 / (2 * noise.numel())**0.5    # 5 SE
    for T in (1000, 250):
        f = np.cos((np.arange(T) / T + 0.008) / 1.008 * math.pi / 2)**2    # not f(T), where beta is cut to 0.999
        for schedule, expected in (("linear", np.cumprod(1 - np.linspace(1e-4, 0.02, T) * 1000 / T)),
                                   ("cosine", f[1:] / f[0]),
                                   ("geometric", np.cumprod(1 - np.geomspace(1e-4, 0.05, T) * 1000 / T))):
            bar = DiffuseVAE(tiny(timesteps=T, schedule=schedule)).diffusion.alpha_bar[:len(expected)].numpy()
            np.testing.assert_allclose(bar, expected, rtol=1e-9)


def test_gradients_are_clipped_in_stage_2_alone(monkeypatch):
    """When Adam steps, the U-Net's gradient has at most the asked norm, and the VAE's is as it came."""
    norms, step = [], torch.optim.Adam.step

    def watched(self, *args):
        norms.append(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    finish(tiny(grad_clip=0.01), diffusevae.draw_shapes(8, 8, 0)[0])
    assert min(norms[:4]) > 0.05 and norms[4:] == pytest.approx([0.01] * 4, rel=1e-3)


def flat(value, name=""):
    """Every leaf of nested dictionaries and lists, by name."""
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in flat(x, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)) and not all(isinstance(v, int) for v in value):
        return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{name}/{i}").items()}
    return {name: value}


def alike(one, two, but=("images_per_s", "run_dir")):
    """Whether two checkpoints hold the same, to the bit, except for times and places."""
    one, two = (flat(torch.load(path, weights_only=True)) for path in (one, two))
    same = lambda a, b: torch.equal(a, b) if torch.is_tensor(a) else a == b
    return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one if not k.endswith(but))


@pytest.mark.parametrize("formulation", ("1", "none"))
def test_resume_is_bit_identical(monkeypatch, formulation):
    """Left after every row and continued from the file, a run ends with the very checkpoint of one in one go."""
    words = f"--formulation {formulation} --dropout 0.2 --vae-steps 10 --ddpm-steps 10 --log-every 3 --save-every 1"
    options = {k: None for k in ("vae_steps", "ddpm_steps")}
    assert command("--run-dir", "a", *words.split(), **options) == 0

    def short(train, stage):    # let go after a row, as a kill between two checkpoints would
        def one_row(model, images, state):
            yield from itertools.islice(train(model, images, state), 1)
            if state["steps"][stage] < 10:
                raise KeyboardInterrupt
        return one_row

    monkeypatch.setattr(diffusevae, "train_vae", short(train_vae, "vae"))
    monkeypatch.setattr(diffusevae, "train_ddpm", short(train_ddpm, "ddpm"))
    for rows in range(1, 9):
        code = command("--run-dir", "b", *words.split(), **options)
        if code == 0:
            break
        assert code == 130
    assert rows == (7 if formulation == "1" else 4) and alike("a/model.pt", "b/model.pt")
    logs = [[row[:-1] for row in csv.reader(open(f"{run}/log.csv"))] for run in "ab"]    # without speed
    assert logs[0] == logs[1] and len(logs[0]) == (9 if formulation == "1" else 5)


@pytest.mark.parametrize("stage, train, network", (("vae", train_vae, "vae"), ("ddpm", train_ddpm, "unet")))
def test_breaking_off_between_rows(monkeypatch, stage, train, network):
    """Stopped between two rows, or before the first, and begun again with its state: the weights of a run in one go."""
    images, options = diffusevae.draw_shapes(8, 8, 0)[0], dict(vae_steps=9, ddpm_steps=9, log_every=4, dropout=0.2)
    whole, real = finish(tiny(**options), images)[0], diffusevae.random_batch
    for breaks in ((1,), (3, 6), (2, 4, 5, 8)):
        torch.manual_seed(0)
        model, state = DiffuseVAE(tiny(**options)), new_state()
        if stage == "ddpm":
            list(train_vae(model, images, state))
        for end in breaks:
            def stop(*args, end=end):    # before step `end` has touched anything
                if state["steps"][stage] == end:
                    raise KeyboardInterrupt
                return real(*args)
            monkeypatch.setattr(diffusevae, "random_batch", stop)
            with pytest.raises(KeyboardInterrupt):
                list(train(model, images, state))
        monkeypatch.setattr(diffusevae, "random_batch", real)
        assert [row["step"] for row in train(model, images, state)] == [s for s in (4, 8, 9) if s > end]
        assert [row["step"] for row in state["log"] if row["stage"] == stage] == [4, 8, 9]
        for one, two in zip(getattr(model, network).parameters(), getattr(whole, network).parameters()):
            assert torch.equal(one, two)


def test_a_stage_broken_off_leaves_no_graph():
    """A notebook that leaves the VAE's loop early: codes have no graph, and stage 2 gives the VAE no gradients."""
    model, images, state = DiffuseVAE(tiny()), diffusevae.draw_shapes(8, 8, 0)[0], new_state()
    next(train_vae(model, images, state))
    for draw in (False, True):
        z = diffusevae.encode_images(model, images, draw)
        assert z.grad_fn is None and not z.requires_grad
    model.vae.zero_grad()
    next(train_ddpm(model, images, state))
    assert all(p.grad is None for p in model.vae.parameters())


def test_the_prior_is_fitted_to_draws():
    """The mixture's variance is that of the codes' means plus that of q(z|x), here 4: EM keeps its points' moments."""
    n, model = 2000, DiffuseVAE(tiny(gmm_components=3))
    last, images = model.vae.encoder[-1], diffusevae.draw_shapes(n, 8, 0)[0]
    with torch.no_grad():
        last.weight[2:], last.bias[2:] = 0, math.log(4)    # logvar; mu is left as it is
        mu = model.vae.encode(diffusevae.to_float(images))[0]
        last.weight[:2] /= mu.std(0)[:, None]
        mu = model.vae.encode(diffusevae.to_float(images))[0]
    assert torch.allclose(diffusevae.encode_images(model, images), mu, atol=1e-5)    # in batches of another size
    diffusevae.fit_prior(model, images)
    mixture = model.mixture
    mean = mixture.weights @ mixture.means
    second = (mixture.scale_tril @ mixture.scale_tril.mT).diagonal(dim1=1, dim2=2) + mixture.means**2
    variance = mixture.weights @ second - mean**2
    assert mixture.fitted and len(mixture.weights) == 3
    assert (mean - mu.mean(0)).abs().max() < 5 * (4 / n)**0.5    # 5 SE
    assert (variance / (mu.var(0) + 4) - 1).abs().max() < 5 * (2 / n)**0.5    # 5 SE; without the 4 it is 0.2


def test_a_prior_belongs_to_its_vae():
    """When the VAE trains on, its prior is no longer fitted, and the command line fits another."""
    model, images, state = DiffuseVAE(tiny(gmm_components=3)), diffusevae.draw_shapes(8, 8, 0)[0], new_state()
    next(train_vae(model, images, state))
    diffusevae.fit_prior(model, images)
    assert model.mixture.fitted and model.sample_prior(2).shape == (2, 2)
    next(train_vae(model, images, state))
    with pytest.raises(ValueError, match="prior"):
        model.sample_prior(2)
    means = []
    for steps in (4, 4, 8):
        assert command("--run-dir", "r", "--stage", "vae", "--gmm-components", 3, vae_steps=steps) == 0
        means.append(torch.load("r/model.pt", weights_only=True)["model"]["mixture.means"])
    assert torch.equal(means[0], means[1]) and not torch.allclose(means[1], means[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains():
    """Both stages run on CUDA in its automatic precision, and their losses are finite."""
    c = tiny(device="cuda", compile="off")
    model = DiffuseVAE(c).to("cuda", memory_format=torch.channels_last)
    images = diffusevae.draw_shapes(8, 8, 0)[0].cuda()
    state = new_state()
    assert all(math.isfinite(r["loss"]) for stage in (train_vae, train_ddpm) for r in stage(model, images, state))


def with_prior(model):
    """The model with a mixture fitted to some codes."""
    model.mixture = GaussianMixture(2, model.config.z_dim).fit(torch.randn(50, model.config.z_dim))
    return model


@pytest.mark.parametrize("options", (dict(), dict(formulation="2"), dict(z_cond=True),
                                     dict(z_cond=True, formulation="2")))
def test_latent_codes_and_back(options):
    """decode(invert(x)) returns x to the inversion's accuracy, whatever the VAE; samples come in any number."""
    torch.manual_seed(0)
    model = with_prior(perturbed(DiffuseVAE(tiny(timesteps=100, **options)), 0.02).eval())
    x = torch.rand(2, 3, 8, 8) - 0.5
    again = model.decode(*model.invert(x, steps=50), steps=50, eta=0.0)
    assert torch.allclose(again, x, atol=0.02)
    assert model.sample(2).shape == x.shape
    assert model.sample(1, steps=1).shape == (1, 3, 8, 8)    # a batch of one


def test_what_a_model_lacks_is_named():
    """A prior not yet fitted, codes without a VAE, z_cond without z: a ValueError that says what to do."""
    with pytest.raises(ValueError, match="prior"):
        DiffuseVAE(tiny()).sample(2)
    assert DiffuseVAE(tiny()).sample(2, prior="normal").shape == (2, 3, 8, 8)
    plain, x, z = DiffuseVAE(tiny(formulation="none")), torch.zeros(1, 3, 8, 8), torch.zeros(1, 2)
    for call in (lambda: plain.encode(x), lambda: plain.decode(z), lambda: plain.invert(x),
                 lambda: plain.sample_prior(1), lambda: plain.sample_prior(1, prior="normal")):
        with pytest.raises(ValueError, match="no VAE"):
            call()
    assert plain.mixture is None and plain.reconstruct(x) == (None, None)
    assert plain.refine(None, plain.noise(2)).shape == plain.sample(2).shape == (2, 3, 8, 8)
    model = DiffuseVAE(tiny(z_cond=True))
    with pytest.raises(ValueError, match="z_cond"):
        model.refine(torch.zeros(1, 3, 8, 8))
    assert model.refine(torch.zeros(1, 3, 8, 8), z=torch.zeros(1, 2)).shape == (1, 3, 8, 8)


def test_training_by_hand():
    """A new model is trainable and in eval mode; loss() gives gradients to the U-Net alone, vae(x) to the VAE."""
    def with_gradient(net):
        return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    model, x = DiffuseVAE(tiny(z_cond=True)), torch.rand(4, 3, 8, 8) * 2 - 1
    assert all(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    model.loss(x).backward()
    assert with_gradient(model.unet) == {"last.2.weight", "last.2.bias"}    # zeros at first: nothing gets past them
    perturbed(model.unet)
    model.loss(x).backward()
    assert with_gradient(model.unet) == {name for name, _ in model.unet.named_parameters()}
    assert all(p.grad is None for p in model.vae.parameters())
    x_hat, mu, logvar = model.vae(x)
    assert x_hat.shape == x.shape and mu.shape == logvar.shape == (4, 2)
    (x_hat.square().sum() + logvar.sum()).backward()
    assert with_gradient(model.vae) == {name for name, _ in model.vae.named_parameters()}


@pytest.mark.parametrize("formulation", ("1", "2", "none"))
def test_sampling_has_no_graph(formulation):
    """What encodes, decodes, refines, inverts and samples runs without gradients, and for no image at all."""
    model, x = DiffuseVAE(tiny(formulation=formulation)), torch.rand(2, 3, 8, 8) * 2 - 1
    results = [model.sample(2, prior="normal"), model.refine(None if formulation == "none" else x, model.noise(2))]
    if model.vae:
        with_prior(model)
        z, noise = model.invert(x)
        results += [z, noise, model.encode(x), model.encode(x, draw=True), model.decode(z), *model.reconstruct(x)]
        assert model.decode(z[:0]).shape == (0, 3, 8, 8) and model.sample_prior(0).shape == (0, 2)
    assert not any(y.requires_grad for y in results)
    for generator in (None, torch.Generator(), []):
        for eta in (0.0, 1.0):
            assert model.sample(0, generator, eta=eta).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError):
        model.sample(2, each_seeded(1))    # a generator for each image, or one


def test_reconstruct_draws_from_q():
    """reconstruct(x) is decode(z) and z with the mean and spread of q(z|x); z is encode's draw with that generator."""
    model, n = DiffuseVAE(tiny()), 4000
    perturbed(model.vae, 0.3)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    x_hat, z = model.reconstruct(x.expand(n, -1, -1, -1), torch.Generator().manual_seed(1))
    assert torch.equal(z, model.encode(x.expand(n, -1, -1, -1), True, torch.Generator().manual_seed(1)))
    assert torch.equal(x_hat, model.vae.decode(z))
    mu, logvar = (v.detach()[0] for v in model.vae.encode(x))
    sd = (logvar / 2).exp()
    assert ((z.mean(0) - mu).abs() < 5 * sd / n**0.5).all()    # 5 SE
    assert ((z.std(0) / sd - 1).abs() < 5 / (2 * n)**0.5).all()    # 5 SE of a standard deviation


@pytest.mark.parametrize("formulation", ("1", "2", "none"))
def test_state_dict_is_the_whole_model(formulation):
    """Another model of the same options that loads it samples the same images, the prior included, at once."""
    one, two = (perturbed(DiffuseVAE(tiny(formulation=formulation, z_cond=True, gmm_components=2))) for _ in range(2))
    if one.vae:
        two.load_state_dict(one.state_dict())    # the prior is not fitted yet, and that is told
        with pytest.raises(ValueError, match="prior"):
            two.sample(3)
        with_prior(one)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.sample(3, each_seeded(1, 2, 3)), two.sample(3, each_seeded(1, 2, 3)))
    if one.vae:
        z = one.sample_prior(5)
        assert torch.equal(one.mixture.log_prob(z), two.mixture.log_prob(z))


def test_options_for_one_call():
    """Keywords of decode are the sampler's for that call, the run's own stay; what Config refuses is refused."""
    model = with_prior(perturbed(DiffuseVAE(tiny()), 0.05))
    z, noise, before = torch.randn(2, 2), torch.randn(2, 3, 8, 8), copy.deepcopy(model.config)
    seeded = lambda: torch.Generator().manual_seed(1)
    got = model.decode(z, noise, seeded(), steps=5, eta=0.5, spacing="quad")
    net = lambda x, t: model.unet(x, t, model.vae.decode(z))
    assert torch.equal(got, model.diffusion.sample(net, noise, 5, 0.5, spacing="quad", generator=seeded()))
    assert model.config == before and not torch.equal(got, model.decode(z, noise, seeded()))
    for word, value in (("--eta must be between 0 and 1, got 1.1", dict(eta=1.1)),
                        ("--eta must be between 0 and 1, got nan", dict(eta=math.nan)),
                        ("--spacing must be one of uniform, trailing, quad, got even", dict(spacing="even")),
                        ("steps must be", dict(steps=1001)), ("--prior must be one of", dict(prior="flat")),
                        ("variance large needs", dict(variance="large", eta=1.0))):
        with pytest.raises(ValueError, match=word):
            model.sample(1, **value)
    for call in (lambda: model.decode(z, seed=3), lambda: model.sample(1, temperature=2),
                 lambda: model.refine(x_hat=z, lr=1),
                 lambda: model.sample_prior(1, num_samples=3), lambda: model.invert(noise, eta=1.0),
                 lambda: model.invert(noise, prior="normal")):
        with pytest.raises(TypeError):    # what a call does not heed is not ignored
            call()


def test_sampling_heeds_precision():
    """bf16 is another result than fp32, but by a few grey levels: 8 bits of mantissa, sums in fp32."""
    torch.manual_seed(0)
    model = with_prior(perturbed(DiffuseVAE(tiny(unet_width=16)), 0.05))
    z, noise = torch.randn(16, 2), torch.randn(16, 3, 8, 8)
    exact, half = (model.decode(z, noise, steps=10, precision=p) for p in ("fp32", "bf16"))
    gap = (exact - half).abs() * 127.5    # in grey levels
    assert half.dtype == torch.float32 and 0 < gap.mean() < 1.5 and gap.max() < 30


def test_inversion_heeds_precision():
    """The noise that bf16 finds is another than fp32's, by little; the codes, found outside it, are the same."""
    torch.manual_seed(0)
    model, x = perturbed(DiffuseVAE(tiny(unet_width=16)), 0.05), torch.rand(16, 3, 8, 8) - 0.5
    (z, exact), (same, half) = (model.invert(x, steps=10, precision=p) for p in ("fp32", "bf16"))
    gap = (exact - half).abs()    # noise is of order 1; 8 bits of mantissa err by 0.002, times ten steps
    assert torch.equal(z, same) and half.dtype == torch.float32 and 0 < gap.mean() < 0.05


def test_compiled_steps_are_one_graph(monkeypatch):
    """Traced, not generated: both stages and the sampler are one graph each, for every rate, decay, seed and t."""
    from torch._dynamo.testing import CompileCounter
    real = torch.compile
    for formulation, z_cond in (("1", True), ("2", False), ("none", False)):
        counters, c = [], tiny(formulation=formulation, z_cond=z_cond, compile="on", vae_steps=20, ddpm_steps=20,
                               dropout=0.1, batch_size=3)

        def traced(f, counters=counters, **options):
            counters.append(CompileCounter())
            return real(f, backend=counters[-1], fullgraph=True, **options)    # a break in the graph is an error

        torch._dynamo.reset()    # once: the second stage, of another batch, meets what the first left
        monkeypatch.setattr(torch, "compile", traced)
        model = finish(c, diffusevae.draw_shapes(8, 8, 0)[0])[0]
        monkeypatch.setattr(torch, "compile", real)
        assert [counter.frame_count for counter in counters] == [1] * len(counters)
        assert len(counters) == 1 + (model.vae is not None)
        torch._dynamo.reset()
        sampler = CompileCounter()
        model.unet.compile(backend=sampler, fullgraph=True)
        for eta in (0.0, 1.0):
            model.sample(3, steps=10, eta=eta, prior="normal")
        assert sampler.frame_count == 1


@pytest.mark.parametrize("formulation, z_cond", (("1", True), ("2", False), ("none", False)))
def test_no_tensor_on_the_wrong_device(formulation, z_cond):
    """On the meta device, where a CPU tensor in an operation is an error: training, sampling, inversion, the bound."""
    model = DiffuseVAE(tiny(formulation=formulation, z_cond=z_cond, timesteps=3)).to("meta")
    x, generators = torch.empty(4, 3, 8, 8, device="meta"), [torch.Generator().manual_seed(i) for i in range(4)]
    results = [model.loss(x), model.bits_per_dim(x, generators)["total"]]
    results[0].backward()
    if model.vae:
        with_prior(model)    # fitted on the CPU, as a checkpoint brings it
        results.append(model.vae.loss(x)[0])
        results[-1].backward()
        z = torch.empty(4, 2, device="meta")
        results += [model.decode(*model.invert(x), eta=0.0), model.refine(x, None, z, generators)]
    for eta, generator, prior in itertools.product((0.0, 1.0), (None, generators), ("gmm", "normal")):
        results.append(model.sample(4, generator, eta=eta, prior=prior))
    assert all(y.device.type == "meta" for y in results)


def test_joint_bound_adds_the_codes_price():
    """KL is torch.distributions' in bits a dimension; formulation 2 with a net that sees x_t - x_hat has 1's bound."""
    found = []
    for formulation in ("1", "2"):
        torch.manual_seed(0)
        model = perturbed(DiffuseVAE(tiny(formulation=formulation, timesteps=20)), 0.05).double().eval()
        x = diffusevae.to_float(diffusevae.draw_shapes(3, 8, 0)[0]).double()
        def net(x_t, t, x_hat, z, by=float(formulation == "2")):
            return 0.5 * x_t - 0.5 * by * x_hat + 0.1 * x_hat
        model.unet.forward = net
        found.append(model.bits_per_dim(x, torch.Generator().manual_seed(3)))
    mu, logvar = (v.detach() for v in model.vae.encode(x))
    kl = D.kl_divergence(D.Normal(mu, (logvar / 2).exp()), D.Normal(0 * mu, 1 + 0 * mu)).sum(1)
    assert torch.allclose(found[0]["KL"], kl / math.log(2) / 192, rtol=1e-9)
    for one, two in zip(found[0].values(), found[1].values()):
        assert torch.allclose(one, two, rtol=1e-9)
    assert torch.allclose(found[0]["total"], sum(v for k, v in found[0].items() if k != "total"))


@pytest.mark.parametrize("formulation", ("1", "2", "none"))
def test_bound_of_the_whole_model(formulation):
    """With a generator per image a batch gives each the bound it has alone; all terms are finite, one call per t."""
    model, calls = perturbed(DiffuseVAE(tiny(formulation=formulation, timesteps=40)), 0.05), []
    x = diffusevae.to_float(diffusevae.load_images("shapes", "", 8, "test")[0][:4])
    model.unet.register_forward_hook(lambda m, inputs, out: calls.append(inputs[1][0].item()))
    terms = model.bits_per_dim(x, each_seeded(0, 1, 2, 3))
    assert sorted(calls) == list(range(40)) and set(terms) == {"KL", "L_T", "L_t", "L_0", "total"}
    assert torch.allclose(terms["total"], sum(v for name, v in terms.items() if name != "total"))
    assert (terms["KL"] > 0).all() if model.vae else (terms["KL"] == 0).all()
    alone = [model.bits_per_dim(x[i:i + 1], each_seeded(i)) for i in range(4)]
    for name, values in terms.items():    # float32, in batches of another size
        assert values.shape == (4,) and values.isfinite().all()
        assert torch.allclose(values, torch.cat([one[name] for one in alone]), rtol=1e-4), name


# --------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------


def test_shapes():
    """Seeded, in range, of three kinds, and no training image among the test images."""
    load = lambda split: diffusevae.load_images("shapes", "", 16, split)
    (train, labels), (again, _), (test, _) = load("train"), load("train"), load("test")
    assert torch.equal(train, again) and train.dtype == torch.uint8 and train.shape[1:] == (3, 16, 16)
    assert set(labels.tolist()) == {0, 1, 2} and train.max() > 240 and train.min() < 60
    assert not {x.numpy().tobytes() for x in train} & {x.numpy().tobytes() for x in test}


def test_uint8_round_trip():
    """All 256 grey levels survive; what lies outside is clipped, halves are rounded."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(diffusevae.to_uint8(diffusevae.to_float(levels)), levels)
    assert diffusevae.to_uint8(torch.tensor([-9.0, 9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])).tolist() == [0, 255, 0, 1]


def test_folder_of_all_kinds(tmp_path, capsys):
    """Each kind of image becomes what a viewer shows; other files are named, pipes and dead links passed over."""
    root = tmp_path / "photos"
    (root / "ünter").mkdir(parents=True)
    red, wide = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 40, 3), np.uint8)
    red[..., 0], wide[:, 10:20], wide[:, 20:30] = 200, (255, 0, 0), (0, 0, 255)    # the middle is red | blue
    turned = Image.Exif()
    turned[0x0112] = 6    # to be shown turned a quarter clockwise
    Image.fromarray(red).save(root / "0rgb.png")
    Image.fromarray(red).convert("P").save(root / "1palette.png")
    Image.fromarray(red).convert("CMYK").save(root / "2cmyk.jpg", quality=100)
    Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)).save(root / "3deep.png")
    Image.fromarray(np.full((9, 9), 77, np.uint8)).save(root / "4grey.png")
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(root / "5clear.png")
    Image.fromarray(wide).save(root / "6wide.png")
    Image.fromarray(wide).save(root / "7turned.jpg", exif=turned, quality=100)
    Image.fromarray(red[:1, :1]).save(root / "ünter" / "8one.png")
    Image.fromarray(red[..., 0].astype(np.int32)).save(root / "range.tiff")    # its white is anywhere
    os.mkfifo(root / "pipe.png")    # reading it would wait forever
    (root / ".hidden.png").write_text("no image")
    (root / "empty.png").touch()
    (root / "note.txt").write_text("no image")
    (root / "broken.png").write_bytes((root / "6wide.png").read_bytes()[:60])
    (root / "nowhere.png").symlink_to(root / "gone.png")
    x = torch.cat([diffusevae.load_images("folder", root, 8, s)[0] for s in ("test", "train")]).float()    # by name
    out = capsys.readouterr().out
    skipped = ("note.txt", "broken.png", "empty.png", "range.tiff")
    assert "skipped 4 of 12 files" in out and all(name in out for name in skipped)
    assert not any(name in out for name in ("nowhere.png", "pipe.png", "hidden"))
    assert x.shape == (9, 3, 8, 8)
    for i, colour in enumerate(((200, 0, 0), (200, 0, 0), (200, 0, 0), (128,) * 3, (77,) * 3, (255,) * 3)):
        assert (x[i].mean((1, 2)) - torch.tensor(colour)).abs().max() < 6, i    # JPEG and CMYK are inexact
    assert x[6, 0, :, :3].min() > 200 and x[6, 2, :, 5:].min() > 200    # red on the left, blue on the right
    assert x[7, 0, :3].min() > 200 and x[7, 2, 5:].min() > 200    # red above, blue below
    assert (x[8, 0] - 200).abs().max() < 2


def test_every_twentieth_file_is_for_testing(tmp_path):
    """Of 41 files, by name, the first, 21st and 41st are the test split, all others the training split."""
    for grey in range(41):
        Image.fromarray(np.full((8, 8), grey, np.uint8)).save(tmp_path / f"{grey:02}.png")
    train, test = (diffusevae.load_images("folder", tmp_path, 8, s)[0][:, 0, 0, 0].tolist() for s in ("train", "test"))
    assert test == [0, 20, 40] and train == [grey for grey in range(41) if grey not in test]


@pytest.mark.parametrize("name, kind", (("cifar10", "CIFAR10"), ("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")))
def test_torchvision_data_sets(monkeypatch, name, kind):
    """uint8 [N, C, S, S], grey ones with one channel: at a set's own size as they are, else resized; labels kept."""
    import torchvision.datasets
    rng = np.random.default_rng(0)
    colour = name == "cifar10"
    raw = rng.integers(0, 256, (6, 32, 32, 3), np.uint8) if colour else torch.randint(256, (6, 28, 28)).byte()
    made = collections.namedtuple("Data", "data targets")(raw, [3, 1, 2, 0, 1, 2])
    monkeypatch.setattr(torchvision.datasets, kind, lambda root, train, download: made)
    x, labels = diffusevae.load_images(name, "d", raw.shape[1], "train")
    assert x.dtype == torch.uint8 and labels.tolist() == made.targets
    if name == "cifar10":
        assert torch.equal(x, torch.from_numpy(raw).permute(0, 3, 1, 2))
    else:
        assert torch.equal(x, raw[:, None])
    small = diffusevae.load_images(name, "d", 16, "test")[0]
    assert small.shape[2:] == (16, 16) and small.dtype == torch.uint8
    assert (small.float().mean() - x.float().mean()).abs() < 2    # averaged, not picked: noise keeps its mean


# --------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------


def command(*args, **options):
    """Run the command line with TINY options, and return its exit code."""
    words = [f"--{k.replace('_', '-')}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
             for k, v in {**TINY, **options}.items() if v is not None]
    try:
        return diffusevae.main([*map(str, args), *words])
    except SystemExit as e:    # argparse's own way
        return e.code


def files(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def small(**options):
    """Options of `command` for a stage that reads the model back from its run folder."""
    return {**{k: None for k in TINY}, "steps": 2, "num_samples": 4, **options}


def test_command_line_end_to_end(capsys):
    """Train, repeat without training, extend, sample: the run folder holds what the README says."""
    assert command("--run-dir", "r") == 0
    before = files("r")
    assert set(before) == {"model.pt", "config.json", "log.csv", "samples.png"}
    assert command("--run-dir", "r") == 0
    assert files("r")["model.pt"] == before["model.pt"] and files("r")["log.csv"] == before["log.csv"]
    assert command("--run-dir", "r", ddpm_steps=6) == 0
    rows = list(csv.DictReader(open("r/log.csv")))
    assert [(r["stage"], r["step"]) for r in rows] == [("vae", "4"), ("ddpm", "4"), ("ddpm", "6")]
    assert all(float(r["images_per_s"]) > 0 for r in rows)
    assert json.load(open("r/config.json"))["ddpm_steps"] == 6
    for name in ("config.json", "log.csv"):    # for people: nothing reads them
        os.remove(f"r/{name}")
    assert command("--run-dir", "r", "--stage", "sample", **small()) == 0
    model = DiffuseVAE.load("r", "cpu")
    assert model.decode(torch.zeros(3, 2), steps=1).shape == (3, 3, 8, 8) and not model.unet.training
    assert model.sample(3, steps=1).shape == (3, 3, 8, 8)    # from the mixture, which comes with the run
    capsys.readouterr()
    message = refusal(capsys, command("--run-dir", "r", vae_steps=9))
    assert "cannot continue VAE training" in message


def test_stages_one_by_one():
    """--stage vae trains one stage and its prior, --stage ddpm whatever is missing of both, without samples."""
    assert command("--run-dir", "r", "--stage", "vae") == 0
    state = torch.load("r/model.pt", weights_only=True)
    assert state["steps"] == dict(vae=4, ddpm=0) and state["model"]["mixture.means"].shape == (50, 2)
    assert command("--run-dir", "r", "--stage", "ddpm") == 0 and not Path("r/samples.png").exists()
    assert command("--run-dir", "s", "--stage", "ddpm") == 0 and alike("r/model.pt", "s/model.pt")


def test_another_mixture():
    """--gmm-components at a later command fits another prior, for that command alone; training on keeps it."""
    assert command("--run-dir", "r") == 0
    before = Path("r/model.pt").read_bytes()
    assert command("--run-dir", "r", "--stage", "sample", "--gmm-components", 3, **small()) == 0
    assert Path("r/model.pt").read_bytes() == before
    assert command("--run-dir", "r", "--gmm-components", 3) == 0
    assert DiffuseVAE.load("r", "cpu").mixture.means.shape == (3, 2)


def test_samples_do_not_depend_on_the_batch():
    """Image i is the same to a grey level in batches of 1, 3 and 7, with noise at every step."""
    assert command("--run-dir", "r", "--stage", "all") == 0
    shots = []
    for batch in (7, 1, 3):
        assert command("--run-dir", "r", "--stage", "sample", "--save-images", "--eta=1",
                       **small(num_samples=7, sample_batch=batch)) == 0
        shots.append(np.stack([np.asarray(Image.open(f"r/samples/{i:06}.png")).astype(int) for i in range(7)]))
        assert abs(shots[0] - shots[-1]).max() <= 1 and np.ptp(shots[-1], axis=0).max() > 9
        assert len(files("r/vae_samples")) == 7


def test_saved_images_replace_earlier_ones():
    """Of 5 PNGs and then 2 by another sampler 2 are left, as in a new folder; without a VAE none in vae_samples."""
    assert command("--run-dir", "r") == 0 and not Path("r/samples").exists()
    shutil.copytree("r", "fresh")
    words = ("--stage", "sample", "--save-images", "--run-dir")
    assert command(*words, "r", **small(num_samples=5)) == 0
    five = {folder: files(f"r/{folder}") for folder in ("samples", "vae_samples")}
    assert command(*words, "r", **small(num_samples=2, steps=3)) == 0
    assert command(*words, "fresh", **small(num_samples=2, steps=3)) == 0
    for folder, before in five.items():
        after = files(f"r/{folder}")
        assert len(before) == 5 and sorted(after) == ["000000.png", "000001.png"]
        assert after == files(f"fresh/{folder}")
    assert files("r/samples")["000000.png"] != five["samples"]["000000.png"]    # of three steps, not two
    assert command("--run-dir", "r", "--stage", "sample", **small()) == 0
    assert files("r/samples") == files("fresh/samples")
    assert command("--run-dir", "plain", "--formulation", "none", "--save-images") == 0
    assert len(files("plain/samples")) == 4 and not Path("plain/vae_samples").exists()


@pytest.mark.parametrize("words", ("--formulation 2 --z-cond",
                                   "--formulation none --predict eps --spacing quad --z-cond",
                                   "--prior normal --schedule geometric",
                                   "--variance large --timesteps 9 --steps 9 --eta 1 --formulation 2",
                                   "--schedule linear --eta 1 --precision bf16",
                                   "--attention 8,4 --formulation 1 --no-hflip --grad-clip 0",
                                   "--timesteps 20 --steps 20 --eta 1 --image-size 10",
                                   "--timesteps 5 --steps 5 --gmm-components 3"))
def test_options_work(words):
    """Unusual options, together, train and sample, and then sample again from the run folder alone."""
    given = [w[2:].replace("-", "_") for w in words.split() if w.startswith("--")]
    assert command("--run-dir", "r", *words.split(), **{k: None for k in given if k in TINY}) == 0
    assert Path("r/samples.png").exists()
    assert command("--run-dir", "r", "--stage", "sample", **small(steps=2)) == 0


def refusal(capsys, code):
    """The message on standard error of a command that ended with exit code 2: a sentence, after a usage if any."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("usage: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("diffusevae") or "error:" in lines[0], err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("words, named", (
    ("--dataset lsun", "argument --dataset: invalid choice: 'lsun'"),
    ("--dataset folder --data-dir nowhere --attention none", "no usable image in --data-dir nowhere to train on"),
    ("--image-size 9", "image_size 9 must be divisible by 2"), ("--attention 5", "no 5x5 feature maps"),
    ("--heads 3", "heads must divide"),
    ("--steps 0", "--steps must be between 1 and"), ("--steps -1", "--steps must be between 1 and"),
    ("--steps 1001", "steps must be between 1 and 1000"), ("--eta 1.5", "--eta must be between 0 and 1, got 1.5"),
    ("--eta -0.1", "--eta must be between 0 and 1, got -0.1"), ("--eta nan", "--eta must be between"),
    ("--lr inf", "--lr must be between"), ("--variance large", "variance large needs"),
    ("--variance large --eta 1", "variance large needs"), ("--variance large --steps 1000", "variance large needs"),
    ("--variance large --timesteps 20 --steps 20 --eta 0.9", "variance large needs"),
    ("--stage vae --variance large", "variance large needs"), ("--stage sample", "no model.pt in r"),
    ("--frobnicate 3", "--frobnicate"), ("--z-dim x", "--z-dim"),
    ("--unet-mults 0,1", "--unet-mults"), ("--unet-mults none", "unet_mults"),
    ("--unet-mults 1,x", "numbers value: '1,x'"), ("--timesteps 1", "--timesteps"),
    ("--schedule cubic", "argument --schedule: invalid choice"),
    ("--variance huge", "argument --variance: invalid choice"),
    ("--stage sample --run-dir nowhere", "no model.pt in nowhere"),
    ("--stage eval", "argument --stage: invalid choice"),
    ("--stage traverse", "argument --stage: invalid choice"), ("--help --eta 2", "--eta must be between"),
    ("--small 3", "unrecognized arguments: 3"),
    ("--formulation none --stage vae", "--formulation none has none"),
    ("--gmm-components 101", "--gmm-components 101 needs as many images, got 100"),
    pytest.param("--device cuda", "device cuda is not available",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
))
def test_refusals(capsys, words, named):
    """Bad input is one sentence that names it, exit code 2, and nothing is written."""
    given = [w[2:].replace("-", "_") for w in words.split() if w.startswith("--")]
    code = command("--run-dir", "r", *words.split(), **{k: None for k in given if k in TINY})
    assert named in refusal(capsys, code) and not Path("r").exists()


def test_too_large_a_new_mixture_is_refused(capsys):
    """More Gaussians than images, asked for when sampling from a trained run: told by name."""
    assert command("--run-dir", "r", "--gmm-components", 3) == 0
    message = refusal(capsys, command("--run-dir", "r", "--stage", "sample", "--gmm-components", 101))
    assert "101 gmm_components need at least 101 finite points, got 100" in message


def test_empty_folder_is_refused(capsys):
    """A folder without a usable image: the files are named."""
    Path("photos").mkdir()
    Path("photos/no.png").write_text("no image")
    Path("photos/nor.png").write_text("no image")
    code = command("--run-dir", "r", "--dataset", "folder", "--data-dir", "photos", "--attention", "none")
    out, err = capsys.readouterr()
    assert code == 2 and "nor.png" in out and "no usable image in --data-dir photos" in err and not Path("r").exists()


def test_another_model_is_refused(capsys):
    """A run folder of other options: all that differ are listed, by name, and no byte changes."""
    assert command("--run-dir", "r") == 0
    before = files("r")
    capsys.readouterr()
    message = refusal(capsys, command("--run-dir", "r", "--formulation", "2", "--dataset", "mnist", z_dim=3))
    assert "options conflict with the saved run: r has " in message and "--formulation 1, not 2" in message
    assert all(name in message for name in ("--formulation", "--dataset", "--z-dim")) and "--heads" not in message
    assert files("r") == before


def test_stages_need_the_second_stage(capsys):
    """A run with a VAE alone is refused by the stage that samples, and by load()."""
    assert command("--run-dir", "r", "--stage", "vae") == 0
    capsys.readouterr()
    message = refusal(capsys, command("--run-dir", "r", "--stage", "sample", **small()))
    assert "the U-Net in r is not trained yet" in message
    with pytest.raises(ValueError, match="the U-Net in r is not trained yet"):
        DiffuseVAE.load("r")
    model, state = diffusevae.load_run("r")    # to train on, it is welcome
    assert state["steps"] == dict(vae=4, ddpm=0) and model.mixture.fitted


class Bomb:
    """Pickled, a call of os.mkdir."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize("stage", ("sample", "ddpm", "all"))
def test_checkpoints_of_another_format_are_refused(capsys, stage):
    """The version before had no key `format`: named as format 1, neither called damaged nor written over."""
    assert command("--run-dir", "r") == 0
    saved = torch.load("r/model.pt", weights_only=True)
    assert saved.keys() == {"format", "options", "model", "steps", "log", "stage", "optimizer", "weights"}
    assert saved["format"] == 2
    del saved["format"]
    for version in (1, 3):
        torch.save(saved if version == 1 else {**saved, "format": version}, "r/model.pt")
        before = Path("r/model.pt").read_bytes()
        capsys.readouterr()
        message = refusal(capsys, command("--run-dir", "r", "--stage", stage, **small()))
        assert f"checkpoint format {version}" in message and "r/model.pt" in message and "damaged" not in message
        with pytest.raises(ValueError, match=f"checkpoint format {version}"):
            DiffuseVAE.load("r", "cpu")
        assert Path("r/model.pt").read_bytes() == before


def test_damaged_checkpoints_are_refused(capsys):
    """Cut, flipped, empty, foreign or with code inside: one sentence, no code run, and the file stays as it is."""
    assert command("--run-dir", "r") == 0
    capsys.readouterr()
    path = Path("r/model.pt")
    whole = path.read_bytes()
    torch.save(dict(bomb=Bomb()), "bomb.pt")
    torch.save(dict(some="thing"), "other.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    rng = np.random.default_rng(0)
    damaged = [b"", whole[:100], whole[:len(whole) // 2], whole[:-1], Path("bomb.pt").read_bytes(),
               Path("other.pt").read_bytes(), Path("tensor.pt").read_bytes()]
    for at in rng.integers(200, len(whole) * 3 // 4, 20):    # in the tensors or the padding before them
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
    good, accepted = flat(torch.load(path, weights_only=True, mmap=True)), 0
    for data in damaged:
        path.write_bytes(data)
        code = diffusevae.main("--run-dir r --stage sample --steps 1 --num-samples 1".split())
        if code == 0:    # a bit of padding, which means nothing
            loaded, accepted = flat(torch.load(path, weights_only=True, mmap=True)), accepted + 1
            assert all(torch.equal(v, loaded[k]) if torch.is_tensor(v) else v == loaded[k] for k, v in good.items())
            capsys.readouterr()
        else:
            assert "model.pt" in refusal(capsys, code) and path.read_bytes() == data
    assert accepted < 15 and not Path("boom").exists()


@pytest.mark.parametrize("change", ("rename", "drop", "shape", "options", "steps", "mixture", "log", "bomb"))
@pytest.mark.parametrize("stage", ("sample", "all"))
def test_edited_checkpoints_are_refused(capsys, change, stage):
    """A checkpoint opened, changed so that it fits no longer, and saved anew: one sentence, and no code in it runs."""
    assert command("--run-dir", "r", "--stage", "ddpm") == 0
    state = torch.load("r/model.pt", weights_only=True)
    weights, name = state["model"], "unet.middle.0.norm.weight"
    if change in ("drop", "rename"):
        weights["unet.other"] = weights.pop(name)
    if change == "drop":
        del weights["unet.other"]
    if change == "log":
        del state["log"]
    weights |= dict(shape={name: weights[name][:1] if change == "shape" else None}, bomb={"other": Bomb()},
                    mixture={"mixture.means": 5}).get(change, {})
    state |= dict(options=dict(options={**state["options"], "heads": 3}), steps=dict(steps=3)).get(change, {})
    torch.save(state, "r/model.pt")
    capsys.readouterr()
    assert "model.pt" in refusal(capsys, diffusevae.main(f"--run-dir r --stage {stage}".split()))
    assert not Path("boom").exists()


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(capsys, monkeypatch):
    """Missing rights are the folder's owner's to mend, and the file is not to be moved away."""
    assert command("--run-dir", "r") == 0
    capsys.readouterr()

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(diffusevae.zipfile, "ZipFile", denied)
    message = refusal(capsys, command("--run-dir", "r", "--stage", "sample"))
    assert "Permission denied" in message and "model.pt" in message and "damaged" not in message


def test_a_loss_that_is_not_finite_stops(capsys, monkeypatch):
    """The last good row is told, and the checkpoint before it is kept and can be continued."""
    assert command("--run-dir", "r", "--save-every", 2, ddpm_steps=4) == 0
    before, loss = Path("r/model.pt").read_bytes(), DiffuseVAE.loss
    calls = iter(range(99))
    broken = lambda self, x, unet=None: loss(self, x, unet) * (math.nan if next(calls) == 2 else 1)
    monkeypatch.setattr(DiffuseVAE, "loss", broken)
    capsys.readouterr()
    message = refusal(capsys, command("--run-dir", "r", "--log-every", 4, "--save-every", 100, ddpm_steps=12))
    assert "non-finite ddpm loss after step 4; try a lower" in message and Path("r/model.pt").read_bytes() == before
    monkeypatch.setattr(DiffuseVAE, "loss", loss)
    assert command("--run-dir", "r", ddpm_steps=12) == 0


def test_killed_runs_end_alike():
    """Killed without warning in both stages and while sampling, a run ends with the files of an undisturbed one."""
    words = ["--image-size=8", "--unet-width=4", "--heads=1", "--vae-width=2", "--z-dim=2", "--vae-steps=40",
             "--ddpm-steps=40",
             "--batch-size=4", "--vae-batch=4", "--steps=2", "--eta=1", "--dropout=0.1", "--save-every=7",
             "--log-every=1",
             "--num-samples=90", "--sample-batch=10", "--save-images", "--device=cpu"]
    few = "import sys, torch, diffusevae as d; torch.set_num_threads(1); f = d.draw_shapes; " \
          "d.draw_shapes = lambda n, size, seed: f(n // 500 if n > 5000 else n, size, seed); sys.exit(d.main())"
    env, kills = {**os.environ, "PYTHONPATH": str(Path(diffusevae.__file__).parent)}, 0
    for start in ("vae 9/40", "ddpm 1/40", "ddpm 30/40", "sampled 40 of 90 images", ""):    # where to kill
        run = subprocess.Popen([sys.executable, "-u", "-c", few, *words, "--run-dir=r"], env=env, text=True,
                               stdout=subprocess.PIPE)
        for line in run.stdout:
            if start and line.startswith(start):
                run.kill()
                kills += 1
                break
        run.stdout.read(), run.wait()
    assert diffusevae.main([*words, "--run-dir=clean"]) == 0 and kills == 4 and run.returncode == 0
    assert alike("r/model.pt", "clean/model.pt")
    one, two = ([row[:-1] for row in csv.reader(open(f"{r}/log.csv"))] for r in ("r", "clean"))
    assert one == two and len(one) == 81
    assert files("r/samples") == files("clean/samples") and len(files("r/samples")) == 90
    assert files("r/vae_samples") == files("clean/vae_samples")


def test_full_disk(capsys):
    """A disk that takes no more: one sentence, the checkpoint before stays whole, nothing half-written stays."""
    resource = pytest.importorskip("resource")
    assert command("--run-dir", "r") == 0
    before, (soft, hard) = Path("r/model.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        code = command("--run-dir", "r", ddpm_steps=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("could not write .*model.pt .* checkpoint is unchanged", refusal(capsys, code))
    assert Path("r/model.pt").read_bytes() == before and not list(Path("r").glob("*.tmp"))
    assert command("--run-dir", "r", ddpm_steps=9) == 0


def test_lack_of_memory_is_one_sentence(capsys, monkeypatch):
    """What CUDA and the CPU raise for want of memory: the options to lower are named, the checkpoint is kept."""
    assert command("--run-dir", "r") == 0
    before, loss = Path("r/model.pt").read_bytes(), DiffuseVAE.loss
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory"),
                  MemoryError()):
        def fail(self, x, unet=None, error=error):
            raise error
        monkeypatch.setattr(DiffuseVAE, "loss", fail)
        capsys.readouterr()
        message = refusal(capsys, command("--run-dir", "r", ddpm_steps=9))
        assert "out of memory; lower --batch-size, --vae-batch or --sample-batch" in message
        assert Path("r/model.pt").read_bytes() == before
    monkeypatch.setattr(DiffuseVAE, "loss", loss)
    assert command("--run-dir", "r", ddpm_steps=9) == 0


def test_every_option_at_its_edges():
    """Each number's smallest and largest value are taken, each word is; what lies beyond is refused by name."""
    for f in diffusevae.dataclasses.fields(Config):
        words, limits = f.metadata["choices"], f.metadata["range"]
        assert not (words and f.type is not str)
        if words:
            assert all(getattr(Config(**{f.name: word}), f.name) == word for word in words)
            beyond = ("", words[0] + "x", 3, None)
        elif limits and f.type in (int, float, tuple):
            wrap = (lambda v: (1, v)) if f.type is tuple else (lambda v: v)
            for value in limits:
                assert getattr(Config(**{f.name: wrap(value)}), f.name) == wrap(value)
            gap = 1 if f.type is int else 1e-7
            beyond = [wrap(v) for v in (limits[0] - gap, limits[1] + gap * max(1, limits[1]), math.nan, math.inf,
                                        -math.inf)]
        else:
            continue
        for value in beyond:
            with pytest.raises(ValueError, match=diffusevae.flag(f.name)):
                Config(**{f.name: value})


def test_help_speaks_to_people(capsys):
    """--help: a usage of one line, each option in its group with the value of that command, no type names."""
    pages = {}
    for words in ("", "--dataset cifar10", "--dataset cifar10 --small --lr 0.5", "--dataset folder --image-size 128"):
        assert command(*words.split(), "--help", **{k: None for k in TINY}) == 0
        page = capsys.readouterr().out
        usage = "usage: python diffusevae.py [--dataset NAME] [--OPTION VALUE ...]\n\nDiffuseVAE in one file"
        assert page.startswith(usage)
        titles = re.findall(r"^(\w+ options):$", page, re.M)
        assert titles == ["run options", "model options", "training options", "sampling options"]
        options = page[page.index("run options:"):]
        assert not re.search(r"\b(tuple|str|int|float)\b", options)
        # from each option to the next or to a title: one line, however wide the terminal
        parts = [" ".join(part.split()) for part in re.split(r"^(?=  --)|\n\n", options, flags=re.M)]
        pages[words] = {part.split()[0].rstrip(","): part for part in parts if part.startswith("--")}
        for f in diffusevae.dataclasses.fields(Config):
            part = pages[words][diffusevae.flag(f.name)]
            assert re.fullmatch(r"--.+ \(default: [^()]+\)", part) and f.metadata["help"] in part, f.name
            assert not f.metadata["choices"] or "{" + ",".join(f.metadata["choices"]) + "}" in part, f.name
    default = lambda words, option: re.search(r"\(default: (.+)\)$", pages[words][option])[1]
    small, large, cifar = "--dataset cifar10 --small --lr 0.5", "--dataset folder --image-size 128", "--dataset cifar10"
    assert default("", "--unet-mults") == "1,2" and default("", "--attention") == "none"
    assert default(cifar, "--unet-mults") == "1,2,2,2" and default(cifar, "--attention") == "16"
    assert default(large, "--unet-mults") == "1,2,2,3,4"
    assert [default(small, name) for name in ("--unet-mults", "--attention", "--lr")] == ["1,2,2", "none", "0.5"]
    assert default(small, "--small") == "True" and default(cifar, "--small") == "False"
    assert default(small, "--spacing") == "quad" and default(small, "--run-dir") == "runs/cifar10-small"


@pytest.mark.parametrize("dataset, asked, expected", (
    ("folder", dict(image_size=32), dict(unet_mults=(1, 2, 2, 2), unet_width=128, batch_size=128, lr=2e-4, steps=50)),
    ("folder", dict(image_size=64), dict(unet_mults=(1, 2, 2, 2, 4), unet_width=128, batch_size=32, lr=2e-4)),
    ("folder", dict(image_size=128), dict(unet_mults=(1, 2, 2, 3, 4), unet_width=128, batch_size=8, lr=2e-5)),
    ("folder", dict(image_size=256), dict(unet_mults=(1, 1, 2, 2, 4, 4), unet_width=128, batch_size=8, lr=2e-5)),
    ("folder", dict(image_size=32, small=True), dict(unet_mults=(1, 2, 2), unet_width=48, batch_size=32, attention=())),
    ("folder", dict(image_size=64, small=True), dict(unet_mults=(1, 2, 2), unet_width=32, batch_size=16, attention=())),
    ("cifar10", dict(), dict(unet_mults=(1, 2, 2, 2), unet_width=128, attention=(16,), predict="eps", steps=50,
                             z_dim=512)),
    ("cifar10", dict(small=True), dict(unet_mults=(1, 2, 2), unet_width=48, attention=(), predict="v", steps=10,
                                       z_dim=128)),
    ("mnist", dict(), dict(unet_mults=(1, 2, 2), unet_width=24, batch_size=16, image_size=28, channels=1)),
    # small already
    ("mnist", dict(small=True), dict(unet_mults=(1, 2, 2), unet_width=24, batch_size=16, image_size=28)),
    ("shapes", dict(small=True), dict(unet_mults=(1, 2), unet_width=32, batch_size=16, image_size=16, channels=3)),
))
def test_presets(dataset, asked, expected):
    """Each data set, image size and --small has its own network, which can be built; options given take precedence."""
    c = Config.preset(dataset, **asked)
    assert {name: getattr(c, name) for name in expected} == expected
    with torch.device("meta"):
        x = torch.empty(1, c.channels, c.image_size, c.image_size)
        net = UNet(c.image_size, c.channels, c.channels, c.unet_width, c.unet_mults, c.res_blocks, c.attention, c.heads)
        assert net(x, torch.zeros(1), x).shape == x.shape
    over = dict(unet_mults=(1, 3), batch_size=5, timesteps=7)
    c = Config.preset(dataset, **asked, **over)
    assert {name: getattr(c, name) for name in over} == over and c.steps == 7    # no more steps than timesteps


def test_small_networks(capsys, monkeypatch):
    """--small changes the preset of a run, which remembers it; a later command that says otherwise is refused."""
    monkeypatch.setattr(diffusevae, "load_split", lambda c, split: torch.zeros(60, 3, 8, 8, dtype=torch.uint8))
    words = {"on": ("--small",), "off": ("--no-small", "--attention", "none")}
    for run, other in (("on", "off"), ("off", "on")):
        assert command("--run-dir", run, "--dataset", "cifar10", *words[run], ddpm_steps=2) == 0
        before = files(run)
        assert command("--run-dir", run, ddpm_steps=2) == 0 and files(run)["model.pt"] == before["model.pt"]
        c = DiffuseVAE.load(run, "cpu").config
        assert (c.small, c.predict, c.schedule) == ((True, "v", "cosine") if run == "on" else (False, "eps", "linear"))
        capsys.readouterr()
        message = refusal(capsys, command("--run-dir", run, words[other][0], ddpm_steps=9))
        assert f"{run} has --small {c.small}, not {not c.small}; " in message
        assert files(run)["model.pt"] == before["model.pt"]
    assert command("--dataset", "cifar10", "--small", ddpm_steps=2) == 0    # in a folder of its own
    assert [path.name for path in Path("runs").iterdir()] == ["cifar10-small"]


def test_each_folder_has_a_run_of_its_own(monkeypatch):
    """Without --run-dir a second --data-dir trains a model of its own, apart from the first one's."""
    monkeypatch.setattr(diffusevae, "load_split", lambda c, split: torch.zeros(60, 3, 8, 8, dtype=torch.uint8))
    for folder in ("photos/cats", "dogs/", "photos/cats"):
        assert command("--dataset", "folder", "--data-dir", folder, "--attention", "none", ddpm_steps=2) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["folder-cats", "folder-dogs"]


def test_a_slow_machine_is_told(capsys, monkeypatch):
    """On a CPU cifar10 and folder say that their networks are sized for a GPU; --small and small data sets do not."""
    monkeypatch.setattr(diffusevae, "load_split", lambda c, split: torch.zeros(60, c.channels, 8, 8, dtype=torch.uint8))
    for i, (dataset, small, told) in enumerate((("cifar10", False, 1), ("folder", False, 1), ("cifar10", True, 0),
                                                ("folder", True, 0), ("mnist", False, 0), ("shapes", False, 0))):
        c = Config.preset(dataset, **{**TINY, "attention": (), "formulation": "none", "ddpm_steps": 1, "small": small,
                                      "run_dir": f"r{i}"})
        capsys.readouterr()
        diffusevae.train(DiffuseVAE(c), new_state())
        lines = [line for line in capsys.readouterr().out.splitlines() if "sized for a GPU" in line]
        assert len(lines) == told and all("CPU" in line and "--small" in line for line in lines), (dataset, small)


def test_random_command_lines(capsys, monkeypatch):
    """Options drawn at random, good and bad: done, or one sentence; weights finite, nothing half-written."""
    rng = np.random.default_rng(5)
    values = dict(image_size="8 12 16 7 x", z_dim="1 3 0", unet_mults="1 1,2 2,3 0 1,,2", res_blocks="1 2 0",
                  attention="none 8 4 3 auto", formulation="1 2 none 3", vae_batch="1 9 0",
                  heads="1 2 3 0", dropout="0 0.9 1", timesteps="2 5 40 1", schedule="linear cosine geometric sine",
                  predict="eps v x", lr="1e-9 1 1000 0 nan", vae_lr="1e-9 1000 -1", ema="0 0.999 1",
                  seed="0 4294967295 -1",
                  warmup="0 1000000 -1", grad_clip="0 1e-3 -1", precision="auto fp32 bf16 fp16", steps="1 2 40 0",
                  eta="0 0.5 1 2", spacing="uniform quad trailing log", variance="small large huge",
                  prior="normal gmm flat",
                  gmm_components="1 5 0", num_samples="1 5 0", sample_batch="1 65536 0", stage="all vae ddpm fit",
                  save_every="1 1000 0", log_every="1 1000 0", kl_weight="0 1 -1")
    codes, undrawn = collections.Counter(), types.SimpleNamespace(savefig=lambda *args, **options: None)
    monkeypatch.setattr(diffusevae, "draw_grids", lambda *args: undrawn)    # slow, and tested elsewhere
    for i in range(60):
        given = {k: rng.choice(values[k].split()) for k in rng.choice(list(values), 4, replace=False)}
        flags = rng.choice(["--z-cond", "--no-hflip", "--save-images", "--hflip", "--small"], 2, replace=False)
        capsys.readouterr()
        code = command("--run-dir", f"r{i}", *flags, **{"timesteps": 20, **given})
        codes[code] += 1
        if code:
            refusal(capsys, code)
        for path in Path(f"r{i}").glob("*.pt"):
            leaves = flat(torch.load(path, weights_only=True)).values()
            assert all(v.isfinite().all() for v in leaves if torch.is_tensor(v)), given
        assert not list(Path(f"r{i}").rglob("*.tmp"))
    assert codes[0] > 10 and codes[2] > 10 and set(codes) == {0, 2}


# --------------------------------------------------------------------------------------------------------
# The file as a library
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, use", (
    ("VAE", "VAE(8, 3, 4, 4).loss(torch.zeros(2, 3, 8, 8))[0]"),
    ("UNet ResBlock Attention zero_module group_norm timestep_embedding",
     "UNet(8, 3, 3, 8, (1, 2), 1, heads=1)(x, torch.zeros(2), x)"),
    ("GaussianDiffusion timesteps_for randn extract discretized_log_prob",
     "GaussianDiffusion(20).sample(lambda x, t: x, x, 3, eta=1.0)"
     " + GaussianDiffusion(20).bits_per_dim(lambda x, t: x, x)['total'].mean()"),
    ("GaussianMixture k_means randn", "GaussianMixture(2, 3).fit(torch.randn(50, 3)).sample(5)"),
))
def test_pieces_work_pasted_alone(names, use):
    """A class and its small helpers run in an empty file that imports torch."""
    pieces = "\n\n".join(inspect.getsource(getattr(diffusevae, name)) for name in names.split())
    head = "import math\nimport torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n\n"
    space = {}
    exec(f"{head}{pieces}\nx = torch.zeros(2, 3, 8, 8)\nresult = {use}", space)
    assert space["result"].isfinite().all()


def test_part_one_needs_torch_alone():
    """The first part, run as a file of its own, defines the model; any object with its options builds a DiffuseVAE."""
    source = Path(diffusevae.__file__).read_text().split("# Part two")[0]
    space = dict(__name__="part_one")
    exec(compile(source.rsplit("# ====", 1)[0], "part_one", "exec"), space)
    names = {"VAE", "UNet", "GaussianDiffusion", "GaussianMixture", "DiffuseVAE", "randn", "generators"}
    assert names <= space.keys()
    x = torch.zeros(2, 3, 8, 8)
    model = space["DiffuseVAE"](tiny())
    assert model.loss(x).isfinite() and model.sample(2, prior="normal").shape == x.shape
    assert model.sample(2, space["generators"](0, "sample", [3, 4]), prior="normal").shape == x.shape
    assert not {"argparse", "np", "Config", "train"} & space.keys()


def test_notebook(tmp_path, monkeypatch):
    """train.ipynb, shortened, runs from top to bottom in a fresh kernel, asserts and all, and leaves no file behind."""
    import nbclient, nbformat
    home = Path(diffusevae.__file__).parent
    for name, value in dict(DIFFUSEVAE_FAST="1", PYTHONPATH=str(home), OMP_NUM_THREADS="1").items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(home / "train.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=200, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 18 and not list(tmp_path.iterdir())


def test_notebook_as_stored():
    """The stored outputs are one run from top to bottom, without error or warning, small, every cell short."""
    book = json.loads(Path(diffusevae.__file__).with_name("train.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert 30 <= len(book["cells"]) <= 60 and max(len(cell["source"]) for cell in code) <= 20    # lines, empty ones too
    assert max(len(line.rstrip("\n")) for cell in code for line in cell["source"]) <= 104    # what JupyterLab shows
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert Path(diffusevae.__file__).with_name("train.ipynb").stat().st_size < 3e6
    headings = [line for cell in book["cells"] for line in cell["source"] if line.startswith("## ")]
    numbers = [int(line.split()[1]) for line in headings[:-1]]    # the last one is where to go next
    assert numbers == list(range(1, len(headings))) and {"1", "2", "3", "4", "5", "7", "8"} == set(
        re.findall(r"\d", " ".join(re.findall(r"\(file, (.*?)\)", " ".join(headings)))))    # sections of the file


def test_import_has_no_side_effects():
    """Importing prints nothing, writes nothing, and leaves torchvision and matplotlib for later."""
    code = "import sys, diffusevae; print([m for m in ('torchvision', 'matplotlib', 'PIL') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(Path(diffusevae.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "[]\n" and not done.stderr and not os.listdir()
