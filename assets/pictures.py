"""Draw the pictures of README.md and RESULTS.md from runs; call it from the repository root.

    python diffusevae.py
    python diffusevae.py --formulation none --ddpm-steps 3950 --run-dir runs/plain
    python diffusevae.py --dataset mnist
    python diffusevae.py --dataset cifar10 --small --precision bf16 --ddpm-steps 16000
    python assets/pictures.py samples runs/shapes runs/mnist runs/cifar10-small
    python assets/pictures.py edits runs/shapes
    python assets/pictures.py steps runs/shapes runs/plain
    python assets/pictures.py method runs/shapes
    python assets/pictures.py quality
    python assets/pictures.py zdim
    python assets/pictures.py labels

Each writes assets/<command>.png, 8.7 inches wide. `quality`, `zdim` and
`labels` plot tables of RESULTS.md, repeated below.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # where diffusevae.py is
from diffusevae import generators, load_images, load_run, load_split, to_float, to_uint8

NAMES = {"shapes": "shapes", "mnist": "MNIST", "cifar10": "CIFAR-10"}

def save(fig, name):
    fig.savefig(Path(__file__).with_name(f"{name}.png"), dpi=150, bbox_inches="tight")

def panels(rows, titles, columns, labels, arrows=(), ticks=()):
    """A figure of image grids: rows[i][j] is [N, C, S, S], `columns` images wide.

    `arrows` lists the j of the grids that an arrow leads to. `ticks` names the columns of images.
    """
    images_down = sum(-(-len(row[0]) // columns) for row in rows)
    cell = 6.6 / (columns * len(titles))    # inches per image, with room for labels
    height = images_down * cell + 0.15 * len(rows) + 0.5
    fig = Figure(figsize=(8.7, height), layout="constrained")
    fig.get_layout_engine().set(wspace=0.08 if arrows else 0.03)
    axes = fig.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for j, images in enumerate(row):
            ax = axes[i, j]
            grid = make_grid(to_uint8(images), nrow=columns, padding=1, pad_value=255)
            ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")    # [H, W, 3]
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if i == 0:
                ax.set_title(titles[j], fontsize=11)
            if j == 0:
                ax.set_ylabel(labels[i], fontsize=11, rotation=0, ha="right", va="center")
            if j in arrows:
                ax.annotate("", (-0.02, 0.5), (-0.10, 0.5), "axes fraction", annotation_clip=False,
                            arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.5))
            if ticks and i == len(rows) - 1:
                pitch = images.shape[3] + 1    # pixels from one image to the next
                ax.set_xticks([(k + 0.5) * pitch for k in range(columns)], ticks, fontsize=10)
                ax.tick_params(length=0)
    return fig

def samples(run_dirs):
    """Real images, VAE samples and refined samples of each run: the first 18, not selected."""
    rows, labels = [], []
    for run_dir in run_dirs:
        model, _ = load_run(run_dir, trained=True)
        c = model.config
        x_hat, x = model.sample_both(18, generators(c.seed, "sample", range(18)))
        real = to_float(load_split(c, "test")[:18])
        rows.append([real, x_hat, x])
        labels.append(NAMES[c.dataset])
    titles = ["real (test set)", r"VAE: $\hat{x}$ = decode(z)", "refined in 10 sampling steps"]
    save(panels(rows, titles, 6, labels, arrows=(2,)), "samples")

def edits(run_dirs):
    """Shapes with the difference of two mean codes added to their own, their noise held fixed."""
    model, _ = load_run(*run_dirs, trained=True)
    images, labels = load_images("shapes", "", 16, "train")
    means = [model.encode(to_float(images[labels == k][:5000])).mean(0) for k in range(3)]
    images, labels = load_images("shapes", "", 16, "test")
    names, rows, row_labels = ("circle", "square", "triangle"), [], []
    for old, new in ((0, 1), (1, 2), (2, 0)):
        x = to_float(images[labels == old][:6])
        z, noise = model.invert(x, steps=50)
        z = z + means[new] - means[old]
        rows.append([x, model.vae.decode(z), model.decode(z, noise, steps=50)])
        row_labels.append(f"{names[old]}\nto {names[new]}")
    titles = ["test image", "edited code, VAE", "edited code, refined"]
    with torch.no_grad():
        save(panels(rows, titles, 6, row_labels, arrows=(1, 2)), "edits")

def steps(run_dirs):
    """The same codes and noise in 1 to 50 sampling steps, beside a plain DDPM."""
    model, plain = (load_run(run_dir, trained=True)[0] for run_dir in run_dirs)
    counts, rows = (1, 2, 5, 10, 50), []
    z = model.sample_prior(4, generators(0, "sample", range(4)))
    noise = model.noise(4, generators(0, "noise", range(4)))
    ours = [model.decode(z, noise, steps=n) for n in counts]
    theirs = [plain.refine(None, noise, steps=n) for n in counts]
    rows = [[torch.stack(strip, 1).flatten(0, 1) for strip in (ours, theirs)]]    # [4 * 5, C, S, S]
    titles = [r"DiffuseVAE (given $\hat{x}$)", "plain DDPM (from noise alone)"]
    ticks = ["1 step", *map(str, counts[1:])]
    save(panels(rows, titles, 5, [""], ticks=ticks), "steps")

def method(run_dirs):
    """The two stages, with a test image of the run at every arrow."""
    model, _ = load_run(*run_dirs, trained=True)
    c = model.config
    x = to_float(load_split(c, "test")[3:4])
    z = model.encode(x)
    x_hat = model.vae.decode(z)
    noise = model.noise(1, generators(2, "method", [0]))
    denoiser = model.denoiser(x_hat, z)
    path = [noise] + [x_s for _, x_s, _ in model.diffusion.trajectory(denoiser, noise, c.steps)]

    fig = Figure(figsize=(8.7, 2.75))
    ax = fig.add_axes([0, 0, 1, 1])    # 87 units wide, 27.5 high
    ax.set(xlim=(0, 87), ylim=(0, 27.5))
    ax.set_axis_off()

    def show(image, left, bottom, label, size=8):
        picture = to_uint8(image)[0].permute(1, 2, 0).numpy()    # [S, S, C]
        ax.imshow(picture, extent=(left, left + size, bottom, bottom + size), zorder=2)
        ax.text(left + size / 2, bottom - 0.6, label, ha="center", va="top", fontsize=10)

    def arrow(start, end, label="", color="black"):
        ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=color, linewidth=1.2))
        x_text, y_text = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.8
        ax.text(x_text, y_text, label, ha="center", va="bottom", fontsize=9)

    ax.text(1, 21.5, "Stage 1\nVAE", fontsize=11, weight="bold", va="center")
    show(x, 11, 17.5, "image $x$")
    arrow((20, 21.5), (30, 21.5), "encoder")
    code = z.reshape(-1, 4).numpy()    # [z_dim / 4, 4]
    ax.imshow(code, extent=(31, 39, 17.5, 25.5), cmap="PuOr", vmin=-2.5, vmax=2.5, zorder=2)
    ax.text(35, 16.9, f"code $z$, {c.z_dim} numbers", ha="center", va="top", fontsize=10)
    arrow((40, 21.5), (50, 21.5), "decoder")
    show(x_hat, 51, 17.5, r"blurry $\hat{x}$")
    ax.text(72, 21.5, "to generate, sample $z$\nfrom a Gaussian mixture", fontsize=9, ha="center",
            va="center", style="italic")

    ax.text(1, 6.5, "Stage 2\nDDPM", fontsize=11, weight="bold", va="center")
    kept = [0, 3, 6, 8, c.steps]
    labels = ["noise", *(f"after {k} steps" for k in kept[1:-1]), "refined image"]
    for i, (k, label) in enumerate(zip(kept, labels)):
        left = 11 + 17 * i
        show(path[k], left, 2.5, label)
        if i > 0:
            arrow((left - 8, 6.5), (left - 1, 6.5), "U-Net")
    line = dict(color="gray", linewidth=1, linestyle=":")    # x_hat to every step
    ax.plot([55, 55, 23.5], [14.3, 12.8, 12.8], **line)
    for i in range(1, 5):
        x_text = 11 + 17 * i - 4.5
        ax.plot([55, x_text], [12.8, 12.8], **line)
        arrow((x_text, 12.8), (x_text, 9.6), color="gray")
    save(fig, "method")

# KID x 1000 after 2, 5, 10 and 50 sampling steps, from the tables of RESULTS.md. Where there are
# three training runs, there is one row for each. The plain DDPM has the better of two spacings.
STEPS = (2, 5, 10, 50)
KID = {
    "shapes": {
        "VAE": [283],
        "plain DDPM": [[585, 99, 35, 17], [474, 90, 37, 22], [556, 119, 45, 27]],
        "DiffuseVAE": [[104, 14, 15, 20], [120, 13, 12, 16], [130, 23, 22, 27]],
        "z from N(0, I)": [[166, 71, 71, 77]]},
    "MNIST": {
        "VAE": [134],
        "plain DDPM": [[596, 189, 114, 79]],
        "DiffuseVAE": [[173, 58, 31, 32]],
        "z from N(0, I)": [[222, 101, 76, 86]]},
    "CIFAR-10": {    # --small --precision bf16 --ddpm-steps 16000
        "VAE": [697],
        "plain DDPM": [[931, 471, 235, 129]],
        "DiffuseVAE": [[594, 274, 152, 111]],
        "z from N(0, I)": [[605, 276, 154, 112]]}}
COLORS = {"VAE": "gray", "plain DDPM": "C0", "z from N(0, I)": "C1", "DiffuseVAE": "C2"}

def panels(xlabel, ticks, ylabels, height=2.7):
    """A figure of plots side by side, with the same logarithmic x-axis."""
    fig = Figure(figsize=(8.7, height), layout="constrained")
    axes = fig.subplots(1, len(ylabels))
    for ax, ylabel in zip(axes, ylabels):
        ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
        ax.set_xticks(ticks, ticks)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes

def quality(run_dirs):
    """KID against the number of sampling steps, one panel for each dataset."""
    ylabels = ("KID × 1000 (axes differ)", "", "")
    fig, axes = panels("sampling steps", STEPS, ylabels, height=3.2)
    for ax, (dataset, curves) in zip(axes, KID.items()):
        for name, runs in curves.items():
            color = COLORS[name]
            if name == "VAE":
                ax.axhline(runs[0], color=color, linestyle=":")
                continue
            runs = torch.tensor(runs, dtype=torch.float64)
            line = "o--" if name == "z from N(0, I)" else "o-"    # on CIFAR-10 it covers another
            ax.plot(STEPS, runs.log().mean(0).exp(), line, color=color, markersize=4)
            ax.fill_between(STEPS, runs.amin(0), runs.amax(0), color=color, alpha=0.25, linewidth=0)
        ax.set(yscale="log", title=dataset)
        low, high = ax.get_ylim()
        ticks = [k for k in (20, 50, 100, 200, 500, 1000) if low < k < high]
        ax.set_yticks(ticks, ticks)
        ax.yaxis.set_minor_locator(NullLocator())
    labels = {"VAE": (22, 142), "plain DDPM": (2.8, 430), "z from N(0, I)": (11, 62),
              "DiffuseVAE": (11, 35)}    # where the lines of MNIST leave room
    for name, position in labels.items():
        axes[1].text(*position, name, color=COLORS[name], fontsize=10)
    save(fig, "quality")

# Shapes by the size of the code. Columns: z_dim, error of x_hat, KID (z from the mixture), KID (z
# of test images), and the standard errors of both KIDs.
Z_DIM = [(2, 0.0959, 11.4, 10.4, 2.4, 2.2), (4, 0.0550, 13.5, 11.2, 2.4, 1.5),
         (8, 0.0226, 17.5, 14.6, 3.1, 2.6), (16, 0.0226, 14.9, 14.0, 2.7, 2.6),
         (32, 0.0229, 20.6, 17.3, 2.9, 2.8)]
# MNIST by label: labeled images per digit -> accuracy (%) of VAE images, accuracy (%) of refined
# images and KID of refined images, each for three draws of the labeled images.
LABELED = {10: ((90, 92, 93), (87, 88, 88), (31, 33, 28)),
           30: ((89, 92, 90), (85, 88, 86), (32, 37, 33)),
           100: ((90, 89, 90), (87, 85, 86), (31, 33, 31)),
           1000: ((95, 96, 95), (93, 94, 92), (26, 20, 24))}

def zdim(run_dirs):
    """The quality of shapes, and the error of x_hat, against the size of the code."""
    sizes, error, mixture, codes, std, std_codes = zip(*Z_DIM)
    ylabels = (r"mean squared error of $\hat{x}$", "KID × 1000, refined")
    fig, (left, right) = panels("z_dim", sizes, ylabels)
    left.plot(sizes, error, "o-", color=COLORS["VAE"])
    right.errorbar(sizes, mixture, std, fmt="o-", capsize=3, color=COLORS["DiffuseVAE"],
                   label="z from the mixture")
    right.errorbar([1.06 * size for size in sizes], codes, std_codes, fmt="o--", capsize=3,
                   color="C3", label="z of test images")
    left.set_ylim(0)
    right.set_ylim(0)
    right.legend(frameon=False, loc="lower right")
    save(fig, "zdim")

def labels(run_dirs):
    """Accuracy and KID of digits generated by label, against the number of labeled images."""
    ylabels = ("accuracy, %", "KID × 1000, refined")
    fig, (left, right) = panels("labeled images per digit", list(LABELED), ylabels)
    for ax, column, name in ((left, 0, "VAE"), (left, 1, "DiffuseVAE"), (right, 2, "DiffuseVAE")):
        draws = np.array([row[column] for row in LABELED.values()])    # [4, 3]
        ax.plot(list(LABELED), draws.mean(1), "-", color=COLORS[name])
        ax.plot(list(LABELED), draws, "o", color=COLORS[name], markersize=4)
    left.text(190, 93, "VAE", color=COLORS["VAE"])
    left.text(330, 88, "refined", color=COLORS["DiffuseVAE"])
    left.set_ylim(80, 100)
    right.set_ylim(0)
    save(fig, "labels")

COMMANDS = ("samples", "edits", "steps", "method", "quality", "zdim", "labels")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    with torch.no_grad():
        globals()[sys.argv[1]](sys.argv[2:])
