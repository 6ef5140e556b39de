# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5.1", "torchvision", "numpy", "matplotlib"]
# ///
"""DiffuseVAE in one file: a VAE generates a blurry image; a conditional DDPM refines it.

    python diffusevae.py                              # built-in shapes, in minutes on two CPU cores
    python diffusevae.py --dataset cifar10            # close to the paper, for one CUDA GPU
    python diffusevae.py --dataset cifar10 --small    # real photographs on two CPU cores
    python diffusevae.py --stage sample --num-samples 1000 --steps 10 --save-images

Based on "DiffuseVAE: Efficient, Controllable and High-Fidelity Generation from Low-Dimensional
Latents" (Pandey et al., arXiv 2201.00308). Part one implements it; part two makes it a program.

    Part one, the model                               Part two, the program
    1 VAE         image -> code -> blurry image       6 Config    options, presets, helpers
    2 Diffusion   adding and removing noise           7 Data      images as one uint8 tensor
    3 U-Net       the network that denoises           8 Training  two loops, one checkpoint
    4 Mixture     the prior of the latent codes       9 Pictures  grids, curves, PNG files
    5 DiffuseVAE  the four parts combined            10 Main      the command line

Models take and return float images [N, C, S, S] in [-1, 1]; datasets stay uint8 in 0..255 until
they are batched. Latent codes z are [N, z_dim].
"""
import math, zlib
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

# ==================================================================================================
# Part one, the model. It needs only PyTorch (DiffuseVAE.load needs part two). Sections 1 to 4 can
# be copied one at a time; section 4 also needs `randn` from section 2.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# 1 VAE: image -> latent code -> blurry image
# --------------------------------------------------------------------------------------------------
class VAE(nn.Module):
    """A small convolutional beta-VAE (arXiv 1312.6114), for images of one size.

        q(z|x) = N(mu, diag exp(logvar)),    p(z) = N(0, I),    x_hat = decode(z)
        loss = sum over pixels of ((x - x_hat) / 2)^2 + kl_weight * KL(q(z|x) || p(z))

    averaged over the batch. Dividing by 2 gives the error of images in [0, 1], the paper's scale.
    The resolution is halved while it is even and above 4; ValueError if that leaves more than 32.
    For 32x32 images and width 64:

        encode    [3, 32, 32] -> [64, 16, 16] -> [128, 8, 8] -> [256, 4, 4] -> mu, logvar
        decode    z -> [256, 4, 4] -> [128, 8, 8] -> [64, 16, 16] -> [64, 32, 32] -> [3, 32, 32]

    There is no normalization: it would remove the brightness and color that z should encode.
    """

    def __init__(self, image_size, channels=3, z_dim=512, width=64):
        super().__init__()
        size, widths = image_size, []
        while size % 2 == 0 and size > 4:
            size //= 2
            widths.append(width * min(2 ** len(widths), 4))    # 64, 128, 256, 256, ...
        if size > 32:
            raise ValueError(f"repeated halving of image_size {image_size} ends at {size}, an odd "
                             "number above 32; use a multiple of a larger power of 2")
        down, c = [], channels
        for c_out in widths:    # 3 -> 64 -> 128 -> 256 channels
            down += [nn.Conv2d(c, c_out, 4, stride=2, padding=1), nn.SiLU()]
            c = c_out
        features = (c, size, size)    # [256, 4, 4]
        up = []
        for i in reversed(range(len(widths))):    # 256 -> 128 -> 64 -> 64 channels
            c_out = widths[max(i - 1, 0)]
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c_out, 3, padding=1), nn.SiLU()]
            c = c_out
        flat, hidden = math.prod(features), 16 * width
        self.encoder = nn.Sequential(
            *down, nn.Flatten(), nn.Linear(flat, hidden), nn.SiLU(), nn.Linear(hidden, 2 * z_dim))
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, hidden), nn.SiLU(), nn.Linear(hidden, flat), nn.SiLU(),
            nn.Unflatten(1, features), *up, nn.Conv2d(c, channels, 3, padding=1), nn.Tanh())
        for layer in self.modules():    # PyTorch's default leaves some latents unused
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def encode(self, x):
        """Images [B, C, S, S] -> mu and logvar of q(z|x), each [B, z_dim]."""
        mu, logvar = self.encoder(x).to(x.dtype).chunk(2, dim=1)    # fp32 again after autocast
        return mu, logvar.clamp(-20, 20)    # beyond that, exp(logvar) dominates the loss

    def decode(self, z):
        """Codes z [B, z_dim] -> blurry images x_hat [B, C, S, S] in [-1, 1]."""
        return self.decoder(z).to(z.dtype)

    def forward(self, x):
        """Images [B, C, S, S] -> x_hat, mu, logvar; x_hat decodes one z ~ q(z|x) per image."""
        mu, logvar = self.encode(x)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return self.decode(z), mu, logvar

    def loss(self, x, kl_weight=1.0):
        """Images [B, C, S, S] -> total loss, squared error and KL, scalars in nats per image.

        The squared error is -log p(x|z) up to a constant, for images in [0, 1] and a Gaussian
        p(x|z) of variance v = 1/2, since then error^2 / (2 v) = error^2.
        """
        x_hat, mu, logvar = self(x)
        recon = ((x - x_hat) / 2).square().flatten(1).sum(1).mean()
        kl = self.kl(mu, logvar).mean()
        return recon + kl_weight * kl, recon, kl

    def kl(self, mu, logvar):
        """KL(q(z|x) || p(z)) [B] in nats for mu, logvar [B, z_dim] (arXiv 1312.6114, app. B)."""
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)

# --------------------------------------------------------------------------------------------------
# 2 Diffusion: adding noise and removing it, with any network
# --------------------------------------------------------------------------------------------------
def randn(shape, like, generator=None):
    """Standard normal noise of `shape`, with the dtype and device of `like`.

    `generator` is None, a torch.Generator, or a list of shape[0] CPU generators, one per image.
    With a list, an image's noise does not depend on its batch; ValueError if the length is wrong.
    """
    if isinstance(generator, (list, tuple)):
        noise = like.new_empty(shape, device="cpu")
        for row, g in zip(noise, generator, strict=True):
            row.normal_(generator=g)
    else:
        device = generator.device if generator else like.device
        noise = torch.randn(shape, dtype=like.dtype, device=device, generator=generator)
    return noise.to(like.device)

def stream(seed, name, index):
    """A 32-bit seed for one training step or image; a CPU generator uses no more bits."""
    start = zlib.crc32(f"{seed} {name}".encode())
    return (start + index * 0x9E3779B1) % 2**32    # golden ratio: neighbors get distant seeds

def generators(seed, name, indices):
    """A list of CPU generators, one per index; see `randn`."""
    return [torch.Generator().manual_seed(stream(seed, name, i)) for i in indices]

def timesteps_for(T, n, spacing="quad"):
    """Choose n of the timesteps 0..T-1: long [n], increasing. With i = 0..n-1, entry i is

        uniform   i T // n                          "linear" in DDIM (2010.02502, appendix D.2)
        trailing  (i + 1) T // n - 1                ends at T - 1, where x_t is pure noise
        quad      max(i, (i + 1)^2 T // n^2 - 1)    also ends at T - 1; densest at low noise

    DDIM's quadratic spacing stops at 0.8 T, where x_t is not yet pure noise. A single step is
    always [T - 1]. Raises ValueError if n is not in 1..T or the spacing is unknown.
    """
    if not 1 <= n <= T:
        raise ValueError(f"steps must be between 1 and {T}, the number of timesteps; got {n}")
    i = torch.arange(n)
    kept = {"uniform": i * T // n, "trailing": (i + 1) * T // n - 1,
            "quad": torch.maximum(i, (i + 1) ** 2 * T // n**2 - 1)}
    if spacing not in kept:
        raise ValueError(f"spacing must be uniform, trailing or quad, got {spacing!r}")
    return kept[spacing if n > 1 else "trailing"]

class GaussianDiffusion(nn.Module):
    """The diffusion process and its samplers (DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502).

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps + shift,    eps ~ N(0, I)
        a_t = prod_{s <= t} (1 - beta_s)

                  clean image x_0                                  pure noise
        t               -1         0       1      2    ...     T - 2      T - 1
        a_t              1      0.9999     less and less of the image      4e-5    (linear schedule)

    a_t is alpha-bar in DDPM and alpha in DDIM. The papers count t from 1: their t is our t + 1, and
    x_T, pure noise, is x_t at our t = T - 1.

    `shift` is 0 in DiffuseVAE's formulation 1. In formulation 2 it is x_hat, so that x_t ends as
    noise around x_hat. All arithmetic is done on y_t = x_t - shift. The rule: x_t includes the
    shift for every t >= 0, the clean image never does, and `noise` is always standard normal.

    `network` is any callable (x_t [B, ...], t [B] long in 0..T-1) -> prediction [B, ...], of eps
    or of v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (arXiv 2202.00512). Samplers clip the predicted
    x_0 to [-1, 1]; pass clip=False for data with another range.

    Schedules: linear; geometric, beta_t = beta_start^(1-u) beta_end^u with u from 0 to 1; cosine
    (arXiv 2102.09672, equation 17), which ignores both betas. By default the betas run from 1e-4
    to 0.02 (geometric: 0.05) at T = 1000 and scale with 1000 / T.
    Raises ValueError for betas outside (0, 1), for unknown names, and if sqrt(a_{T-1}) > 0.1: x_T
    would then keep too much of the image for sampling to start from pure noise.
    """

    def __init__(self, timesteps=1000, beta_start=None, beta_end=None, schedule="linear",
                 predict="eps"):
        super().__init__()
        T = timesteps
        if beta_start is None:
            beta_start = min(0.999, 1e-4 * 1000 / T)
        if beta_end is None:
            largest = 0.05 if schedule == "geometric" else 0.02
            beta_end = min(0.999, largest * 1000 / T)
        exact = dict(dtype=torch.float64, device="cpu")    # MPS has no float64
        if schedule == "linear":
            beta = torch.linspace(beta_start, beta_end, T, **exact)
        elif schedule == "geometric":
            u = torch.linspace(0, 1, T, **exact)
            beta = beta_start ** (1 - u) * beta_end**u
        elif schedule == "cosine":
            u = torch.arange(T + 1, **exact) / T
            f = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule must be linear, cosine or geometric, got {schedule!r}")
        if not 0 < beta.min() <= beta.max() < 1:
            raise ValueError(f"betas must be between 0 and 1, got {beta_start} to {beta_end}")
        if predict not in ("eps", "v"):
            raise ValueError(f"predict must be eps or v, got {predict!r}")
        self.timesteps, self.predict = T, predict
        self.alpha_bar = (1 - beta).cumprod(0)    # [T], always float64 on the CPU
        signal, std = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        if signal[-1] > 0.1:
            raise ValueError(f"{signal[-1]:.2f} of the image is left at the last timestep (limit "
                             "0.1); use larger betas or more timesteps")
        self.register_buffer("sqrt_alpha_bar", signal.float(), persistent=False)
        self.register_buffer("sqrt_one_minus_alpha_bar", std.float(), persistent=False)

    def coefficients(self, t, shape):
        """sqrt(a_t), sqrt(1 - a_t): floats for an int t, [B, 1, ...] for a tensor t [B]."""
        if isinstance(t, int):
            a_t = self.alpha_bar_at(t)
            return a_t**0.5, (1 - a_t) ** 0.5
        tables = self.sqrt_alpha_bar, self.sqrt_one_minus_alpha_bar
        return [table.gather(0, t).reshape(-1, *[1] * (len(shape) - 1)) for table in tables]

    def alpha_bar_at(self, t):
        """a_t as a float; 1 for t = -1, the clean image."""
        return self.alpha_bar[t].item() if t >= 0 else 1.0

    def q_sample(self, x0, t, noise, shift=0):
        """x_t ~ q(x_t | x_0) [B, ...] from x0, noise [B, ...]; t is [B] or one int."""
        signal, std = self.coefficients(t, x0.shape)
        return signal * x0 + std * noise + shift

    def target(self, x0, t, noise):
        """What the network should output at q_sample(x0, t, noise): eps or v, [B, ...]."""
        if self.predict == "eps":
            return noise
        signal, std = self.coefficients(t, x0.shape)
        return signal * noise - std * x0

    def predict_x0(self, x_t, t, out, shift=0, clip=False):
        """x_0 and eps, both [B, ...], from the network's output at x_t; t is [B] or one int.

        `clip` keeps x_0 in [-1, 1]. eps is consistent with the clipped x_0.
        """
        signal, std = self.coefficients(t, x_t.shape)
        y = x_t - shift
        if self.predict == "eps":
            x0 = (y - std * out) / signal
        else:
            x0 = signal * y - std * out
        if clip:
            x0 = x0.clamp(-1, 1)
        return x0, (y - signal * x0) / std

    def loss(self, network, x0, shift=0):
        """Mean squared error of the network's prediction for images x0 [B, ...], a scalar.

        t is spread evenly over the batch, which steadies the loss (2107.00630, appendix I.1).
        """
        start = torch.rand(1, device=x0.device)
        u = (start + torch.arange(len(x0), device=x0.device) / len(x0)) % 1
        t = (u * self.timesteps).long()    # [B]
        noise = randn(x0.shape, x0)
        out = network(self.q_sample(x0, t, noise, shift), t)
        return F.mse_loss(out, self.target(x0, t, noise))

    def posterior_variance(self, t, s):
        """The variance of q(x_s | x_t, x_0), a float, for ints t > s (2006.11239, equation 7)."""
        a_t, a_s = self.alpha_bar_at(t), self.alpha_bar_at(s)
        return (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)

    def denoise(self, network, x_t, t, shift=0, clip=True):
        """Call the network at x_t [B, ...] and one int t; returns x_0 and eps as `predict_x0`."""
        out = network(x_t, torch.full((len(x_t),), t, device=x_t.device))
        return self.predict_x0(x_t, t, out, shift, clip)

    def step_pairs(self, steps, eta=0.0, spacing="quad", variance="small", order=1):
        """The (t, s) of each sampling step, from noise to image. ValueError for bad options."""
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        if variance != "small" and (variance, eta, steps) != ("large", 1, self.timesteps):
            raise ValueError(f"variance must be small, or large with eta 1 and {self.timesteps} "
                             f"steps; got {variance} with eta {eta} and {steps} steps")
        kept = [-1, *timesteps_for(self.timesteps, steps, spacing).tolist()]
        return list(zip(kept[1:], kept))[::-1]    # 10 quad: (999, 809), ..., (9, -1)

    @torch.no_grad()
    def trajectory(self, network, noise, steps, eta=0.0, spacing="quad", shift=0, clip=True,
                   variance="small", generator=None, order=1):
        """Yield s, x_s and the predicted x_0 after each sampling step, from noise [B, ...].

            y_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) eps + sigma * fresh noise
            sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)    (2010.02502, eqs. 12, 16)

            eta 0                       DDIM: deterministic, any number of steps
            eta 1                       DDPM (ancestral sampling) with the posterior variance
            eta 1, variance "large"     DDPM with fresh noise of variance beta_t; needs all T steps
            eta 0, order 2              DPM-Solver++ 2M (arXiv 2211.01095): between the first step
                                        and the last, x_0 is extrapolated from the two latest
                                        predictions to the middle of the step in log SNR

        The last step adds no noise. With eta > 0 the order is always 1. `generator`: see `randn`.
        Raises ValueError as `step_pairs` does.
        """
        x, x0_before, h_before = noise + shift, None, None
        for t, s in self.step_pairs(steps, eta, spacing, variance, order):
            a_s = self.alpha_bar_at(s)
            x0, eps = self.denoise(network, x, t, shift, clip)
            middle = x0
            if order == 2 and eta == 0 and s >= 0:    # at s = -1, h is infinite
                a_t = self.alpha_bar_at(t)
                h = math.log(a_s / (1 - a_s)) - math.log(a_t / (1 - a_t))    # step in log SNR
                if x0_before is not None:
                    middle = x0 + h / (2 * h_before) * (x0 - x0_before)
                    eps = (x - shift - a_t**0.5 * middle) / (1 - a_t) ** 0.5
                x0_before, h_before = x0, h
            sigma = eta * self.posterior_variance(t, s) ** 0.5
            x = a_s**0.5 * middle + max(0.0, 1 - a_s - sigma**2) ** 0.5 * eps    # max: rounding
            if s >= 0:    # the clean image has no shift and no noise
                x = x + shift
                if variance == "large":    # in the fresh noise only, not in the mean
                    sigma = (1 - self.alpha_bar_at(t) / a_s) ** 0.5
                if sigma > 0:
                    x = x + sigma * randn(x.shape, x, generator)
            yield s, x, x0

    def sample(self, network, noise, steps, **options):
        """Noise [B, ...] -> clean x_0 [B, ...], the end of `trajectory`, with the same options."""
        for _, x, _ in self.trajectory(network, noise, steps, **options):
            pass
        return x

    @torch.no_grad()
    def invert(self, network, x0, steps, spacing="quad", shift=0, clip=True, iterations=5):
        """Find noise [B, ...] that DDIM (order 1), with the same options, maps back to x0 [B, ...].

        Reversing a DDIM step is implicit: y_s = sqrt(a_s) x_0 + sqrt(1 - a_s) eps is known, but
        the network predicts x_0 and eps from the unknown y_t. Start with y_t = y_s. In each
        iteration, keep the prediction with less weight in y_t, solve for the other, and update
        y_t. This calls the network steps * iterations times; use more iterations with fewer
        steps. Raises ValueError as `step_pairs` does.
        """
        y = x0
        for t, s in reversed(self.step_pairs(steps, spacing=spacing)):
            y_s = y
            signal_t, std_t = self.coefficients(t, y.shape)
            signal_s, std_s = self.coefficients(s, y.shape)    # 1 and 0 for s = -1
            for _ in range(iterations):
                pred_x0, eps = self.denoise(network, y + shift, t, shift, clip)
                if signal_t > std_t or s < 0:    # y_t depends less on eps; std_s = 0 at s = -1
                    pred_x0 = (y_s - std_s * eps) / signal_s
                else:
                    eps = (y_s - signal_s * pred_x0) / std_s
                y = signal_t * pred_x0 + std_t * eps
        return y

# --------------------------------------------------------------------------------------------------
# 3 U-Net: the network that denoises
# --------------------------------------------------------------------------------------------------
class UNet(nn.Module):
    """DDPM's U-Net (arXiv 2006.11239, appendix B), with x_hat as extra input channels.

    As in arXiv 2102.09672, the embedding scales and shifts each block; attention is multi-head.

    For 32x32 images, width 128, mults (1, 2, 2, 2), two residual blocks and attention at 16:

        feature maps   way down           middle                   way up
        [128, 32, 32]  conv, 2 blocks                              double, 3 blocks, conv
        [256, 16, 16]  halve, 2 blocks*                            double, 3 blocks*
        [256, 8, 8]    halve, 2 blocks                             double, 3 blocks
        [256, 4, 4]    halve, 2 blocks    block*, block            3 blocks         (* attends)

    Every map on the way down is also an input of one block on the way up (a skip connection).
    `attention` lists resolutions: 16 means the 16x16 maps. The middle always attends, unless heads
    is 0. With z_dim > 0 the code z is added to the timestep embedding.
    Raises ValueError if image_size cannot be halved often enough, if an attention resolution does
    not occur, or if heads does not divide the number of channels.
    """

    def __init__(self, image_size, channels=3, cond_channels=0, width=128, mults=(1, 2, 2, 2),
                 res_blocks=2, attention=(), heads=8, dropout=0.0, z_dim=0):
        super().__init__()
        sizes = [image_size // 2**i for i in range(len(mults))]    # 32, 16, 8, 4
        factor = 2 ** (len(mults) - 1)
        if image_size % factor:
            raise ValueError(f"image_size {image_size} must be divisible by {factor}, since "
                             f"unet_mults has {len(mults)} entries")
        for size in set(attention) - set(sizes):
            raise ValueError(f"no {size}x{size} feature maps for attention; choose from {sizes}")
        self.width, self.cond_channels = width, cond_channels
        emb = 4 * width    # size of the embedding of t (and z) that every block receives
        self.embed_t = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_z = nn.Linear(z_dim, emb) if z_dim else None
        self.first = nn.Conv2d(channels + cond_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()    # one entry per resolution

        c, skips = width, []    # channels of the current map, and of the maps kept for the way up
        levels = [(mult * width, heads * (size in attention)) for mult, size in zip(mults, sizes)]
        for i, (c_out, level_heads) in enumerate(levels):
            downsample, blocks = nn.Identity(), nn.ModuleList()
            if i > 0:
                downsample = nn.Conv2d(c, c, 3, stride=2, padding=1)
            skips.append(c)
            for _ in range(res_blocks):
                blocks.append(ResBlock(c, c_out, emb, dropout, level_heads))
                c = c_out
                skips.append(c)
            self.down.append(nn.ModuleList([downsample, blocks]))
        self.middle = nn.ModuleList(
            [ResBlock(c, c, emb, dropout, heads), ResBlock(c, c, emb, dropout)])
        for i, (c_out, level_heads) in enumerate(reversed(levels)):
            upsample, blocks = nn.Identity(), nn.ModuleList()
            if i > 0:
                upsample = nn.Sequential(Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))
            for _ in range(res_blocks + 1):
                blocks.append(ResBlock(c + skips.pop(), c_out, emb, dropout, level_heads))
                c = c_out
            self.up.append(nn.ModuleList([upsample, blocks]))
        self.last = nn.Sequential(
            GroupNorm(c), nn.SiLU(), zero_module(nn.Conv2d(c, channels, 3, padding=1)))

    def forward(self, x_t, t, x_hat=None, z=None):
        """x_t [B, C, S, S], t [B], x_hat [B, cond_channels, S, S], z [B, z_dim] -> like x_t."""
        if (x_hat is None) != (self.cond_channels == 0) or (z is None) != (self.embed_z is None):
            raise ValueError("pass x_hat exactly when cond_channels > 0, and z when z_dim > 0")
        emb = self.embed_t(timestep_embedding(t, self.width).to(x_t.dtype))
        if z is not None:
            emb = emb + self.embed_z(z)
        emb = F.silu(emb)    # [B, 4 width]
        h = x_t if x_hat is None else torch.cat([x_t, x_hat], dim=1)
        h = self.first(h)    # [B, C + cond_channels, S, S] -> [B, width, S, S]
        skips = []
        for downsample, blocks in self.down:
            h = downsample(h)    # [B, c, S, S] -> [B, c, S / 2, S / 2], except at the first level
            skips.append(h)
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for upsample, blocks in self.up:
            h = upsample(h)    # [B, c, S / 2, S / 2] -> [B, c, S, S], except at the lowest level
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.last(h).to(x_t.dtype)    # fp32 again after autocast

class ResBlock(nn.Module):
    """A residual block modulated by the embedding, followed by attention if heads > 0.

    x [B, c_in, H, W], emb [B, emb] -> [B, c_out, H, W].
    """

    def __init__(self, c_in, c_out, emb, dropout, heads=0):
        super().__init__()
        self.first = nn.Sequential(GroupNorm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.norm, self.scale_shift = GroupNorm(c_out), nn.Linear(emb, 2 * c_out)
        self.second = nn.Sequential(
            nn.SiLU(), nn.Dropout(dropout), zero_module(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, heads) if heads else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)    # [B, c_out, 1, 1]
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.attention(self.skip(x) + self.second(h))

class Attention(nn.Module):
    """Self-attention among the positions of a feature map [B, C, H, W], with a residual."""

    def __init__(self, channels, heads):
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads must divide the {channels} attention channels, got {heads}")
        self.heads, self.norm = heads, GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        qkv = qkv.permute(1, 0, 2, 4, 3).contiguous()    # fused kernels need this layout
        q, k, v = qkv    # each [B, heads, H * W, C / heads]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))

def timestep_embedding(t, dim):
    """Sinusoidal embedding of timesteps t [B] -> [B, dim] (arXiv 1706.03762, section 3.5)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * (torch.arange(half, device=t.device) / half))
    angles = t[:, None] * frequencies    # [B, dim // 2]
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(waves, (0, dim % 2))

class GroupNorm(nn.GroupNorm):
    """GroupNorm that keeps the dtype and the memory format of its input."""

    def __init__(self, channels):    # 32 groups for 128 channels, 4 for 48, 1 for 6
        super().__init__(max(1, math.gcd(channels, 128) // 4), channels)

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = keep_dtype(lambda x: F.group_norm(x, self.num_groups, weight, bias, self.eps), x)
        if x.is_contiguous(memory_format=torch.channels_last):    # CUDA kernels return NCHW
            y = y.contiguous(memory_format=torch.channels_last)
        return y

class Upsample(nn.Upsample):
    """Nearest-neighbor upsampling that keeps the dtype of its input."""

    def forward(self, x):
        return keep_dtype(super().forward, x)

def keep_dtype(layer, x):
    """layer(x), computed in the dtype of x, where autocast on CUDA would use fp32."""
    if x.dtype == torch.float32:
        return layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x)

def zero_module(module):
    """Zero all parameters, so that a branch ending in `module` outputs zero at first."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module

# --------------------------------------------------------------------------------------------------
# 4 Mixture: a density fitted to the latent codes, the prior to sample from
# --------------------------------------------------------------------------------------------------
def k_means(z, k, generator=None):
    """Points z [N, D] -> one-hot assignments [N, k]: greedy k-means++, then 20 rounds."""
    centers = z[:0]    # [number found so far, D]
    gap = torch.full_like(z[:, 0], 1e30)    # squared distance to the nearest center, [N]
    for _ in range(k):    # sample ten points in proportion to gap; keep the best
        chosen = torch.multinomial(gap.cpu() + 1e-12, 10, replacement=True, generator=generator)
        candidates = z[chosen.to(z.device)]    # [10, D]
        gaps = torch.minimum(gap, torch.cdist(candidates, z).square())    # [10, N]
        best = gaps.sum(1).argmin()
        gap = gaps[best]
        centers = torch.cat([centers, candidates[best][None]])
    for _ in range(20):
        assignment = F.one_hot(torch.cdist(z, centers).argmin(1), k).to(z)    # [N, k]
        count = assignment.sum(0)[:, None]
        centers = torch.where(count > 0, assignment.T @ z / count, centers)
    return assignment

class GaussianMixture(nn.Module):
    """Gaussians with full covariance, fitted by EM: ex-post density estimation (arXiv 1903.12436).

    The codes of real images are not distributed as N(0, I). Samples from N(0, I) may fall where no
    image is encoded; samples from the mixture rarely do. Buffers: weights [K], means [K, D],
    scale_tril [K, D, D] (Cholesky factors of the covariances), and `fitted`. One floor for all
    variances: columns of z should have similar scales, as latent codes do.
    """

    def __init__(self, components, dim):
        super().__init__()
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("weights", torch.zeros(components))
        self.register_buffer("means", torch.zeros(components, dim))
        self.register_buffer("scale_tril", torch.zeros(components, dim, dim))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.means.device.type == "mps":    # lacks some linear algebra: stay on the CPU
            super()._apply(torch.Tensor.cpu, recurse)
        return self

    @torch.no_grad()
    def fit(self, z, iterations=100, tolerance=6.25e-5, generator=None):
        """Fit to points z [N, D] by EM, starting from k-means; returns self.

        Stops when an iteration raises the mean log-likelihood by less than `tolerance` nats per
        dimension of z. `history` lists the mean log-likelihood, in nats per point, after each
        iteration. Covariances are computed in fp64. Raises ValueError for fewer points than
        components, a wrong D, and values that are not finite.
        """
        z = z.to(self.means)
        (N, D), (K, dim) = z.shape, self.means.shape
        if D != dim:
            raise ValueError(f"z must be [N, {dim}], got [{N}, {D}]")
        finite = int(z.isfinite().all(1).sum())
        if N < K or finite < N:
            raise ValueError(f"{K} gmm_components need at least {K} points, all finite; got {N}, "
                             f"{finite} of them finite")
        floor = (1e-6 * z.var(0, unbiased=False).mean() + 1e-9) * torch.eye(D).to(z)
        responsibilities = k_means(z, K, generator)    # p(component | point), [N, K]
        self.history, previous = [], -math.inf
        for _ in range(iterations):
            mass = responsibilities.sum(0) + 1e-9
            self.weights = mass / mass.sum()
            self.means = responsibilities.T @ z / mass[:, None]
            covariances = []
            for r, mean, total in zip(responsibilities.T, self.means, mass):
                near = r > 1e-12    # skip points with negligible responsibility
                y = ((z[near] - mean) * r[near, None].sqrt()).double()    # fp32 may fail
                covariances.append(y.T @ y / total + floor)
            self.scale_tril = torch.linalg.cholesky(torch.stack(covariances)).to(z)
            joint = self.joint_log_prob(z)
            likelihood = joint.logsumexp(1).mean().item()
            self.history.append(likelihood)
            if likelihood < previous + tolerance * D:
                break
            previous = likelihood
            responsibilities = joint.softmax(1)
        self.scale_tril = self.scale_tril.contiguous()    # row-major, as after loading
        self.fitted.fill_(True)
        return self

    def joint_log_prob(self, z):
        """log(weight * density) of each component at points z [N, D] -> [N, K], in nats.

        Its logsumexp over the components is the log-density of the mixture.
        """
        columns = []
        for weight, mean, L in zip(self.weights, self.means, self.scale_tril):
            white = torch.linalg.solve_triangular(L, (z - mean).T, upper=False)    # [D, N]
            log_det = L.diagonal().log().sum()
            columns.append(weight.log() - log_det - 0.5 * white.square().sum(0))
        return torch.stack(columns, dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)

    def sample(self, n, generator=None):
        """Sample n points [n, D]; see `randn` for `generator`.

        Each point depends only on its own row of noise. ValueError if the mixture is not fitted.
        """
        if not self.fitted:
            raise ValueError("the mixture is not fitted; call fit_prior, or use prior='normal'")
        noise = randn((n, 1 + self.means.shape[1]), self.means, generator)
        u = torch.special.ndtr(noise[:, 0])    # uniform in [0, 1]
        component = torch.searchsorted(self.weights.cumsum(0), u).clamp(max=len(self.means) - 1)
        z = self.means[component]
        for i, k in enumerate(component.tolist()):    # scale_tril[component] may not fit in memory
            z[i] += self.scale_tril[k] @ noise[i, 1:]
        return z

# --------------------------------------------------------------------------------------------------
# 5 DiffuseVAE: a prior p(z), a VAE that decodes z to x_hat, and a DDPM that refines x_hat
# --------------------------------------------------------------------------------------------------
SAMPLING = ("steps", "eta", "order", "spacing", "variance", "prior", "precision")

def half_precision(precision, device):
    """The dtype of autocast, or None for fp32; "auto": bf16 (old GPUs: fp16) on CUDA only."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

def autocast(precision, device):
    """A context for running networks in half precision, if asked for."""
    dtype = half_precision(precision, device)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()

class DiffuseVAE(nn.Module):
    """VAE, diffusion, U-Net and mixture prior together (DiffuseVAE, section 3).

        train      vae.loss(x), mixture.fit(codes), then loss(x)
        generate   sample(n), decode(z), refine(x_hat)
        analyze    encode(x), invert(x)

    Why training in two stages is sound: log p(x) >= E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z)), the
    ELBO. In stage 1, p(x|z) is the decoder's Gaussian. Stage 2 replaces it with a DDPM conditioned
    on x_hat = decode(z); the DDPM's own lower bound on log p(x|z) takes the place of that term, so
    the inequality still holds. Training uses a reweighted form of that bound (DDPM, section 3.4).

    `config` is a Config, or another dataclass with its fields. Images and noise are [N, C, S, S],
    images in [-1, 1], codes z [N, z_dim]. Pass standard normal noise; in formulation 2 the model
    adds x_hat. Formulation "none" is a plain DDPM without a VAE. A new model is in eval mode (no
    dropout). Sampling methods take the options `steps`, `eta`, `order`, `spacing`, `variance`,
    `prior` and `precision` as keywords, for one call (`invert`: `steps`, `spacing`, `precision`),
    and raise Config's ValueErrors. They compute no gradients.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.vae, self.mixture, cond_channels, z_dim = None, None, 0, 0
        if c.formulation != "none":
            self.vae = VAE(c.image_size, c.channels, c.z_dim, c.vae_width)
            self.mixture = GaussianMixture(c.gmm_components, c.z_dim)
            cond_channels = c.channels
            z_dim = c.z_dim if c.z_cond else 0
        self.unet = UNet(c.image_size, c.channels, cond_channels, c.unet_width, c.unet_mults,
                         c.res_blocks, c.attention, c.heads, c.dropout, z_dim)
        self.diffusion = GaussianDiffusion(c.timesteps, schedule=c.schedule, predict=c.predict)
        self.eval()

    @staticmethod
    def load(run_dir, device="auto"):
        """The trained model in a run folder. ValueErrors: those of `load_run` and `find_device`."""
        model, _ = load_run(run_dir, trained=True)
        device = find_device(device)
        return model.to(device, memory_format=layout(device))

    @property
    def device(self):
        """Where the parameters are."""
        return next(self.parameters()).device

    def loss(self, x, unet=None):
        """Stage 2 loss for images x [B, C, S, S], a scalar. `unet` replaces self.unet if given.

        The VAE gets no gradients. With cond_noise > 0, x_hat gets Gaussian noise of a random
        standard deviation up to cond_noise (arXiv 2106.15282): this makes sampling robust to a
        flawed x_hat.
        """
        x_hat, z = self.reconstruct(x)
        if self.vae and self.config.cond_noise > 0:
            level = self.config.cond_noise * torch.rand(len(x), 1, 1, 1, device=x.device)
            x_hat = x_hat + level * torch.randn_like(x_hat)
        return self.diffusion.loss(self.denoiser(x_hat, z, unet), x, self.shift(x_hat))

    @torch.no_grad()
    def reconstruct(self, x, generator=None):
        """Images [N, C, S, S] -> x_hat and its code z ~ q(z|x); both None without a VAE."""
        if not self.vae:
            return None, None
        z = self.encode(x, sample=True, generator=generator)
        return self.vae.decode(z), z

    def denoiser(self, x_hat=None, z=None, unet=None):
        """The U-Net, or `unet`, with x_hat and z bound: (x_t, t) -> prediction."""
        unet = unet or self.unet
        z = z if self.config.z_cond and self.vae else None
        return lambda x_t, t: unet(x_t, t, x_hat, z)

    def shift(self, x_hat):
        """The shift of x_t: x_hat in formulation 2, otherwise 0."""
        return x_hat if self.config.formulation == "2" else 0

    def options(self, given, known=SAMPLING):
        """self.config, with `given` overriding its values. TypeError for unknown names."""
        for name in set(given) - set(known):
            raise TypeError(f"unknown sampling option {name!r}; choose from {', '.join(known)}")
        return replace(self.config, **given)

    def noise(self, n, generator=None):
        """Noise ~ N(0, I) for n images, [n, C, S, S]."""
        c = self.config
        shape = n, c.channels, c.image_size, c.image_size
        return randn(shape, next(self.parameters()), generator)

    @torch.no_grad()
    def sample_prior(self, n, generator=None, **options):
        """Sample n codes [n, z_dim] from the prior, the mixture or N(0, I)."""
        self.require_vae()
        c, like = self.options(options), next(self.parameters())
        if c.prior == "normal":
            return randn((n, c.z_dim), like, generator)
        return self.mixture.sample(n, generator).to(like)

    @torch.no_grad()
    def encode(self, x, sample=False, generator=None):
        """Images [N, C, S, S] -> codes [N, z_dim]: means of q(z|x), or samples if `sample`."""
        self.require_vae()
        mu, logvar = self.vae.encode(x)
        if not sample:
            return mu
        return mu + (0.5 * logvar).exp() * randn(mu.shape, mu, generator)

    @torch.no_grad()
    def decode(self, z, noise=None, generator=None, **options):
        """Codes z [N, z_dim] -> images [N, C, S, S]: the VAE decodes, the DDPM refines."""
        self.require_vae()
        return self.refine(self.vae.decode(z), noise, z, generator, **options)

    @torch.no_grad()
    def refine(self, x_hat, noise=None, z=None, generator=None, **options):
        """Refine blurry images x_hat [N, C, S, S], from the VAE or elsewhere -> [N, C, S, S].

        `noise` is sampled if not given. z is required with z_cond. Without a VAE, pass `noise` and
        x_hat=None.
        """
        c = self.options(options)
        if noise is None:
            if x_hat is None:
                raise ValueError("without x_hat, pass noise, for example model.noise(n)")
            noise = self.noise(len(x_hat), generator)
        with autocast(c.precision, noise.device):
            return self.diffusion.sample(
                self.denoiser(x_hat, z), noise, c.steps, eta=c.eta, order=c.order,
                spacing=c.spacing, shift=self.shift(x_hat), variance=c.variance,
                generator=generator)

    def sample(self, n, generator=None, **options):
        """Sample n images [n, C, S, S] from the prior, as one batch."""
        return self.sample_both(n, generator, **options)[1]

    @torch.no_grad()
    def sample_both(self, n, generator=None, **options):
        """Like `sample`, but return x_hat (None without a VAE) and the refined images."""
        z = x_hat = None
        if self.vae:
            z = self.sample_prior(n, generator, **options)
            x_hat = self.vae.decode(z)
        noise = self.noise(n, generator)
        return x_hat, self.refine(x_hat, noise, z, generator, **options)

    @torch.no_grad()
    def invert(self, x, **options):
        """Images x [N, C, S, S] -> codes z [N, z_dim] and noise like x that `decode` maps back.

        Pass `decode` eta=0.0, order=1, and the same steps, spacing and precision.
        """
        c, z = self.options(options, ("steps", "spacing", "precision")), self.encode(x)
        x_hat = self.vae.decode(z)
        with autocast(c.precision, x.device):
            return z, self.diffusion.invert(
                self.denoiser(x_hat, z), x, c.steps, c.spacing, self.shift(x_hat))

    def require_vae(self):
        """Raise ValueError for formulation none."""
        if not self.vae:
            raise ValueError("formulation none has no VAE and no codes; use formulation 1 or 2")

# ==================================================================================================
# Part two, the program: options, data, training, pictures, the command line
# ==================================================================================================
import argparse, copy, csv, json, os, shutil, sys, time, zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

# --------------------------------------------------------------------------------------------------
# 6 Config: options, presets and small helpers
# --------------------------------------------------------------------------------------------------
def option(default, help, choices=None, range=(1, 1_000_000_000)):
    """A field of Config: default, help text, and its choices or its range (lowest, highest)."""
    metadata = dict(help=help, choices=choices, range=range)
    return field(default=default, metadata=metadata)

@dataclass
class RunOptions:
    """What to do, where, and how to sample; set per command, not saved."""
    stage: str = option(
        "all", "vae: train the VAE; ddpm: VAE and U-Net; all: both, and sample; sample: only that",
        choices=("all", "vae", "ddpm", "sample"))
    run_dir: str = option("", "folder of the checkpoint, the log and the pictures")
    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu")
    precision: str = option("auto", "auto: bf16 (old GPUs: fp16) on CUDA, else fp32",
                            choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = option(True, "use torch.compile in training, on CUDA only")
    num_samples: int = option(64, "images to sample; at most 64 without --save-images")
    sample_batch: int = option(250, "batch size for sampling; does not affect the images")
    steps: int = option(50, "number of sampling steps, at most --timesteps")
    eta: float = option(0.0, "0: DDIM; 1: ancestral sampling (DDPM)", range=(0, 1))
    order: int = option(2, "1: DDIM; 2: DPM-Solver++ 2M, second order; eta > 0 always uses 1",
                        choices=(1, 2))
    spacing: str = option(
        "quad", "timesteps; uniform: even from 0; trailing: even to T-1; quad: densest near 0",
        choices=("uniform", "trailing", "quad"))
    variance: str = option("small", "noise variance; large: beta_t (needs eta 1 and all T steps)",
                           choices=("small", "large"))
    prior: str = option("gmm", "prior of z; gmm: the fitted mixture; normal: N(0, I)",
                        choices=("gmm", "normal"))
    save_images: bool = option(False, "also write PNGs to samples/ and vae_samples/")

@dataclass
class ModelOptions:
    """Saved with a run, and fixed after its first command."""
    dataset: str = option("shapes", "shapes: built in; folder: your own images",
                          choices=("shapes", "mnist", "fashion_mnist", "cifar10", "folder"))
    small: bool = option(False, "cifar10, folder: use networks sized for a CPU")
    image_size: int = option(32, "height and width of the images", range=(8, 1024))
    channels: int = option(3, "3: color; 1: gray; folder takes either", choices=(1, 3))
    formulation: str = option("1", "1: sample from N(0, I); 2: from N(x_hat, I); none: no VAE",
                              choices=("1", "2", "none"))
    z_dim: int = option(512, "size of the latent code")
    vae_width: int = option(64, "base channels of the VAE")
    kl_weight: float = option(1.0, "weight of the KL term in the VAE loss", range=(0, 1e6))
    gmm_components: int = option(50, "Gaussians in the mixture prior")
    z_cond: bool = option(False, "condition the U-Net on z as well as on x_hat")
    cond_noise: float = option(0.0, "largest std of the noise added to x_hat in training",
                               range=(0, 1))
    unet_width: int = option(128, "base channels of the U-Net", range=(2, 4096))
    unet_mults: tuple = option((1, 2, 2, 2), "width multiplier per resolution, e.g. 1,2,2")
    res_blocks: int = option(2, "residual blocks per resolution")
    attention: tuple = option((16,), "resolutions with self-attention, besides the middle block")
    heads: int = option(8, "attention heads; 0: no attention", range=(0, 1_000_000_000))
    dropout: float = option(0.1, "dropout in the U-Net", range=(0, 0.9))
    timesteps: int = option(1000, "number of diffusion timesteps, T", range=(2, 100_000))
    schedule: str = option("linear", "how beta grows with t",
                           choices=("linear", "cosine", "geometric"))
    predict: str = option("eps", "what the U-Net predicts (v: arXiv 2202.00512)",
                          choices=("eps", "v"))

@dataclass
class TrainingOptions:
    """Saved with a run. Later commands may change most of them."""
    data_dir: str = option("data", "where to download to, or the folder of your images")
    vae_steps: int = option(100_000, "training steps of the VAE", range=(0, 1_000_000_000))
    ddpm_steps: int = option(400_000, "training steps of the U-Net")
    vae_batch: int = option(128, "batch size of the VAE")
    batch_size: int = option(128, "batch size of the U-Net")
    vae_lr: float = option(1e-3, "peak learning rate of the VAE (cosine decay)", range=(1e-9, 1e3))
    lr: float = option(2e-4, "peak learning rate of the U-Net (cosine decay)", range=(1e-9, 1e3))
    warmup: int = option(1000, "learning-rate warm-up steps, at most a tenth of all steps",
                        range=(0, 1_000_000_000))
    grad_clip: float = option(1.0, "maximum gradient norm of the U-Net; 0: no clipping",
                              range=(0, 1_000_000_000))
    ema: float = option(0.9999, "decay of the moving average of the U-Net's weights",
                        range=(0, 0.999999))
    hflip: bool = option(True, "flip half of the training images horizontally")
    save_every: int = option(10_000, "training steps between checkpoints (made only at log rows)")
    log_every: int = option(100, "training steps between log rows")
    seed: int = option(0, "random seed for weights, data order, noise and samples",
                       range=(0, 2**32 - 1))

@dataclass
class Config(TrainingOptions, ModelOptions, RunOptions):    # last base first
    """All options of a run. `Config.preset("cifar10", lr=1e-4)` starts from a dataset's defaults.

    Raises ValueError for a value outside its choices or range. Other conflicts surface when the
    model is built, trained or sampled.
    """

    def __post_init__(self):
        for f in fields(self):
            given, kind, choices = getattr(self, f.name), f.type, f.metadata["choices"]
            numbers = given if kind is tuple else [given] if kind in (int, float) else []
            low, high = f.metadata["range"]
            rule = ""
            if choices and given not in choices:
                rule = f"one of {', '.join(map(repr, choices))}"
            elif not all(low <= number <= high for number in numbers):
                rule = f"between {low} and {high}"
            elif kind is not float and any(number % 1 for number in numbers):
                rule = "a whole number"
            if rule:
                raise ValueError(f"{flag(f.name)} must be {rule}, got {given!r}")
            value = tuple(map(int, given)) if kind is tuple else kind(given)
            setattr(self, f.name, value)    # a checkpoint cannot hold NumPy's types
        name = self.dataset
        if name == "folder":
            folder = Path(os.path.expanduser(self.data_dir)).resolve()
            self.data_dir = str(folder)
            name = f"folder-{folder.name}-{zlib.crc32(os.fsencode(folder)):08x}"
        run_dir = self.run_dir or f"runs/{name}" + ("-small" if self.small else "")
        self.run_dir = os.path.expanduser(run_dir)

    @classmethod
    def preset(cls, dataset="shapes", **options):
        """The defaults of a dataset, adapted to large images, overridden by `options`."""
        size = options.get("image_size", 32)
        preset = dict(PRESETS.get(dataset, {}))
        for least, changes in LARGE.items():
            if size >= least:
                preset |= changes
        if options.get("small") and dataset in ("cifar10", "folder"):
            preset |= SMALL
            if size >= 64:
                preset |= dict(unet_width=32, batch_size=16)
        return cls(dataset=dataset, **{**preset, **options})

    def group(self, *groups):
        """The options of these classes, as a dictionary."""
        return {f.name: getattr(self, f.name) for group in groups for f in fields(group)}

# For a CPU: v-prediction, the cosine schedule and high learning rates give clean samples after some
# thousand training steps: on two cores, minutes for `shapes` and `mnist`, hours for `--small`.
QUICK = dict(kl_weight=0.5, vae_batch=64, vae_lr=2e-3, res_blocks=1, attention=(), heads=1,
             dropout=0.0, predict="v", schedule="cosine", warmup=100, ema=0.995, save_every=250,
             compile=False, steps=10, order=1)
SMALL = dict(QUICK, z_dim=128, vae_width=32, vae_steps=10_000, unet_width=48, unet_mults=(1, 2, 2),
             heads=4, ddpm_steps=16_000, batch_size=32, lr=1e-3, warmup=200, ema=0.999,
             save_every=500, order=2)
MNIST = dict(QUICK, image_size=28, channels=1, z_dim=32, vae_width=16, vae_steps=3000,
             cond_noise=0.2, unet_width=24, unet_mults=(1, 2, 2), ddpm_steps=4000, batch_size=16,
             lr=2e-3, hflip=False)
PRESETS = {
    "shapes": dict(QUICK, image_size=16, z_dim=16, vae_width=16, vae_steps=6000, cond_noise=0.2,
                   unet_width=32, unet_mults=(1, 2), ddpm_steps=3000, batch_size=16, lr=2e-3,
                   hflip=False, log_every=50),
    "mnist": MNIST,
    "fashion_mnist": MNIST,
    # For one CUDA GPU: the authors' U-Net, attention at 16x16 as in DDPM, dropout 0.1 (they use 0.3
    # and see five times as many images), and a smaller VAE.
    "cifar10": dict(vae_steps=50_000, ddpm_steps=200_000, save_every=5000),
}

# The authors' multipliers, batch sizes and learning rates, from each of these image sizes up.
LARGE = {64: dict(unet_mults=(1, 2, 2, 2, 4), batch_size=32, vae_batch=64, sample_batch=50),
         128: dict(unet_mults=(1, 2, 2, 3, 4), batch_size=8, lr=2e-5),
         256: dict(unet_mults=(1, 1, 2, 2, 4, 4))}

def flag(name):
    """z_dim -> --z-dim."""
    return "--" + name.replace("_", "-")

def say(text, transient=False):
    """Print a line. On a terminal or in a notebook, the next line overwrites a transient one.

    If standard output is lost (a closed pipe, a full disk), the program continues in silence.
    """
    try:
        if sys.stdout and sys.stdout.isatty() or "ipykernel" in sys.modules:
            width = shutil.get_terminal_size().columns - 1
            line = text[:width] if transient else text
            print("\r" + line.ljust(width), end="" if transient else "\n", flush=True)
        elif text:
            print(text, flush=True)
    except OSError:
        sys.stdout = None    # Python ignores what is printed to None

def find_device(name="auto"):
    """"auto", "cuda", "cuda:1", "mps" or "cpu" -> torch.device. ValueError if not available."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"device {name} is not available; use --device auto") from None

def layout(device):
    """The memory format of images and networks; channels_last fails on MPS in some versions."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last

def write_atomically(path, write):
    """Write a file: `write` gets a temporary path, which is then renamed. Links are followed."""
    path = path.resolve()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

def try_to_write(path, write):
    """`write_atomically`, but any failure, also in drawing, is only a warning."""
    try:
        write_atomically(path, write)
    except Exception as e:    # a full disk, but also a font or a package that is missing
        say(f"could not make {path} ({summary(e)}); continuing without it")

def summary(e):
    """The first line of an exception's message, or its type."""
    return str(e).split("\n")[0] or type(e).__name__

def out_of_memory(e):
    """Whether an exception says that memory ran out."""
    words = ("MemoryError", "of memory", "allocate memory", "enough memory", "Invalid buffer size",
             "size calculation overflowed")
    return isinstance(e, (MemoryError, RuntimeError)) and any(w in repr(e) for w in words)

# --------------------------------------------------------------------------------------------------
# 7 Data: each dataset is one uint8 tensor; making a batch is indexing and scaling it
# --------------------------------------------------------------------------------------------------
def to_float(images):
    """uint8 [N, C, S, S] in 0..255 -> float32 in [-1, 1]. Raises ValueError for other types."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be a tensor of torch.uint8, got {images.dtype}")
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Float [N, C, S, S] in [-1, 1] -> uint8 in 0..255, rounded and clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def draw_shapes(n, size, seed):
    """n images of a circle, square or triangle -> uint8 [n, 3, size, size], labels [n] in 0..2.

    Seven factors make an image: the shape, x, y, radius, two colors and the phase of the stripes.
    If a VAE's code omits the phase, x_hat is blurry: the mean over all phases.
    """
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (n,), generator=g)
    ranges = ((-0.18, 0.18), (-0.18, 0.18),    # x, y
              (0.55, 0.8), (0, 1), (0, 1), (0, 1))    # radius, hue, background, phase
    factors = [low + (high - low) * torch.rand(n, 1, 1, generator=g) for low, high in ranges]
    chunks = zip(*(f.split(500) for f in (label, *factors)))
    return torch.cat([paint_shapes(size, *chunk) for chunk in chunks]), label

def paint_shapes(size, label, center_x, center_y, radius, hue, background, phase):
    """The images of `draw_shapes` from labels [n] and factors, each [n, 1, 1]."""
    def color(hue):    # [n, 1, 1] -> [n, 3, 1, 1] in [0, 1]
        turn = hue[:, None] + torch.arange(3).view(3, 1, 1) / 3
        return 0.5 + 0.5 * (2 * math.pi * turn).cos()

    def paint(image, layer, distance):    # where distance < 0, with a soft edge of one pixel
        alpha = (0.5 - distance * size / 2).clamp(0, 1)[:, None]    # [n, 1, size, size]
        return image * (1 - alpha) + layer * alpha

    axis = (torch.arange(size) + 0.5) / size * 2 - 1    # pixel centers in [-1, 1]
    x, y = axis.view(1, 1, -1) - center_x, axis.view(1, -1, 1) - center_y
    circle = (x**2 + y**2).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55 * radius
    every = torch.stack([circle, square, triangle])    # distances from the edge, [3, n, size, size]
    distance = every[label, torch.arange(len(label))]
    wave = (2 * math.pi * (1.6 * (x + y) + phase)).sin()
    stripes = (3 * wave).clamp(-1, 1)[:, None]
    image = paint(0.1 + 0.35 * color(background), 1, distance)    # a white outline
    fill = (0.25 + 0.75 * color(hue)) * (0.72 + 0.28 * stripes)
    image = paint(image, fill, distance + 0.14)
    return (image * 255).round().to(torch.uint8)

def decode_image(path, size, channels=3):
    """Image file -> uint8 array [channels, *size], upright, center-cropped; None if unusable."""
    from PIL import Image, ImageOps    # comes with torchvision
    Image.MAX_IMAGE_PIXELS = None    # no limit: photographs can be large
    try:
        im = Image.open(path)
        im.load()
        if im.mode in ("I", "F") and im.format != "PNG":    # no standard value range
            return None
        with suppress(Exception):    # ignore an unreadable EXIF orientation
            im = ImageOps.exif_transpose(im)
        if im.mode[0] == "I":    # 16 bits, which convert() would clip to white
            im = Image.fromarray((np.asarray(im) / 257).round().astype(np.uint8))
        if "transparency" in im.info or im.mode in ("RGBA", "LA", "PA"):
            white = Image.new("RGBA", im.size, "white")
            im = Image.alpha_composite(white, im.convert("RGBA"))
        im = ImageOps.fit(im.convert("RGB" if channels == 3 else "L"), size)
        return np.atleast_3d(np.asarray(im)).transpose(2, 0, 1)
    except Exception:    # damaged files fail in many ways
        return None

def find_images(folder):
    """The image files below a folder, as sorted relative paths. Linked folders are followed.

    Hidden files and folders, thumbnails (@eaDir) and run folders (with a model.pt) are left out.
    """
    from PIL import Image
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:    # a cycle of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in sorted(folders) if not name.startswith((".", "@eaDir"))
                      and not os.path.exists(Path(root, name, "model.pt"))]
        for name in names:
            path = Path(root, name)
            if name[0] != "." and path.suffix.lower() in suffixes and os.path.isfile(path):
                found.append(path.relative_to(folder))
    return sorted(found)

def class_names(files):
    """The first-level subfolders of image paths, numbers in numeric order: label k is entry k."""
    return sorted({path.parts[0] for path in files},
                  key=lambda name: (int(name) if name.isdecimal() else math.inf, name))

def load_folder(folder, size, train, channels=3):
    """The images below a folder -> uint8 [N, channels, *size], labels long [N] or None.

    Labels are the first-level subfolders, if every image is in one; `class_names` of the folder's
    `find_images` returns their names. A hash of the path orders the images, mixing the classes, and
    puts about one in twenty, and at least one, in the test split. Adding images does not reassign
    the others, unless that was the only one. Raises ValueError if the split has no usable image.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"--data-dir {folder} is not a folder; give a folder of images")
    files = find_images(folder)
    classes = class_names(files)
    stray = sum(len(path.parts) == 1 for path in files)    # images outside of subfolders
    if 0 < stray < len(files):
        say(f"no labels, as {stray} of {len(files)} images in {folder} are not in a subfolder")
    hashes = {path: zlib.crc32(path.as_posix().encode(errors="surrogateescape")) for path in files}
    limit = max(2**32 // 20, min(hashes.values(), default=0))    # the test split gets an image
    files = sorted((path for path in files if (hashes[path] > limit) == train), key=hashes.get)
    split = "training" if train else "test"
    say(f"reading {split} images in {folder}: {len(files)}")
    images, labels, bad = np.empty((len(files), channels, *size), np.uint8), [], []
    with ThreadPoolExecutor() as pool:
        decode = partial(decode_image, size=size, channels=channels)
        for path, image in zip(files, pool.map(decode, [Path(folder, path) for path in files])):
            if image is None:
                bad.append(str(path))
                continue
            images[len(labels)] = image
            labels.append(classes.index(path.parts[0]))
    dark = np.sum(images[:len(labels)].max((1, 2, 3)) <= 16)    # of 255
    if dark:
        say(f"nearly black images: {dark}; if they hold 12 bits in 16-bit files, rescale them")
    if bad:
        say(f"images skipped as damaged or unusable: {len(bad)}, including {bad[:10]}")
    if not labels:
        raise ValueError(f"--data-dir {folder} has no usable images for the {split} split; "
                         "add images")
    return torch.from_numpy(images[:len(labels)]), torch.tensor(labels) if stray == 0 else None

def load_images(config, split):
    """The "train" or "test" split of a run's dataset -> uint8 [N, C, S, S], labels long [N].

    The labels of a folder may be None. Raises ValueError for missing data and wrong channels.
    """
    c, name, train = config, config.dataset, split == "train"
    size = [c.image_size] * 2
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    if name == "shapes":
        images, labels = draw_shapes(50_000 if train else 10_000, c.image_size, seed=2 - train)
    elif name == "folder":
        if Path(c.run_dir).resolve() == Path(c.data_dir):
            raise ValueError("--run-dir must differ from --data-dir, or samples would become data")
        images, labels = load_folder(c.data_dir, size, train, c.channels)
    else:
        import torchvision
        kind = dict(mnist="MNIST", fashion_mnist="FashionMNIST", cifar10="CIFAR10")[name]
        try:
            data = getattr(torchvision.datasets, kind)(c.data_dir, train=train, download=True)
        except (RuntimeError, OSError, ValueError, AssertionError) as e:
            raise ValueError(f"cannot download or read {name} ({e}); check the network, or delete "
                             f"damaged files in --data-dir {c.data_dir}") from None
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
        if images.dim() == 3:
            images = images[..., None]
        images = images.permute(0, 3, 1, 2)    # [N, H, W, C] -> [N, C, H, W]
        images = torchvision.transforms.functional.resize(images, size, antialias=True)
    if images.shape[1] != c.channels:
        raise ValueError(f"{name} needs --channels {images.shape[1]}, not {c.channels}")
    return images.contiguous(), labels

# --------------------------------------------------------------------------------------------------
# 8 Training: first the VAE and its prior, then the U-Net; one checkpoint for everything
# --------------------------------------------------------------------------------------------------
CHECKPOINT_FORMAT = 3

def new_state():
    """The training state: steps done, log rows, the current stage, its optimizer and scaler, the
    U-Net's weights before averaging, and model.pt's time stamp when last read or written here.
    """
    return dict(steps=dict(vae=0, ddpm=0), log=[], stage="", optimizer=None, scaler={},
                weights=None, modified=None)

def train_vae(model, images, state):
    """Stage 1: train model.vae on uint8 images [N, C, S, S]; a generator of log rows.

    Whenever it yields, every `log_every` steps and at the end, `model` and `state` hold all that is
    needed to resume. Each step seeds PyTorch's global generator from the seed and the step, so a
    resumed run on a CPU equals an uninterrupted one. Raises ValueError for non-finite values.
    """
    model.require_vae()
    c, vae, device = model.config, model.vae, model.device
    if state["steps"]["vae"] >= c.vae_steps:
        return
    model.mixture.fitted.fill_(False)    # a prior belongs to the VAE it was fitted to
    optimizer, scaler = optimizer_for(vae, "vae", c, device, state)
    compute_loss = compiled(
        lambda x: torch.stack(vae.loss(x, c.kl_weight)), c, images, c.vae_batch, device)
    losses, clock = [], time.perf_counter()
    for step in range(state["steps"]["vae"], c.vae_steps):
        torch.manual_seed(stream(c.seed, "vae", step))
        x = random_batch(images, c.vae_batch, c.hflip, device)
        with autocast(c.precision, device):
            loss = compute_loss(x)    # total, squared error and KL
        optimizer.param_groups[0]["lr"] = lr_at(step, c.vae_steps, c.vae_lr, c.warmup)
        optimizer.zero_grad()
        scaler.scale(loss[0]).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
        advance(state, "vae", optimizer)
        if (step + 1) % c.log_every == 0 or step + 1 == c.vae_steps:
            yield log_row(state, losses, vae, scaler, clock)
            clock = time.perf_counter()    # excludes checkpoints and pictures

def train_ddpm(model, images, state):
    """Stage 2: train the U-Net, with the VAE fixed; otherwise like `train_vae`.

    Adam trains a copy; model.unet holds the moving average (EMA) of the copy's weights.
    """
    c, device = model.config, model.device
    unet = copy.deepcopy(model.unet).train()
    params, average = list(unet.parameters()), list(model.unet.parameters())
    optimizer, scaler = optimizer_for(unet, "ddpm", c, device, state)
    if state["stage"] == "ddpm":
        unet.load_state_dict(state["weights"])
    weights = unet.state_dict()    # shares memory with `unet`, so it is always current
    compute_loss = compiled(lambda x: model.loss(x, unet)[None], c, images, c.batch_size, device)
    losses, clock = [], time.perf_counter()
    for step in range(state["steps"]["ddpm"], c.ddpm_steps):
        torch.manual_seed(stream(c.seed, "ddpm", step))
        x = random_batch(images, c.batch_size, c.hflip, device)
        with autocast(c.precision, device):
            loss = compute_loss(x)
        optimizer.param_groups[0]["lr"] = lr_at(step, c.ddpm_steps, c.lr, c.warmup)
        optimizer.zero_grad()
        scaler.scale(loss[0]).backward()
        if c.grad_clip > 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, c.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        decay = min(c.ema, (1 + step) / (10 + step))    # a shorter memory at first
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - decay)
        losses.append(loss.detach())
        advance(state, "ddpm", optimizer, weights)
        if (step + 1) % c.log_every == 0 or step + 1 == c.ddpm_steps:
            yield log_row(state, losses, unet, scaler, clock)
            clock = time.perf_counter()

def optimizer_for(network, stage, config, device, state):
    """Adam and a gradient scaler (enabled only for fp16), restored if `state` is from `stage`."""
    fp16 = half_precision(config.precision, device) == torch.float16
    if fp16 and device.type == "mps":
        raise ValueError("cannot train in fp16 on MPS; use --precision fp32")
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    if state["stage"] == stage:
        optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():    # match p's layout, if saved elsewhere
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(p).copy_(moments[name])
        if fp16 and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    return optimizer, scaler

def advance(state, stage, optimizer, weights=None):
    """Count a training step. `state` shares memory with the live tensors: nothing is copied."""
    state["steps"][stage] += 1
    state.update(stage=stage, optimizer=optimizer.state_dict(), weights=weights)

def log_row(state, losses, network, scaler, clock):
    """Append the mean losses and the speed since `clock` to the log, and clear `losses`.

    ValueError if the losses or the parameters are not finite.
    """
    stage, mean = state["stage"], torch.stack(losses).mean(0)
    step = state["steps"][stage]
    if not all(v.isfinite().all() for v in [mean, *network.parameters()]):
        raise ValueError(f"non-finite {stage} loss or weights after step {step - len(losses)}; "
                         "try a lower learning rate (--vae-lr, --lr)")
    row = dict(zip(("loss", "recon", "kl"), mean.tolist()))    # stage 2 has only "loss"
    row |= dict(stage=stage, step=step, lr=state["optimizer"]["param_groups"][0]["lr"],
                steps_per_s=len(losses) / (time.perf_counter() - clock))
    losses.clear()
    state["log"].append(row)
    state["scaler"] = scaler.state_dict()
    return row

def compiled(loss, config, images, n, device):
    """A loss function, images -> losses [1] or [3], compiled on CUDA if asked for and possible."""
    if not config.compile or device.type != "cuda":
        return loss
    say("compiling; this takes minutes")
    try:
        fast = torch.compile(loss, dynamic=False)
        with autocast(config.precision, device):
            out = fast(random_batch(images, n, config.hflip, device))
        out[0].backward()    # compiled separately
        return fast
    except Exception as e:    # no compiler, or an old GPU
        say(f"torch.compile failed ({summary(e)}); continuing without it")
        return loss

def random_batch(images, n, hflip, device):
    """n random uint8 images [N, C, S, S] -> float [n, C, S, S]; `hflip` flips half of them."""
    x = images[torch.randint(len(images), (n,), device=images.device)]
    if device.type == "cuda" and not x.is_cuda:    # copy without waiting
        x = x.pin_memory().to(device, non_blocking=True)
    x = to_float(x.to(device))
    if hflip:
        x = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
    return x.contiguous(memory_format=layout(device))

def lr_at(step, total, peak, warmup):
    """The learning rate: linear warm-up over at most a tenth of all steps, then cosine decay."""
    warmup = min(warmup, total // 10)
    decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (total - warmup))
    return peak * min(1, (step + 1) / (warmup + 1)) * decay

def fit_prior(model, images, components=None):
    """Fit a new model.mixture to z ~ q(z|x) of up to 50,000 uint8 images [N, C, S, S]."""
    c, g = model.config, torch.Generator().manual_seed(model.config.seed)
    batches = (to_float(x.to(model.device)) for x in images[:50_000].split(c.vae_batch))
    z = torch.cat([model.encode(x, sample=True, generator=g) for x in batches])
    mixture = GaussianMixture(components or c.gmm_components, c.z_dim).to(model.device)
    model.mixture = mixture.fit(z, generator=g)

def modified(path):
    """When a file was last modified, in ns; None if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else None

def save_checkpoint(model, state):
    """Write model.pt atomically, then config.json and log.csv for people to read.

    Raises OSError if model.pt cannot be written, ValueError if another process or model changed it.
    """
    run_dir, options = Path(model.config.run_dir), model.config.group(ModelOptions, TrainingOptions)
    path = run_dir / "model.pt"
    if modified(path) != state["modified"]:
        raise ValueError(f"{path} was changed by another process or model; stop that process, or "
                         "change --run-dir")
    if model.vae:    # the mixture may have been replaced
        options["gmm_components"] = len(model.mixture.weights)
    saved = dict(format=CHECKPOINT_FORMAT, options=options, model=model.state_dict(),
                 **{**state, "modified": None})

    def write_model(path):
        with open(path, "wb") as f:    # a file object reports a full disk, a path does not
            torch.save(saved, f)

    def write_log(path):
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(
                f, ("stage", "step", "loss", "recon", "kl", "lr", "steps_per_s"))
            writer.writeheader()
            writer.writerows(state["log"])

    try:
        write_atomically(path, write_model)
    except (OSError, RuntimeError) as e:    # PyTorch replaces an OSError, its __context__
        raise OSError(f"could not write {path} ({summary(e.__context__ or e)}); the previous "
                      "checkpoint is unchanged") from None
    state["modified"] = modified(path)
    try_to_write(run_dir / "config.json", lambda p: p.write_text(
        json.dumps(options, indent=2), encoding="utf-8"))
    try_to_write(run_dir / "log.csv", write_log)

def load_run(run_dir, trained=False):
    """Load a run's DiffuseVAE and training state onto the CPU, without executing pickled code.

    Raises ValueError if model.pt is missing, damaged or of another format, or if it must be
    `trained` and its U-Net is not.
    """
    path = Path(os.path.expanduser(run_dir), "model.pt")
    if not path.exists():
        raise ValueError(f"no model.pt in {run_dir}; train first, or set --run-dir")
    try:
        time_read = modified(path)
        if zipfile.ZipFile(path).testzip():    # torch.load does not verify checksums
            raise ValueError("damaged: bad checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(f"checkpoint format {saved.get('format', 1)}; this diffusevae.py "
                             f"reads format {CHECKPOINT_FORMAT}")
        with torch.device("cpu"):
            model = DiffuseVAE(Config.preset(**{**saved["options"], "run_dir": str(run_dir)}))
        model.load_state_dict(saved["model"])
        state = {name: saved[name] for name in new_state()}
        state["modified"] = time_read
        untrained = state["steps"]["ddpm"] == 0
    except Exception as e:    # a damaged file fails in many ways
        if isinstance(e, OSError) or out_of_memory(e):    # the file may be sound
            raise
        raise ValueError(f"cannot use {path} ({summary(e)}); move it away or use a new "
                         "--run-dir") from None
    if trained and untrained:
        raise ValueError(f"the U-Net in {run_dir} is not trained yet; use --stage ddpm first")
    return model, state

# --------------------------------------------------------------------------------------------------
# 9 Pictures: labeled grids, curves, and samples as files
# --------------------------------------------------------------------------------------------------
def draw_grid(rows, columns=16):
    """Labeled rows of images -> a matplotlib figure, at most 8.7 inches wide.

    `rows` maps labels to images [N, C, S, S] in [-1, 1]. Rows longer than `columns` are wrapped,
    all of them together.
    """
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    batches = list(rows.values())
    most = max(map(len, batches))
    columns = min(columns, most)
    down = math.ceil(most / columns)
    shape = len(rows), down * columns, *batches[0].shape[1:]
    cells = torch.full(shape, 255, dtype=torch.uint8)    # white where there is no image
    for row, images in zip(cells, batches):
        row[:len(images)] = to_uint8(images)
    cells = cells.unflatten(1, (down, columns)).transpose(0, 1)    # [down, rows, columns, C, S, S]
    grid = make_grid(cells.flatten(0, 2), nrow=columns, padding=1, pad_value=255)    # [3, H, W]
    margin, cell = 1.2, min(0.9, 7.5 / columns)    # inches: the labels, an image
    width, height = margin + columns * cell, len(rows) * down * cell
    fig = Figure(figsize=(width, height), dpi=150)
    ax = fig.add_axes((margin / width, 0, 1 - margin / width, 1))
    ax.imshow(grid.permute(1, 2, 0).numpy(), aspect="auto")    # [H, W, 3]
    middles = (torch.arange(len(rows) * down) + 0.5) * (shape[3] + 1)
    ax.set_yticks(middles.tolist(), list(rows) * down, fontsize=9)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return fig

@torch.no_grad()
def draw_progress(model, stage, x):
    """Test images x [N, C, S, S], their x_hat and, in stage 2, refined images, as a figure.

    The codes and the noise are the same in every picture. Without a VAE there are only samples.
    """
    z = model.encode(x) if model.vae else None
    rows = {"test image": x, "VAE": model.vae.decode(z)} if model.vae else {}
    if stage == "ddpm":
        noise = model.noise(len(x), generators(model.config.seed, "progress", range(len(x))))
        rows["refined" if model.vae else "DDPM"] = model.refine(
            rows.get("VAE"), noise, z, eta=0.0, variance="small")
    return draw_grid(rows)

def draw_curves(log):
    """The losses in the log against training steps -> a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    fig = Figure(figsize=(8.7, 3), dpi=100, layout="constrained")
    panels = (("vae", "stage 1: VAE, nats per image", {"recon": "squared error", "kl": "KL"}),
              ("ddpm", "stage 2: DDPM, mean squared error", {"loss": "prediction error"}))
    for ax, (stage, title, curves) in zip(fig.subplots(1, 2), panels):
        rows = [row for row in log if row["stage"] == stage]
        steps = [row["step"] for row in rows]
        for name, label in curves.items():
            ax.loglog(steps, [row[name] for row in rows], label=label)
        ax.set(title=title, xlabel="training step")
        ax.legend(frameon=False)
        ax.minorticks_off()
        ax.tick_params(labelsize=8)
        for axis, subs in ((ax.xaxis, (1, 3)), (ax.yaxis, (1, 2, 5))):
            axis.set_major_locator(LogLocator(10, subs))
            axis.set_major_formatter("{x:g}")
        ax.spines[["top", "right"]].set_visible(False)
    return fig

@torch.no_grad()
def draw_latents(model, x):
    """What z and the noise encode -> a matplotlib figure, for test images x [N, C, S, S].

    Reconstructions with random and with inverted noise, then interpolation in z between the first
    two images, with the noise fixed.
    """
    z, noise = model.invert(x)
    decode = partial(model.decode, eta=0.0, order=1, variance="small")
    g = generators(model.config.seed, "latents", range(len(x)))
    rows = {"VAE": model.vae.decode(z), "random noise": decode(z, model.noise(len(x), g)),
            "inverted noise": decode(z, noise)}
    rows = {f"{name}\nMSE {(y - x).square().mean():.4f}": y for name, y in rows.items()}
    between = torch.lerp(z[0], z[1], torch.linspace(0, 1, len(x), device=x.device)[:, None])
    return draw_grid({"test image": x, **rows,
                      "interpolated z,\nVAE": model.vae.decode(between),
                      "interpolated z,\nrefined": decode(
                          between, noise[:1].repeat(len(x), 1, 1, 1))})

def sample_images(model):
    """Write samples.png: real, VAE and refined images. Batch size and number do not affect them.

    With --save-images, also write each image to samples/ and its x_hat to vae_samples/. With a VAE
    and test images, also write latents.png.
    """
    c, run_dir, shown = model.config, Path(model.config.run_dir), []
    clock = time.perf_counter()
    total = c.num_samples if c.save_images else min(c.num_samples, 64)
    for start in range(0, total, c.sample_batch):
        indices = range(start, min(start + c.sample_batch, total))
        g = generators(c.seed, "sample", indices)
        both = [x for x in model.sample_both(len(g), g) if x is not None]    # x_hat and x
        if c.save_images:
            for folder, x in zip(("samples", "vae_samples"), both[::-1]):    # x, then x_hat
                save_pngs(run_dir / folder, indices, x)
        if start < 64:
            shown.append(torch.stack(both))    # [1 or 2, B, C, S, S]
        done = indices[-1] + 1
        left = (time.perf_counter() - clock) / done * (total - done) / 60
        say(f"sampled {done} of {total} images  {left:.1f} min left", transient=True)
    labels = ["VAE", f"refined,\n{c.steps} steps"] if model.vae else [f"DDPM,\n{c.steps} steps"]
    rows = dict(zip(labels, torch.cat(shown, dim=1)[:, :64]))
    try:
        real = to_float(load_images(c, "test")[0][:64])
        rows = {"real": real[:total], **rows}
    except (ValueError, OSError) as e:    # still show the samples
        real = ()
        say(f"samples.png is drawn without real images: {e}")
    save_figure(run_dir / "samples.png", draw_grid, rows)
    if len(real) > 1 and model.vae:
        save_figure(run_dir / "latents.png", draw_latents, model, real[:8].to(model.device))
    say(f"sampled {total} images; the pictures are in {run_dir}")

def save_figure(path, draw, *args):
    """Draw a matplotlib figure and write it as a PNG file; see `try_to_write`."""
    try_to_write(path, lambda p: draw(*args).savefig(p, format="png"))

def save_pngs(folder, indices, images):
    """Write images [N, C, S, S] to folder/000000.png and so on; index 0 removes earlier ones."""
    from PIL import Image
    if indices[0] == 0:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9].png"):
            old.unlink()
    pixels = to_uint8(images).cpu().permute(0, 2, 3, 1).numpy()    # [N, S, S, C]
    for i, image in zip(indices, pixels):
        Image.fromarray(image.squeeze()).save(folder / f"{i:06}.png")

# --------------------------------------------------------------------------------------------------
# 10 Main: the command line
# --------------------------------------------------------------------------------------------------
def open_run(given):
    """Options given on the command line -> the DiffuseVAE to work on, and its training state.

    The other options come from the saved run or, without one, from the preset. Raises ValueError
    for options that conflict with the saved run, naming all of them, or that cannot work.
    """
    run_dir = Config.preset(**given).run_dir
    model, state, saved = None, new_state(), {}
    sampling = given.get("stage") == "sample"
    if sampling or Path(run_dir, "model.pt").exists():
        model, state = load_run(run_dir, trained=sampling)
        saved = model.config.group(ModelOptions, TrainingOptions)
    c = Config.preset(**{**saved, **given, "run_dir": run_dir})
    conflicts = [f"{flag(name)} {saved[name]}, not {value}"
                 for name, value in c.group(ModelOptions).items()
                 if saved.get(name, value) != value]
    if conflicts:
        raise ValueError(f"options conflict with the saved run: {run_dir} has "
                         f"{'; '.join(conflicts)}; omit these options or change --run-dir")
    device = find_device(c.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(stream(c.seed, "weights", 0))
    model = model or DiffuseVAE(c)
    model.config = c
    model.diffusion.step_pairs(c.steps, c.eta, c.spacing, c.variance)    # refuses bad options
    return model.to(device, memory_format=layout(device)), state

def train(model, state):
    """Train what --stage asks for and is not trained yet; save checkpoints and pictures."""
    c, run_dir, steps = model.config, Path(model.config.run_dir), state["steps"]
    if c.stage == "vae":
        model.require_vae()
    stages = []    # name, generator of log rows, number of training steps
    if model.vae:
        stages.append(("vae", train_vae, c.vae_steps))
    if c.stage != "vae":
        stages.append(("ddpm", train_ddpm, c.ddpm_steps))
    if (all(steps[stage] >= total for stage, _, total in stages)
            and (not model.vae or model.mixture.fitted)):
        say(f"training in {run_dir} is complete")
        return
    if model.vae and steps["ddpm"] > 0 and steps["vae"] < c.vae_steps:
        raise ValueError(f"cannot continue VAE training in {run_dir}: the U-Net depends on the "
                         f"VAE; use a new --run-dir or --vae-steps {steps['vae']}")
    (images, _), (x, _), device = load_images(c, "train"), load_images(c, "test"), model.device
    x = to_float(x[:8]).to(device)    # for the progress pictures
    if model.vae and len(images) < c.gmm_components:
        raise ValueError(f"--gmm-components {c.gmm_components} exceeds the {len(images)} training "
                         "images; lower it")
    if device.type == "cuda" and images.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        images = images.to(device)    # if they fit in half of the free memory
    say(f"{c.dataset}: {len(images)} images of {c.image_size}x{c.image_size} pixels, "
        f"formulation {c.formulation}, {device.type}; checkpoint and pictures go to {run_dir}")
    for leftover in run_dir.glob("model.*.tmp"):    # of a process that was killed
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink()
    if not state["modified"]:    # fail now, rather than hours later
        if any(run_dir.glob("*samples")):    # a user's images, or those of another model
            raise ValueError(f"{run_dir} has samples but no model.pt; move them or set --run-dir")
        save_checkpoint(model, state)

    must_save = True    # the first checkpoint of a command and the last one must succeed
    for stage, train_stage, total in stages:
        for row in train_stage(model, images, state):
            step, speed = row["step"], row["steps_per_s"]
            say(f"{stage} {step}/{total}  loss {row['loss']:.4f}  {speed:.1f} steps/s  "
                f"{(total - step) / speed / 60:.1f} min left", transient=step < total)
            if step % c.save_every >= c.log_every and step < total:
                continue    # until the first row past a multiple of save_every
            try:
                save_checkpoint(model, state)
                must_save = False
            except OSError as e:
                if must_save or step == total:
                    raise
                say(f"{e}; trying again at the next checkpoint")
            save_figure(run_dir / "curves.png", draw_curves, state["log"])
            save_figure(run_dir / "progress" / f"{stage}_{step:06}.png",
                        draw_progress, model, stage, x)
        if stage == "vae" and not model.mixture.fitted:
            fit_prior(model, images)
            save_checkpoint(model, state)

def build_parser(preset=None):
    """The argument parser, with the preset's values as defaults, or without any."""
    def integers(text):    # argparse prints this name in its error message
        return tuple(int(n) for n in text.split(",") if n != "none")

    parser = argparse.ArgumentParser(
        usage="python diffusevae.py [--help] [--dataset NAME] [--OPTION VALUE ...]",
        description=(__doc__ or "").split("\nBased")[0], allow_abbrev=False, add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30))
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS,
                        help="show the options, with the defaults of the given --dataset")
    special = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(type=integers)}
    for group in (RunOptions, ModelOptions, TrainingOptions):
        section = parser.add_argument_group(group.__name__, group.__doc__)
        for f in fields(group):
            default = getattr(preset, f.name, argparse.SUPPRESS)
            if isinstance(default, tuple):
                default = ",".join(map(str, default)) or "none"
            how = special.get(f.type, dict(type=f.type, choices=f.metadata["choices"]))
            action = section.add_argument(flag(f.name), default=default, **how)
            action.help = f.metadata["help"] + " (default: %(default)s)"
    return parser

def parse(argv):
    """Command line -> dictionary of the options given. --help shows the values of the preset."""
    words = [f" {w}" if w[:1] == "-" and w[1:2].isdigit() else w for w in argv]    # not an option
    given = vars(build_parser().parse_args(words))
    if given.pop("help", False):
        build_parser(Config.preset(**given)).print_help()
        sys.exit(0)
    return given

def main(argv):
    """The command line -> exit code: 0, 2 for errors the user can fix, 130 after Ctrl-C."""
    try:
        model, state = open_run(parse(argv))
        if model.config.stage != "sample":
            train(model, state)
        if model.config.stage in ("all", "sample"):    # not after --stage vae or ddpm
            sample_images(model)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; run the same command again: training continues from the last checkpoint, "
              "sampling starts over", file=sys.stderr)
        return 130
    except Exception as e:
        if out_of_memory(e):
            e = ("out of memory; lower --batch-size, --vae-batch or --sample-batch, or choose "
                 f"smaller networks or images in a new --run-dir ({summary(e)})")
        elif not isinstance(e, (ValueError, OSError)):    # a bug: show the traceback
            raise
        say("")    # ends a transient line
        with suppress(OSError):
            print("diffusevae:", " ".join(str(e).split()), file=sys.stderr)
        return 2

if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):    # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")    # file names the terminal cannot show
    sys.exit(main(sys.argv[1:]))
