"""Tests of diffusevae.py against independent truth: closed forms, integrals, textbook formulas, files.

    python -m pytest test_diffusevae.py

They need no network and no GPU (one test uses CUDA if there is one). The sections are those of diffusevae.py.
"5 SE" in a comment is five standard errors of a Monte Carlo mean: a correct program fails such a test once in two
million samples, and all seeds are fixed.
"""
import base64, collections, contextlib, copy, csv, dataclasses, functools, inspect, io, itertools, json, math
import os, re, runpy, shutil, subprocess, sys, time, types, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributions as D
from torch.utils._python_dispatch import TorchDispatchMode

import diffusevae
from diffusevae import (
    VAE, Config, DiffuseVAE, GaussianDiffusion, GaussianMixture, UNet, new_state, randn, timesteps_for,
    train_ddpm, train_vae)

HOME = Path(diffusevae.__file__).resolve().parent
sys.path.append(str(HOME / "assets"))
import likelihood

torch.set_num_threads(1)    # small networks are slower on two threads, and far slower beside other work
SAVE_FIGURE = diffusevae.save_figure
TINY = dict(
    image_size=8, unet_width=4, unet_mults=(1, 2), res_blocks=1, heads=1, vae_width=2, z_dim=2, gmm_components=3,
    cond_noise=0.0, vae_steps=4, ddpm_steps=4, batch_size=4, vae_batch=4, steps=2, num_samples=4, device="cpu")
STAGES = dict(vae=train_vae, ddpm=train_ddpm)

def lacking(what):
    """Skip a test on Windows, which has no `what`."""
    return pytest.mark.skipif(os.name == "nt", reason=f"Windows has no {what}")

@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, from one seed, with few `shapes`; figures become empty files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")    # the width of the terminal
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)    # a notebook would count as a terminal
    torch.manual_seed(0)
    def blank(path, draw, *args):    # rendering takes a second
        draw(*args)
        diffusevae.try_to_write(path, Path.touch)
    draw = diffusevae.draw_shapes
    monkeypatch.setattr(diffusevae, "save_figure", blank)
    monkeypatch.setattr(diffusevae, "draw_shapes",
                        lambda n, size, seed: draw(n // (500 if n > 5000 else 1), size, seed))

@pytest.fixture
def rendered(small_world, monkeypatch):
    """Figures are rendered after all."""
    monkeypatch.setattr(diffusevae, "save_figure", SAVE_FIGURE)

def double(*shape):
    """Standard normal float64."""
    return torch.randn(*shape, dtype=torch.float64)

def images_in(*shape):
    """Random images in [-1, 1]."""
    return torch.rand(*shape) * 2 - 1

def shapes(n=8):
    """n images of `shapes`, uint8 [n, 3, 8, 8]."""
    return diffusevae.draw_shapes(n, 8, 0)[0]

def perturbed(net, scale=0.2):
    """The network with noise on every parameter, so that nothing is zero as it was initialized."""
    for p in net.parameters():
        p.data.add_(scale * torch.randn_like(p))
    return net

def seeded(seed):
    """A generator with this seed."""
    return torch.Generator().manual_seed(seed)

def each_seeded(*seeds):
    """A list of generators, one for each seed."""
    return [seeded(seed) for seed in seeds]

def assert_normal(z, mean, sd):
    """z [N, D] have this mean and standard deviation, each within 5 SE."""
    n = len(z)
    assert ((z.mean(0) - mean).abs() < 5 * sd / n**0.5).all()
    assert ((z.std(0) / sd - 1).abs() < 5 / (2 * n)**0.5).all()

def tiny(**options):
    """A Config that trains in a blink."""
    return Config.preset("shapes", **{**TINY, "hflip": True, "log_every": 2, "save_every": 3, **options})

def with_prior(model):
    """The model with a mixture fitted to some codes."""
    model.mixture = GaussianMixture(2, model.config.z_dim).fit(torch.randn(50, model.config.z_dim))
    return model

def finish(config, images):
    """A model built from the seed and trained through its stages, and all log rows."""
    torch.manual_seed(config.seed)
    model, state = DiffuseVAE(config), new_state()
    stages = (train_vae, train_ddpm) if model.vae else (train_ddpm,)
    return model, [row for stage in stages for row in stage(model, images, state)]

def in_words(options):
    """Options as words of the command line, except those that are None."""
    return [f"{diffusevae.flag(name)}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in options.items() if value is not None]

def command(*words, **options):
    """Run the command line with these words and options, and with TINY's; return the exit code."""
    words = " ".join(map(str, words)).split()
    named = {word[2:].split("=")[0].replace("-", "_") for word in words}
    options = {name: value for name, value in {**TINY, **options}.items() if name not in named}
    try:
        return diffusevae.main(words + in_words(options))
    except SystemExit as e:    # argparse's own way
        return e.code

def reopen(run, *words, **options):
    """Like `command`, for a run that exists: sample; the options of the model come from its folder."""
    saved = dict.fromkeys(TINY) | dict(run_dir=run, stage="sample", steps=2, num_samples=4, device="cpu")
    return command(*words, **{**saved, **options})

def refusal(capsys, code):
    """The message of a command that ended with exit code 2: one sentence, after argparse's usage if any."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("usage: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("diffusevae") or "error:" in lines[0], err
    assert "Traceback" not in err
    return err

def files(folder):
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}

def flat(value, name=""):
    """Every leaf of nested dictionaries and lists, by name."""
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in flat(x, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)) and not all(isinstance(v, int) for v in value):
        return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{name}/{i}").items()}
    return {name: value}

def alike(one, two, but=()):
    """Whether the checkpoints of two runs hold the same, to the bit, except for times and what `but` names."""
    one, two = (flat(torch.load(Path(run, "model.pt"), weights_only=True)) for run in (one, two))
    same = lambda a, b: torch.equal(a, b) if torch.is_tensor(a) else a == b
    skip = ("steps_per_s", *but)
    return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one if not k.endswith(skip))

# ---- 1 VAE -------------------------------------------------------------------------------------------
def test_vae_kl():
    """The KL term equals torch.distributions' and the mean of log q(z) - log p(z) over samples of z."""
    vae, x = perturbed(VAE(8, 3, 5, 4)), images_in(4, 3, 8, 8)
    kl = vae.loss(x)[2].item()
    mu, logvar = (v.detach().double() for v in vae.encode(x))
    q, p = D.Normal(mu, (logvar / 2).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    assert kl == pytest.approx(D.kl_divergence(q, p).sum(1).mean().item(), rel=1e-5)    # float32 sums
    z = q.sample((100_000,))
    draws = (q.log_prob(z) - p.log_prob(z)).sum(2).mean(1)
    assert abs(draws.mean() - kl) < 5 * draws.std() / len(draws)**0.5    # 5 SE

def test_vae_squared_error():
    """The squared error is that of images in [0, 1], summed over pixels; the loss adds kl_weight times the KL."""
    vae, x, x_hat = VAE(8, 3, 2, 2), images_in(5, 3, 8, 8), images_in(5, 3, 8, 8)
    vae.decode = lambda z: x_hat
    loss, error, kl = vae.loss(x, 0.3)
    a, b = ((v.double().numpy() + 1) / 2 for v in (x, x_hat))
    assert error.item() == pytest.approx(((a - b)**2).sum((1, 2, 3)).mean(), rel=1e-5)
    assert loss.item() == pytest.approx(error.item() + 0.3 * kl.item(), rel=1e-5)
    vae.decode = lambda z: torch.ones(5, 3, 8, 8)
    assert vae.loss(-torch.ones(5, 3, 8, 8))[1].item() == 3 * 8 * 8    # black against white: 1 a pixel and channel

def test_vae_loss_samples_z_from_q():
    """The loss decodes a z with the mean and the standard deviation that encode gives."""
    vae, seen, n = perturbed(VAE(8, 1, 3, 2)), [], 20_000
    decode = vae.decode
    vae.decode = lambda z: seen.append(z) or decode(z)
    x = images_in(1, 1, 8, 8)
    with torch.no_grad():
        vae.loss(x.expand(n, -1, -1, -1))
        mu, logvar = vae.encode(x)
    assert_normal(seen[0], mu[0], (logvar[0] / 2).exp())

def test_vae_keeps_logvar_within_20():
    """logvar is clamped to -20..20, so that exp(logvar) and the loss stay finite."""
    vae, x = VAE(8, 3, 2, 2), images_in(4, 3, 8, 8)
    mu, logvar = vae.encode(x)
    assert torch.equal(vae.encoder(x), torch.cat([mu, logvar], dim=1))    # otherwise they are the encoder's output
    vae.encoder[-1].bias.data[2:] = torch.tensor([1000.0, -1000.0])
    mu, logvar = vae.encode(x)
    assert torch.equal(logvar, torch.tensor([[20.0, -20.0]]).expand(4, 2)) and vae.loss(x)[0].isfinite()

@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("size", (8, 9, 16, 24, 32))
def test_vae_shapes(size, channels):
    """Images of any size have codes of z_dim numbers and are decoded to their own shape, within [-1, 1]."""
    vae, x = VAE(size, channels, 7, 4), images_in(2, channels, size, size)
    assert [v.shape for v in vae.encode(x)] == [(2, 7), (2, 7)]
    x_hat = vae.decode(100 * torch.randn(2, 7))
    assert x_hat.shape == x.shape and x_hat.abs().max() <= 1

# ---- 2 Diffusion -------------------------------------------------------------------------------------
def wavy(x, t):
    """A smooth network of no special form."""
    return torch.tanh(1.3 * x + 0.2) + 0.1 * torch.sin(t.to(x).view(-1, *[1] * (x.dim() - 1)))

def gaussian_eps(d, mean, variance, shift=0):
    """The best eps at x_t for data N(mean, variance): (x_t - sqrt(a) mean) sqrt(1 - a) / (a variance + 1 - a)."""
    def net(x, t):
        a = d.alpha_bar[t].view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - shift - a.sqrt() * mean) / (a * variance + 1 - a)
    return net

@pytest.mark.parametrize("T", (1000, 100, 10))
@pytest.mark.parametrize("schedule, end", (("linear", 0.02), ("geometric", 0.05)))
def test_linear_and_geometric_schedules(schedule, end, T):
    """Betas have the given ends, by default 1000 / T times those at T = 1000, and equal differences or ratios."""
    ends = np.minimum(0.999, np.array([1e-4, end]) * 1000 / T)
    for given, expected in (((), ends), ((0.01, 0.64), (0.01, 0.64)))[:2 if T > 10 else 1]:
        a = GaussianDiffusion(T, *given, schedule=schedule).alpha_bar.numpy()
        betas = 1 - a / np.concatenate([[1.0], a[:-1]])
        np.testing.assert_allclose(betas[[0, -1]], expected, rtol=1e-9)    # 1 - a_t / a_s: 1e-16 in 1e-4
        steps = np.diff(betas if schedule == "linear" else np.log(betas))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)    # differences of rounded numbers

@pytest.mark.parametrize("T", (10, 1000))
def test_cosine_schedule(T):
    """a_t = f(t) / f(0), f(t) = cos((t / T + 0.008) / 1.008 pi / 2)^2, betas at most 0.999 (2102.09672, eq. 17)."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2)**2 for t in range(T + 1)]
    a = 1.0
    expected = [(a := a * (1 - min(0.999, 1 - after / before))) for before, after in zip(f, f[1:])]
    np.testing.assert_allclose(GaussianDiffusion(T, schedule="cosine").alpha_bar.numpy(), expected, rtol=1e-9)

@pytest.mark.parametrize("schedule", ("linear", "cosine", "geometric"))
def test_alpha_bar(schedule):
    """alpha_bar is float64 and falls from nearly 1 to nearly 0; q_sample multiplies with float32, saved nowhere."""
    d = GaussianDiffusion(1000, 1e-4, 0.05, schedule)
    a = d.alpha_bar
    assert a.dtype == torch.float64 and a.shape == (1000,) and d.alpha_bar_at(-1) == 1
    assert (a.diff() < 0).all() and 0.999 < a[0] < 1 and 0 < a[999] < 0.01
    assert [d.alpha_bar_at(t) for t in (0, 7, 999)] == a[[0, 7, 999]].tolist()
    tables = dict(sqrt_alpha_bar=a.sqrt().float(), sqrt_one_minus_alpha_bar=(1 - a).sqrt().float())
    assert not d.state_dict() and all(torch.equal(x, tables.pop(name)) for name, x in d.named_buffers())

@pytest.mark.parametrize("t", (-1, 20, 21))
def test_timesteps_outside_the_range_are_errors(t):
    """A t outside 0..T-1 is an error in every method."""
    d, x = GaussianDiffusion(20, 0.01, 0.6, predict="v"), double(3, 2)
    for bad in (torch.full((3,), t), torch.tensor([0, t, 19])):
        for method in (d.q_sample, d.target, d.predict_x0):
            pytest.raises((IndexError, RuntimeError), method, x, bad, x)

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
    """One ancestral step from x_t to s with a network that knows x_0: x_s without its noise, and the variance."""
    a, variance = d.alpha_bar_at(t), d.posterior_variance(t, s)
    d.step_pairs = lambda *options: [(t, s)]
    net = lambda x, t: (x - shift - a**0.5 * x0) / (1 - a)**0.5
    x_s = d.sample(net, x_t - shift, 1, eta=1.0, shift=shift, clip=False, generator=seeded(8))
    drawn = torch.randn(x_t.shape, dtype=torch.float64, generator=seeded(8))
    return x_s - variance**0.5 * drawn, variance

@pytest.mark.parametrize("shift", (0.0, 0.4))
@pytest.mark.parametrize("t, s", ((1, 0), (9, 8), (9, 3), (15, 1), (19, 0)))
def test_ancestral_sampling_is_bayes(t, s, shift):
    """Mean and variance of x_s given x_t, x_0 are those of q(x_s | x_0) q(x_t | x_s), normalized on a fine grid."""
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

def exact(d):
    """The diffusion with float64 tables, for tests at 1e-9: those in float32 are rounded at 6e-8."""
    d.sqrt_alpha_bar, d.sqrt_one_minus_alpha_bar = d.alpha_bar.sqrt(), (1 - d.alpha_bar).sqrt()
    return d

@pytest.mark.parametrize("predict", ("eps", "v"))
def test_target_round_trip(predict):
    """From the true target predict_x0 recovers x_0 and eps; v is sqrt(a) eps - sqrt(1 - a) x_0."""
    d = exact(GaussianDiffusion(1000, predict=predict))
    x0, eps, shift = double(3, 4, 6)
    t = torch.tensor([0, 10, 500, 999])
    target, a = d.target(x0, t, eps), d.alpha_bar[t, None]
    assert torch.allclose(target, eps if predict == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0, atol=1e-15)
    found = d.predict_x0(d.q_sample(x0, t, eps, shift), t, target, shift)
    # 1e-16 of rounding is divided by sqrt(a_999) = 0.006
    assert torch.allclose(found[0], x0, atol=1e-12) and torch.allclose(found[1], eps, atol=1e-12)

@pytest.mark.parametrize("shift", (0.0, 0.4))
@pytest.mark.parametrize("predict", ("eps", "v"))
def test_loss_of_any_network(predict, shift):
    """The loss is the mean squared error to eps or v at the x_t shown; t is spread evenly; data have any shape."""
    d, x0, seen = exact(GaussianDiffusion(30, predict=predict)), double(60, 5), []
    net = lambda x, t: seen.append((x, t)) or wavy(x, t)
    loss, ((x_t, t),) = d.loss(net, x0, shift), seen
    a = d.alpha_bar[t, None]
    noise = (x_t - shift - a.sqrt() * x0) / (1 - a).sqrt()
    target = noise if predict == "eps" else a.sqrt() * noise - (1 - a).sqrt() * x0
    assert loss.item() == pytest.approx((wavy(x_t, t) - target).square().mean().item(), rel=1e-9)
    assert torch.bincount(t, minlength=30).tolist() == [2] * 30
    assert abs(noise.mean()) < 5 / 300**0.5 and abs(noise.var() - 1) < 5 * (2 / 300)**0.5    # 5 SE

def test_formulation_2_is_formulation_1_shifted():
    """With a network that sees x_t - shift, x_t and the means move by the shift, the clean image does not."""
    d, x0, noise, shift = GaussianDiffusion(50, 2e-3, 0.4), double(3, 4), double(3, 4), double(3, 4)
    t, net = torch.tensor([0, 20, 49]), lambda x, t: wavy(x - shift, t)  # (y + shift) - shift rounds; steps add that up
    near = lambda a, b: torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    plain = d.q_sample(x0, t, noise)
    assert near(d.q_sample(x0, t, noise, shift), plain + shift)
    for i, s in ((0, -1), (20, 19), (20, 3), (49, -1)):
        e = GaussianDiffusion(50, 2e-3, 0.4)
        one, two = ancestral_step(e, plain, x0, i, s, 0), ancestral_step(e, plain + shift, x0, i, s, shift)
        assert near(two[0], one[0] + (shift if s >= 0 else 0)) and one[1] == two[1]
    for steps, eta, clip, order in ((1, 0.0, True, 1), (7, 0.0, False, 1), (10, 0.5, True, 1), (50, 1.0, True, 1),
                                    (50, 1.0, False, 1), (7, 0.0, True, 2), (20, 0.0, False, 2)):
        options = dict(eta=eta, clip=clip, order=order)
        one = d.sample(wavy, noise, steps, generator=seeded(3), **options)
        two = d.sample(net, noise, steps, generator=seeded(3), shift=shift, **options)
        assert near(one, two), (steps, eta, clip, order)
    assert near(d.invert(wavy, x0, 20, clip=False), d.invert(net, x0, 20, shift=shift, clip=False))

@pytest.mark.parametrize("predict", ("eps", "v"))
@pytest.mark.parametrize("spacing", ("uniform", "trailing", "quad"))
@pytest.mark.parametrize("steps", (1, 2, 7, 10, 60, 100))
def test_an_oracle_leads_to_x0(steps, spacing, predict):
    """A network that knows x_0 leads to x_0 from any noise, at any eta and order: the last step adds no noise."""
    d, x0, shift = GaussianDiffusion(100, 1e-3, 0.2, predict=predict), double(2, 5), double(2, 5)
    def oracle(x, t):
        a = d.alpha_bar[t, None]
        eps = (x - shift - a.sqrt() * x0) / (1 - a).sqrt()
        return eps if predict == "eps" else a.sqrt() * eps - (1 - a).sqrt() * x0
    for eta, order, variance in ((0.0, 1, "small"), (0.0, 2, "small"), (0.6, 1, "small"), (1.0, 1, "small"),
                                 (1.0, 1, "large"))[:5 if steps == 100 else 4]:
        options = dict(eta=eta, order=order, spacing=spacing, shift=shift, clip=False, variance=variance)
        x = d.sample(oracle, double(2, 5), steps, **options)
        assert torch.allclose(x, x0, atol=1e-10)    # rounding over sqrt(a_T) = 0.004

@pytest.mark.parametrize("clip", (False, True))
def test_eta_1_is_ancestral_sampling(clip):
    """All T steps at eta 1 are DDPM's algorithm 2, written with betas, from the same noise."""
    T, betas = 50, torch.linspace(2e-3, 0.4, 50, dtype=torch.float64)
    x = noise = double(2, 4)
    got = GaussianDiffusion(T, 2e-3, 0.4).sample(wavy, noise, T, eta=1.0, clip=clip, generator=seeded(5))
    g, bar = seeded(5), (1 - betas).cumprod(0)
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
    """Two DDIM steps by hand: x_0 is clipped to 1, eps is recomputed, and the next step starts from there."""
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

def test_large_variance_by_hand():
    """From t to t - 1, the fresh noise has standard deviation sqrt(beta_t); the mean is as with variance small."""
    d, noise = GaussianDiffusion(50, 2e-3, 0.4), double(4, 3)
    drawn = torch.randn(4, 3, dtype=torch.float64, generator=seeded(5))
    first = [next(d.trajectory(wavy, noise, 50, 1.0, variance=v, generator=seeded(5)))[1] for v in ("small", "large")]
    bar = np.cumprod(1 - np.linspace(2e-3, 0.4, 50))
    small, large = (0.4 * (1 - bar[48]) / (1 - bar[49]))**0.5, 0.4**0.5
    assert torch.allclose(first[0] - small * drawn, first[1] - large * drawn, atol=1e-12)
    assert torch.allclose(first[1] - first[0], (large - small) * drawn, atol=1e-12)

@pytest.mark.parametrize("order, expected", ((1, (0.051, 0.026, 0.013)), (2, (0.0080, 0.0023, 0.0007))))
def test_errors_of_each_order(order, expected):
    """With the exact eps of Gaussian data, the mean error against 1,000 steps is known for 10, 20 and 40 steps."""
    d, noise = GaussianDiffusion(1000, schedule="cosine"), torch.ones(1, 1, dtype=torch.float64)
    sample = lambda steps, order: d.sample(gaussian_eps(d, 0, 0.25), noise, steps, clip=False, order=order).item()
    errors, truth = [abs(sample(steps, order) - sample(1000, 1)) for steps in (10, 20, 40)], 0.25**0.5
    assert sample(1000, order) == pytest.approx(truth, abs=1e-3)    # the flow carries N(0, 1) to N(0, 0.25)
    # samples are linear in the noise, so the mean error is that of noise 1 times E|noise|; the known errors are
    # means over random noise, rounded to two digits
    assert np.array(errors) * (2 / math.pi)**0.5 == pytest.approx(expected, rel=0.03)

@pytest.mark.parametrize("predict", ("eps", "v"))
@pytest.mark.parametrize("steps, clip, spacing", (
    (2, True, "quad"), (3, False, "quad"), (10, True, "quad"), (10, False, "trailing"), (25, True, "uniform")))
def test_order_2_is_dpm_solver(steps, clip, spacing, predict):
    """Order 2 equals DPM-Solver++ 2M as algorithm 2 of arXiv 2211.01095 states it, with data prediction."""
    d, x = GaussianDiffusion(100, 1e-3, 0.2, predict=predict), double(4, 3)
    got = d.sample(wavy, x, steps, spacing=spacing, clip=clip, order=2)
    a = {t: d.alpha_bar[t].item() for t in range(100)}
    alpha, sigma = {t: a[t]**0.5 for t in a}, {t: (1 - a[t])**0.5 for t in a}
    lam = {t: math.log(alpha[t] / sigma[t]) for t in a}
    times, h, predicted = timesteps_for(100, steps, spacing).tolist()[::-1], [], []
    for t, s in zip(times, [*times[1:], None]):
        out = wavy(x, torch.full((4,), t))
        x0 = (x - sigma[t] * out) / alpha[t] if predict == "eps" else alpha[t] * x - sigma[t] * out
        predicted.append(x0.clamp(-1, 1) if clip else x0)
        if s is None:    # lambda is infinite at the clean image: e^-h is 0, and the order is 1
            x = predicted[-1]
            break
        h.append(lam[s] - lam[t])
        D_i = predicted[-1]
        if len(h) > 1:
            r = h[-2] / h[-1]
            D_i = (1 + 1 / (2 * r)) * predicted[-1] - 1 / (2 * r) * predicted[-2]
        x = sigma[s] / sigma[t] * x - alpha[s] * math.expm1(-h[-1]) * D_i
    assert torch.allclose(got, x, rtol=0, atol=1e-5)

def test_order_2_starts_and_ends_as_order_1():
    """The first and the last step of order 2 are DDIM's; with eta above 0, order 2 samples as order 1."""
    d, noise = GaussianDiffusion(100, 1e-3, 0.2), double(4, 3)
    one, two = (list(d.trajectory(wavy, noise, 5, order=order)) for order in (1, 2))
    (_, x, x0), (_, *second), *_, (_, end, last) = two
    assert torch.equal(x, one[0][1]) and torch.equal(x0, one[0][2]) and torch.equal(end, last)
    assert torch.equal(second[1], one[1][2]) and not torch.allclose(second[0], one[1][1], atol=1e-3)
    for steps, eta in ((1, 0.0), (2, 0.0), (10, 0.3), (10, 1.0)):
        first, other = (d.sample(wavy, noise, steps, eta=eta, generator=seeded(1), order=order) for order in (1, 2))
        assert torch.equal(first, other), (steps, eta)

@pytest.mark.parametrize("variance", (0.05, 1.0))
def test_invert_then_sample(variance):
    """With the exact eps of Gaussian data, the noise leads back to x_0; one iteration errs less with more steps."""
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
    """Where a network's x_0 leaves [-1, 1], the inverse of clipped sampling is found only with clipping."""
    d, x0 = GaussianDiffusion(1000), torch.rand(200, 3, dtype=torch.float64) * 1.6 - 0.8
    best = gaussian_eps(d, 0.0, 2.25)
    net = lambda x, t: best(x, t) + 0.05 * torch.sin(3 * x)    # divided by sqrt(a_t) = 0.006 in x_0
    error = {clip: (d.sample(net, d.invert(net, x0, 10, clip=clip), 10, clip=clip) - x0).abs().max().item()
             for clip in (True, False)}
    # a clipped x_0 does not depend on y_t, so 5 iterations suffice; without clipping they leave a hundredfold
    assert error[True] < 1e-3 and error[False] > 20 * error[True]

def test_randn_with_a_list_does_not_depend_on_the_batch():
    """Image i gets the noise of its own generator, whatever its batch; too few or too many are refused."""
    like = torch.empty(0, dtype=torch.float64)
    batch = randn((3, 2, 2), like, each_seeded(7, 8, 9))
    for i, seed in enumerate((7, 8, 9)):
        alone = torch.randn(2, 2, dtype=torch.float64, generator=each_seeded(seed)[0])
        assert torch.equal(batch[i], alone) and torch.equal(randn((1, 2, 2), like, each_seeded(seed))[0], alone)
    d, y = GaussianDiffusion(100, 1e-3, 0.2), double(3, 2, 2)
    sample = lambda y, *seeds: d.sample(wavy, y, 10, eta=1.0, generator=each_seeded(*seeds))
    together, alone = sample(y, 1, 2, 3), torch.cat([sample(y[i:i + 1], i + 1) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-12)
    for count in (0, 1, 2, 4):
        pytest.raises(ValueError, randn, (3, 2), like, each_seeded(*range(count)))
    assert randn((0, 2), like, []).shape == (0, 2) and randn((0, 2), like).shape == (0, 2)

def test_generators_and_stream():
    """A seed depends on run, name and index and has 32 bits; generators() has one generator for each index."""
    seeds = {(seed, name, i): diffusevae.stream(seed, name, i)
             for seed in (0, 1) for name in ("vae", "sample") for i in range(500)}
    assert len(set(seeds.values())) == len(seeds) and all(0 <= s < 2**32 for s in seeds.values())
    drawn = randn((2, 3), torch.empty(0), diffusevae.generators(1, "sample", [7, 4]))
    for row, i in zip(drawn, (7, 4)):
        assert torch.equal(row, torch.randn(3, generator=each_seeded(seeds[1, "sample", i])[0]))

@pytest.mark.parametrize("spacing, steps, expected", (
    ("uniform", 10, list(range(0, 1000, 100))), ("quad", 10, [9, 39, 89, 159, 249, 359, 489, 639, 809, 999]),
    ("quad", 3, [110, 443, 999]), ("quad", 1000, list(range(1000))), ("trailing", 10, list(range(99, 1000, 100))),
    ("trailing", 3, [332, 665, 999]), *((spacing, 1, [999]) for spacing in ("uniform", "quad", "trailing"))))
def test_timesteps_for_known_lists(spacing, steps, expected):
    """Lists of 1,000 timesteps equal those computed by hand."""
    assert timesteps_for(1000, steps, spacing).tolist() == expected

@pytest.mark.parametrize("T", (1, 2, 10, 100, 1000))
def test_timesteps_for_all_counts(T):
    """Any n of T timesteps are n increasing values in 0..T-1 that, except with uniform, end at T-1."""
    for spacing in ("uniform", "trailing", "quad"):
        for n in range(1, T + 1):
            kept = timesteps_for(T, n, spacing).tolist()
            assert len(kept) == n and 0 <= kept[0] and kept[-1] < T and all(a < b for a, b in zip(kept, kept[1:]))
            assert spacing == "uniform" and n > 1 or kept[-1] == T - 1
    assert timesteps_for(T, 1).tolist() == [T - 1]

@pytest.mark.parametrize("words, call", (
    ("steps", lambda: timesteps_for(10, 0)), ("steps", lambda: timesteps_for(10, -1)),
    ("steps", lambda: timesteps_for(10, 11)), ("spacing", lambda: timesteps_for(10, 3, "even")),
    ("0.60 of the image", lambda: GaussianDiffusion(100, 1e-4, 0.02)),
    ("0.15 of the image", lambda: GaussianDiffusion(1000, 1e-4, 0.02, "geometric")),
    ("betas", lambda: GaussianDiffusion(100, 0.0, 0.2)), ("betas", lambda: GaussianDiffusion(100, 1e-3, 1.0)),
    ("schedule", lambda: GaussianDiffusion(schedule="sine")), ("predict", lambda: GaussianDiffusion(predict="x0"))))
def test_diffusion_refuses(words, call):
    """Steps, spacings, betas and names that cannot work are ValueErrors that name the argument."""
    with pytest.raises(ValueError, match=words):
        call()

@pytest.mark.parametrize("words, steps, options", (
    ("steps", 101, {}), ("spacing", 10, dict(spacing="even")), ("order must be 1 or 2, got 3", 10, dict(order=3)),
    ("variance must be small", 100, dict(eta=0.5, variance="large")),
    ("variance must be small", 99, dict(eta=1.0, variance="large")),
    ("variance must be small", 100, dict(eta=1.0, variance="Large"))))
def test_sampling_refuses(words, steps, options):
    """Options with which a sampler would go wrong are ValueErrors that name them."""
    with pytest.raises(ValueError, match=words):
        GaussianDiffusion(100).sample(wavy, double(1, 1), steps, **options)

# ---- 3 U-Net -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, channels, cond, options", (
    (8, 3, 3, dict(width=4, mults=(1,), heads=1)), (8, 1, 1, dict(width=6, mults=(1, 2), heads=2, res_blocks=1)),
    (12, 3, 0, dict(width=5, mults=(1, 2), heads=5)), (16, 3, 3, dict(width=7, mults=(2, 1, 3), heads=1, z_dim=4)),
    (24, 2, 5, dict(width=4, mults=(1, 1, 2, 2), heads=4, res_blocks=3, attention=(12, 3)))))
def test_unet_shapes_and_gradients(size, channels, cond, options):
    """The output has x_t's shape and is zero at first; once no weight is zero, every weight has a gradient."""
    net = UNet(size, channels, cond, **options)
    x, x_hat, z = (torch.randn(2, n, size, size) if n else None for n in (channels, cond, 0))
    z, t = torch.randn(2, options["z_dim"]) if "z_dim" in options else None, torch.tensor([3, 900])
    out = net(x, t, x_hat, z)
    assert out.shape == x.shape and (out == 0).all()
    perturbed(net)(x, t, x_hat, z).square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle

def test_unet_sees_its_inputs():
    """Another x_t, t, x_hat or z of one image changes the output for that image and for no other."""
    net, generator = perturbed(UNet(8, 3, 3, 8, (1, 2), heads=2, z_dim=4)).eval(), seeded(1)
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
    """Hooks count the maps that attend: 2 down and 3 up at each requested size, and 1 in the middle."""
    net, seen = UNet(size, 1, 0, 4, mults, 2, asked, heads=1), collections.Counter()
    for module in net.modules():
        if isinstance(module, diffusevae.Attention):
            module.register_forward_hook(lambda m, inputs, out: seen.update([inputs[0].shape[2]]))
    net(torch.randn(1, 1, size, size), torch.tensor([5]))
    assert seen == expected

def test_attention_is_softmax_attention():
    """One Attention is x + W softmax(q k / sqrt(d)) v of its normalized input, written out with einsum."""
    layer, x = perturbed(diffusevae.Attention(8, 2), 0.5).double(), double(2, 8, 3, 4)
    flat = F.group_norm(x, 2, layer.norm.weight, layer.norm.bias).flatten(2)
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
    """q, k and v are contiguous: fused kernels need a contiguous last dimension, and some on MPS all of them."""
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
        expected = [[f(s * rate) for f in (math.cos, math.sin) for rate in rates] + [0] * (dim % 2)
                    for s in t.tolist()]  # angles up to 999 have 6e-8 of that as rounding, and the rates another
        got = diffusevae.timestep_embedding(t, dim).double()
        assert torch.allclose(got, torch.tensor(expected).double(), atol=3e-4)

def test_unet_refuses_what_it_does_not_expect():
    """An x_hat or z that a U-Net does not expect, and one that is missing, are ValueErrors."""
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
    """In fp32 it is PyTorch's; under autocast it keeps dtype and memory format, close to the exact result."""
    ours, theirs = diffusevae.GroupNorm(channels), torch.nn.GroupNorm(groups, channels)
    theirs.load_state_dict(perturbed(ours).state_dict())
    x = (3 * torch.randn(2, channels, 4, 4) + 1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours(x), theirs(x)) and ours(x).is_contiguous(memory_format=torch.channels_last)
    weight, bias, seen = ours.weight.detach().double(), ours.bias.detach().double(), []
    real = F.group_norm
    def watched(x, groups, weight=None, bias=None, eps=1e-5):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype, getattr(weight, "dtype", None)))
        return real(x, groups, weight, bias, eps).contiguous()    # NCHW, as on CUDA
    monkeypatch.setattr(F, "group_norm", watched)
    assert ours(x).is_contiguous(memory_format=torch.channels_last) and seen.pop()
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        half = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = ours(half)
        # CUDA's autocast would do it in fp32, and turn the layout over
        assert seen.pop() == (False, dtype, dtype)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        white = real(half.double(), groups)
        exact = white * weight[:, None, None] + bias[:, None, None]
        # weight, bias and result are rounded by 2^-bits of themselves at most, statistics are in fp32
        bound = 2.0**-bits * ((white * weight[:, None, None]).abs() + bias.abs()[:, None, None] + exact.abs())
        assert ((y - exact).abs() <= 1.01 * bound + 1e-4).all()
        y.float().sum().backward()
        assert ours.weight.grad.dtype == torch.float32 and half.grad.dtype == dtype

def test_layers_that_keep_the_dtype():
    """keep_dtype turns autocast off for half precision alone; the U-Net's upsampling is nearest-neighbor in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        for dtype, expected in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
            assert diffusevae.keep_dtype(lambda x: torch.is_autocast_enabled("cpu"), torch.ones(1, dtype=dtype)) == expected
        x = torch.randn(2, 3, 4, 4).bfloat16()
        y = diffusevae.Upsample(scale_factor=2)(x)
    assert y.dtype == x.dtype and torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))

@pytest.mark.parametrize("words, size, options", (("image_size 18 must be divisible by 4", 18, dict(mults=(1, 2, 2))),
    ("image_size 9 must be divisible by 2", 9, dict(mults=(1, 1))),
    ("no 5x5 feature maps", 8, dict(attention=(5,))), ("no 16x16 feature maps", 8, dict(attention=(8, 16))),
    ("heads must divide", 8, dict(heads=3)),
    ("heads must divide", 8, dict(mults=(1, 1), heads=4, width=6, attention=(8,)))))
def test_unet_refuses(words, size, options):
    """Sizes that do not halve, attention that never occurs and heads that do not divide are ValueErrors by name."""
    with pytest.raises(ValueError, match=words):
        UNet(size, **{**dict(width=8, mults=(1, 2), heads=2), **options})

# ---- 4 Mixture ---------------------------------------------------------------------------------------
MEANS = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-5.0, 7.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SCALE_TRIL = torch.tensor(
    [[[1.0, 0], [0.5, 0.8]], [[0.4, 0], [-0.3, 1.2]], [[1.5, 0], [0, 0.5]]], dtype=torch.float64)

def known_mixture():
    """This mixture in torch.distributions."""
    return D.MixtureSameFamily(D.Categorical(WEIGHTS), D.MultivariateNormal(MEANS, scale_tril=SCALE_TRIL))

def known_as_ours():
    """This mixture as a GaussianMixture."""
    mixture = GaussianMixture(3, 2)
    mixture.weights, mixture.means, mixture.scale_tril = WEIGHTS, MEANS, SCALE_TRIL
    mixture.fitted.fill_(True)
    return mixture

@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_separate_clusters(seed):
    """Eight clusters of 1 to about 80 points at the corners of a cube are found exactly."""
    g = seeded(seed)
    label = torch.randint(8, (200,), generator=g).square() // 8
    label = torch.cat([torch.arange(8), label])    # corners 5 and 7 once each
    # 2 apart or more, their points within 0.1
    corner = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    owner = diffusevae.k_means(corner[label] + 0.2 * torch.rand(208, 3, generator=g) - 0.1, 8, g)
    assert owner.shape == (208, 8) and ((owner == 0) | (owner == 1)).all() and (owner.sum(1) == 1).all()
    met = F.one_hot(label).T @ owner.long() > 0    # which true cluster shares points with which found one
    assert (met.sum(0) == 1).all() and (met.sum(1) == 1).all()

def test_k_means_without_clusters():
    """On evenly spread points it converges, each point with the nearest mean; equal points work, too."""
    g = seeded(0)
    z = torch.rand(60, 2, dtype=torch.float64, generator=g)
    owner = diffusevae.k_means(z, 4, g)
    means = (owner.T @ z / owner.sum(0)[:, None]).numpy()
    nearest = np.linalg.norm(z.numpy()[:, None] - means, axis=2).argmin(1)
    assert torch.equal(owner, F.one_hot(torch.tensor(nearest), 4).double()) and owner.dtype == torch.float64
    same = diffusevae.k_means(torch.ones(5, 2), 3, g)
    assert same.shape == (5, 3) and ((same == 0) | (same == 1)).all() and (same.sum(1) == 1).all()

def test_mixture_recovers_a_known_one():
    """EM on samples of three well separated Gaussians finds their weights, means and covariances."""
    n = 20_000
    found = GaussianMixture(3, 2).double().fit(known_mixture().sample((n,)), generator=seeded(0))
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
    """With too many components on overlapping clusters, `history` rises, and ends at the mean log-density."""
    z = torch.cat([double(300, 3), double(300, 3) * 0.5 + 1, double(5, 3) * 3])
    g = seeded(1)
    mixture = GaussianMixture(8, 3).double().fit(z, iterations=60, tolerance=0.0, generator=g)
    steps = np.diff(mixture.history)
    assert mixture.fitted
    assert len(steps) > 5 and steps[:-1].min() > -1e-6 and steps.min() > -1e-6    # slack: the covariances' floor
    assert mixture.history[-1] == pytest.approx(mixture.joint_log_prob(z).logsumexp(1).mean().item(), abs=1e-9)
    assert mixture.weights.sum().item() == pytest.approx(1)

def test_mixture_density_and_samples():
    """The density is torch.distributions'; samples have its moments, and components in random order."""
    n, x = 10_000, double(500, 2) * 10
    assert torch.allclose(known_as_ours().joint_log_prob(x).logsumexp(1), known_mixture().log_prob(x), atol=1e-9)
    z = known_as_ours().sample(n, seeded(2))
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
        z, truth = one.sample(n, seeded(3)), SCALE_TRIL[i] @ SCALE_TRIL[i].T
        se = ((truth.diagonal()[:, None] * truth.diagonal() + truth**2) / n).sqrt()
        assert ((z.T.cov() - truth).abs() < 5 * se).all()
    g = [seeded(i) for i in range(4)]
    together, alone = known_as_ours().sample(4, g), known_as_ours().sample(1, [seeded(2)])
    assert torch.allclose(together[2], alone[0])

@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name, components", (
    ("few", 3), ("one", 1), ("same", 4), ("constant", 3), ("as many", 6), ("far", 2)))
def test_mixture_degenerate_data(name, components, dtype):
    """Few points, duplicates, constant dimensions and one component give finite densities and finite samples."""
    data = dict(few=double(5, 20), one=double(50, 3), same=torch.ones(30, 4), far=1e4 + double(60, 2),
                constant=torch.cat([double(40, 2), torch.full((40, 1), 3.0)], 1))
    z = data.get(name, double(6, 2)).to(dtype)
    mixture = GaussianMixture(components, z.shape[1]).to(z.dtype).fit(z, generator=seeded(0))
    draws = mixture.sample(20, seeded(1))
    assert mixture.joint_log_prob(z).isfinite().all() and draws.isfinite().all() and draws.dtype == dtype
    if components == 1:    # the maximum-likelihood Gaussian
        assert torch.allclose(mixture.means[0], z.mean(0), atol=1e-5)
        assert torch.allclose(mixture.scale_tril[0] @ mixture.scale_tril[0].T, z.T.cov(correction=0), atol=1e-5)

def test_mixture_of_few_points_in_many_dimensions():
    """100 codes of 512 numbers, with singular covariances, are fitted; samples keep their mean length."""
    z = torch.randn(100, 512, generator=seeded(0))
    mixture = GaussianMixture(10, 512).fit(z, generator=seeded(0))
    lengths = mixture.sample(500, seeded(1)).square().sum(1)
    assert mixture.joint_log_prob(z).isfinite().all()
    # 5 SE: sd is some 220
    assert lengths.mean().item() == pytest.approx(z.square().sum(1).mean().item(), rel=0.1)

@pytest.mark.parametrize("z, words", (
    (torch.zeros(3, 2), "4 gmm_components .* 4 points.* 3, 3 "), (torch.zeros(9, 5), "N, 2.*9, 5"),
    (torch.full((9, 2), math.nan), "4 gmm_components .* 4 points.* 9, 0 "),
    (torch.tensor([[0.0, 0.0]] * 8 + [[0.0, math.inf]]), "4 gmm_components .* 4 points.* 9, 8 ")))
def test_mixture_refuses(z, words):
    """Too few points, points that are not finite (with their number) and a wrong dimension are ValueErrors."""
    mixture = GaussianMixture(4, 2)
    with pytest.raises(ValueError, match=words):
        mixture.fit(z)
    with pytest.raises(ValueError, match="not fitted"):    # zeros are no prior
        mixture.sample(3)

@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_mixture_computes_in_its_own_dtype(dtype):
    """Codes of any dtype are fitted in the dtype of the buffers, since MPS has no float64."""
    z = torch.randn(60, 2, generator=seeded(0)).to(dtype)
    fit = lambda z: GaussianMixture(2, 2).fit(z, generator=seeded(1)).state_dict()
    for name, value in fit(z).items():
        assert torch.equal(value, fit(z.float())[name]) and value.dtype != torch.float64

def test_a_loaded_mixture_samples_the_same():
    """A mixture loaded from a file samples the same as after its fit, to the bit."""
    mixture = GaussianMixture(2, 64).fit(torch.randn(300, 64), generator=seeded(0))
    again = GaussianMixture(2, 64)
    again.load_state_dict({name: value.clone(memory_format=torch.contiguous_format)
                           for name, value in mixture.state_dict().items()})
    one, two = (m.sample(50, seeded(1)) for m in (mixture, again))
    assert mixture.scale_tril.is_contiguous() and torch.equal(one, two)

# ---- 5 DiffuseVAE ------------------------------------------------------------------------------------
def test_stage_2_is_shown_samples_of_z_and_every_t():
    """The U-Net sees decode(z) with z ~ q(z|x), and t spread evenly over 0..T-1, both ends included."""
    model, n = DiffuseVAE(tiny(z_cond=True, timesteps=50)), 4000
    perturbed(model.vae, 0.3)
    x, seen = images_in(1, 3, 8, 8).expand(n, -1, -1, -1), {}
    def probe(x_t, t, x_hat, z):
        seen.update(t=t, x_hat=x_hat, z=z)
        return x_t
    model.loss(x, probe)
    mu, logvar = model.vae.encode(x[:1])
    assert_normal(seen["z"], mu[0], (logvar[0] / 2).exp())
    assert torch.equal(seen["x_hat"], model.vae.decode(seen["z"]))
    x_hat, z = model.reconstruct(x, seeded(1))
    assert torch.equal(z, model.encode(x, True, seeded(1))) and torch.equal(x_hat, model.vae.decode(z))
    counts = torch.bincount(seen["t"], minlength=50)
    assert len(counts) == 50 and (counts - n / 50).abs().max() <= 1

@pytest.mark.parametrize("formulation", ("1", "2", "none"))
@pytest.mark.parametrize("predict", ("eps", "v"))
def test_stage_2_loss_by_hand(formulation, predict):
    """The x_t and t that the U-Net is shown determine the noise, the noise the target, and the target the loss."""
    model, seen = DiffuseVAE(tiny(formulation=formulation, predict=predict)), {}
    def probe(x_t, t, x_hat, z):
        seen.update(x_t=x_t.double(), t=t, x_hat=x_hat)
        return 0.3 * x_t
    x = images_in(50, 3, 8, 8)
    loss = model.loss(x, probe).item()
    a = model.diffusion.alpha_bar[seen["t"]].view(-1, 1, 1, 1)
    y = seen["x_t"] - (seen["x_hat"] if formulation == "2" else 0)
    noise = (y - a.sqrt() * x) / (1 - a).sqrt()
    target = noise if predict == "eps" else a.sqrt() * noise - (1 - a).sqrt() * x
    expected = (0.3 * seen["x_t"] - target).square().mean().item()
    assert loss == pytest.approx(expected, rel=1e-3)    # float32 / sqrt(1 - a_0)

@pytest.mark.parametrize("formulation", ("1", "2"))
def test_noise_on_x_hat_in_training(formulation):
    """x_hat gets noise of a level uniform in [0, 0.3], one per image; in formulation 2 it is also in x_t."""
    model, seen = DiffuseVAE(tiny(formulation=formulation, cond_noise=0.3)), []
    x = torch.rand(2000, 3, 8, 8)
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

@pytest.mark.parametrize("options", (dict(), dict(formulation="2"), dict(z_cond=True),
                                     dict(z_cond=True, formulation="2")))
def test_latent_codes_and_back(options):
    """decode(invert(x)) returns x within the inversion's accuracy; any number of images can be sampled."""
    torch.manual_seed(0)
    model = with_prior(perturbed(DiffuseVAE(tiny(timesteps=100, **options)), 0.02).eval())
    x = torch.rand(2, 3, 8, 8) - 0.5
    again = model.decode(*model.invert(x, steps=50), steps=50, eta=0.0, order=1)
    assert torch.allclose(again, x, atol=0.02)
    assert model.sample(2).shape == x.shape
    assert model.sample(1, steps=1).shape == (1, 3, 8, 8)    # a batch of one

def test_missing_parts_are_named():
    """A prior not yet fitted, a VAE that is missing and z_cond without z are ValueErrors that say what to do."""
    with pytest.raises(ValueError, match="the mixture is not fitted; call fit_prior, or use prior='normal'"):
        DiffuseVAE(tiny()).sample(2)
    assert DiffuseVAE(tiny()).sample(2, prior="normal").shape == (2, 3, 8, 8)
    plain, x, z = DiffuseVAE(tiny(formulation="none")), torch.zeros(1, 3, 8, 8), torch.zeros(1, 2)
    for call in (lambda: plain.encode(x), lambda: plain.decode(z), lambda: plain.invert(x), plain.require_vae,
                 lambda: plain.sample_prior(1), lambda: plain.sample_prior(1, prior="normal"),
                 lambda: next(train_vae(plain, shapes(), new_state()))):
        with pytest.raises(ValueError, match="formulation none has no VAE"):
            call()
    with pytest.raises(ValueError, match="without x_hat, pass noise"):
        plain.refine(None)
    assert plain.mixture is None and plain.reconstruct(x) == (None, None)
    assert plain.refine(None, plain.noise(2)).shape == plain.sample(2).shape == (2, 3, 8, 8)
    model = DiffuseVAE(tiny(z_cond=True))
    with pytest.raises(ValueError, match="z when z_dim > 0"):
        model.refine(x)
    assert model.refine(x, z=z).shape == x.shape

def test_training_by_hand():
    """A new model is trainable and in eval mode; loss() gives gradients to the U-Net alone, vae(x) to the VAE."""
    def with_gradient(net):
        return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    model, x = DiffuseVAE(tiny(z_cond=True)), images_in(4, 3, 8, 8)
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
    """Encoding, decoding, refining, inverting and sampling need no gradients, and work with zero images."""
    model, x = DiffuseVAE(tiny(formulation=formulation)), images_in(2, 3, 8, 8)
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

@pytest.mark.parametrize("formulation", ("1", "2", "none"))
def test_state_dict_is_the_whole_model(formulation):
    """Another model with the same options that loads the state dict samples the same images, the prior included."""
    one, two = (perturbed(DiffuseVAE(tiny(formulation=formulation, z_cond=True, gmm_components=2)))
                for _ in range(2))
    if one.vae:
        two.load_state_dict(one.state_dict())    # the prior is not fitted yet
        with pytest.raises(ValueError, match="prior"):
            two.sample(3)
        with_prior(one)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.sample(3, each_seeded(1, 2, 3)), two.sample(3, each_seeded(1, 2, 3)))
    if one.vae:
        z = one.sample_prior(5)
        assert torch.equal(one.mixture.joint_log_prob(z), two.mixture.joint_log_prob(z))

def test_options_for_one_call():
    """Keywords apply to one call, without them the config's values; unknown names and bad values are refused."""
    model = with_prior(perturbed(DiffuseVAE(tiny()), 0.05))
    z, noise, before = torch.randn(2, 2), torch.randn(2, 3, 8, 8), copy.deepcopy(model.config)
    net = lambda x, t: model.unet(x, t, model.vae.decode(z))
    for options in (dict(eta=0.5, spacing="quad"), dict(eta=0.0, order=2), dict(eta=0.0, spacing="uniform")):
        got = model.decode(z, noise, seeded(1), steps=5, **options)
        model.config = dataclasses.replace(before, steps=5, **options)    # without keywords, the config's
        assert torch.equal(got, model.decode(z, noise, seeded(1)))
        model.config = copy.deepcopy(before)
        assert torch.equal(got, model.diffusion.sample(net, noise, 5, generator=seeded(1), **options))
        assert model.config == before and not torch.equal(got, model.decode(z, noise, seeded(1)))
    for words, options in (("--eta must be between 0 and 1, got 1.1", dict(eta=1.1)),
                           ("--eta must be between 0 and 1, got nan", dict(eta=math.nan)),
                           ("--spacing must be one of 'uniform', 'trailing', 'quad', got 'even'", dict(spacing="even")),
                           ("--order must be one of 1, 2, got 3", dict(order=3)),
                           ("steps must be", dict(steps=1001)), ("--prior must be one of", dict(prior="flat")),
                           ("variance must be small", dict(variance="large", eta=1.0))):
        with pytest.raises(ValueError, match=words):
            model.sample(1, **options)
    for call in (lambda: model.decode(z, seed=3), lambda: model.sample(1, temperature=2),
                 lambda: model.refine(x_hat=z, lr=1), lambda: model.sample_prior(1, num_samples=3),
                 lambda: model.invert(noise, eta=1.0), lambda: model.invert(noise, prior="normal"),
                 lambda: model.invert(noise, order=2)):
        with pytest.raises(TypeError, match="unknown sampling option"):
            call()

def test_half_precision_is_close_to_fp32():
    """Sampling and inversion in bf16 differ from fp32 by little: 8 bits of mantissa, sums in fp32."""
    model = with_prior(perturbed(DiffuseVAE(tiny(unet_width=16)), 0.05))
    z, noise, x = torch.randn(16, 2), torch.randn(16, 3, 8, 8), torch.rand(16, 3, 8, 8) - 0.5
    exact, half = (model.decode(z, noise, steps=10, precision=p) for p in ("fp32", "bf16"))
    gap = (exact - half).abs() * 127.5    # in gray levels
    assert half.dtype == torch.float32 and 0 < gap.mean() < 1.5 and gap.max() < 30
    (z, exact), (same, half) = (model.invert(x, steps=10, precision=p) for p in ("fp32", "bf16"))
    gap = (exact - half).abs()    # of noise, of order 1: an error of 0.002 in each of ten steps
    assert torch.equal(z, same) and half.dtype == torch.float32 and 0 < gap.mean() < 0.05

@pytest.mark.parametrize("formulation, z_cond", (("1", True), ("2", False), ("none", False)))
def test_no_tensor_on_the_wrong_device(formulation, z_cond):
    """Training, sampling and inversion run on the meta device, where a CPU tensor in an operation is an error."""
    model = DiffuseVAE(tiny(formulation=formulation, z_cond=z_cond, timesteps=3)).to("meta")
    x, generators = torch.empty(4, 3, 8, 8, device="meta"), each_seeded(0, 1, 2, 3)
    results = [model.loss(x), likelihood.bits_per_dim_of(model, x, generators)["total"]]
    results[0].backward()
    if model.vae:
        with_prior(model)    # fitted on the CPU, as a checkpoint brings it
        results.append(model.vae.loss(x)[0])
        results[-1].backward()
        z = torch.empty(4, 2, device="meta")
        results += [model.decode(*model.invert(x), eta=0.0, order=2), model.refine(x, None, z, generators)]
    for eta, generator, prior in itertools.product((0.0, 1.0), (None, generators), ("gmm", "normal")):
        results.append(model.sample(4, generator, eta=eta, prior=prior))
    assert all(y.device.type == "meta" for y in results)

class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}.get(function.overloadpacket)
        self.count += source is not None and args[source].device != out.device
        return out

@pytest.mark.parametrize("formulation", ("2", "none"))
def test_steps_copy_nothing_but_noise(formulation):
    """A training step copies nothing between devices, a sampling step the noise of CPU generators alone."""
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
            model.diffusion.sample(net, x, 4, eta=eta, shift=shift, generator=generator)
            assert copies.count == expected    # the last of four steps has no noise
        for n in (1, 4):
            copies.count = 0
            model.noise(n, each_seeded(*range(n)))
            assert copies.count == 1

def test_loading_under_other_defaults():
    """Where the default dtype is float64 or the default device another, a run loads and samples as elsewhere."""
    assert command("--run-dir r --stage ddpm") == 0
    draw = lambda model: model.sample(3, each_seeded(1, 2, 3), eta=1.0, prior="normal")
    expected = draw(DiffuseVAE.load("r", "cpu"))
    try:
        torch.set_default_dtype(torch.float64)
        model = DiffuseVAE.load("r", "cpu")
        assert draw(model).isfinite().all() and model.sample(3).isfinite().all()
        assert model.reconstruct(double(2, 3, 8, 8))[0].shape == (2, 3, 8, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(draw(model.float()), expected)    # the weights are those of the run
    try:
        torch.set_default_device("meta")
        model, state = diffusevae.load_run("r")
        loaded = DiffuseVAE.load("r", "cpu")
    finally:
        torch.set_default_device(None)
    assert torch.equal(draw(loaded), expected)
    assert torch.allclose(draw(model), expected, atol=1e-5)    # not yet channels last: sums in another order
    assert state["steps"] == dict(vae=4, ddpm=4) and loaded.sample(3).isfinite().all()
    model.config.ddpm_steps = 6    # and it can be trained further
    assert [row["step"] for row in train_ddpm(model, shapes(), state)] == [6]

# ---- 6 Config ----------------------------------------------------------------------------------------
def test_every_option_at_its_edges():
    """Choices and the ends of ranges are accepted; what lies beyond is refused by name."""
    for f in dataclasses.fields(Config):
        words, (low, high), kind = f.metadata["choices"], f.metadata["range"], f.type
        if words:
            assert kind in (str, int) and all(getattr(Config(**{f.name: w}), f.name) == w for w in words)
            beyond = ("", f"{words[0]}x", 4, None) if kind is str else (min(words) - 1, max(words) + 1, "3", None)
        elif kind in (int, float, tuple):
            wrap = (lambda v: (1, v)) if kind is tuple else (lambda v: v)
            for value in (low, high):
                assert getattr(Config(**{f.name: wrap(value)}), f.name) == wrap(value)
            gap = 1e-7 if kind is float else 1
            beyond = [wrap(v) for v in (low - gap, high + gap * max(1, high), math.nan, math.inf, -math.inf)]
            beyond += [] if kind is float else [wrap(2.5)]
        else:
            continue
        for value in beyond:
            with pytest.raises(ValueError, match=diffusevae.flag(f.name)):
                Config(**{f.name: value})

@pytest.mark.parametrize("name, given, expected", (
    ("z_dim", np.int64(8), 8), ("ddpm_steps", 1e4, 10_000), ("z_dim", np.float32(3), 3),
    ("lr", np.float32(0.5), 0.5), ("lr", 1, 1.0), ("hflip", np.bool_(True), True),
    ("formulation", np.str_("2"), "2"), ("order", np.int64(1), 1), ("run_dir", Path("r"), "r"),
    ("unet_mults", np.array([1, 2]), (1, 2)), ("unet_mults", [1, 2.0], (1, 2)),
    ("attention", (np.int32(8), torch.tensor(4)), (8, 4)), ("attention", (), ()), ("z_dim", 2.5, None),
    ("unet_mults", (1, 2.5), None), ("order", 1.5, None)))
def test_values_are_converted(name, given, expected):
    """Values take the type of their option, since a checkpoint cannot hold NumPy's types; fractions are refused."""
    if expected is None:    # a fraction
        with pytest.raises(ValueError, match=f"{diffusevae.flag(name)} must be (a whole number|one of 1, 2), got"):
            Config.preset("shapes", **{name: given})
        return
    value = getattr(Config.preset("shapes", **{name: given}), name)
    assert value == expected and type(value) is type(expected)
    assert not isinstance(value, tuple) or all(type(entry) is int for entry in value)

@pytest.mark.parametrize("dataset, options, expected", (("folder", dict(image_size=32),
     dict(unet_mults=(1, 2, 2, 2), unet_width=128, batch_size=128, lr=2e-4, steps=50, order=2)),
    ("folder", dict(image_size=64), dict(unet_mults=(1, 2, 2, 2, 4), unet_width=128, batch_size=32, lr=2e-4)),
    ("folder", dict(image_size=128), dict(unet_mults=(1, 2, 2, 3, 4), unet_width=128, batch_size=8, lr=2e-5)),
    ("folder", dict(image_size=256), dict(unet_mults=(1, 1, 2, 2, 4, 4), unet_width=128, batch_size=8, lr=2e-5)),
    ("folder", dict(image_size=32, small=True),
     dict(unet_mults=(1, 2, 2), unet_width=48, batch_size=32, attention=(), order=2)),
    ("folder", dict(image_size=64, small=True),
     dict(unet_mults=(1, 2, 2), unet_width=32, batch_size=16, attention=(), compile=False)),
    ("cifar10", dict(), dict(unet_mults=(1, 2, 2, 2), unet_width=128, attention=(16,), predict="eps", steps=50,
                             z_dim=512, order=2, compile=True, save_every=5000)),
    ("cifar10", dict(small=True), dict(unet_mults=(1, 2, 2), unet_width=48, attention=(), predict="v", steps=10,
                                       z_dim=128, order=2, compile=False, save_every=500)),
    ("mnist", dict(), dict(unet_mults=(1, 2, 2), unet_width=24, batch_size=16, image_size=28, channels=1, order=1)),
    ("mnist", dict(small=True), dict(unet_mults=(1, 2, 2), unet_width=24, image_size=28)),    # small already
    ("fashion_mnist", dict(), dict(image_size=28, channels=1, order=1, save_every=250)),
    ("shapes", dict(), dict(order=1, steps=10, compile=False, save_every=250)),
    ("shapes", dict(small=True), dict(unet_mults=(1, 2), unet_width=32, batch_size=16, image_size=16, channels=3))))
def test_presets(dataset, options, expected):
    """Each dataset, image size and --small has its networks, which can be built; given options take precedence."""
    c = Config.preset(dataset, **options)
    assert {name: getattr(c, name) for name in expected} == expected
    with torch.device("meta"):
        model, x = DiffuseVAE(c), torch.empty(1, c.channels, c.image_size, c.image_size)
        assert model.unet(x, torch.zeros(1), x).shape == model.vae(x)[0].shape == x.shape
    over = dict(unet_mults=(1, 3), batch_size=5, order=2, save_every=7)
    c = Config.preset(dataset, **options, **over)
    assert {name: getattr(c, name) for name in over} == over

@lacking("links that every user may make")
def test_each_folder_of_images_has_its_own_run():
    """A run folder is named after the folder of images and a hash of its real path, however that is written."""
    c = lambda folder, **options: Config.preset("folder", data_dir=folder, **options)
    Path("a/cats").mkdir(parents=True)
    Path("link").symlink_to("a/cats")
    a = str(Path("a/cats").resolve())
    assert c("a/cats").run_dir == f"runs/folder-cats-{zlib.crc32(os.fsencode(a)):08x}" and c("a/cats").data_dir == a
    assert {c(name).run_dir for name in (Path("a/cats/"), "b/../a/cats", a, "link")} == {c("a/cats").run_dir}
    assert c("a/cats").run_dir != c("b/cats").run_dir and c("a/cats", run_dir="r").run_dir == "r"
    assert c("a/cats", small=True).run_dir == c("a/cats").run_dir + "-small"

def on_terminal(monkeypatch, action):
    """What the action writes to a terminal."""
    written = []
    terminal = types.SimpleNamespace(write=written.append, flush=lambda: None, isatty=lambda: True)
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", terminal)
        action()
    return "".join(written)

def test_lines_that_are_overwritten(capsys, monkeypatch):
    """On a terminal and in a notebook, a line covers the transient one before; elsewhere every line stays."""
    def lines():
        diffusevae.say("step 1", transient=True)
        diffusevae.say("2" * 200, transient=True)    # cut to the width, or it could not be overwritten
        diffusevae.say("3" * 200)
        diffusevae.say("done")
    lines()
    assert capsys.readouterr().out == f"step 1\n{'2' * 200}\n{'3' * 200}\ndone\n"
    expected = "".join([f"\r{'step 1':79}", "\r" + "2" * 79, f"\r{'3' * 200}\n", f"\r{'done':79}\n"])
    assert on_terminal(monkeypatch, lines) == expected
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    lines()
    assert capsys.readouterr().out == expected

@pytest.mark.parametrize("stream", (
    io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="ascii"), types.SimpleNamespace(flush=lambda: None)))
def test_any_standard_output_works(monkeypatch, stream):
    """The file runs as a program where standard output is no file; names may contain characters beyond ASCII."""
    written = []
    if not hasattr(stream, "write"):    # as some servers provide it: it can be written to, and little else
        stream.write, stream.isatty = written.append, lambda: False
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "argv", ["diffusevae.py", "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(diffusevae.__file__, run_name="__main__")
        diffusevae.say("ünter")
    stream.flush()
    bytes_like = isinstance(stream, io.TextIOWrapper)
    text = "".join(written) or (stream.buffer.getvalue().decode() if bytes_like else stream.getvalue())
    assert end.value.code == 0 and text.startswith("usage: python diffusevae.py")
    assert text.endswith("\\xfcnter\n" if bytes_like else "ünter\n")

def test_devices_and_layouts():
    """A device that is missing is refused; images and weights are channels last, except on MPS."""
    assert command("--run-dir r --stage ddpm") == 0
    for name in ("cpu", torch.device("cpu")):
        assert diffusevae.find_device(name) == torch.device("cpu")
        weight = DiffuseVAE.load("r", name).unet.middle[0].second[2].weight
        assert weight.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    for name in ("cuda:77", "cuda:x", "xpu:9", "gpu", ""):
        with pytest.raises(ValueError, match=f"device {name} is not available"):
            DiffuseVAE.load("r", name)
    last = {kind: diffusevae.layout(torch.device(kind)) == torch.channels_last for kind in ("cpu", "cuda", "mps")}
    assert last == dict(cpu=True, cuda=True, mps=False)
    assert diffusevae.layout(torch.device("mps")) == torch.contiguous_format
    batch = diffusevae.random_batch(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), 4, True, torch.device("cpu"))
    assert batch.is_contiguous(memory_format=torch.channels_last)

def complaints(out):
    """The names of the files that a command could not write, in order; each has one line with a reason."""
    found = re.findall(r"^could not \w+ (\S+) \((.+)\); continuing without it$", out, re.M)
    assert out.count("could not") == len(found) and all(reason != "None" for _, reason in found)
    return [Path(name).as_posix() for name, _ in found]

@pytest.mark.parametrize("error, reason", (
    (OSError(28, "No space left on device"), "No space left on device"), (KeyboardInterrupt(), ""),
    (KeyError(), "KeyError"), (OSError("encoder error -2"), "encoder error -2"),
    (RuntimeError("no latex\nTraceback"), "no latex"), (MemoryError(), "MemoryError"),
    (ImportError("No module named 'matplotlib'"), "No module named 'matplotlib'")))
def test_failures_of_try_to_write(capsys, error, reason):
    """Any failure but Ctrl-C is one line with its reason; an existing file stays, no temporary file is left."""
    path = Path("x.png").resolve()
    path.write_bytes(b"before")
    def fail(path):
        path.write_bytes(b"half")
        raise error
    with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else contextlib.nullcontext():
        diffusevae.try_to_write(path, fail)
    out = capsys.readouterr().out
    assert complaints(out) == ([path.as_posix()] if reason else []) and out.count("\n") == len(complaints(out))
    assert reason in out and files(".") == {"x.png": b"before"}
    with pytest.raises(type(error)):
        diffusevae.write_atomically(path, fail)
    diffusevae.try_to_write(Path("sub/x.png"), Path.touch)
    assert not capsys.readouterr().out and files(".") == {"x.png": b"before", "sub/x.png": b""}

# ---- 7 Data ------------------------------------------------------------------------------------------
def test_shapes():
    """Shapes are seeded, of three kinds and use the range of values; no test image is a training image."""
    load = lambda split: diffusevae.load_images(tiny(image_size=16), split)
    (train, labels), (again, _), (test, _) = load("train"), load("train"), load("test")
    assert torch.equal(train, again) and train.dtype == torch.uint8 and train.shape[1:] == (3, 16, 16)
    assert set(labels.tolist()) == {0, 1, 2} and train.max() > 240 and train.min() < 60
    assert not {x.numpy().tobytes() for x in train} & {x.numpy().tobytes() for x in test}

def test_uint8_round_trip():
    """All 256 gray levels survive the round trip; what lies outside is clipped, the rest is rounded."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(diffusevae.to_uint8(diffusevae.to_float(levels)), levels)
    x = torch.tensor([-9.0, 9.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])
    assert diffusevae.to_uint8(x).tolist() == [0, 255, 0, 1]

def test_images_that_are_not_bytes_are_refused():
    """Float images, which would be scaled twice, are refused wherever they are passed in."""
    images = torch.rand(8, 3, 8, 8)
    for call in (lambda: diffusevae.to_float(images), lambda: diffusevae.random_batch(images, 2, True, images.device),
                 lambda: next(train_vae(DiffuseVAE(tiny()), images, new_state())),
                 lambda: next(train_ddpm(DiffuseVAE(tiny()), images, new_state())),
                 lambda: diffusevae.fit_prior(DiffuseVAE(tiny()), images.double())):
        with pytest.raises(ValueError, match="uint8"):
            call()

def halves(paths):
    """The test images among relative paths (a twentieth by crc32, at least one) and the others, in crc32 order."""
    rank = {Path(path): zlib.crc32(Path(path).as_posix().encode()) for path in paths}
    first = [path for path in rank if rank[path] <= 2**32 // 20] or [min(rank, key=rank.get)]
    return sorted(first, key=rank.get), sorted(rank.keys() - set(first), key=rank.get)

def folder(path, **options):
    """A Config for a folder of images."""
    return Config.preset("folder", data_dir=path, device="cpu", **{"image_size": 8, **options})

@lacking("links that every user may make")
def test_folder_of_all_kinds(tmp_path, capsys):
    """Each kind of image is read as a viewer shows it; damaged ones are named, other files are left out."""
    root = tmp_path / "photos"
    (root / "ünter").mkdir(parents=True)
    red, wide = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 40, 3), np.uint8)
    red[..., 0], wide[:, 10:20], wide[:, 20:30] = 200, (255, 0, 0), (0, 0, 255)    # the middle is red | blue
    turned = Image.Exif()
    turned[0x0112] = 6    # to be shown turned a quarter clockwise
    Image.fromarray(red).save(root / "0rgb.png")
    Image.fromarray(red).convert("P").save(root / "1palette.png")
    Image.fromarray(red).convert("CMYK").save(root / "2cmyk.jpg", quality=100)
    Image.fromarray(np.full((9, 9), 128 * 257, np.uint16)).save(root / "3deep.png")    # 16 bits
    Image.fromarray(np.full((9, 9), 77, np.uint8)).save(root / "4gray.png")
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(root / "5clear.png")
    Image.fromarray(wide).save(root / "6wide.png")
    Image.fromarray(wide).save(root / "7turned.jpg", exif=turned, quality=100)
    Image.fromarray(red[:1, :1]).save(root / "ünter" / "8one.png")
    Image.fromarray(red[..., 0].astype(np.int32)).save(root / "range.tiff")    # its white could be any value
    (root / "nothing.png").touch()
    (root / "torn.png").write_bytes((root / "6wide.png").read_bytes()[:60])
    every = [path.relative_to(root) for path in root.rglob("*.*")]
    (root / "nowhere.png").symlink_to(root / "gone.png")
    (root / ".hidden.png").write_text("no image", encoding="utf-8")
    (root / "note.txt").write_text("no image", encoding="utf-8")
    seen, x, damaged = [], [], {"torn.png", "nothing.png", "range.tiff"}
    for split, names in zip(("test", "train"), halves(every)):
        names = [str(name) for name in names]
        x.append(diffusevae.load_images(folder(root), split)[0])
        out = capsys.readouterr().out
        skipped = [name for name in names if name in damaged]
        assert f"reading {'training' if split == 'train' else 'test'} images in {root}: {len(names)}" in out
        assert (f"images skipped as damaged or unusable: {len(skipped)}," in out) == bool(skipped)
        assert all((repr(name) in out) == (name in skipped) for name in names)
        seen += [name for name in names if name not in skipped]
    assert len(seen) == 9 and len(x[0]) > 0
    x = torch.cat(x)[torch.tensor(sorted(range(9), key=lambda i: Path(seen[i]).name))].float()    # by name
    assert x.shape == (9, 3, 8, 8)
    for i, color in enumerate(((200, 0, 0), (200, 0, 0), (200, 0, 0), (128,) * 3, (77,) * 3, (255,) * 3)):
        assert (x[i].mean((1, 2)) - torch.tensor(color)).abs().max() < 6, i    # JPEG and CMYK are inexact
    assert x[6, 0, :, :3].min() > 200 and x[6, 2, :, 5:].min() > 200    # red on the left, blue on the right
    assert x[7, 0, :3].min() > 200 and x[7, 2, 5:].min() > 200    # red above, blue below
    assert (x[8, 0] - 200).abs().max() < 2

@pytest.mark.parametrize("values, expected", (
    ((0, 65535), (0, 255)), ((257, 128 * 257), (1, 128)), ((128, 129), (0, 1)), ((65407, 65406), (255, 254))))
def test_16_bit_values_are_divided_by_257(monkeypatch, values, expected):
    """16-bit gray values 0..65535 become 0..255, rounded: black stays black and white stays white."""
    pixels = np.repeat(np.array([values], np.uint16), 8, axis=0).repeat(4, axis=1)    # left and right half
    for suffix in ("png", "tiff"):
        Image.fromarray(pixels).save(f"deep.{suffix}")
        x = diffusevae.decode_image(f"deep.{suffix}", [8, 8])
        assert x.shape == (3, 8, 8) and (x[:, 0, 0] == expected[0]).all() and (x[:, 0, -1] == expected[1]).all()
    assert (diffusevae.decode_image("deep.png", [8, 8], 1)[0, 3, [0, 7]] == expected).all()
    old = Image.fromarray(pixels.astype(np.int32))    # mode I, which Pillow before 10.3 gives to 16-bit PNGs
    old.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda path: old)
    assert (diffusevae.decode_image("deep.png", [8, 8], 1)[0, 3, [0, 7]] == expected).all()

def gray_image(path, gray=0):
    """Write an 8x8 image of one gray level, and the folders it needs."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), gray, np.uint8)).save(path)

def grays(folder, split, **options):
    """The gray level of each image that load_folder returns, and the labels."""
    x, labels = diffusevae.load_folder(str(folder), [8, 8], split == "train", **options)
    return x[:, 0, 0, 0].tolist(), labels

def photos(folder, n=30):
    """A folder of n images."""
    for i in range(n):
        gray_image(Path(folder) / f"{i}.png", 8 * i % 256)

def test_about_every_twentieth_file_is_for_testing(tmp_path):
    """Files with a small crc32 of the relative path are the test split, the others the training split."""
    names = [f"{'abc'[i % 3]}/im{i}.png" for i in range(60)]
    for i, name in enumerate(names):
        gray_image(tmp_path / name, i)
    test, train = ([names.index(str(path)) for path in half] for half in halves(names))
    assert 2 <= len(test) <= 10 and sorted(test + train) == list(range(60))
    assert {names[i][0] for i in train[:8]} == set("abc")    # of every folder, however few are taken
    assert grays(tmp_path, "test")[0] == test and grays(tmp_path, "train")[0] == train

def test_new_images_move_none_to_the_test_split(tmp_path, monkeypatch):
    """As a folder grows, no training image moves to the test split, which has about one image in twenty."""
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
    """Text files beside the images are left out without a word."""
    photos(tmp_path / "a")
    for i in range(30):
        (tmp_path / "a" / f"{i}.txt").write_text("gray", encoding="utf-8")
    found = sum((grays(tmp_path, split)[0] for split in ("train", "test")), [])
    assert sorted(found) == [8 * i for i in range(30)] and "skipped" not in capsys.readouterr().out

@lacking("links that every user may make")
def test_folders_that_hold_no_images_of_their_own(tmp_path):
    """Hidden folders, thumbnails and runs are left out, linked folders are read once, and cycles of links end."""
    for i, name in enumerate(("a/0.png", "a/deep/1.png", "b/2.png", ".trash/3.png", "b/.cache/4.png",
                              "a/@eaDir/5.png", "run/samples/6.png", "b/run/7.png", "@eaDir/8.png", "@ann/9.png")):
        gray_image(tmp_path / "photos" / name, i)
    for run in ("run", "b/run"):
        (tmp_path / "photos" / run / "model.pt").touch()
    gray_image(tmp_path / "elsewhere" / "10.png", 10)
    (tmp_path / "photos" / "b" / "once").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "b" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "b" / "self").symlink_to(tmp_path / "photos" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for root in ("photos", "link"):
        found = [path.as_posix() for path in diffusevae.find_images(str(tmp_path / root))]
        assert found == ["@ann/9.png", "a/0.png", "a/deep/1.png", "b/2.png", "b/once/10.png"]
        assert sorted(sum((grays(tmp_path / root, split)[0] for split in ("train", "test")), [])) == [0, 1, 2, 9, 10]

def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    """A folder that may not be read, such as lost+found, is left out."""
    gray_image(tmp_path / "a" / "0.png")
    (tmp_path / "lost+found").mkdir()
    stat = os.stat
    def denied(path, *args, **options):
        if f"lost+found{os.sep}" in os.fsdecode(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *args, **options)
    monkeypatch.setattr(os, "stat", denied)
    assert diffusevae.find_images(str(tmp_path)) == [Path("a/0.png")]

def test_labels_are_those_of_image_folder(tmp_path, capsys):
    """The first folder below the top is the class, as in torchvision; images at the top mean no labels."""
    from torchvision.datasets import ImageFolder
    for i in range(40):
        gray_image(tmp_path / ("cat", "Dog", "ant/old", "ant/new/er")[i % 4] / f"{i}.png", i)
    truth = {int(Path(path).stem): label for path, label in ImageFolder(tmp_path).samples}
    found = {}
    for split in ("train", "test"):
        x, labels = grays(tmp_path, split)
        assert labels.dtype == torch.long and labels.shape == (len(x),)
        found |= dict(zip(x, labels.tolist()))
    assert found == truth and set(truth.values()) == {0, 1, 2}
    gray_image(tmp_path / "40.png", 40)
    assert grays(tmp_path, "train")[1] is None and grays(tmp_path, "test")[1] is None
    assert capsys.readouterr().out.count(f"no labels, as 1 of 41 images in {tmp_path} are not in a subfolder") == 2

def test_numbered_folders_are_in_numeric_order(tmp_path):
    """Folder "10" comes after "9", names come after numbers, and class_names gives the name of every label."""
    for name in (*range(12), "b", "a"):
        gray_image(tmp_path / str(name) / "0.png")
    names = diffusevae.class_names(diffusevae.find_images(tmp_path))
    assert names == [*map(str, range(12)), "a", "b"]
    assert sorted(torch.cat([grays(tmp_path, split)[1] for split in ("train", "test")]).tolist()) == [*range(14)]

def test_dark_images_are_named_in_a_line(tmp_path, capsys):
    """12-bit values in 16-bit files make images that are nearly black; one line says how many."""
    for i, top in enumerate((4095, 4095, 65535)):
        Image.fromarray(np.full((8, 8), top, np.uint16)).save(tmp_path / f"{i}.png")
    x = [x for split in ("train", "test") for x in grays(tmp_path, split)[0]]
    assert sorted(x) == [16, 16, 255]
    told = re.findall(r"nearly black images: (\d+); if they hold 12 bits", capsys.readouterr().out)
    assert sum(map(int, told)) == 2

def test_one_channel(tmp_path):
    """--channels 1 reads gray levels as they are and colors by their luma; other datasets refuse it."""
    color = np.empty((8, 8, 3), np.uint8)
    color[:] = 200, 100, 50
    for i in range(20):
        gray_image(tmp_path / "photos" / f"{i}.png", 10 * i)
    Image.fromarray(color).save(tmp_path / "photos" / "color.png")
    c = folder(tmp_path / "photos", channels=1)
    x = torch.cat([diffusevae.load_images(c, split)[0] for split in ("train", "test")])
    assert x.shape == (21, 1, 8, 8) and x.dtype == torch.uint8
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)    # ITU-R 601-2
    assert sorted(x.float().mean((1, 2, 3)).tolist()) == sorted([*range(0, 200, 10), luma])
    assert diffusevae.load_images(folder(tmp_path / "photos"), "train")[0].shape[1] == 3
    with pytest.raises(ValueError, match="shapes needs --channels 3, not 1"):
        diffusevae.load_images(tiny(channels=1), "train")

@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", (b"garbage", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0",    # cut within the orientation
    # a quarter turn, beside a resolution of letters, on which Pillow stumbles
    b"II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"))
def test_unreadable_orientation(tmp_path, exif):
    """An image whose EXIF data are cut off or nonsense is read as stored."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255    # white on the left
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=100, exif=b"Exif\0\0" + exif)
    x = diffusevae.decode_image(tmp_path / "x.jpg", [8, 8])
    assert abs(x.astype(int) - pixels.transpose(2, 0, 1)).max() < 9    # JPEG

@pytest.mark.parametrize("name, kind", (("cifar10", "CIFAR10"), ("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")))
def test_torchvision_datasets(monkeypatch, name, kind):
    """Datasets are uint8 [N, C, S, S], unchanged at their own size, else resized; labels are kept."""
    import torchvision.datasets
    color, size = (True, 32) if name == "cifar10" else (False, 28)
    raw = np.random.default_rng(0).integers(0, 256, (6, size, size, 3)[:4 if color else 3], np.uint8)
    made = types.SimpleNamespace(data=raw if color else torch.from_numpy(raw), targets=[3, 1, 2, 0, 1, 2])
    monkeypatch.setattr(torchvision.datasets, kind, lambda root, train, download: made)
    load = lambda size: diffusevae.load_images(Config.preset(name, image_size=size), "train")
    x, labels = load(size)
    assert x.dtype == torch.uint8 and labels.tolist() == made.targets and x.is_contiguous()
    assert (x.permute(0, 2, 3, 1).numpy() == raw.reshape(6, size, size, -1)).all()
    small = load(16)[0]
    assert small.shape[2:] == (16, 16) and small.dtype == torch.uint8
    assert (small.float().mean() - x.float().mean()).abs() < 2    # averaged, not picked: noise keeps its mean

@lacking("file names that are not Unicode")
def test_names_that_are_not_utf8(tmp_path, capsys):
    """A file name in another encoding is read like any other."""
    for name in (b"caf\xe9.png", b"plain.png", b"more.png"):
        gray_image(tmp_path / "x.png", 50)
        os.rename(tmp_path / "x.png", os.path.join(os.fsencode(tmp_path), name))
    sizes = [len(diffusevae.load_images(folder(tmp_path), split)[0]) for split in ("train", "test")]
    assert sum(sizes) == 3 and min(sizes) > 0

def test_data_that_are_missing(capsys, monkeypatch):
    """A folder without usable images, a download that fails and an unknown split are ValueErrors that name them."""
    import torchvision.datasets
    def load(words, config, split="train"):
        with pytest.raises(ValueError, match=words):
            diffusevae.load_images(config, split)
    def fail(*args, **options):
        raise error
    load("split must be train or test, got 'val'", tiny(), "val")
    load("--data-dir .*nowhere is not a folder; give a folder of images", folder("nowhere"))
    Path("photos").mkdir()
    for names in ((), ("no.png", "nor.png")):    # one is for tests
        for name in names:
            Path("photos", name).write_text("no image", encoding="utf-8")
        load("--data-dir .*photos has no usable images for the training split", folder("photos"))
    assert "no.png'" in capsys.readouterr().out
    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    for error in (RuntimeError("Error downloading"), AssertionError()):    # a file of zeros
        load("cannot download or read mnist .*; check the network.* --data-dir d", Config.preset("mnist", data_dir="d"))

# ---- 8 Training --------------------------------------------------------------------------------------
@pytest.mark.parametrize("formulation, predict", (("1", "v"), ("2", "eps"), ("none", "v")))
def test_both_stages_overfit_one_batch(formulation, predict):
    """On the same four images, the VAE's squared error falls to 1% of the pixels, the U-Net's loss below 0.25."""
    c = tiny(formulation=formulation, predict=predict, vae_steps=120, ddpm_steps=120, vae_lr=1e-2, lr=1e-2, z_dim=8,
             vae_width=8, unet_width=16, kl_weight=0.0, hflip=False, log_every=20, batch_size=16)
    rows = finish(c, shapes(4))[1]
    recon = [row["recon"] for row in rows if row["stage"] == "vae"]
    assert formulation == "none" or recon[-1] < 0.01 * 3 * 8 * 8
    assert rows[-1]["loss"] < 0.25    # the target, eps or v, has a variance near 1

def test_ema_and_learning_rate_by_hand():
    """The average's decay is (1 + n) / (10 + n), at most `ema`; the learning rate warms up and follows a cosine."""
    c = tiny(ddpm_steps=40, warmup=4, ema=0.7, log_every=1)    # the warm-up ends in the middle, at step 20
    torch.manual_seed(0)
    model, images, state = DiffuseVAE(c), shapes(), new_state()
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
    """The row has the stage's learning rate, and Adam's first step moves every weight by it: m / sqrt(v) = +-1."""
    c = tiny(warmup=0, log_every=1, vae_lr=3e-3, lr=2e-4)
    model, state = perturbed(DiffuseVAE(c), 0.1), new_state()
    network = model.vae if stage == "vae" else model.unet
    before = [p.detach().clone() for p in network.parameters()]
    row, rate = next(train(model, shapes(), state)), getattr(c, option)
    after = network.parameters() if stage == "vae" else state["weights"].values()
    moved = torch.cat([(one - two).abs().flatten() for one, two in zip(after, before)]) / rate
    assert row["lr"] == pytest.approx(rate) and row["steps_per_s"] > 0
    # weights near 1 are rounded at 6e-8; a gradient of 1e-6 or less is held back by Adam's epsilon of 1e-8
    assert moved.max() < 1.002 and moved.median() > 0.998 and (moved > 0.99).double().mean() > 0.9

def test_half_of_the_images_are_mirrored():
    """With hflip, half of the training images are mirrored left to right."""
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
    """kl_weight reaches the VAE's loss, T and the schedule the betas; noise is standard normal."""
    rows = finish(tiny(kl_weight=7.0), shapes())[1]
    assert all(r["loss"] == pytest.approx(r["recon"] + 7 * r["kl"], rel=1e-5) for r in rows if r["stage"] == "vae")
    noise = DiffuseVAE(tiny()).noise(200)
    assert abs(noise.std() - 1) < 5 / (2 * noise.numel())**0.5    # 5 SE
    for T, schedule in itertools.product((1000, 250), ("linear", "cosine", "geometric")):
        diffusion = DiffuseVAE(tiny(timesteps=T, schedule=schedule)).diffusion
        assert torch.equal(diffusion.alpha_bar, GaussianDiffusion(T, schedule=schedule).alpha_bar)

@pytest.fixture
def gradients(monkeypatch):
    """The norm of the gradient at each step of Adam, and whether the gradient scaler leaves the step out."""
    seen, step = [], torch.optim.Adam.step
    def watched(self, *args):
        norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item()
        seen.append((norm, bool(getattr(self, "found_inf", None) or 0)))
        return step(self, *args)
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    return seen

def test_gradients_are_clipped_in_stage_2_alone(gradients):
    """When Adam steps, the U-Net's gradient has at most the given norm; the VAE's is not clipped."""
    finish(tiny(grad_clip=0.01), shapes())
    norms = [norm for norm, _ in gradients]
    assert min(norms[:4]) > 0.05 and norms[4:] == pytest.approx([0.01] * 4, rel=1e-3)

def test_fp16_trains_with_unscaled_gradients(monkeypatch, gradients):
    """In fp16 both stages take fp32's steps, within its accuracy; gradients are clipped after unscaling."""
    rows = finish(tiny(precision="fp16", grad_clip=0.01, vae_steps=8, ddpm_steps=8), shapes())[1]
    assert all(math.isfinite(row["loss"]) for row in rows) and len(rows) == 8 and len(gradients) == 16
    taken = [norm for norm, overflow in gradients[8:] if not overflow]    # else the scale is halved
    assert len(taken) > 2 and max(taken) <= 0.01 * 1.001
    scaled = functools.partial(torch.amp.GradScaler, init_scale=256.0)    # no overflow in the first step
    monkeypatch.setattr(torch.amp, "GradScaler", scaled)
    for train, clip in ((train_vae, 1.0), (train_ddpm, 0.0), (train_ddpm, 0.01)):
        means = []
        for precision in ("fp32", "fp16"):
            torch.manual_seed(0)
            c, state = tiny(precision=precision, log_every=1, grad_clip=clip), new_state()
            next(train(perturbed(DiffuseVAE(c), 0.1), shapes(), state))
            means.append(torch.cat([s["exp_avg"].flatten() for s in state["optimizer"]["state"].values()]))
        assert (means[0] - means[1]).norm() < 0.02 * means[0].norm()    # 11 bits, through ten layers and back

def test_the_scaler_does_not_change_fp32(monkeypatch):
    """Without fp16 a run equals, to the bit, one with plain backward() and step()."""
    class Plain:
        def __init__(self, *args, enabled):
            assert not enabled
        scale = staticmethod(lambda loss: loss)
        step = staticmethod(lambda optimizer: optimizer.step())
        unscale_ = staticmethod(lambda optimizer: None)
        update, state_dict = staticmethod(lambda: None), staticmethod(dict)
    images, states = shapes(), []
    for scaler in (torch.amp.GradScaler, Plain):
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        states.append(finish(tiny(dropout=0.1), images)[0].state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

@pytest.mark.parametrize("formulation", ("1", "none"))
def test_resume_is_bit_identical(monkeypatch, formulation):
    """Stopped after every row and resumed from the file, a run ends with the checkpoint of an uninterrupted one."""
    words = f"""--formulation {formulation} --dropout 0.2 --vae-steps 10 --ddpm-steps 10 --log-every 3
                --save-every 1 --run-dir"""
    assert command(words, "a") == 0
    def one_row(model, images, state, stage):    # stops after a row
        yield from itertools.islice(STAGES[stage](model, images, state), 1)
        if state["steps"][stage] < 10:
            raise KeyboardInterrupt
    for stage in STAGES:
        monkeypatch.setattr(diffusevae, f"train_{stage}", functools.partial(one_row, stage=stage))
    codes = []
    while not codes or codes[-1] == 130 and len(codes) < 9:
        codes.append(command(words, "b"))
    assert codes == [130] * (6 if formulation == "1" else 3) + [0] and alike("a", "b")
    logs = [[row[:-1] for row in csv.reader(open(f"{run}/log.csv"))] for run in "ab"]    # without speed
    assert logs[0] == logs[1] and len(logs[0]) == (9 if formulation == "1" else 5)

def test_fp16_resumes_bit_identical():
    """Saved and loaded after every row, a run in fp16 ends with the checkpoint of an uninterrupted one."""
    c = tiny(precision="fp16", vae_steps=9, ddpm_steps=9, dropout=0.2, log_every=3)
    for run in "ab":
        torch.manual_seed(0)
        model, state, scales = DiffuseVAE(dataclasses.replace(c, run_dir=run)), new_state(), []
        for stage, train in STAGES.items():
            while state["steps"][stage] < 9:
                for row in train(model, shapes(), state):
                    diffusevae.save_checkpoint(model, state)
                    scales.append((state["scaler"]["scale"], state["scaler"]["_growth_tracker"]))
                    if run == "b":
                        break
                if run == "b":
                    model, state = diffusevae.load_run(run)
                    model.config.precision = "fp16"    # per command, not saved
    assert alike("a", "b") and len(scales) == 6
    assert 0 < scales[0][0] < 2**16 and scales[0] != scales[1]    # a scale to keep, and a count of steps

@pytest.mark.parametrize("stage", STAGES)
def test_resuming_in_another_memory_format(stage):
    """Adam's moments saved in another memory format still match their weights when training resumes."""
    ends = []
    for moved in (False, True):
        torch.manual_seed(0)
        model = DiffuseVAE(tiny(vae_steps=6, ddpm_steps=6, log_every=3)).to(memory_format=torch.channels_last)
        state = new_state()
        if stage == "ddpm":
            list(train_vae(model, shapes(), state))
        next(STAGES[stage](model, shapes(), state))
        for moments in state["optimizer"]["state"].values() if moved else ():
            moments.update((name, moments[name].contiguous()) for name in ("exp_avg", "exp_avg_sq"))
        list(STAGES[stage](model, shapes(), state))
        ends.append(list((model.vae if stage == "vae" else model.unet).parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))

def test_fp16_does_not_train_on_mps():
    """fp16 training on MPS, where fused Adam may ignore the gradient scaler, is refused."""
    network, mps = torch.nn.Linear(2, 2), torch.device("mps")
    with pytest.raises(ValueError, match="cannot train in fp16 on MPS; use --precision fp32"):
        diffusevae.optimizer_for(network, "vae", tiny(precision="fp16"), mps, new_state())
    for precision in ("fp32", "bf16", "auto"):
        diffusevae.optimizer_for(network, "vae", tiny(precision=precision), mps, new_state())

@pytest.mark.parametrize("stage", STAGES)
def test_stopping_between_rows(monkeypatch, stage):
    """Stopped between two rows and resumed with its state, a run ends with the weights of an uninterrupted one."""
    options, train = dict(vae_steps=9, ddpm_steps=9, log_every=4, dropout=0.2), STAGES[stage]
    whole, real = finish(tiny(**options), shapes())[0], diffusevae.random_batch
    network = lambda model: (model.vae if stage == "vae" else model.unet).parameters()
    for breaks in ((1,), (3, 6), (2, 4, 5, 8)):
        torch.manual_seed(0)
        model, state = DiffuseVAE(tiny(**options)), new_state()
        if stage == "ddpm":
            list(train_vae(model, shapes(), state))
        for end in breaks:
            def stop(*args, end=end):    # before step `end` has changed anything
                if state["steps"][stage] == end:
                    raise KeyboardInterrupt
                return real(*args)
            monkeypatch.setattr(diffusevae, "random_batch", stop)
            with pytest.raises(KeyboardInterrupt):
                list(train(model, shapes(), state))
        monkeypatch.setattr(diffusevae, "random_batch", real)
        assert [row["step"] for row in train(model, shapes(), state)] == [s for s in (4, 8, 9) if s > end]
        assert [row["step"] for row in state["log"] if row["stage"] == stage] == [4, 8, 9]
        assert all(torch.equal(one, two) for one, two in zip(network(model), network(whole), strict=True))

def test_a_stage_that_is_left_early_leaves_no_graph():
    """After a loop over train_vae that is left early, codes have no graph, and the VAE gets no gradients."""
    model, state = DiffuseVAE(tiny()), new_state()
    next(train_vae(model, shapes(), state))
    for sample in (False, True):
        z = model.encode(diffusevae.to_float(shapes()), sample)
        assert z.grad_fn is None and not z.requires_grad
    model.vae.zero_grad()
    next(train_ddpm(model, shapes(), state))
    assert all(p.grad is None for p in model.vae.parameters())

def test_the_prior_is_fitted_to_samples():
    """The mixture's variance is that of the codes' means plus that of q(z|x), here 4: EM preserves moments."""
    n, model = 2000, DiffuseVAE(tiny())
    last, images = model.vae.encoder[-1], shapes(n)
    x = diffusevae.to_float(images)
    with torch.no_grad():
        last.weight[2:], last.bias[2:] = 0, math.log(4)    # logvar; mu is left as it is
        last.weight[:2] /= model.encode(x).std(0)[:, None]
    mu = model.encode(x)
    diffusevae.fit_prior(model, images)
    mixture = model.mixture
    mean = mixture.weights @ mixture.means
    second = (mixture.scale_tril @ mixture.scale_tril.mT).diagonal(dim1=1, dim2=2) + mixture.means**2
    variance = mixture.weights @ second - mean**2
    assert mixture.fitted and len(mixture.weights) == 3
    assert (mean - mu.mean(0)).abs().max() < 5 * (4 / n)**0.5    # 5 SE
    assert (variance / (mu.var(0) + 4) - 1).abs().max() < 5 * (2 / n)**0.5    # 5 SE; without the 4 it is 0.2

def test_the_prior_is_fitted_where_the_model_is(monkeypatch):
    """The codes and the new mixture are on the model's device; as many components as asked for are fitted."""
    seen, fit = [], GaussianMixture.fit
    def watched(self, z, **options):
        seen.append((z.device.type, self.means.device.type, len(z), len(self.means)))
        self.history = [0.0]
        return self if z.is_meta else fit(self, z, **options)
    monkeypatch.setattr(GaussianMixture, "fit", watched)
    for device, components in itertools.product(("cpu", "meta"), (None, 5)):
        model, sizes = DiffuseVAE(tiny()).to(device), []
        model.vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        diffusevae.fit_prior(model, shapes(), components)
        assert seen.pop() == (device, device, 8, components or 3) and model.mixture.means.device.type == device
        assert sizes == [4, 4]    # batches as in training, which fit into the memory
    with pytest.raises(ValueError, match="9 gmm_components"):
        diffusevae.fit_prior(DiffuseVAE(tiny()), shapes(), 9)

def test_a_prior_belongs_to_its_vae():
    """When the VAE trains further, its prior is no longer fitted, and the command line fits another."""
    model, state = DiffuseVAE(tiny()), new_state()
    next(train_vae(model, shapes(), state))
    diffusevae.fit_prior(model, shapes())
    assert model.mixture.fitted and model.sample_prior(2).shape == (2, 2)
    next(train_vae(model, shapes(), state))
    with pytest.raises(ValueError, match="not fitted"):
        model.sample_prior(2)
    means = []
    for steps in (4, 4, 8):
        assert command("--run-dir r --stage vae", vae_steps=steps) == 0
        means.append(torch.load("r/model.pt", weights_only=True)["model"]["mixture.means"])
    assert torch.equal(means[0], means[1]) and not torch.allclose(means[1], means[2])

def test_a_run_that_stopped_before_its_prior(monkeypatch):
    """A run interrupted between the VAE's last step and its prior fits the prior at the next command."""
    with monkeypatch.context() as m:
        m.setattr(diffusevae, "fit_prior", lambda *args: {}["killed here"])
        with pytest.raises(KeyError):
            command("--run-dir r --stage vae")
    assert not diffusevae.load_run("r")[0].mixture.fitted
    assert command("--run-dir r --stage vae") == 0 and diffusevae.load_run("r")[0].mixture.fitted

def test_a_replaced_prior_can_be_saved():
    """A checkpoint with a mixture of another size loads, and the command line continues with it."""
    assert command("--run-dir r --stage vae") == 0
    model, state = diffusevae.load_run("r")
    diffusevae.fit_prior(model, shapes(20), 7)
    diffusevae.save_checkpoint(model, state)
    loaded = diffusevae.load_run("r")[0]
    assert loaded.config.gmm_components == 7 and torch.equal(loaded.mixture.means, model.mixture.means)
    assert command("--run-dir r", gmm_components=None) == 0
    assert torch.equal(diffusevae.load_run("r")[0].mixture.means, model.mixture.means)

def test_a_model_built_by_hand_continues_from_the_command_line(capsys):
    """A run whose VAE came from another model continues with --vae-steps 0, as the message says."""
    model, state = DiffuseVAE(tiny(run_dir="r")), new_state()
    diffusevae.fit_prior(model, shapes())
    before = copy.deepcopy(model.vae.state_dict())
    next(train_ddpm(model, shapes(), state))
    diffusevae.save_checkpoint(model, state)
    assert "--vae-steps 0" in refusal(capsys, command("--run-dir r"))
    assert command("--run-dir r", vae_steps=0) == 0
    after, state = diffusevae.load_run("r")
    assert state["steps"] == dict(vae=0, ddpm=4)
    assert all(torch.equal(value, before[name]) for name, value in after.vae.state_dict().items())

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains():
    """Both stages train on CUDA in its automatic precision, from images there and on the CPU; losses are finite."""
    for images in (shapes().cuda(), shapes()):
        model, state = DiffuseVAE(tiny(device="cuda")).to("cuda", memory_format=torch.channels_last), new_state()
        assert all(math.isfinite(row["loss"]) for train in STAGES.values() for row in train(model, images, state))

def as_on_cuda(monkeypatch, compile):
    """Compile what CUDA would compile, with `compile` for torch.compile."""
    real, batch = diffusevae.compiled, diffusevae.random_batch
    cuda = torch.device("cuda")
    monkeypatch.setattr(diffusevae, "compiled", lambda loss, c, images, n, device: real(loss, c, images, n, cuda))
    monkeypatch.setattr(diffusevae, "random_batch", lambda images, n, hflip, _: batch(images, n, hflip, images.device))
    monkeypatch.setattr(torch, "compile", compile)

def test_compiled_steps_are_one_graph(monkeypatch):
    """Each stage and the sampler are one graph, for every learning rate, decay, seed and t."""
    from torch._dynamo.testing import CompileCounter
    real, counters = torch.compile, []
    def traced(function, **options):
        counters.append(CompileCounter())
        return real(function, backend=counters[-1], fullgraph=True, **options)    # an error if the graph breaks
    for formulation, z_cond in (("1", True), ("2", False), ("none", False)):
        c = tiny(formulation=formulation, z_cond=z_cond, compile=True, precision="fp32", vae_steps=20,
                 ddpm_steps=20, dropout=0.1, batch_size=3)
        torch._dynamo.reset()    # once: the second stage, with another batch size, meets what the first left
        counters.clear()
        with monkeypatch.context() as m:
            as_on_cuda(m, traced)
            model = finish(c, shapes())[0]
        assert [counter.frame_count for counter in counters] == [1] * (1 + (model.vae is not None))
        torch._dynamo.reset()
        sampler = CompileCounter()
        model.unet.compile(backend=sampler, fullgraph=True)
        for eta in (0.0, 1.0):
            model.sample(3, steps=10, eta=eta, prior="normal")
        assert sampler.frame_count == 1

class Breaks(torch.autograd.Function):
    """The identity, without a backward pass."""
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, gradient: fail_to_compile("no kernel"))

def fail_to_compile(reason):
    """Fail as torch.compile may do."""
    raise (torch.OutOfMemoryError if "memory" in reason else NotImplementedError)(f"{reason}\nTraceback")

@pytest.mark.parametrize("reason, fails", (
    ("too new a Python", lambda loss, **options: fail_to_compile("too new a Python")),    # at once
    ("no compiler", lambda loss, **options: lambda x: fail_to_compile("no compiler")),    # at the first call
    ("no kernel", lambda loss, **options: lambda x: Breaks.apply(loss(x))),    # in the backward pass
    ("CUDA out of memory", lambda loss, **options: fail_to_compile("CUDA out of memory"))))
def test_training_without_a_compiler(capsys, monkeypatch, fails, reason):
    """Where compilation fails, each stage says why in one line, and the weights are those of an eager run."""
    options = dict(precision="fp32", dropout=0.1)
    eager = finish(tiny(compile=False, **options), shapes())[0].state_dict()
    as_on_cuda(monkeypatch, fails)
    capsys.readouterr()
    model = finish(tiny(compile=True, **options), shapes())[0]
    lines = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert lines == [f"torch.compile failed ({reason}); continuing without it"] * 2
    assert all(torch.equal(value, eager[name]) for name, value in model.state_dict().items())

def test_what_is_compiled(capsys, monkeypatch):
    """With --compile, on CUDA alone, a trial batch goes forward and backward through the compiled loss."""
    calls, weight = [], torch.ones((), requires_grad=True)
    fake = lambda function, **options: lambda x: calls.append(len(x)) or function(x)
    loss, cpu, cuda = lambda x: (x * weight).sum()[None], torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch, "compile", fake)
    assert diffusevae.compiled(loss, tiny(compile=True), shapes(), 4, cpu) is loss
    assert diffusevae.compiled(loss, tiny(compile=False), shapes(), 4, cuda) is loss
    assert not calls and not capsys.readouterr().out
    as_on_cuda(monkeypatch, fake)
    fast = diffusevae.compiled(loss, tiny(compile=True, precision="fp32"), shapes(), 4, cpu)
    assert calls == [4] and weight.grad is not None and "compiling; this takes minutes" in capsys.readouterr().out
    assert fast(torch.ones(7)).item() == 7 and calls == [4, 7]

def test_a_loss_that_is_not_finite_stops_training(capsys, monkeypatch):
    """The message names the last good row; the checkpoint before it is kept and can be continued."""
    assert command("--run-dir r --save-every 2", ddpm_steps=4) == 0
    before, loss, calls = Path("r/model.pt").read_bytes(), DiffuseVAE.loss, itertools.count()
    broken = lambda self, x, unet=None: loss(self, x, unet) * (math.nan if next(calls) == 2 else 1)
    monkeypatch.setattr(DiffuseVAE, "loss", broken)
    message = refusal(capsys, command("--run-dir r --log-every 4 --save-every 100", ddpm_steps=12))
    assert re.search("non-finite ddpm loss.* after step 4; try a lower", message)
    assert Path("r/model.pt").read_bytes() == before
    monkeypatch.setattr(DiffuseVAE, "loss", loss)
    assert command("--run-dir r", ddpm_steps=12) == 0

NORM = "unet.middle.0.norm.weight"

class Bomb:
    """Pickled, a call of os.mkdir."""

    def __reduce__(self):
        return os.mkdir, ("boom",)

def test_damaged_checkpoints_are_refused(capsys):
    """A file that is cut off, altered, empty or foreign is refused and stays as it is; no code in it runs."""
    assert command("--run-dir r") == 0
    path = Path("r/model.pt")
    whole = path.read_bytes()
    damaged = [b"", whole[:100], whole[:len(whole) // 2], whole[:-1]]
    for foreign in (dict(bomb=Bomb()), dict(some="thing"), torch.zeros(3)):
        torch.save(foreign, path)
        damaged.append(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(200, len(whole) * 3 // 4, 20):    # in the tensors or the padding before them
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
    path.write_bytes(whole)
    good, accepted = flat(torch.load(path, weights_only=True)), 0
    for data in damaged:
        path.write_bytes(data)
        capsys.readouterr()
        try:
            diffusevae.load_run("r", trained=True)
        except ValueError as e:
            assert re.fullmatch(r"cannot use \S+model.pt \(.+\); move it away or use a new --run-dir", str(e))
        else:    # a bit of padding, which means nothing
            loaded, accepted = flat(torch.load(path, weights_only=True)), accepted + 1
            assert all(torch.equal(v, loaded[k]) if torch.is_tensor(v) else v == loaded[k] for k, v in good.items())
        assert path.read_bytes() == data
    assert accepted < 15 and not Path("boom").exists()
    path.write_bytes(damaged[2])
    for stage in ("sample", "all"):
        assert "cannot use" in refusal(capsys, reopen("r", "--stage", stage)) and path.read_bytes() == damaged[2]

@pytest.mark.parametrize("change, reason", (
    (lambda c: c.pop("format"), "checkpoint format 1; "), (lambda c: c.update(format=2), "checkpoint format 2; "),
    (lambda c: c.update(format=4), "checkpoint format 4; "), (lambda c: c["model"].pop(NORM), "."),
    (lambda c: c["model"].update(other=c["model"].pop(NORM)), "."), (lambda c: c.pop("log"), "'log'"),
    (lambda c: c["model"].update({NORM: torch.ones(3)}), "."),
    (lambda c: c["model"].update({"mixture.means": 5}), "."),
    (lambda c: c["options"].update(heads=3), "heads must divide"), (lambda c: c.update(steps=3), "."),
    (lambda c: c["model"].update(other=Bomb()), ".")))
def test_edited_checkpoints_are_refused(capsys, change, reason):
    """A checkpoint of another format, or that no longer fits, is refused and not replaced; no code in it runs."""
    assert command("--run-dir r --stage ddpm") == 0
    saved = torch.load("r/model.pt", weights_only=True)
    assert saved.keys() == {"format", "options", "model", *new_state()} and saved["format"] == 3
    change(saved)
    torch.save(saved, "r/model.pt")
    before = Path("r/model.pt").read_bytes()
    cannot = rf"cannot use r.model.pt \(.*{reason}.*\); move it away or use a new --run-dir"
    for stage in ("sample", "ddpm", "all"):
        assert re.search(cannot, refusal(capsys, reopen("r", "--stage", stage)))
    with pytest.raises(ValueError, match=cannot):
        DiffuseVAE.load("r", "cpu")
    assert Path("r/model.pt").read_bytes() == before and not Path("boom").exists()

@pytest.mark.parametrize("owner, name, error", (
    *itertools.product((torch,), ("load",), (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                                             RuntimeError("DefaultCPUAllocator: can't allocate memory"))),
    (DiffuseVAE, "load_state_dict", MemoryError()), (UNet, "__init__", MemoryError()),
    (diffusevae.zipfile, "ZipFile", PermissionError(13, "Permission denied", "model.pt"))))
def test_a_checkpoint_that_cannot_be_read_now(capsys, monkeypatch, owner, name, error):
    """Missing memory or permissions are reported as such, not as a checkpoint to be moved away."""
    assert command("--run-dir r --stage ddpm") == 0
    def fail(*args, **options):
        raise error
    monkeypatch.setattr(owner, name, fail)
    message = refusal(capsys, reopen("r"))
    expected = "Permission denied: 'model.pt'" if name == "ZipFile" else "out of memory; lower"
    assert expected in message and "cannot use" not in message

def test_a_run_without_a_trained_unet(capsys):
    """A run with a VAE alone cannot be sampled or loaded by load(), but it can be trained further."""
    assert command("--run-dir r --stage vae") == 0
    assert "the U-Net in r is not trained yet; use --stage ddpm first" in refusal(capsys, reopen("r"))
    with pytest.raises(ValueError, match="the U-Net in r is not trained yet"):
        DiffuseVAE.load("r", "cpu")
    model, state = diffusevae.load_run("r")
    assert state["steps"] == dict(vae=4, ddpm=0) and model.mixture.fitted

class FullDisk(io.BytesIO):
    """A file on a disk that is full."""

    def write(self, data):
        raise OSError(28, "No space left on device")

def fail_to_save(monkeypatch, *saves):
    """Let the disk be full whenever model.pt is saved, or at the saves with these numbers; return their count."""
    count = []
    def opened(path, mode="r", **options):
        if mode != "wb":
            return open(path, mode, **options)
        count.append(path)
        return FullDisk() if not saves or len(count) in saves else open(path, mode)
    monkeypatch.setattr(diffusevae, "open", opened, raising=False)
    return count

FULL = "could not write .*model.pt \\(.*No space left on device.*\\); the previous checkpoint is unchanged"

@pytest.mark.parametrize("fails, code, steps", (
    ((1,), 2, None), ((10,), 2, 3), ((3, 4, 8, 9), 0, 4)))    # 1: before training, 6: the prior, 10: the last
def test_a_full_disk(capsys, monkeypatch, fails, code, steps):
    """If the first or the last checkpoint cannot be written, training stops; in between, it warns in one line."""
    words = "--log-every 1 --save-every 1 --run-dir"
    assert command(words, "clean") == 0
    capsys.readouterr()
    with monkeypatch.context() as m:
        fail_to_save(m, *fails)
        assert command(words, "r") == code
    out, err = capsys.readouterr()
    lines = [line for line in (err if code else out).splitlines() if "could not write" in line]
    assert len(lines) == len(fails) and all(re.search(FULL, line) for line in lines)
    assert not list(Path("r").glob("*.tmp"))
    if steps is None:
        assert not files("r")
    else:
        assert torch.load("r/model.pt", weights_only=True)["steps"]["ddpm"] == steps
        before = files("r")["model.pt"]
        with monkeypatch.context() as m:
            fail_to_save(m, 1)    # of a command that resumes
            assert command(words, "r") == code and files("r")["model.pt"] == before
    assert command(words, "r") == 0 and alike("r", "clean")

def test_a_full_disk_for_real(capsys):
    """On a disk that accepts no more, the previous checkpoint stays whole, and nothing half-written remains."""
    resource = pytest.importorskip("resource")
    assert command("--run-dir r") == 0
    before, (soft, hard) = Path("r/model.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for run, limit in (("r", len(before) // 2), ("new", 10_000)):    # less than the weights alone need
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code = command("--run-dir", run, ddpm_steps=9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert re.search("could not write .*model.pt .* checkpoint is unchanged", refusal(capsys, code))
        assert not list(Path(run).glob("*.tmp"))
    assert Path("r/model.pt").read_bytes() == before and not files("new")
    assert command("--run-dir r", ddpm_steps=9) == 0

@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("saved", (False, True))
def test_a_second_training_in_the_same_folder(capsys, monkeypatch, stage, saved):
    """A process that finds model.pt changed by another one stops with one sentence and changes nothing."""
    if saved:
        assert command("--run-dir r --stage vae", vae_steps=2) == 0
        capsys.readouterr()
    real = STAGES[stage]
    def interrupted(model, images, state):
        for row in real(model, images, state):
            with monkeypatch.context() as m:
                m.setattr(diffusevae, f"train_{stage}", real)
                assert command("--run-dir r") == 0    # another process trains the run to its end
            after.update(files("r"))
            capsys.readouterr()
            yield row
    after = {}
    monkeypatch.setattr(diffusevae, f"train_{stage}", interrupted)
    message = refusal(capsys, command("--run-dir r"))
    assert message.startswith("diffusevae: r/model.pt was changed by another process or model") and files("r") == after
    assert torch.load("r/model.pt", weights_only=True)["steps"] == dict(vae=4, ddpm=4)

def test_a_model_that_was_not_loaded_does_not_replace_a_checkpoint():
    """A checkpoint is replaced only by the process that saved or loaded it."""
    assert command("--run-dir r --stage vae") == 0
    before = files("r")
    with pytest.raises(ValueError, match="r/model.pt was changed by another process or model"):
        diffusevae.save_checkpoint(DiffuseVAE(tiny(run_dir="r")), new_state())
    assert files("r") == before
    model, state = diffusevae.load_run("r")
    for _ in range(3):
        diffusevae.save_checkpoint(model, state)
    os.remove("r/model.pt")
    with pytest.raises(ValueError, match="another process"):
        diffusevae.save_checkpoint(model, state)

def test_leftover_files_are_removed():
    """The next training removes the temporary file of a killed process if it is an hour old."""
    Path("r").mkdir()
    for name, hours in (("model.1.tmp", 2), ("model.2.tmp", 0.5), ("mine.3.tmp", 2)):
        path = Path("r", name)
        path.touch()
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    assert command("--run-dir r --stage vae") == 0
    assert {path.name for path in Path("r").glob("*.tmp")} == {"model.2.tmp", "mine.3.tmp"}

@lacking("links that every user may make")
@pytest.mark.parametrize("exists", (False, True))
def test_a_linked_checkpoint_is_written_through(exists):
    """A model.pt that is a link to another disk stays one; the file is written whole, there."""
    Path("r").mkdir()
    Path("disk").mkdir()
    if exists:
        assert command("--run-dir first --stage vae") == 0
        shutil.copy("first/model.pt", "disk/big.pt")
    Path("r/model.pt").symlink_to(Path("disk/big.pt").resolve())
    assert command("--run-dir r") == 0
    assert Path("r/model.pt").is_symlink() and set(files("disk")) == {"big.pt"}
    assert torch.load("disk/big.pt", weights_only=True)["steps"] == dict(vae=4, ddpm=4)
    assert reopen("r") == 0 and not list(Path().rglob("*.tmp"))

# ---- 9 Pictures --------------------------------------------------------------------------------------
@pytest.fixture
def figures(monkeypatch):
    """The figures that commands draw, by their paths below the run folder; no file is written."""
    seen = {}
    def keep(path, draw, *args):
        seen["/".join(path.parts[1:])] = draw(*args)
    monkeypatch.setattr(diffusevae, "save_figure", keep)
    return seen

def grid_of(fig, size, columns):
    """The images of a grid -> int [rows, columns, size, size, 3], and the labels of the rows."""
    (ax,) = fig.axes
    pixels = torch.from_numpy(np.asarray(ax.get_images()[0].get_array())).int()[1:, 1:]    # a frame of 1
    cells = pixels.unflatten(0, (-1, size + 1)).unflatten(2, (columns, size + 1))[:, :-1, :, :-1]
    return cells.transpose(1, 2), [label.get_text() for label in ax.get_yticklabels()]

def shown(x):
    """Images [..., C, S, S] as a grid shows them, int [..., S, S, 3]."""
    x = diffusevae.to_uint8(x).int()
    return x.expand(*x.shape[:-3], 3, *x.shape[-2:]).movedim(-3, -1)

@pytest.mark.parametrize("channels, size, counts, columns", (
    (3, 8, (6, 6), 16), (1, 8, (6, 6), 4), (3, 12, (5, 3), 16), (3, 8, (64, 64, 10), 16), (1, 9, (2,), 2)))
def test_grids(channels, size, counts, columns):
    """Each image is in its place, in labeled rows that continue below; the figure is at most 8.7 inches wide."""
    rows = {f"row {i}": torch.rand(n, channels, size, size) * 2.2 - 1.1 for i, n in enumerate(counts)}
    fig = diffusevae.draw_grid(rows, columns)
    width = min(columns, max(counts))
    down = math.ceil(max(counts) / width)
    cells, labels = grid_of(fig, size, width)
    assert labels == list(rows) * down and len(cells) == len(rows) * down
    ticks = fig.axes[0].get_yticks()
    assert ticks.tolist() == [(size + 1) * (i + 0.5) for i in range(len(labels))]    # the middles of the rows
    for i, images in enumerate(rows.values()):
        placed = cells[i::len(rows)].flatten(0, 1)
        assert torch.equal(placed[:len(images)], shown(images)) and (placed[len(images):] == 255).all()
    assert fig.get_figwidth() <= 8.71
    height, length = fig.get_figheight() / len(cells), fig.get_figwidth() * fig.axes[0].get_position().width / width
    assert height == pytest.approx(length)    # images are square

@pytest.mark.parametrize("formulation, size, channels", (("1", 16, 3), ("2", 8, 1), ("none", 12, 1)))
def test_progress_pictures(formulation, size, channels):
    """Rows are test images, x_hat and, in stage 2, refined images, always from the same noise and codes."""
    config = tiny(formulation=formulation, image_size=size, channels=channels, heads=0, steps=4)
    model, x = perturbed(DiffuseVAE(config), 0.05), images_in(8, channels, size, size)
    noise = model.noise(8, diffusevae.generators(0, "progress", range(8)))
    rows = {"test image": x, "VAE": model.vae.decode(model.encode(x)).detach()} if model.vae else {}
    refined = model.refine(rows.get("VAE"), noise, eta=0.0)
    drawn = {}
    for stage in ("vae", "ddpm") if model.vae else ("ddpm",):
        expected = {**rows, "refined" if model.vae else "DDPM": refined} if stage == "ddpm" else rows
        cells, labels = grid_of(diffusevae.draw_progress(model, stage, x), size, 8)
        assert labels == list(expected)
        assert (cells - shown(torch.stack(list(expected.values())))).abs().max() <= 1
        drawn[stage] = cells
    torch.manual_seed(9)
    model.config = dataclasses.replace(config, eta=1.0, variance="large")
    assert torch.equal(grid_of(diffusevae.draw_progress(model, "ddpm", x), size, 8)[0], drawn["ddpm"])
    perturbed(model.unet)
    moved = grid_of(diffusevae.draw_progress(model, "ddpm", x), size, 8)[0]
    assert torch.equal(moved[:-1], drawn["ddpm"][:-1]) and (moved[-1] - drawn["ddpm"][-1]).abs().max() > 9

def test_progress_pictures_do_not_disturb_training(figures):
    """With a progress picture at every step or at the end alone, a run ends with the same weights, to the bit."""
    words = "--dropout 0.2 --eta 1 --log-every 1"
    names = {f"progress/{stage}_{step:06}.png" for stage in STAGES for step in (1, 2, 3, 4)}    # few enough
    for every in (1, 100):
        figures.clear()
        assert command(words, f"--run-dir every{every} --save-every {every}") == 0
        expected = names if every == 1 else {name for name in names if "4" in name}
        assert {name for name in figures if "progress" in name} == expected
    assert alike("every1", "every100", but=("save_every",))

def test_pictures_come_with_every_checkpoint(figures, monkeypatch):
    """Each checkpoint comes with a progress picture and with the curves of the whole log, also of a resumed run."""
    seen, save, curves = [], diffusevae.save_checkpoint, diffusevae.draw_curves
    monkeypatch.setattr(diffusevae, "save_checkpoint", lambda *args: seen.append("saved") or save(*args))
    monkeypatch.setattr(diffusevae, "draw_curves", lambda log: seen.append(len(log)) or curves(log))
    words = "--run-dir r --log-every 2 --save-every 3"
    assert command(words, "--stage vae", vae_steps=8) == 0    # rows 4, 6 and 8 are the first past 3, 6 and the end
    # the first and the last without pictures
    assert seen == ["saved", "saved", 2, "saved", 3, "saved", 4, "saved"]
    assert set(figures) == {"curves.png", *(f"progress/vae_00000{step}.png" for step in (4, 6, 8))}
    seen.clear()
    assert command(words, "--stage ddpm", vae_steps=8) == 0 and seen == ["saved", 6]
    assert "progress/ddpm_000004.png" in figures

def test_curves_are_the_log():
    """The curves are the log's values at its steps on logarithmic axes, the VAE's left and the DDPM's right."""
    log = finish(tiny(vae_steps=9, ddpm_steps=7), shapes())[1]
    left, right = diffusevae.draw_curves(log).axes
    for ax, stage, names in ((left, "vae", ("recon", "kl")), (right, "ddpm", ("loss",))):
        rows = [row for row in log if row["stage"] == stage]
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log") and stage in ax.get_title().lower()
        assert len(ax.lines) == len(names) and len(rows) > 3
        for line, name in zip(ax.lines, names):
            assert list(line.get_xdata()) == [row["step"] for row in rows]
            assert list(line.get_ydata()) == [row[name] for row in rows]

@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("stages", ((), ("vae",), ("ddpm",)))
def test_curves_of_part_of_a_log(stages):
    """One stage, or none, or a single row of each, is drawn without a warning."""
    rows = [dict(stage=stage, step=3, loss=0.5, recon=0.4, kl=0.1) for stage in stages]
    diffusevae.save_figure(Path("c.png"), diffusevae.draw_curves, rows)
    assert np.asarray(Image.open("c.png")).shape[1] > 400

@pytest.mark.parametrize("steps, losses", (
    *((steps, (0.3, 0.03)) for steps in (300, 3000, 10_000, 50_000, 200_000, 400_000)),
    *((3000, losses) for losses in ((0.6, 0.2), (70, 20), (2, 1.9), (0.0391, 0.0389)))))
def test_numbers_at_the_axes_of_curves(steps, losses):
    """However long a run is and however little its losses change, each axis has two numbers that do not overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    log = [dict(stage=stage, step=step, loss=loss, recon=99 * loss, kl=30 * loss) for stage in STAGES
           for step, loss in zip((100, steps), losses)]
    fig = diffusevae.draw_curves(log)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    for ax in fig.axes:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
            labels = [label for at, label in ticks if low <= at <= high and label.get_text()]
            boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
            assert len(boxes) >= 2 and not any(one.overlaps(two) for one, two in zip(boxes, boxes[1:]))

@pytest.mark.parametrize("options", (dict(steps=9), dict(steps=9, formulation="2", z_cond=True, channels=1),
    dict(steps=30, eta=1.0, variance="large"), dict(steps=9, order=2)))
def test_latents_picture(options):
    """Rows are the test images, three reconstructions with their errors, and interpolation in z, all of order 1."""
    config = tiny(timesteps=30, z_dim=3, seed=5, **options)
    model, given = perturbed(DiffuseVAE(config), 0.02), dict(eta=0.0, order=1, variance="small")
    x = torch.rand(4, config.channels, 8, 8) - 0.5
    cells, labels = grid_of(diffusevae.draw_latents(model, x), 8, 4)
    z, noise = model.invert(x)
    random = model.noise(4, diffusevae.generators(5, "latents", range(4)))
    rows = [x, model.vae.decode(z).detach(), model.decode(z, random, **given), model.decode(z, noise, **given)]
    for label, row in zip(labels[1:4], rows[1:]):    # printed to four digits
        error = np.square(row.double().numpy() - x.double().numpy()).mean()
        assert float(label.split()[-1]) == pytest.approx(error, abs=6e-5)
    assert len(labels) == len(cells) == 6 and (rows[3] - x).abs().max() < 0.05 < (rows[2] - x).abs().max()
    u = torch.linspace(0, 1, 4)[:, None]
    between = (1 - u) * z[0] + u * z[1]
    rows += [model.vae.decode(between).detach(), model.decode(between, noise[:1].expand_as(noise), **given)]
    assert (cells - shown(torch.stack(rows))).abs().max() <= 1    # another batch rounds otherwise
    assert (cells[4, [0, 3]] - cells[1, [0, 1]]).abs().max() <= 1    # the VAE's, from the first to the second image
    assert (cells[5, 0] - cells[3, 0]).abs().max() <= 1 < (cells[5, 3] - cells[3, 0]).abs().max()

def test_no_expanded_tensor_is_decoded(monkeypatch):
    """draw_latents decodes no code and no noise with a stride of 0, which some versions of MPS misread."""
    model, strides = DiffuseVAE(tiny(timesteps=10)), []
    sample = model.diffusion.sample
    monkeypatch.setattr(model.diffusion, "sample", lambda net, noise, *args, **options: sample(
        net, strides.append(noise.stride()) or noise, *args, **options))
    model.vae.decoder.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    diffusevae.draw_latents(model, torch.rand(4, 3, 8, 8) - 0.5)
    assert len(strides) >= 6 and all(min(stride) > 0 for stride in strides)

def test_when_latents_is_drawn(figures, monkeypatch):
    """latents.png comes with samples.png, of the first eight test images or fewer, if there are two or more."""
    assert command("--run-dir r --stage ddpm") == 0 and "latents.png" not in figures
    draw, load, seen = diffusevae.draw_latents, diffusevae.load_images, []
    monkeypatch.setattr(diffusevae, "draw_latents", lambda model, x: seen.append(x) or draw(model, x))
    for n, samples in ((20, 20), (20, 1), (2, 20), (1, 20)):
        monkeypatch.setattr(diffusevae, "load_images", lambda c, split: (load(c, split)[0][:n], None))
        assert reopen("r", num_samples=samples) == 0
        if n > 1:
            assert torch.equal(seen.pop(), diffusevae.to_float(load(tiny(), "test")[0][:min(n, 8)]))
        assert not seen

@pytest.mark.parametrize("formulation", ("1", "none"))
def test_samples_picture(figures, capsys, monkeypatch, formulation):
    """samples.png shows real images, x_hat and refined images, at most 64, of the seed and the index alone."""
    assert command("--run-dir r --formulation", formulation, sample_batch=25, num_samples=70) == 0
    model = DiffuseVAE.load("r", "cpu")
    real = diffusevae.to_float(diffusevae.load_images(tiny(), "test")[0])
    both = model.sample_both(64, diffusevae.generators(0, "sample", range(64)), steps=2, order=1)
    rows = {"real": real, "VAE": both[0], "refined,\n2 steps" if model.vae else "DDPM,\n2 steps": both[1]}
    rows = {label: x[:64] for label, x in rows.items() if x is not None}
    cells, labels = grid_of(figures["samples.png"], 8, 16)
    assert labels == list(rows) * 4
    for i, (label, x) in enumerate(rows.items()):
        placed = cells[i::len(rows)].flatten(0, 1)
        assert (placed[:len(x)] - shown(x)).abs().max() <= 1 and (placed[len(x):] == 255).all(), label
    monkeypatch.setattr(diffusevae, "load_images", lambda *args: diffusevae.load_folder("gone", [8, 8], False))
    figures.clear()
    assert reopen("r") == 0 and list(figures) == ["samples.png"]
    assert grid_of(figures["samples.png"], 8, 4)[1] == list(rows)[1:]
    assert "samples.png is drawn without real images: --data-dir gone" in capsys.readouterr().out

@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("formulation", ("1", "none"))
def test_pictures_are_rendered(formulation):
    """The files are pictures that can be opened, have colors, and are large enough to be seen."""
    assert command("--run-dir r --formulation", formulation) == 0
    names = ["samples.png", "curves.png", "progress/ddpm_000004.png", "latents.png"]
    for name in names[:4 if formulation == "1" else 3]:
        with Image.open(f"r/{name}") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) > 100 and np.ptp(pixels, axis=2).max() > 50, name
    assert Path("r/latents.png").exists() == (formulation == "1")

PICTURES = ["curves.png", "progress/vae_000004.png", "curves.png", "progress/ddpm_000004.png", "samples.png",
            "latents.png"]    # in the order in which a run of TINY draws them

@pytest.mark.usefixtures("rendered")
def test_files_that_cannot_be_written(capsys):
    """Folders in place of files, or a file in place of a folder, cost a line of warning each, and nothing else."""
    assert command("--run-dir clean") == 0
    names = ("log.csv", "config.json", "curves.png", "samples.png", "latents.png")
    for name in names:
        Path("r", name).mkdir(parents=True)
    Path("r/progress").touch()
    capsys.readouterr()
    for run, expected in ((command, {*names, *PICTURES}), (lambda words: reopen("r"), {"samples.png", "latents.png"})):
        assert run("--run-dir r") == 0
        out, err = capsys.readouterr()
        assert {name.split("r/", 1)[1] for name in complaints(out)} == expected and not err
    assert alike("r", "clean") and set(files("r")) == {"model.pt", "progress"}

@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("fails, reason", (("draw", "latex was not found"), ("write", "No space left on device"),
    ("import", "import of matplotlib.figure")))
def test_pictures_that_fail(capsys, monkeypatch, fails, reason):
    """A picture that cannot be drawn or written is one line of warning; earlier pictures stay as they were."""
    from matplotlib.figure import Figure
    assert command("--run-dir r") == 0
    before = files("r")
    def half(self, path, **options):
        assert path.name.endswith(".tmp")    # the earlier picture is not touched
        path.write_bytes(before["samples.png"][:len(before["samples.png"]) // 2])
        raise OSError(28, "No space left on device")
    def broken(*args, **options):
        raise RuntimeError("latex was not found\nTraceback")
    if fails == "draw":
        monkeypatch.setattr(Figure, "__init__", broken)
    elif fails == "write":
        monkeypatch.setattr(Figure, "savefig", half)
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert command("--run-dir r", ddpm_steps=5) == 0
    out, err = capsys.readouterr()
    names = ["curves.png", "progress/ddpm_000005.png", "samples.png", "latents.png"]
    assert complaints(out) == [f"r/{name}" for name in names] and out.count(reason) == 4 and not err
    after = files("r")
    assert len(after) == len(before)
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))

def test_samples_do_not_depend_on_the_batch():
    """Image i is the same to a gray level in batches of 1, 3 and 7, with noise at every step."""
    assert command("--run-dir r") == 0
    shots = []
    for batch in (7, 1, 3):
        assert reopen("r", "--save-images --eta 1", num_samples=7, sample_batch=batch) == 0
        shots.append(np.stack([np.asarray(Image.open(f"r/samples/{i:06}.png")).astype(int) for i in range(7)]))
        assert abs(shots[0] - shots[-1]).max() <= 1 and np.ptp(shots[-1], axis=0).max() > 9
        assert len(files("r/vae_samples")) == 7

def test_saved_images_replace_earlier_ones():
    """After 5 and then 2 saved images, 2 are left, and the user's own files; vae_samples needs a VAE."""
    assert command("--run-dir r") == 0 and not Path("r/samples").exists()
    shutil.copytree("r", "fresh")
    assert reopen("r", "--save-images", num_samples=5) == 0
    if os.name != "nt":    # samples/ may be a link to another disk
        shutil.move("r/samples", "disk")
        Path("r/samples").symlink_to(Path("disk").resolve())
    five, own = files("r/samples"), {"favorite.png", "notes.txt", "1.png", "0000001.png", "sub/000000.png"}
    assert len(five) == len(files("r/vae_samples")) == 5
    for name in own:
        Path("r/samples", name).parent.mkdir(exist_ok=True)
        Path("r/samples", name).write_text(name, encoding="utf-8")
    for run in ("r", "fresh"):
        assert reopen(run, "--save-images", num_samples=2, steps=3) == 0
    after, two = files("r/samples"), {"000000.png", "000001.png"}
    assert set(after) == two | own and all(after[name] == name.encode() for name in own)
    assert {name: after[name] for name in two} == files("fresh/samples")
    assert after["000000.png"] != five["000000.png"]
    assert files("r/vae_samples") == files("fresh/vae_samples") and set(files("r/vae_samples")) == two
    assert reopen("r") == 0 and files("r/samples") == after and Path("r/samples").is_symlink() == (os.name != "nt")
    assert command("--run-dir plain --formulation none --save-images") == 0
    assert len(files("plain/samples")) == 4 and not Path("plain/vae_samples").exists()

# ---- 10 Main -----------------------------------------------------------------------------------------
def test_command_line_end_to_end(capsys):
    """Train, repeat without training, extend, sample: the run folder holds what the README says."""
    assert command("--run-dir r") == 0
    before = files("r")
    pictures = {"samples.png", "latents.png", "curves.png", "progress/vae_000004.png", "progress/ddpm_000004.png"}
    assert set(before) == {"model.pt", "config.json", "log.csv", *pictures}
    assert command("--run-dir r") == 0
    assert files("r")["model.pt"] == before["model.pt"] and files("r")["log.csv"] == before["log.csv"]
    assert command("--run-dir r", ddpm_steps=6) == 0
    rows = list(csv.DictReader(open("r/log.csv", encoding="utf-8")))
    assert [(r["stage"], r["step"]) for r in rows] == [("vae", "4"), ("ddpm", "4"), ("ddpm", "6")]
    assert all(float(r["steps_per_s"]) > 0 for r in rows)
    assert json.loads(Path("r/config.json").read_text(encoding="utf-8"))["ddpm_steps"] == 6
    for name in ("config.json", "log.csv"):    # for people: nothing reads them
        os.remove(f"r/{name}")
    assert reopen("r") == 0
    model = DiffuseVAE.load("r", "cpu")
    assert model.decode(torch.zeros(3, 2), steps=1).shape == (3, 3, 8, 8) and not model.unet.training
    assert model.sample(3, steps=1).shape == (3, 3, 8, 8)    # from the mixture, which comes with the run
    assert "cannot continue VAE training" in refusal(capsys, command("--run-dir r", vae_steps=9))

def test_stages_one_by_one():
    """--stage vae trains one stage and its prior, --stage ddpm whatever is missing of both, without samples."""
    assert command("--run-dir r --stage vae") == 0
    state = torch.load("r/model.pt", weights_only=True)
    assert state["steps"] == dict(vae=4, ddpm=0) and state["model"]["mixture.means"].shape == (3, 2)
    assert command("--run-dir r --stage ddpm") == 0 and not Path("r/samples.png").exists()
    assert command("--run-dir s --stage ddpm") == 0 and alike("r", "s")

@pytest.mark.parametrize("words", (
    "--formulation 2 --z-cond --order 2 --steps 6", "--formulation none --predict eps --spacing quad --z-cond",
    "--prior normal --schedule geometric", "--variance large --timesteps 9 --steps 9 --eta 1 --formulation 2",
    "--schedule linear --eta 1 --precision bf16", "--attention 8,4 --formulation 1 --no-hflip --grad-clip 0",
    "--timesteps 20 --steps 20 --eta 1 --image-size 10 --order 2", "--timesteps 5 --steps 5 --gmm-components 3"))
def test_options_work(words):
    """Unusual options, together, train and sample, and then sample again from the run folder alone."""
    assert command("--run-dir r", words) == 0 and Path("r/samples.png").exists()
    assert reopen("r") == 0

@pytest.mark.parametrize("words, named", (("--dataset lsun", "argument --dataset: invalid choice: 'lsun'"),
    ("--dataset folder --data-dir nowhere --attention none", "nowhere is not a folder"),
    ("--image-size 9", "image_size 9 must be divisible by 2"), ("--attention 5", "no 5x5 feature maps"),
    ("--image-size 250", "repeated halving of image_size 250 ends at 125"), ("--heads 3", "heads must divide"),
    ("--steps 0", "--steps must be between 1 and 1000000000, got 0"),
    ("--steps -1", "must be between 1 and 1000000000, got -1"), ("--lr -1e-4", "--lr must be between 1e-09 and"),
    ("--lr=-1e-4", "--lr must be between 1e-09 and"), ("--unet-mults -1,2", "--unet-mults must be between 1"),
    ("--steps 1001", "steps must be between 1 and 1000"), ("--eta 1.5", "--eta must be between 0 and 1, got 1.5"),
    ("--eta -0.1", "--eta must be between 0 and 1, got -0.1"), ("--eta nan", "--eta must be between"),
    ("--lr inf", "--lr must be between"), ("--order 3", "argument --order: invalid choice: 3"),
    ("--z-dim 1000000000", "out of memory"), ("--variance large", "variance must be small"),
    ("--variance large --eta 1", "variance must be small"),
    ("--variance large --steps 1000", "variance must be small"),
    ("--variance large --timesteps 20 --steps 20 --eta 0.9", "variance must be small"),
    ("--stage vae --variance large", "variance must be small"), ("--stage sample", "no model.pt in r"),
    ("--frobnicate 3", "--frobnicate"), ("--z-dim x", "--z-dim"), ("--z-dim 2.5", "--z-dim"),
    ("--unet-mults 0,1", "--unet-mults"), ("--unet-mults 1,x", "--unet-mults: invalid integers value: '1,x'"),
    ("--timesteps 1", "--timesteps"), ("--schedule cubic", "argument --schedule: invalid choice"),
    ("--variance huge", "argument --variance: invalid choice"), ("--compile off", "unrecognized arguments: off"),
    ("--stage sample --run-dir nowhere", "no model.pt in nowhere"),
    ("--stage eval", "argument --stage: invalid choice"), ("--help --eta 2", "--eta must be between"),
    ("--small 3", "unrecognized arguments: 3"), ("--formulation none --stage vae", "formulation none has no VAE"),
    ("--channels 1", "--channels 3"), ("--channels 2", "argument --channels: invalid choice"),
    ("--gmm-components 101", "--gmm-components 101 exceeds the 100 training images"),
    ("--device cuda:77", "device cuda:77 is not available"), ("--device gpu", "device gpu is not available"),
    pytest.param("--device cuda", "device cuda is not available",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"))))
def test_refusals(capsys, monkeypatch, words, named):
    """Bad input is one sentence and exit code 2; nothing is written, and mostly no data are read."""
    if not re.search("data-dir|channels 1|gmm-components", words):
        monkeypatch.setattr(diffusevae, "load_images", None)
    words = words if "--run-dir" in words else f"--run-dir r {words}"
    assert named in refusal(capsys, command(words)) and not os.listdir()

def test_a_file_in_place_of_the_run_folder(capsys):
    """A file in place of the run folder, or above it, is refused and stays as it is."""
    Path("file").write_text("in the way", encoding="utf-8")
    for run in ("file", "file/r"):
        assert f"could not write {Path(run, 'model.pt')}" in refusal(capsys, command("--run-dir", run)).replace(
            str(Path.cwd()) + os.sep, "")
    assert files(".") == {"file": b"in the way"}

def test_options_of_another_model_are_refused(capsys):
    """Options that conflict with the saved run are all listed, by name, and no byte changes."""
    assert command("--run-dir r") == 0
    before = files("r")
    message = refusal(capsys, command("--run-dir r --formulation 2 --dataset mnist --gmm-components 5", z_dim=3))
    assert "options conflict with the saved run: r has " in message and "--formulation 1, not 2" in message
    assert "--dataset shapes, not mnist" in message and "--z-dim 2, not 3" in message and "--heads" not in message
    assert "--gmm-components 3, not 5" in message and files("r") == before

def test_small_networks(capsys, monkeypatch):
    """--small changes the preset of a run, which remembers it; a later command that says otherwise is refused."""
    monkeypatch.setattr(diffusevae, "load_images", lambda *args: (torch.zeros(60, 3, 8, 8, dtype=torch.uint8), None))
    words = {"on": "--small", "off": "--no-small --attention none"}
    for run, other in (("on", "off"), ("off", "on")):
        assert command("--dataset cifar10 --run-dir", run, words[run], ddpm_steps=2) == 0
        before = files(run)
        assert command("--run-dir", run, ddpm_steps=2) == 0 and files(run)["model.pt"] == before["model.pt"]
        c = DiffuseVAE.load(run, "cpu").config
        assert (c.small, c.predict, c.schedule) == ((True, "v", "cosine")
                                                    if run == "on" else (False, "eps", "linear"))
        message = refusal(capsys, command("--run-dir", run, words[other].split()[0], ddpm_steps=9))
        assert f"{run} has --small {c.small}, not {not c.small}; " in message
        assert files(run)["model.pt"] == before["model.pt"]
    assert command("--dataset cifar10 --small", ddpm_steps=2) == 0    # in a folder of its own
    assert [path.name for path in Path("runs").iterdir()] == ["cifar10-small"]

FOLDER = "--dataset folder --attention none --stage vae --data-dir"

def test_moved_folders_of_images(capsys):
    """Folders of one name have runs of their own; a run whose folder moved continues with the new --data-dir."""
    photos("a/cats"), photos("b/cats", 40)
    for folder in ("a/cats", "b/cats", "b/../a/cats"):
        assert command(FOLDER, folder) == 0
    runs = sorted(Path("runs").iterdir())
    assert len(runs) == 2 and all(re.fullmatch("folder-cats-[0-9a-f]{8}", run.name) for run in runs)
    run = Config.preset("folder", data_dir="a/cats").run_dir
    shutil.move("a/cats", "a/lions")
    assert "a/cats is not a folder" in refusal(capsys, command("--stage ddpm --run-dir", run)).replace(os.sep, "/")
    assert command(FOLDER, "a/lions --run-dir", run, "--stage ddpm") == 0
    assert re.search(r"reading training images in \S+lions: \d+", capsys.readouterr().out)
    assert diffusevae.load_run(run)[0].config.data_dir == str(Path("a/lions").resolve())

def test_home_is_expanded(capsys, monkeypatch):
    """~ is the home folder in --data-dir and --run-dir; a run in the folder of the images is refused."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path("home").resolve()))
    photos("home/cats")
    assert command(FOLDER, "~/cats --run-dir ~/r") == 0
    assert Path("home/r/model.pt").exists() and sorted(os.listdir()) == ["home"]
    assert diffusevae.load_run("home/r")[0].config.data_dir == str(Path("home/cats").resolve())
    assert reopen("~/r", "--stage vae") == command(FOLDER, "~/cats --run-dir data") == 0
    assert command("--dataset folder --run-dir data --stage vae") == 0    # "data" is also the default of --data-dir
    for same in ("~/cats", "home/cats", "home/r/../cats"):
        assert "--run-dir must differ from --data-dir" in refusal(capsys, command(FOLDER, "~/cats --run-dir", same))
    assert len(files("home/cats")) == 30

@pytest.mark.parametrize("data, images", (("r/samples", "r/samples"), (".", "r/samples"), ("p", "r/vae_samples")))
def test_samples_replace_nothing_else(capsys, data, images):
    """A run does not begin where its samples would replace a user's images, or those of another model."""
    photos("p"), photos(images)
    before = files("r")
    message = refusal(capsys, command(FOLDER, data, "--run-dir r --save-images"))
    assert "r has samples but no model.pt" in message and files("r") == before

def test_random_command_lines(capsys):
    """Random options, good and bad, run to the end or give one sentence; weights are finite, files are whole."""
    rng = np.random.default_rng(5)
    values = dict(image_size="8 12 16 7 x", z_dim="1 3 0", unet_mults="1 1,2 2,3 0 1,,2", res_blocks="1 2 0",
                  attention="none 8 4 3 auto", formulation="1 2 none 3", vae_batch="1 9 0",
                  heads="1 2 3 0", dropout="0 0.9 1", timesteps="2 5 40 1", schedule="linear cosine geometric sine",
                  predict="eps v x", lr="1e-9 1 1000 0 nan", vae_lr="1e-9 1000 -1", ema="0 0.999 1",
                  seed="0 4294967295 -1", warmup="0 1000000 -1", grad_clip="0 1e-3 -1",
                  precision="auto fp32 bf16 fp16", steps="1 2 40 0", eta="0 0.5 1 2", order="1 2 3",
                  spacing="uniform quad trailing log", variance="small large huge", prior="normal gmm flat",
                  gmm_components="1 5 0", num_samples="1 5 0", sample_batch="1 65536 0", stage="all vae ddpm fit",
                  save_every="1 1000 0", log_every="1 1000 0", channels="1 3 2", kl_weight="0 1 -1")
    codes = collections.Counter()
    for i in range(40):
        given = {k: rng.choice(values[k].split()) for k in rng.choice(list(values), 3, replace=False)}
        flags = rng.choice(["--z-cond", "--no-hflip", "--save-images", "--compile", "--small"], 2, replace=False)
        capsys.readouterr()
        code = command(f"--run-dir r{i}", *flags, **{"timesteps": 20, **given})
        codes[code] += 1
        if code:
            refusal(capsys, code)
        for path in Path(f"r{i}").glob("*.pt"):
            leaves = flat(torch.load(path, weights_only=True)).values()
            assert all(v.isfinite().all() for v in leaves if torch.is_tensor(v)), given
        assert not list(Path(f"r{i}").rglob("*.tmp"))
    assert min(codes[0], codes[2]) > 8 and set(codes) == {0, 2}

@pytest.mark.parametrize("error, bug", (
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), False), (RuntimeError("can't allocate memory"), False),
    (RuntimeError("Invalid buffer size: 19.45 GB"), False), (MemoryError(), False), (RuntimeError("a bug"), True),
    (TypeError("of memory: a bug"), True)))    # the third is of MPS
def test_lack_of_memory_is_one_sentence(capsys, monkeypatch, error, bug):
    """Out of memory on CUDA, the CPU or MPS, the options to lower are named; other errors are not hidden."""
    assert command("--run-dir r") == 0
    before = Path("r/model.pt").read_bytes()
    def fail(self, x, unet=None):
        raise error
    with monkeypatch.context() as m:
        m.setattr(DiffuseVAE, "loss", fail)
        with pytest.raises(type(error), match="a bug") if bug else contextlib.nullcontext():
            message = refusal(capsys, command("--run-dir r", ddpm_steps=9))
            assert "out of memory; lower --batch-size, --vae-batch or --sample-batch" in message
    assert Path("r/model.pt").read_bytes() == before and command("--run-dir r", ddpm_steps=9) == 0

def test_an_unknown_home_is_a_plain_name():
    """Where ~nosuch is nobody's home folder, it is a name like any other."""
    assert command("--run-dir ~nosuch/r --stage vae") == 0 and Path("~nosuch/r/model.pt").exists()

@pytest.mark.parametrize("formulation", ("1", "none"))
def test_a_finished_run_needs_no_data(capsys, monkeypatch, formulation):
    """When training is complete, the same command samples although the images are gone."""
    words = f"--run-dir r --formulation {formulation}"
    assert command(words) == 0
    def gone(config, split):
        raise ValueError("the images are gone")
    monkeypatch.setattr(diffusevae, "load_images", gone)
    capsys.readouterr()
    assert command(words) == 0 and "is complete" in capsys.readouterr().out

def test_help_speaks_to_people(capsys):
    """--help has a usage of one line, and each option in its group with the default of that command."""
    pages = {}
    for words in ("", "--dataset cifar10", "--dataset cifar10 --small --lr 0.5", "--dataset folder --image-size 128"):
        assert command(words, "--help", **dict.fromkeys(TINY)) == 0
        page = capsys.readouterr().out
        usage = "usage: python diffusevae.py [--help] [--dataset NAME] [--OPTION VALUE ...]\n\n"
        assert page.startswith(usage + "DiffuseVAE in one file")
        titles = [c.__name__ for c in (diffusevae.RunOptions, diffusevae.ModelOptions, diffusevae.TrainingOptions)]
        places = [page.index(f"\n{title}:\n") for title in titles]
        assert places == sorted(places)
        options = page[places[0]:]
        assert not re.search(r"\b(tuple|str|int|float)\b", options)
        # from each option to the next or to a title: one line, however wide the terminal
        parts = [" ".join(part.split()) for part in re.split(r"^(?=  --)|\n\n", options, flags=re.M)]
        pages[words] = {part.split()[0].rstrip(","): part for part in parts if part.startswith("--")}
        for f in dataclasses.fields(Config):
            part = pages[words][diffusevae.flag(f.name)].replace("- ", "-")    # lines also end at hyphens
            assert re.fullmatch(r"--.+ \(default: [^()]+\)", part) and f.metadata["help"] in part, f.name
            choices = ",".join(map(str, f.metadata["choices"] or ()))
            assert not choices or f"{{{choices}}}" in part, f.name
    default = lambda words, option: re.search(r"\(default: (.+)\)$", pages[words][option])[1]
    cifar, small, large = list(pages)[1:]
    assert [default("", name) for name in ("--unet-mults", "--attention", "--order")] == ["1,2", "none", "1"]
    assert [default(cifar, name) for name in ("--unet-mults", "--attention", "--order")] == ["1,2,2,2", "16", "2"]
    assert default(large, "--unet-mults") == "1,2,2,3,4"
    assert [default(small, name) for name in ("--unet-mults", "--attention", "--lr")] == ["1,2,2", "none", "0.5"]
    assert default(small, "--small") == "True" and default(cifar, "--small") == "False"
    assert default(small, "--spacing") == "quad" and default(small, "--run-dir") == "runs/cifar10-small"

def test_help_without_docstrings(capsys, monkeypatch):
    """--help works as under python -OO, which removes all docstrings."""
    code = compile(Path(diffusevae.__file__).read_text(encoding="utf-8"), diffusevae.__file__, "exec", optimize=2)
    monkeypatch.setattr(sys, "argv", ["diffusevae.py", "--help"])
    with pytest.raises(SystemExit) as end:
        exec(code, {"__name__": "__main__", "__file__": diffusevae.__file__})
    assert end.value.code == 0 and "--run-dir" in capsys.readouterr().out

def test_lines_on_a_terminal(capsys, monkeypatch):
    """On a terminal each line overwrites a transient one before it; in a pipe the same lines follow each other."""
    words = "--log-every 1 --sample-batch 2 --run-dir"
    text = on_terminal(monkeypatch, lambda: command(words, "a"))
    assert command(words, "b") == 0
    piped = capsys.readouterr().out
    assert "\r" not in piped and piped.endswith("\n") and text.startswith("\r")
    lines = text.split("\r")[1:]
    neutral = lambda line: re.sub(r"[\d.]+ (steps/s|min)|\b[ab]\b", "", line).rstrip()    # speed, time, run folder
    assert [neutral(line) for line in lines] == [neutral(line) for line in piped.splitlines()]
    for line in lines:
        transient = re.match(r"(vae|ddpm) [123]/4 |sampled \d of", line)
        assert len(line.rstrip("\n")) >= 79 and line.count("\n") == line.endswith("\n") == (not transient), line
    assert sum(not line.endswith("\n") for line in lines) == 8 and lines[-1].endswith("\n")

def test_an_error_on_a_terminal_has_a_line_of_its_own(capsys, monkeypatch):
    """An error is printed to standard error, below the transient line that it follows."""
    def full(model, state):
        if state["steps"]["vae"] == 2:
            raise OSError("could not write r/model.pt")
    monkeypatch.setattr(diffusevae, "save_checkpoint", full)
    codes = []
    words = "--run-dir r --log-every 1 --save-every 2"
    text = on_terminal(monkeypatch, lambda: codes.append(command(words)))
    last = [line for line in text.splitlines() if line.strip()][-1]
    assert codes == [2] and text.endswith("\n") and last.lstrip("\r").startswith("vae 2/4")

def slow_clock(monkeypatch):
    """A clock that advances by a minute whenever it is read; returns the list that holds its time."""
    now = [0.0]
    monkeypatch.setattr(diffusevae, "time", types.SimpleNamespace(
        perf_counter=lambda: now.append(now.pop() + 60) or now[0]))
    return now

def test_time_left(capsys, monkeypatch):
    """The time left is that of the steps or images left, without pictures, checkpoints and compilation."""
    now, save = slow_clock(monkeypatch), diffusevae.save_checkpoint
    later = lambda *args: now.append(now.pop() + 10**6)
    as_on_cuda(monkeypatch, lambda function, **options: later() or function)
    monkeypatch.setattr(diffusevae, "draw_progress", later)
    monkeypatch.setattr(diffusevae, "save_checkpoint", lambda *args: later() or save(*args))
    words = "--run-dir r --stage vae --log-every 1 --save-every 1 --compile --precision fp32"
    assert command(words) == 0
    out = capsys.readouterr().out
    found = re.findall(r"^vae (\d/4)  loss \d+\.\d{4}  0.0 steps/s  (\d\.\d) min left$", out, re.M)
    assert found == [("1/4", "3.0"), ("2/4", "2.0"), ("3/4", "1.0"), ("4/4", "0.0")] and "compiling" in out
    assert command("--run-dir s --save-images --num-samples 7 --sample-batch 2") == 0    # a minute a batch
    found = re.findall(r"^sampled (\d) of 7 images  (\d\.\d) min left$", capsys.readouterr().out, re.M)
    assert found == [("2", "2.5"), ("4", "1.5"), ("6", "0.5"), ("7", "0.0")]

@pytest.mark.parametrize("words", ("", "--stage ddpm", "--stage vae", "--formulation none"))
def test_what_a_run_says(capsys, words):
    """A run starts with its data, its formulation and its folder, and says nothing of what it does not have."""
    assert command("--run-dir r", words) == 0
    out = capsys.readouterr().out
    assert re.match(r"shapes: 100 images of 8x8 pixels, formulation (1|none), cpu; .* go to r\n", out)
    stages = [stage for stage in STAGES if f"{stage} 4/4  loss" in out]
    assert stages == {"--stage vae": ["vae"], "--formulation none": ["ddpm"]}.get(words, ["vae", "ddpm"])
    assert ("sampled 4" in out) == ("stage" not in words)
    assert words != "--formulation none" or "VAE" not in out and "refined" not in out

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_and_error_are_lost_together():
    """With both streams in a closed pipe or on a full disk, the program trains and samples to its end."""
    photos("photos")
    words = [sys.executable, diffusevae.__file__, *in_words(
        {**TINY, "log_every": 1, "dataset": "folder", "data_dir": "photos", "attention": "none", "run_dir": "r"})]
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    first = program.stdout.readline()
    program.stdout.close()    # like `| head -1`
    assert program.wait() == 0 and first.startswith("reading")
    assert torch.load("r/model.pt", weights_only=True)["steps"] == dict(vae=4, ddpm=4)
    os.remove("r/samples.png")
    with open("/dev/full", "w", encoding="utf-8") as full:
        assert subprocess.run([*words, "--ddpm-steps=6"], stdout=full, stderr=full).returncode == 0
    assert torch.load("r/model.pt", weights_only=True)["steps"]["ddpm"] == 6 and Path("r/samples.png").exists()

@pytest.mark.parametrize("lost", (None, BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")))
def test_standard_output_that_is_lost(capsys, monkeypatch, lost):
    """When standard output is closed, or fails to take a line, training and sampling continue in silence."""
    assert command("--run-dir clean") == 0
    capsys.readouterr()
    def write(text):
        raise lost
    stream = types.SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: False)
    monkeypatch.setattr(sys, "stdout", stream if lost else None)
    assert command("--run-dir r") == 0 and alike("r", "clean") and Path("r/latents.png").exists()
    assert not capsys.readouterr().err

def test_an_unknown_backend_of_matplotlib():
    """Where matplotlib cannot even be imported, each picture is one line of warning, and the run ends well."""
    photos("photos")
    words = in_words({**TINY, "dataset": "folder", "data_dir": "photos", "attention": "none", "run_dir": "r"})
    done = subprocess.run([sys.executable, diffusevae.__file__, *words], env={**os.environ, "MPLBACKEND": "TkAggg"},
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and not done.stderr
    assert len(complaints(done.stdout)) == done.stdout.count("TkAggg") == 5    # a single test image: no latents.png
    assert set(files("r")) == {"model.pt", "config.json", "log.csv"}

FORKS = """
import os, signal, sys, matplotlib.figure, torch, torch._dynamo, torchvision, diffusevae as d
torch.set_num_threads(1)
draw, (*words, starts) = d.draw_shapes, sys.argv[1:]
d.draw_shapes = lambda n, size, seed: draw(n // 500 if n > 5000 else n, size, seed)
d.save_figure = lambda path, draw, *args: d.try_to_write(path, d.Path.touch)
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

@lacking("fork and SIGKILL")
def test_killed_runs_end_alike():
    """Killed without warning in both stages and while sampling, a run ends with the files of an undisturbed one."""
    words = ["--save-images", *in_words(
        {**TINY, "vae_steps": 20, "ddpm_steps": 20, "eta": 1, "dropout": 0.1, "save_every": 7, "log_every": 1,
         "num_samples": 50, "sample_batch": 10})]
    starts = ("vae 9/20", "ddpm 1/20", "ddpm 16/20", "sampled 30 of 50 images", "")    # where to kill
    forks = subprocess.run([sys.executable, "-c", FORKS, *words, "--run-dir=r", ",".join(starts)], text=True,
                           env={**os.environ, "PYTHONPATH": str(HOME)}, stdout=subprocess.PIPE)
    assert forks.stdout.split() == ["9"] * 4 + ["0"]    # killed by signal 9, and done
    assert diffusevae.main([*words, "--run-dir=clean"]) == 0 and alike("r", "clean")
    one, two = ([row[:-1] for row in csv.reader(open(f"{r}/log.csv"))] for r in ("r", "clean"))
    assert one == two and len(one) == 41
    assert files("r/samples") == files("clean/samples") and len(files("r/samples")) == 50
    assert files("r/vae_samples") == files("clean/vae_samples")

# ---- 11 README, notebook and scripts -----------------------------------------------------------------
@pytest.mark.parametrize("names, use", (("VAE", "VAE(8, 3, 4, 4).loss(x)[0]"),
    ("UNet ResBlock Attention zero_module GroupNorm Upsample keep_dtype timestep_embedding",
     "UNet(8, 3, 3, 8, (1, 2), 1, heads=1)(x, torch.zeros(2), x)"),
    ("GaussianDiffusion timesteps_for randn", "GaussianDiffusion(20).sample(lambda x, t: x, x, 3, eta=1.0)"),
    ("GaussianMixture k_means randn", "GaussianMixture(2, 3).fit(torch.randn(50, 3)).sample(5)")))
def test_pieces_work_pasted_alone(names, use):
    """A class and its small helpers run in an empty file with the imports of part one."""
    pieces = "\n\n".join(inspect.getsource(getattr(diffusevae, name)) for name in names.split())
    source = Path(diffusevae.__file__).read_text(encoding="utf-8")
    head = "\n".join(re.findall(r"^(?:import|from) .*", source.split("# Part one")[0], re.M))
    space = {}
    exec(f"{head}\n{pieces}\nx = torch.zeros(2, 3, 8, 8)\nresult = {use}", space)
    assert space["result"].isfinite().all()

def test_part_one_needs_torch_alone():
    """The first part, run as a file of its own, defines the model and needs only PyTorch."""
    source = Path(diffusevae.__file__).read_text(encoding="utf-8").split("# Part two")[0]
    space = dict(__name__="part_one")
    exec(compile(source.rsplit("# ====", 1)[0], "part_one", "exec"), space)
    names = {"VAE", "UNet", "GaussianDiffusion", "GaussianMixture", "DiffuseVAE", "randn", "generators"}
    assert names <= space.keys()
    x = torch.zeros(2, 3, 8, 8)
    model = space["DiffuseVAE"](tiny())
    assert model.loss(x).isfinite() and model.sample(2, prior="normal").shape == x.shape
    assert model.sample(2, space["generators"](0, "sample", [3, 4]), prior="normal").shape == x.shape
    assert not {"argparse", "np", "Config", "train"} & space.keys()

def test_import_has_no_side_effects():
    """Importing prints nothing, writes nothing, and leaves torchvision and matplotlib for later."""
    code = "import sys, diffusevae; print([m for m in ('torchvision', 'matplotlib', 'PIL') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(HOME), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "[]\n" and not done.stderr and not os.listdir()

def test_discretized_log_prob():
    """Bins of 2 / 255 under torch.distributions' normal, the outermost open, so that the 256 levels sum to 1."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.2), (-0.98, 0.01), (0.9, 0.5)):
        truth = D.Normal(torch.tensor(mean, dtype=torch.float64), std)
        edges = truth.cdf(x[:-1] + 1 / 255)
        p = torch.cat([edges, torch.ones(1)]) - torch.cat([torch.zeros(1), edges])
        got = likelihood.discretized_log_prob(x, torch.full_like(x, mean), std)
        # a difference of numbers near 1 is exact to 1e-16; bins with less mass cannot be told apart
        seen = p > 1e-9
        assert torch.allclose(got[seen], p[seen].log(), atol=1e-6)
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-9)    # 256 bins of at least 1e-12

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
    """Each term of the bound is DDPM's formula in numpy, at the same noise, with and without a shift."""
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
    got = likelihood.bits_per_dim(d, net, x0, shift, seeded(2))
    expected = bound_by_hand(betas, x0.numpy(), calls)
    assert sorted(t for t, *_ in calls) == list(range(T))
    for name, value in expected.items():    # erf in the tails of a bin loses a few digits
        np.testing.assert_allclose(got[name].numpy(), value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(got["total"].numpy(), sum(expected.values()), rtol=1e-6)
    noises = np.concatenate([(y - (b := np.prod(1 - betas[:t + 1]))**0.5 * x0.numpy()) / (1 - b)**0.5
                             for t, y, _ in calls]).ravel()
    # 5 SE
    assert abs(noises.mean()) < 5 / len(noises)**0.5 and abs(noises.var() - 1) < 5 * (2 / len(noises))**0.5

def test_bits_per_dim_bounds_the_truth():
    """For gray levels from a Gaussian, the bound with the best eps exceeds their true -log2 p, but not by much."""
    d, g, n = GaussianDiffusion(1000), seeded(4), 4000
    truth, (m, sd) = D.Normal(0.1, 0.2), (0.1, 0.2)
    x0 = diffusevae.to_float(diffusevae.to_uint8(m + sd * torch.randn(n, 1, generator=g))).double()
    exact = -(truth.cdf(x0 + 1 / 255) - truth.cdf(x0 - 1 / 255)).log2().mean()
    bound = likelihood.bits_per_dim(d, gaussian_eps(d, m, sd**2), x0, generator=g)["total"]
    se = bound.std() / n**0.5
    # E bound >= E -log2 p. The small variance is too narrow at the first few t: its ratio to the true one is 1.9 at
    # t = 0 and 1, 1.4 at t = 2, falling, and costs (r - 1 - ln r) / 2 nats at each: some 0.7 bits in all
    assert exact - 5 * se < bound.mean() < exact + 1

def test_the_bound_adds_the_codes():
    """KL is torch.distributions'; a network that sees x_t - x_hat has the same bound in both formulations."""
    found = []
    for formulation in ("1", "2"):
        torch.manual_seed(0)
        model = perturbed(DiffuseVAE(tiny(formulation=formulation, timesteps=20)), 0.05).double().eval()
        x = diffusevae.to_float(shapes(3)).double()
        def net(x_t, t, x_hat, z, by=float(formulation == "2")):
            return 0.5 * x_t - 0.5 * by * x_hat + 0.1 * x_hat
        model.unet.forward = net
        found.append(likelihood.bits_per_dim_of(model, x, seeded(3)))
    mu, logvar = (v.detach() for v in model.vae.encode(x))
    kl = D.kl_divergence(D.Normal(mu, (logvar / 2).exp()), D.Normal(0 * mu, 1 + 0 * mu)).sum(1)
    assert torch.allclose(found[0]["KL"], kl / math.log(2) / 192, rtol=1e-9)
    for one, two in zip(found[0].values(), found[1].values()):
        assert torch.allclose(one, two, rtol=1e-9)
    assert torch.allclose(found[0]["total"], sum(v for k, v in found[0].items() if k != "total"))

@pytest.mark.parametrize("formulation", ("1", "2", "none"))
def test_bound_of_the_whole_model(formulation):
    """A batch gives each image the bound it has alone, from its own generator, with one call of the U-Net per t."""
    model, calls = perturbed(DiffuseVAE(tiny(formulation=formulation, timesteps=40)), 0.05), []
    x = diffusevae.to_float(shapes(4))
    model.unet.register_forward_hook(lambda m, inputs, out: calls.append(inputs[1][0].item()))
    terms = likelihood.bits_per_dim_of(model, x, each_seeded(0, 1, 2, 3))
    assert sorted(calls) == list(range(40)) and set(terms) == {"KL", "L_T", "L_t", "L_0", "total"}
    assert torch.allclose(terms["total"], sum(v for name, v in terms.items() if name != "total"))
    assert (terms["KL"] > 0).all() if model.vae else (terms["KL"] == 0).all()
    alone = [likelihood.bits_per_dim_of(model, x[i:i + 1], each_seeded(i)) for i in range(4)]
    for name, values in terms.items():    # float32, in batches of another size
        assert values.shape == (4,) and values.isfinite().all()
        assert torch.allclose(values, torch.cat([one[name] for one in alone]), rtol=1e-4), name

def test_likelihood_as_a_program(capsys, monkeypatch):
    """assets/likelihood.py prints each term of a run's bound with its standard error."""
    assert command("--run-dir r --timesteps 20") == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["likelihood.py", "r", "--n", "3"])
    runpy.run_path(likelihood.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["KL", "L_T", "L_t", "L_0", "total"]
    values = [float(re.fullmatch(r"\w+ +(\d+\.\d{3}) ± \d+\.\d{3} bits per dimension", line)[1]) for line in lines]
    assert sum(values[:4]) == pytest.approx(values[4], abs=3e-3)

def test_notebook(tmp_path, monkeypatch):
    """train.ipynb, shortened, runs from top to bottom in a fresh kernel, and leaves no file behind."""
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
    """The stored outputs are one run from top to bottom without errors; texts, cells and the file are short."""
    path = Path(diffusevae.__file__).with_name("train.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert 30 <= len(cells) <= 42 and len(" ".join(text).split()) <= 2100 and path.stat().st_size < 2e6
    shown = [cell for cell in code if not cell["metadata"].get("jupyter", {}).get("source_hidden")]
    # lines, empty ones too
    assert len(shown) >= len(code) - 2 and max(len(cell["source"]) for cell in shown) <= 30
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

def test_the_lesson_agrees_with_the_scripts(monkeypatch):
    """The notebook's bound by hand is that of likelihood.py; its mean over phases is a picture without stripes."""
    cells = json.loads((HOME / "train.ipynb").read_text(encoding="utf-8"))["cells"]
    config = Config.preset("shapes", timesteps=10, device="cpu")
    model, plain = DiffuseVAE(config), DiffuseVAE(dataclasses.replace(config, formulation="none"))
    perturbed(model.unet, 0.05), perturbed(plain.unet, 0.05)
    x, ignore = diffusevae.to_float(diffusevae.draw_shapes(3, 16, 0)[0]), lambda *args, **options: None
    names = dict(vars(diffusevae), diffusevae=diffusevae, config=config, model=model, plain=plain, vae=model.vae,
                 diffusion=model.diffusion, device=torch.device("cpu"), x_test=x, N_BOUND=3, names="abc", show=ignore, beside=ignore)
    for cell in cells[9], cells[22], cells[23]:
        exec("".join(cell["source"]), names)
    g = [torch.Generator().manual_seed(7) for _ in range(2)]
    for got, expected in ((names["model_terms"], likelihood.bits_per_dim_of(model, x, g[0])),
            (names["plain_terms"], likelihood.bits_per_dim(plain.diffusion, plain.denoiser(), x, generator=g[1]))):
        assert expected and all(torch.allclose(got[name], bits, atol=1e-6) for name, bits in expected.items())
    monkeypatch.setattr(torch.Tensor, "sin", lambda x: 0 * x)    # flat stripes
    flat = diffusevae.to_float(diffusevae.paint_shapes(16, *names["six"], torch.zeros(64, 1, 1)))
    assert (names["phase_mean"][:, 0] - flat).abs().max() <= 1 / 127.5    # one gray level: each image is rounded

def test_links_between_the_texts():
    """Each relative link of README, RESULTS and the notebook leads to a file, and each anchor to a heading."""
    home, found = Path(diffusevae.__file__).parent, 0
    cells = json.loads((home / "train.ipynb").read_text(encoding="utf-8"))["cells"]
    book = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    texts = {name: (home / name).read_text(encoding="utf-8") for name in ("README.md", "assets/RESULTS.md")}
    for name, text in {**texts, "train.ipynb": book}.items():
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            path = (home / name).parent / path if path else home / name
            assert path.is_file(), (name, target)
            titles = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines()
                      if line.startswith("#")] if anchor else []
            # GitHub's rule
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, (name, target)
            found += 1
    assert found > 25
