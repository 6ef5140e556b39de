"""Draw the pictures of README.md and RESULTS.md; call it from the root of the repository.

    python assets/pictures.py sampling runs/shapes runs/plain
    python assets/pictures.py samples runs/shapes runs/mnist runs/cifar10-small
    python assets/pictures.py steps runs/shapes runs/plain
    python assets/pictures.py edits runs/shapes
    python assets/pictures.py method runs/shapes
    python assets/pictures.py control runs/mnist    # also needs the packages of kid.py
    python assets/pictures.py quality               # plots the table below

Each writes <command>.png into assets, 8.7 inches wide; `sampling` writes a GIF. Nothing is
selected: samples are the first ones, test images are the first of their kind.
"""
import argparse, sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # where diffusevae.py is
from diffusevae import DiffuseVAE, generators, load_images, to_float, to_uint8

# KID x 1000 after 2, 5, 10 and 50 sampling steps, from the table of RESULTS.md; one row for each
# training run. The plain DDPM has equal total time.
STEPS = (2, 5, 10, 50)
KID = {
    "shapes": {
        "VAE": [344, 146, 364],
        "plain DDPM": [[539, 67, 21, 13], [502, 80, 32, 21], [517, 76, 26, 18]],
        "DiffuseVAE": [[98, 10, 10, 14], [123, 13, 13, 17], [116, 17, 17, 21]]},
    "MNIST": {
        "VAE": [134, 145, 132],
        "plain DDPM": [[552, 124, 81, 64], [675, 125, 84, 63], [601, 130, 93, 70]],
        "DiffuseVAE": [[184, 61, 32, 26], [154, 45, 26, 25], [193, 48, 23, 23]]},
    "CIFAR-10, a quarter of --small": {
        "VAE": [810],
        "plain DDPM": [[981, 481, 289, 237]],
        "DiffuseVAE": [[806, 273, 194, 195]]}}
LINES = {"VAE": ("gray", ":"), "plain DDPM": ("C0", "o-"), "DiffuseVAE": ("C2", "o-")}

def load(run):
    return DiffuseVAE.load(run, "cpu")

def tile(images, columns, padding=1):
    """Images [N, C, S, S] in [-1, 1] -> one picture, a uint8 array [H, W, 3]."""
    grid = make_grid(to_uint8(images), nrow=columns, padding=padding, pad_value=255)
    return grid.permute(1, 2, 0).numpy()

def show(ax, images, columns, labels=(), ticks=()):
    """Show images [N, C, S, S] in a grid; `labels` name its rows, `ticks` its columns."""
    ax.imshow(tile(images, columns), interpolation="nearest")
    pitch = images.shape[3] + 1    # pixels from one image to the next
    ax.set_xticks([(k + 0.5) * pitch for k in range(len(ticks))], ticks, fontsize=10)
    ax.set_yticks([(k + 0.5) * pitch for k in range(len(labels))], labels, fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)

def draw_panels(rows, titles):
    """A figure of grids, six images wide: rows[label][j] is [N, C, S, S], under titles[j]."""
    height = 0.3 + sum(0.15 + 0.37 * len(row[0]) / 6 for row in rows.values())    # inches
    fig = Figure(figsize=(8.7, height), layout="constrained")
    fig.get_layout_engine().set(wspace=0.08)
    axes = fig.subplots(len(rows), len(titles), squeeze=False)
    for i, (label, row) in enumerate(rows.items()):
        axes[i, 0].set_ylabel(label, fontsize=11, rotation=0, ha="right", va="center")
        for ax, images in zip(axes[i], row):
            show(ax, images, 6)
        ax.annotate("", (-0.02, 0.5), (-0.10, 0.5), "axes fraction", annotation_clip=False,
                    arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.5))
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=11)
    return fig

def sampling(run, plain_run, steps=5, columns=4, rows=2):
    """x_hat beside the predicted clean images of DiffuseVAE and a plain DDPM; frames of a GIF.

    The plain DDPM is sampled with order 2, which is better for it in five steps.
    """
    model, plain, n = load(run), load(plain_run), columns * rows
    z = model.sample_prior(n, generators(0, "sample", range(n)))
    noise, x_hat = model.noise(n, generators(0, "noise", range(n))), model.vae.decode(z)
    ours = model.diffusion.trajectory(model.denoiser(x_hat, z), noise, steps)
    theirs = plain.diffusion.trajectory(plain.denoiser(), noise, steps, order=2)
    size, frames = 66 // x_hat.shape[3] * x_hat.shape[3], []    # pixels per image, enlarged
    width, height, margin, font = columns * size, rows * size, 34, ImageFont.load_default(19)
    for k, ((_, _, x), (_, _, y)) in enumerate(zip(ours, theirs), 1):
        panels = {"VAE alone": x_hat, f"DiffuseVAE, step {k} of {steps}": x,
                  f"plain DDPM, step {k} of {steps}": y}
        frame = Image.new("RGB", (3 * width + 30, margin + height), "white")
        for i, (title, images) in enumerate(panels.items()):
            left = i * (width + 15)
            ImageDraw.Draw(frame).text((left, 4), title, "black", font)
            picture = Image.fromarray(tile(images, columns, padding=0))
            frame.paste(picture.resize((width, height), Image.NEAREST), (left, margin))
        frames.append(frame)
    palette = Image.fromarray(np.vstack(frames)).quantize(256, kmeans=3)    # one for all frames
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]

def samples(*runs):
    """Real images, VAE samples and refined samples of each run: the first 18."""
    rows = {}
    for model in map(load, runs):
        c = model.config
        x_hat, x = model.sample_both(18, generators(c.seed, "sample", range(18)), steps=10)
        name = {"mnist": "MNIST", "cifar10": "CIFAR-10"}.get(c.dataset, c.dataset)
        rows[name] = to_float(load_images(c, "test")[0][:18]), x_hat, x
    titles = "real (test set)", r"VAE: $\hat{x}$ = decode(z)", "refined in 10 sampling steps"
    return draw_panels(rows, titles)

def edits(run):
    """Shapes with the difference of two mean codes added to their own, their noise held fixed."""
    model, rows, names = load(run), {}, ("circle", "square", "triangle")
    images, labels = load_images(model.config, "train")
    means = [model.encode(to_float(images[labels == k][:5000])).mean(0) for k in range(3)]
    images, labels = load_images(model.config, "test")
    for old, new in ((0, 1), (1, 2), (2, 0)):
        x = to_float(images[labels == old][:6])
        z, noise = model.invert(x, steps=50)
        z = z + means[new] - means[old]
        refined = model.decode(z, noise, steps=50, order=1)
        rows[f"{names[old]}\nto {names[new]}"] = x, model.vae.decode(z), refined
    return draw_panels(rows, ("test image", "edited code, VAE", "edited code, refined"))

def steps(run, plain_run):
    """The same codes and noise in 1 to 50 sampling steps, beside a plain DDPM of order 2."""
    model, plain, counts = load(run), load(plain_run), (1, 2, 5, 10, 50)
    z = model.sample_prior(4, generators(0, "sample", range(4)))
    noise = model.noise(4, generators(0, "noise", range(4)))
    ours = [model.vae.decode(z), *(model.decode(z, noise, steps=n) for n in counts)]
    theirs = [noise, *(plain.refine(None, noise, steps=n, order=2) for n in counts)]
    fig = Figure(figsize=(8.7, 3.3), layout="constrained")
    left, right = fig.subplots(1, 2)
    for ax, title, first, images in ((left, "DiffuseVAE", r"$\hat{x}$", ours),
                                     (right, "plain DDPM", "noise", theirs)):
        show(ax, torch.stack(images, 1).flatten(0, 1), 6, ticks=[first, "1 step", *counts[1:]])
        ax.set_title(title, fontsize=11)
    return fig

def control(run):
    """Digits generated by label, and the first two test images edited into each digit."""
    from experiments import gaussians, label_mixtures, sample_by_label, transport
    model, digits = load(run), torch.arange(10)
    images, labels = load_images(model.config, "train")
    test, test_labels = load_images(model.config, "test")
    means, roots = gaussians(model.encode(to_float(images[:10_000])), labels[:10_000])
    noise = model.noise(1, generators(0, "control", [0])).expand(10, -1, -1, -1)
    fig = Figure(figsize=(8.7, 2.7), layout="constrained")
    axes = fig.subplots(2, 2, width_ratios=(10, 11))
    for (left, right), size, x, k in zip(axes, (10, 1000), to_float(test).split(1), test_labels):
        both = sample_by_label(model, label_mixtures(model, images, labels, size), digits)
        show(left, torch.cat(both), 10, ["VAE", "refined"], digits.tolist())
        left.set_title(f"generated by label, from {size:,} images of each digit", fontsize=10)
        z = transport(model.encode(x).expand(10, -1), means, roots, k.expand(10), digits)
        both = x, model.vae.decode(z), torch.ones_like(x), model.decode(z, noise, steps=10)
        show(right, torch.cat(both), 11, ticks=["test", *digits.tolist()])
        right.set_title(f"a {k} from the test set, edited into each digit", fontsize=10)
    return fig

def method(run):
    """The two stages, with a test image of the run at every arrow."""
    model = load(run)
    x = to_float(load_images(model.config, "test")[0][3:4])
    z = model.encode(x)
    x_hat, noise = model.vae.decode(z), model.noise(1, generators(2, "method", [0]))
    denoiser = model.denoiser(x_hat, z)
    path = [noise] + [x_s for _, x_s, _ in model.diffusion.trajectory(denoiser, noise, 10)]
    fig = Figure(figsize=(8.7, 3.15))
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 87), ylim=(0, 31.5))    # tenths of an inch
    ax.set_axis_off()

    def place(picture, left, bottom, label, **options):
        ax.imshow(picture, extent=(left, left + 8, bottom, bottom + 8), zorder=2, **options)
        ax.text(left + 4, bottom - 0.6, label, ha="center", va="top", fontsize=10)

    def arrow(start, end, label="", color="black"):
        ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=color, linewidth=1.2))
        ax.text((start[0] + end[0]) / 2, start[1] + 0.8, label, ha="center", fontsize=9)

    ax.text(1, 21.5, "Stage 1\nVAE", fontsize=11, weight="bold", va="center")
    place(tile(x, 1, 0), 10, 17.5, "image $x$")
    arrow((19, 21.5), (29, 21.5), "encoder")
    code = z.reshape(-1, 4).numpy()    # [z_dim / 4, 4]
    place(code, 30, 17.5, f"code $z$, {z.numel()} numbers", cmap="coolwarm", vmin=-2, vmax=2)
    ax.text(34, 29.2, "to generate, sample $z$ from a Gaussian mixture", ha="center", fontsize=10)
    arrow((34, 28.7), (34, 25.9))
    arrow((39, 21.5), (49, 21.5), "decoder")
    place(tile(x_hat, 1, 0), 50, 17.5, r"blurry $\hat{x}$")

    ax.text(1, 6.5, "Stage 2\nDDPM", fontsize=11, weight="bold", va="center")
    place(tile(noise, 1, 0), 10, 2.5, "noise")
    for left, k in zip((26.5, 43, 59.5, 76), (3, 6, 8, 10)):
        label = f"after {k} steps" if k < 10 else "refined image"
        place(tile(path[k], 1, 0), left, 2.5, label)
        arrow((left - 7.5, 6.5), (left - 1, 6.5), "U-Net")
        ax.plot([54, 54, left - 4.25], [14.3, 12.8, 12.8], ":", color="gray", linewidth=1)
        arrow((left - 4.25, 12.8), (left - 4.25, 9.6), color="gray")    # x_hat to every step
    return fig

def quality():
    """KID against the number of sampling steps, one panel for each dataset."""
    fig = Figure(figsize=(8.7, 3.3), layout="constrained")
    for ax, (dataset, curves) in zip(fig.subplots(1, len(KID)), KID.items()):
        ends, place = [], 0
        for name, runs in curves.items():
            color, style = LINES[name]
            runs = torch.tensor(runs, dtype=torch.float64).reshape(len(runs), -1)    # VAE: [1, 1]
            runs = runs.expand(-1, len(STEPS))
            mean = runs.mean(0)
            ax.plot(STEPS, mean, style, color=color, markersize=4)
            ax.fill_between(STEPS, runs.amin(0), runs.amax(0), color=color, alpha=0.25, linewidth=0)
            ends.append((mean[-1].item(), name, color))
        ax.set(xscale="log", yscale="log", title=dataset, xlabel="sampling steps")
        low, high = ax.get_ylim()
        for end, name, color in sorted(ends):    # names at the ends of their lines, a line apart
            place = max(end, place * (high / low) ** 0.055)
            ax.text(60, place, name, color=color, fontsize=9, va="center")
        ticks = [k for k in (10, 20, 50, 100, 200, 500, 1000) if low < k < high]
        ax.set_xticks(STEPS, STEPS)
        ax.set_yticks(ticks, ticks)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    fig.axes[0].set_ylabel("KID × 1000 (axes differ)")
    return fig

if __name__ == "__main__":
    commands = {f.__name__: f for f in (sampling, samples, steps, edits, method, control, quality)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=commands)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    args = parser.parse_args()
    with torch.no_grad():
        drawn = commands[args.command](*args.runs)
    if args.command == "sampling":
        times = [700] * (len(drawn) - 1) + [3500]    # ms: the last frame is held
        drawn[0].save(args.out / "sampling.gif", save_all=True, append_images=drawn[1:],
                      duration=times, loop=0)
    else:
        drawn.savefig(args.out / f"{args.command}.png", dpi=150)
