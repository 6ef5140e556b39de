# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision", "numpy", "matplotlib"]
# ///
"""DiffuseVAE in one file: a VAE draws a blurry image from a latent code, a conditional DDPM refines it.

    python diffusevae.py                      # built-in shapes, on a CPU: both stages, samples, figures
    python diffusevae.py --dataset cifar10    # the real thing, on one CUDA GPU
    python diffusevae.py --stage sample --num-samples 1000 --steps 10 --save-images

After "DiffuseVAE: Efficient, Controllable and High-Fidelity Generation from Low-Dimensional Latents"
(Pandey et al., arXiv 2201.00308). The sections, in the order the data flows:

    1 Config     every option once, presets              6 Mixture     a density fitted to the latents
    2 Data       images as one uint8 tensor              7 DiffuseVAE  VAE and DDPM joined
    3 VAE        image -> code -> blurry image           8 Training    two stages, EMA, checkpoints
    4 Diffusion  noising, DDPM and DDIM, the bound       9 Pictures    grids, strips, curves
    5 U-Net      the network that denoises              10 Main        the command line and its stages

Images are float [N, C, S, S] in [-1, 1] everywhere; `to_float` and `to_uint8` are the only converters.
"""
import argparse, copy, csv, dataclasses, hashlib, json, math, os, signal, sys, time, warnings, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------------
# 1 Config: every option once, with its default, its help text and the values it takes
# --------------------------------------------------------------------------------------------------------

DATASETS = ("shapes", "mnist", "fashion_mnist", "cifar10", "folder")
TRAINED = ("sample", "reconstruct", "interpolate", "traverse", "eval")    # stages of a trained model
STAGES = ("all", "vae", "ddpm", *TRAINED)


def option(group, default, help, takes=None):
    """A field of Config; `takes` is its words, or its smallest and largest number."""
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, takes=takes))


# A run folder is bound to its model options and remembers its training options; the rest is the command's.
_run, _model, _training, _sampling = (partial(option, g) for g in ("run", "model", "training", "sampling"))


@dataclasses.dataclass
class Config:
    """All options of a run; `Config.preset("cifar10", lr=1e-4)` starts from the defaults of a data set.

    Raises ValueError, naming the option and what it takes, for a value that cannot work.
    """
    stage: str = _run("all", "all trains what is not yet trained, then samples", STAGES)
    run_dir: str = _run("", "folder of checkpoints, log and pictures (runs/<dataset>)")
    device: str = _run("auto", "where to compute", ("auto", "cuda", "mps", "cpu"))
    precision: str = _run("auto", "auto: bf16 on CUDA that has it, else fp32", ("auto", "fp32", "bf16"))
    compile: str = _run("auto", "torch.compile the training step; auto: on CUDA", ("auto", "on", "off"))

    dataset: str = _model("shapes", "shapes is drawn by this file, folder is any folder of images", DATASETS)
    image_size: int = _model(32, "height and width of the images", (8, 1024))
    formulation: str = _model("1", "x_T ~ N(0, I), x_T ~ N(x_hat, I), or no VAE", ("1", "2", "none"))
    vae_from: str = _model("", "run folder whose trained VAE is used instead of training one")
    z_dim: int = _model(512, "size of the latent code", (1, 65536))
    vae_width: int = _model(64, "channels of the VAE's largest maps", (1, 4096))
    kl_weight: float = _model(1.0, "weight of the KL term in the VAE's loss", (0, 1e6))
    z_cond: bool = _model(False, "the U-Net sees the latent code besides x_hat")
    unet_width: int = _model(128, "channels of the U-Net's largest maps", (2, 4096))
    unet_mults: tuple = _model((1, 2, 2, 2), "channel multipliers; the maps halve from one to the next")
    res_blocks: int = _model(2, "residual blocks at each resolution", (1, 16))
    attention: tuple = _model(None, "resolutions that attend, or none (16, or the smallest maps)")
    heads: int = _model(8, "heads of the self-attention", (1, 64))
    dropout: float = _model(0.1, "dropout in the U-Net", (0, 0.9))
    timesteps: int = _model(1000, "T, the steps of the diffusion; betas scale with 1000 / T", (2, 100_000))
    schedule: str = _model("linear", "how beta grows with t", ("linear", "cosine", "geometric"))
    predict: str = _model("eps", "what the U-Net predicts (v: arXiv 2202.00512)", ("eps", "v"))

    data_dir: str = _training("data", "where data sets are kept, or the folder of --dataset folder")
    vae_steps: int = _training(100_000, "updates of the VAE", (1, 10**9))
    ddpm_steps: int = _training(400_000, "updates of the U-Net", (1, 10**9))
    vae_batch: int = _training(128, "images per update of the VAE", (1, 65536))
    batch_size: int = _training(128, "images per update of the U-Net", (1, 65536))
    vae_lr: float = _training(1e-3, "peak learning rate of the VAE", (1e-9, 1e3))
    lr: float = _training(2e-4, "peak learning rate of the U-Net", (1e-9, 1e3))
    lr_decay: str = _training("cosine", "constant rates, or down to zero along a cosine", ("none", "cosine"))
    warmup: int = _training(1000, "updates while a rate rises from zero, a tenth of all at most", (0, 10**9))
    grad_clip: float = _training(1.0, "largest norm of a gradient; 0 is no limit", (0, 1e9))
    ema: float = _training(0.9999, "decay of the moving average of the U-Net's weights", (0, 0.999999))
    hflip: bool = _training(True, "mirror half of the training images")
    save_every: int = _training(5000, "updates between checkpoints", (1, 10**9))
    log_every: int = _training(100, "updates between rows of the log", (1, 10**9))
    seed: int = _training(0, "of initial weights, data order, noise and samples", (0, 2**32 - 1))

    num_samples: int = _sampling(64, "images to draw, or test images to measure on", (1, 10**7))
    sample_batch: int = _sampling(250, "images drawn at once; changes speed, not images", (1, 65536))
    steps: int = _sampling(50, "steps kept of T when sampling", (1, 100_000))
    eta: float = _sampling(0.0, "0 is DDIM, 1 is ancestral sampling (DDPM)", (0, 1))
    spacing: str = _sampling("trailing", "which steps are kept", ("uniform", "quad", "trailing"))
    variance: str = _sampling("small", "of ancestral sampling; large needs every step", ("small", "large"))
    temperature: float = _sampling(1.0, "standard deviation of the noise sampling starts from", (0, 10))
    prior: str = _sampling("normal", "z from N(0, I), or a mixture fitted to the latents", ("normal", "gmm"))
    gmm_components: int = _sampling(50, "Gaussians in that mixture", (1, 10_000))
    cond_noise: float = _sampling(0.0, "standard deviation of noise put on x_hat before refinement", (0, 10))
    save_images: bool = _sampling(False, "write each sample as a PNG in samples/, x_hat in vae_samples/")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, takes = getattr(self, f.name), f.metadata["takes"]
            kinds = {float: (int, float), tuple: (tuple, type(None))}.get(f.type, f.type)
            if not isinstance(value, kinds):
                raise ValueError(f"{flag(f.name)} takes {f.type.__name__}, not {value!r}")
            words = takes and isinstance(takes[0], str)
            if takes and not (value in takes if words else takes[0] <= value <= takes[1]):    # nan fails too
                allowed = ", ".join(takes) if words else f"numbers from {takes[0]} to {takes[1]}"
                raise ValueError(f"{flag(f.name)} takes {allowed}, not {value}")
        self.run_dir = self.run_dir or f"runs/{self.dataset}"
        if self.dataset == "shapes" and self.image_size > 128:
            raise ValueError(f"--image-size takes 8 to 128 for --dataset shapes, not {self.image_size}")
        if not (1 <= len(self.unet_mults) <= 8 and all(1 <= m <= 64 for m in self.unet_mults)):
            raise ValueError(f"--unet-mults takes 1 to 8 numbers from 1 to 64, not {self.unet_mults}")
        if self.steps > self.timesteps:
            raise ValueError(f"--steps takes 1 to {self.timesteps}, the timesteps, not {self.steps}")
        if self.variance == "large" and (self.eta < 1 or self.steps < self.timesteps):
            raise ValueError(f"--variance large needs --eta 1 --steps {self.timesteps}, else it is unsound")
        for name in ("z_cond", "vae_from", "prior", "cond_noise", "stage") * (self.formulation == "none"):
            if (value := getattr(self, name)) not in (False, "", "normal", "all", "ddpm", "sample", "eval"):
                raise ValueError(f"{flag(name)} {value} needs a VAE, and --formulation none has none")
        if self.stage == "interpolate" and self.eta:
            raise ValueError("--stage interpolate takes --eta 0 alone: fresh noise would be seen as a change")

    @property
    def channels(self):
        """Colour channels of the images."""
        return 1 if self.dataset in ("mnist", "fashion_mnist") else 3

    @classmethod
    def preset(cls, dataset="shapes", **options):
        """The defaults of a data set, scaled to a large `image_size`, with `options` put over them."""
        size, preset = options.get("image_size", 32), {"steps": 50, **PRESETS.get(dataset, {})}
        if size >= 64:    # multipliers and rates of the paper's CelebA-64 and CelebA-HQ networks
            mults, big = (1, 2, 2, 2, 4) if size < 256 else (1, 1, 2, 2, 4, 4), size >= 128
            preset |= dict(unet_mults=mults, vae_batch=64, batch_size=8 if big else 32, sample_batch=50,
                           lr=2e-5 if big else 2e-4)
        preset["steps"] = min(preset["steps"], options.get("timesteps", 1000))
        return cls(dataset=dataset, **{**preset, **options})

    def group(self, *groups):
        """The options of these groups, as a dictionary."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.metadata["group"] in groups}


PRESETS = {
    # Six minutes on two CPU cores: small images, v and the cosine schedule (clean pictures soon), high rates.
    "shapes": dict(image_size=16, z_dim=16, vae_width=16, kl_weight=0.5, vae_steps=6000, vae_batch=64,
                   vae_lr=2e-3, unet_width=32, unet_mults=(1, 2), res_blocks=1, attention=(), heads=1,
                   dropout=0.0, predict="v", schedule="cosine", ddpm_steps=3000, batch_size=16, lr=2e-3,
                   warmup=100, ema=0.995, hflip=False, save_every=500, log_every=50, steps=10,
                   gmm_components=10),
    # One night on one consumer GPU: the paper's U-Net, with attention really at 16x16, and a lean VAE.
    "cifar10": dict(vae_steps=50_000, ddpm_steps=200_000),
    "mnist": dict(z_dim=64, vae_width=32, unet_width=64, vae_steps=20_000, ddpm_steps=50_000, hflip=False),
    "fashion_mnist": dict(z_dim=64, vae_width=32, unet_width=64, vae_steps=20_000, ddpm_steps=50_000),
}


def flag(name):
    """z_dim -> --z-dim."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------------------------
# 2 Data: every data set ends as one uint8 tensor, so that a batch is an index, a flip and a scale
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
    stripes are fine: the code drops them, the VAE averages over them, and the DDPM has to draw them.
    """
    g, axis = torch.Generator().manual_seed(seed), (torch.arange(size) + 0.5) / size * 2 - 1
    uniform = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=g)
    factors = [torch.randint(3, (n,), generator=g), uniform(-0.18, 0.18), uniform(-0.18, 0.18),
               uniform(0.55, 0.8), uniform(0, 1), uniform(0, 1), uniform(0, 1)]
    cover = lambda d: (0.5 - d * size / 2).clamp(0, 1)[:, None]    # anti-aliased, [n, 1, size, size]
    colour = lambda h: 0.5 + 0.5 * (2 * math.pi * (h[:, None] + torch.arange(3).view(3, 1, 1) / 3)).cos()
    parts = []
    for label, x, y, radius, hue, ground, phase in zip(*(f.split(500) for f in factors)):
        x, y = axis.view(1, 1, -1) - x, axis.view(1, -1, 1) - y
        distance = torch.stack([    # from the edge, negative inside, in half images: [3, n, size, size]
            (x**2 + y**2).sqrt() - radius,
            torch.maximum(x.abs(), y.abs()) - 0.85 * radius,
            torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55 * radius])[label, torch.arange(len(label))]
        stripes = (3 * (2 * math.pi * (1.6 * (x + y) + phase)).sin()).clamp(-1, 1)[:, None]
        fill, image = (0.25 + 0.75 * colour(hue)) * (0.72 + 0.28 * stripes), 0.1 + 0.35 * colour(ground)
        for layer, alpha in ((torch.ones(()), cover(distance)), (fill, cover(distance + 0.14))):
            image = image * (1 - alpha) + layer * alpha
        parts.append((image * 255).round().to(torch.uint8))
    return torch.cat(parts), factors[0]


def load_images(name, data_dir, image_size, split, cache_dir=None):
    """A data set by name -> uint8 [N, C, S, S] on the CPU and labels long [N], None for a folder.

    `split` is train or test; a folder keeps 5 % of its images for test, and what it decoded in `cache_dir`.
    Raises ValueError for an unknown name, and for data that is missing, empty or damaged.
    """
    train = split == "train"
    if name == "shapes":
        return draw_shapes(50_000, image_size, seed=1) if train else draw_shapes(10_000, image_size, seed=2)
    if name == "folder":
        images = load_folder(data_dir, image_size, cache_dir)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[order[-(-len(images) // 20):] if train else order[:-(-len(images) // 20)]], None
    classes = dict(mnist="MNIST", fashion_mnist="FashionMNIST", cifar10="CIFAR10")
    if name not in classes:
        raise ValueError(f"--dataset takes {', '.join(DATASETS)}, not {name}")
    import torchvision.datasets
    try:
        data = getattr(torchvision.datasets, classes[name])(data_dir, train=train, download=True)
    except (RuntimeError, OSError) as e:
        raise ValueError(f"{name} is not in --data-dir {data_dir} and cannot be downloaded: {e}") from None
    images = torch.as_tensor(data.data)    # [N, 28, 28] or [N, 32, 32, 3]
    images = F.pad(images[:, None], (2, 2, 2, 2)) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    if image_size != 32:
        resize = partial(F.interpolate, size=(image_size, image_size), mode="bicubic", antialias=True)
        images = torch.cat([to_uint8(resize(to_float(x))) for x in images.split(1000)])
    return images.contiguous(), torch.as_tensor(data.targets)


def load_folder(folder, size, cache_dir=None):
    """Every image below a folder, upright, RGB, cropped to its middle, resized -> uint8 [N, 3, size, size].

    What is no usable image is skipped, counted and named; `cache_dir` keeps the rest while the folder stays.
    Raises ValueError if the folder is missing or holds fewer than two usable images.
    """
    root, images, bad = Path(folder), [], []
    if not root.is_dir():
        raise ValueError(f"there is no folder {folder}: give --data-dir a folder of images")
    files = sorted(p for p in root.rglob("*") if not p.name.startswith(".") and not p.is_dir())
    stamp = repr([size, *((os.fsencode(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in files)])
    cache = Path(cache_dir or "", f"images-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npz")
    if cache_dir and cache.exists():
        try:
            return torch.from_numpy(np.load(cache)["images"])    # a zip file: its checksums are checked
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            report(f"{cache} is damaged: decoding the images again")
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")    # Pillow's name no file; what cannot be read is named below
        for i, image in enumerate(pool.map(partial(decode_image, size=size), files)):
            images.append(image) if image is not None else bad.append(ascii(str(files[i].relative_to(root))))
            if i % 1000 == 999:
                report(f"decoded {i + 1} of {len(files)} files", passing=True)
    if bad:
        report(f"skipped {len(bad)} of {len(files)} files, no usable images: {', '.join(bad[:10])}"
               + ", ..." * (len(bad) > 10))
    if len(images) < 2:
        raise ValueError(f"{folder} holds {len(images)} usable images: 2 or more are needed, one for testing")
    if cache_dir:
        save_atomic(cache, lambda f: np.savez(f, images=np.stack(images)))
    return torch.from_numpy(np.stack(images))


def decode_image(path, size):
    """An image file -> uint8 [3, size, size]; None if it is damaged, huge or no image."""
    from PIL import Image, ImageOps    # torchvision brings Pillow
    if not path.is_file():    # a broken link, or a pipe that would be waited for
        return None
    try:
        with Image.open(path) as im:
            if im.width * im.height > 2**26:    # a decompression bomb, or as good as one
                return None
            if im.mode == "F" or im.mode == "I" and im.format != "PNG":    # their white is unknown
                return None
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith("I"):    # 16 bits, which convert() would clip to white
                im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
            if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
            return np.asarray(ImageOps.fit(im.convert("RGB"), (size, size), Image.BICUBIC)).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError):
        return None


# --------------------------------------------------------------------------------------------------------
# 3 VAE: image -> latent code -> blurry image
# --------------------------------------------------------------------------------------------------------

class VAE(nn.Module):
    """A lean convolutional beta-VAE (arXiv 1312.6114; DiffuseVAE, section 3.1).

        q(z|x) = N(mu, diag exp(logvar)),    p(z) = N(0, I),    x_hat = decode(z)
        L = sum over pixels of ((x - x_hat) / 2)^2 + kl_weight * KL(q(z|x) || p(z)),    mean over the batch

    Half the difference is that of images in [0, 1], the paper's scale. Images are [B, channels, S, S] in
    [-1, 1]; maps halve while their size is even and above 4. There is no normalisation: it would take out the
    brightness and colour that the code is to hold.
    """

    def __init__(self, image_size, channels=3, z_dim=512, width=64):
        super().__init__()
        size, c_in, c_out, down, up = image_size, channels, width, [], []
        while size % 2 == 0 and size > 4:
            down += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.SiLU()]
            c_up = c_in if up else width
            up = [nn.Upsample(scale_factor=2), nn.Conv2d(c_out, c_up, 3, padding=1), nn.SiLU(), *up]
            size, c_in, c_out = size // 2, c_out, min(2 * c_out, 4 * width)
        flat, hidden = c_in * size * size, 16 * width
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, hidden), nn.SiLU(),
                                     nn.Linear(hidden, 2 * z_dim))
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.SiLU(), nn.Linear(hidden, flat), nn.SiLU(),
                                     nn.Unflatten(1, (c_in, size, size)), *up,
                                     nn.Conv2d(width if up else channels, channels, 3, padding=1), nn.Tanh())
        for layer in self.modules():    # from PyTorch's smaller weights some seeds never use the whole code
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def encode(self, x):
        """Images [B, C, S, S] -> mu, logvar of q(z|x), each [B, z_dim]."""
        mu, logvar = self.encoder(x).to(x.dtype).chunk(2, dim=1)
        return mu, logvar.clamp(-20, 20)    # beyond that exp() drowns the rest of the loss

    def decode(self, z):
        """Latents [B, z_dim] -> x_hat [B, C, S, S] in [-1, 1]."""
        return self.decoder(z).to(z.dtype)

    def loss(self, x, kl_weight=1.0):
        """Images [B, C, S, S] -> L, its squared error and its KL: scalars, in nats an image."""
        mu, logvar = self.encode(x)
        x_hat = self.decode(mu + (0.5 * logvar).exp() * torch.randn_like(mu))
        error = ((x - x_hat) / 2).square().flatten(1).sum(1).mean()
        kl = self.kl(mu, logvar).mean()
        return error + kl_weight * kl, error, kl

    def kl(self, mu, logvar):
        """KL(q(z|x) || p(z)) [B] in nats, from mu and logvar [B, z_dim] (arXiv 1312.6114, appendix B)."""
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


# --------------------------------------------------------------------------------------------------------
# 4 Diffusion: noising and denoising, for any network
# --------------------------------------------------------------------------------------------------------

def timesteps_for(timesteps, steps, spacing="trailing"):
    """The n = `steps` timesteps to keep of 0..T-1, T = `timesteps`: a long tensor [n], strictly increasing.

        uniform   i T // n                              ("linear" in arXiv 2010.02502, appendix D.2)
        quad      max(i, int(0.8 T (i / (n - 1))^2))    ("quadratic" there)
        trailing  (i + 1) T // n - 1                    alone starts at T - 1, where x_T ~ N(0, I) is true

    n = 1 is [T - 1] in each. Raises ValueError for n outside 1..T and for an unknown spacing.
    """
    T, n = timesteps, steps
    if not 1 <= n <= T:
        raise ValueError(f"steps must be from 1 to {T}, the timesteps, not {n}")
    rules = dict(uniform=lambda i: i * T // n, quad=lambda i: max(i, int(0.8 * T * (i / (n - 1)) ** 2)),
                 trailing=lambda i: (i + 1) * T // n - 1)
    if spacing not in rules:
        raise ValueError(f"spacing must be uniform, quad or trailing, not {spacing!r}")
    return torch.tensor([rules[spacing if n > 1 else "trailing"](i) for i in range(n)])


class GaussianDiffusion:
    """Images into noise and back (DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502), for any network.

    t runs 0..T-1; index -1 is the clean image, with a_{-1} = 1. With a_t = prod_{s <= t} (1 - beta_s),

        x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps + shift,    eps ~ N(0, I)

    where `shift` is 0 in DiffuseVAE's formulation 1 and x_hat in formulation 2, which ends in N(x_hat, I).
    Everything is done in y_t = x_t - shift. The contract: x_t carries the shift for t >= 0, the clean image
    never does; noise is handed in and returned as y_T, standard normal. Tensors are [B, ...] of any shape.

    `model` is any callable (x_t, t) -> prediction, t long [B] in 0..T-1; it predicts eps, or
    v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (arXiv 2202.00512). Raises ValueError for betas outside (0, 1),
    unknown names, and sqrt(a_{T-1}) > 0.1, where too much of the image is left in x_T to start from noise.
    """

    def __init__(self, timesteps=1000, beta_start=1e-4, beta_end=0.02, schedule="linear", predict="eps"):
        T, f64 = timesteps, torch.float64
        if schedule == "linear":
            beta = torch.linspace(beta_start, beta_end, T, dtype=f64)
        elif schedule == "geometric":
            beta = torch.logspace(math.log10(beta_start), math.log10(beta_end), T, dtype=f64)
        elif schedule == "cosine":    # arXiv 2102.09672, equation 17; beta_start and beta_end play no part
            f = ((torch.arange(T + 1, dtype=f64) / T + 0.008) / 1.008 * math.pi / 2).cos().square()
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule must be linear, cosine or geometric, not {schedule!r}")
        if not 0 < beta.min() <= beta.max() < 1:
            raise ValueError(f"betas must lie between 0 and 1, not reach from {beta_start} to {beta_end}")
        if predict not in ("eps", "v"):
            raise ValueError(f"predict must be eps or v, not {predict!r}")
        self.timesteps, self.predict, self._tables = T, predict, {}
        self.alpha_bar = torch.cat([(1 - beta).cumprod(0), torch.ones(1, dtype=f64)])    # [T + 1]
        if (left := self.alpha_bar[T - 1].sqrt()) > 0.1:
            raise ValueError(f"the {schedule} schedule leaves {left:.2f} of the image in x_T, over the 0.10 "
                             "that sampling from noise bears: take more timesteps or larger betas")

    def _signal_noise(self, t, like):
        """sqrt(a_t), sqrt(1 - a_t) for t [B], each [B, 1, ...] like `like`; from float64, cast once."""
        key = like.device, like.dtype
        if key not in self._tables:
            table = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
            self._tables[key] = table.to(like.dtype).to(like.device)
        return self._tables[key][:, t].reshape(2, -1, *[1] * (like.dim() - 1))

    def q_sample(self, x0, t, noise, shift=0):
        """x_t ~ q(x_t | x_0), [B, ...], from x0 and noise [B, ...], t [B] (arXiv 2006.11239, equation 4)."""
        signal, sigma = self._signal_noise(t, x0)
        return signal * x0 + sigma * noise + shift

    def target(self, x0, t, noise):
        """What the network is to predict at q_sample(x0, t, noise): eps or v, [B, ...]."""
        signal, sigma = self._signal_noise(t, x0)
        return noise if self.predict == "eps" else signal * noise - sigma * x0

    def predict_x0(self, x_t, t, out, shift=0):
        """x_0 and eps, both [B, ...], from the network's output at x_t, t [B]."""
        signal, sigma = self._signal_noise(t, x_t)
        y = x_t - shift
        if self.predict == "eps":
            return (y - sigma * out) / signal, out
        return signal * y - sigma * out, sigma * y + signal * out

    def q_posterior(self, x0, x_t, t, s=None, shift=0):
        """q(x_s | x_t, x_0) -> mean [B, ...], variance [B, 1, ...] (arXiv 2006.11239, equations 6 and 7).

        t and s < t are ints or long [B]; s, the previous kept step, is t - 1 by default, -1 the clean image.
        """
        t = torch.as_tensor(t).cpu().reshape(-1)
        s = t - 1 if s is None else torch.as_tensor(s).cpu().reshape(-1)
        a_t, a_s = self.alpha_bar[t], self.alpha_bar[s]
        b = 1 - a_t / a_s    # beta of the jump from s to t
        rows = torch.stack([b * a_s.sqrt() / (1 - a_t), (1 - b).sqrt() * (1 - a_s) / (1 - a_t),
                            b * (1 - a_s) / (1 - a_t), (s >= 0).double()])
        rows = rows.to(x_t.dtype).to(x_t.device).reshape(4, -1, *[1] * (x_t.dim() - 1))
        of_x0, of_y, variance, noisy = rows
        return of_x0 * x0 + of_y * (x_t - shift) + noisy * shift, variance

    @torch.no_grad()
    def trajectory(self, model, y_T, steps, eta=0.0, spacing="trailing", shift=0, clip=True, variance="small",
                   generator=None):
        """Denoise y_T [B, ...] step by step; yields s, x_s, predicted x_0 (arXiv 2010.02502, equation 12).

            y_s = sqrt(a_s) x_0 + sqrt(1 - a_s - sigma^2) eps + sigma noise
            sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)

        eta = 0 is DDIM, eta = 1 ancestral sampling, with the posterior's variance or (large) beta_t, sound
        only if no step is skipped. `clip` keeps x_0 in [-1, 1], eps following. The last step adds no noise.
        `generator`: see `randn`. Raises ValueError for eta outside [0, 1] and an unsound large variance.
        """
        kept = timesteps_for(self.timesteps, steps, spacing).tolist()
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 (DDIM) to 1 (ancestral sampling), not {eta}")
        if variance not in ("small", "large") or variance == "large" and (eta < 1 or steps < self.timesteps):
            raise ValueError(f"variance must be small, or large with eta 1 and all {self.timesteps} steps")
        x = y_T + shift
        for t, s in zip(reversed(kept), reversed([-1] + kept[:-1])):
            a_t, a_s = self.alpha_bar[t].item(), self.alpha_bar[s].item()
            t = torch.full((len(x),), t, device=x.device)
            x0, eps = self.predict_x0(x, t, model(x, t), shift)
            if clip:
                x0 = x0.clamp(-1, 1)
                eps = (x - shift - a_t**0.5 * x0) / (1 - a_t) ** 0.5
            sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5
            x = a_s**0.5 * x0 + max(0.0, 1 - a_s - sigma**2) ** 0.5 * eps
            if s >= 0:
                spread = (1 - a_t / a_s) ** 0.5 if variance == "large" else sigma
                x = x + shift + (spread * randn(x.shape, x, generator) if spread else 0)
            yield s, x, x0

    def sample(self, model, y_T, steps, eta=0.0, **options):
        """Noise y_T [B, ...] -> clean x_0 [B, ...]: the end of `trajectory`, whose options these are."""
        for _, x, _ in self.trajectory(model, y_T, steps, eta, **options):
            pass
        return x

    @torch.no_grad()
    def invert(self, model, x0, steps, spacing="trailing", shift=0, iterations=5):
        """The y_T [B, ...] from which DDIM (eta = 0, clip=False, the same steps) returns x0 [B, ...].

        A DDIM step from t to s solved for y_t is implicit, for eps is that at the unknown y_t:

            y_t = sqrt(a_t / a_s) y_s + (sqrt(1 - a_t) - sqrt(a_t / a_s) sqrt(1 - a_s)) eps(y_t, t)

        Fixed-point iterations from y_s solve it; one of them is the customary, inexact inversion.
        """
        y, a_s = x0, 1.0
        for t in timesteps_for(self.timesteps, steps, spacing).tolist():
            a_t, y_s = self.alpha_bar[t].item(), y
            ratio, t = (a_t / a_s) ** 0.5, torch.full((len(y),), t, device=y.device)
            for _ in range(iterations):
                eps = self.predict_x0(y + shift, t, model(y + shift, t), shift)[1]
                y = ratio * y_s + ((1 - a_t) ** 0.5 - ratio * (1 - a_s) ** 0.5) * eps
            a_s = a_t
        return y

    @torch.no_grad()
    def bits_per_dim(self, model, x0, shift=0, generator=None, progress=None):
        """The variational bound on -log2 p(x_0) per dimension, term by term (arXiv 2006.11239, section 3.3).

            L_T = KL(q(x_T|x_0) || p(x_T)),    L_t = sum over t >= 1 of KL(q(x_s|x_t, x_0) || p(x_s|x_t))

        and L_0, a Gaussian discretised to the 256 grey levels of x0 [B, ...]. p has the posterior's variance,
        at t = 0 that of t = 1, and its mean at the predicted, clipped x_0. Takes T calls of the model, with
        progress(t) after each. Returns L_T, L_t, L_0 and their sum `total` in bits, each [B].
        """
        bits = lambda nats: nats.flatten(1).mean(1) / math.log(2)
        a_T = self.alpha_bar[self.timesteps - 1].item()
        terms = dict(L_T=bits(0.5 * (a_T * x0.square() - a_T - math.log1p(-a_T))), L_t=0)
        for i in reversed(range(self.timesteps)):
            t = torch.full((len(x0),), i, device=x0.device)
            x_t = self.q_sample(x0, t, randn(x0.shape, x0, generator), shift)
            guess = self.predict_x0(x_t, t, model(x_t, t), shift)[0].clamp(-1, 1)
            if i > 0:    # two Gaussians of one variance
                (mean, variance), (other, _) = (self.q_posterior(x, x_t, i, shift=shift) for x in (x0, guess))
                terms["L_t"] = terms["L_t"] + bits((mean - other).square() / (2 * variance))
            else:
                width = (2 * self.q_posterior(x0, x_t, 1)[1]).sqrt()
                below = lambda edge: 0.5 * torch.erfc((guess - edge) / width)    # the mass below an edge
                upper = torch.where(x0 > 0.999, 1.0, below(x0 + 1 / 255))
                mass = upper - torch.where(x0 < -0.999, 0.0, below(x0 - 1 / 255))
                terms["L_0"] = bits(-mass.clamp(min=1e-12).log())
            if progress:
                progress(i)
        return {**terms, "total": sum(terms.values())}


def randn(shape, like, generator=None):
    """Standard-normal noise of this shape, with the device and dtype of `like`.

    `generator` is None, a torch.Generator, or a list of one for each of the shape[0] images, whose noise then
    does not depend on what else is in the batch.
    """
    if isinstance(generator, (list, tuple)):
        return torch.stack([randn(shape[1:], like, g) for g in generator])
    device = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


# --------------------------------------------------------------------------------------------------------
# 5 U-Net: the network that denoises
# --------------------------------------------------------------------------------------------------------

class UNet(nn.Module):
    """DDPM's U-Net (arXiv 2006.11239, appendix B) with x_hat beside x_t at its input and z, if any, beside t.

    `mults` times `width` are the channels at image_size, image_size / 2, ...; `attention` lists RESOLUTIONS
    that attend (16 means the 16x16 maps; None is 16, or the smallest maps where 16 never occurs); the middle
    always does. Raises ValueError if the image cannot be halved so often, a resolution never occurs, or the
    heads do not divide the channels.
    """

    def __init__(self, image_size, channels=3, cond_channels=0, width=128, mults=(1, 2, 2, 2), res_blocks=2,
                 attention=None, heads=8, dropout=0.0, z_dim=0):
        super().__init__()
        if image_size % 2 ** (len(mults) - 1):
            raise ValueError(f"image_size {image_size} cannot be halved {len(mults) - 1} times: take a "
                             f"multiple of {2 ** (len(mults) - 1)}, or fewer unet_mults")
        sizes = [image_size >> i for i in range(len(mults))]
        attention = attention if attention is not None else (16,) if 16 in sizes else sizes[-1:]
        for size in set(attention) - set(sizes):
            raise ValueError(f"attention at {size} never occurs: the maps are {', '.join(map(str, sizes))}")
        for m, size in zip(mults, sizes):
            if (size in attention or size == sizes[-1]) and width * m % heads:
                raise ValueError(f"heads must divide the {width * m} channels at {size}, {heads} does not")
        emb, c, skips, self.width, self.cond_channels = 4 * width, width, [width], width, cond_channels
        self.embed_t = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.embed_z = nn.Linear(z_dim, emb) if z_dim else None
        self.first = nn.Conv2d(channels + cond_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for m, size in zip(mults, sizes):
            for _ in range(res_blocks):
                self.down.append(Block(c, width * m, emb, dropout, heads if size in attention else 0))
                skips.append(c := width * m)
            if size > sizes[-1]:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([Block(c, c, emb, dropout, heads), Block(c, c, emb, dropout)])
        for m, size in zip(reversed(mults), reversed(sizes)):
            for _ in range(res_blocks + 1):
                c, c_in = width * m, c + skips.pop()
                self.up.append(Block(c_in, c, emb, dropout, heads if size in attention else 0))
            if size < sizes[0]:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.last = nn.Sequential(group_norm(c), nn.SiLU(), zeroed(nn.Conv2d(c, channels, 3, padding=1)))

    def forward(self, x_t, t, x_hat=None, z=None):
        """x_t [B, C, S, S], t [B], x_hat [B, cond_channels, S, S], z [B, z_dim] -> prediction like x_t."""
        half = torch.arange(self.width // 2, device=t.device) / (self.width // 2)
        angle = t[:, None] * torch.exp(-math.log(10_000) * half)    # [B, width // 2]
        waves = F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, self.width % 2)).to(x_t.dtype)
        emb = self.embed_t(waves)
        emb = F.silu(emb if self.embed_z is None else emb + self.embed_z(z))    # [B, 4 width]
        h = self.first(torch.cat([x_t, x_hat], dim=1) if self.cond_channels else x_t)
        skips = [h]
        for layer in self.down:
            skips.append(h := layer(h, emb) if isinstance(layer, Block) else layer(h))
        for block in self.middle:
            h = block(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(layer, Block) else layer(h)
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
        self.heads, self.norm = heads, group_norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        h = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))    # [B, heads, H * W, C / heads]
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))


def group_norm(channels):
    """GroupNorm with up to 32 groups of at least four channels each, for any number of channels."""
    return nn.GroupNorm(max(1, math.gcd(channels, 128) // 4), channels)


def zeroed(layer):
    """The layer with all parameters at zero, so that the residual branch it ends starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# --------------------------------------------------------------------------------------------------------
# 6 Mixture: a density fitted to the latents, a better prior to draw from than N(0, I)
# --------------------------------------------------------------------------------------------------------

class GaussianMixture:
    """Gaussians with full covariances, fitted by EM: ex-post density estimation (arXiv 1903.12436).

    After `fit`: weights [K], means [K, D] and chol [K, D, D], the Cholesky factors of the covariances.
    """

    def __init__(self, components):
        self.components = components

    def fit(self, z, iterations=100, tolerance=1e-4, generator=None):
        """Points z [N, D] -> self; ends when an iteration gains less than `tolerance` nats a point.

        `history` keeps the mean log-likelihood of each iteration. Raises ValueError for fewer points than
        components and for points that are not finite.
        """
        N, K = len(z), self.components
        if N < K or not z.isfinite().all():
            raise ValueError(f"gmm_components {K} needs as many points, all finite, not {N}: take fewer")
        centres, nearest = z[:0], torch.ones_like(z[:, 0])
        for i in range(K):    # greedy k-means++: of a few points far from all centres the one that helps most
            far = torch.multinomial((nearest + 1e-12).cpu(), 2 + int(math.log(K)), True, generator=generator)
            gaps = torch.cdist(z[far.to(z.device)], z).square()    # [trials, N]
            gaps = torch.minimum(gaps, nearest) if i else gaps
            best = gaps.sum(1).argmin()
            centres, nearest = torch.cat([centres, z[far[best.cpu()]][None]]), gaps[best]
        resp = F.one_hot(torch.cdist(z, centres).argmin(1), K).to(z)    # responsibilities [N, K]
        floor = (1e-6 * z.var(0, unbiased=False).mean() + 1e-9) * torch.eye(z.shape[1]).to(z)
        self.history = []
        while len(self.history) < iterations:
            mass = resp.sum(0) + 1e-9
            self.weights, self.means = mass / mass.sum(), resp.T @ z / mass[:, None]
            covs = []
            for r, m, n in zip(resp.T, self.means, mass):
                near = (r > 1e-12).nonzero()[:, 0]    # the rest adds nothing, and is most of the points
                y = (z[near] - m) * r[near, None].sqrt()
                covs.append(y.T @ y / n)
            self.chol = torch.linalg.cholesky(torch.stack(covs) + floor)
            joint = self._joint(z)
            self.history.append(joint.logsumexp(1).mean().item())
            if len(self.history) > 1 and self.history[-1] < self.history[-2] + tolerance:
                break
            resp = joint.softmax(1)
        return self

    def _joint(self, z):
        """log(weight times density) of each component at z [N, D] -> [N, K]."""
        inverse = torch.linalg.solve_triangular(self.chol, torch.eye(z.shape[1]).to(z), upper=False)
        whitened = (torch.addmm(-p @ m, z, p.T) for p, m in zip(inverse, self.means))    # each [N, D]
        square = torch.stack([torch.linalg.vector_norm(w, dim=1).square() for w in whitened], dim=1)
        logdet = self.chol.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.weights.log() - logdet - 0.5 * (square + z.shape[1] * math.log(2 * math.pi))

    def log_prob(self, z):
        """Points z [N, D] -> log-density [N], in nats."""
        return self._joint(z).logsumexp(1)

    def sample(self, n, generator=None):
        """n draws [n, D], components in random order; `generator` as in `randn`."""
        e = randn((n, 1 + self.means.shape[1]), self.means, generator)
        u = 0.5 * torch.erfc(e[:, 0] / 2**0.5)    # uniform: the distribution function at a normal draw
        k = torch.searchsorted(self.weights.cumsum(0), u).clamp(max=self.components - 1)
        return self.means[k] + (self.chol[k] @ e[:, 1:, None])[:, :, 0]


# --------------------------------------------------------------------------------------------------------
# 7 DiffuseVAE: p(z) p(x|z), a standard normal and a DDPM that sees x_hat = decode(z)
# --------------------------------------------------------------------------------------------------------

class DiffuseVAE(nn.Module):
    """Both models joined (DiffuseVAE, section 3): `vae` (None without one), `unet`, `diffusion`, `config`.

    Images are [N, C, S, S] in [-1, 1], latents z [N, z_dim], noise x_T ~ N(0, I) like the images; formulation
    2 adds x_hat to it by itself. Keywords named like sampling options of Config override them for one call,
    as in `model.decode(z, steps=10, eta=1.0)`, and raise its ValueErrors. `generator`: see `randn`.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        plain = c.formulation == "none"
        self.vae = None if plain else VAE(c.image_size, c.channels, c.z_dim, c.vae_width)
        self.unet = UNet(c.image_size, c.channels, 0 if plain else c.channels, c.unet_width, c.unet_mults,
                         c.res_blocks, c.attention, c.heads, c.dropout, c.z_dim if c.z_cond else 0)
        ends = (1e-4, 0.05 if c.schedule == "geometric" else 0.02)    # of beta, for T = 1000
        betas = (min(0.999, b * 1000 / c.timesteps) for b in ends)
        self.diffusion = GaussianDiffusion(c.timesteps, *betas, c.schedule, c.predict)
        self.mixture = None    # the fitted prior, once --prior gmm needs it

    @classmethod
    def load(cls, run_dir, device="auto"):
        """A trained model from its run folder, ready to use. ValueError if it is missing or damaged."""
        model = cls(Config.preset(**read_options(run_dir), run_dir=str(run_dir)))
        if model.vae:
            model.vae.load_state_dict(load_checkpoint(run_dir, "vae", model)["model"])
        model.unet.load_state_dict(load_checkpoint(run_dir, "ddpm", model)["ema"])
        return model.to(find_device(device), memory_format=torch.channels_last).eval().requires_grad_(False)

    def loss(self, x, unet=None):
        """Stage 2: mean squared error of the predicted eps or v on images x [B, C, S, S], a scalar.

        z ~ q(z|x) is drawn afresh; t is spread evenly over the batch, for a steadier loss (2107.00630, I.1).
        """
        z, x_hat = self.draft(x)
        u = (torch.rand(1, device=x.device) + torch.arange(len(x), device=x.device) / len(x)) % 1
        t, noise = (u * self.config.timesteps).long(), randn(x.shape, x)    # t [B]
        x_t = self.diffusion.q_sample(x, t, noise, self.shift(x_hat))
        return F.mse_loss(self.denoiser(x_hat, z, unet)(x_t, t), self.diffusion.target(x, t, noise))

    @torch.no_grad()
    def draft(self, x, generator=None):
        """z ~ q(z|x) and its x_hat, what stage 2 is shown of images x; None and None without a VAE."""
        if not self.vae:
            return None, None
        z = self.encode(x, True, generator)
        return z, self.vae.decode(z)

    def denoiser(self, x_hat=None, z=None, unet=None):
        """The U-Net (or another `unet`), given x_hat and z, as GaussianDiffusion's (x_t, t) -> prediction."""
        z = (self.encode(x_hat) if z is None else z) if self.config.z_cond else None
        return lambda x_t, t: (unet or self.unet)(x_t, t, x_hat, z).to(x_t.dtype)

    def shift(self, x_hat):
        """What x_t carries besides signal and noise: x_hat in formulation 2, else nothing."""
        return x_hat if self.config.formulation == "2" else 0

    def latents(self, n, generator=None, **options):
        """n latents [n, z_dim] of the prior: N(0, I), or the mixture. Without a VAE they are [n, 0]."""
        like, c = next(self.parameters()), dataclasses.replace(self.config, **options)
        if c.prior == "gmm":
            return self.mixture.sample(n, generator).to(like)
        return randn((n, c.z_dim if self.vae else 0), like, generator)

    def noise(self, n, generator=None, **options):
        """n times x_T [n, C, S, S], N(0, I) times the temperature."""
        c, like = dataclasses.replace(self.config, **options), next(self.parameters())
        return c.temperature * randn((n, c.channels, c.image_size, c.image_size), like, generator)

    @torch.no_grad()
    def encode(self, x, draw=False, generator=None):
        """Images -> latents: the means of q(z|x), or draws from it. ValueError without a VAE."""
        if not self.vae:
            raise ValueError("formulation none has no VAE, and so no latents")
        mu, logvar = self.vae.encode(x)
        return mu + (0.5 * logvar).exp() * randn(mu.shape, mu, generator) if draw else mu

    def encode_all(self, images, draw=False, generator=None):
        """`encode` of uint8 images [N, C, S, S] on any device, 500 at a time -> [N, z_dim]."""
        device = next(self.parameters()).device
        return torch.cat([self.encode(to_float(x.to(device)), draw, generator) for x in images.split(500)])

    @torch.no_grad()
    def decode(self, z, x_T=None, generator=None, **options):
        """Latents -> images: the VAE draws x_hat, the DDPM refines it from x_T, or from fresh noise."""
        return self.refine(self.vae.decode(z) if self.vae else None, x_T, z, generator, **options)

    @torch.no_grad()
    def refine(self, x_hat, x_T=None, z=None, generator=None, **options):
        """Blurry images, the VAE's or others -> refined. Without a VAE x_hat is None and len(z) counts."""
        c = dataclasses.replace(self.config, **options)
        if c.cond_noise:
            x_hat = x_hat + c.cond_noise * randn(x_hat.shape, x_hat, generator)
        if x_T is None:
            x_T = self.noise(len(z if x_hat is None else x_hat), generator, **options)
        return self.diffusion.sample(self.denoiser(x_hat, z), x_T, c.steps, c.eta, spacing=c.spacing,
                                     shift=self.shift(x_hat), variance=c.variance, generator=generator)

    def sample(self, n, generator=None, **options):
        """n new images."""
        return self.decode(self.latents(n, generator, **options), None, generator, **options)

    @torch.no_grad()
    def invert(self, x, **options):
        """Images -> latents z and the noise x_T for which decode(z, x_T, eta=0.0) returns the images."""
        c, z = dataclasses.replace(self.config, **options), self.encode(x)
        x_hat = self.vae.decode(z)
        return z, self.diffusion.invert(self.denoiser(x_hat, z), x, c.steps, c.spacing, self.shift(x_hat))

    def reconstruct(self, x, invert=False, generator=None, **options):
        """Images -> latents -> images, with the x_T of `invert`, or one from the forward process q(x_T|x)."""
        if invert:
            return self.decode(*self.invert(x, **options), **{**options, "eta": 0.0})
        last = torch.full((len(x),), self.config.timesteps - 1, device=x.device)
        x_T = self.diffusion.q_sample(x, last, randn(x.shape, x, generator))
        return self.decode(self.encode(x), x_T, generator, **options)

    def interpolate(self, x, n=9, along="both", generator=None, **options):
        """Two images [2, C, S, S] -> n from one to the other, by `path` between their latents and noises."""
        z, x_T = self.path(*self.invert(x, **options), n, along)
        return self.decode(z, x_T, generator, **{**options, "eta": 0.0})

    def path(self, z, x_T, n=9, along="both"):
        """Between two latents [2, z_dim] and noises [2, C, S, S]: n of each, to be decoded together.

        Latents move on a line, noises on an arc, which keeps their norm; along "z" or "x_T" the other stays.
        """
        w = torch.linspace(0, 1, n, device=z.device)
        v, w = (w * (along != "x_T"))[:, None], (w * (along != "z"))[:, None, None, None]
        angle = F.cosine_similarity(*x_T.flatten(1), dim=0).clamp(-0.9999, 0.9999).acos()
        arc = (((1 - w) * angle).sin() * x_T[0] + (w * angle).sin() * x_T[1]) / angle.sin()
        return z[0] + v * (z[1] - z[0]), arc

    @torch.no_grad()
    def bits_per_dim(self, x, generator=None, progress=None):
        """The bound on -log2 p(x) per dimension of the joint model: that of GaussianDiffusion, and KL of z.

        One z ~ q(z|x) an image, T network calls. Returns KL, L_T, L_t, L_0 and `total` in bits, each [N].
        """
        z, x_hat = self.draft(x, generator)
        denoiser, shift = self.denoiser(x_hat, z), self.shift(x_hat)
        terms = self.diffusion.bits_per_dim(denoiser, x, shift, generator, progress)
        kl = self.vae.kl(*self.vae.encode(x)) if self.vae else torch.zeros(len(x), device=x.device)
        kl = kl / (math.log(2) * x[0].numel())
        return {"KL": kl, **terms, "total": kl + terms["total"]}

    def fit_mixture(self, images, components):
        """Fit the prior gmm to a draw from q(z|x) for each of uint8 images [N, C, S, S], in float64."""
        g = torch.Generator().manual_seed(self.config.seed)
        z = self.encode_all(images, True, g)
        z = (z.cpu() if z.is_mps else z).double()    # MPS has no float64
        self.mixture = GaussianMixture(components).fit(z, generator=g)


# --------------------------------------------------------------------------------------------------------
# 8 Training: first the VAE, then the U-Net with the VAE frozen
# --------------------------------------------------------------------------------------------------------

FORMAT = 2    # of checkpoints and config.json
VAE_OPTIONS = ("dataset", "image_size", "z_dim", "vae_width", "kl_weight")    # what a vae.pt is bound to
LOG_COLUMNS = ("stage", "step", "loss", "recon", "kl", "lr", "images_per_s")


def train(model, stage, images, run_dir=None, stop=lambda: False):
    """Train model.vae (stage "vae") or model.unet ("ddpm") on uint8 images [N, C, S, S]; yields metrics.

    Every `log_every` updates it yields a dict of LOG_COLUMNS; model.unet then holds the moving average (EMA),
    ready to sample. With `run_dir` it keeps a checkpoint and log.csv there and goes on from what it finds.
    The randomness of a step follows from (seed, stage, step), so a run in pieces is a run in one. When
    `stop()` is true after a step it saves and ends. Raises ValueError, leaving the last checkpoint, if a loss
    or a weight is not finite.
    """
    c, is_vae, device = model.config, stage == "vae", next(model.parameters()).device
    plan = (c.vae_steps, c.vae_batch, c.vae_lr) if is_vae else (c.ddpm_steps, c.batch_size, c.lr)
    net = model.vae if is_vae else copy.deepcopy(model.unet)
    model.eval().requires_grad_(False)
    net.train().requires_grad_(True)
    params, averages = list(net.parameters()), list(model.unet.parameters())
    optimizer, done, pending = torch.optim.Adam(params, fused=True), 0, []
    if run_dir and Path(run_dir, f"{stage}.pt").exists():
        state = load_checkpoint(run_dir, stage, model)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        model.unet.load_state_dict(state.get("ema", model.unet.state_dict()))
        done, pending = state["step"], list(state["pending"].to(device))
    if run_dir:
        rewind_log(run_dir, stage, done)
    bf16 = in_bf16(c, device)
    objective = (lambda x: net.loss(x, c.kl_weight)) if is_vae else lambda x: (model.loss(x, net),)
    if c.compile == "on" or c.compile == "auto" and device.type == "cuda":
        objective = torch.compile(objective)
    total, batch, peak = plan
    warmup, clock, counted = min(c.warmup, total // 10), time.perf_counter(), done
    while done < total:
        torch.manual_seed(stream(c.seed, stage, done))
        x = to_float(images[torch.randint(len(images), (batch,), device=images.device)].to(device))
        if c.hflip:
            x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, done - warmup) / (total - warmup))
        rate = peak * min(1, (done + 1) / (warmup + 1)) * (cosine if c.lr_decay == "cosine" else 1)
        optimizer.param_groups[0]["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = objective(x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        terms[0].backward()
        if c.grad_clip and not is_vae:
            nn.utils.clip_grad_norm_(params, c.grad_clip)
        optimizer.step()
        if not is_vae:    # the average's memory grows with the run, so that the first weights do not linger
            decay = min(c.ema, (1 + done) / (10 + done))
            torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - decay)
        pending.append(torch.stack(terms).detach())    # on the device until logged: no step waits for it
        done, stopping = done + 1, bool(stop())    # once: a signal may come at any time
        logging, saving = (done % every == 0 or done == total for every in (c.log_every, c.save_every))
        if logging or saving or stopping:
            losses = torch.stack(pending)    # [steps since the last row, terms]
            bad = (~losses.isfinite().all(1)).nonzero().flatten().tolist()
            if bad or not all(p.isfinite().all() for p in params):
                at = done - len(losses) + 1 + bad[0] if bad else done
                raise ValueError(f"the {'loss' if bad else 'network'} of stage {stage} is not finite at step "
                                 f"{at}; the last checkpoint is kept: lower --{'vae-lr' if is_vae else 'lr'}")
        if logging:
            speed, pending = (done - counted) * batch / (time.perf_counter() - clock), []
            row = {"stage": stage, "step": done, "lr": rate, "images_per_s": speed}
            row |= zip(LOG_COLUMNS[2:], losses.mean(0).tolist())
            if run_dir:
                append_log(run_dir, row)
        if run_dir and (saving or stopping):
            state = dict(step=done, model=net.state_dict(), optimizer=optimizer.state_dict(),
                         pending=torch.stack(pending).cpu() if pending else torch.zeros(0))
            if not is_vae:
                state |= dict(ema=model.unet.state_dict(), vae=checksum(model.vae and model.vae.state_dict()))
            save_checkpoint(run_dir, stage, c, state)
        if logging:
            yield row
            clock, counted = time.perf_counter(), done    # the caller's time is not the training's
        if stopping:
            return


def in_bf16(config, device):
    """Whether the networks run under bf16 autocast in training."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16" or config.precision == "auto" and native


def stream(seed, name, index):
    """The seed of one step or image: 32 bits, all that torch's CPU generator heeds."""
    return (zlib.crc32(f"{seed} {name}".encode()) + index * 0x9E3779B1) % 2**32


def checksum(value, crc=0):
    """CRC-32 of nested dictionaries and sequences of tensors and plain values: names, order and content."""
    if isinstance(value, (dict, list, tuple)):
        for item in value.items() if isinstance(value, dict) else value:
            crc = checksum(item, crc)
        return crc
    data = value.cpu().contiguous().numpy() if torch.is_tensor(value) else repr(value).encode()
    return zlib.crc32(data, crc)


def hold(folder):
    """Keep a folder for this process while the returned file is open. Raises ValueError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        import fcntl    # none on Windows, where two processes in one folder go unnoticed
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process works in {folder}: wait, or take another --run-dir") from None
    except (ImportError, OSError):    # some network drives lock nothing
        pass
    return file


def generators(seed, name, indices):
    """A generator of its own for each index, so that an image does not depend on its batch."""
    return [torch.Generator().manual_seed(stream(seed, name, i)) for i in indices]


def save_atomic(path, write):
    """Write a file through write(file) beside its place, flush it, rename it: it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:    # torch.save makes a full disk a RuntimeError
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written and is as it was before: {e}") from None


def save_json(value, path):
    """Write plain values as JSON, whole or not at all."""
    save_atomic(path, lambda f: f.write(json.dumps(value, indent=2).encode()))


def bound_options(config, stage):
    """The options that a checkpoint of this stage is bound to."""
    model = {k: v for k, v in config.group("model").items() if k != "vae_from"}
    return model if stage == "ddpm" else {k: model[k] for k in VAE_OPTIONS}


def refuse_differences(where, has, asked):
    """Raise ValueError that lists the options in which `asked` differs from what `where` `has`."""
    if other := [f"{flag(k)} {has[k]}, not {v}" for k, v in asked.items() if k in has and has[k] != v]:
        raise ValueError(f"{where} has {'; '.join(other)}: leave these out, or take another --run-dir")


def save_checkpoint(run_dir, stage, config, state):
    """Write <stage>.pt: a dictionary of tensors and plain values, and the options they are bound to."""
    state |= dict(format=FORMAT, stage=stage, options=bound_options(config, stage))
    state["checksum"] = checksum(state)
    save_atomic(Path(run_dir, f"{stage}.pt"), partial(torch.save, state))


def load_checkpoint(run_dir, stage, model):
    """What `save_checkpoint` saved, on the CPU, mapped rather than read.

    Raises ValueError if it is missing, damaged, of another version, of another model or of another VAE.
    """
    path = Path(run_dir, f"{stage}.pt")
    if not path.exists():
        raise ValueError(f"there is no {path}: train with --stage {stage} first")
    try:
        with zipfile.ZipFile(path) as archive:    # heeds its checksum, as torch.load does not
            archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        state = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        kind, options = (state["stage"], state["format"]), state["options"]
        whole = kind != (stage, FORMAT) or state.pop("checksum") == checksum(state)
    except Exception as e:    # a damaged archive fails in many ways
        raise ValueError(f"{path} is damaged or no checkpoint ({type(e).__name__}): move it away") from None
    if not whole:
        raise ValueError(f"{path} does not have the content it was saved with: move it away")
    if kind != (stage, FORMAT):
        raise ValueError(f"{path} is of {kind}, not of {(stage, FORMAT)}: move it away")
    refuse_differences(path, options, bound_options(model.config, stage))
    if "vae" in state and state["vae"] != checksum(model.vae and model.vae.state_dict()):
        raise ValueError(f"{path} goes with another VAE than the vae.pt beside it: move one of them away")
    return state


def read_options(run_dir):
    """The options in a run folder's config.json, a dictionary. Raises ValueError if they cannot be read."""
    path = Path(run_dir, "config.json")
    if not path.exists():
        raise ValueError(f"there is no run in {run_dir}: train one first, or name another --run-dir")
    try:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
        if options.pop("format") != FORMAT:
            raise ValueError(f"it is not of version {FORMAT}")
        Config.preset(**options)
        return options
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{path} cannot be used: {e}; restore it, or take another --run-dir") from None


def rewind_log(run_dir, stage, done):
    """Drop the rows of log.csv after a checkpoint's step: those steps are taken again."""
    path = Path(run_dir, "log.csv")
    rows = [r.split(",") for r in path.read_text(errors="replace").splitlines()[1:]] if path.exists() else []
    rows = [r for r in rows if len(r) == len(LOG_COLUMNS) and r[1].isdecimal()]    # whole ones
    rows = [r for r in rows if r[0] != stage or int(r[1]) <= done]
    save_atomic(path, lambda f: f.write("".join(",".join(r) + "\n" for r in [LOG_COLUMNS, *rows]).encode()))


def append_log(run_dir, row):
    """Add a row to log.csv."""
    values = (row.get(name, "") for name in LOG_COLUMNS)
    with open(Path(run_dir, "log.csv"), "a") as f:
        f.write(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values) + "\n")


# --------------------------------------------------------------------------------------------------------
# 9 Pictures: labelled grids and the curves of the log
# --------------------------------------------------------------------------------------------------------

def draw_grids(grids, columns, across=1, rows=(), ticks=()):
    """Labelled grids, `across` side by side: (title, images [N, C, S, S]) pairs -> a matplotlib figure.

    `rows` are the labels of a grid's rows, `ticks` those of the columns, under the lowest grids.
    """
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    down, cell, pitch = -(-len(grids) // across), max(0.4, 3.2 / columns), grids[0][1].shape[-1] + 1
    high = 0.35 + cell * -(-len(grids[0][1]) // columns)
    fig = Figure(figsize=(across * (cell * columns + bool(rows)), down * high), dpi=150, layout="constrained")
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


def draw_curves(run_dir):
    """The losses in log.csv, one plot for each stage -> a matplotlib figure."""
    from matplotlib.figure import Figure
    rows = list(csv.DictReader(Path(run_dir, "log.csv").read_text().splitlines()))
    stages = sorted({r["stage"] for r in rows}, reverse=True)
    fig = Figure(figsize=(4.5 * len(stages), 3.2), dpi=150, layout="constrained")
    for ax, stage in zip(fig.subplots(1, len(stages), squeeze=False)[0], stages):
        rows_here = [r for r in rows if r["stage"] == stage]
        for name in ("loss", "recon", "kl") if stage == "vae" else ("loss",):
            ax.plot([int(r["step"]) for r in rows_here], [float(r[name]) for r in rows_here], label=name)
        title = "VAE: nats an image" if stage == "vae" else "U-Net: mean squared error"
        top = 2.5 * np.median([float(r["loss"]) for r in rows_here])    # the first steps are off the chart
        ax.set(xlabel="step", ylim=(0, top), title=title)
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def save_figure(fig, path):
    """Write a figure as a PNG and say so."""
    save_atomic(path, partial(fig.savefig, format="png", bbox_inches="tight"))
    report(f"wrote {path}")


def save_png(image, path):
    """Write uint8 [C, S, S] as a PNG."""
    from PIL import Image
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    save_atomic(path, partial(Image.fromarray(pixels.numpy()).save, format="PNG"))


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
    if not has[name]:
        raise ValueError(f"--device {name} is not to be had here with this PyTorch: take --device auto")
    return torch.device(name)


def load_split(config, split):
    """The uint8 images [N, C, S, S] of the run's data set."""
    return load_images(config.dataset, config.data_dir, config.image_size, split, config.run_dir)[0]


def gflops(model):
    """GFLOP of one image through the VAE and through the U-Net, 2 FLOP a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode
    c, ghost, counts = model.config, copy.deepcopy(model).to("meta"), []
    x, z = (torch.empty(1, *shape, device="meta") for shape in ([c.channels] + 2 * [c.image_size], [c.z_dim]))
    for call in (lambda: ghost.vae and ghost.vae.loss(x), lambda: ghost.unet(x, z[0, :1], x, z)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops() / 1e9)
    return counts


def settle(given):
    """The options of the command line over the run folder's over the preset -> Config. Raises ValueError."""
    run_dir, source = given.get("run_dir") or f"runs/{given.get('dataset', 'shapes')}", given.get("vae_from")
    old = Path(run_dir, "config.json").exists() or given.get("stage") in TRAINED
    kept = read_options(run_dir) if old else {}
    if source and not old:
        kept = {k: v for k, v in read_options(source).items() if k in (*VAE_OPTIONS, "data_dir")}
    config = Config.preset(**{**kept, **given, "run_dir": run_dir})
    refuse_differences(run_dir if old else source, kept, config.group("model"))
    if idle := [flag(k) for k in given if k in VAE_OPTIONS[2:] and config.formulation == "none"]:
        raise ValueError(f"--formulation none has no VAE for {idle[0]}: leave it out")
    return config


def run(given):
    """Do what the options given on the command line ask for."""
    c = settle(given)
    device, run_dir = find_device(c.device), Path(c.run_dir)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if c.stage in TRAINED:
        model = DiffuseVAE.load(run_dir, device.type)
        model.config = c
        return dict(sample=draw_samples, reconstruct=draw_reconstructions, interpolate=draw_interpolations,
                    traverse=draw_traversals, eval=evaluate)[c.stage](model)
    torch.manual_seed(stream(c.seed, "weights", 0))
    model = DiffuseVAE(c)
    images, costs = load_split(c, "train"), gflops(model)
    plan = [("vae", model.vae, costs[0], c.vae_steps, c.vae_batch)] if model.vae and not c.vae_from else []
    plan += [("ddpm", model.unet, costs[1], c.ddpm_steps, c.batch_size)]
    plan = [row for row in plan if c.stage in (row[0], "all")]
    if not plan:
        raise ValueError(f"--stage {c.stage} finds no VAE to train with --formulation none or --vae-from")
    if c.prior == "gmm" and c.gmm_components > len(images):
        raise ValueError(f"--gmm-components takes 1 to {len(images)}, the images, not {c.gmm_components}")
    steps = {}
    for stage in ("vae", "ddpm")[model.vae is None:]:    # refuse what does not fit before anything is written
        if Path(run_dir, f"{stage}.pt").exists():
            state = load_checkpoint(run_dir, stage, model)
            steps[stage] = state["step"]
            if stage == "vae":
                model.vae.load_state_dict(state["model"])
    if plan[0][0] == "vae" and "ddpm" in steps and steps.get("vae", 0) < c.vae_steps:
        raise ValueError(f"the U-Net in {run_dir} goes with this VAE: to train that on, move ddpm.pt away")
    source = c.vae_from if c.vae_from and "vae" not in steps else run_dir
    if plan[0][0] == "ddpm" and model.vae:
        load_checkpoint(source, "vae", model)
    lock = hold(run_dir)    # until this function ends
    save_json(dict(format=FORMAT, **c.group("model", "training")), run_dir / "config.json")
    if source != run_dir:
        save_atomic(run_dir / "vae.pt", lambda f: f.write(Path(source, "vae.pt").read_bytes()))
    model.to(device, memory_format=torch.channels_last)
    if device.type != "cuda" or images.nbytes < 0.5 * torch.cuda.mem_get_info()[0]:
        images = images.to(device)
    report(f"{c.dataset}: {len(images)} images, {c.image_size}x{c.image_size}, formulation {c.formulation}, "
           f"{device.type} in {'bf16' if in_bf16(c, device) else 'fp32'}, run folder {run_dir}")
    for stage, network, cost, total, batch in plan:
        size = sum(p.numel() for p in network.parameters()) / 1e6
        report(f"{stage}: {size:.2f} M parameters, {cost:.3f} GFLOP an image, {total} steps of {batch}")
    for stage, _, cost, total, batch in plan:
        if stage == "ddpm" and model.vae:
            model.vae.load_state_dict(load_checkpoint(run_dir, "vae", model)["model"])
        caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

        def note(number, _):
            if caught:    # the second time at once: a checkpoint is whole or not there
                raise KeyboardInterrupt(number)
            caught.append(number)

        handlers = [signal.signal(number, note) for number in numbers]
        try:
            for m in train(model, stage, images, run_dir, stop=lambda: caught):
                rate, left = m["images_per_s"], (total - m["step"]) * batch / m["images_per_s"] / 60
                report(f"{stage} {m['step']}/{total}  loss {m['loss']:.4f}  {rate:.0f} images/s  "
                       f"{3e-3 * cost * rate:.3f} TFLOP/s  {left:.1f} min left", passing=m["step"] < total)
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
        if caught:
            report(f"stopped and saved in {run_dir}: the same command goes on from there")
            raise SystemExit(128 + caught[0])
    save_figure(draw_curves(run_dir), run_dir / "curves.png")
    if c.stage == "all":
        draw_samples(model.eval())


def load_mixture(model):
    """Give the model the mixture of --prior gmm, from gmm.pt, or fitted to training latents."""
    c, state = model.config, {}
    if Path(c.run_dir, "gmm.pt").exists():
        state = load_checkpoint(c.run_dir, "gmm", model)["mixture"]
    if state.get("components") != c.gmm_components:
        report(f"fitting a mixture of {c.gmm_components} Gaussians to the training latents")
        model.fit_mixture(load_split(c, "train"), c.gmm_components)
        state = vars(model.mixture)
        save_checkpoint(c.run_dir, "gmm", c, dict(mixture=state, vae=checksum(model.vae.state_dict())))
    model.mixture = GaussianMixture(c.gmm_components)
    vars(model.mixture).update(state)


def draw_samples(model):
    """samples.png (real | VAE | refined) and, with --save-images, each sample as a PNG, in constant memory.

    An image depends on the seed and its index alone, so PNGs that are there need not be drawn again.
    """
    c, run_dir, shown = model.config, Path(model.config.run_dir), min(model.config.num_samples, 64)
    n, folders = c.num_samples if c.save_images else shown, [run_dir / "samples", run_dir / "vae_samples"]
    if c.prior == "gmm":
        load_mixture(model)
    if c.save_images:
        made = {k: v for k, v in c.group("sampling").items() if k not in ("num_samples", "sample_batch")}
        made |= dict(seed=c.seed, unet=checksum(model.unet.state_dict()))
        note, lock = folders[0] / "options.json", hold(folders[0])
        if note.exists() and note.read_text(errors="replace") != json.dumps(made, indent=2):
            raise ValueError(f"{folders[0]} holds samples of other options or another network: move it away")
        save_json(made, note)
    seen, began = [], time.perf_counter()
    with ThreadPoolExecutor() as pool:
        for start in range(0, n, c.sample_batch):
            indices = range(start, min(start + c.sample_batch, n))
            paths = [[folder / f"{i:06}.png" for i in indices] for folder in folders[:1 + bool(model.vae)]]
            if start >= shown and all(path.exists() for path in sum(paths, [])):
                continue
            g = generators(c.seed, "sample", indices)
            z = model.latents(len(g), g)
            with torch.no_grad():
                images = [model.decode(z, generator=g), *([model.vae.decode(z)] if model.vae else [])]
            seen.append([x[:max(0, shown - start)].cpu() for x in images])
            for x, column in zip(images, paths if c.save_images else []):
                list(pool.map(save_png, to_uint8(x).cpu(), column))
            report(f"drew {indices[-1] + 1} of {n} in {time.perf_counter() - began:.1f} s", passing=True)
    labels = (f"{'refined' if model.vae else 'DDPM'}, {c.steps} steps", "VAE")
    panels = list(zip(labels, map(torch.cat, zip(*seen))))
    try:
        panels.append(("real (test set)", to_float(load_split(c, "test")[:shown])))
    except ValueError as e:    # without the data the samples are still worth seeing
        report(f"samples.png has no real images: {e}")
    save_figure(draw_grids(panels[::-1], math.ceil(shown**0.5), len(panels)), run_dir / "samples.png")


def held_out(model, n):
    """The first n test images [n, C, S, S], on the model's device."""
    c, images = model.config, load_split(model.config, "test")
    if not 2 <= n <= len(images):
        raise ValueError(f"--stage {c.stage} takes 2 to {len(images)} images, the test set's, not {n}: "
                         "see --num-samples")
    return to_float(images[:n].to(next(model.parameters()).device))


def in_batches(model, x, compute):
    """Join the dictionaries of tensors [B, ...] that compute(batch of x, generators) returns."""
    c, parts = model.config, []
    for i in range(0, len(x), c.sample_batch):
        batch = x[i:i + c.sample_batch]
        result = compute(batch, generators(c.seed, c.stage, range(i, i + len(batch))))
        parts.append({name: values.cpu() for name, values in result.items()})
        report(f"{c.stage} {i + len(batch)} of {len(x)} images", passing=True)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def mean_and_error(values):
    """Mean and standard error of values [N]."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def draw_reconstructions(model):
    """reconstruct.png: test images, and what their latents give back with each kind of x_T."""
    c, vae = model.config, model.vae
    rows = in_batches(model, held_out(model, c.num_samples), lambda x, g: {
        "test image": x, "VAE": vae.decode(model.encode(x)), "x_T ~ q(x_T|x)": model.reconstruct(x, False, g),
        "x_T by inversion": model.reconstruct(x, True, g)})
    for name in list(rows)[1:]:
        mean, error = mean_and_error((rows[name] - rows["test image"]).square().flatten(1).mean(1))
        report(f"{name:16}  mean squared error {mean:.5f} +- {error:.5f} (of values in [-1, 1])")
    shown = torch.cat([images[:8] for images in rows.values()])
    title = f"reconstructions, {c.steps} steps"
    save_figure(draw_grids([(title, shown)], len(shown) // 4, rows=rows), Path(c.run_dir, "reconstruct.png"))


def draw_interpolations(model):
    """interpolate.png: from one test image or random latent to another: in z, in x_T and in both."""
    c, grids, g = model.config, [], generators(model.config.seed, "interpolate", range(4))
    x = held_out(model, 4)
    if c.prior == "gmm":
        load_mixture(model)
    for k in (slice(0, 2), slice(2, 4)):
        ends = {"test images": model.invert(x[k]),
                "random latents": (model.latents(2, g[k]), model.noise(2, g[k]))}
        for along, words in dict(z="z, x_T fixed", x_T="x_T, z fixed", both="z and x_T").items():
            for name, pair in ends.items():
                z, x_T = model.path(*pair, 9, along)
                refined = model.decode(z, x_T, generators(c.seed, "interpolate", [0] * 9))
                grids.append((f"{name}: {words}", torch.cat([model.vae.decode(z), refined])))
    save_figure(draw_grids(grids, 9, 2, ("VAE", "refined")), Path(c.run_dir, "interpolate.png"))


def draw_traversals(model):
    """traverse.png: along the principal directions of the training set's codes, all from the same noise."""
    c, grids, at = model.config, [], torch.arange(-3, 4)
    codes = model.encode_all(load_split(c, "train")).cpu().double()
    _, spread, directions = torch.linalg.svd(codes - codes.mean(0), full_matrices=False)
    for k in range(min(8, len(spread))):
        step = spread[k] / len(codes) ** 0.5 * directions[k]    # one standard deviation
        z = (codes.mean(0) + at[:, None] * step).to(next(model.parameters()))    # [7, z_dim]
        refined = model.decode(z, generator=generators(c.seed, "traverse", [0] * 7))
        share = spread[k].square() / spread.square().sum().clamp(min=1e-30)    # 0 of 0 for equal images
        title = f"direction {k + 1}, {share:.0%} of the variance"
        grids.append((title, torch.cat([model.vae.decode(z), refined])))
    ticks = [f"{k:+} sd" if k else "mean" for k in at.tolist()]
    save_figure(draw_grids(grids, 7, 2, ("VAE", "refined"), ticks), Path(c.run_dir, "traverse.png"))


def evaluate(model):
    """eval.json: on test images the bound in bits per dimension, term by term, and the VAE's error."""
    c, T, x = model.config, model.config.timesteps, held_out(model, model.config.num_samples)
    cost = len(x) * T * gflops(model)[1] / 1e3
    report(f"the bound of {len(x)} test images takes {T} network calls for each, {cost:.2f} TFLOP in all")

    def terms(x, g):
        left = lambda t: t % -(-T // 10) or report(f"{t} of {T} steps left for this batch", passing=True)
        found = model.bits_per_dim(x, g, left)
        if model.vae:
            found["VAE"] = (model.vae.decode(model.encode(x)) - x).square().flatten(1).mean(1)
        return found

    table = {}
    for name, values in in_batches(model, x, terms).items():
        mean, error = mean_and_error(values)
        unit = "mean squared error of values in [-1, 1]" if name == "VAE" else "bits per dimension"
        report(f"{name:6}{mean:10.5f} +- {error:.5f} {unit}")
        table[name] = dict(mean=mean, standard_error=error)
    save_json(dict(images=len(x), **table), Path(c.run_dir, "eval.json"))


class Parser(argparse.ArgumentParser):
    """argparse that complains in one sentence, by ValueError."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def parse(argv=None):
    """Command line -> dictionary of the options given on it."""
    def numbers(text):    # argparse names it when it complains
        return None if text == "auto" else tuple(int(n) for n in text.split(",") if n != "none")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    groups = {name: parser.add_argument_group(name) for name in ("run", "model", "training", "sampling")}
    for f in dataclasses.fields(Config):
        takes, more = f.metadata["takes"], dict(action=argparse.BooleanOptionalAction)
        if f.type is not bool:
            more = dict(type=numbers if f.type is tuple else f.type,
                        metavar="|".join(takes) if takes and f.type is str else f.type.__name__)
        more |= dict(default=argparse.SUPPRESS, help=f.metadata["help"])
        groups[f.metadata["group"]].add_argument(flag(f.name), **more)
    return vars(parser.parse_args(argv))


def main(argv=None):
    """The command line -> exit code: 0, 2 for what the user can mend, 130 or 143 after Ctrl-C or SIGTERM."""
    def terminate(number, _):
        raise KeyboardInterrupt(number)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        run(parse(argv))
        return 0
    except KeyboardInterrupt as e:
        print("\nstopped: the same command goes on from there", file=sys.stderr)
        return 128 + (e.args[0] if e.args else signal.SIGINT)
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):    # not the user's to mend
            raise
        few = isinstance(e, (MemoryError, RuntimeError))
        why = "memory does not suffice; take smaller batches, images or networks: " * few + str(e)
        print("diffusevae:", why.splitlines()[0] if why else repr(e), file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")    # for names in scripts that the terminal lacks
    sys.exit(main())
