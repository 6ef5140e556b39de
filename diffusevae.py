# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision", "numpy", "matplotlib"]
# ///
"""DiffuseVAE in one file: a VAE draws a blurry image from a latent code, a conditional DDPM refines it.

    python diffusevae.py                              # built-in shapes, on a CPU: both stages, samples
    python diffusevae.py --dataset cifar10            # the real thing, on one CUDA GPU
    python diffusevae.py --dataset cifar10 --small    # real photographs on two CPU cores, in an hour or two
    python diffusevae.py --stage sample --num-samples 1000 --steps 10 --save-images

After "DiffuseVAE: Efficient, Controllable and High-Fidelity Generation from Low-Dimensional Latents"
(Pandey et al., arXiv 2201.00308). After part one you have read the paper.

    Part one, the model                                  Part two, the program
    1 VAE         image -> code -> blurry image          6 Config    every option once, presets
    2 Diffusion   noising, DDPM and DDIM, the bound      7 Data      images as one uint8 tensor
    3 U-Net       the network that denoises              8 Training  two stages, one checkpoint
    4 Mixture     the prior that codes are drawn from    9 Pictures  grids, samples as PNGs
    5 DiffuseVAE  all four joined                       10 Main      the command line and its stages

Images are float [N, C, S, S] in [-1, 1] everywhere, codes are z [N, z_dim].
"""
import contextlib, dataclasses, math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ========================================================================================================
# Part one, the model: torch alone; sections 1 to 4 can be copied one by one, 4 with `randn` of 2
# ========================================================================================================

# --------------------------------------------------------------------------------------------------------
# 1 VAE: image -> latent code -> blurry image
# --------------------------------------------------------------------------------------------------------
class VAE(nn.Module):
    """A lean convolutional beta-VAE (arXiv 1312.6114; DiffuseVAE, section 3.1).

        q(z|x) = N(mu, diag exp(logvar)),    p(z) = N(0, I),    x_hat = decode(z)
        L = sum over pixels of ((x - x_hat) / 2)^2 + kl_weight * KL(q(z|x) || p(z)),    mean over the batch

    Half the difference is that of images in [0, 1], the paper's scale. The maps halve while their size is
    even and above 4. For 32x32 images and width 64:

        encode    [3, 32, 32] -> [64, 16, 16] -> [128, 8, 8] -> [256, 4, 4] -> [1024] -> mu, logvar
        decode    z -> [1024] -> [256, 4, 4] -> [128, 8, 8] -> [64, 16, 16] -> [64, 32, 32] -> [3, 32, 32]

    No layer normalises: that would take out the brightness and colour which the code is to hold.
    """

    def __init__(self, image_size, channels=3, z_dim=512, width=64):
        super().__init__()
        size, maps = image_size, [channels]    # channels of the maps, from the image inwards
        while size % 2 == 0 and size > 4:
            maps.append(min(width * 2 ** (len(maps) - 1), 4 * width))
            size //= 2
        down, up, outwards = [], [], [*maps[:0:-1], width]    # from the code outwards, ending at the width
        for c_in, c_out in zip(maps, maps[1:]):
            down += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.SiLU()]
        for c_in, c_out in zip(outwards, outwards[1:]):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(c_in, c_out, 3, padding=1), nn.SiLU()]
        flat, hidden = maps[-1] * size * size, 16 * width
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, hidden), nn.SiLU(),
                                     nn.Linear(hidden, 2 * z_dim))
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.SiLU(), nn.Linear(hidden, flat), nn.SiLU(),
                                     nn.Unflatten(1, (maps[-1], size, size)), *up,
                                     nn.Conv2d(width if up else channels, channels, 3, padding=1), nn.Tanh())
        for layer in self.modules():    # from PyTorch's smaller weights some seeds never use the whole code
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def encode(self, x):
        """Images [B, C, S, S] -> mu, logvar of q(z|x), each [B, z_dim]."""
        mu, logvar = self.encoder(x).to(x.dtype).chunk(2, dim=1)    # bf16 under autocast
        return mu, logvar.clamp(-20, 20)    # beyond that exp() drowns the rest of the loss

    def decode(self, z):
        """Latents [B, z_dim] -> x_hat [B, C, S, S] in [-1, 1]."""
        return self.decoder(z).to(z.dtype)

    def loss(self, x, kl_weight=1.0):
        """Images [B, C, S, S] -> L, its squared error and its KL, scalars.

        In nats an image; the error is -log p(x|z) up to a constant, for a Gaussian of variance 1/2 in [0, 1].
        """
        mu, logvar = self.encode(x)
        x_hat = self.decode(mu + (0.5 * logvar).exp() * torch.randn_like(mu))    # z ~ q(z|x)
        error = ((x - x_hat) / 2).square().flatten(1).sum(1).mean()
        kl = self.kl(mu, logvar).mean()
        return error + kl_weight * kl, error, kl

    def kl(self, mu, logvar):
        """KL(q(z|x) || p(z)) [B] in nats, from mu and logvar [B, z_dim] (arXiv 1312.6114, appendix B)."""
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)

# --------------------------------------------------------------------------------------------------------
# 2 Diffusion: noising and denoising, for any network
# --------------------------------------------------------------------------------------------------------
def randn(shape, like, generator=None):
    """Standard-normal noise with the device and dtype of `like`; `generator` is None, a torch.Generator, or a
    list of one for each of the shape[0] images, whose noise then does not depend on the rest of its batch."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([randn(shape[1:], like, g) for g in generator]).reshape(shape)
    device = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)

def timesteps_for(timesteps, steps, spacing="quad"):
    """The n = `steps` timesteps to keep of 0..T-1, T = `timesteps`: a long tensor [n], strictly increasing.

        uniform   i T // n                          ("linear" in arXiv 2010.02502, appendix D.2)
        trailing  (i + 1) T // n - 1                starts at T - 1, where x_T ~ N(0, I) is true
        quad      max(i, (i + 1)^2 T // n^2 - 1)    so does this, and is dense where little noise is left

    DDIM's code ends its quadratic list at 0.8 T, where x_T is not yet noise. n = 1 is [T - 1] in each.
    Raises ValueError for n outside 1..T and for an unknown spacing.
    """
    T, n = timesteps, steps
    if not 1 <= n <= T:
        raise ValueError(f"steps must be from 1 to {T}, the timesteps, not {n}")
    kept = dict(uniform=[i * T // n for i in range(n)],
                trailing=[(i + 1) * T // n - 1 for i in range(n)],
                quad=[max(i, (i + 1) ** 2 * T // n**2 - 1) for i in range(n)])
    if spacing not in kept:
        raise ValueError(f"spacing must be uniform, trailing or quad, not {spacing!r}")
    return torch.tensor(kept["quad" if n == 1 else spacing])

class GaussianDiffusion:
    """Images into noise and back (DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502), for any network.

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps + shift,    eps ~ N(0, I),    a_t = prod_{s <= t} (1 - beta_s)

                     clean image x_0                                        pure noise, "x_T"
        index t           -1         0      1      2     ...     T - 2      T - 1
        a_t                1      0.9999   less and less of the image        4e-5    (linear schedule)

    `shift` is 0 in DiffuseVAE's formulation 1 and x_hat in formulation 2, where x_t is about 2 x_0 at t = 0
    and N(x_hat, I) at T - 1. All arithmetic is done in y_t = x_t - shift. The contract: x_t carries the shift
    for t >= 0, the clean image never does; noise comes in and goes out as y_T, standard normal.

    `model` is any callable (x_t [B, ...], t long [B] in 0..T-1) -> prediction [B, ...] of eps, or of
    v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (arXiv 2202.00512). Raises ValueError for betas outside (0, 1),
    unknown names, and sqrt(a_{T-1}) > 0.1, where too much of the image is left in x_T to start from noise.
    """

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02, schedule="linear", predict="eps"):
        T, f64 = timesteps, torch.float64
        if schedule == "linear":
            beta = torch.linspace(beta_start, beta_end, T, dtype=f64)
        elif schedule == "cosine":    # arXiv 2102.09672, equation 17; beta_start and beta_end play no part
            f = ((torch.arange(T + 1, dtype=f64) / T + 0.008) / 1.008 * math.pi / 2).cos().square()
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule must be linear or cosine, not {schedule!r}")
        if not 0 < beta.min() <= beta.max() < 1:
            raise ValueError(f"betas must lie between 0 and 1, not reach from {beta_start} to {beta_end}")
        if predict not in ("eps", "v"):
            raise ValueError(f"predict must be eps or v, not {predict!r}")
        self.timesteps, self.predict = T, predict
        # [T + 1]: the last entry is index -1, the clean image
        self.alpha_bar = torch.cat([(1 - beta).cumprod(0), torch.ones(1, dtype=f64)])
        left = self.alpha_bar[T - 1].sqrt()
        if left > 0.1:
            raise ValueError(f"{left:.2f} of the image is left in x_T: take more timesteps or larger betas")

    def _signal_sigma(self, t, like):
        """sqrt(a_t) and sqrt(1 - a_t) for t [B], each [B, 1, ...] with the dimensions of `like`."""
        table = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])    # float64 on the CPU
        return table.to(like.dtype).to(like.device)[:, t].reshape(2, -1, *[1] * (like.dim() - 1))

    def q_sample(self, x0, t, noise, shift=0):
        """x_t ~ q(x_t | x_0), [B, ...], from x0 and noise [B, ...], t [B] (arXiv 2006.11239, equation 4)."""
        signal, sigma = self._signal_sigma(t, x0)
        return signal * x0 + sigma * noise + shift

    def target(self, x0, t, noise):
        """What the network is to predict at q_sample(x0, t, noise): eps or v, [B, ...]."""
        signal, sigma = self._signal_sigma(t, x0)
        return noise if self.predict == "eps" else signal * noise - sigma * x0

    def predict_x0(self, x_t, t, out, shift=0):
        """x_0 and eps, both [B, ...], from the network's output at x_t, t [B]."""
        signal, sigma = self._signal_sigma(t, x_t)
        y = x_t - shift
        if self.predict == "eps":
            return (y - sigma * out) / signal, out
        return signal * y - sigma * out, sigma * y + signal * out

    def q_posterior(self, x0, x_t, t, s=None, shift=0):
        """q(x_s | x_t, x_0) -> mean [B, ...], variance, a float (arXiv 2006.11239, equations 6 and 7).

        t and s < t are ints, one for the whole batch; s is t - 1 by default, -1 is the clean image.
        """
        s = t - 1 if s is None else s
        a_t, a_s = self.alpha_bar[t].item(), self.alpha_bar[s].item()
        b = 1 - a_t / a_s    # beta of the jump from s to t
        mean = (b * a_s**0.5 * x0 + (1 - b) ** 0.5 * (1 - a_s) * (x_t - shift)) / (1 - a_t)
        return mean + (shift if s >= 0 else 0), b * (1 - a_s) / (1 - a_t)

    @torch.no_grad()
    def trajectory(self, model, y_T, steps, eta=0.0, spacing="quad", shift=0, clip=True, generator=None):
        """Denoise y_T [B, ...] step by step; yields s, x_s, predicted x_0 (arXiv 2010.02502, equation 12).

            y_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) eps + sigma noise
            sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)

        eta in [0, 1]: 0 is DDIM, 1 ancestral sampling with the posterior's variance. `clip` keeps x_0 in
        [-1, 1], eps following. The last step adds no noise. The first one raises what timesteps_for raises.
        """
        kept = [-1, *timesteps_for(self.timesteps, steps, spacing).tolist()]    # -1 is the clean image
        x = y_T + shift
        for s, i in reversed(list(zip(kept, kept[1:]))):    # from noise to image, from t = i to s < i
            a_t, a_s = self.alpha_bar[i].item(), self.alpha_bar[s].item()
            t = torch.full((len(x),), i, device=x.device)
            x0, eps = self.predict_x0(x, t, model(x, t), shift)
            if clip:
                x0 = x0.clamp(-1, 1)
                eps = (x - shift - a_t**0.5 * x0) / (1 - a_t) ** 0.5
            sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5
            x = a_s**0.5 * x0 + max(0.0, 1 - a_s - sigma**2) ** 0.5 * eps
            if s >= 0:
                x = x + shift + (sigma * randn(x.shape, x, generator) if eta else 0)
            yield s, x, x0

    def sample(self, model, y_T, steps, eta=0.0, **options):
        """Noise y_T [B, ...] -> clean x_0 [B, ...]: the end of `trajectory`, whose options these are."""
        for _, x, _ in self.trajectory(model, y_T, steps, eta, **options):
            pass
        return x

    @torch.no_grad()
    def invert(self, model, x0, steps, spacing="quad", shift=0, iterations=5):
        """The y_T [B, ...] from which DDIM (eta = 0, the same steps and spacing) returns x0 [B, ...], nearly:
        the fewer the steps, the more `iterations` it takes. It calls the network steps * iterations times.

        A DDIM step backwards is implicit: x_0 and eps in y_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps come from
        the network at the unknown y_t. But y_s = sqrt(a_s) x_0 + sqrt(1 - a_s) eps gives one from the other:
        take from the network only the one that hardly depends on y_t: eps at little noise, x_0 at much.
        """
        y, a_s = x0, 1.0
        for i in timesteps_for(self.timesteps, steps, spacing).tolist():
            y_s, a_t = y, self.alpha_bar[i].item()
            t = torch.full((len(y),), i, device=y.device)
            for _ in range(iterations):
                guess, eps = self.predict_x0(y + shift, t, model(y + shift, t), shift)
                if a_t > 0.5 or a_s == 1:    # at a_s = 1 y_s holds no eps
                    guess = (y_s - (1 - a_s) ** 0.5 * eps) / a_s**0.5
                else:
                    eps = (y_s - a_s**0.5 * guess) / (1 - a_s) ** 0.5
                y = a_t**0.5 * guess + (1 - a_t) ** 0.5 * eps
            a_s = a_t
        return y

    @torch.no_grad()
    def bits_per_dim(self, model, x0, shift=0, generator=None):
        """The variational bound on -log2 p(x_0) per dimension, term by term (arXiv 2006.11239, section 3.3).

            L_T = KL(q(x_T|x_0) || p(x_T)),    L_t = sum over t >= 1 of KL(q(x_s|x_t, x_0) || p(x_s|x_t))

        and, at t = 0, L_0 = -log p(x_0|x_t) of 256 grey levels. Each t has one draw x_t; p is q's posterior
        with the clipped guess in the place of x_0, at t = 0 with the variance of t = 1.
        Images x0 [B, ...] -> dictionary of L_T, L_t, L_0 and `total`, each [B], in bits per dimension.
        """
        def bits(nats):    # [B, ...] -> [B]
            return nats.flatten(1).mean(1) / math.log(2)
        L_t, a_T = 0, self.alpha_bar[self.timesteps - 1].item()
        for i in reversed(range(self.timesteps)):
            t = torch.full((len(x0),), i, device=x0.device)
            x_t = self.q_sample(x0, t, randn(x0.shape, x0, generator), shift)
            guess = self.predict_x0(x_t, t, model(x_t, t), shift)[0].clamp(-1, 1)
            if i > 0:    # two Gaussians of one variance
                mean, variance = self.q_posterior(x0, x_t, i, shift=shift)
                p_mean, _ = self.q_posterior(guess, x_t, i, shift=shift)
                L_t = L_t + bits((mean - p_mean).square() / (2 * variance))
        sd = self.q_posterior(x0, x_t, 1)[1] ** 0.5    # of t = 1; guess is the loop's last, that of t = 0
        high = torch.special.ndtr((x0 + 1 / 255 - guess) / sd)    # the mass below the upper edge of x_0's bin
        low = torch.special.ndtr((x0 - 1 / 255 - guess) / sd)
        high, low = torch.where(x0 > 0.999, 1.0, high), torch.where(x0 < -0.999, 0.0, low)    # open ends
        terms = dict(L_T=bits(0.5 * (a_T * x0.square() - a_T - math.log1p(-a_T))), L_t=L_t,
                     L_0=bits(-(high - low).clamp(min=1e-12).log()))
        return {**terms, "total": sum(terms.values())}

# --------------------------------------------------------------------------------------------------------
# 3 U-Net: the network that denoises
# --------------------------------------------------------------------------------------------------------
class UNet(nn.Module):
    """DDPM's U-Net (arXiv 2006.11239, appendix B) with x_hat beside x_t at its input and z, if any, beside t.

    For 32x32 images, width 128, mults (1, 2, 2, 2), two residual blocks a size and attention at 16:

        maps           way down                           middle                      way up
        [128, 32, 32]  conv, 2 blocks, halve                                          3 blocks, conv
        [256, 16, 16]  2 blocks with attention, halve                                 3 with attention, double
        [256, 8, 8]    2 blocks, halve                                                3 blocks, double
        [256, 4, 4]    2 blocks                           block, attention, block     3 blocks, double

    Each conv, block and halving on the way down leaves its map as further input to a block on the way up.
    `attention` lists RESOLUTIONS: 16 means the 16x16 maps; the middle always attends, unless heads is 0.
    Raises ValueError for sizes that do not halve, resolutions that do not occur, heads that do not divide.
    """

    def __init__(self, image_size, channels=3, cond_channels=0, width=128, mults=(1, 2, 2, 2), res_blocks=2,
                 attention=(), heads=8, dropout=0.0, z_dim=0):
        super().__init__()
        if image_size % 2 ** (len(mults) - 1):
            raise ValueError(f"image_size {image_size} does not halve {len(mults) - 1} times: see unet_mults")
        sizes = [image_size >> i for i in range(len(mults))]
        for size in set(attention) - set(sizes):
            raise ValueError(f"attention at {size} never occurs: take {', '.join(map(str, sizes))} or none")
        self.width, self.cond_channels, emb = width, cond_channels, 4 * width
        self.embed_t = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_z = nn.Linear(z_dim, emb) if z_dim else None
        self.first = nn.Conv2d(channels + cond_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, kept = width, [width]    # channels, and those of the maps kept for the way up
        for m, size in zip(mults, sizes):
            for _ in range(res_blocks):
                self.down.append(Block(c, width * m, emb, dropout, heads if size in attention else 0))
                c = width * m
                kept.append(c)
            if size > sizes[-1]:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                kept.append(c)
        self.middle = nn.ModuleList([Block(c, c, emb, dropout, heads), Block(c, c, emb, dropout)])
        for m, size in zip(reversed(mults), reversed(sizes)):
            for _ in range(res_blocks + 1):
                c_in = c + kept.pop()
                c = width * m
                self.up.append(Block(c_in, c, emb, dropout, heads if size in attention else 0))
            if size < image_size:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.last = nn.Sequential(group_norm(c), nn.SiLU(), zeroed(nn.Conv2d(c, channels, 3, padding=1)))

    def forward(self, x_t, t, x_hat=None, z=None):
        """x_t [B, C, S, S], t [B], x_hat [B, cond_channels, S, S], z [B, z_dim] -> prediction like x_t."""
        fraction = torch.arange(self.width // 2, device=t.device) / (self.width // 2)
        angle = t[:, None] * torch.exp(-math.log(10_000) * fraction)    # [B, width // 2]
        waves = F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, self.width % 2)).to(x_t.dtype)
        emb = F.silu(self.embed_t(waves) + (self.embed_z(z) if self.embed_z else 0))    # [B, 4 width]
        h = self.first(torch.cat([x_t, x_hat], dim=1) if self.cond_channels else x_t)    # [B, width, S, S]
        kept = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            kept.append(h)
        for block in self.middle:
            h = block(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, kept.pop()], dim=1), emb) if isinstance(layer, Block) else layer(h)
        return self.last(h)

class Block(nn.Module):
    """A residual block that the embedding scales and shifts, with self-attention after it if it has heads."""

    def __init__(self, c_in, c_out, emb, dropout, heads=0):
        super().__init__()
        self.first = nn.Sequential(group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.norm, self.scale_shift = group_norm(c_out), nn.Linear(emb, 2 * c_out)
        last = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), last)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attend = Attention(c_out, heads) if heads else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)    # each [B, c_out, 1, 1]
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.attend(self.skip(x) + self.second(h))

class Attention(nn.Module):
    """x plus self-attention among its positions."""

    def __init__(self, channels, heads):
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads must divide the {channels} channels that attend, {heads} does not")
        self.heads, self.norm = heads, group_norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        h = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))    # [B, heads, H * W, C / heads]
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))

def group_norm(channels):
    """GroupNorm with up to 32 groups, a power of two of them, of at least four channels if there are four."""
    return nn.GroupNorm(max(1, math.gcd(channels, 128) // 4), channels)

def zeroed(layer):
    """The layer with all parameters at zero, so that the residual branch it ends starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer

# --------------------------------------------------------------------------------------------------------
# 4 Mixture: a density fitted to the latents, the prior that codes are drawn from
# --------------------------------------------------------------------------------------------------------
def k_means(z, k, generator=None):
    """Points z [N, D] -> each one's cluster, one-hot [N, k]: greedy k-means++ centres, then 20 steps."""
    gap, centres = torch.full_like(z[:, 0], 1e30), z[:0]    # squared distance to the nearest centre [N]
    for _ in range(k):    # of ten points, drawn with chances ~ gap, the one that leaves the least sum of gaps
        drawn = torch.multinomial(gap.cpu() + 1e-12, 10, replacement=True, generator=generator)
        candidates = z[drawn.to(z.device)]    # [10, D]
        gaps = torch.minimum(gap, torch.cdist(candidates, z).square())    # [10, N]
        best = gaps.sum(1).argmin()
        gap, centres = gaps[best], torch.cat([centres, candidates[best][None]])
    for _ in range(20):
        owner = F.one_hot(torch.cdist(z, centres).argmin(1), k).to(z)    # [N, k]
        centres = torch.where(owner.sum(0)[:, None] > 0, owner.T @ z / owner.sum(0)[:, None], centres)
    return owner

class GaussianMixture:
    """Gaussians with full covariances, fitted by EM: ex-post density estimation (arXiv 1903.12436).

    Codes of real images fill N(0, I) unevenly: a draw from it may fall where no image is, one from here
    seldom does. `fit` sets weights [K], means [K, D] and chol [K, D, D], the covariances' Cholesky factors.
    """

    def __init__(self, components):
        self.components = components

    def fit(self, z, iterations=100, tolerance=6.25e-5, generator=None):
        """Points z [N, D] -> self; EM from k-means until a step gains under `tolerance` nats a value of z.

        `history` is the mean log-likelihood after each iteration. Raises ValueError for fewer points than
        components, and for points that are not finite.
        """
        N, K = len(z), self.components
        if N < K or not z.isfinite().all():
            raise ValueError(f"gmm_components {K} takes as many points or more, all finite, not these {N}")
        floor = (1e-6 * z.var(0, unbiased=False).mean() + 1e-9) * torch.eye(z.shape[1]).to(z)
        share = k_means(z, K, generator)    # p(component | point) [N, K]
        self.history = []
        for _ in range(iterations):
            mass = share.sum(0) + 1e-9
            self.weights, self.means = mass / mass.sum(), share.T @ z / mass[:, None]
            covariances = []
            for k in range(K):
                near = (share[:, k] > 1e-12).nonzero()[:, 0]    # most points are not, and add nothing
                y = ((z[near] - self.means[k]) * share[near, k, None].sqrt()).double()
                covariances.append(y.T @ y / mass[k] + floor)    # singular in float32 if points are few
            self.chol = torch.linalg.cholesky(torch.stack(covariances)).to(z)
            joint = self._joint(z)
            self.history.append(joint.logsumexp(1).mean().item())
            if len(self.history) > 1 and self.history[-1] < self.history[-2] + tolerance * z.shape[1]:
                break
            share = joint.softmax(1)
        return self

    def _joint(self, z):
        """log(weight times density) of each component at z [N, D] -> [N, K]."""
        columns = []
        for weight, mean, chol in zip(self.weights, self.means, self.chol):
            white = torch.linalg.solve_triangular(chol, (z - mean).T, upper=False)    # [D, N]
            columns.append(weight.log() - chol.diagonal().log().sum() - 0.5 * white.square().sum(0))
        return torch.stack(columns, dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)

    def log_prob(self, z):
        """Points z [N, D] -> log-density [N], in nats."""
        return self._joint(z).logsumexp(1)

    def sample(self, n, generator=None):
        """n draws [n, D], components in random order; `generator` as in `randn`."""
        e = randn((n, 1 + self.means.shape[1]), self.means, generator)
        u = torch.special.ndtr(e[:, 0])    # uniform: the distribution function at a normal draw
        k = torch.searchsorted(self.weights.cumsum(0), u).clamp(max=self.components - 1)
        # one by one, for chol[k], [n, D, D], may not fit into memory
        return self.means[k] + torch.stack([self.chol[i] @ y for i, y in zip(k, e[:, 1:])])

# --------------------------------------------------------------------------------------------------------
# 5 DiffuseVAE: p(z) p(x|z), a prior for codes and a DDPM that sees x_hat = decode(z)
# --------------------------------------------------------------------------------------------------------
def in_precision(precision, device):
    """The context in which networks run in bf16 if asked for; "auto" asks for it on CUDA that has it."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    on = precision == "bf16" or precision == "auto" and native
    return torch.autocast(device.type, torch.bfloat16) if on else contextlib.nullcontext()

class DiffuseVAE(nn.Module):
    """All joined (DiffuseVAE, section 3): `vae`, `diffusion`, `unet`, `mixture`, and the options, `config`.

    Why two stages do: log p(x) >= E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z)), the ELBO of any VAE. Stage 1 has
    the decoder's Gaussian as p(x|z); stage 2 puts a DDPM in its place that is given x_hat = decode(z), with
    -log p(x|z) <= the DDPM's bound. Freeze q and decode, and the KL is a constant: train the DDPM alone.

    Images are [N, C, S, S] in [-1, 1], latents z [N, z_dim], noise x_T ~ N(0, I) like the images; formulation
    2 adds x_hat to it by itself; formulation none has no VAE: the plain DDPM. The keywords steps, eta,
    spacing, prior and precision override Config's for one call, as in `model.decode(z, steps=10, eta=1.0)`,
    and raise its ValueErrors; other options have no effect there. `generator`: see `randn`.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        plain = c.formulation == "none"
        self.vae = None if plain else VAE(c.image_size, c.channels, c.z_dim, c.vae_width)
        self.unet = UNet(c.image_size, c.channels, 0 if plain else c.channels, c.unet_width, c.unet_mults,
                         c.res_blocks, c.attention, c.heads, c.dropout,
                         c.z_dim if c.z_cond and not plain else 0)
        betas = [min(0.999, beta * 1000 / c.timesteps) for beta in (1e-4, 0.02)]
        self.diffusion = GaussianDiffusion(c.timesteps, *betas, c.schedule, c.predict)
        self.mixture = None    # a GaussianMixture, once stage 1 is done
        self.state = dict(steps=dict(vae=0, ddpm=0), log=[], stage=None, trained=None, optimizer=None)
        self.eval().requires_grad_(False)    # `train` opens what it trains

    @staticmethod
    def load(run_dir, device="auto"):
        """A trained model from its run folder (part two's `load_run`); ValueError if none or damaged."""
        return load_run(run_dir, trained=True).to(find_device(device), memory_format=torch.channels_last)

    def loss(self, x, unet=None):
        """Stage 2: mean squared error of eps or v on images x [B, C, S, S], a scalar, of `unet` if given."""
        z, x_hat = self.draft(x)
        # t spread evenly over the batch makes a steadier loss (arXiv 2107.00630, I.1)
        u = (torch.rand(1, device=x.device) + torch.arange(len(x), device=x.device) / len(x)) % 1
        t, noise = (u * self.config.timesteps).long(), randn(x.shape, x)    # t [B]
        model, shift = self.denoiser(x_hat, z, unet)
        out = model(self.diffusion.q_sample(x, t, noise, shift), t)
        return F.mse_loss(out, self.diffusion.target(x, t, noise))

    def draft(self, x, generator=None):
        """z ~ q(z|x) and its x_hat, what stage 2 is shown of images x; None and None without a VAE."""
        if not self.vae:
            return None, None
        z = self.encode(x, draw=True, generator=generator)
        return z, self.vae.decode(z)

    def denoiser(self, x_hat=None, z=None, unet=None):
        """The U-Net (or another), given x_hat and z, as (x_t, t) -> prediction; and the shift of x_t."""
        if z is None and self.config.z_cond and self.vae:
            raise ValueError("with z_cond the U-Net sees z too: give z, or encode(x_hat) in its place")
        def model(x_t, t):
            return (unet or self.unet)(x_t, t, x_hat, z).to(x_t.dtype)
        return model, (x_hat if self.config.formulation == "2" else 0)

    def latents(self, n, generator=None, **options):
        """n latents [n, z_dim] of the prior, the mixture or N(0, I). Without a VAE they are [n, 0]."""
        c, like = dataclasses.replace(self.config, **options), next(self.parameters())
        if c.prior == "normal" or not self.vae:
            return randn((n, c.z_dim if self.vae else 0), like, generator)
        if self.mixture is None:
            raise ValueError("the prior is not fitted yet: see fit_prior, or take prior='normal'")
        return self.mixture.sample(n, generator).to(like)

    def noise(self, n, generator=None):
        """n times x_T ~ N(0, I), [n, C, S, S]."""
        c = self.config
        return randn((n, c.channels, c.image_size, c.image_size), next(self.parameters()), generator)

    def encode(self, x, draw=False, generator=None):
        """Images -> latents: the means of q(z|x), or draws from it. ValueError without a VAE."""
        if not self.vae:
            raise ValueError("formulation none has no VAE, and so no latents")
        mu, logvar = self.vae.encode(x)
        return mu + (0.5 * logvar).exp() * randn(mu.shape, mu, generator) if draw else mu

    def decode(self, z, x_T=None, generator=None, **options):
        """Latents -> images: the VAE draws x_hat, the DDPM refines it from x_T, or from fresh noise."""
        return self.refine(self.vae.decode(z) if self.vae else None, x_T, z, generator, **options)

    def refine(self, x_hat, x_T=None, z=None, generator=None, **options):
        """Blurry images, the VAE's or others -> refined; z too with z_cond. Without a VAE x_hat is None."""
        c = dataclasses.replace(self.config, **options)
        if x_T is None:
            x_T = self.noise(len(z if x_hat is None else x_hat), generator)
        model, shift = self.denoiser(x_hat, z)
        with in_precision(c.precision, x_T.device):
            return self.diffusion.sample(model, x_T, c.steps, c.eta, spacing=c.spacing, shift=shift,
                                         generator=generator)

    def sample(self, n, generator=None, **options):
        """n new images: codes from the prior, decoded."""
        return self.decode(self.latents(n, generator, **options), None, generator, **options)

    def invert(self, x, **options):
        """Images -> their latents z and the noise x_T from which decode(z, x_T, eta=0.0) with the same steps
        and spacing returns them; see GaussianDiffusion.invert. It takes a VAE."""
        c, z = dataclasses.replace(self.config, **options), self.encode(x)
        model, shift = self.denoiser(self.vae.decode(z), z)
        return z, self.diffusion.invert(model, x, c.steps, c.spacing, shift)

    def bits_per_dim(self, x, generator=None):
        """The joint model's bound: GaussianDiffusion's for one z ~ q(z|x) an image, and its KL; each [N]."""
        z, x_hat = self.draft(x, generator)
        model, shift = self.denoiser(x_hat, z)
        terms = self.diffusion.bits_per_dim(model, x, shift, generator)
        kl = self.vae.kl(*self.vae.encode(x)) if self.vae else torch.zeros(len(x), device=x.device)
        kl = kl / (math.log(2) * x[0].numel())
        return {"KL": kl, **terms, "total": kl + terms["total"]}

# ========================================================================================================
# Part two, the program: options, files, pictures, the command line
# ========================================================================================================
import argparse, copy, json, shutil, sys, time, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# --------------------------------------------------------------------------------------------------------
# 6 Config: every option once, with its default, its help text and the values it takes
# --------------------------------------------------------------------------------------------------------
def option(group, default, help, takes=None):
    """A field of Config; `takes` is its words, or its smallest and largest number."""
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, takes=takes))

@dataclasses.dataclass
class Config:
    """All options of a run; `Config.preset("cifar10", lr=1e-4)` starts from the defaults of a data set.
    Raises ValueError, naming the option and what it takes, for a value that cannot work."""
    # what to do and where: every command says it anew
    stage: str = option("run", "all", "all: train, then sample; ddpm: only train",
                        ("all", "vae", "ddpm", "sample", "eval"))
    run_dir: str = option("run", "", "folder of checkpoint, log and pictures")
    device: str = option("run", "auto", "where to compute", ("auto", "cuda", "mps", "cpu"))
    precision: str = option("run", "auto", "auto: bf16 on CUDA that has it", ("auto", "fp32", "bf16"))
    compile: str = option("run", "auto", "torch.compile; auto: on CUDA", ("auto", "on", "off"))

    # the model: a run is bound to these
    dataset: str = option("model", "shapes", "shapes: drawn by this file; folder: of images",
                          ("shapes", "mnist", "fashion_mnist", "cifar10", "folder"))
    small: bool = option("model", False, "networks for a CPU in place of those of cifar10 and folder")
    image_size: int = option("model", 32, "height and width of the images", (8, 1024))
    formulation: str = option("model", "1", "x_T ~ N(0, I), x_T ~ N(x_hat, I), or no VAE", ("1", "2", "none"))
    z_dim: int = option("model", 512, "size of the latent code", (1, 65536))
    vae_width: int = option("model", 64, "channels of the VAE's largest maps", (1, 4096))
    kl_weight: float = option("model", 1.0, "weight of the KL term in the VAE's loss", (0, 1e6))
    z_cond: bool = option("model", False, "the U-Net sees the latent code besides x_hat")
    unet_width: int = option("model", 128, "channels of the U-Net's largest maps", (2, 4096))
    unet_mults: tuple = option("model", (1, 2, 2, 2), "channel multipliers; maps halve in between", (1, 64))
    res_blocks: int = option("model", 2, "residual blocks at each resolution", (1, 16))
    attention: tuple = option("model", (16,), "resolutions that attend besides the middle, or none")
    heads: int = option("model", 8, "heads of the self-attention", (1, 64))
    dropout: float = option("model", 0.1, "dropout in the U-Net", (0, 0.9))
    timesteps: int = option("model", 1000, "T; the betas scale with 1000 / T", (2, 100_000))
    schedule: str = option("model", "linear", "how beta grows with t", ("linear", "cosine"))
    predict: str = option("model", "eps", "what the U-Net predicts (v: arXiv 2202.00512)", ("eps", "v"))

    # training: a run remembers these, a command may change them
    data_dir: str = option("training", "data", "where data sets are kept, or the folder of --dataset folder")
    vae_steps: int = option("training", 100_000, "updates of the VAE", (1, 10**9))
    ddpm_steps: int = option("training", 400_000, "updates of the U-Net", (1, 10**9))
    vae_batch: int = option("training", 128, "images per update of the VAE", (1, 65536))
    batch_size: int = option("training", 128, "images per update of the U-Net", (1, 65536))
    vae_lr: float = option("training", 1e-3, "peak rate of the VAE, falling as a cosine", (1e-9, 1e3))
    lr: float = option("training", 2e-4, "peak learning rate of the U-Net, likewise", (1e-9, 1e3))
    warmup: int = option("training", 1000, "updates while a rate rises, a tenth of all at most", (0, 10**9))
    grad_clip: float = option("training", 1.0, "largest norm of the U-Net's gradient; 0: any", (0, 1e9))
    ema: float = option("training", 0.9999, "decay of the average of the U-Net's weights", (0, 0.999999))
    gmm_components: int = option("training", 50, "Gaussians in the mixture of codes", (1, 10_000))
    hflip: bool = option("training", True, "mirror half of the training images")
    save_every: int = option("training", 1000, "updates between checkpoints, at rows of the log", (1, 10**9))
    log_every: int = option("training", 100, "updates between rows of the log", (1, 10**9))
    seed: int = option("training", 0, "of initial weights, data order, noise and samples", (0, 2**32 - 1))

    # sampling
    num_samples: int = option("sampling", 64, "images to draw (64 at most without --save-images) or test on",
                              (1, 10**7))
    sample_batch: int = option("sampling", 250, "images drawn at once; changes speed, not images", (1, 65536))
    steps: int = option("sampling", 50, "steps kept of T when sampling", (1, 100_000))
    eta: float = option("sampling", 0.0, "0 is DDIM, 1 is ancestral sampling (DDPM)", (0, 1))
    spacing: str = option("sampling", "quad", "which steps are kept", ("uniform", "trailing", "quad"))
    prior: str = option("sampling", "gmm", "codes from the mixture, or from N(0, I)", ("gmm", "normal"))
    save_images: bool = option("sampling", False, "also as PNGs, in samples/, and x_hat in vae_samples/")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, takes = getattr(self, f.name), f.metadata["takes"]
            if takes and f.type is str and value not in takes:
                raise ValueError(f"{flag(f.name)} takes {', '.join(takes)}, not {value}")
            numbers = (value or [math.nan]) if f.type is tuple else [value]    # nan fits nowhere
            if takes and f.type is not str and not all(takes[0] <= v <= takes[1] for v in numbers):
                raise ValueError(f"{flag(f.name)} takes numbers from {takes[0]} to {takes[1]}, not {value}")
        name = self.dataset if self.dataset != "folder" else f"folder-{Path(self.data_dir).resolve().name}"
        self.run_dir = self.run_dir or f"runs/{name}" + "-small" * self.small

    @property
    def channels(self):
        """Colour channels of the images."""
        return 1 if self.dataset in ("mnist", "fashion_mnist") else 3

    @classmethod
    def preset(cls, dataset="shapes", **options):
        """The defaults of a data set, scaled to a large `image_size`, with `options` put over them."""
        size, preset = options.get("image_size", 32), dict(PRESETS.get(dataset, {}))
        if size >= 64:    # multipliers, batches and rates of the authors' networks for such images
            preset |= dict(unet_mults=(1, 2, 2, 2, 4), batch_size=32, vae_batch=64, sample_batch=50)
        if size >= 128:
            preset |= dict(unet_mults=(1, 2, 2, 3, 4), batch_size=8, lr=2e-5)
        if size >= 256:
            preset |= dict(unet_mults=(1, 1, 2, 2, 4, 4))
        if options.get("small") and dataset in ("cifar10", "folder"):
            preset |= SMALL if size < 64 else dict(SMALL, unet_width=32, batch_size=16)
        preset["steps"] = min(preset.get("steps", 50), options.get("timesteps", 1000))
        return cls(dataset=dataset, **{**preset, **options})

    def group(self, *groups):
        """The options of these groups, as a dictionary."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.metadata["group"] in groups}

# For CPUs: v and the cosine schedule, which give clean pictures after few updates, and high rates.
# `shapes` takes two to five minutes on two cores, `mnist` five to ten, `--small` an hour or two.
QUICK = dict(kl_weight=0.5, vae_batch=64, vae_lr=2e-3, res_blocks=1, attention=(), heads=1, dropout=0.0,
             predict="v", schedule="cosine", warmup=100, ema=0.995, save_every=500, steps=10)
SMALL = dict(QUICK, z_dim=128, vae_width=32, vae_steps=10_000, unet_width=48, unet_mults=(1, 2, 2), heads=4,
             ddpm_steps=8000, batch_size=32, lr=1e-3, warmup=200, ema=0.999)
MNIST = dict(QUICK, image_size=28, z_dim=32, vae_width=16, vae_steps=3000, unet_width=24,
             unet_mults=(1, 2, 2), ddpm_steps=4000, batch_size=16, lr=2e-3, hflip=False)
PRESETS = {
    "shapes": dict(QUICK, image_size=16, z_dim=16, vae_width=16, vae_steps=6000, unet_width=32,
                   unet_mults=(1, 2), ddpm_steps=3000, batch_size=16, lr=2e-3, hflip=False, log_every=50),
    "mnist": MNIST,
    "fashion_mnist": MNIST,
    # For one CUDA GPU: the authors' U-Net, but attention really at 16x16, dropout 0.1 (DDPM's; theirs is 0.3,
    # for five times as many images), and a lean VAE.
    "cifar10": dict(vae_steps=50_000, ddpm_steps=200_000),
}

def flag(name):
    """z_dim -> --z-dim."""
    return "--" + name.replace("_", "-")

# --------------------------------------------------------------------------------------------------------
# 7 Data: every data set ends as one uint8 tensor, so that a batch is an index, a flip and a scale
# --------------------------------------------------------------------------------------------------------
def to_float(images):
    """uint8 [N, C, S, S] in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Float [N, C, S, S] in [-1, 1] -> uint8 in 0..255, rounded, clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def draw_shapes(n, size, seed):
    """n pictures of a circle, square or triangle -> uint8 [n, 3, size, size] and labels [n] in 0..2.

    Place, size and both colours are coarse: a small code holds them. The crisp outline and the phase of the
    stripes are fine: most trained codes drop them, the VAE averages over them, and the DDPM has to draw them.
    """
    g, axis = torch.Generator().manual_seed(seed), (torch.arange(size) + 0.5) / size * 2 - 1

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=g)

    def colour(hue):    # [n, 1, 1] -> [n, 3, 1, 1] in [0, 1]
        return 0.5 + 0.5 * (2 * math.pi * (hue[:, None] + torch.arange(3).view(3, 1, 1) / 3)).cos()

    def paint(image, layer, distance):    # where the distance is negative, with a soft edge of one pixel
        alpha = (0.5 - distance * size / 2).clamp(0, 1)[:, None]    # [n, 1, size, size]
        return image * (1 - alpha) + layer * alpha

    factors = [torch.randint(3, (n,), generator=g), uniform(-0.18, 0.18), uniform(-0.18, 0.18),
               uniform(0.55, 0.8), uniform(0, 1), uniform(0, 1), uniform(0, 1)]
    parts = []
    for label, x, y, radius, hue, ground, phase in zip(*(f.split(500) for f in factors)):
        x, y = axis.view(1, 1, -1) - x, axis.view(1, -1, 1) - y
        distance = torch.stack([    # from the edge, negative inside, in half images: [3, n, size, size]
            (x**2 + y**2).sqrt() - radius,
            torch.maximum(x.abs(), y.abs()) - 0.85 * radius,
            torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55 * radius])[label, torch.arange(len(label))]
        stripes = (3 * (2 * math.pi * (1.6 * (x + y) + phase)).sin()).clamp(-1, 1)[:, None]
        image = paint(0.1 + 0.35 * colour(ground), torch.ones(()), distance)    # a white shape
        image = paint(image, (0.25 + 0.75 * colour(hue)) * (0.72 + 0.28 * stripes), distance + 0.14)
        parts.append((image * 255).round().to(torch.uint8))
    return torch.cat(parts), factors[0]

def decode_image(path, size):
    """An image file -> uint8 [3, *size], upright, RGB, its middle; None if it is damaged or no image."""
    from PIL import Image, ImageOps    # torchvision brings Pillow
    try:
        im = ImageOps.exif_transpose(Image.open(path))
        if im.mode in ("I", "F"):    # who knows what is white
            return None
        if im.mode.startswith("I;16"):    # convert() would clip it to white
            im = Image.fromarray((np.asarray(im) / 257).round().astype(np.uint8))
        if "transparency" in im.info or im.mode in ("RGBA", "LA", "PA"):
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
        return np.asarray(ImageOps.fit(im.convert("RGB"), size, Image.BICUBIC)).transpose(2, 0, 1)
    except Exception:    # a damaged file fails in many ways
        return None

def load_folder(folder, size, train):
    """The images below a folder -> uint8 [N, 3, *size]; every twentieth file, by name, is for testing."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    files = [path for i, path in enumerate(files) if (i % 20 > 0) == train]
    report(f"decoding {len(files)} files below {folder}")
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(decode_image, files, [size] * len(files)))
    bad = [ascii(str(path.relative_to(folder))) for path, image in zip(files, images) if image is None]
    if bad:
        report(f"skipped {len(bad)} of {len(files)} files, no usable images: {', '.join(bad[:10])}")
    if len(bad) == len(files):
        raise ValueError(f"--data-dir {folder} holds no usable image to {'train' if train else 'test'} with")
    return torch.from_numpy(np.stack([image for image in images if image is not None]))

def load_images(name, data_dir, image_size, split):
    """A data set by name, its "train" or "test" split -> uint8 [N, C, S, S] on the CPU and labels long [N],
    None for a folder. Raises ValueError for data that is missing, empty or damaged."""
    train, size = split == "train", [image_size, image_size]
    if name == "shapes":
        return draw_shapes(50_000, image_size, seed=1) if train else draw_shapes(10_000, image_size, seed=2)
    if name == "folder":
        return load_folder(data_dir, size, train), None
    import torchvision
    kind = dict(mnist="MNIST", fashion_mnist="FashionMNIST", cifar10="CIFAR10")[name]
    try:
        data = getattr(torchvision.datasets, kind)(data_dir, train=train, download=True)
    except (RuntimeError, OSError) as e:
        raise ValueError(f"{name} is not in --data-dir {data_dir} and cannot be downloaded: {e}") from None
    images = torch.as_tensor(data.data)    # [N, 28, 28] or [N, 32, 32, 3]
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)    # [N, C, 28 or 32, ...]
    if images.shape[3] != image_size:
        images = torchvision.transforms.functional.resize(images, size, antialias=True)
    return images.contiguous(), torch.as_tensor(data.targets)

# --------------------------------------------------------------------------------------------------------
# 8 Training: first the VAE and its mixture, then the U-Net with the VAE frozen; one checkpoint for all
# --------------------------------------------------------------------------------------------------------
LOG_COLUMNS = ("stage", "step", "loss", "recon", "kl", "lr", "images_per_s")

def train(model, stage, images):
    """Train model.vae (stage "vae") or model.unet ("ddpm") on uint8 images [N, C, S, S]; yields metrics.

    Every `log_every` updates it yields a row of the log; model and `state` hold all it takes to go on.
    model.unet is the moving average, ready to sample; Adam moves a copy of it. A step's randomness follows
    from (seed, stage, step): a run in pieces is a run in one. Raises ValueError if it diverges.
    """
    c, device, is_vae = model.config, next(model.parameters()).device, stage == "vae"
    total, batch, lr = (c.vae_steps, c.vae_batch, c.vae_lr) if is_vae else (c.ddpm_steps, c.batch_size, c.lr)
    model.requires_grad_(False)    # a stage that was broken off has left its network open
    trained = model.vae if is_vae else copy.deepcopy(model.unet)
    trained.train().requires_grad_(True)
    params, average = list(trained.parameters()), list(model.unet.parameters())
    optimizer = torch.optim.Adam(params, fused=True)
    if model.state["stage"] == stage:
        trained.load_state_dict(model.state["trained"])
        optimizer.load_state_dict(model.state["optimizer"])

    def objective(x):
        return trained.loss(x, c.kl_weight) if is_vae else (model.loss(x, trained),)
    if c.compile == "on" or c.compile == "auto" and device.type == "cuda":
        objective = torch.compile(objective, dynamic=False)
    step, losses = model.state["steps"][stage], []    # losses stay on the device until a row needs them
    if is_vae and step < total:
        model.mixture = None    # it would go with the VAE as it was
    warmup, clock = min(c.warmup, total // 10), time.perf_counter()
    while step < total:
        torch.manual_seed(stream(c.seed, stage, step))
        x = to_float(images[torch.randint(len(images), (batch,), device=images.device)].to(device))
        if c.hflip:
            x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (total - warmup))
        rate = lr * min(1, (step + 1) / (warmup + 1)) * fall
        optimizer.param_groups[0]["lr"] = rate
        with in_precision(c.precision, device):
            terms = objective(x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        terms[0].backward()
        if c.grad_clip and not is_vae:
            nn.utils.clip_grad_norm_(params, c.grad_clip)
        optimizer.step()
        if not is_vae:    # the average's memory grows with the run, so that the first weights do not linger
            decay = min(c.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
        losses.append(torch.stack(terms).detach())
        step += 1
        if step % c.log_every == 0 or step == total:
            mean = torch.stack(losses).mean(0)
            if not all(v.isfinite().all() for v in [mean, *params]):
                raise ValueError(f"{stage} is not finite after step {step - len(losses)}: lower its rate")
            speed = len(losses) * batch / (time.perf_counter() - clock)
            row = dict(zip(("loss", "recon", "kl"), mean.tolist()), stage=stage, step=step, lr=rate,
                       images_per_s=speed)    # stage 2 has a loss alone
            model.state |= dict(stage=stage, trained=trained.state_dict(), optimizer=optimizer.state_dict())
            model.state["steps"][stage] = step
            model.state["log"].append(row)
            yield row
            losses, clock = [], time.perf_counter()    # the caller's time is not the training's
    trained.eval().requires_grad_(False)

def encode_images(model, images, draw=False, generator=None):
    """`model.encode` of uint8 images [N, C, S, S] on any device, 500 at a time -> [N, z_dim]."""
    device = next(model.parameters()).device
    return torch.cat([model.encode(to_float(x.to(device)), draw, generator) for x in images.split(500)])

def fit_prior(model, images):
    """Fit model.mixture to a draw from q(z|x) for each of (at most 50,000) uint8 images [N, C, S, S]."""
    c, g = model.config, torch.Generator().manual_seed(model.config.seed)
    z = encode_images(model, images[:50_000], draw=True, generator=g).cpu()    # MPS lacks linalg
    model.mixture = GaussianMixture(c.gmm_components).fit(z, generator=g)
    report(f"prior: {c.gmm_components} Gaussians, log-likelihood {model.mixture.history[-1]:.2f} nats a code")

def stream(seed, name, index):
    """The seed of one step or image: 32 bits, all that torch's CPU generator heeds."""
    return (zlib.crc32(f"{seed} {name}".encode()) + index * 0x9E3779B1) % 2**32

def generators(seed, name, indices):
    """A generator of its own for each index, so that an image does not depend on its batch."""
    return [torch.Generator().manual_seed(stream(seed, name, i)) for i in indices]

def save_checkpoint(model, run_dir):
    """Write model.pt, the only truth about a run, whole or not at all; config.json and log.csv, made from it,
    are for people. OSError if the disk is full."""
    options, mixture = model.config.group("model", "training"), model.mixture and vars(model.mixture)
    path, beside = Path(run_dir, "model.pt"), Path(run_dir, "model.pt.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(dict(options=options, model=model.state_dict(), mixture=mixture, **model.state), beside)
        beside.replace(path)
    except (OSError, RuntimeError) as e:    # torch.save makes a full disk a RuntimeError
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written and is as it was before: {e}") from None
    path.with_name("config.json").write_text(json.dumps(options, indent=2))
    rows = [LOG_COLUMNS, *([row.get(name, "") for name in LOG_COLUMNS] for row in model.state["log"])]
    path.with_name("log.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))

def load_run(run_dir, trained=False):
    """The DiffuseVAE in a run folder's model.pt, on the CPU, with all that training needs to go on; no code
    in the file runs. ValueError if it is missing, damaged, or has no U-Net where that has to be `trained`."""
    path = Path(run_dir, "model.pt")
    if not path.exists():
        raise ValueError(f"there is no run in {run_dir}: train one first, or name another --run-dir")
    try:
        if zipfile.ZipFile(path).testzip():    # torch.load does not heed the checksums
            raise ValueError
        # lazily to sample, whole to train on: Windows does not replace a file that is mapped
        whole = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=trained))
        model = DiffuseVAE(Config.preset(**{**whole["options"], "run_dir": str(run_dir)}))
        model.load_state_dict(whole["model"])
        model.state = {name: whole[name] for name in model.state}
        untrained = model.state["steps"]["ddpm"] == 0
        if whole["mixture"]:
            model.mixture = GaussianMixture(0)
            vars(model.mixture).update(whole["mixture"])
            model.vae.decode(model.mixture.sample(1, torch.Generator()))    # raises if it does not fit
    except (PermissionError, MemoryError):    # no fault of the file
        raise
    except Exception as e:    # a damaged archive fails in many ways
        raise ValueError(f"{path} is damaged or too old ({type(e).__name__}): move it away") from None
    if trained and untrained:
        raise ValueError(f"the run in {run_dir} has no U-Net yet: train it with --stage ddpm first")
    return model

# --------------------------------------------------------------------------------------------------------
# 9 Pictures: labelled grids, and samples as files
# --------------------------------------------------------------------------------------------------------
def draw_grids(grids, columns, across=1, rows=(), ticks=()):
    """(title, images [N, C, S, S]) pairs -> a matplotlib figure of grids, `across` side by side; `rows` are
    the labels of a grid's rows, `ticks` those of the columns, under the lowest grids."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    down, cell, pitch = math.ceil(len(grids) / across), max(0.4, 3.2 / columns), grids[0][1].shape[-1] + 1
    most = max(len(images) for _, images in grids)
    high, wide = 0.35 + cell * math.ceil(most / columns), cell * columns + (1 if rows else 0)
    fig = Figure(figsize=(across * wide, down * high), dpi=150, layout="constrained")
    for i, (ax, (title, images)) in enumerate(zip(fig.subplots(down, across, squeeze=False).flat, grids)):
        grid = make_grid(to_uint8(images).cpu(), nrow=columns, padding=1, pad_value=255)    # [3, H, W]
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=9)
        ax.set_yticks([(k + 0.5) * pitch for k in range(len(rows))], rows)
        shown = ticks if i >= len(grids) - across else ()
        ax.set_xticks([(k + 0.5) * pitch for k in range(len(shown))], shown)
        ax.tick_params(length=0, labelsize=8)
        ax.spines[:].set_visible(False)
    return fig

def draw_samples(model):
    """samples.png: real | VAE | refined. With --save-images every sample as a PNG in samples/, in place of
    what is there, and its x_hat in vae_samples/. Sample i depends on the seed and on i alone."""
    from PIL import Image
    c, run_dir, began, shown = model.config, Path(model.config.run_dir), time.perf_counter(), {}
    if c.compile == "on" or c.compile == "auto" and c.save_images and next(model.parameters()).is_cuda:
        model.unet.compile()    # for a picture alone it does not pay
    total = c.num_samples if c.save_images else min(c.num_samples, 64)
    for indices in torch.arange(total).split(c.sample_batch):
        g = generators(c.seed, "sample", indices.tolist())
        z = model.latents(len(g), g)
        images = dict(vae_samples=model.vae.decode(z)) if model.vae else {}
        images["samples"] = model.refine(images.get("vae_samples"), None, z, g)
        for name, batch in images.items():
            shown[name] = torch.cat([shown.get(name, batch[:0]), batch])[:64]
            if c.save_images and indices[0] == 0:
                shutil.rmtree(run_dir / name, ignore_errors=True)
                (run_dir / name).mkdir()
            for i, image in zip(indices.tolist(), to_uint8(batch).cpu().permute(0, 2, 3, 1).numpy()):
                if c.save_images:
                    Image.fromarray(image.squeeze()).save(run_dir / name / f"{i:06}.png")
        report(f"drew {indices[-1] + 1} in {time.perf_counter() - began:.1f} s", passing=True)
    titles = dict(vae_samples="VAE", samples=f"{'refined' if model.vae else 'DDPM'}, {c.steps} steps")
    grids = [(titles[name], batch) for name, batch in shown.items()]
    try:
        grids.insert(0, ("real (test set)", to_float(load_split(c, "test")[:min(total, 64)])))
    except ValueError as e:    # without the data the samples are still worth seeing
        report(f"samples.png has no real images: {e}")
    fig = draw_grids(grids, math.ceil(min(total, 64) ** 0.5), len(grids))
    fig.savefig(run_dir / "samples.png", bbox_inches="tight")
    report(f"wrote {run_dir / 'samples.png'}")

# --------------------------------------------------------------------------------------------------------
# 10 Main: the command line and its stages
# --------------------------------------------------------------------------------------------------------
def report(text, passing=False):
    """Print a line; the next one overwrites a passing one on a terminal."""
    terminal = sys.stdout.isatty()
    print(("\r\033[K" if terminal else "") + text, end="" if terminal and passing else "\n", flush=True)

def find_device(name="auto"):
    """auto, cuda, mps or cpu -> torch.device. Raises ValueError for one that is not to be had."""
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(k for k in has if has[k]) if name == "auto" else name
    if not has.get(name):
        raise ValueError(f"--device {name} is not to be had here with this PyTorch: take --device auto")
    return torch.device(name)

def load_split(config, split):
    """The uint8 images [N, C, S, S] of the run's data set."""
    return load_images(config.dataset, config.data_dir, config.image_size, split)[0]

def run(given):
    """Do what the options given on the command line ask for."""
    model = open_run(given)
    c, device = model.config, find_device(model.config.device)
    timesteps_for(c.timesteps, c.steps, c.spacing)    # refuses before hours of training
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    model.to(device, memory_format=torch.channels_last)
    if c.stage in ("all", "vae", "ddpm"):
        train_stages(model)
    elif c.stage == "sample" and model.mixture and model.mixture.components != c.gmm_components:
        fit_prior(model, load_split(c, "train"))    # another one, for this command alone
    if c.stage in ("all", "sample"):
        draw_samples(model)
    if c.stage == "eval":
        evaluate(model)

def open_run(given):
    """Options given, over the run's own, over the preset -> the DiffuseVAE to work on, trained or not.
    The ValueError for a command that contradicts the run lists all options in which it does."""
    run_dir, kept = Config.preset(**given).run_dir, {}
    trained, model = given.get("stage") in ("sample", "eval"), None
    if trained or Path(run_dir, "model.pt").exists():
        model = load_run(run_dir, trained)
        kept = model.config.group("model", "training")
    c = Config.preset(**{**kept, **given, "run_dir": run_dir})
    other = [f"{flag(k)} {kept[k]}, not {v}" for k, v in c.group("model").items() if kept.get(k, v) != v]
    if other:
        raise ValueError(f"{run_dir} has {'; '.join(other)}: leave these out, or take another --run-dir")
    torch.manual_seed(stream(c.seed, "weights", 0))
    model = model or DiffuseVAE(c)
    model.config = c
    return model

def train_stages(model):
    """Train what is not yet trained, with a checkpoint now and then; fit the prior when the VAE is done."""
    c, steps, images = model.config, model.state["steps"], load_split(model.config, "train")
    if model.vae and steps["ddpm"] and steps["vae"] < c.vae_steps:
        raise ValueError(f"the U-Net in {c.run_dir} goes with its VAE: train that on in another --run-dir")
    if model.vae and len(images) < c.gmm_components:
        raise ValueError(f"--gmm-components {c.gmm_components} takes as many images, not {len(images)}")
    if c.stage == "vae" and not model.vae:
        raise ValueError("--stage vae trains a VAE, and --formulation none has none")
    device = next(model.parameters()).device
    if device.type != "cuda" or images.nbytes < 0.5 * torch.cuda.mem_get_info()[0]:    # of what is free
        images = images.to(device)
    report(f"{c.dataset}: {len(images)} images, {c.image_size}x{c.image_size}, formulation {c.formulation}, "
           f"{device.type}, run folder {c.run_dir}")
    if device.type == "cpu" and c.dataset in ("cifar10", "folder") and not c.small and c.stage != "vae":
        began = time.perf_counter()
        model.loss(to_float(images[:8]))    # a training step takes about three times as long
        hours = 3 * (time.perf_counter() - began) / 8 * (c.ddpm_steps - steps["ddpm"]) * c.batch_size / 3600
        if hours >= 1:
            report(f"the U-Net will take some {hours:.0f} hours on this CPU; --small trains one made for it")
    stages = dict(vae=(model.vae, c.vae_steps, c.vae_batch), ddpm=(model.unet, c.ddpm_steps, c.batch_size))
    for stage, (network, total, batch) in stages.items():
        if network is None or (c.stage, stage) == ("vae", "ddpm"):
            continue
        size = sum(p.numel() for p in network.parameters())
        report(f"{stage}: {size / 1e6:.2f} M parameters, batches of {batch}, step {steps[stage]} of {total}")
        for m in train(model, stage, images):
            left = (total - m["step"]) * batch / m["images_per_s"] / 60
            report(f"{stage} {m['step']}/{total}  loss {m['loss']:.4f}  {m['images_per_s']:.0f} images/s  "
                   f"{left:.1f} min left", passing=left > 0)
            if m["step"] % c.save_every < c.log_every or left == 0:    # the first row after each multiple
                save_checkpoint(model, c.run_dir)
        if model.vae and (not model.mixture or model.mixture.components != c.gmm_components):
            fit_prior(model, images)
            save_checkpoint(model, c.run_dir)

def evaluate(model):
    """eval.json: the bound on test images, in bits per dimension, term by term: mean and standard error."""
    c, parts, table = model.config, [], {}
    x = to_float(load_split(c, "test")[:c.num_samples].to(next(model.parameters()).device))
    report(f"the bound takes {c.timesteps} network calls for each of {len(x)} test images")
    for indices in torch.arange(len(x)).split(c.sample_batch):
        parts.append(model.bits_per_dim(x[indices], generators(c.seed, "eval", indices.tolist())))
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts])
        error = values.std(correction=0).item() / max(1, len(x) - 1) ** 0.5
        table[name] = dict(mean=values.mean().item(), standard_error=error)
        report("{:6} {mean:.4f} +- {standard_error:.4f} bits per dimension".format(name, **table[name]))
    Path(c.run_dir, "eval.json").write_text(json.dumps(dict(images=len(x), **table), indent=2))

def parse(argv=None):
    """Command line -> dictionary of the options given on it; --help shows a data set's own values."""
    def numbers(text):    # argparse names it when it complains
        return tuple(int(n) for n in text.split(",") if n != "none")
    usage = "python diffusevae.py [--dataset NAME] [--OPTION VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, add_help=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true")
    for f in dataclasses.fields(Config):
        how = dict(type=numbers if f.type is tuple else f.type)
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(flag(f.name), **how)
    given = vars(parser.parse_args(argv))
    if given.pop("help", False):
        preset = Config.preset(**given)
        print(f"usage: {usage}\n\n{__doc__}\nOptions, with their values for --dataset {preset.dataset}:\n")
        for f in dataclasses.fields(Config):
            value = getattr(preset, f.name)
            if f.type is tuple:
                value = ",".join(map(str, value)) or "none"
            if f.type is bool:
                value = "on" if value else "off"
            words = f" ({', '.join(f.metadata['takes'])})" if f.type is str and f.metadata["takes"] else ""
            print(f"  {flag(f.name):18}{f.metadata['help']}{words} [{value}]")
        sys.exit(0)
    return given

def main(argv=None):
    """The command line -> exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        run(parse(argv))
        return 0
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or any(f"{w} memory" in str(e) for w in ("of", "allocate", "enough")):
            e = f"too little memory, lower --batch-size, --vae-batch or --sample-batch: {e}"
        elif isinstance(e, RuntimeError):    # such as an illegal access to memory: not the user's to mend
            raise
        print("diffusevae:", str(e).split("\n")[0], file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")    # for names in scripts that the terminal lacks
    sys.exit(main())
