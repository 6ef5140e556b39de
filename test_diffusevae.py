"""Tests of diffusevae.py against independent truth: closed forms, numerical integration, textbook formulas, files.

    python -m pytest test_diffusevae.py

Offline and on the CPU, but for one test that wants CUDA. "5 SE" in a comment is five standard errors of a Monte Carlo
mean: a right program misses that once in two million draws, and the seeds are fixed besides.
"""
import base64, collections, copy, csv, functools, inspect, io, itertools, json, math, os, re, runpy, shutil, signal
import subprocess, sys, types, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributions as D
from torch.utils._python_dispatch import TorchDispatchMode

import diffusevae
from diffusevae import (VAE, Config, DiffuseVAE, GaussianDiffusion, GaussianMixture, UNet, new_state, randn,
                        timesteps_for, train_ddpm, train_vae)

torch.set_num_threads(1)    # networks this small are slower on two threads, and far slower beside other work
SAVE_FIGURE = diffusevae.save_figure
SPACINGS = ("uniform", "trailing", "quad")
TINY = dict(image_size=8, unet_width=4, unet_mults=(1, 2), res_blocks=1, heads=1, vae_width=2, z_dim=2, vae_steps=4,
            ddpm_steps=4, batch_size=4, vae_batch=4, steps=2, num_samples=4, device="cpu")


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, from one seed; the big `shapes` are few, and figures are empty files."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blank = lambda fig, path, *done: diffusevae.try_to_write(path, Path.touch, *done)    # rendering takes a second
    monkeypatch.setattr(diffusevae, "save_figure", blank)
    draw = diffusevae.draw_shapes
    few = lambda n, size, seed: draw(n // (500 if n > 5000 else 1), size, seed)
    monkeypatch.setattr(diffusevae, "draw_shapes", few)


@pytest.fixture
def rendered(small_world, monkeypatch):
    """Figures are drawn after all."""
    monkeypatch.setattr(diffusevae, "save_figure", SAVE_FIGURE)


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


def ancestral_step(d, x_t, x0, t, s, shift):
    """x_s after one step of DDPM from x_t, with a network that knows x_0: the x_s less its noise, and the variance."""
    a, variance = d.alpha_bar_at(t), d.posterior_variance(t, s)
    d.step_pairs = lambda *options: [(t, s)]
    x_s = d.sample(lambda x, t: (x - shift - a**0.5 * x0) / (1 - a)**0.5, x_t - shift, 1, 1.0, shift=shift, clip=False,
                   generator=torch.Generator().manual_seed(8))
    drawn = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    return x_s - variance**0.5 * drawn, variance


@pytest.mark.parametrize("shift", (0.0, 0.4))
@pytest.mark.parametrize("t, s", ((1, 0), (9, 8), (9, 3), (15, 1), (19, 0)))
def test_ancestral_sampling_is_bayes(t, s, shift):
    """Mean and variance of x_s given x_t, x_0 are those of q(x_s | x_0) q(x_t | x_s), normalised on a fine grid."""
    betas, x0, x_t = np.linspace(0.01, 0.6, 20), 0.6, -0.3
    a_t, a_s = np.prod(1 - betas[:t + 1]), np.prod(1 - betas[:s + 1])
    y = np.linspace(-8, 8, 400_001)    # a density far below 1e-12 at its ends, smooth: the sum is exact to rounding
    b = 1 - a_t / a_s
    log = -(y - a_s**0.5 * x0)**2 / (2 * (1 - a_s)) - (x_t - shift - (1 - b)**0.5 * y)**2 / (2 * b)
    p = np.exp(log - log.max())
    p /= p.sum()
    mean, like = (p * y).sum(), torch.full((1, 1), x_t, dtype=torch.float64)
    got = ancestral_step(GaussianDiffusion(20, 0.01, 0.6), like, x0, t, s, like * 0 + shift)
    assert got[0].item() == pytest.approx(mean + shift, abs=1e-9)
    assert got[1] == pytest.approx((p * (y - mean)**2).sum(), rel=1e-8)


def test_ancestral_sampling_ends():
    """s = -1 is x_0 itself, with no variance and no shift."""
    d, x0, x_t, shift = GaussianDiffusion(20, 0.01, 0.6), double(3, 2), double(3, 2), double(3, 2)
    for t in (0, 7):
        mean, variance = ancestral_step(d, x_t, x0, t, -1, shift)
        assert torch.allclose(mean, x0, atol=1e-14) and variance == 0


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


@pytest.mark.parametrize("shift", (0.0, 0.4))
@pytest.mark.parametrize("predict", ("eps", "v"))
def test_loss_of_any_network(predict, shift):
    """The loss is the mean squared error to eps or v at the x_t shown, t is spread evenly; data have any shape."""
    d, x0, seen = exact(GaussianDiffusion(30, predict=predict)), double(60, 5), []
    net = lambda x, t: seen.append((x, t)) or wavy(x, t)
    loss, ((x_t, t),) = d.loss(net, x0, shift), seen
    a = d.alpha_bar[t, None]
    noise = (x_t - shift - a.sqrt() * x0) / (1 - a).sqrt()
    target = noise if predict == "eps" else a.sqrt() * noise - (1 - a).sqrt() * x0
    assert loss.item() == pytest.approx((wavy(x_t, t) - target).square().mean().item(), rel=1e-9)
    assert torch.bincount(t, minlength=30).tolist() == [2] * 30
    assert abs(noise.mean()) < 5 / 300**0.5 and abs(noise.var() - 1) < 5 * (2 / 300)**0.5    # 5 SE


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
        e = GaussianDiffusion(50, 2e-3, 0.4)
        one, two = ancestral_step(e, plain, x0, i, s, 0), ancestral_step(e, plain + shift, x0, i, s, shift)
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
    ("variance must be small", lambda: GaussianDiffusion(100).sample(wavy, double(1, 1), 100, 0.5, variance="large")),
    ("variance must be small", lambda: GaussianDiffusion(100).sample(wavy, double(1, 1), 99, 1.0, variance="large")),
    ("variance must be small", lambda: GaussianDiffusion(100).sample(wavy, double(1, 1), 100, 1.0, variance="Large"))))
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


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_attention_suits_the_fused_kernels(monkeypatch, memory_format):
    """q, k and v are contiguous: fused kernels need a contiguous last dimension, some on MPS all of them."""
    real, packed = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv: packed.extend(a.is_contiguous() for a in qkv) or real(*qkv))
    layer = diffusevae.Attention(8, 2).to(memory_format=memory_format)
    layer(torch.randn(2, 8, 3, 4).contiguous(memory_format=memory_format))
    assert packed == [True] * 3


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


def test_unet_refuses_what_it_does_not_expect():
    """x_hat or z for a U-Net without them, and none for one with: ValueErrors, not an input ignored."""
    x, t, z = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 2)
    for cond, z_dim in itertools.product((0, 3), (0, 2)):
        net = UNet(8, 3, cond, 4, (1,), heads=1, z_dim=z_dim)
        for x_hat, code in itertools.product((None, x), (None, z)):
            if (x_hat is None) == (cond == 0) and (code is None) == (z_dim == 0):
                assert net(x, t, x_hat, code).shape == x.shape
            else:
                with pytest.raises(ValueError, match="x_hat.* z "):
                    net(x, t, x_hat, code)


@pytest.mark.parametrize("channels, groups", ((6, 1), (48, 4), (128, 32)))
def test_group_norm(monkeypatch, channels, groups):
    """In fp32 it is PyTorch's; under autocast half precision stays what it is, channels last too, near the exact."""
    ours, theirs = diffusevae.GroupNorm(channels), torch.nn.GroupNorm(groups, channels)
    theirs.load_state_dict(perturbed(ours).state_dict())
    x = (3 * torch.randn(2, channels, 4, 4) + 1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours(x), theirs(x)) and ours(x).is_contiguous(memory_format=torch.channels_last)
    weight, bias, seen = ours.weight.detach().double(), ours.bias.detach().double(), []
    real = F.group_norm

    def watched(x, groups, weight=None, bias=None, eps=1e-5):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype, getattr(weight, "dtype", None)))
        return real(x, groups, weight, bias, eps)

    monkeypatch.setattr(F, "group_norm", watched)
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        half = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = ours(half)
        assert seen.pop() == (False, dtype, dtype)    # CUDA's autocast would do it in fp32, and turn the layout over
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        white = real(half.double(), groups)
        exact = white * weight[:, None, None] + bias[:, None, None]
        # weight, bias and result are rounded by 2^-bits of themselves at most, statistics are in fp32
        bound = 2.0**-bits * ((white * weight[:, None, None]).abs() + bias.abs()[:, None, None] + exact.abs())
        assert ((y - exact).abs() <= 1.01 * bound + 1e-4).all()
        y.float().sum().backward()
        assert ours.weight.grad.dtype == torch.float32 and half.grad.dtype == dtype


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
    found = GaussianMixture(3, 2).double().fit(known_mixture().sample((n,)), generator=torch.Generator().manual_seed(0))
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
    g = torch.Generator().manual_seed(1)
    mixture = GaussianMixture(8, 3).double().fit(z, iterations=60, tolerance=0.0, generator=g)
    steps = np.diff(mixture.history)
    assert mixture.fitted
    assert len(steps) > 5 and steps[:-1].min() > -1e-6 and steps.min() > -1e-6    # slack: the covariances' floor
    assert mixture.history[-1] == pytest.approx(mixture.log_prob(z).mean().item(), abs=1e-9)
    assert mixture.weights.sum().item() == pytest.approx(1)


def known_as_ours():
    """The known mixture as a GaussianMixture."""
    mixture = GaussianMixture(3, 2)
    mixture.weights, mixture.means, mixture.scale_tril = WEIGHTS, MEANS, SCALE_TRIL
    mixture.fitted.fill_(True)
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
    mixture = GaussianMixture(components, z.shape[1]).to(z.dtype).fit(z, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("z, words", (
    (torch.zeros(3, 2), "4 gmm_components .* 4 points.* 3, 3 "), (torch.zeros(9, 5), "N, 2.*9, 5"),
    (torch.full((9, 2), math.nan), "4 gmm_components .* 4 points.* 9, 0 "),
    (torch.tensor([[0.0, 0.0]] * 8 + [[0.0, math.inf]]), "4 gmm_components .* 4 points.* 9, 8 ")))
def test_mixture_refuses(z, words):
    """Too few points, points that are not finite (how many are is told) and the wrong dimension are ValueErrors."""
    mixture = GaussianMixture(4, 2)
    with pytest.raises(ValueError, match=words):
        mixture.fit(z)
    with pytest.raises(ValueError, match="not fitted"):    # zeros are no prior
        mixture.sample(3)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_mixture_computes_in_its_own_dtype(dtype):
    """Codes of any dtype are fitted like the same codes in that of the buffers; MPS has no float64."""
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    fit = lambda z: GaussianMixture(2, 2).fit(z, generator=torch.Generator().manual_seed(1)).state_dict()
    for name, value in fit(z).items():
        assert torch.equal(value, fit(z.float())[name]) and value.dtype != torch.float64


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
    c = tiny(formulation=formulation, predict=predict, vae_steps=150, ddpm_steps=150, vae_lr=1e-2, lr=1e-2, z_dim=8,
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


@pytest.mark.parametrize("formulation", ("1", "2"))
def test_noise_on_x_hat_in_training(formulation):
    """The U-Net sees x_hat plus noise of a level that is uniform in [0, 0.3] and one for each image; x_t has the same."""
    model, seen, x = DiffuseVAE(tiny(formulation=formulation, cond_noise=0.3, kl_weight=0)), [], torch.rand(2000, 3, 8, 8)
    with torch.no_grad():
        model.vae.encoder[-1].bias[model.config.z_dim:] = -40    # z ~ q(z|x) hardly varies
    clean = model.reconstruct(x)[0]
    model.diffusion.q_sample = lambda x0, t, noise, shift: seen.append(shift) or x0
    model.loss(x, lambda x_t, t, x_hat, z: seen.append(x_hat) or x_t)
    shift, x_hat = seen
    assert shift is x_hat if formulation == "2" else shift == 0
    level = (x_hat - clean).flatten(1).std(1)    # of 192 values: each within 5 standard errors, 5 / 384^0.5 of it
    assert level.max() < 0.3 * (1 + 5 / 384**0.5)
    assert abs(level.mean() - 0.15) < 5 * 0.3 / 12**0.5 / 2000**0.5 and level.min() < 0.01
    assert abs((x_hat - clean).square().mean() - 0.03) < 5 * 0.03 * 0.9 / 2000**0.5    # 0.3^2 / 3; spread 0.9 of it


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


def test_fp16_trains_with_unscaled_gradients(monkeypatch):
    """Both stages take fp32's steps within fp16's accuracy; the norm that Adam sees in stage 2 is within the limit."""
    images, step, seen = diffusevae.draw_shapes(8, 8, 0)[0], torch.optim.Adam.step, []

    def watched(self, *args):
        norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item()
        seen.append((norm, float(getattr(self, "found_inf", None) or 0)))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    rows = finish(tiny(precision="fp16", grad_clip=0.01, vae_steps=8, ddpm_steps=8), images)[1]
    assert all(math.isfinite(row["loss"]) for row in rows) and len(rows) == 8 and len(seen) == 16
    taken = [norm for norm, overflow in seen[8:] if not overflow]    # others are left out, and the scale is halved
    assert len(taken) > 2 and max(taken) <= 0.01 * 1.001

    scaled = functools.partial(torch.amp.GradScaler, init_scale=256.0)    # no overflow in the first step
    monkeypatch.setattr(torch.amp, "GradScaler", scaled)
    for train, clip in ((train_vae, 1.0), (train_ddpm, 0.0), (train_ddpm, 0.01)):
        means = []
        for precision in ("fp32", "fp16"):
            torch.manual_seed(0)
            c, state = tiny(precision=precision, log_every=1, grad_clip=clip), new_state()
            next(train(perturbed(DiffuseVAE(c), 0.1), images, state))
            means.append(torch.cat([s["exp_avg"].flatten() for s in state["optimizer"]["state"].values()]))
        assert (means[0] - means[1]).norm() < 0.02 * means[0].norm()    # 11 bits, through some ten layers and back


def test_the_scaler_does_not_change_fp32(monkeypatch):
    """Without fp16 the run is, to the bit, the one of a plain loop: backward() and step()."""
    class Plain:
        def __init__(self, *args, enabled):
            assert not enabled
        scale = staticmethod(lambda loss: loss)
        step = staticmethod(lambda optimizer: optimizer.step())
        unscale_ = staticmethod(lambda optimizer: None)
        update, state_dict = staticmethod(lambda: None), staticmethod(dict)

    images, states = diffusevae.draw_shapes(8, 8, 0)[0], []
    for scaler in (torch.amp.GradScaler, Plain):
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        states.append(finish(tiny(dropout=0.1), images)[0].state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


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


def test_fp16_resumes_bit_identical():
    """Saved and loaded after every row, a run in fp16 ends with the checkpoint of one in one go, scale and all."""
    images = diffusevae.draw_shapes(8, 8, 0)[0]
    c = tiny(precision="fp16", vae_steps=9, ddpm_steps=9, dropout=0.2, log_every=3)
    for run in "ab":
        torch.manual_seed(0)
        model, state, scales = DiffuseVAE(diffusevae.dataclasses.replace(c, run_dir=run)), new_state(), []
        for stage, train in (("vae", train_vae), ("ddpm", train_ddpm)):
            while state["steps"][stage] < 9:
                for row in train(model, images, state):
                    diffusevae.save_checkpoint(model, state)
                    scales.append((state["scaler"]["scale"], state["scaler"]["_growth_tracker"]))
                    if run == "b":
                        break
                if run == "b":
                    model, state = diffusevae.load_run(run)
                    model.config.precision = "fp16"    # per command, not saved
    assert alike("a/model.pt", "b/model.pt") and len(scales) == 6
    assert 0 < scales[0][0] < 2**16 and scales[0] != scales[1]    # a scale halved to keep, and a count of steps


@pytest.mark.parametrize("stage, train, network", (("vae", train_vae, "vae"), ("ddpm", train_ddpm, "unet")))
def test_resuming_in_another_memory_format(stage, train, network):
    """Adam's moments saved in another memory format still match their weights: the run ends like an uninterrupted one."""
    images, ends = diffusevae.draw_shapes(8, 8, 0)[0], []
    for moved in (False, True):
        torch.manual_seed(0)
        model = DiffuseVAE(tiny(vae_steps=6, ddpm_steps=6, log_every=3)).to(memory_format=torch.channels_last)
        state = new_state()
        if stage == "ddpm":
            list(train_vae(model, images, state))
        next(train(model, images, state))
        for moments in state["optimizer"]["state"].values() if moved else ():
            moments.update((name, moments[name].contiguous()) for name in ("exp_avg", "exp_avg_sq"))
        list(train(model, images, state))
        ends.append(list(getattr(model, network).parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_fp16_does_not_train_on_mps():
    """In many versions of PyTorch, fused Adam on MPS ignores the gradient scaler: refused, naming alternatives."""
    network, mps = torch.nn.Linear(2, 2), torch.device("mps")
    with pytest.raises(ValueError, match="cannot train in fp16 on MPS; use --precision fp32 or bf16"):
        diffusevae.optimizer_for(network, "vae", tiny(precision="fp16"), mps, new_state())
    for precision in ("fp32", "bf16", "auto"):
        diffusevae.optimizer_for(network, "vae", tiny(precision=precision), mps, new_state())


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


def test_the_prior_is_fitted_on_the_device_in_full_precision(monkeypatch):
    """The codes and the new mixture are where the model is; no TF32 while EM runs, and after it what was set."""
    seen, fit, before = [], GaussianMixture.fit, torch.get_float32_matmul_precision()

    def watched(self, z, **options):
        seen.append((z.device.type, self.means.device.type, len(z), torch.get_float32_matmul_precision()))
        self.history = [0.0]
        return self if z.is_meta else fit(self, z, **options)

    monkeypatch.setattr(GaussianMixture, "fit", watched)
    images = diffusevae.draw_shapes(8, 8, 0)[0]
    try:
        for precision, device in itertools.product(("medium", "high", "highest"), ("cpu", "meta")):
            torch.set_float32_matmul_precision(precision)
            model = DiffuseVAE(tiny(gmm_components=3)).to(device)
            diffusevae.fit_prior(model, images)
            assert torch.get_float32_matmul_precision() == precision
            assert seen.pop() == (device, device, 8, "highest")
            assert model.mixture.means.device.type == device
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_prior_that_cannot_be_fitted_changes_no_settings():
    """With fewer images than Gaussians the fit is refused, and the precision of matrix products is as before."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(ValueError, match="9 gmm_components"):
            diffusevae.fit_prior(DiffuseVAE(tiny(gmm_components=9)), diffusevae.draw_shapes(8, 8, 0)[0])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


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


def test_a_swapped_prior_can_be_saved():
    """A checkpoint with a mixture of another size than --gmm-components loads, and the command line goes on with it."""
    assert command("--run-dir", "r", "--stage", "vae") == 0
    model, state = diffusevae.load_run("r")
    z = torch.randn(60, model.config.z_dim, generator=torch.Generator().manual_seed(0))
    model.mixture = GaussianMixture(7, model.config.z_dim).fit(z, generator=torch.Generator().manual_seed(1))
    diffusevae.save_checkpoint(model, state)
    loaded = diffusevae.load_run("r")[0]
    assert loaded.config.gmm_components == 7 and torch.equal(loaded.mixture.means, model.mixture.means)
    assert command("--run-dir", "r") == 0
    assert torch.equal(diffusevae.load_run("r")[0].mixture.means, model.mixture.means)


def test_a_model_built_by_hand_goes_on_from_the_command_line(capsys):
    """A run whose VAE came from another model continues with --vae-steps 0, as the message says."""
    model, state = DiffuseVAE(tiny(run_dir="r", gmm_components=3)), new_state()
    images = diffusevae.draw_shapes(8, 8, 0)[0]
    diffusevae.fit_prior(model, images)
    before = copy.deepcopy(model.vae.state_dict())
    next(train_ddpm(model, images, state))
    diffusevae.save_checkpoint(model, state)
    assert "--vae-steps 0" in refusal(capsys, command("--run-dir", "r"))
    assert command("--run-dir", "r", vae_steps=0) == 0
    after, state = diffusevae.load_run("r")
    assert state["steps"] == dict(vae=0, ddpm=4)
    assert all(torch.equal(value, before[name]) for name, value in after.vae.state_dict().items())


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
        results += [z, noise, model.encode(x), model.encode(x, sample=True), model.decode(z), *model.reconstruct(x)]
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
                        ("--spacing must be one of uniform, trailing, quad, got 'even'", dict(spacing="even")),
                        ("steps must be", dict(steps=1001)), ("--prior must be one of", dict(prior="flat")),
                        ("variance must be small", dict(variance="large", eta=1.0))):
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


class OnCuda:
    """A batch said to be on CUDA, where --compile auto compiles."""
    device = torch.device("cuda")

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)


def compile_as(monkeypatch, fake):
    """Let torch.compile be `fake`, and every trial batch be OnCuda."""
    real = diffusevae.compiled

    def trial(function, config, x, *rest):
        return real(lambda x, *rest: function(x.x if isinstance(x, OnCuda) else x, *rest), config, OnCuda(x), *rest)

    monkeypatch.setattr(diffusevae, "compiled", trial)
    monkeypatch.setattr(torch, "compile", fake)


class Breaks(torch.autograd.Function):
    """The identity, without a backward pass."""
    forward = staticmethod(lambda ctx, x: x.clone())

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no kernel")


def no_compiler(function, **options):
    """torch.compile that fails at once, as on a Python that is too new for it."""
    raise NotImplementedError("no compiler")


def no_forward(function, **options):
    """torch.compile that fails at the first call, as without a C++ compiler."""
    return lambda *inputs: no_compiler(function)


def no_backward(function, **options):
    """torch.compile that fails in the backward pass alone."""
    def fast(*inputs):
        out = function(*inputs)
        return (Breaks.apply(out[0]), *out[1:]) if isinstance(out, tuple) else Breaks.apply(out)
    return fast


@pytest.mark.parametrize("fails", (no_compiler, no_forward, no_backward))
def test_compile_auto_goes_on_without_a_compiler(capsys, monkeypatch, fails):
    """Where the trial fails, forward or in backward alone: one line for each stage, and the weights of an eager run."""
    images, wide = diffusevae.draw_shapes(8, 8, 0)[0], dict(unet_width=64, precision="fp32", dropout=0.1)
    eager = finish(tiny(compile="off", **wide), images)[0].state_dict()
    compile_as(monkeypatch, fails)
    capsys.readouterr()
    model = finish(tiny(compile="auto", **wide), images)[0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("torch.compile failed (NotImplementedError)" in line for line in lines)
    assert all(torch.equal(value, eager[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fails", (no_compiler, no_forward, no_backward))
def test_compile_on_without_a_compiler_is_refused(capsys, monkeypatch, fails):
    """--compile on says in one sentence how to do without, and nothing else is done."""
    monkeypatch.setattr(torch, "compile", fails)
    message = refusal(capsys, command("--run-dir", "r", "--compile", "on"))
    assert "torch.compile failed (NotImplementedError)" in message and "use --compile off" in message
    assert not list(Path("r").glob("*.lock")) and not Path("r/progress").exists()


def test_what_is_compiled(monkeypatch):
    """auto compiles U-Nets of width 64 or more, on CUDA; on compiles anywhere; lack of memory stays that."""
    calls, weight = [], torch.ones((), requires_grad=True)
    fake = lambda function, **options: lambda x: calls.append(len(x)) or function(x)
    monkeypatch.setattr(torch, "compile", fake)
    trial, f = OnCuda(torch.zeros(4, 1)), lambda x: (getattr(x, "x", x) * weight + 1).sum()
    for config in (tiny(unet_width=63, heads=0), tiny(unet_width=64, compile="off"), tiny(compile="off")):
        assert diffusevae.compiled(f, config, trial) is f
    assert diffusevae.compiled(f, tiny(unet_width=64), torch.zeros(4, 1)) is f and not calls    # a CPU
    for config, x in ((tiny(unet_width=64, precision="fp32"), trial), (tiny(compile="on"), torch.zeros(4, 1))):
        fast = diffusevae.compiled(f, config, x)
        assert calls == [4] and weight.grad is not None    # the trial, forward and backward
        assert fast(torch.full((4, 1), 2.0)) == 12 and calls == [4, 4]
        calls.clear()
        weight.grad = None

    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch, "compile", lambda function, **options: full)
    with pytest.raises(torch.OutOfMemoryError):
        diffusevae.compiled(f, tiny(unet_width=64, precision="fp32"), trial)


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


class Copies(TorchDispatchMode):
    """Counts the copies from one device to another."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}.get(function.overloadpacket)
        self.count += source is not None and args[source].device != out.device
        return out


@pytest.mark.parametrize("formulation", ("2", "none"))
def test_steps_copy_nothing_but_noise(formulation):
    """A training step copies nothing to or from the device, a sampling step only CPU generators' noise, all at once."""
    model = DiffuseVAE(tiny(formulation=formulation, z_cond=True)).to("meta").train()
    x, z = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, 2, device="meta")
    with Copies() as copies:
        for loss in (model.loss, lambda x: model.vae.loss(x)[0])[:2 if model.vae else 1]:
            loss(x).backward()
        assert copies.count == 0
        x_hat = x if model.vae else None
        net, shift = model.denoiser(x_hat, z), model.shift(x_hat)
        model.diffusion.denoise(net, x, 5, shift)
        four = each_seeded(0, 1, 2, 3)
        for eta, generator, expected in ((1.0, None, 0), (0.0, four, 0), (1.0, four, 3), (1.0, torch.Generator(), 3)):
            copies.count = 0
            model.diffusion.sample(net, x, 4, eta, shift=shift, generator=generator)
            assert copies.count == expected    # the last of four steps has no noise
        for n in (1, 4):
            copies.count = 0
            model.noise(n, each_seeded(*range(n)))
            assert copies.count == 1


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


def test_images_that_are_not_bytes_are_refused():
    """Floats handed over as images would be scaled twice; wherever they come in, the message asks for uint8."""
    images = torch.rand(8, 3, 8, 8)
    for call in (lambda: diffusevae.to_float(images), lambda: diffusevae.random_batch(images, 2, True, images.device),
                 lambda: next(train_vae(DiffuseVAE(tiny()), images, new_state())),
                 lambda: next(train_ddpm(DiffuseVAE(tiny()), images, new_state())),
                 lambda: diffusevae.fit_prior(DiffuseVAE(tiny()), images.double())):
        with pytest.raises(ValueError, match="uint8"):
            call()


def halves(paths):
    """Relative paths as the README has them split: the test images, a twentieth by crc32 or else one, and the rest.

    Each in the order of the crc32.
    """
    rank = {Path(path): zlib.crc32(Path(path).as_posix().encode()) for path in paths}
    first = [path for path in rank if rank[path] <= 2**32 // 20] or [min(rank, key=rank.get)]
    return sorted(first, key=rank.get), sorted(rank.keys() - set(first), key=rank.get)


def test_folder_of_all_kinds(tmp_path, capsys):
    """Each kind of image becomes what a viewer shows; damaged ones are named, others, pipes and dead links counted."""
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
    (root / "nothing.png").touch()
    (root / "note.txt").write_text("no image")
    (root / "torn.png").write_bytes((root / "6wide.png").read_bytes()[:60])
    (root / "nowhere.png").symlink_to(root / "gone.png")
    every = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    every.remove(Path("note.txt")), every.remove(Path(".hidden.png"))
    seen, x = [], []
    for split, names in zip(("test", "train"), halves(every)):
        names = [str(name) for name in names]
        x.append(diffusevae.load_images("folder", root, 8, split)[0])
        out = capsys.readouterr().out
        skipped = [name for name in names if name in ("torn.png", "nothing.png", "range.tiff")]
        kind = "training" if split == "train" else "test"
        assert f"reading {len(names)} {kind} images" in out
        assert "left out 3 files" in out    # a text, a pipe, a dead link
        assert (f"skipped {len(skipped)} of {len(names)} " in out) == bool(skipped)
        assert all((ascii(name) in out) == (name in skipped) for name in names)
        assert not any(name in out for name in ("nowhere.png", "pipe.png", "hidden", "note.txt"))
        seen += [name for name in names if name not in skipped]
    assert len(seen) == 9 and len(x[0]) > 0
    x = torch.cat(x)[torch.tensor(sorted(range(9), key=lambda i: Path(seen[i]).name))].float()    # by name
    assert x.shape == (9, 3, 8, 8)
    for i, colour in enumerate(((200, 0, 0), (200, 0, 0), (200, 0, 0), (128,) * 3, (77,) * 3, (255,) * 3)):
        assert (x[i].mean((1, 2)) - torch.tensor(colour)).abs().max() < 6, i    # JPEG and CMYK are inexact
    assert x[6, 0, :, :3].min() > 200 and x[6, 2, :, 5:].min() > 200    # red on the left, blue on the right
    assert x[7, 0, :3].min() > 200 and x[7, 2, 5:].min() > 200    # red above, blue below
    assert (x[8, 0] - 200).abs().max() < 2


def grey_image(path, grey=0):
    """Write an 8x8 image of one grey level, and the folders it needs."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), grey, np.uint8)).save(path)


def greys(folder, split, **options):
    """The grey level of each image that load_folder returns, and the labels."""
    x, labels = diffusevae.load_folder(str(folder), [8, 8], split == "train", **options)
    return x[:, 0, 0, 0].tolist(), labels


def test_about_every_twentieth_file_is_for_testing(tmp_path):
    """Of 60 files those of a small crc32 of the relative path are the test split, all others the training split."""
    names = [f"{'abc'[i % 3]}/im{i}.png" for i in range(60)]
    for i, name in enumerate(names):
        grey_image(tmp_path / name, i)
    test, train = ([names.index(str(path)) for path in half] for half in halves(names))
    assert 2 <= len(test) <= 10 and sorted(test + train) == list(range(60))
    assert {names[i][0] for i in train[:8]} == set("abc")    # of every folder, however few are taken
    assert greys(tmp_path, "test")[0] == test and greys(tmp_path, "train")[0] == train


def test_new_images_move_none_to_the_test_split(tmp_path, monkeypatch):
    """As a folder grows no training image is ever tested on; one in twenty is kept, and one of two at the least."""
    rng, files, read = np.random.default_rng(0), [], []

    def decode(path, size, channels=3):
        read.append(str(Path(path).relative_to(tmp_path)))
        return np.zeros((channels, *size), np.uint8)

    def split(train):
        read.clear()
        x, _ = diffusevae.load_folder(str(tmp_path), [1, 1], train)
        assert len(x) == len(read)
        return set(read)

    monkeypatch.setattr(diffusevae, "find_images", lambda folder: sorted(files))
    monkeypatch.setattr(diffusevae, "decode_image", decode)
    names = [Path(f"{'ab'[i % 2]}", f"{rng.integers(10**12)}.jpg") for i in range(2000)]
    trained = set()
    for n in (*range(2, 40), 60, 100, 200, 500, 1000, 2000):
        files[:] = names[:n]
        train, test = split(True), split(False)
        assert train | test == set(map(str, files)) and not train & test and train and test
        assert trained <= train
        trained = train
    assert abs(len(test) - 100) < 5 * (2000 * 0.05 * 0.95)**0.5    # 5 SE
    files[:] = names[:1]    # a single image is not enough
    with pytest.raises(ValueError, match="no usable images for the training split"):
        split(True)


def test_captions_are_left_out(tmp_path, capsys):
    """Texts beside the images, as captioned sets have them, are counted in one line; without them there is no line."""
    for i in range(30):
        grey_image(tmp_path / "a" / f"{i}.png", i)
    greys(tmp_path, "train")
    assert not [line for line in capsys.readouterr().out.splitlines() if "left out" in line or "skipped" in line]
    for i in range(30):
        (tmp_path / "a" / f"{i}.txt").write_text("grey")
        (tmp_path / "a" / f"{i}.json").write_text("{}")
    found = sum((greys(tmp_path, split)[0] for split in ("train", "test")), [])
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert sorted(found) == list(range(30)) and len(lines) == 2 and all("left out 60 files" in line for line in lines)


def test_folders_that_hold_no_images_of_their_own(tmp_path):
    """Hidden folders, thumbnails and runs are passed over, linked folders are read once, and circles of links end."""
    for i, name in enumerate(("a/0.png", "a/deep/1.png", "b/2.png", ".trash/3.png", "b/.cache/4.png", "a/@eaDir/5.png",
                              "run/samples/6.png", "b/run/7.png", "@eaDir/8.png")):
        grey_image(tmp_path / "photos" / name, i)
    for run in ("run", "b/run"):
        (tmp_path / "photos" / run / "model.pt").touch()
    grey_image(tmp_path / "elsewhere" / "9.png", 9)
    (tmp_path / "photos" / "b" / "once").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "b" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "b" / "self").symlink_to(tmp_path / "photos" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for root in ("photos", "link"):
        found = [path.as_posix() for path in diffusevae.find_images(str(tmp_path / root))]
        assert found == ["a/0.png", "a/deep/1.png", "b/2.png", "b/once/9.png"]
        assert sorted(sum((greys(tmp_path / root, split)[0] for split in ("train", "test")), [])) == [0, 1, 2, 9]


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    """A folder without rights, as lost+found on a disk of one's own, is passed over, and the rest is read."""
    grey_image(tmp_path / "a" / "0.png")
    (tmp_path / "lost+found").mkdir()
    stat = os.stat

    def denied(path, *args, **options):
        if f"lost+found{os.sep}" in os.fsdecode(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", denied)
    assert diffusevae.find_images(str(tmp_path)) == [Path("a/0.png")]


def test_labels_are_those_of_image_folder(tmp_path):
    """The first folder below the top is the class, as in torchvision; images at the top leave all without labels."""
    from torchvision.datasets import ImageFolder
    for i in range(40):
        grey_image(tmp_path / ("cat", "Dog", "ant/old", "ant/new/er")[i % 4] / f"{i}.png", i)
    truth = {int(Path(path).stem): label for path, label in ImageFolder(tmp_path).samples}
    found = {}
    for split in ("train", "test"):
        x, labels = greys(tmp_path, split)
        assert labels.dtype == torch.long and labels.shape == (len(x),)
        found |= dict(zip(x, labels.tolist()))
    assert found == truth and set(truth.values()) == {0, 1, 2}
    grey_image(tmp_path / "40.png", 40)
    assert greys(tmp_path, "train")[1] is None and greys(tmp_path, "test")[1] is None


def test_one_channel(tmp_path):
    """--channels 1 reads one channel: a grey level as it is, a colour by its luma; a run's split has its channels."""
    colour = np.empty((8, 8, 3), np.uint8)
    colour[:] = 200, 100, 50
    for i in range(20):
        grey_image(tmp_path / "photos" / f"{i}.png", 10 * i)
    Image.fromarray(colour).save(tmp_path / "photos" / "colour.png")
    c = diffusevae.dataclasses.replace(tiny(channels=1), dataset="folder", data_dir=str(tmp_path / "photos"))
    x = torch.cat([diffusevae.load_split(c, split) for split in ("train", "test")])
    assert x.shape == (21, 1, 8, 8) and x.dtype == torch.uint8
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)    # ITU-R 601-2, as a grey TV set shows it
    assert sorted(x.float().mean((1, 2, 3)).tolist()) == sorted([*range(0, 200, 10), luma])
    assert diffusevae.load_split(diffusevae.dataclasses.replace(c, channels=3), "train").shape[1] == 3
    with pytest.raises(ValueError, match="--channels 3"):
        diffusevae.load_split(tiny(channels=1), "train")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", (
    b"garbage", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0",    # cut within the orientation
    b"II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"    # a quarter turn, beside a resolution of letters,
    b"\x1a\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"))    # on which Pillow stumbles
def test_unreadable_orientation(tmp_path, exif):
    """A picture whose EXIF is cut or nonsense is taken as it is stored."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255    # white on the left
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=100, exif=b"Exif\0\0" + exif)
    x = diffusevae.decode_image(tmp_path / "x.jpg", [8, 8])
    assert abs(x.astype(int) - pixels.transpose(2, 0, 1)).max() < 9    # JPEG


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
    pictures = {"samples.png", "latents.png", "curves.png", "progress/vae_000004.png", "progress/ddpm_000004.png"}
    assert set(before) == {"model.pt", "config.json", "log.csv", *pictures}
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


def held(*paths):
    """Another process that holds lock files, until it is killed."""
    code = "import contextlib, sys, time, diffusevae as d\nwith contextlib.ExitStack() as stack:\n" \
           "    [stack.enter_context(d.lock(d.Path(path))) for path in sys.argv[1:]]\n" \
           "    print('held', flush=True)\n    time.sleep(600)"
    env = {**os.environ, "PYTHONPATH": str(Path(diffusevae.__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code, *paths], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_process_writes_to_a_run_at_a_time(capsys):
    """Beside a training run a second is refused, sampling is not, and the reverse; a killed one bars nobody."""
    pytest.importorskip("fcntl")
    assert command("--run-dir", "r") == 0
    shutil.copytree("r", "s")
    before = files("r")
    assert not [name for name in before if name.endswith((".lock", ".tmp"))]
    unlocked = lambda run: {name: data for name, data in files(run).items() if not name.endswith(".lock")}
    process = held("r/.training.lock", "s/.sampling.lock")
    try:
        capsys.readouterr()
        for run, words, options in (("r", ("--stage", "ddpm"), dict(ddpm_steps=9)), ("r", (), dict(ddpm_steps=9)),
                                    ("s", ("--stage", "sample"), small())):
            message = refusal(capsys, command("--run-dir", run, *words, **options))
            assert f"another process is writing to {run}" in message and unlocked(run) == before
        assert command("--run-dir", "r", "--stage", "sample", "--save-images", **small()) == 0
        assert command("--run-dir", "s", "--stage", "ddpm", ddpm_steps=9) == 0
        assert len(files("r/samples")) == 4 and process.poll() is None    # it was there all the time
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(), process.stdout.close()
    assert Path("r/.training.lock").exists() and Path("s/.sampling.lock").exists()
    assert command("--run-dir", "r", ddpm_steps=9) == 0
    assert command("--run-dir", "s", "--stage", "sample", **small()) == 0
    assert alike("r/model.pt", "s/model.pt") and not list(Path().rglob("*.lock"))


def test_a_refused_command_leaves_no_folder(capsys):
    """What a refused command has made for itself is gone again; what was there stays."""
    assert "heads" in refusal(capsys, command("--run-dir", "new", heads=3)) and not Path("new").exists()
    assert "no model.pt" in refusal(capsys, command("--run-dir", "new", "--stage", "sample")) and not os.listdir()
    Path("old").mkdir()
    Path("old/note").touch()
    assert "heads" in refusal(capsys, command("--run-dir", "old", heads=3)) and list(files("old")) == ["note"]


def test_a_refused_command_leaves_no_folder_above(capsys):
    """The folders above a new run folder, `runs` by default, go with it."""
    assert "heads" in refusal(capsys, command("--run-dir", "runs/mine", heads=3)) and not os.listdir()


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
    ("--dataset folder --data-dir nowhere --attention none", "nowhere is not a folder"),
    ("--image-size 9", "image_size 9 must be divisible by 2"), ("--attention 5", "no 5x5 feature maps"),
    ("--heads 3", "heads must divide"),
    ("--steps 0", "--steps must be between 1 and 1000000000, got 0"), ("--steps -1", "must be between 1 and 1000000000, got -1"),
    ("--steps 1001", "steps must be between 1 and 1000"), ("--eta 1.5", "--eta must be between 0 and 1, got 1.5"),
    ("--eta -0.1", "--eta must be between 0 and 1, got -0.1"), ("--eta nan", "--eta must be between"),
    ("--lr inf", "--lr must be between"), ("--variance large", "variance must be small"),
    ("--z-dim 1000000000", "out of memory"), ("--variance large --eta 1", "variance must be small"),
    ("--variance large --steps 1000", "variance must be small"),
    ("--variance large --timesteps 20 --steps 20 --eta 0.9", "variance must be small"),
    ("--stage vae --variance large", "variance must be small"), ("--stage sample", "no model.pt in r"),
    ("--frobnicate 3", "--frobnicate"), ("--z-dim x", "--z-dim"),
    ("--unet-mults 0,1", "--unet-mults"), ("--unet-mults none", "unet_mults"),
    ("--unet-mults 1,x", "--unet-mults: invalid integers value: '1,x'"), ("--timesteps 1", "--timesteps"),
    ("--schedule cubic", "argument --schedule: invalid choice"),
    ("--variance huge", "argument --variance: invalid choice"),
    ("--stage sample --run-dir nowhere", "no model.pt in nowhere"),
    ("--stage eval", "argument --stage: invalid choice"),
    ("--stage traverse", "argument --stage: invalid choice"), ("--help --eta 2", "--eta must be between"),
    ("--small 3", "unrecognized arguments: 3"),
    ("--formulation none --stage vae", "--formulation none has no VAE to train"),
    ("--channels 1", "--channels 3"), ("--channels 2", "argument --channels: invalid choice"),
    ("--gmm-components 101", "--gmm-components 101 exceeds the 100 training images"),
    pytest.param("--device cuda", "device cuda is not available",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
    ("--device cuda:77", "device cuda:77 is not available"), ("--device gpu", "device gpu is not available"),
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
    assert re.search("101 gmm_components .*101 points.* 100, 100 ", message)


def test_empty_folder_is_refused(capsys):
    """A folder without a usable image: the files are named."""
    Path("photos").mkdir()
    Path("photos/no.png").write_text("no image")
    Path("photos/nor.png").write_text("no image")    # kept for testing, and not read
    code = command("--run-dir", "r", "--dataset", "folder", "--data-dir", "photos", "--attention", "none")
    out, err = capsys.readouterr()
    assert code == 2 and "'no.png'" in out and "photos has no usable images" in err and not Path("r").exists()


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
    assert saved.keys() == {"format", "options", "model", "steps", "log", "stage", "optimizer", "scaler",
                            "weights"}
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


@pytest.mark.parametrize("owner, name", ((torch, "load"), (DiffuseVAE, "load_state_dict"), (UNet, "__init__")))
def test_lack_of_memory_does_not_damage_a_checkpoint(capsys, monkeypatch, owner, name):
    """Too little memory to read a checkpoint, or to build its model, is told as that alone."""
    assert command("--run-dir", "r", "--stage", "ddpm") == 0

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(owner, name, fail)
    for error in (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
                  MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")):
        capsys.readouterr()
        message = refusal(capsys, command("--run-dir", "r", "--stage", "sample", **small()))
        assert "out of memory" in message and "damaged" not in message and "fit" not in message


def test_a_checkpoint_of_other_shapes_does_not_fit(capsys):
    """Weights of other shapes than the options ask for: told as such, not as damage."""
    assert command("--run-dir", "r", "--stage", "ddpm") == 0
    saved = torch.load("r/model.pt", weights_only=True)
    saved["model"]["unet.middle.0.norm.weight"] = torch.zeros(3)
    torch.save(saved, "r/model.pt")
    message = refusal(capsys, command("--run-dir", "r", "--stage", "sample", **small()))
    assert "r/model.pt does not fit its options" in message and "damaged" not in message


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


FORKS = """
import os, signal, sys, matplotlib.figure, torch, torch._dynamo, torchvision, diffusevae as d
torch.set_num_threads(1)
draw, (*words, starts) = d.draw_shapes, sys.argv[1:]
d.draw_shapes = lambda n, size, seed: draw(n // 500 if n > 5000 else n, size, seed)
d.save_figure = lambda fig, path, *done: d.try_to_write(path, d.Path.touch, *done)
for start in starts.split(","):
    read, write = os.pipe()
    child = os.fork()    # spares the imports
    if not child:
        os.dup2(write, 1)
        os._exit(d.main(words))
    os.close(write)
    for line in open(read):
        if start and line.startswith(start):
            os.kill(child, signal.SIGKILL)
            break
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_runs_end_alike():
    """Killed without warning in both stages and while sampling, a run ends with the files of an undisturbed one."""
    words = ["--image-size=8", "--unet-width=4", "--heads=1", "--vae-width=2", "--z-dim=2", "--vae-steps=40",
             "--ddpm-steps=40", "--batch-size=4", "--vae-batch=4", "--steps=2", "--eta=1", "--dropout=0.1",
             "--save-every=7", "--log-every=1", "--num-samples=90", "--sample-batch=10", "--save-images",
             "--device=cpu"]
    env = {**os.environ, "PYTHONPATH": str(Path(diffusevae.__file__).parent)}
    starts = ("vae 9/40", "ddpm 1/40", "ddpm 30/40", "sampled 40 of 90 images", "")    # where to kill
    forks = subprocess.run([sys.executable, "-c", FORKS, *words, "--run-dir=r", ",".join(starts)], env=env, text=True,
                           stdout=subprocess.PIPE)
    assert forks.stdout.split() == ["9"] * 4 + ["0"]    # killed by signal 9, and done
    assert diffusevae.main([*words, "--run-dir=clean"]) == 0
    assert alike("r/model.pt", "clean/model.pt")
    one, two = ([row[:-1] for row in csv.reader(open(f"{r}/log.csv"))] for r in ("r", "clean"))
    assert one == two and len(one) == 81
    assert files("r/samples") == files("clean/samples") and len(files("r/samples")) == 90
    assert files("r/vae_samples") == files("clean/vae_samples")
    assert not list(Path("r").glob("*.lock"))    # left behind by the killed ones, removed by the last


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
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))    # less than weights alone need
    try:
        code = command("--run-dir", "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert code == 2 and "could not write new/model.pt" in err and "vae 4/4" not in out    # before it has trained
    assert not Path("new").exists()


def test_secondary_files_that_cannot_be_written(capsys, rendered):
    """Folders in place of the log, the options and the pictures: a line for each; the run is as if they were not."""
    assert command("--run-dir", "clean", "--stage", "ddpm") == 0
    names = ("log.csv", "config.json", "curves.png", "samples.png", "latents.png")
    for name in names:
        Path("r", name).mkdir(parents=True)
    Path("r/progress").touch()    # a file in place of a folder
    capsys.readouterr()
    for words, options, failing in (((), {}, (*names, "progress/vae_000004.png", "progress/ddpm_000004.png")),
                                    (("--stage", "sample"), small(), names[3:])):
        assert command("--run-dir", "r", *words, **options) == 0
        out, err = capsys.readouterr()
        told = [re.match(r"could not write r/(\S+) ", line)[1] for line in out.splitlines() if "could not" in line]
        assert set(told) == set(failing) and not err
        assert all(told.count(name) == 1 for name in failing if name.endswith("s.png") and name != "curves.png")
        assert not any("wrote" in line and name in line for line in out.splitlines() for name in names)
    assert alike("r/model.pt", "clean/model.pt") and not list(Path("r").rglob("*.tmp"))
    assert not any(list(Path("r", name).iterdir()) for name in names)


def test_own_files_among_the_samples():
    """Only the numbered images of earlier commands are replaced; samples/ may be a link to another disk."""
    assert command("--run-dir", "r") == 0
    Path("disk").mkdir()
    Path("r/samples").symlink_to(Path("disk").resolve())
    own = ("favourite.png", "notes.txt", "1.png", "0000001.png", "sub/000000.png")
    for name in own:
        Path("disk", name).parent.mkdir(exist_ok=True)
        Path("disk", name).write_text(name)
    words = ("--run-dir", "r", "--stage", "sample", "--save-images")
    assert command(*words, **small(num_samples=3)) == 0 and command(*words, **small(num_samples=2)) == 0
    assert Path("r/samples").is_symlink()
    assert set(files("disk")) == {"000000.png", "000001.png", *own}
    assert all(Path("disk", name).read_text() == name for name in own)


@pytest.mark.parametrize("words, named", (
    ("--dataset folder --data-dir nowhere --image-size 250", "image_size 250"),
    ("--dataset folder --data-dir nowhere --image-size 1000", "image_size 1000"),
    ("--dataset folder --data-dir nowhere --image-size 250 --unet-mults 1,2", "image_size 250 halves to 125"),
    ("--image-size 8 --heads 3 --unet-mults 1,2", "heads must divide"),
    ("--run-dir file", "--run-dir file"), ("--run-dir file/r", "--run-dir file/r"),
    ("--image-size 8 --unet-mults 1,2 --variance large", "large with eta 1 and")))
def test_refused_before_anything_is_built(capsys, monkeypatch, words, named):
    """What cannot work is refused before a network has weights or an image is read."""
    made, init = [], torch.nn.init.kaiming_normal_

    def watched(tensor, *args, **options):
        made.extend([] if tensor.is_meta else [tensor.shape])
        return init(tensor, *args, **options)

    def read(*args):
        raise AssertionError("images are read")

    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", watched)
    monkeypatch.setattr(diffusevae, "load_split", read)
    Path("file").write_text("in the way")
    assert named in refusal(capsys, diffusevae.main(["--device=cpu", *words.split()])) and not made
    assert files(".") == {"file": b"in the way"}
    DiffuseVAE(tiny())
    assert len(made) > 5    # it does watch


def test_lack_of_memory_is_one_sentence(capsys, monkeypatch):
    """Out of memory on CUDA, the CPU or MPS: the options to lower are named and the checkpoint is kept."""
    assert command("--run-dir", "r") == 0
    before, loss = Path("r/model.pt").read_bytes(), DiffuseVAE.loss
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory"),
                  RuntimeError("Invalid buffer size: 19.45 GB"), MemoryError()):    # MPS
        def fail(self, x, unet=None, error=error):
            raise error
        monkeypatch.setattr(DiffuseVAE, "loss", fail)
        capsys.readouterr()
        message = refusal(capsys, command("--run-dir", "r", ddpm_steps=9))
        assert "out of memory; lower --batch-size, --vae-batch or --sample-batch" in message
        assert Path("r/model.pt").read_bytes() == before
    monkeypatch.setattr(DiffuseVAE, "loss", loss)
    assert command("--run-dir", "r", ddpm_steps=9) == 0


def test_numbers_of_numpy_are_stored_as_python_has_them():
    """A checkpoint could not be loaded without running code, nor config.json written, with NumPy's own numbers."""
    c = Config.preset("shapes", z_dim=np.int64(8), lr=np.float32(0.5), unet_mults=np.array([1, 2]),
                      hflip=np.bool_(True))
    found = c.z_dim, c.lr, c.unet_mults, c.hflip
    assert found == (8, 0.5, (1, 2), True)
    assert [type(v) for v in (*found, *c.unet_mults)] == [int, float, tuple, bool, int, int]


def test_every_option_at_its_edges():
    """Each number's smallest and largest value are taken, each word is; what lies beyond is refused by name."""
    for f in diffusevae.dataclasses.fields(Config):
        words, limits = f.metadata["choices"], f.metadata["range"]
        assert not words or f.type in (str, int)
        if words:
            assert all(getattr(Config(**{f.name: word}), f.name) == word for word in words)
            beyond = ("", f"{words[0]}x", 4, None) if f.type is str else (min(words) - 1, max(words) + 1, 2, "3", None)
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
        usage = "usage: python diffusevae.py [--help] [--dataset NAME] [--OPTION VALUE ...]\n\nDiffuseVAE in one file"
        assert page.startswith(usage)
        titles = re.findall(r"^(\w+ options):$", page, re.M)
        assert titles == ["run options", "model options", "training options", "sampling options"]
        options = page[page.index("run options:"):]
        assert not re.search(r"\b(tuple|str|int|float)\b", options)
        # from each option to the next or to a title: one line, however wide the terminal
        parts = [" ".join(part.split()) for part in re.split(r"^(?=  --)|\n\n", options, flags=re.M)]
        pages[words] = {part.split()[0].rstrip(","): part for part in parts if part.startswith("--")}
        for f in diffusevae.dataclasses.fields(Config):
            part = pages[words][diffusevae.flag(f.name)].replace("- ", "-")    # lines also end at hyphens
            assert re.fullmatch(r"--.+ \(default: [^()]+\)", part) and f.metadata["help"] in part, f.name
            assert not f.metadata["choices"] or "{" + ",".join(map(str, f.metadata["choices"])) + "}" in part, f.name
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


FOLDER = ("--dataset", "folder", "--attention", "none", "--gmm-components", "2", "--sample-every", "0")


def photos(folder, n=30):
    """A folder of n images."""
    for i in range(n):
        grey_image(Path(folder) / f"{i}.png", 8 * i)


def test_folders_of_the_same_name(capsys):
    """Two folders of one name would share a run: the second is refused naming both; a folder that moved is welcome."""
    photos("a/cats"), photos("b/cats")
    assert command(*FOLDER, "--data-dir", "a/cats", "--stage", "vae") == 0
    before = files("runs/folder-cats")
    capsys.readouterr()
    message = refusal(capsys, command(*FOLDER, "--data-dir", "b/cats", "--stage", "vae"))
    assert all(str(Path(name, "cats").resolve()) in message for name in "ab") and "--data-dir" in message
    assert files("runs/folder-cats") == before
    assert command(*FOLDER, "--data-dir", "../" + Path.cwd().name + "/a/cats", "--stage", "vae") == 0    # the same one
    assert "no longer exists" not in capsys.readouterr().out
    shutil.move("a/cats", "a/lions")
    assert command(*FOLDER, "--data-dir", "a/lions", "--run-dir", "runs/folder-cats", "--stage", "ddpm") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no longer exists" in line]
    assert len(lines) == 1 and all(str(Path(name).resolve()) in lines[0] for name in ("a/cats", "a/lions"))
    assert diffusevae.load_run("runs/folder-cats")[0].config.data_dir == str(Path("a/lions").resolve())


def test_home_is_expanded(capsys, monkeypatch):
    """~ is the home folder in --data-dir and --run-dir; a run in the very folder of the images is refused."""
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    photos("home/cats")
    assert command(*FOLDER, "--data-dir=~/cats", "--run-dir=~/r", "--stage", "vae") == 0
    assert Path("home/r/model.pt").exists() and sorted(os.listdir()) == ["home"]
    assert diffusevae.load_run("home/r")[0].config.data_dir == str(Path("home/cats").resolve())
    for same in ("~/cats", "home/cats", "home/r/../cats"):
        message = refusal(capsys, command(*FOLDER, "--data-dir=~/cats", "--run-dir", same))
        assert "--run-dir must differ from --data-dir" in message
    assert len(files("home/cats")) == 30


def test_a_run_among_its_images(capsys, monkeypatch):
    """With the run below the images, as with --data-dir ., the same images are read after a stop as before it."""
    photos(".")
    words = (*FOLDER[:-1], "1", "--data-dir=.", "--run-dir=runs/r", "--stage=vae", "--log-every=1", "--save-every=4")
    draw = diffusevae.draw_progress

    def stop(*args):
        draw(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusevae, "draw_progress", stop)    # a picture is written, and no log row saved yet
    assert command(*words) == 130 and len(list(Path("runs/r/progress").iterdir())) == 1
    monkeypatch.setattr(diffusevae, "draw_progress", draw)
    before = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("reading", "folder:"))]
    assert command(*words) == 0
    after = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("reading", "folder:"))]
    assert before == after and len(before) == 3 and sum(int(re.search(r"reading (\d+)", line)[1])
                                                        for line in before if "reading" in line) == 30


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
                  save_every="1 1000 0", log_every="1 1000 0", sample_every="-1 0 1 3 -2", channels="1 3 2",
                  kl_weight="0 1 -1")
    codes = collections.Counter()
    for name in ("draw_grids", "draw_curves"):    # slow, and tested elsewhere
        monkeypatch.setattr(diffusevae, name, lambda *args, **options: None)
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
# Pictures
# --------------------------------------------------------------------------------------------------------


def tiles(picture, rows, columns, size):
    """A grid of images one pixel apart, [H, W, 3] -> the images, [rows * columns, 3, size, size]."""
    assert picture.shape == (rows * (size + 1) + 1, columns * (size + 1) + 1, 3)
    corners = itertools.product(range(1, rows * (size + 1), size + 1), range(1, columns * (size + 1), size + 1))
    cells = [picture[top:top + size, left:left + size] for top, left in corners]
    return torch.tensor(np.stack(cells)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels", (1, 3))
def test_grids(channels):
    """Every image is in its place under its title, grey ones too; rows and columns have their labels, once."""
    x = torch.rand(2, 6, channels, 8, 8) * 2.2 - 1.1
    fig = diffusevae.draw_grids([("one", x[0]), ("two", x[1])], 3, 2, rows=["a", "b"], ticks=["p", "q", "r"])
    assert [ax.get_title() for ax in fig.axes] == ["one", "two"]
    for ax, images in zip(fig.axes, x):
        shown = tiles(np.asarray(ax.images[0].get_array()), 2, 3, 8)
        assert torch.equal(shown, diffusevae.to_uint8(images).expand(-1, 3, -1, -1))
        assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]
        assert [text.get_text() for text in ax.get_xticklabels()] == ["p", "q", "r"]
        assert ax.get_yticks().tolist() == [4.5, 13.5] and ax.get_xticks().tolist() == [4.5, 13.5, 22.5]    # middles


def test_curves_are_the_log():
    """Squared error and KL of the VAE, the error of the U-Net, against the step; a log without a VAE will do."""
    rows = finish(tiny(log_every=1), diffusevae.draw_shapes(8, 8, 0)[0])[1]
    fig = diffusevae.draw_curves(rows)
    lines = [line for ax in fig.axes for line in ax.get_lines()]
    for line, stage, name in zip(lines, ("vae", "vae", "ddpm"), ("recon", "kl", "loss"), strict=True):
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        assert list(line.get_ydata()) == [row[name] for row in rows if row["stage"] == stage]
    lines = [line for ax in diffusevae.draw_curves(rows[4:]).axes for line in ax.get_lines() if len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in lines] == [[row["loss"] for row in rows[4:]]]
    assert diffusevae.draw_curves(rows[:4]).axes    # and so will one of the VAE alone


def test_slerp_walks_the_arc():
    """Between two vectors at a right angle: cosines and sines; between any of one length, that length all the way."""
    a, b, u = double(3, 4), double(3, 4), torch.linspace(0, 1, 7, dtype=torch.float64)
    a, b = a / a.norm(), b / b.norm()
    path = diffusevae.slerp(a, b, u)
    assert path.shape == (7, 3, 4) and torch.allclose(path[[0, -1]], torch.stack([a, b]), atol=1e-12)
    assert torch.allclose(path.flatten(1).norm(dim=1), torch.ones(7).double(), atol=1e-12)
    steps = (path[1:] * path[:-1]).sum((1, 2)).acos()    # even steps along the arc
    assert torch.allclose(steps, (a * b).sum().acos().expand(6) / 6, atol=1e-6)
    b = F.normalize(b - (a * b).sum() * a, dim=(0, 1)) * 3
    turn = (math.pi / 2 * u)[:, None, None]
    assert torch.allclose(diffusevae.slerp(a, b, u), turn.cos() * a + turn.sin() * b, atol=1e-12)
    assert diffusevae.slerp(a, a, u).isfinite().all()


@pytest.mark.parametrize("total", (100, 1000, 100_000))
def test_when_progress_is_shown(total):
    """Fourteen pictures, each at sqrt(2) times the step before, the last at the end; or as often as asked."""
    due = [diffusevae.pictures_due(step, total, -1) for step in range(total + 1)]
    when = [step for step in range(1, total + 1) if due[step] > due[step - 1]]
    assert due[0] == 0 and due[-1] == 14 and when[-1] == total
    expected = [math.ceil(total * 2**(-k / 2) - 1e-9) for k in range(14)]
    assert when == sorted(set(expected))
    every = [diffusevae.pictures_due(step, total, 30) for step in range(total + 1)]
    assert [step for step in range(1, total + 1) if every[step] > every[step - 1]] == list(range(30, total + 1, 30))
    assert not any(diffusevae.pictures_due(step, total, 0) for step in range(total + 1))


@pytest.mark.parametrize("formulation", ("1", "none"))
def test_progress_pictures(formulation):
    """Its rows are test images, their x_hat and, in stage 2, what that is refined to, always from the same noise."""
    model, x = perturbed(DiffuseVAE(tiny(formulation=formulation, steps=4)), 0.05), torch.rand(5, 3, 8, 8) * 2 - 1
    for stage in ("vae", "ddpm")[model.vae is None:]:
        for name in ("one.png", "two.png"):
            diffusevae.draw_progress(model, stage, x, Path("progress", name))
        assert Path("progress/one.png").read_bytes() == Path("progress/two.png").read_bytes()
        z = model.encode(x) if model.vae else None
        rows = [x, model.vae.decode(z)] if model.vae else []
        if stage == "ddpm":
            noise = model.noise(5, diffusevae.generators(0, "progress", range(5)))
            rows.append(model.refine(rows[1] if rows else None, noise, z))
        picture = np.asarray(Image.open("progress/one.png")).astype(int)
        scale = (picture.shape[1] - 2) // 5 // 8
        assert 8 * scale > 60    # to be seen without a magnifying glass
        for i, row in enumerate(rows):
            for j, image in enumerate(row):
                top, left = (2 + k * (8 * scale + 2) + scale // 2 for k in (i, j))    # save_image leaves two pixels
                shown = picture[top:, left:][:8 * scale:scale, :8 * scale:scale].transpose(2, 0, 1)
                assert abs(shown - diffusevae.to_uint8(image).numpy()).max() <= 1


def test_sample_every_is_heeded(capsys):
    """Pictures come at multiples of --sample-every, none at 0; they change neither the weights nor the samples."""
    for run, every in (("a", 2), ("b", 0), ("c", 3)):
        assert command("--run-dir", run, "--log-every", 1, "--sample-every", every, "--dropout", 0.1) == 0
    names = lambda run: sorted(path.stem for path in Path(run, "progress").glob("*.png"))
    assert names("a") == ["ddpm_000002", "ddpm_000004", "vae_000002", "vae_000004"]
    assert not Path("b/progress").exists() and names("c") == ["ddpm_000003", "vae_000003"]
    assert alike("a/model.pt", "b/model.pt", ("images_per_s", "run_dir", "sample_every"))
    assert alike("a/model.pt", "c/model.pt", ("images_per_s", "run_dir", "sample_every"))


def test_latents_picture(monkeypatch):
    """Its rows: test images, the VAE's, refined from random and inverted noise; a walk in z and one in the noise."""
    model, seen = with_prior(perturbed(DiffuseVAE(tiny(timesteps=100, steps=20)), 0.02)), []
    take = lambda grids, columns, **options: seen.append((grids, columns, options))
    monkeypatch.setattr(diffusevae, "draw_grids", take)
    x, real = torch.rand(4, 3, 8, 8) - 0.5, model.diffusion.sample
    packed = lambda network, noise, *a, **k: real(network, seen.append(noise.stride()) or noise, *a, **k)
    monkeypatch.setattr(model.diffusion, "sample", packed)
    model.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
    diffusevae.draw_latents(model, x)
    ((title, images),), columns, options = seen.pop()
    assert len(seen) >= 8 and all(min(s) > 0 for s in seen)    # none expanded: MPS misreads those in some versions
    rows, labels = images.view(7, 4, 3, 8, 8), options["rows"]
    assert columns == 4 and len(labels) == 7
    z, noise = model.invert(x, steps=20)
    x_hat, again = model.vae.decode(z), model.decode(z, noise, steps=20, eta=0.0)
    assert torch.equal(rows[0], x) and torch.allclose(rows[1], x_hat, atol=1e-5)
    assert torch.allclose(rows[3], again, atol=1e-4) and torch.allclose(rows[3], x, atol=0.02)
    for label, row in zip(labels[1:4], rows[1:4]):
        assert float(label.split("MSE ")[1]) == pytest.approx((row - x).square().mean().item(), abs=6e-5)
    assert (rows[2] - x).square().mean() > 10 * (rows[3] - x).square().mean()
    assert torch.allclose(rows[4][0], x_hat[0], atol=1e-5) and torch.allclose(rows[4][-1], x_hat[1], atol=1e-5)
    for k, refined in enumerate(rows[5:]):    # from image to image in z; from noise to noise at the first image's z
        assert torch.allclose(refined[0], again[0], atol=1e-4)
        last = (z[1:2], noise[:1]) if k == 0 else (z[:1], noise[1:2])
        assert torch.allclose(refined[-1], model.decode(*last, steps=20, eta=0.0)[0], atol=1e-4)
    assert torch.allclose(rows[4][1], model.vae.decode(z[:1] * 2 / 3 + z[1:2] / 3)[0], atol=1e-5)


@pytest.mark.parametrize("formulation", ("1", "none"))
def test_pictures_are_rendered(rendered, formulation):
    """The files are pictures that can be opened, with colours in them, and large enough to be seen."""
    assert command("--run-dir", "r", "--formulation", formulation) == 0
    for name in ("samples.png", "curves.png", "latents.png")[:3 if formulation == "1" else 2]:
        with Image.open(f"r/{name}") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) > 100 and np.ptp(pixels, axis=2).max() > 50, name
    assert Path("r/latents.png").exists() == (formulation == "1")


# --------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", (0.1, math.pi / 2, 3.0))
def test_slerp_is_an_arc(angle):
    """Between two noises of one norm, each point has that norm and has turned u of the way, in their plane."""
    a, side = double(3, 4, 4), double(3, 4, 4)
    side -= (a * side).sum() / a.square().sum() * a
    side *= a.norm() / side.norm()    # orthogonal to a and as long
    b = math.cos(angle) * a + math.sin(angle) * side
    for n in (1, 2, 3, 20):
        u = torch.linspace(0, 1, n, dtype=torch.float64)
        path, turn = diffusevae.slerp(a, b, u), (u * angle).view(-1, 1, 1, 1)
        assert path.shape == (n, 3, 4, 4)
        # acos magnifies the 1e-16 of the cosine by 1 / sin(0.1) = 10
        assert torch.allclose(path, turn.cos() * a + turn.sin() * side, atol=1e-13)
        assert torch.allclose(path.flatten(1).norm(dim=1), a.norm(), atol=1e-12)


def test_slerp_ends():
    """The path starts at a and ends at b, whatever their norms; equal noises give that noise, opposite ones no NaN."""
    a, b = torch.randn(3, 8, 8), 7 * torch.randn(3, 8, 8)
    first, last = diffusevae.slerp(a, b, torch.tensor([0.0, 1.0]))
    assert torch.allclose(first, a, rtol=2e-7, atol=0) and torch.allclose(last, b, rtol=2e-7, atol=0)    # two roundings
    u = torch.linspace(0, 1, 9)
    path = diffusevae.slerp(a, a, u)    # its angle counts as acos 0.9999, at most 1 / cos(angle / 2) - 1 = 2.5e-5 off
    assert torch.allclose(path, a.expand_as(path), rtol=3e-5, atol=0)
    assert diffusevae.slerp(a, -a, u).isfinite().all()
    assert diffusevae.slerp(a[0, 0], b[0, 0], u).shape == (9, 8)    # noise of any shape


def test_progress_pictures_are_most_frequent_at_first():
    """By default a stage is due fourteen pictures, over half of them in its first quarter; N is one every N steps."""
    for total in (128, 129, 193, 577, 1000, 3000, 100_000):
        due = [diffusevae.pictures_due(step, total, -1) for step in range(total + 1)]
        assert due[0] == 0 and due[total] == 14 and due == sorted(due) and due[total // 4] > 7
        drawn = sum(before < after for before, after in zip(due, due[1:]))
        assert drawn == (13 if total < 193 else 14)    # in a short stage the first step with any has two due
    for total in (1, 2, 5, 127):
        assert diffusevae.pictures_due(total, total, -1) == 14    # so that the last step always has one
    assert [diffusevae.pictures_due(step, 50, 7) for step in range(51)] == [step // 7 for step in range(51)]
    assert not any(diffusevae.pictures_due(step, 50, 0) for step in range(51))


def test_progress_pictures_do_not_disturb_training(monkeypatch):
    """With and without progress pictures a run ends with one checkpoint, to the bit, and resumed in each stage too."""
    words = ["--dropout=0.2", "--eta=1", "--log-every=1", "--save-every=1"]
    but = ("images_per_s", "run_dir", "sample_every")
    for slow in ("draw_curves", "draw_latents"):    # tested elsewhere
        monkeypatch.setattr(diffusevae, slow, lambda *args: None)
    names = {f"{stage}_{step:06}.png" for stage in ("vae", "ddpm") for step in (1, 2, 3, 4)}    # each step: so few
    read, splits = diffusevae.load_split, []
    monkeypatch.setattr(diffusevae, "load_split", lambda config, split: splits.append(split) or read(config, split))
    for every in (0, -1, 1):
        run = f"every{every}"
        assert command("--run-dir", run, "--sample-every", every, *words) == 0
        assert set(files(f"{run}/progress")) == (names if every else set())
        assert every or splits == ["train", "test"]    # without such pictures test images are for samples.png alone
        assert alike(f"{run}/model.pt", "every0/model.pt", but)
    save = diffusevae.save_checkpoint

    def stop(model, state):
        save(model, state)
        if 2 in state["steps"].values():    # in the middle of either stage
            raise KeyboardInterrupt

    monkeypatch.setattr(diffusevae, "save_checkpoint", stop)
    codes = [command("--run-dir", "r", "--sample-every", 1, *words) for _ in range(3)]
    assert codes == [130, 130, 0] and alike("r/model.pt", "every1/model.pt", but)
    assert files("r/progress") == files("every1/progress")


def test_progress_pictures_show_one_set_of_noise():
    """The same weights give the same picture later, and with an ancestral sampler; other weights give another one."""
    assert command("--run-dir", "r", "--eta", 1) == 0
    model = DiffuseVAE.load("r", "cpu")
    model.config.steps, model.config.eta, model.config.variance = 2, 1.0, "large"
    x = diffusevae.to_float(diffusevae.load_split(model.config, "test")[:8])
    torch.manual_seed(9)
    diffusevae.draw_progress(model, "ddpm", x, Path("again.png"))
    assert Path("again.png").read_bytes() == Path("r/progress/ddpm_000004.png").read_bytes()
    perturbed(model.unet)
    diffusevae.draw_progress(model, "ddpm", x, Path("moved.png"))
    again, moved = (np.asarray(Image.open(name)).astype(int) for name in ("again.png", "moved.png"))
    assert (again[:196] == moved[:196]).all()    # two rows of 12 * 8 + 2 pixels: test images and x_hat
    assert abs(again[198:] - moved[198:]).max() > 9


@pytest.mark.parametrize("formulation, size, channels, scale", (("1", 16, 3, 6), ("2", 8, 1, 12), ("none", 28, 1, 4),
                                                                ("1", 32, 3, 3), ("none", 104, 3, 1)))
def test_what_a_progress_picture_shows(formulation, size, channels, scale):
    """Rows of eight: the test images, x_hat and in stage 2 what the DDPM makes of it; pixels become squares."""
    torch.manual_seed(0)
    config = tiny(formulation=formulation, image_size=size, channels=channels, heads=0)
    model = perturbed(DiffuseVAE(config), 0.05)
    x = torch.rand(8, channels, size, size) * 2 - 1
    rows, noise = [], model.noise(8, diffusevae.generators(0, "progress", range(8)))
    if model.vae:
        rows = [x, model.vae.decode(model.encode(x)).detach()]
    rows.append(model.refine(rows[1] if rows else None, noise, steps=2, eta=0.0))
    for stage in ("vae", "ddpm") if model.vae else ("ddpm",):
        diffusevae.draw_progress(model, stage, x, Path("p.png"))
        expected = torch.stack(rows if stage == "ddpm" else rows[:2])    # [rows, 8, C, S, S]
        picture, pitch = torch.from_numpy(np.array(Image.open("p.png"))), size * scale + 2
        assert picture.shape == (len(expected) * pitch + 2, 8 * pitch + 2, 3)    # a frame of 2 around every image
        assert (picture[:2] == 255).all() and (picture[:, pitch:pitch + 2] == 255).all()    # in white
        cells = picture[2:, 2:].unflatten(0, (-1, pitch)).unflatten(2, (-1, pitch))[:, :-2, :, :-2]
        squares = cells.unflatten(1, (size, scale)).unflatten(4, (size, scale))
        pixels = squares[:, :, 0, :, :, 0]
        assert (squares == pixels[:, :, None, :, :, None]).all()
        shown = pixels.permute(0, 2, 4, 1, 3)    # [rows, 8, 3, S, S]
        wanted = (expected.clamp(-1, 1) + 1) * 127.5
        assert (shown - wanted).abs().max() <= 0.51    # rounded to 256 levels; gray has red, green, blue alike


def test_curves_hold_the_log():
    """The curves are the log's values at its steps, on logarithmic axes: the VAE's at left, the DDPM's at right."""
    log = finish(tiny(vae_steps=9, ddpm_steps=7), diffusevae.draw_shapes(8, 8, 0)[0])[1]
    left, right = diffusevae.draw_curves(log).axes
    for ax, stage, names in ((left, "vae", ("recon", "kl")), (right, "ddpm", ("loss",))):
        rows = [row for row in log if row["stage"] == stage]
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and stage in ax.get_title().lower()
        assert len(ax.lines) == len(names) and len(rows) > 3
        for line, name in zip(ax.lines, names):
            assert list(line.get_xdata()) == [row["step"] for row in rows]
            assert list(line.get_ydata()) == [row[name] for row in rows]


@pytest.mark.parametrize("losses", ((0.6, 0.2), (70, 20), (2, 1.9), (0.0391, 0.0389)))
def test_axes_of_losses_have_numbers(losses):
    """Also where the losses cross no power of ten, two numbers or more stand beside each curve."""
    log = [dict(stage=stage, step=step, loss=loss, recon=loss, kl=loss / 2) for stage in ("vae", "ddpm")
           for step, loss in zip((100, 3000), losses)]
    fig = diffusevae.draw_curves(log)
    fig.draw_without_rendering()
    for ax in fig.axes:
        low, high = ax.get_ylim()
        inside = [label.get_text() for at, label in zip(ax.get_yticks(), ax.get_yticklabels()) if low <= at <= high]
        assert sum(map(bool, inside)) >= 2


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("stages", ((), ("vae",), ("ddpm",)))
def test_curves_of_part_of_a_log(stages):
    """One stage, or none, or a single row of each, is drawn without a warning."""
    rows = [dict(stage=stage, step=3, loss=0.5, recon=0.4, kl=0.1) for stage in stages]
    diffusevae.save_figure(diffusevae.draw_curves(rows), Path("c.png"))
    assert np.asarray(Image.open("c.png")).shape[1] > 400


def test_curves_come_with_every_checkpoint(monkeypatch):
    """curves.png is there from the first checkpoint on, with the whole log of a resumed run; pictures every 2 steps."""
    seen, draw = [], diffusevae.draw_curves

    def watched(*args):
        for row in train_vae(*args):
            yield row
            seen.append(Path("r/curves.png").exists())    # once the row has been dealt with

    monkeypatch.setattr(diffusevae, "train_vae", watched)
    monkeypatch.setattr(diffusevae, "draw_curves", lambda log: seen.append(len(log)) or draw(log))
    words = ("--run-dir", "r", "--log-every", 1, "--save-every", 2, "--sample-every", 2)
    assert command(*words, "--stage", "vae") == 0 and seen == [False, 2, True, True, 4, True]
    seen.clear()
    assert command(*words, "--stage", "ddpm") == 0 and seen == [6, 8]
    assert set(files("r/progress")) == {f"{stage}_{step:06}.png" for stage in ("vae", "ddpm") for step in (2, 4)}


def grid_of(fig, size, columns):
    """The images in the one grid of a figure -> int [rows, columns, size, size, 3], and the labels of the rows."""
    (ax,) = fig.axes
    pixels = torch.from_numpy(np.asarray(ax.get_images()[0].get_array())).int()[1:, 1:]    # a frame of 1
    cells = pixels.unflatten(0, (-1, size + 1)).unflatten(2, (columns, size + 1))[:, :-1, :, :-1]
    return cells.transpose(1, 2), [label.get_text() for label in ax.get_yticklabels()]


@pytest.mark.parametrize("options", (dict(steps=9), dict(steps=9, formulation="2", z_cond=True, channels=1),
                                     dict(steps=30, eta=1.0, variance="large")))
def test_what_latents_shows(options):
    """Reconstructions with their errors, then walks from image to image, each as decoding by hand gives it."""
    torch.manual_seed(0)
    config = tiny(timesteps=30, z_dim=3, seed=5, **options)
    steps = min(config.steps, 25)
    model, given = perturbed(DiffuseVAE(config), 0.02), dict(steps=steps, eta=0.0, variance="small")
    x = torch.rand(3, config.channels, 8, 8) - 0.5
    images, labels = grid_of(diffusevae.draw_latents(model, x), 8, 3)
    z, noise = model.invert(x, steps=steps)
    random = model.noise(3, diffusevae.generators(5, "latents", range(3)))
    blurry = model.vae.decode(z).detach()
    rows = [x, blurry, model.decode(z, random, **given), model.decode(z, noise, **given)]
    for label, row in zip(labels[1:4], rows[1:]):    # printed to four digits
        error = np.square(row.double().numpy() - x.double().numpy()).mean()
        assert float(label.split()[-1]) == pytest.approx(error, abs=6e-5)
    assert len(labels) == len(images) == 7 and (rows[3] - x).abs().max() < 0.05 < (rows[2] - x).abs().max()
    between, first = (z[:1] + z[1:2]) / 2, z[:1].expand(3, -1)
    zs = torch.cat([z[:1], between, z[1:2]])
    arc = diffusevae.slerp(noise[0], noise[1], torch.tensor([0.0, 0.5, 1.0]))
    rows += [model.vae.decode(zs).detach(), model.decode(zs, noise[:1].expand_as(noise), **given)]
    rows += [model.decode(first, arc, **given)]
    expected = diffusevae.to_uint8(torch.stack(rows).flatten(0, 1)).unflatten(0, (7, 3)).int()
    assert (images - expected.permute(0, 1, 3, 4, 2)).abs().max() <= 1    # another batch rounds otherwise
    assert (images[4, 0] - images[1, 0]).abs().max() <= 1    # the VAE's: from the first to the second image
    assert (images[4, 2] - images[1, 1]).abs().max() <= 1
    for row in (5, 6):    # the refined: both from the first image to another
        assert (images[row, 0] - images[3, 0]).abs().max() <= 1 < (images[row, 2] - images[3, 0]).abs().max()


def test_when_latents_is_drawn(monkeypatch):
    """latents.png comes with samples.png, of the first eight test images or what there are of them, two at least."""
    assert command("--run-dir", "r", "--stage", "ddpm") == 0 and not Path("r/latents.png").exists()
    draw, split, seen = diffusevae.draw_latents, diffusevae.load_split, []
    monkeypatch.setattr(diffusevae, "draw_latents", lambda model, x: seen.append(x) or draw(model, x))
    for n, shown in ((20, 8), (2, 2), (1, 0)):
        Path("r/latents.png").unlink(missing_ok=True)
        monkeypatch.setattr(diffusevae, "load_split", lambda config, name: split(config, name)[:n])
        assert command("--run-dir", "r", "--stage", "sample", **small(num_samples=20)) == 0
        assert Path("r/latents.png").exists() == (shown > 0)
        if shown:
            assert torch.equal(seen.pop(), diffusevae.to_float(split(tiny(), "test")[:shown]))
        assert not seen


def complaints(out):
    """The names of the files that a command said it could not write, in order."""
    found = re.findall(r"^could not write (\S+) \((.*)\); continuing without it$", out, re.M)
    assert out.count("could not write") == len(found) and all(reason not in ("", "None") for _, reason in found)
    return [name for name, _ in found]


def test_pictures_that_cannot_be_written(capsys):
    """Where folders have the names of pictures, each is a line of warning; the run goes on, and no file is left over"""
    names = ["progress/vae_000004.png", "curves.png", "progress/ddpm_000004.png", "samples.png", "latents.png"]
    for name in names:
        Path("r", name).mkdir(parents=True)
    assert command("--run-dir", "r") == 0
    out = capsys.readouterr().out
    expected = [f"r/{name}" for name in (*names[:3], "curves.png", *names[3:])]    # the curves once in each stage
    assert complaints(out) == expected and "wrote" not in out
    assert set(files("r")) == {"model.pt", "config.json", "log.csv"}


def test_a_file_in_place_of_the_progress_folder(capsys):
    """A file called progress costs the pictures that would be in it, and nothing else."""
    Path("r").mkdir()
    Path("r/progress").touch()
    assert command("--run-dir", "r") == 0 and Path("r/latents.png").exists()
    names = [f"r/progress/{stage}_000004.png" for stage in ("vae", "ddpm")]
    assert complaints(capsys.readouterr().out) == names and files("r")["progress"] == b""


@pytest.mark.usefixtures("rendered")
def test_pictures_on_a_full_disk(capsys):
    """A disk that takes no more: a line of warning for each picture, the earlier ones stay, nothing half-written."""
    resource = pytest.importorskip("resource")
    assert command("--run-dir", "r", "--sample-every", 4) == 0
    before, (soft, hard) = files("r"), resource.getrlimit(resource.RLIMIT_FSIZE)
    model, x = DiffuseVAE.load("r", "cpu"), torch.zeros(8, 3, 8, 8)
    assert not complaints(capsys.readouterr().out)
    assert all(len(before[name]) > 500 for name in before if name.endswith(".png"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        code = command("--run-dir", "r", "--stage", "sample", **small(steps=1))
        diffusevae.draw_progress(model, "ddpm", x, Path("r/progress/ddpm_000004.png"))
        diffusevae.save_figure(diffusevae.draw_curves([]), Path("r/curves.png"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = ["samples.png", "latents.png", "progress/ddpm_000004.png", "curves.png"]
    assert code == 0 and files("r") == before
    assert complaints(capsys.readouterr().out) == [f"r/{name}" for name in names]


@pytest.mark.usefixtures("rendered")
def test_pictures_broken_off_midway(capsys, monkeypatch):
    """A writer that fails after half of its bytes leaves the picture before it as it was."""
    import matplotlib.figure
    import torchvision.utils
    assert command("--run-dir", "r") == 0
    before = files("r")

    def half(*args, **options):
        path = next(arg for arg in args if isinstance(arg, Path))
        assert path.name.endswith(".tmp")    # the picture before is not touched
        path.write_bytes(before["samples.png"][:len(before["samples.png"]) // 2])
        raise OSError(28, "No space left") if args[0] is path else OSError("encoder error -2")    # Pillow: no number

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **options: half(path))
    monkeypatch.setattr(torchvision.utils, "save_image", half)
    capsys.readouterr()
    assert command("--run-dir", "r", ddpm_steps=5) == 0
    out, names = capsys.readouterr().out, ["progress/ddpm_000005.png", "curves.png", "samples.png", "latents.png"]
    assert complaints(out) == [f"r/{name}" for name in names]
    assert out.count("(encoder error -2)") == 1 and out.count("(No space left)") == 3
    after = files("r")
    assert all(after[name] == before[name] for name in before if name.endswith(".png")) and len(after) == len(before)


# --------------------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------------------


def on_terminal(monkeypatch, action):
    """What the action writes to a terminal."""
    written = []
    terminal = types.SimpleNamespace(write=written.append, flush=lambda: None, isatty=lambda: True)
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", terminal)
        action()
    return "".join(written)


def test_lines_on_a_terminal(capsys, monkeypatch):
    """On a terminal every line overwrites what a transient one left there; in a pipe they are lines like others."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)    # a notebook would count as a terminal
    words = ("--log-every", 1, "--sample-batch", 2, "--sample-every", 0)
    text = on_terminal(monkeypatch, lambda: command("--run-dir", "a", *words))
    assert command("--run-dir", "b", *words) == 0
    piped = capsys.readouterr().out
    assert "\r" not in piped and piped.endswith("\n") and text.startswith("\r")
    lines = text.split("\r")[1:]
    neutral = lambda line: re.sub(r"[\d.]+ (images/s|min)|\b[ab]\b", "", line).rstrip()    # speed, time, run folder
    assert [neutral(line) for line in lines] == [neutral(line) for line in piped.splitlines()]
    for line in lines:
        transient = re.match(r"(vae|ddpm) [123]/4 |sampled ", line)
        assert len(line.rstrip("\n")) >= 79 and line.count("\n") == line.endswith("\n") == (not transient), line
    assert sum(not line.endswith("\n") for line in lines) == 8 and lines[-1].endswith("\n")


def slow_clock(monkeypatch):
    """A clock that runs on by a minute whenever it is read; returns the list that holds its time."""
    now = [0.0]
    monkeypatch.setattr(diffusevae, "time", types.SimpleNamespace(
        perf_counter=lambda: now.append(now.pop() + 60) or now[0]))
    return now


def test_time_left_in_training(capsys, monkeypatch):
    """At a minute a step, the minutes left are the steps left; what pictures and checkpoints take does not count."""
    now, later = slow_clock(monkeypatch), lambda *args: now.append(now.pop() + 10**6)
    monkeypatch.setattr(diffusevae, "draw_progress", later)
    save = diffusevae.save_checkpoint
    monkeypatch.setattr(diffusevae, "save_checkpoint", lambda *args: later() or save(*args))
    words = ("--run-dir", "r", "--stage", "vae", "--log-every", 1, "--save-every", 1)
    assert command(*words, vae_steps=4, vae_batch=300) == 0
    found = re.findall(r"^vae (\d/4)  loss \d+\.\d{4}  5 images/s  (\d\.\d) min left$", capsys.readouterr().out, re.M)
    assert found == [("1/4", "3.0"), ("2/4", "2.0"), ("3/4", "1.0"), ("4/4", "0.0")]


def test_time_left_in_sampling(capsys, monkeypatch):
    """After each batch: how many images are done, how many there are, and the minutes left at a minute a batch."""
    assert command("--run-dir", "r") == 0
    capsys.readouterr(), slow_clock(monkeypatch)
    assert command("--run-dir", "r", "--stage", "sample", "--save-images",
                   **small(num_samples=7, sample_batch=2)) == 0
    found = re.findall(r"^sampled (\d) of 7 images  (\d\.\d) min left$", capsys.readouterr().out, re.M)
    assert found == [("2", "2.5"), ("4", "1.5"), ("6", "0.5"), ("7", "0.0")]


def test_progress_of_reading_a_folder(tmp_path, capsys, monkeypatch):
    """A line whenever 500 more images are read, each over the one before on a terminal; damaged ones do not count."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    names = [Path(f"{i:04}.png") for i in range(1300)]
    monkeypatch.setattr(diffusevae, "find_images", lambda folder: names)
    blank = np.zeros((3, 8, 8), np.uint8)
    decode = lambda path, size, channels: None if path.stem == "0007" else blank
    monkeypatch.setattr(diffusevae, "decode_image", decode)
    read = lambda: diffusevae.load_folder(tmp_path, (8, 8), True)[0]
    n = len(read())
    assert 1190 < n < 1270    # 19 in 20 of 1299; 5 SE is 40
    lines = [f"reading {n + 1} training images in {tmp_path}", f"read 500 of {n + 1} images", f"read 1000 of {n + 1} images",
             f"skipped 1 of {n + 1} images (damaged or unusable): '0007.png'"]
    assert capsys.readouterr().out.splitlines() == lines
    text = on_terminal(monkeypatch, read)
    assert text == "".join(f"\r{line:79}" + "\n" * (k in (0, 3)) for k, line in enumerate(lines))


@pytest.mark.parametrize("words, plan", (
    ("", "VAE to step 4, prior, U-Net to step 4, samples"), ("--stage ddpm", "VAE to step 4, prior, U-Net to step 4"),
    ("--stage vae", "VAE to step 4, prior"), ("--formulation none", "U-Net to step 4, samples")))
def test_the_plan_comes_first_and_the_pictures_last(capsys, words, plan):
    """A run starts with one line on all that it will do; one that samples ends with the places of its pictures."""
    assert command("--run-dir", "r", *words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    (planned,) = (i for i, line in enumerate(lines) if line.startswith("plan: "))
    assert lines[planned].split(";")[0] == f"plan: {plan}"
    assert planned < next(i for i, line in enumerate(lines) if re.match("(vae|ddpm): ", line))
    wrote = [line.split()[1].rstrip(":") for line in lines if line.startswith("wrote ")]
    pictures = [] if "--stage" in words else ["r/samples.png", "r/latents.png"][:1 if "none" in words else 2]
    assert wrote == pictures == [name for name in ("r/samples.png", "r/latents.png") if Path(name).exists()]
    assert not wrote or all(line.startswith("wrote ") for line in lines[-len(wrote):])


@pytest.mark.parametrize("steps", (300, 3000, 10_000, 50_000, 200_000, 400_000))
def test_numbers_at_the_axes_of_curves(steps):
    """However long a run is, each axis has two numbers or more, and none of them runs into the next."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    log = [dict(stage=stage, step=step, loss=loss, recon=99 * loss, kl=30) for stage in ("vae", "ddpm")
           for step, loss in ((100, 0.3), (steps, 0.03))]
    fig = diffusevae.draw_curves(log)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    for ax in fig.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
            labels = [label for at, label in ticks if low <= at <= high and label.get_text()]
            boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
            assert len(boxes) >= 2 and not any(one.overlaps(two) for one, two in zip(boxes, boxes[1:]))


def test_a_plain_ddpm_is_not_told_of_a_vae(capsys):
    """Formulation none has no VAE, and no word of it or of refinement is printed."""
    assert command("--run-dir", "r", "--formulation", "none") == 0
    out = capsys.readouterr().out
    assert "VAE" not in out and "refined" not in out and "prior" not in out


@pytest.mark.usefixtures("rendered")
def test_latents_do_not_depend_on_the_number_of_samples():
    """latents.png is of eight test images, however many samples are asked for."""
    assert command("--run-dir", "r", num_samples=4) == 0
    sizes = [Image.open("r/latents.png").size]
    for n in (8, 1):
        Path("r/latents.png").unlink()
        assert command("--run-dir", "r", "--stage", "sample", **small(num_samples=n)) == 0
        assert Path("r/latents.png").exists(), n
        sizes.append(Image.open("r/latents.png").size)
    assert len(set(sizes)) == 1, sizes


def test_a_picture_interrupted_leaves_no_file():
    """Ctrl-C while a picture is written leaves no temporary file."""
    def fail(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        diffusevae.try_to_write(Path("x.png"), fail)
    assert not files(".")


@pytest.mark.parametrize("size", (34, 51, 64, 99))
def test_a_progress_image_is_about_100_pixels(size):
    """Every image of a progress picture is enlarged to 70 to 140 pixels, where its own size allows."""
    torch.manual_seed(0)
    model = diffusevae.DiffuseVAE(tiny(formulation="none", image_size=size + size % 2, heads=0, steps=1))
    diffusevae.draw_progress(model, "ddpm", torch.zeros(1, 3, size, size), Path("p.png"))
    assert 70 <= Image.open("p.png").size[0] - 4 <= 140


def test_an_error_on_a_terminal_has_a_line_of_its_own(monkeypatch):
    """The line that a transient one left is ended before an error is printed, to standard error, below it."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

    def full(model, state):
        if state["steps"]["vae"] == 2:
            raise OSError("could not write r/model.pt")

    monkeypatch.setattr(diffusevae, "save_checkpoint", full)
    codes, words = [], ("--run-dir", "r", "--log-every", 1, "--save-every", 2)
    text = on_terminal(monkeypatch, lambda: codes.append(command(*words)))
    assert codes == [2] and text.endswith("\n") and text.splitlines()[-1].lstrip("\r").startswith("vae 2/4")


def test_names_that_are_not_utf8(tmp_path):
    """A file name of another encoding is read like any other."""
    for name in (b"caf\xe9.png", b"plain.png", b"more.png"):
        Image.fromarray(np.full((9, 9), 50, np.uint8)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", os.path.join(os.fsencode(tmp_path), name))
    sizes = [len(diffusevae.load_images("folder", tmp_path, 8, split)[0]) for split in ("train", "test")]
    assert sum(sizes) == 3 and min(sizes) > 0


def test_a_loaded_mixture_samples_the_same():
    """To the bit: what a run samples after training, a later process samples from the file."""
    mixture = GaussianMixture(2, 64).fit(torch.randn(300, 64), generator=torch.Generator().manual_seed(0))
    again = GaussianMixture(2, 64)
    again.load_state_dict({name: value.clone(memory_format=torch.contiguous_format)
                           for name, value in mixture.state_dict().items()})
    one, two = (m.sample(50, torch.Generator().manual_seed(1)) for m in (mixture, again))
    assert mixture.scale_tril.is_contiguous() and torch.equal(one, two)


def test_standard_output_that_is_closed(capsys, monkeypatch):
    """Without a standard output, or with a pipe that breaks, training goes on to its end."""
    monkeypatch.setattr(sys, "stdout", None)
    assert command("--run-dir", "r") == 0

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(sys, "stdout", Broken())
    assert command("--run-dir", "s") == 0 and "Broken pipe" in capsys.readouterr().err
    assert alike("r/model.pt", "s/model.pt")


def test_a_finished_run_needs_no_data(capsys, monkeypatch):
    """When training is done, the same command samples although the images are gone; ~nosuch is a plain name."""
    assert command("--run-dir", "~nosuch/r") == 0 and Path("~nosuch/r/model.pt").exists()

    def gone(config, split):
        raise ValueError("the images are gone")
    monkeypatch.setattr(diffusevae, "load_split", gone)
    capsys.readouterr()
    assert command("--run-dir", "~nosuch/r") == 0 and "is complete" in capsys.readouterr().out


def test_config_takes_paths_and_numpy_numbers():
    """Values that a checkpoint could not hold are made plain: a Path, a NumPy number, a list."""
    c = Config.preset("shapes", run_dir=Path("r"), lr=np.float32(0.5), unet_mults=[1, 2])
    assert (c.run_dir, c.lr, c.unet_mults) == ("r", 0.5, (1, 2)) and type(c.lr) is float


def test_whole_numbers():
    """1e4 is a number of steps, kept as an int; 2.5 is not."""
    c = Config.preset("shapes", ddpm_steps=1e4)
    assert c.ddpm_steps == 10_000 and type(c.ddpm_steps) is int
    with pytest.raises(ValueError, match="--z-dim must be a whole number, got 2.5"):
        Config.preset("shapes", z_dim=2.5)


def test_unknown_split_is_refused():
    """Any other word than train and test would give the test images, if it were not refused."""
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        diffusevae.load_images("shapes", "data", 8, "val")


def test_without_a_vae_there_is_no_first_stage():
    """train_vae of a plain DDPM is a ValueError that says so."""
    with pytest.raises(ValueError, match="formulation none has no VAE"):
        next(train_vae(DiffuseVAE(tiny(formulation="none")), diffusevae.draw_shapes(8, 8, 0)[0], new_state()))


# --------------------------------------------------------------------------------------------------------
# The file as a library
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, use", (
    ("VAE", "VAE(8, 3, 4, 4).loss(torch.zeros(2, 3, 8, 8))[0]"),
    ("UNet ResBlock Attention zero_module GroupNorm timestep_embedding",
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


def test_loading_under_other_defaults():
    """In a notebook whose default is float64 or another device a run loads, and samples as elsewhere."""
    assert command("--run-dir", "r", "--stage", "ddpm") == 0
    draw = lambda model: model.sample(3, each_seeded(1, 2, 3), eta=1.0, prior="normal")
    expected = draw(DiffuseVAE.load("r", "cpu"))
    try:
        torch.set_default_dtype(torch.float64)
        double = DiffuseVAE.load("r", "cpu")
        assert draw(double).isfinite().all() and double.sample(3).isfinite().all()
        assert double.reconstruct(diffusevae.to_float(torch.zeros(2, 3, 8, 8).byte()).double())[0].shape == (2, 3, 8, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    single = double.float()
    assert torch.equal(draw(single), expected)    # the weights are those of the run
    try:
        torch.set_default_device("meta")
        model, state = diffusevae.load_run("r")
        loaded = DiffuseVAE.load("r", "cpu")
    finally:
        torch.set_default_device(None)
    assert torch.equal(draw(loaded), expected)
    assert torch.allclose(draw(model), expected, atol=1e-5)    # not yet channels last: sums in another order
    assert state["steps"] == dict(vae=4, ddpm=4) and loaded.sample(3).isfinite().all()
    model.config.ddpm_steps = 6    # and trains on
    assert [row["step"] for row in train_ddpm(model, diffusevae.draw_shapes(8, 8, 0)[0], state)] == [6]


def test_devices_and_layouts():
    """A device is given as a name or as torch has it, what is missing is refused; channels last, but not on MPS."""
    assert command("--run-dir", "r", "--stage", "ddpm") == 0
    for name in ("cpu", torch.device("cpu")):
        assert diffusevae.find_device(name) == torch.device("cpu")
        weight = DiffuseVAE.load("r", name).unet.middle[0].second[2].weight
        assert weight.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    for name in ("cuda:7", "cuda:x", "xpu:9", "gpu", ""):
        with pytest.raises(ValueError, match=f"device {name} is not available"):
            DiffuseVAE.load("r", name)
    last = {kind: diffusevae.layout(torch.device(kind)) == torch.channels_last for kind in ("cpu", "cuda", "mps")}
    assert last == dict(cpu=True, cuda=True, mps=False)
    assert diffusevae.layout(torch.device("mps")) == torch.contiguous_format
    batch = diffusevae.random_batch(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), 4, True, torch.device("cpu"))
    assert batch.is_contiguous(memory_format=torch.channels_last)


class Pipe:
    """Standard output as some servers have it: it can be written to, and little more."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def isatty(self):
        return False

    def flush(self):
        pass


@pytest.mark.parametrize("stream", (io.StringIO, Pipe, lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii")))
def test_any_standard_output_will_do(monkeypatch, stream):
    """The file runs as a program where standard output is no terminal and no file; names may be beyond ASCII."""
    out = stream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "argv", ["diffusevae.py", "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(diffusevae.__file__, run_name="__main__")
        diffusevae.report("ünter")
    out.flush()
    text = (out.getvalue() if isinstance(out, io.StringIO) else out.text if isinstance(out, Pipe)
            else out.buffer.getvalue().decode())
    assert end.value.code == 0 and text.startswith("usage: python diffusevae.py")
    assert text.endswith("\\xfcnter\n" if isinstance(out, io.TextIOWrapper) else "ünter\n")


def test_lines_that_are_overwritten(capsys, monkeypatch):
    """In a notebook each line starts over the last and covers it, 79 columns wide; elsewhere there are plain lines."""
    def told():
        diffusevae.report("step 1", transient=True)
        diffusevae.report("step 2", transient=True)
        diffusevae.report("done")
        return capsys.readouterr().out

    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert told() == "step 1\nstep 2\ndone\n"
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    pad = lambda text: "\r" + text + " " * (79 - len(text))
    assert told() == pad("step 1") + pad("step 2") + pad("done") + "\n"


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
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 17 and not list(tmp_path.iterdir())


def test_notebook_as_stored():
    """The stored outputs are one run from top to bottom, without error or warning, small; texts and cells are short."""
    path = Path(diffusevae.__file__).with_name("train.ipynb")
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert 30 <= len(cells) <= 38 and len(" ".join(text).split()) <= 1800 and path.stat().st_size < 2e6
    shown = [cell for cell in code if not cell["metadata"].get("jupyter", {}).get("source_hidden")]
    assert len(shown) >= len(code) - 2 and max(len(cell["source"]) for cell in shown) <= 30    # lines, empty ones too
    assert max(len(line.rstrip("\n")) for cell in code for line in cell["source"]) <= 104    # what JupyterLab shows
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [o for cell in code for o in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    figures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    widths = [Image.open(io.BytesIO(base64.b64decode("".join(png)))).width for png in figures]
    assert len(widths) >= 17 and max(widths) <= 1000
    headings = [line for block in text for line in block.splitlines() if line.startswith("## ")]
    numbers = [int(line.split()[1]) for line in headings[:-1]]    # the last one is where to go next
    assert numbers == list(range(1, len(headings))) and {"1", "2", "3", "4", "5", "7", "8"} == set(
        re.findall(r"\d", " ".join(re.findall(r"\(file, (.*?)\)", " ".join(headings)))))    # sections of the file


def test_links_between_the_texts():
    """Every relative link of README, RESULTS and the notebook leads to a file, and every anchor to a heading there."""
    home, found = Path(diffusevae.__file__).parent, 0
    cells = json.loads((home / "train.ipynb").read_text())["cells"]
    book = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    texts = {name: (home / name).read_text() for name in ("README.md", "assets/RESULTS.md")}
    for name, text in {**texts, "train.ipynb": book}.items():
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            path = (home / name).parent / path if path else home / name
            assert path.is_file(), (name, target)
            titles = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")] if anchor else []
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]    # GitHub's rule
            assert not anchor or anchor in anchors, (name, target)
            found += 1
    assert found > 30


def test_import_has_no_side_effects():
    """Importing prints nothing, writes nothing, and leaves torchvision and matplotlib for later."""
    code = "import sys, diffusevae; print([m for m in ('torchvision', 'matplotlib', 'PIL') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(Path(diffusevae.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "[]\n" and not done.stderr and not os.listdir()
