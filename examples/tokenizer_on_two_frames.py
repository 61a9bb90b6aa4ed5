"""What one delta token holds: a tokenizer, trained or released, on two pictures.

python examples/tokenizer_on_two_frames.py tokenizer/ first.png second.png --backbone tiny --image-size 64
"""

import argparse

import numpy as np
import torch
from PIL import Image

import deltacache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="output of train-tokenizer, or a released pytorch_model.bin")
    parser.add_argument("pictures", nargs=2)
    parser.add_argument("--backbone", default="facebook/dinov3-vitb16-pretrain-lvd1689m")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()

    backbone = deltacache.load_backbone(asked.backbone, device=asked.device)
    tokenizer = deltacache.load_tokenizer(asked.tokenizer, device=asked.device)
    size = (asked.image_size, asked.image_size)
    pictures = [np.asarray(Image.open(path).convert("RGB").resize(size)) for path in asked.pictures]
    frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (2, 3, H, W) uint8
    previous, current = backbone.patch_tokens(frames).split(1)  # (1, N, D) each

    delta = tokenizer.encode(previous, current)  # (1, D): one token for the whole change
    guess = tokenizer.decode(delta, previous)  # (1, N, D)
    print(f"{previous.shape[1]} patch tokens per frame; the delta token has {delta.shape[-1]} numbers")
    print(f"mean squared error of copying the first frame:       {(previous - current).square().mean():.5f}")
    print(f"mean squared error of decoding with the delta token: {(guess - current).square().mean():.5f}")


if __name__ == "__main__":
    main()
