"""Bits per dimension of test images: the variational bound of a trained run (DDPM, section 3.3).

    python assets/likelihood.py runs/shapes --n 64    # test images; from the repository's root

Prints the mean of each term with its standard error. Every image takes T calls of the U-Net.
"""
import argparse, math, sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # where diffusevae.py is
from diffusevae import load_images, load_run, randn, to_float

def discretized_log_prob(x, mean, std):
    """log P(x) [B, ...] of 256 gray levels x in [-1, 1] under N(mean, std^2), in nats.

    Each level has a bin of width 2 / 255; the outermost bins are open (2006.11239, equation 13).
    """
    upper = torch.special.ndtr((x + 1 / 255 - mean) / std)
    lower = torch.special.ndtr((x - 1 / 255 - mean) / std)
    p = torch.where(x > 0.999, 1.0, upper) - torch.where(x < -0.999, 0.0, lower)
    return p.clamp(min=1e-12).log()

@torch.no_grad()
def bits_per_dim(diffusion, network, x0, shift=0, generator=None):
    """The variational bound on -log2 p(x_0) per dimension (2006.11239, eqs. 5 and 13).

        L_T = KL(q(x_T|x_0) || p(x_T))
        L_t = sum over t >= 1 of KL(q(x_s|x_t, x_0) || p(x_s|x_t)),  s = t - 1
        L_0 = -log p(x_0|x_t) of 256 gray levels, at t = 0

    p(x_s|x_t) is q with the predicted x_0, clipped, in place of x_0; at t = 0 it has the variance
    of t = 1. Calls the network T times, with one sample x_t for each t. Takes a GaussianDiffusion,
    a network as its samplers do, and images x0 [B, ...]; returns L_T, L_t, L_0, `total`, each [B].
    """
    bits = lambda nats: nats.flatten(1).mean(1) / math.log(2)    # [B, ...] -> [B]
    d, a_last = diffusion, diffusion.alpha_bar_at(diffusion.timesteps - 1)
    L_T = bits(0.5 * (a_last * x0.square() - a_last - math.log1p(-a_last)))
    L_t = torch.zeros_like(L_T)
    for t in reversed(range(d.timesteps)):
        x_t = d.q_sample(x0, t, randn(x0.shape, x0, generator), shift)
        pred_x0, _ = d.denoise(network, x_t, t, shift)
        if t > 0:    # half the drop in signal-to-noise ratio (arXiv 2107.00630)
            a_t, a_s = d.alpha_bar_at(t), d.alpha_bar_at(t - 1)
            weight = 0.5 * (a_s / (1 - a_s) - a_t / (1 - a_t))
            L_t = L_t + bits(weight * (x0 - pred_x0).square())
    std = d.posterior_variance(1, 0) ** 0.5
    L_0 = bits(-discretized_log_prob(x0, pred_x0, std))    # pred_x0 is from t = 0
    return {"L_T": L_T, "L_t": L_t, "L_0": L_0, "total": L_T + L_t + L_0}

@torch.no_grad()
def bits_per_dim_of(model, x, generator=None):
    """The bound of a DiffuseVAE for images x [N, C, S, S]: the terms of `bits_per_dim` and "KL".

    "KL" is KL(q(z|x) || p(z)) of the VAE, 0 without one. Uses one z ~ q(z|x) per image.
    """
    x_hat, z = model.reconstruct(x, generator)
    network, shift = model.denoiser(x_hat, z), model.shift(x_hat)
    terms = bits_per_dim(model.diffusion, network, x, shift, generator)
    kl = torch.zeros_like(terms["total"])
    if model.vae:
        kl = model.vae.kl(*model.vae.encode(x)) / (math.log(2) * x[0].numel())
    return {"KL": kl, **terms, "total": kl + terms["total"]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=64)
    args = parser.parse_args()
    model, _ = load_run(args.run, trained=True)
    x, g = to_float(load_images(model.config, "test")[0][:args.n]), torch.Generator().manual_seed(0)
    for name, bits in bits_per_dim_of(model, x, g).items():
        print(f"{name:5}  {bits.mean():.3f} ± {bits.std() / len(bits)**0.5:.3f} bits per dimension")
